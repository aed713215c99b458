"""mope bench: fair turns, known quantiles, clocks that measure what they say, and the command from file to figures."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope import console as terminal
from mope.bench import cli as bench_cli
from mope.bench.config import BenchConfig
from mope.bench.peers import SHAPES, load_peer
from mope.bench.prompts import length_summary, read_sample, sample
from mope.bench.report import tables, three_digits
from mope.bench.run import measure, summarise
from mope.bench.subjects import Peer, SavedPredictor, load_subject, saved_predictors
from mope.bench.timing import Endless, rate, timed, visits
from mope.bench.worker import Worker
from mope.cli import main
from mope.errors import ArtifactError, MissingExtraError, MopeError
from mope.export.run import export_onnx
from mope.request import Request

Run = Callable[..., tuple[int, str, str]]
SLEEP_MS = 5.0
TINY_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TINY_OPT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
}
LINES = [
    {"id": "a", "prompt": "Explain TCP slow start."},
    {"prompt": "Why?", "history": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y " * 90}]},
    {"messages": [{"role": "user", "content": "Who wrote Hamlet?"}]},
    {"prompt": "write " * 200},
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny: Path, graphs_made_once: None) -> Path:
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("bench") / "tiny")
    export_onnx(folder, data="none")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `mope bench`; its status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        terminal.console.cache_clear()
        status = main(["bench", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


# --- turns and clocks ---


def test_all_subjects_answer_a_request_before_the_next_one_and_each_place_is_shared_alike() -> None:
    calls = list(visits(3, 4, 3))
    assert len(calls) == len(set(calls)) == 3 * 4 * 3
    places: Counter[tuple[int, int]] = Counter()
    for (round_, request), group in itertools.groupby(calls, key=lambda call: call[:2]):
        order = [subject for _, _, subject in group]
        assert sorted(order) == [0, 1, 2], (round_, request)
        places.update((subject, place) for place, subject in enumerate(order))
    assert set(places.values()) == {4}


def test_a_call_that_sleeps_takes_wall_time_and_no_processor_time() -> None:
    times = [timed(lambda: time.sleep(SLEEP_MS / 1000)) for _ in range(10)]
    assert min(wall for wall, _ in times) >= SLEEP_MS
    assert np.median([wall for wall, _ in times]) < 3 * SLEEP_MS
    assert np.median([cpu for _, cpu in times]) < 1.0


def test_a_call_that_computes_takes_processor_time() -> None:
    def compute() -> None:
        until = time.process_time() + SLEEP_MS / 1000
        while time.process_time() < until:
            pass

    wall, cpu = timed(compute)
    assert cpu >= SLEEP_MS
    assert wall >= 0.9 * SLEEP_MS


def test_callers_share_a_subject() -> None:
    batches = Endless([["a", "b"]])
    alone = rate(lambda _: time.sleep(0.01), batches, 0.3)
    together = rate(lambda _: time.sleep(0.01), batches, 0.3, num_callers=4)
    assert 20 < alone.requests_per_s <= 200  # two requests each 10 ms or more
    assert together.requests_per_s > 2 * alone.requests_per_s
    assert alone.num_requests == pytest.approx(alone.requests_per_s * 0.3, rel=0.3)


def test_an_error_of_a_caller_is_passed_on() -> None:
    def fails(_: Any) -> None:
        raise ArtifactError("gone")

    with pytest.raises(ArtifactError, match="gone"):
        rate(fails, Endless([[1]]), 1.0, num_callers=2)


def test_endless_items_are_given_once_each_before_any_comes_again() -> None:
    items = Endless(list(range(1000)))
    taken: list[list[int]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=lambda own=own: own.extend(next(items) for _ in range(500))) for own in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Counter(itertools.chain(*taken)).values()) == {2}


def test_a_turn_is_some_requests_and_every_request_is_asked_once_a_round() -> None:
    calls = list(visits(2, 7, 2, turn_requests=3))
    assert [len(requests) for _, requests, _ in calls[:6]] == [3, 3, 3, 3, 1, 1]
    for subject in (0, 1):
        for round_ in (0, 1):
            asked = [request for r, requests, s in calls if (r, s) == (round_, subject) for request in requests]
            assert asked == list(range(7))


# --- figures ---


def test_quantiles_of_known_times() -> None:
    steady = np.arange(1.0, 101.0)  # 100 requests, 1 to 100 ms
    times = np.stack([steady, steady + 1, steady])
    times[1, 0] = 1000.0  # the machine paused once
    found = summarise(times)
    assert found["p99_of_medians"] == pytest.approx(99.01)
    assert found["p50_by_round"] == pytest.approx([50.5, 52.0, 50.5], abs=0.51)
    assert found["mean"] == pytest.approx(times.mean())
    assert summarise(np.arange(101.0)[None])["p90"] == 90.0
    assert summarise(np.arange(101.0)[None])["p99"] == 99.0
    pause = np.full((2, 10), 1.0)
    pause[0, 3] = 100.0
    assert summarise(pause)["p99"] > 50 > summarise(np.vstack([pause, pause[1:]]))["p99_of_medians"] == 1.0


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0.314159, "0.31"), (3.14159, "3.14"), (31.4159, "31.4"), (3141.59, "3,142")]
)
def test_figures_have_three_digits_and_no_exponent(value: float | None, shown: str) -> None:
    assert three_digits(value) == shown


# --- prompts ---


def test_the_sample_is_seeded_and_bad_lines_are_counted(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.console.cache_clear()
    with prompts.open("a") as file:
        file.write('\n{"promt": "x"}\n')
    everything = read_sample(str(prompts), 10, 0)
    assert len(everything) == 4
    assert "1 of 5 lines that were read are no requests; for example line 6: " in capsys.readouterr().err
    assert {request.num_earlier_turns for request in everything} == {0, 1}
    assert read_sample(str(prompts), 2, 3) == read_sample(str(prompts), 2, 3)
    assert sorted(sample(range(9), 20, 1)) == list(range(9))
    assert sample(range(99), 5, 1) != sample(range(99), 5, 2)


def test_lengths() -> None:
    assert length_summary([1, 2, 3])["p50"] == 2
    assert length_summary([1, 2, 3])["max"] == 3


# --- subjects ---


def test_names_of_subjects_differ(exported: Path, tiny: Path) -> None:
    found = saved_predictors([exported, tiny], ("torch", "onnx"), ("fp32", "int8"), (1, 2), "cuda")
    assert len({one.name for one in found}) == len(found) == 16
    assert {one.device for one in found if one.backend == "onnx"} == {"cpu"}
    assert saved_predictors([exported])[0].name == "tiny onnx fp32"
    assert saved_predictors([tiny])[0].name == "tiny torch"


@pytest.mark.parametrize(("name", "overrides"), [("ssjf", TINY_BERT), ("vllm-ltr", TINY_OPT)])
def test_peers_read_the_prompt_alone_and_cut_it(tiny: Path, name: Any, overrides: dict[str, Any]) -> None:
    loaded = load_subject(Peer(name, tiny, overrides={**overrides, "max_position_embeddings": 32}))
    requests = [Request(prompt="write " * 100), Request(prompt=""), Request(prompt="write \ud800", system="x " * 50)]
    numbers = loaded.answer(requests)
    assert isinstance(numbers, list)
    assert np.isfinite(numbers).all()
    assert loaded.count_tokens(requests)[:2] == [32, 1]
    assert 2 < loaded.count_tokens(requests)[2] < 32


def test_peers_have_their_published_size() -> None:
    import torch
    import transformers

    sizes = {}
    for name, shape in SHAPES.items():
        config = getattr(transformers, f"{shape.family}Config")(num_labels=1)
        assert config.max_position_embeddings == shape.max_tokens
        with torch.device("meta"):
            network = getattr(transformers, f"{shape.family}ForSequenceClassification")(config)
        sizes[name] = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert sizes == pytest.approx({"ssjf": 109.5, "vllm-ltr": 125.2}, abs=0.2)


def test_a_peer_without_its_packages_says_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"peer ssjf needs .*mope-llm\[torch\]"):
        load_peer(Peer("ssjf", tiny))


# --- the process of a subject ---


def test_a_subject_lives_in_a_process_of_its_own(exported: Path) -> None:
    requests = [Request(prompt="Hi"), Request(prompt="write " * 9)]
    ballast = bytearray(600_000_000)  # the parent's memory is not the child's
    ballast[::4096] = b"x" * len(ballast[::4096])
    (subject,) = saved_predictors([exported], ("onnx",))
    with Worker(subject) as worker:
        start = worker.call("start", subject, requests, 2, 0)
        assert 0 < start["python_rss_mb"] < start["loaded_rss_mb"] < 400
        assert start["import_s"] > 0
        assert start["load_s"] > 0
        ((wall, cpu),) = worker.call("latencies", range(1, 2))
        assert 0 < wall < 1000
        assert cpu > 0
        memory = worker.call("memory")
        assert start["loaded_rss_mb"] <= memory["peak_rss_mb"] + 1
        assert memory["rss_mb"] <= memory["peak_rss_mb"] < 500
        assert worker.call("count_tokens") == load_subject(subject).count_tokens(requests)
    del ballast


def test_mistakes_in_the_process_come_back_and_its_end_is_told(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    subject = SavedPredictor("tiny onnx", tiny, "onnx")
    with Worker(subject) as worker:
        with pytest.raises(ArtifactError, match="mope-export"):
            worker.call("start", subject, [Request(prompt="Hi")], 1, 0)
        with pytest.raises(MopeError, match="tiny onnx ended with status 1: see above"):
            worker.call("no such command")
    assert "AttributeError" in capfd.readouterr().err


def test_peers_and_predictors_side_by_side(exported: Path) -> None:
    subjects = [*saved_predictors([exported], ("onnx",)), Peer("ssjf", exported, overrides=TINY_BERT)]
    config = BenchConfig(rounds=2, warm_up=1, seconds=0.1, concurrency=2, batch_size=2)
    requests = [Request(prompt=f"{'write ' * number}") for number in range(1, 4)]
    predictor, peer = (one.to_json(config) for one in measure(subjects, requests, config))
    assert (predictor["random_weights"], peer["random_weights"]) == (False, True)
    assert peer["batch_throughput"] is None
    assert peer["start"]["load_s"] is None
    assert len(predictor["batch_throughput"]["requests_per_s_by_round"]) == 2
    for one in (predictor, peer):
        assert len(one["latency"]["wall_ms"]["p50_by_round"]) == 2
        assert one["throughput"]["requests_per_s"] > 0
        assert one["memory_mb"]["peak"] > one["memory_mb"]["python"]
        assert one["input_tokens"]["max"] > 1


# --- the command ---


def test_from_a_file_to_figures(run: Run, exported: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--rounds", 2, "--seconds", 0.1, "--concurrency", 2, "--num-requests", 3, "--backends", "torch,onnx"]
    status, out, err = run(exported, "--prompts", prompts, *options, "--output", output, "--goal-ms", 5, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found == json.loads((output / "bench.json").read_text())
    assert [one["name"] for one in found["subjects"]] == ["tiny torch", "tiny onnx fp32"]
    assert found["provenance"]["command"][:2] == ["mope", "bench"]
    assert found["provenance"]["packages"]["onnxruntime"]
    assert str(tmp_path) not in out
    assert found["prompts"]["num_requests"] == 3
    assert found["prompts"]["prompt_tokens"]["max"] >= found["prompts"]["prompt_tokens"]["p50"] > 0
    assert found["load_average"] is None or set(found["load_average"]) == {"before", "after"}
    for one in found["subjects"]:
        for clock in ("wall_ms", "cpu_ms"):
            assert 0 < one["latency"][clock]["p50"] <= one["latency"][clock]["p90"] <= one["latency"][clock]["p99"]
    with (output / "calls.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3
    wall = [float(row["wall_ms"]) for row in rows if row["subject"] == "tiny onnx fp32"]
    assert np.median(wall) == pytest.approx(found["subjects"][1]["latency"]["wall_ms"]["p50"], abs=1e-3)
    assert (output / "latency.png").read_bytes()[:4] == b"\x89PNG"
    markdown = (output / "bench.md").read_text()
    assert "| tiny onnx fp32 |" in markdown
    first, second = tables(found)[0].rows
    assert first[-2:] == ["1.00", "1.00"]
    ratio = found["subjects"][1]["latency"]["wall_ms"]["p50"] / found["subjects"][0]["latency"]["wall_ms"]["p50"]
    assert second[-2] == f"{ratio:.2f}"


def test_tables_without_throughput(run: Run, exported: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(exported, "--prompts", prompts, "--rounds", 1, "--warm-up", 0, "--seconds", 0)
    assert status == 0
    assert "latency of one request, wall time in ms, 4 requests x 1 rounds" in out
    assert out.count("\ntiny onnx ") == 3
    assert "requests per second" not in out
    assert "\u2026" not in out  # nothing is cut in a terminal of 80 columns


def test_without_matplotlib_all_but_the_picture(
    run: Run, exported: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str, purpose: str) -> None:
        raise MissingExtraError(f"{purpose} needs the package {module!r}: pip install 'mope-llm[train]'")

    monkeypatch.setattr(bench_cli, "require", missing)
    options = ["--rounds", 1, "--warm-up", 0, "--seconds", 0, "--output", tmp_path / "out"]
    status, _, err = run(exported, "--prompts", prompts, *options)
    assert status == 0
    assert "no picture: latency.png needs the package 'matplotlib'" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "bench.md", "calls.csv"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tiny}"], "--prompts"),
        (["{tiny}", "--prompts", "nofile.jsonl"], "--prompts nofile.jsonl can't be read: No such file"),
        (["{tiny}", "--prompts", "{empty}"], "none of 0 lines is a request; it is empty"),
        (["{tiny}", "--prompts", "{bad}"], "none of 1 lines is a request; for example line 1: not JSON"),
        (["nowhere", "--prompts", "{prompts}"], "no saved predictor at nowhere"),
        (["{tiny}", "--prompts", "{prompts}", "--against", "sjf"], "--against: got 'sjf'; expected 'ssjf' or 'vllm-"),
        (["{tiny}", "--prompts", "{prompts}", "--backends", "onnx"], "has no ONNX export; type: mope-export"),
        (["{tiny}", "--prompts", "{prompts}", "--backends", "tvm"], "unknown backend 'tvm'"),
        (["{tiny}", "--prompts", "{prompts}", "--rounds", "0"], "--rounds: got '0'; expected greater than or equal"),
        (["{tiny}", "--prompts", "{prompts}", "--output", "{prompts}"], "can't be made: File exists"),
    ],
)
def test_mistakes(run: Run, tiny: Path, prompts: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    names = {"tiny": tiny, "prompts": prompts, "empty": tmp_path / "empty", "bad": tmp_path / "bad"}
    names["empty"].touch()
    names["bad"].write_text("prompt\n")
    status, out, err = run(*(argument.format(**names) for argument in arguments))
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line
