"""Profiles of engines: what comes with mope is what was published, files come back as they were, mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mope.errors import ConfigError, ProfileError
from mope.fairness.engine_costs import touched_shares
from mope.fairness.profiles import (
    Assumptions,
    Errors,
    FittedProfile,
    Measured,
    RooflineProfile,
    list_profiles,
    load_profile,
    roofline,
    save_profile,
)

ERRORS = Errors(num_measurements=10, median=0.03, p90=0.1)
MEASURED = Measured(
    url="http://127.0.0.1:8000",
    server="vllm 0.32.0",
    llm="toy",
    date="2026-11-26T12:00:00+00:00",
    command="mope profile --url http://127.0.0.1:8000 --output toy.json",
    machine="not said",
    complete=True,
    num_prefills=24,
    num_steps=100,
    prompt_tokens=(32, 2048),
    num_running=(1, 32),
    context_tokens=(40, 50_000),
    prefill_errors=ERRORS,
    step_errors=ERRORS,
)
FITTED = FittedProfile(
    name="toy",
    step_fixed_s=8e-3,
    step_request_s=1e-4,
    step_context_s=2e-7,
    prefill_fixed_s=1e-2,
    prefill_token_s=5e-5,
    prefill_square_s=1e-9,
    saturated_requests=32,
    saturated_tokens_per_s=2000.0,
    measured=MEASURED,
)

# vocabulary, width, width of the MLP, layers, heads, KV heads, width of a head, experts: config.json of each LLM
SHAPES = {
    "llama-2-7b": (32_000, 4096, 11_008, 32, 32, 32, 128, 1),
    "llama-3.1-8b": (128_256, 4096, 14_336, 32, 32, 8, 128, 1),
    "llama-2-13b": (32_000, 5120, 13_824, 40, 40, 40, 128, 1),
    "llama-2-70b": (32_000, 8192, 28_672, 80, 64, 8, 128, 1),
    "llama-3.1-70b": (128_256, 8192, 28_672, 80, 64, 8, 128, 1),
    "mixtral-8x7b": (32_000, 4096, 14_336, 32, 32, 8, 128, 8),
    "qwen3-30b-a3b": (151_936, 2048, 768, 48, 32, 4, 128, 128),
}
# as the LLMs' own pages round them, in billions: all parameters, those that a token passes
PUBLISHED = {
    "llama-2-7b": (6.7, 6.7),
    "llama-3.1-8b": (8.0, 8.0),
    "llama-2-13b": (13.0, 13.0),
    "llama-2-70b": (69.0, 69.0),
    "llama-3.1-70b": (70.6, 70.6),
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.3),
}


@pytest.mark.parametrize("name", list_profiles())
def test_each_named_profile_loads_under_its_name_and_holds_a_long_request(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert isinstance(profile, RooflineProfile)
    assert profile.capacity_tokens >= 4096


def test_the_usual_hardware_and_llms_are_there() -> None:
    names = set(list_profiles())
    assert {name.partition("/")[0] for name in names} == {
        "a100-40gb", "a100-80gb", "h100", "h200", "l40s", "a10g", "l4",
    }  # fmt: skip
    for wanted in ("a100-80gb/llama-2-7b", "a100-80gb/llama-2-70b-tp8", "h100/llama-3.1-70b-tp4", "l4/llama-3.1-8b"):
        assert wanted in names
    assert "a10g/llama-2-70b" not in names  # 138 GB of weights


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_follow_from_the_published_shape(name: str) -> None:
    vocabulary, width, inner, layers, heads, kv_heads, head, experts = SHAPES[name]
    llm = load_profile(f"h200/{name}-tp8").llm  # type: ignore[union-attr]
    assert (llm.num_layers, llm.hidden_size, llm.num_heads, llm.num_kv_heads, llm.head_dim, llm.num_experts) == (
        layers, width, heads, kv_heads, head, experts,
    )  # fmt: skip
    attention = 2 * width * heads * head + 2 * width * kv_heads * head
    norms = 2 * width + (2 * head if name.startswith("qwen3") else 0)
    gate = width * experts if experts > 1 else 0
    mlp = 3 * width * inner * experts
    assert llm.parameters == 2 * vocabulary * width + layers * (attention + mlp + gate + norms) + width
    assert llm.expert_parameters == (layers * mlp if experts > 1 else 0)
    assert (llm.parameters / 1e9, llm.active_parameters / 1e9) == pytest.approx(PUBLISHED[name], abs=0.06)


def test_kv_cache_of_a_token() -> None:
    llama = roofline("a100-80gb", "llama-2-7b").llm
    assert llama.kv_bytes_per_token() == 2 * 32 * 32 * 128 * 2  # half a megabyte, as the vLLM paper's figures imply
    grouped = roofline("h100", "llama-3.1-70b", 4).llm
    assert [grouped.kv_bytes_per_token(gpus) for gpus in (1, 8, 16)] == [327_680, 40_960, 40_960]


@pytest.mark.parametrize(
    ("name", "peak_bandwidth", "weights"),
    [
        ("a100-80gb/llama-2-7b", 2.039e12, 13.5e9),
        ("a10g/llama-2-7b", 0.6e12, 13.5e9),
        ("h100/llama-3.1-8b", 3.35e12, 16.1e9),
        ("h100/llama-3.1-70b-tp4", 3.35e12, 141.1e9 / 4),
    ],
)
def test_a_lone_decode_step_takes_what_reading_the_weights_takes(
    name: str, peak_bandwidth: float, weights: float
) -> None:
    least_s = weights / peak_bandwidth
    step_s = load_profile(name).costs().step_s(1, 500)
    assert least_s < step_s < 1.9 * least_s  # a lone request is bound by memory on all of them


@pytest.mark.parametrize("name", list_profiles())
def test_no_throughput_is_above_what_the_peak_rates_allow(name: str) -> None:
    profile = load_profile(name)
    assert isinstance(profile, RooflineProfile)
    costs = profile.costs()
    flops = profile.tensor_parallel * profile.hardware.flops
    for num_running in (1, 16, 256, 4096):
        per_s = num_running / costs.step_s(num_running, 0)
        assert per_s < flops / (2 * profile.llm.active_parameters)
    prefill_s = costs.prefill_s(2048)
    assert prefill_s > 2 * profile.llm.active_parameters * 2048 / flops
    assert prefill_s > profile.llm.parameters * 2 / profile.tensor_parallel / profile.hardware.bandwidth * 0.9


def test_more_gpus_are_quicker_but_less_than_in_proportion() -> None:
    step_s = [roofline("a100-80gb", "llama-2-70b", gpus).costs().step_s(8, 8 * 500) for gpus in (2, 4, 8)]
    assert step_s == sorted(step_s, reverse=True)
    assert step_s[0] < 2 * step_s[1] < 4 * step_s[2]
    over_pcie = [roofline("l40s", "llama-2-13b", gpus).costs().prefill_s(2000) for gpus in (1, 2, 4)]
    assert over_pcie[2] > over_pcie[0] / 4 * 1.5  # all-reduces over PCIe eat most of the gain


def test_an_moe_reads_more_experts_as_more_tokens_choose_them() -> None:
    for num_experts, per_token in ((8, 2), (128, 8), (1, 1)):
        shares = touched_shares(num_experts, per_token)
        exact = [1 - (1 - per_token / num_experts) ** num for num in range(len(shares))]
        assert shares == pytest.approx(exact, abs=2e-6)
        assert shares[0] == 0.0
        assert shares[-1] == 1.0
    mixtral, dense = (load_profile(f"h200/{name}-tp2").costs() for name in ("mixtral-8x7b", "llama-2-13b"))
    assert mixtral.step_s(1, 0) < 1.1 * dense.step_s(1, 0)  # 12.9 of 46.7 billion parameters are read
    assert mixtral.step_s(32, 0) > 2 * dense.step_s(32, 0)  # all of them


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a100-80gb/llama-2-7", "no LLM 'llama-2-7' comes with mope; did you mean 'llama-2-7b'?"),
        ("a100/llama-2-7b", "no hardware 'a100' comes with mope; did you mean 'a100-80gb'?"),
        ("h10/llama-2-7b", "did you mean 'h100'?"),
        ("a10g/llama-2-70b", "138.0 GB of weights, and 1 x a10g hold 21.6 GB; take more GPUs (-tp2, -tp4, -tp8)"),
        ("h100/llama-2-7b-tp3", "32 heads, which 3 GPUs can't share evenly"),
        ("somewhere/profile.json", "neither a file nor one that comes with mope"),
        ("nonsense", "a name is HARDWARE/LLM, such as a100-80gb/llama-2-7b"),
        ("", "neither a file"),
    ],
)
def test_a_wrong_name_is_one_line_with_what_to_type(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("profile", [FITTED, roofline("h200", "qwen3-30b-a3b", 2)], ids=["fitted", "roofline"])
def test_a_saved_profile_comes_back_as_it_was(profile: FittedProfile | RooflineProfile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(profile, path)
    again = load_profile(path)
    assert again == profile
    before = path.read_bytes()
    save_profile(again, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_profile_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="can't be written"):
        save_profile(FITTED, tmp_path / "missing" / "profile.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 7}, "has format_version 7, this mope reads 1; measure anew"),
        ({"kind": "guessed"}, 'expected a JSON object with "kind" roofline or fitted'),
        ({"step_fixed_s": -1.0}, "step_fixed_s: Input should be greater than or equal to 0"),
        ({"step_fixed_s": 1e4}, "step_fixed_s: Input should be less than or equal to 1000"),
        ({"step_fixed_s": float("nan")}, "step_fixed_s: Input should be"),
        ({"step_fixed_s": float("inf")}, "step_fixed_s: Input should be"),
        ({"step_fixed_s": 0.0, "step_request_s": 0.0}, "a step and a first token take time"),
        ({"prefill_fixed_s": 0.0}, "a step and a first token take time"),
        ({"saturated_requests": 0}, "saturated_requests: Input should be greater than or equal to 1"),
        ({"speed": 3}, "speed: Extra inputs are not permitted"),
    ],
)
def test_a_profile_that_cannot_be_used_names_what_is_wrong(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(FITTED.model_dump(mode="json") | change), encoding="utf-8")
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", '"a"', ""])
def test_a_file_that_is_no_profile_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ProfileError):
        load_profile(path)


def test_assumptions_are_stated_and_can_be_changed(tmp_path: Path) -> None:
    careful = roofline("a100-80gb", "llama-2-7b", assumptions=Assumptions(bandwidth_fraction=0.4))
    save_profile(careful, tmp_path / "careful.json")
    assert json.loads((tmp_path / "careful.json").read_text())["assumptions"]["bandwidth_fraction"] == 0.4
    usual = roofline("a100-80gb", "llama-2-7b")
    overhead_s = usual.assumptions.overhead_s
    reading_s = usual.costs().step_s(1, 0) - overhead_s
    assert careful.costs().step_s(1, 0) - overhead_s == pytest.approx(2 * reading_s)
