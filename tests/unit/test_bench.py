"""`mope bench`: clocks, turns, figures, processes, and the files and words that a user gets."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope import console as terminal
from mope.bench.peers import SHAPES
from mope.bench.prompts import length_summary, read_sample
from mope.bench.report import notes, print_report, tables, to_markdown
from mope.bench.run import summarise
from mope.bench.subjects import Peer, SavedPredictor, load_subject, saved_predictors
from mope.bench.timing import Endless, rate, timed, turns, visits
from mope.bench.worker import Session, Worker
from mope.cli import main
from mope.errors import ArtifactError, ConfigError, DataError, MopeError
from mope.predictor import LengthPredictor
from mope.request import Request

NUM_REQUESTS, NUM_ROUNDS = 6, 2
PROMPTS = [f"Explain step {number} of TCP slow start{' in detail' * number}." for number in range(8)]


# --- clocks and turns ---


@pytest.mark.parametrize("num_subjects", [1, 2, 5])
def test_each_subject_has_each_place_equally_often(num_subjects: int) -> None:
    orders = [turns(num_subjects, turn) for turn in range(3 * num_subjects)]
    assert all(sorted(order) == list(range(num_subjects)) for order in orders)
    places = Counter((place, subject) for order in orders for place, subject in enumerate(order))
    assert places == dict.fromkeys(itertools.product(range(num_subjects), repeat=2), 3)


@pytest.mark.parametrize("turn_requests", [1, 3, 7, 100])
def test_every_subject_answers_every_request_once_a_round(turn_requests: int) -> None:
    seen = list(visits(2, 7, 3, turn_requests))
    answered = Counter((round_, request, subject) for round_, requests, subject in seen for request in requests)
    assert answered == dict.fromkeys(itertools.product(range(2), range(7), range(3)), 1)


def test_all_subjects_answer_a_block_before_the_next_one_comes() -> None:
    seen = list(visits(2, 5, 2, 2))
    blocks = [(round_, range(first, min(first + 2, 5))) for round_ in range(2) for first in (0, 2, 4)]
    assert [visit[:2] for visit in seen] == [block for block in blocks for _ in range(2)]
    assert [subject for *_, subject in seen] == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]


def test_sleep_takes_time_on_the_wall_and_none_of_the_processor() -> None:
    best = min((timed(lambda: time.sleep(0.005)) for _ in range(10)), key=lambda times: times.wall_ms)
    assert 4.9 <= best.wall_ms < 9
    assert 0 <= best.cpu_ms < 2


def test_work_takes_processor_time() -> None:
    def work() -> None:
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass

    assert 20 <= timed(work).cpu_ms < 100


def test_what_several_callers_answered_is_counted() -> None:
    answered: list[int] = []
    callers = set()

    def answer(batch: Sequence[int]) -> None:
        time.sleep(0.005)
        callers.add(threading.get_ident())
        answered.extend(batch)

    found = rate(answer, Endless([[1, 2], [3]]), seconds=0.1, num_callers=3)
    assert found.num_requests == len(answered)
    assert len(callers) == 3
    assert 0.1 < len(answered) / found.requests_per_s < 2  # seconds, on a busy machine, too
    assert 0 <= found.cpu_ms_per_request < 5


def test_callers_answer_at_the_same_time() -> None:
    def answer(_: Sequence[int]) -> None:
        time.sleep(0.01)

    alone = rate(answer, Endless([[1]]), seconds=0.1)
    assert alone.requests_per_s <= 100
    assert rate(answer, Endless([[1]]), seconds=0.1, num_callers=4).requests_per_s > 1.5 * alone.requests_per_s


def test_each_caller_answers_once_however_short_the_time() -> None:
    assert rate(len, Endless([[1, 2]]), seconds=1e-9, num_callers=2).num_requests >= 4


def test_an_error_of_a_caller_is_not_lost() -> None:
    with pytest.raises(ZeroDivisionError):
        rate(lambda batch: 1 // 0, Endless([[1]]), seconds=0.05, num_callers=2)


def test_threads_that_share_endless_items_lose_none() -> None:
    items = Endless(range(7))
    with ThreadPoolExecutor(8) as pool:
        taken = [job.result() for job in [pool.submit(lambda: [next(items) for _ in range(700)]) for _ in range(8)]]
    assert Counter(itertools.chain(*taken)) == dict.fromkeys(range(7), 800)
    assert [next(items) for _ in range(8)] == [0, 1, 2, 3, 4, 5, 6, 0]


# --- figures ---


def test_summary_of_known_latencies() -> None:
    times_TR = np.array([np.arange(1.0, 102.0), np.arange(101.0, 202.0), np.full(101, 1000.0)])
    found = summarise(times_TR)
    assert found["p50"] == 151  # of 1..101, 101..201 and 101 times 1000
    assert found["p90"] == found["p99"] == 1000
    assert found["mean"] == pytest.approx((51 + 151 + 1000) / 3)
    assert found["p99_of_medians"] == pytest.approx(200)  # medians are 101..201
    assert found["p50_by_round"] == [51, 151, 1000]


def test_quantiles_lie_between_calls() -> None:
    found = summarise(np.arange(101.0)[None])
    assert [found[name] for name in ("p50", "p90", "p99", "p99_of_medians")] == [50, 90, 99, 99]


def test_summary_of_lengths() -> None:
    expected = {"mean": 50, "p10": 10, "p25": 25, "p50": 50, "p75": 75, "p90": 90, "p99": 99, "max": 100}
    assert length_summary(list(reversed(range(101)))) == expected
    assert length_summary([1, 1, 2])["mean"] == 1.3


# --- prompts ---


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "requests.jsonl"
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    lines: list[dict[str, Any]] = [{"prompt": prompt} for prompt in PROMPTS]
    path.write_text("".join(json.dumps({**line, "history": history}) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_sample_is_seeded_and_no_larger_than_asked(prompts: Path) -> None:
    def texts(num: int, seed: int) -> list[str]:
        return [request.prompt for request in read_sample(str(prompts), num, seed)]

    assert texts(3, 0) == texts(3, 0)
    assert len({*texts(3, 0)} & {*PROMPTS}) == 3
    assert len({tuple(texts(3, seed)) for seed in range(5)}) > 1
    assert sorted(texts(500, 0)) == sorted(PROMPTS)
    assert texts(500, 0) != PROMPTS  # in a random order


def test_history_is_read(prompts: Path) -> None:
    assert {request.num_earlier_turns for request in read_sample(str(prompts), 8, 0)} == {1}


def test_lines_that_are_no_requests_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.console.cache_clear()
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": "Hi"}\n\n[1]\n{"prompt": 3}\n{"prompt": "Why?"}\n', encoding="utf-8")
    assert {request.prompt for request in read_sample(str(path), 10, 0)} == {"Hi", "Why?"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 2 of 4 records that were read are no requests; for example line ")


def test_a_bad_line_with_markup_stays_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.console.cache_clear()
    path = tmp_path / "markup.jsonl"
    path.write_text('{"prompt": "Hi"}\n{"prompt": "Why?", "temperature": "[/red]"}\n', encoding="utf-8")
    assert len(read_sample(str(path), 10, 0)) == 1
    assert "'[/red]'" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "reason"), [("[]\nnonsense\n", "none of 2 records"), ("\n", "it is empty")])
def test_a_file_without_requests_is_named(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "nothing.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=reason) as error:
        read_sample(str(path), 10, 0)
    assert str(path) in str(error.value)
    assert '{"prompt": "..."' in str(error.value)


# --- subjects ---


def test_onnx_where_it_is_exported_else_torch(exported: dict[str, Path], tiny: Path) -> None:
    found = saved_predictors([exported["shared"], tiny])
    assert [(one.backend, one.precision) for one in found] == [("onnx", "fp32"), ("torch", None)]
    assert {one.device for one in found} == {"cpu"}
    assert [one.name for one in found] == ["shared onnx fp32", "tiny torch"]


def test_names_differ_and_tell_what_runs(exported: dict[str, Path]) -> None:
    artifacts = [exported["shared"], exported["separate"]]
    found = saved_predictors(artifacts, ["torch", "onnx"], ["fp32", "int8"], [1, 4])
    names = [one.name for one in found]
    assert len({*names}) == len(names) == 12  # torch has no int8
    assert {"shared torch fp32", "separate onnx int8 4 threads"} <= {*names}
    for one in found:
        parts = [one.artifact.name, one.backend, one.precision, *(["4", "threads"] if one.num_threads == 4 else [])]
        assert one.name.split() == parts


def test_folders_of_one_name_are_told_apart_by_the_end_of_their_path(tmp_path: Path) -> None:
    folders = [tmp_path / "old" / "demo", tmp_path / "new" / "demo", tmp_path / "other"]
    found = saved_predictors(folders, ["torch"])
    assert [one.name for one in found] == ["old/demo torch", "new/demo torch", "other torch"]


def test_what_is_typed_twice_is_measured_once(tmp_path: Path) -> None:
    found = saved_predictors([tmp_path / "demo", tmp_path / "demo"], ["torch", "torch"], num_threads=[1, 1])
    assert [one.name for one in found] == ["demo torch"]


@pytest.mark.parametrize(
    ("backend", "device", "place"),
    [
        ("torch", "cpu", "cpu"), ("torch", "cuda:1", "cuda:1"),
        ("onnx-gpu", "cpu", "cuda"), ("onnx-gpu", "cuda:1", "cuda:1"),
        ("tensorrt", "cpu", "cuda"), ("tensorrt", "cuda:1", "cuda:1"),
    ],
)  # fmt: skip
def test_engines_of_a_gpu_get_one(backend: str, device: str, place: str, tiny: Path) -> None:
    assert [one.device for one in saved_predictors([tiny], [backend], device=device)] == [place]


def test_onnx_stays_on_the_cpu(exported: dict[str, Path]) -> None:
    assert [one.device for one in saved_predictors([exported["shared"]], ["onnx"], device="cuda")] == ["cpu"]


def test_a_repeated_request_runs_the_network_again(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def num_runs(predictor: LengthPredictor, answer: Callable[[list[Request]], object]) -> int:
        runs: list[Any] = []
        run = predictor.backend.run

        def counted(*inputs: Any) -> Any:
            runs.append(inputs)
            return run(*inputs)

        monkeypatch.setattr(predictor.backend, "run", counted)
        for _ in range(3):
            answer([Request(prompt="Hi")])
        return len(runs)

    as_served = LengthPredictor.from_pretrained(exported["shared"], backend="onnx")
    assert num_runs(as_served, as_served.predict_batch) == 1
    loaded = load_subject(SavedPredictor("shared onnx", exported["shared"], "onnx"))
    assert num_runs(loaded.answer.__self__, loaded.answer) == 3  # type: ignore[attr-defined]


def test_tokens_are_those_that_the_network_reads(exported: dict[str, Path]) -> None:
    loaded = load_subject(SavedPredictor("shared onnx", exported["shared"], "onnx"))
    config = LengthPredictor.from_pretrained(exported["shared"], backend="onnx").config
    short, long = loaded.count_tokens([Request(prompt="Hi"), Request(prompt="why not " * 5000)])
    assert 2 < short < 8
    assert short < long <= config.max_prompt_tokens + config.max_context_tokens + 3


# --- peers ---


@pytest.mark.parametrize(
    ("name", "others"), [("ssjf", {"intermediate_size": 16}), ("vllm-ltr", {"ffn_dim": 16, "word_embed_proj_dim": 16})]
)
def test_a_peer_answers_and_cuts_long_prompts(name: Any, others: dict[str, int], tiny: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    peer = load_subject(Peer(name, tiny, overrides={**small, **others}))
    requests = [Request(prompt=prompt) for prompt in ("Hi", "why not " * 100, "", "half a pair: \ud800")]
    answers = peer.answer(requests)
    assert isinstance(answers, list)
    assert len(answers) == 4
    assert np.isfinite(answers).all()
    assert answers[0] != answers[1]
    assert answers == peer.answer(requests)
    short, long, nothing, _ = peer.count_tokens(requests)
    assert nothing == 1 < short < long == 32


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


def test_a_peer_on_a_device_that_is_not_there_is_a_mistake(tiny: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ConfigError, match="'cuda:99' can't be used"):
        load_subject(Peer("ssjf", tiny, device="cuda:99", overrides=small))


# --- processes ---


def test_a_broken_artifact_is_the_same_error_here(tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "calibration.json").write_text("{}", encoding="utf-8")
    with Worker(SavedPredictor("broken torch", broken, "torch")) as worker:
        for _ in range(2):  # it lives on
            with pytest.raises(ArtifactError, match=r"calibration\.json is not the file that was saved"):
                worker.call("start", worker.subject, [Request(prompt="Hi")], 1, 0)


def test_a_process_that_ends_is_told_with_its_status(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        Worker(SavedPredictor("tiny torch", tiny, "torch")) as worker,
        pytest.raises(MopeError, match="of tiny torch ended with status 1: see above"),
    ):
        worker.call("no such command")
    assert "AttributeError" in capfd.readouterr().err


def test_a_process_that_is_killed_is_told_so(tiny: Path) -> None:
    with Worker(SavedPredictor("tiny torch", tiny, "torch")) as worker:
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(MopeError, match=r"ended with status -9: killed, perhaps for want of memory"):
            worker.call("memory")


def test_a_session_measures_what_it_is_told(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(prompt=prompt) for prompt in PROMPTS]
    asked: list[list[str]] = []
    session = Session()
    session.start(SavedPredictor("shared onnx", exported["shared"], "onnx"), requests, 3, 0)
    loaded = session._loaded

    @dataclass
    class Listening:
        count_tokens: Any = loaded.count_tokens

        def answer(self, batch: list[Request]) -> object:
            asked.append([request.prompt for request in batch])
            return loaded.answer(batch)

    monkeypatch.setattr(session, "_loaded", Listening())
    session.warm_up(2)
    assert asked == [[PROMPTS[-1]], [PROMPTS[0]], [PROMPTS[1]]]  # the longest first
    asked.clear()
    times = session.latencies([5, 2])
    assert asked == [[PROMPTS[4]], [PROMPTS[5]], [PROMPTS[2]]]  # the first does not count
    assert len(times) == 2
    assert all(one.wall_ms > 0 for one in times)
    asked.clear()
    found = session.batch_throughput(0.05)
    assert found.num_requests == sum(map(len, asked))
    assert {len(batch) for batch in asked} <= {2, 3}
    for batch in asked:  # prompts of like length
        assert max(len(prompt) for prompt in batch) - min(len(prompt) for prompt in batch) <= 2 * len(" in detail")
    assert session.count_tokens() == loaded.count_tokens(requests)


# --- the command ---


@dataclass(frozen=True)
class Ran:
    """A whole run of the command."""

    command: list[str]
    status: int
    stdout: str
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "bench.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="module")
def ran(exported: dict[str, Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("bench") / "[x]" / "figures"
    command = ["bench", str(exported["shared"]), "--prompts", str(prompts), "--backends", "torch,onnx"]
    command += ["--num-requests", str(NUM_REQUESTS), "--rounds", str(NUM_ROUNDS), "--warm-up", "1", "--seconds", "0.1"]
    command += ["--turn-requests", "3", "--concurrency", "2", "--output", str(folder), "--json"]
    terminal.console.cache_clear()
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        status = main(command)
    terminal.console.cache_clear()
    assert f"figures are in {folder}" in stderr.getvalue()
    return Ran(command, status, stdout.getvalue(), folder)


def test_stdout_is_what_is_saved(ran: Ran) -> None:
    assert ran.status == 0
    assert json.loads(ran.stdout) == ran.result


def test_the_file_says_what_was_measured_where(ran: Ran) -> None:
    found = ran.result
    command = found["provenance"]["command"]
    assert command[:3] == ["mope", "bench", "shared"]
    assert command[command.index("--turn-requests") + 1] == "3"
    assert str(ran.folder.parent) not in json.dumps(found)  # no absolute paths
    assert found["provenance"]["machine"]["num_cores"] >= 1
    assert (found["config"]["rounds"], found["config"]["num_requests"]) == (NUM_ROUNDS, NUM_REQUESTS)
    assert "predict_batch" in found["timed"]
    lengths = found["prompts"]
    assert (lengths["source"], lengths["tokenizer"]) == ("requests.jsonl", "shared")
    assert lengths["num_requests"] == lengths["with_history"] == NUM_REQUESTS
    assert min(map(len, PROMPTS)) <= lengths["prompt_chars"]["p50"] <= max(map(len, PROMPTS))
    assert 0 < lengths["prompt_tokens"]["p10"] <= lengths["prompt_tokens"]["max"] < lengths["prompt_chars"]["max"]


def test_subjects_have_plausible_figures(ran: Ran) -> None:
    subjects = ran.result["subjects"]
    assert [(one["name"], one["backend"]) for one in subjects] == [
        ("shared torch", "torch"),
        ("shared onnx fp32", "onnx"),
    ]
    for one in subjects:
        for clock in ("wall_ms", "cpu_ms"):
            figures = one["latency"][clock]
            assert 0 < figures["p50"] <= figures["p90"] <= figures["p99"] < 2000
            assert len(figures["p50_by_round"]) == NUM_ROUNDS
        for name in ("throughput", "batch_throughput"):
            per_round = one[name]["requests_per_s_by_round"]
            assert min(per_round) <= one[name]["requests_per_s"] <= max(per_round)
            assert one[name]["num_requests"] >= NUM_ROUNDS
            assert 0 < one[name]["cpu_ms_per_request"] < 1000
        assert (one["throughput"]["num_callers"], one["batch_throughput"]["batch_size"]) == (2, 32)
        assert 0 < one["start"]["import_s"] < 30
        assert 0 < one["start"]["load_s"] < 60
        assert one["start"]["first_ms"] > 0
        assert not one["random_weights"]
        memory = one["memory_mb"]
        assert 5 < memory["python"] < memory["loaded"] <= memory["peak"] < 4000
        assert memory["loaded"] * 0.5 < memory["one_caller"] <= memory["peak"] + 1
    torch, onnx = subjects
    assert onnx["memory_mb"]["loaded"] < torch["memory_mb"]["loaded"]  # each in a process of its own, without torch
    assert torch["input_tokens"] == onnx["input_tokens"]


def test_every_call_is_a_row(ran: Ran) -> None:
    with (ran.folder / "calls.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    subjects = {one["name"]: one for one in ran.result["subjects"]}
    keys = [(row["subject"], int(row["round"]), int(row["request"])) for row in rows]
    assert keys == list(itertools.product(subjects, range(NUM_ROUNDS), range(NUM_REQUESTS)))
    for clock, (name, one) in itertools.product(("wall_ms", "cpu_ms"), subjects.items()):
        times = [float(row[clock]) for row in rows if row["subject"] == name]
        assert min(times) > 0
        assert np.median(times) == pytest.approx(one["latency"][clock]["p50"], abs=1e-3)


def test_there_is_a_picture(ran: Ran) -> None:
    assert (ran.folder / "latency.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {path.name for path in ran.folder.iterdir()} == {"bench.json", "bench.md", "calls.csv", "latency.png"}


def test_tables_have_every_subject_and_units(ran: Ran) -> None:
    shown = tables(ran.result)
    for table in shown:
        assert [row[0] for row in table.rows] == ["shared torch", "shared onnx fp32"]
        assert {len(row) for row in table.rows} == {len(table.headings)}
    wall, cpu, throughput, start = shown
    assert "wall time in ms, 6 requests x 2 rounds" in wall.title
    assert "processor time in ms" in cpu.title
    assert "requests per second" in throughput.title
    assert "2 callers" in throughput.title
    assert {"load s", "first answer ms", "peak MB"} <= {*start.headings}
    assert wall.rows[0][wall.headings.index("p50, x first")] == "1.00"
    figures = ran.result["subjects"]
    expected = figures[1]["latency"]["wall_ms"]["p50"] / figures[0]["latency"]["wall_ms"]["p50"]
    assert wall.rows[1][wall.headings.index("p50, x first")] == f"{expected:.2f}"


def test_markdown_has_the_command_tables_and_notes(ran: Ran) -> None:
    text = (ran.folder / "bench.md").read_text(encoding="utf-8")
    assert text == to_markdown(ran.result)
    assert "`mope bench shared --prompts requests.jsonl" in text
    assert text.count("| shared torch |") == text.count("| shared onnx fp32 |") == 4
    assert all(f"- {note}" in text for note in notes(ran.result))
    assert ran.result["timed"] in text
    for table in text.split("**")[2::2]:
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1


def test_the_terminal_shows_the_same(ran: Ran, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_report(ran.result)
    out = capsys.readouterr().out
    assert out.count("\nshared torch  ") == out.count("\nshared onnx fp32  ") == 4
    for table in tables(ran.result):
        assert table.title in out
        for row in table.rows:
            assert any(line.split("  ")[0] == row[0] and all(cell in line for cell in row) for line in out.splitlines())


def test_without_throughput_there_is_no_such_table_and_a_peer_is_explained(ran: Ran) -> None:
    found = ran.result
    peer = {**found["subjects"][1], "name": "ssjf", "throughput": None, "batch_throughput": None}
    peer["start"] = {"import_s": None, "load_s": None, "first_ms": 2000.0}
    found["subjects"] = [{**found["subjects"][0], "throughput": None, "batch_throughput": None}, peer]
    found["peers"] = {"ssjf": SHAPES["ssjf"].description}
    shown = tables(found)
    assert len(shown) == 3
    assert shown[-1].rows[1][:4] == ["ssjf", "-", "-", "2,000"]
    assert any(note.startswith("ssjf: BERT-base") and "Random weights" in note for note in notes(found))


# --- mistakes ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backends", "tourch"], ["'tourch'", "'torch'", "'onnx'"]),
        (["--backends", "onnx"], ["has no ONNX export", "mope-export"]),
        (["--against", "sjf"], ["--against", "'sjf'", "'ssjf'", "'vllm-ltr'"]),
        (["--precisions", "fp99"], ["'fp99'", "'fp32'"]),
        (["--rounds", "0"], ["--rounds"]),
        (["--prompts", "no-such.jsonl"], ["--prompts no-such.jsonl", "No such file"]),
        (["--output", __file__], ["--output", "test_bench.py"]),
    ],
)
def test_mistakes_end_in_one_line(
    flags: list[str], words: list[str], tiny: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.console.cache_clear()
    assert main(["bench", str(tiny), "--prompts", str(prompts), *flags]) == 2
    line = _mistake(capsys)
    assert all(word in line for word in words), line


def test_an_artifact_that_is_not_there(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.console.cache_clear()
    missing, output = tmp_path / "missing", tmp_path / "output"
    assert main(["bench", str(missing), "--prompts", str(prompts), "--output", str(output)]) == 2
    assert f"no saved predictor at {missing}" in _mistake(capsys)
    assert not output.exists()


def _mistake(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line
