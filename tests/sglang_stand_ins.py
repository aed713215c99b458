"""As much of SGLang's scheduler and requests as the hook touches, for tests that run without SGLang."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mope.serving_hooks.carried import Carried


class FINISH_LENGTH:
    """Why a request ended."""


class FINISH_ABORT:
    """Why a request ended."""


class Req:
    """A request."""

    def __init__(
        self,
        client: str | None,
        num_prompt: int = 10,
        cap: int | None = 100,
        predicted: float | None = None,
        rid: str = "same",
        **parameters: Any,
    ) -> None:
        carried = Carried(client, predicted).write()
        self.rid = rid
        self.sampling_params = SimpleNamespace(
            **{"max_new_tokens": cap, "custom_params": carried or None, "ignore_eos": False, **parameters}
        )
        self.origin_input_ids = [7] * num_prompt
        self.output_ids: list[int] = []
        self.finished_reason: object | None = None
        self.cached_tokens = 0
        self.kv_committed_len = 0
        self.lora_id: str | None = None
        self.routing_key: str | None = None

    @property
    def output_ids_through_stop(self) -> list[int]:
        return self.output_ids

    def finished(self) -> bool:
        return self.finished_reason is not None


def scheduler(policy: str = "equinox", *, tp_size: int = 1, rank: int = 0, **arguments: Any) -> Any:
    """A scheduler that has just been built, with a policy object of its own."""
    server_args = SimpleNamespace(
        **{
            "schedule_policy": policy,
            "tp_size": tp_size,
            "pp_size": 1,
            "dp_size": 1,
            "nnodes": 1,
            "tokenizer_worker_num": 1,
            **arguments,
        }
    )
    return SimpleNamespace(
        server_args=server_args,
        schedule_policy=policy,
        ps=SimpleNamespace(pp_rank=0, attn_tp_rank=rank, attn_cp_rank=0, dp_rank=None, attn_dp_rank=0),
        policy=SimpleNamespace(),
        waiting_queue=[],
        is_generation=True,
        max_running_requests=4,
        max_total_num_tokens=1000,
        page_size=1,
    )
