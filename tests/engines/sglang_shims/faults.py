"""What may go wrong in a server, brought about on purpose: `MOPE_TEST_FAULT` names one of these functions."""

from __future__ import annotations

import os
import random
import time

CALLS_BEFORE = 3  # that go well


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


def predictor_misbehaves():
    """The predictor fails, hangs or says what is no number, as the prompt bids."""
    from mope.predictor import LengthPredictor
    from mope.serving_hooks.front import Front, FrontPrediction

    predict_batch, predict = LengthPredictor.predict_batch, Front.predict

    def failing(self, requests, *args, **kwargs):
        for request in requests:
            if request.prompt == "raise":
                raise RuntimeError("a fault on purpose")
            if request.prompt == "hang":
                time.sleep(20)
        return predict_batch(self, requests, *args, **kwargs)

    async def saying(self, asked, *rest):
        said = {"nan": float("nan"), "infinite": float("inf")}.get(asked.requests[0].prompt if asked.requests else "")
        return (
            await predict(self, asked, *rest)
            if said is None
            else FrontPrediction(said, (said,) * 14, "llm|family|mode")
        )

    LengthPredictor.predict_batch, Front.predict = failing, saying
