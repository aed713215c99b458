"""Over which of vLLM's schedulers the fair one lies, and where its options come from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.scheduler import Scheduler

from mope.serving_hooks.replay.engine import EngineSettings
from mope.serving_hooks.replay.engine_vllm import VllmEngine
from mope.serving_hooks.vllm import scheduler as module

HOOK = "mope.serving_hooks.vllm.make_scheduler"


def config(overlapped: bool, diffusion: bool = False, chosen: type = Scheduler) -> Any:
    class Config:
        scheduler_cls, async_scheduling = HOOK, overlapped

        def get_scheduler_cls(self) -> Any:
            return chosen if self.scheduler_cls is None else self.scheduler_cls

    return SimpleNamespace(scheduler_config=Config(), diffusion_config={} if diffusion else None)


def test_it_lies_over_the_class_that_vllm_would_use() -> None:
    class Other(Scheduler):  # type: ignore[misc, unused-ignore]
        pass

    found = module._over(module._stock(config(False, chosen=Other)))
    assert found.__mro__[1:3] == (module.FairMixin, Other)
    for overlapped, known in ((False, module.FairScheduler), (True, module.FairAsyncScheduler)):
        base = known.__bases__[1]
        assert module._over(module._stock(config(overlapped, chosen=base))) is known
        plain = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=overlapped))
        assert module._over(module._stock(plain)) is known  # a release without `get_scheduler_cls`


@pytest.mark.parametrize("overlapped", [False, True])
def test_diffusion_models_keep_their_scheduler(overlapped: bool) -> None:
    diffusion = pytest.importorskip("vllm.v1.core.sched.diffusion_scheduler")
    found = module._over(module._stock(config(overlapped, diffusion=True)))
    wanted = diffusion.DiffusionAsyncScheduler if overlapped else diffusion.DiffusionScheduler
    assert found.__mro__[1:3] == (module.FairMixin, wanted)
    assert module.compat.class_mismatches(found) == []


def test_options_of_the_environment_reach_the_scheduler_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def policy(options: dict[str, Any]) -> str:
        engine = VllmEngine(EngineSettings(), kv_tokens=16_384, max_model_len=2_048, scheduler=HOOK, options=options)
        return str(engine.scheduler.mope.options.policy)

    monkeypatch.setenv("MOPE_OPTIONS", '{"policy": "vtc", "predictor": "none"}')
    assert policy({}) == "vtc"
    assert policy({"mope": {"policy": "deficit-round-robin", "predictor": "none"}}) == "deficit-round-robin"
