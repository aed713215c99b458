"""A KV connector as of a decode node: each prompt's KV cache comes from elsewhere, some steps later. No data moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

STEPS = 5  # of the engine that a load takes


@dataclass
class Loads(KVConnectorMetadata):
    """Requests whose loads begin."""

    request_ids: list[str] = field(default_factory=list)


class SlowConnector(KVConnectorBase_V1):
    """Has all of each prompt but its last token."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        later = {} if kv_cache_config is None else {"kv_cache_config": kv_cache_config}  # vLLM 0.10 gives none
        super().__init__(vllm_config=vllm_config, role=role, **later)
        self._begin: list[str] = []
        self._seen: set[str] = set()
        self._left: dict[str, int] = {}

    # -- in the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that can be loaded, and that this takes a while."""
        tokens = request.num_prompt_tokens - 1 - num_computed_tokens
        return (0, False) if request.request_id in self._seen or tokens <= 0 else (tokens, True)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A load begins."""
        if num_external_tokens > 0:
            self._seen.add(request.request_id)
            self._begin.append(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """What the worker is told."""
        begin, self._begin = self._begin, []
        return Loads(begin)

    # -- in the worker

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Loads begin."""
        super().bind_connector_metadata(connector_metadata)
        self._left.update(dict.fromkeys(connector_metadata.request_ids, STEPS))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Loads that are complete; asked once a step."""
        self._left = {name: left - 1 for name, left in self._left.items()}
        done = {name for name, left in self._left.items() if left <= 0}
        for name in done:
            del self._left[name]
        return None, done or None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to save."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""
