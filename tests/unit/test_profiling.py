"""`mope profile`: what a server of known coefficients was told is found again; everything that can go wrong is said."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_server import Behaviour, serving

from mope.cli import main
from mope.errors import DataError, ServerError
from mope.fairness.engine_costs import Load
from mope.fairness.mapper import MetricsMapper
from mope.fairness.profiles import FittedProfile, load_profile
from mope.profiling.client import StreamedAnswer, capacity_tokens
from mope.profiling.config import ProfilingConfig
from mope.profiling.fit import fit_prefill, fit_steps, nonnegative, saturation
from mope.profiling.sweep import Prefill, Steps, num_tokens_asked, planned, steps_together

KNOWN = Behaviour(
    api_key="s3cret",
    metrics='vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="4000"} 1.0\n',
)
MAX_WAY_S = 0.05  # what the way there and back may cost on a busy machine
QUICK = (
    "--rounds", "1", "--prompt-tokens", "32,64,128,256", "--concurrency", "1,2", "--context-tokens", "32,256",
    "--decode-tokens", "8", "--num-checks", "0", "--timeout-s", "5",
)  # fmt: skip


@dataclass(frozen=True)
class Profiled:
    """A run of `mope profile` that is over."""

    folder: Path
    profile: FittedProfile
    printed: dict[str, Any]
    bodies: list[dict[str, Any]]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    """The server of known coefficients, measured once."""
    folder = tmp_path_factory.mktemp("profiled")
    capture = pytest.MonkeyPatch()
    printed: list[str] = []
    capture.setattr("builtins.print", lambda text, **_: printed.append(text))
    with serving(KNOWN) as server:
        arguments = [
            "profile", "--url", server.url, "--output", str(folder / "toy.json"), "--api-key", "s3cret", "--json",
            "--rounds", "2", "--prompt-tokens", "32,256,1024,2048,3072", "--concurrency", "1,2,4,8",
            "--context-tokens", "32,512", "--decode-tokens", "24", "--num-checks", "4", "--machine", "a clock",
        ]  # fmt: skip
        status = main(arguments)
        bodies = list(server.bodies)
    capture.undo()
    assert status == 0
    profile = load_profile(folder / "toy.json")
    assert isinstance(profile, FittedProfile)
    return Profiled(folder, profile, json.loads(printed[0]), bodies)


def test_the_coefficients_of_a_step_are_found_again(profiled: Profiled) -> None:
    # the server keeps its pace over many steps, so that single delays of a busy machine hardly matter
    assert profiled.profile.step_fixed_s == pytest.approx(KNOWN.step_fixed_s, rel=0.1)
    assert profiled.profile.step_request_s == pytest.approx(KNOWN.step_request_s, rel=0.15)
    assert profiled.profile.step_context_s == pytest.approx(KNOWN.step_context_s, rel=0.15)


def true_prefill_s(prompt_tokens: int) -> float:
    return KNOWN.prefill_fixed_s + KNOWN.prefill_token_s * prompt_tokens + KNOWN.prefill_square_s * prompt_tokens**2


@pytest.mark.parametrize(("shorter", "longer"), [(100, 1500), (100, 3000), (1500, 3000)])
def test_what_prompt_tokens_cost_is_found_again(shorter: int, longer: int, profiled: Profiled) -> None:
    found = profiled.profile.costs()
    difference_s = found.prefill_s(longer) - found.prefill_s(shorter)  # the way there and back is in both
    assert difference_s == pytest.approx(true_prefill_s(longer) - true_prefill_s(shorter), rel=0.15)
    assert true_prefill_s(shorter) * 0.9 < found.prefill_s(shorter) < true_prefill_s(shorter) + MAX_WAY_S


@pytest.mark.parametrize("load", [Load(), Load(3, 900), Load(7, 4000)])
def test_the_mapper_predicts_that_servers_latency(load: Load, profiled: Profiled) -> None:
    prompt, answer = 400, 150
    first_s = true_prefill_s(prompt)
    first_s += KNOWN.step_request_s * load.num_running + KNOWN.step_context_s * load.context_tokens
    steps_s = sum(
        KNOWN.step_fixed_s
        + KNOWN.step_request_s * (load.num_running + 1)
        + KNOWN.step_context_s * (load.context_tokens + prompt + num)
        for num in range(1, answer)
    )
    found = MetricsMapper(profiled.profile).estimate(prompt, answer, load)
    assert found.latency_s - found.ttft_s == pytest.approx(steps_s, rel=0.08)
    assert 0.9 * first_s < found.ttft_s < first_s + MAX_WAY_S


def test_the_profile_says_how_good_it_is(profiled: Profiled) -> None:
    measured = profiled.profile.measured
    assert measured.complete
    assert (measured.num_prefills, measured.prefill_errors.num_measurements) == (30, 30)
    assert measured.num_steps == measured.step_errors.num_measurements >= 2 * 4 * 2
    assert measured.step_errors.median < 0.05
    assert measured.latency_errors is not None
    assert measured.latency_errors.num_measurements == 4
    assert measured.latency_errors.median < 0.1


def test_the_profile_says_where_it_comes_from(profiled: Profiled) -> None:
    measured = profiled.profile.measured
    assert (measured.server, measured.llm, measured.machine) == ("synthetic 1.2.3", "toy", "a clock")
    assert measured.command.startswith("mope profile --url http://127.0.0.1:")
    assert measured.num_running == (1, 8)
    assert 32 <= measured.prompt_tokens[0] < 64
    assert 2900 < measured.prompt_tokens[1] < 3200
    assert profiled.profile.capacity_tokens == 64_000
    assert profiled.profile.saturated_requests == 8
    at_8_s = KNOWN.step_fixed_s + 8 * KNOWN.step_request_s + 8 * 50 * KNOWN.step_context_s
    assert profiled.profile.saturated_tokens_per_s == pytest.approx(8 / at_8_s, rel=0.1)
    assert profiled.printed["profile"] == profiled.profile.model_dump(mode="json")


def test_no_secret_is_written(profiled: Profiled) -> None:
    for path in profiled.folder.iterdir():
        assert b"s3cret" not in path.read_bytes()


def test_measurements_and_pictures_lie_beside_the_profile(profiled: Profiled) -> None:
    assert {path.name for path in profiled.folder.iterdir()} == {
        "toy.json", "toy-measurements.csv", "toy-fit.png", "toy-residuals.png",
    }  # fmt: skip
    for name in ("toy-fit.png", "toy-residuals.png"):
        assert (profiled.folder / name).read_bytes().startswith(b"\x89PNG")
    lines = (profiled.folder / "toy-measurements.csv").read_text(encoding="utf-8").splitlines()
    kinds = [line.partition(",")[0] for line in lines[1:]]
    assert [kinds.count(kind) for kind in ("prefill", "check")] == [30, 4]
    assert kinds.count("step") == profiled.profile.measured.num_steps


def test_no_two_prompts_begin_alike(profiled: Profiled) -> None:
    beginnings = [" ".join(body["prompt"].split()[:5]) for body in profiled.bodies]
    assert len(set(beginnings)) == len(beginnings)
    assert all(body["ignore_eos"] and body["min_tokens"] == body["max_tokens"] for body in profiled.bodies[:1])


def run(url: str, folder: Path, *more: str) -> int:
    return main(["profile", "--url", url, "--output", str(folder / "p.json"), *QUICK, *more])


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_nobody_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert run(url, tmp_path) == 2
    assert f"no LLM server answers at {url}" in (said := complaint(capsys))
    assert "check --url" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("behaviour", "more", "said"),
    [
        (Behaviour(api_key="right"), (), "the server wants another key (HTTP 401); give the right one with --api-key"),
        (Behaviour(api_key="right"), ("--api-key", "wrong"), "the server wants another key (HTTP 401)"),
        (Behaviour(models=()), (), "lists no LLM; expected an OpenAI-compatible server"),
        (Behaviour(models=("a", "b")), (), "serves 2 LLMs; say which: --model a | b"),
        (Behaviour(models=("llama-7b",)), ("--model", "lama-7b"), "did you mean 'llama-7b'? it serves llama-7b"),
        (Behaviour(streams=False), (), "so that no token can be timed; expected text/event-stream"),
        (Behaviour(usage=False), (), "say no usage.prompt_tokens"),
        (Behaviour(max_model_len=40), (), "takes 40 tokens per request, too few"),
        (Behaviour(), ("--output", "p.txt"), "--output: got 'p.txt'; expected a file that ends in .json"),
        (Behaviour(), ("--rounds", "0"), "--rounds: got '0'; expected greater than or equal to 1"),
        (Behaviour(), ("--concurrency", "2"), "at least 2 of each are needed"),
        (Behaviour(), ("--context-tokens", "64"), "at least 2 of each are needed"),
        (Behaviour(), ("--prompt-tokens", "32,64,128"), "at least 4 lengths are needed"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    behaviour: Behaviour, more: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(behaviour) as server:
        assert run(server.url, tmp_path, *more) == 2
    assert said in complaint(capsys)
    assert not (tmp_path / "p.json").exists()


def test_a_web_server_that_is_no_llm_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour()) as server:
        assert run(server.url + "/elsewhere", tmp_path) == 2
    assert "expected an OpenAI-compatible server" in complaint(capsys)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", ""])
def test_an_address_that_is_none(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(url, tmp_path) == 2
    assert "expected an address such as http://127.0.0.1:8000" in complaint(capsys)


@pytest.mark.parametrize(
    "refused", [("min_tokens",), ("min_tokens", "stream_options"), ("ignore_eos", "min_tokens")], ids="-".join
)
def test_a_server_that_refuses_options_is_asked_without(
    refused: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Behaviour(refused=refused, stops_at=40)) as server:
        assert run(server.url, tmp_path) == 0
        last = server.bodies[-1]
    assert not set(refused) & set(last)
    assert set(last) >= {"ignore_eos", "stream_options"} - set(refused)
    said = capsys.readouterr().err
    assert ("answers may be shorter" in said) == ("ignore_eos" in refused)
    assert ("tokens of prompts are estimated" in said) == ("stream_options" in refused)
    profile = load_profile(tmp_path / "p.json")
    assert isinstance(profile, FittedProfile)
    assert profile.measured.prompt_tokens[1] == pytest.approx(256, rel=0.1)


def test_a_server_that_dies_leaves_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour(dies_after=9)) as server:
        assert run(server.url, tmp_path) == 2
    said = complaint(capsys)
    assert "the server failed 3 times in a row" in said
    assert f"what was measured is in {tmp_path / 'p-measurements.csv'}" in said
    assert (tmp_path / "p-measurements.csv").read_text(encoding="utf-8").count("\n") > 1
    assert not (tmp_path / "p.json").exists()


def test_a_server_that_dies_late_still_gives_a_profile_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_a_round = 3 + 3 * 4 + 2 * (1 + 2) + 5  # getting ready, prompts, decoding, warm-up; the second round is cut short
    with serving(Behaviour(dies_after=in_a_round + 2)) as server:
        assert run(server.url, tmp_path, "--rounds", "2") == 0
    assert "note: the server failed 3 times in a row" in capsys.readouterr().err
    profile = load_profile(tmp_path / "p.json")
    assert isinstance(profile, FittedProfile)
    assert not profile.measured.complete


def test_time_that_is_up_ends_the_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour()) as server:
        assert run(server.url, tmp_path, "--rounds", "1000", "--max-seconds", "2") == 0
    assert "stopped after --max-seconds 2" in capsys.readouterr().err
    profile = load_profile(tmp_path / "p.json")
    assert isinstance(profile, FittedProfile)
    assert not profile.measured.complete


def test_a_server_that_runs_fewer_at_once_is_found_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour(max_running=4)) as server:
        assert run(server.url, tmp_path, "--concurrency", "1,2,4,8") == 0
    assert "8 requests with prompts of" in capsys.readouterr().err
    profile = load_profile(tmp_path / "p.json")
    assert isinstance(profile, FittedProfile)
    assert profile.measured.num_running == (1, 4)


def test_a_profile_that_is_far_off_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour(step_context_s=0.0, hiccup_s=0.03)) as server:
        assert run(server.url, tmp_path, "--num-checks", "3") == 0
    assert "nothing else, or with more --rounds" in capsys.readouterr().err


def test_the_password_in_an_address_is_not_written(tmp_path: Path) -> None:
    with serving(Behaviour()) as server:
        assert run(server.url.replace("//", "//me:hidden@"), tmp_path) == 0
    text = (tmp_path / "p.json").read_text(encoding="utf-8")
    assert "hidden" not in text
    assert '"url": "http://127.0.0.1:' in text


def made_steps(fixed: float, request: float, context: float, noise: np.random.Generator | None = None) -> list[Steps]:
    found = []
    for num in (1, 2, 4, 8, 16):
        for wanted in (32, 512, 2048):
            for piece in range(3):
                held = num * (wanted + 10.0 * piece)
                factor = 1.0 if noise is None else 1.0 + 0.02 * noise.standard_normal()
                found.append(Steps(num, held, (fixed + request * num + context * held) * factor, wanted))
    return found


@given(st.floats(1e-4, 1), st.floats(0, 1e-2), st.floats(0, 1e-5))
def test_exact_measurements_give_exact_coefficients(fixed: float, request: float, context: float) -> None:
    fit = fit_steps(made_steps(fixed, request, context))
    found = [fit.coefficients[name] for name in ("step_fixed_s", "step_request_s", "step_context_s")]
    assert found == pytest.approx([fixed, request, context], rel=1e-4, abs=1e-6 * fixed)
    assert fit.errors.p90 < 1e-3
    assert fit.predicted_s == pytest.approx(fit.measured_s, rel=1e-5)


def test_hiccups_of_the_server_hardly_move_the_fit() -> None:
    noise = np.random.default_rng(0)
    steps = made_steps(5e-3, 2e-4, 4e-7, noise)
    slow = {3, 17, 30, 41}
    spoiled = [
        Steps(one.num_running, one.context_tokens, one.seconds * (6 if i in slow else 1), one.wanted_context)
        for i, one in enumerate(steps)
    ]
    found = fit_steps(spoiled).coefficients
    assert found["step_fixed_s"] == pytest.approx(5e-3, rel=0.05)
    assert found["step_request_s"] == pytest.approx(2e-4, rel=0.15)
    assert found["step_context_s"] == pytest.approx(4e-7, rel=0.1)


@given(st.integers(0, 2**32 - 1))
def test_no_coefficient_is_negative(seed: int) -> None:
    random = np.random.default_rng(seed)
    terms = np.abs(random.standard_normal((12, 3)))
    measured = np.abs(random.standard_normal(12)) + 0.1
    assert (nonnegative(terms, measured) >= 0).all()


def test_settings_that_grow_together_are_refused() -> None:
    steps = [Steps(num, 1000.0 * num, 1e-3 * num + 5e-3, wanted) for num in (1, 2, 4, 8) for wanted in (999, 1001)]
    with pytest.raises(DataError, match="can't be told apart by 8 measurements"):
        fit_steps(steps)
    prefills = [Prefill(size, 1e-5 * size, size) for size in (1000, 1001, 1002, 1003)]
    with pytest.raises(DataError, match="measure --prompt-tokens further apart"):
        fit_prefill(prefills)


def test_a_fit_that_says_zero_is_refused() -> None:
    prefills = [Prefill(size, 1e-5 * size - 1e-4, size) for size in (32, 128, 512, 2048)]
    with pytest.raises(DataError, match="prefill_fixed_s came out as 0 s from 4 measurements"):
        fit_prefill(prefills)


def test_errors_are_those_of_settings_that_the_fit_has_not_seen() -> None:
    prefills = [Prefill(size, 1e-2 + 1e-5 * size, size) for size in (32, 128, 512, 1024, 2048)]
    bent = [*prefills[:-1], Prefill(2048, 3 * prefills[-1].seconds, 2048)]
    assert fit_prefill(prefills).errors.p90 < 1e-3
    fit = fit_prefill(bent)
    unseen = 1 - prefills[-1].seconds / bent[-1].seconds  # the other four know nothing of the bend
    assert fit.errors.p90 > 0.5 * unseen


def answer(first_s: float, gap_s: float, num: int, prompt: int = 100) -> StreamedAnswer:
    return StreamedAnswer(prompt, num, 0.0, tuple(first_s + gap_s * index for index in range(num)))


def test_steps_are_taken_from_where_all_decode() -> None:
    early, late = answer(0.1, 0.01, 60), answer(0.3, 0.01, 60)  # together from 0.3 to 0.69
    found = steps_together([early, late], 100)
    assert len(found) == 2
    assert [one.seconds for one in found] == pytest.approx([0.01, 0.01])
    assert all(one.num_running == 2 and one.wanted_context == 100 for one in found)
    # the early one makes its tokens 21 to 59 there, the late one its tokens 1 to 39
    mean_context = np.average([one.context_tokens for one in found], weights=[20, 19])
    assert mean_context == pytest.approx(2 * 100 + 40 + 20, abs=1)


def test_pieces_of_several_tokens_count_as_many() -> None:
    twos = StreamedAnswer(100, 80, 0.0, tuple(0.1 + 0.02 * index for index in range(40)))
    (one, *_) = steps_together([twos], 100)
    assert one.seconds == pytest.approx(0.01)


def test_requests_that_did_not_decode_together_give_no_steps() -> None:
    assert steps_together([answer(0.1, 0.01, 20), answer(0.5, 0.01, 20)], 100) == []


@given(st.integers(1, 64), st.integers(1, 4000), st.integers(8, 200), st.integers(1, 5000))
def test_enough_tokens_are_asked_for(num_running: int, context: int, decode: int, chunk: int) -> None:
    config = ProfilingConfig(decode_tokens=decode, chunk_tokens=chunk)
    asked = num_tokens_asked(config, num_running, context)
    # while the others' prompts are taken up, one chunk per step, the first makes that many tokens
    assert asked - (num_running - 1) * -(-context // chunk) >= decode


def test_what_a_server_cannot_hold_is_left_out() -> None:
    config = ProfilingConfig()
    everything = planned(config, None, None)
    assert len(everything.decoding) == len(config.concurrency) * len(config.context_tokens)
    assert everything.notes == ()
    fewer = planned(config, 2048, 20_000)
    assert max(fewer.prompt_tokens) == 1536
    assert all(num * size < 20_000 for num, size in fewer.decoding)
    assert "settings left out" in fewer.notes[0]
    with pytest.raises(ServerError, match="give smaller ones"):
        planned(config, 50, None)


def test_saturation_is_where_most_tokens_come() -> None:
    steps = [Steps(num, 100.0 * num, 0.01 + (0.1 if num == 16 else 0.0), 100) for num in (1, 4, 8, 16)]
    assert saturation(steps) == (8, pytest.approx(800))


def test_the_kv_cache_is_read_from_metrics() -> None:
    assert capacity_tokens('x 1\nvllm:cache_config_info{a="b",block_size="16",num_gpu_blocks="100"} 1.0') == 1600
    assert capacity_tokens('sglang:max_total_num_tokens{model="x"} 12345.0') == 12_345
    assert capacity_tokens('vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0') is None
    assert capacity_tokens("") is None
