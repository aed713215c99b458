"""The virtual clock: how long an engine takes for a batch, and how many requests per second it can serve.

Knows a profile's step costs (`mope.fairness.engine_costs`); does not know requests or schedulers.
"""

from __future__ import annotations

from mope.fairness import MetricsMapper
from mope.fairness.engine_costs import RooflineCosts
from mope.fairness.profiles import Profile


class StepClock:
    """Seconds of batches that mix decodes and pieces of prompts, as chunked prefill makes them.

    By a roofline, a token of a prompt is a token of the batch like any other: it needs the same arithmetic, and the
    weights are read once for all. So a batch of D decodes and n prompt tokens takes `step_s(D + n, context)`, where the
    context of every request in it is read once. Attention inside a prompt is counted as if one token attended: left
    out are 2 % of the arithmetic of a prompt of 1,000 tokens on Llama-2-7b. By a fitted profile, a prompt token adds
    what was measured; a batch of prompts alone takes `prefill_s(n)`.

    The profile's overhead per step stays the same where the engine schedules the next batch while one runs.

    Args:
        profile: of the engine.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._costs = profile.costs()
        self._mapper = MetricsMapper(profile)

    def step_s(self, num_decodes: int, decode_context: int, prompt_tokens: int, prompt_context: int) -> float:
        """Seconds that a batch takes; 0 for an empty one.

        Args:
            num_decodes: requests that get one token each.
            decode_context: tokens of KV cache that these hold.
            prompt_tokens: tokens of prompts that are taken up, recomputed ones included.
            prompt_context: tokens of KV cache that these requests hold, those tokens included.
        """
        if not num_decodes and not prompt_tokens:
            return 0.0
        if isinstance(self._costs, RooflineCosts):
            return self._costs.step_s(num_decodes + prompt_tokens, decode_context + prompt_context)
        if not num_decodes:
            return self._costs.prefill_s(prompt_tokens)
        return self._costs.step_s(num_decodes, decode_context) + self._costs.prompt_token_s * prompt_tokens

    def idle_latency_s(self, prompt_tokens: int, response_tokens: int) -> float:
        """Seconds from arrival to the last token if nobody else were there, by the metrics mapper."""
        return self._mapper.estimate(prompt_tokens, response_tokens).latency_s

    def capacity(
        self,
        prompt_tokens: float,
        response_tokens: float,
        *,
        max_num_seqs: int,
        kv_tokens: int,
        reserves: bool = False,
    ) -> float:
        """Requests per second that a full engine finishes, by a mean-field estimate.

        With p prompt and m response tokens, B = min(max_num_seqs, kv_tokens / (p + m/2)) requests run at a time, and
        each step ends B/m of them and takes up as many prompts: B/m / step(B, B(p + m/2), pB/m).

        Args:
            prompt_tokens: p, the mean.
            response_tokens: m, the mean.
            max_num_seqs: requests that run at a time, at most.
            kv_tokens: tokens that the KV cache holds.
            reserves: whether a request holds room for its whole answer from the start, as in S-LoRA: p + m in B.
        """
        held = prompt_tokens + (response_tokens if reserves else response_tokens / 2)
        num_running = max(1.0, min(float(max_num_seqs), kv_tokens / held))
        ended = num_running / max(1.0, response_tokens)
        context = num_running * (prompt_tokens + response_tokens / 2)
        step_s = self.step_s(round(num_running), round(context), round(ended * prompt_tokens), 0)
        return ended / step_s
