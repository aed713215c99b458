"""What may go wrong in a server, brought about on purpose: `MOPE_TEST_FAULT` names one of these functions."""

from __future__ import annotations

import os
import random
import time

CALLS_BEFORE = 6  # that go well


def bring(name):
    """Brings one about in this process."""
    globals()[name.replace("-", "_")]()


def ranks_disagree():
    """Each process has an order of its own: what a clock or a hash in the order would do."""
    from mope.serving_hooks.sglang.policy import FairScheduling

    ordered = FairScheduling.order

    def order(self, waiting_queue, *args):
        ordered(self, waiting_queue, *args)
        random.Random(os.getpid()).shuffle(waiting_queue)

    FairScheduling.order = order


def order_raises():
    """The order fails once some requests have been served."""
    _fail_after_some("FairScheduling", "order")


def booking_raises():
    """Booking a step fails once some have been booked."""
    _fail_after_some("FairScheduling", "booked")


def _fail_after_some(owner, name):
    from mope.serving_hooks.sglang import policy

    kind = getattr(policy, owner)
    original, calls = getattr(kind, name), [0]

    def failing(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] > CALLS_BEFORE:
            raise RuntimeError("a fault on purpose")
        return original(self, *args, **kwargs)

    setattr(kind, name, failing)


def front_raises():
    """The front end fails at the first request."""
    from mope.serving_hooks.sglang.front import FrontEnd

    async def prepare(self, obj, request):
        raise RuntimeError("a fault on purpose")

    FrontEnd.prepare = prepare


def predictor_raises():
    """The predictor fails at every request."""

    def predict(self, requests):
        raise RuntimeError("a fault on purpose")

    _predict_by(predict)


def predictor_hangs():
    """The predictor takes far longer than any deadline."""
    from mope.predictor import LengthPredictor

    original = LengthPredictor.predict_batch

    def predict(self, requests, *args, **kwargs):
        time.sleep(20)
        return original(self, requests, *args, **kwargs)

    _predict_by(predict)


def predictor_says_nan():
    """Predictions are not numbers."""
    from mope.serving_hooks.front import Front, Predicted

    async def predict(self, asked):
        return Predicted(float("nan"), (float("nan"),) * 14, "x|y|z")

    Front.predict = predict


def _predict_by(predict):
    from mope.predictor import LengthPredictor

    LengthPredictor.predict_batch = predict
