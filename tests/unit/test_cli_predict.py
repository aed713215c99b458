"""`mope predict` as a user types it: tables, lines, ids, mistakes; what Ctrl-C leaves."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import Run, mistake

from mope.cli import LEVELS
from mope.predictor import LengthPredictor
from mope.thoughts import ThoughtsModel

TCP = "Explain TCP slow start."


def test_prompts_become_a_table(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    status, out, err = run("predict", tiny, TCP, "Thanks!")
    assert (status, err) == (0, "")
    predicted = LengthPredictor.from_pretrained(tiny).predict_batch([TCP, "Thanks!"])
    header, *rows = out.splitlines()[1:]
    assert header.split("  ")[0] == "prompt"
    for row, prediction, prompt in zip(rows, predicted, (TCP, "Thanks!"), strict=True):
        assert row.startswith(prompt)
        assert f" {prediction.median:,.0f} " in row
        assert f" {prediction.quantile(0.1):,.0f} to {prediction.quantile(0.9):,.0f} " in row
        assert f"{prediction.expert}: " in row
        assert f"{max(prediction.route_probabilities):.0%}" in row


def test_a_prompt_with_markup_and_line_breaks_stays_text(run: Run, tiny: Path) -> None:
    status, out, _ = run("predict", tiny, "[red]a\n\nb[/]")
    assert status == 0
    assert "[red]a b[/]" in out


def test_an_empty_prompt_gets_the_fallback_and_says_so(run: Run, tiny: Path) -> None:
    status, out, _ = run("predict", tiny, "")
    assert status == 0
    assert "fallback:no text" in out


def test_prompts_may_stand_behind_flags(run: Run, tiny: Path) -> None:
    _, expected, _ = run("predict", tiny, "Hi", "Why?", "--json", "--max-tokens", "60")
    for arguments in (
        ["--json", tiny, "--max-tokens", "60", "Hi", "Why?"],
        [tiny, "Hi", "--max-tokens", "60", "Why?", "--json"],
    ):
        status, out, _ = run("predict", *arguments)
        assert (status, out) == (0, expected)


def test_nothing_on_stdin_is_a_mistake(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    status, out, err = run("predict", tiny)
    assert (status, out) == (2, "")
    assert "no prompt: none was typed and stdin is empty" in err


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_one_prompt_from_stdin(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    status, out, _ = run("predict", tiny, *arguments, "--json")
    assert status == 0
    expected = LengthPredictor.from_pretrained(tiny).predict("two\nlines")
    assert json.loads(out)["median"] == pytest.approx(expected.median, abs=0.01)


def test_json_for_prompts_and_flags_for_all_of_them(run: Run, tiny: Path) -> None:
    flags = {"target_llm": "llama-3-8b", "max_tokens": 60}
    status, out, _ = run("predict", tiny, TCP, "Thanks!", "--json", "--target-llm", "llama-3-8b", "--max-tokens", "60")
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == [1, 2]
    for answer, prompt in zip(answers, (TCP, "Thanks!"), strict=True):
        expected = LengthPredictor.from_pretrained(tiny).predict(prompt, **flags)
        assert set(answer) == {"id", "median", "mean", "quantiles", "expert", "source"}
        assert answer["median"] == pytest.approx(expected.median, abs=0.01)
        assert answer["mean"] == pytest.approx(expected.mean, abs=0.01)
        assert answer["quantiles"] == pytest.approx(
            dict(zip(map(str, LEVELS), expected.quantiles(LEVELS), strict=True)), abs=0.01
        )
        assert (answer["expert"], answer["source"]) == (expected.expert, "model")
        assert answer["quantiles"]["0.99"] <= 60


REQUESTS = [
    {"id": "a", "prompt": TCP, "history": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    {"id": "b", "prompt": "Thanks!", "target_llm": "gpt-4", "max_tokens": 5},
    {"id": None, "messages": [{"role": "user", "content": "Who wrote Hamlet?"}], "max_tokens": None},
    *({"id": number, "prompt": "word " * (number % 13)} for number in range(20)),
]


@pytest.mark.parametrize("batch_size", ["1", "3", "64"])
def test_lines_are_predicted_in_their_order(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: str
) -> None:
    monkeypatch.setattr("mope.predict_files.WINDOW_BATCHES", 2)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, REQUESTS)) + "\n")
    status, out, err = run("predict", tiny, "--input", source, "--output", target, "--batch-size", batch_size)
    assert (status, out) == (0, "")
    assert "predicting: 23/23 (100%)" in err
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["a", "b", "line 3", *range(20)]
    assert "warning" not in err
    predictor = LengthPredictor.from_pretrained(tiny)
    for answer, request in zip(answers, REQUESTS, strict=True):
        wanted = predictor.predict_batch([{name: value for name, value in request.items() if value is not None}])[0]
        assert answer["median"] == pytest.approx(wanted.median, rel=1e-3)
        assert answer["source"] == wanted.source
    assert set(tmp_path.iterdir()) == {source, target}


def test_a_line_overrides_what_was_typed_for_all(run: Run, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "write", "max_tokens": 9}\n\n{"prompt": "write"}\n')
    status, out, _ = run("predict", tiny, "--input", source, "--max-tokens", "4")
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == ["line 1", "line 3"]  # an empty line is passed over
    assert 4 < answers[0]["quantiles"]["0.99"] <= 9
    assert answers[1]["quantiles"]["0.99"] == 4


def test_bad_lines_are_answered_counted_and_do_not_stop_the_others(run: Run, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [
        b'{"id": 1, "prompt": "Thanks!"}', b"not json", b'{"id": "c", "prompt": 3}', b"[1]",
        b'{"id": "e", "promt": "x"}', b'{"id": "\xff"}', b'{"id": "g", "prompt": "x", "max_tokens": 0}',
        b'{"id": 8, "prompt": "Thanks!"}', b'{"id": NaN, "prompt": "x"}', b'{"id": [3], "prompt": "x"}',
        b'{"id": false, "prompt": "x"}',
    ]  # fmt: skip
    source.write_bytes(b"\n".join(lines))
    status, out, err = run("predict", tiny, "--input", source)
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == [
        1, "line 2", "c", "line 4", "e", "\ufffd", "g", 8, "line 9", "line 10", "line 11",
    ]  # fmt: skip
    assert [number for number, answer in enumerate(answers, start=1) if "error" in answer] == [
        2,
        3,
        4,
        5,
        6,
        7,
        9,
        10,
        11,
    ]
    assert answers[8]["error"] == "line 9: id is float; expected a text or a number"
    for number, answer in enumerate(answers, start=1):
        if "error" in answer:
            assert set(answer) == {"id", "error"}
            assert answer["error"].startswith(f"line {number}: ")
    assert "9 of 11 records are no requests" in err
    assert "the first: line 2: not JSON" in err


def test_ids_are_those_given_or_the_line_and_repeated_ones_are_told(run: Run, tiny: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ids = [2, None, "2", 2.0, "a", "\ud800", "a", "line 2", "\ud800"]
    source.write_text("".join(json.dumps({"id": one, "prompt": "x"}) + "\n" for one in ids))
    status, _, err = run("predict", tiny, "--input", source, "--output", target, "--batch-size", "1")
    assert status == 0
    written = [json.loads(line)["id"] for line in target.read_text().splitlines()]
    assert json.dumps(written) == json.dumps([2, "line 2", *ids[2:]])
    assert (
        'warning: 3 of 9 records have an id that a record before them has; the first: line 7 has the id "a", as' in err
    )


@pytest.mark.parametrize("content", ["", "\n\n", "promt,id\n1,2\n"])
def test_a_file_without_a_single_request_is_a_mistake_and_leaves_no_file(
    run: Run, tiny: Path, tmp_path: Path, content: str
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text(content)
    target.write_text("older\n")
    status, _, err = run("predict", tiny, "--input", source, "--output", target)
    assert status == 2
    assert "is a request" in err
    assert target.read_text() == "older\n"
    assert set(tmp_path.iterdir()) == {source, target}


def many(path: Path, count: int) -> Path:
    """Requests, a broken line and an id that comes twice."""
    lines = [json.dumps({"id": f"r{number % (count - 1)}", "prompt": f"{TCP} {number}"}) for number in range(count)]
    lines[2] = "{broken"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ctrl_c_keeps_what_was_predicted_and_resume_goes_on(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = many(tmp_path / "in.jsonl", 300)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    command = ["predict", tiny, "--input", source, "--batch-size", 2]  # 64 records at once
    assert run(*command, "--output", whole)[0] == 0
    assert "no " in run(*command, "--output", output, "--resume")[2]
    predict, calls = LengthPredictor.predict_batch, iter(range(10**6))

    def interrupted(*given: Any, **options: Any) -> Any:
        if next(calls) % 70 == 69:
            raise KeyboardInterrupt
        return predict(*given, **options)

    monkeypatch.setattr(LengthPredictor, "predict_batch", interrupted)
    for kept, more in ((128, []), (256, ["--resume"])):
        status, out, err = run(*command, "--output", output, *more)
        assert (status, out) == (130, "")
        last = err.splitlines()[-1]
        assert (
            f"interrupted after {kept} records, kept in {output}.partial; add --resume to go on: mope predict" in last
        )
        assert last.endswith("--resume")
        assert not output.exists()
        assert len(Path(f"{output}.partial").read_text().splitlines()) == kept
    status, _, err = run(*command, "--output", output, "--resume")
    assert status == 0
    assert output.read_text() == whole.read_text()
    assert "1 of 300 records are no requests" in err
    assert "1 of 300 records have an id that a record before them has" in err
    assert not Path(f"{output}.partial").exists()


def test_resume_refuses_what_was_kept_of_other_records(run: Run, tiny: Path, tmp_path: Path) -> None:
    source, output = many(tmp_path / "in.jsonl", 9), tmp_path / "out.jsonl"
    command = ("predict", tiny, "--input", source, "--output", output, "--resume")
    assert f"there is no {output}.partial" in mistake(run(*command))
    for kept in (
        '{"id": "r1", "median": 1}\n',
        '{"id": "r0"}\n{"id": "r1"}\n{"id": "line 3", "error": "x"}\n{"id": "x"}\n',
    ):
        Path(f"{output}.partial").write_text(kept)
        assert "leave out --resume to begin anew" in mistake(run(*command))
        assert Path(f"{output}.partial").read_text() == kept
    assert "--resume goes with --output" in mistake(run(*command[:4], "--resume"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
def test_a_real_ctrl_c_is_one_line_and_status_130(tiny: Path, tmp_path: Path) -> None:
    output, code = tmp_path / "out.jsonl", "import sys; from mope.cli import main; sys.exit(main())"
    typed = ["predict", str(tiny), "--input", "-", "--batch-size", "1", "--output", str(output)]
    command = [sys.executable, "-c", code, *typed]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stderr
        for number in range(600):  # 1.3 MB, which it takes in pieces of 1 MB: the first of them are predicted by now
            process.stdin.write(json.dumps({"prompt": f"{TCP} {number}", "metadata": {"a": "x" * 2200}}) + "\n")
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(60) == 130
    assert "Traceback" not in err
    kept = len(Path(f"{output}.partial").read_text().splitlines())
    assert kept
    assert f"interrupted after {kept:,} records, kept in {output}.partial" in err.splitlines()[-1]


def test_requests_from_stdin(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(b'{"id": "x", "prompt": "Thanks!"}\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    status, out, _ = run("predict", tiny, "--input", "-")
    assert status == 0
    assert json.loads(out)["id"] == "x"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "x"], "nowhere"),
        (["{tiny}", "x", "--input", "f"], "give one of them"),
        (["{tiny}", "x", "--output", "f"], "--output goes with --input"),
        (["{tiny}", "--input", "nofile.jsonl"], "--input nofile.jsonl can't be read: No such file"),
        (["{tiny}", "x", "--batch-size", "0"], "--batch-size: got 0; expected at least 1"),
        (["{tiny}", "x", "--max-tokens", "-3"], "--max-tokens: got -3; expected at least 1"),
        (["{tiny}", "x", "--max-tokens", "many"], "invalid int value: 'many'"),
        (["{tiny}", "x", "--device", "abacus"], "--device: got 'abacus'; expected cpu, cuda or cuda:NUMBER"),
        (["{tiny}", "x", "--turbo"], "--turbo"),
        ([], "ARTIFACT"),
    ],
)
def test_mistakes_of_predict(run: Run, tiny: Path, arguments: list[str], said: str) -> None:
    assert said in mistake(run("predict", *(argument.format(tiny=tiny) for argument in arguments)))


def test_an_output_that_can_t_be_written_is_a_mistake(run: Run, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    assert "can't be written" in mistake(
        run("predict", tiny, "--input", source, "--output", tmp_path / "no" / "o.jsonl")
    )


def test_a_gpu_that_is_not_there_is_a_mistake(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "type --device cpu" in mistake(run("predict", tiny, "x", "--device", "cuda:0"))


def test_that_a_packaged_predictor_has_no_weights_is_said_before_that_torch_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mope.cli.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    line = mistake(run("predict", "chat-small", "x", "--backend", "torch"))
    assert "chat-small was exported for serving and has no PyTorch weights" in line
    assert "install" not in line


def test_thoughts_are_shown_where_they_are_known(run: Run, tiny: Path, tmp_path: Path) -> None:
    predictor = LengthPredictor.from_pretrained(tiny)
    predictor.thoughts = ThoughtsModel(
        bias=0.0, llms={"qwq-32b": 0.0}, families={}, number_names=(), number_mean=(), number_scale=(), weights=()
    )
    folder = predictor.save_pretrained(tmp_path / "thinking")
    status, out, _ = run("predict", folder, TCP, "--json", "--target-llm", "qwq-32b")
    answer = json.loads(out)
    assert status == 0
    assert answer["thoughts"]["share"] == 0.5
    assert answer["thoughts"]["tokens"] == pytest.approx(answer["mean"] / 2, abs=0.01)
    assert "50%" in run("predict", folder, TCP, "--target-llm", "qwq-32b")[1]
    assert "thoughts" not in json.loads(run("predict", folder, TCP, "--json", "--target-llm", "llama-3-8b")[1])
    status, out, _ = run("predict", folder, TCP, "--json", "--target-llm", "qwq-32b", "--effort", "none")
    assert json.loads(out)["thoughts"]["share"] == 0.0


def test_an_unknown_effort_is_a_mistake(run: Run, tiny: Path) -> None:
    status, out, err = run("predict", tiny, TCP, "--effort", "enormous")
    assert (status, out) == (2, "")
    assert "effort is a level such as" in err
