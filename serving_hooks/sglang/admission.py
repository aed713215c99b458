"""Admission and retraction by predicted lengths, where the operator asks for them.

SGLang reserves KV cache for `max_new_tokens` of the newcomer and a share, one for all, of what running requests may
still generate; if that was too little it retracts. With `predicted_admission` a request is admitted if all who run and
this one will fit at their predicted peak (`mope.fairness.admission`), and SGLang's own check is left with the tokens
that are needed now. With `victims`, SGLang retracts whom the policy names first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mope.fairness.admission import fits
from mope.serving_hooks.sglang.policy import ATTRIBUTE

if TYPE_CHECKING:
    from mope.serving_hooks.sglang.policy import FairScheduling, Mark

_OUTLIVED = 0.5  # of its prediction: what a request is taken to need still, however long it has run


def running_offset(original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `PrefillAdder._get_running_request_total_token_offset`: what is kept free for a running request."""
    fair = _predicting(req)
    return 1 if fair is not None else original(adder, req, *args, **kwargs)


def add_one_req(original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `PrefillAdder.add_one_req`: refuses who will not fit; notes who was admitted."""
    mark: Mark | None = getattr(req, ATTRIBUTE, None)
    if mark is not None:
        mark.fair.skips.tried(mark.ticket)
    fair = _predicting(req)
    if fair is None:
        result = original(adder, req, *args, **kwargs)
    else:
        if not fair.guard.run(lambda: has_room(fair, req), True, "looking for room"):
            return _no_token()
        result = _with_next_token_only(original, adder, req, *args, **kwargs)
    if mark is not None and adder.can_run_list and adder.can_run_list[-1] is req:
        mark.fair.guard.run(lambda: mark.fair.admitted(req), None, "admitting a request")
    return result


def has_room(fair: FairScheduling, req: Any) -> bool:
    """Whether all who run and this one will fit, as far as predictions go."""
    scheduler, options = fair.scheduler, fair.steward.options
    rounding = int(scheduler.page_size) - 1  # the last page of each is not full
    running = [_need(other, rounding) for other in fair.running.values()]
    return fits(_need(req, rounding), running, int(scheduler.max_total_num_tokens), margin=options.kv_margin)


def _need(req: Any, rounding: int) -> tuple[int, float]:
    """Tokens that a request holds once it runs, and those that it is predicted to add."""
    ticket, generated = getattr(req, ATTRIBUTE).ticket, len(req.output_ids)
    remaining = max(1.0, ticket.predicted_tokens - generated, _OUTLIVED * ticket.predicted_tokens)
    cap = req.sampling_params.max_new_tokens
    if cap is not None:
        remaining = min(remaining, max(1.0, float(cap - generated)))
    return len(req.origin_input_ids) + generated + rounding, remaining


def _with_next_token_only(original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's own check, for what the request needs now."""
    parameters = req.sampling_params
    cap = parameters.max_new_tokens
    if parameters.ignore_eos and getattr(adder.tree_cache, "disable", True):
        return original(adder, req, *args, **kwargs)  # SGLang foresees the peak of these by itself
    parameters.max_new_tokens = min(cap, len(req.output_ids) + 1)
    try:
        return original(adder, req, *args, **kwargs)
    finally:
        parameters.max_new_tokens = cap


def retraction_order(original: Any, reqs: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Around `ScheduleBatch._get_decode_retraction_order`: positions of whom to keep first; the last one goes first."""
    order = original(reqs, *args, **kwargs)
    marks: list[Mark | None] = [getattr(req, ATTRIBUTE, None) for req in reqs]
    fair = next((mark.fair for mark in marks if mark is not None), None)
    if fair is None or fair.steward.options.victims == "engine":
        return order
    return fair.guard.run(lambda: _by_victims(fair, marks, order), order, "choosing whom to retract")


def _by_victims(fair: FairScheduling, marks: list[Mark | None], order: list[int]) -> list[int]:
    names = [mark.name if mark is not None else f"unknown {position}" for position, mark in enumerate(marks)]
    goes_at = {name: place for place, name in enumerate(fair.steward.policy.victims(names[i] for i in order))}
    return sorted(order, key=lambda position: -goes_at[names[position]])


def _predicting(req: Any) -> FairScheduling | None:
    mark: Mark | None = getattr(req, ATTRIBUTE, None)
    if mark is None or not mark.fair.guard.ok or not mark.fair.steward.options.predicted_admission:
        return None
    return mark.fair


def _no_token() -> Any:
    from sglang.srt.managers.schedule_policy import AddReqResult

    return AddReqResult.NO_TOKEN
