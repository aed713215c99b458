"""Requests from files: bodies, logs of every family, containers; what is no request, and what has no id."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mope.cli import main
from mope.errors import ConfigError, DataError
from mope.field_map import FieldMap, RequestFields
from mope.log_losses import LITELLM_CUT, LITELLM_REDACTED, SGLANG_TEMPLATE
from mope.request import Request
from mope.request_files import read_request, reading

ASK = "Explain TCP slow start."
MESSAGES = [{"role": "user", "content": ASK}]
BODY = {"model": "gpt-4o", "messages": MESSAGES, "max_completion_tokens": 50}
ANSWER = {"choices": [{"message": {"role": "assistant", "content": "It is."}, "finish_reason": "stop"}],
          "usage": {"completion_tokens": 9}}  # fmt: skip


def read(path: Path | str, fields: dict[str, str] | None = None, **defaults: Any) -> list[tuple[Any, Request | str]]:
    with reading(str(path), "--input", FieldMap.of(RequestFields(**(fields or {})))) as found:
        return [read_request(entry, defaults) for entry in found.entries]


def one(tmp_path: Path, record: Any, **defaults: Any) -> tuple[Any, Request | str]:
    (tmp_path / "one.jsonl").write_text(json.dumps(record) + "\n")
    ((request_id, request),) = read(tmp_path / "one.jsonl", **defaults)
    return request_id, request


FORMS: dict[str, dict[str, Any]] = {
    "ours": {"id": "i", "prompt": ASK, "target_llm": "gpt-4o", "max_tokens": 50},
    "OpenAI body": {**BODY, "id": "i", "tool_choice": "auto", "reasoning_effort": "low", "stream": True},
    "prompt and response": {"id": "i", "prompt": ASK, "response": "It is.", "model": "gpt-4o", "max_tokens": 50},
    "flat log": {"request_id": "i", **BODY, "completion_tokens": 9, "total_tokens": 20, "temprature": 1},
    "body and choices": {"id": "i", **BODY, **ANSWER, "outptu_tokens": 3},
    "envelope": {"id": "i", "request": BODY, "response": ANSWER, "promt": "no field of ours here"},
    "batch input": {"custom_id": "i", "method": "POST", "url": "/v1/chat/completions", "body": BODY},
    "batch": {"id": "batch_req", "custom_id": "i", "body": BODY, "response": {"status_code": 200, "body": ANSWER}},
    "helicone": {"request_id": "i", "request_body": json.dumps(BODY), "response_body": json.dumps(ANSWER)},
    "litellm": {"request_id": "i", "call_type": "acompletion", "spend": 0.1, "model": "gpt-4o", "messages": MESSAGES,
                "proxy_server_request": BODY, "response": ANSWER},
    "langfuse": {"id": "i", "input": MESSAGES, "output": "It is.", "model": "gpt-4o",
                 "modelParameters": {"max_tokens": 50}},
    "Responses API": {"id": "i", "input": ASK, "model": "gpt-4o", "max_output_tokens": 50,
                      "output": [{"type": "message", "role": "assistant", "content": []}]},
    "gemini": {"id": "i", "request": {"contents": [{"role": "user", "parts": [{"text": ASK}]}],
               "generationConfig": {"maxOutputTokens": 50}, "model": "gpt-4o"}, "response": {"candidates": []}},
    "title case": {"ID": "i", "Prompt": ASK, "Model": "gpt-4o", "Max Tokens": "50"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_request(tmp_path: Path, form: str) -> None:
    request_id, request = one(tmp_path, FORMS[form])
    assert isinstance(request, Request), request
    assert request_id == "i"
    assert (request.prompt, request.target_llm, request.max_tokens) == (ASK, "gpt-4o", 50)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "x", "max_token": 5}, "unknown request field 'max_token' (did you mean max_tokens?)"),
        ({"promt": "x"}, "unknown request field 'promt' (did you mean prompt?)"),
        ({"promt": "x", "history": []}, "did you mean prompt?"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens is a whole number"),
        ({"usage": {"completion_tokens": 3}}, "it holds no text of a user"),
        ({"request": {"input_ids": [1, 2]}, "response": ANSWER}, "it holds no text of a user"),
        ({"custom_id": "a", "response": {"body": ANSWER}}, "batch output has no prompts"),
        ({"messages": "[{'role': 'user', 'content': 'x'}]"}, "Python's notation"),
        ({"nothing": 1}, "give either a prompt or messages; got neither"),
        ("x", "got a JSON str; expected an object"),
        ({"id": [1], "prompt": "x"}, "id is list; expected a text or a number"),
        ({"messages": [{"role": "user", "content": {"deep": 1}}], "response": "x"}, "message content is dict"),
    ],
)
def test_what_is_no_request_says_why(tmp_path: Path, record: Any, said: str) -> None:
    _, mistake = one(tmp_path, record)
    assert isinstance(mistake, str)
    assert mistake.startswith("line 1: ")
    assert said in mistake
    assert "\n" not in mistake


def test_a_log_s_unreadable_flags_are_passed_over(tmp_path: Path) -> None:
    record = {"prompt": ASK, "response": "x", "max_tokens": 0, "temperature": "warm"}
    request = one(tmp_path, record)[1]
    assert isinstance(request, Request)
    assert (request.max_tokens, request.temperature) == (None, None)


@pytest.mark.parametrize("name", ["target_llm", "model", "modelId"])
@pytest.mark.parametrize("more", [{}, {"response": "x"}])
def test_what_a_request_says_goes_before_what_was_typed_for_all(tmp_path: Path, name: str, more: Any) -> None:
    record = {"prompt": ASK, name: "gpt-4o", "max_new_tokens": 7, **more}
    request = one(tmp_path, record, target_llm="llama-3-8b", max_tokens=99)[1]
    assert isinstance(request, Request)
    assert (request.target_llm, request.max_tokens) == ("gpt-4o", 7)
    request = one(tmp_path, {"prompt": ASK, **more}, target_llm="llama-3-8b", max_tokens=99)[1]
    assert isinstance(request, Request)
    assert (request.target_llm, request.max_tokens) == ("llama-3-8b", 99)


def test_history_and_the_answer_of_a_log(tmp_path: Path) -> None:
    turns = [*MESSAGES, {"role": "assistant", "content": "It is."}]
    request = one(tmp_path, {"prompt": "And now?", "history": turns})[1]
    assert isinstance(request, Request)
    assert request.num_earlier_turns == 1
    logged = one(tmp_path, {"messages": [*turns, {"role": "user", "content": "And now?"},
                                         {"role": "assistant", "content": "No."}]})[1]  # fmt: skip
    assert logged == request


@pytest.mark.parametrize(
    ("record", "request_id"),
    [
        ({"custom_id": "c", "id": "i", "request_id": "r"}, "c"),
        ({"id": 3, "request_id": "r"}, 3),
        ({"request_id": "r"}, "r"),
        ({"id": None, "request_id": ""}, ""),
        ({}, "line 1"),
    ],
)
def test_ids(tmp_path: Path, record: dict[str, Any], request_id: Any) -> None:
    assert one(tmp_path, {"prompt": "x", **record})[0] == request_id


# --- containers ---

RECORDS = [{"id": f"r{number}", "prompt": f"{ASK} {number}", "max_tokens": 10 + number} for number in range(3)]


def container(path: Path) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    separator = {".tsv": "\t"}.get(path.suffix, ";")
    rows = "\n".join(separator.join(map(str, row)) for row in (RECORDS[0], *(record.values() for record in RECORDS)))
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        path.write_bytes(
            {".gz": gzip.compress(lines), ".zst": pa.compress(lines, "zstd", asbytes=True), ".csv": rows.encode(),
             ".json": json.dumps(RECORDS).encode(), ".tsv": rows.encode()}.get(path.suffix, lines)
        )  # fmt: skip
    return path


@pytest.mark.parametrize(
    "name", ["r.jsonl", "r.jsonl.gz", "r.jsonl.zst", "r.json", "r.csv", "r.tsv", "r.parquet", "r.txt", "r"]
)
def test_containers(tmp_path: Path, name: str) -> None:
    found = read(container(tmp_path / name))
    assert [request_id for request_id, _ in found] == [record["id"] for record in RECORDS]
    assert [request.max_tokens for _, request in found if isinstance(request, Request)] == [10, 11, 12]


def test_cells_of_a_table_may_hold_messages_as_text(tmp_path: Path) -> None:
    text = json.dumps(MESSAGES).replace('"', '""')
    (tmp_path / "r.csv").write_text(f'messages,max_tokens\n"{text}",50\n')
    ((place, request),) = read(tmp_path / "r.csv")
    assert isinstance(request, Request), request
    assert (place, request.prompt, request.max_tokens) == ("line 2", ASK, 50)


def test_places_without_ids(tmp_path: Path) -> None:
    bare = [{"prompt": "a"}, {"prompt": "b"}]
    pq.write_table(pa.Table.from_pylist(bare), tmp_path / "r.parquet")
    (tmp_path / "r.json").write_text(json.dumps(bare))
    (tmp_path / "r.jsonl").write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    spans = [{"attributes": {"gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": text}} for text in "ab"]
    (tmp_path / "otel.jsonl").write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}) + "\n")
    for name, places in {
        "r.parquet": ["row 0", "row 1"],
        "r.json": ["record 0", "record 1"],
        "r.jsonl": ["line 2", "line 4"],
        "otel.jsonl": ["line 1.0", "line 1.1"],
    }.items():
        found = read(tmp_path / name)
        assert [place for place, _ in found] == places
        assert [request.prompt for _, request in found if isinstance(request, Request)] == ["a", "b"]


def test_totals_for_the_progress(tmp_path: Path) -> None:
    (tmp_path / "pretty").write_text(json.dumps(RECORDS[0], indent=1))
    with reading(str(tmp_path / "pretty"), "--input") as found:
        assert found.total is None
    for name, total in {"r.jsonl": 3, "r": 3, "r.parquet": 3, "r.jsonl.gz": None, "r.json": None}.items():
        with reading(str(container(tmp_path / name)), "--input") as found:
            assert found.total == total
            assert len(list(found.entries)) == 3
    spans = [{"span_id": f"s{i}", "attributes": {"gen_ai.input.messages": "[]"}} for i in range(2)]
    (tmp_path / "spans.jsonl").write_text((json.dumps({"spans": spans}) + "\n") * 2)
    with reading(str(tmp_path / "spans.jsonl"), "--input") as found:
        assert found.total is None
        assert len(list(found.entries)) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    content = container(tmp_path / "r.jsonl").read_bytes()
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    assert len(read(path)) == 3
    writer.join()


@pytest.mark.parametrize("packing", [bytes, gzip.compress, lambda lines: pa.compress(lines, "zstd", asbytes=True)])
def test_stdin_may_be_compressed_or_an_array(packing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (json.dumps(RECORDS), "".join(json.dumps(record) + "\n" for record in RECORDS)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packing(text.encode()))))
        assert [request_id for request_id, _ in read("-")] == ["r0", "r1", "r2"]


def test_damage_is_told(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl.gz").write_bytes(container(tmp_path / "whole.jsonl.gz").read_bytes()[:-9])
    with reading(str(tmp_path / "r.jsonl.gz"), "--input") as found:
        assert [entry.record for entry in found.entries][:3] == RECORDS
        assert "cut-off gzip" in found.told.lines()[0]
    (tmp_path / "r.csv").write_bytes(b"prompt,id\ncaf\xe9,1\nna\xefve,2\n")
    with reading(str(tmp_path / "r.csv"), "--input") as found:
        assert len(list(found.entries)) == 2
        assert found.told.lines() == [
            "2 x piece with bytes that are not UTF-8, kept with U+FFFD in their place "
            "(Latin-1? iconv -f latin1 -t utf-8); the first: r.csv:2"
        ]


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("gone.jsonl", None, ConfigError, "--input .*gone.jsonl can't be read: No such file"),
        ("gone.parquet", None, ConfigError, "--input .*gone.parquet can't be read: No such file"),
        ("r.parquet", b"PAR1", DataError, "r.parquet can't be read as parquet"),
        ("r.jsonl", "x".encode("utf-16"), DataError, "r.jsonl is UTF-16"),
    ],
)
def test_files_that_can_t_be_read_are_told_before_any_work(
    tmp_path: Path, name: str, content: bytes | None, error: type[Exception], said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=said), reading(str(tmp_path / name), "--input"):
        pytest.fail("work began")


# --- the command ---

WITHOUT = """
import sys
for name in ("pyarrow", "datasets", "torch"):
    sys.modules[name] = None
from mope.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_server_log_is_refused_for_what_it_lacks(tmp_path: Path) -> None:
    line = (
        "INFO 12-02 09:00:00 [request_logger.py:65] Received request cmpl-1: params: SamplingParams(n=1), lora: None."
    )
    (tmp_path / "server.log").write_text(f"INFO starting\n{line}\n" * 3)
    with pytest.raises(DataError, match=r"server.log: this is vLLM's server log: .* neither prompts nor the lengths"):
        read(tmp_path / "server.log")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a... (litellm_truncated skipped 9 chars. A safe.) ...b", "completion_tokens": 9}, LITELLM_CUT),
        ({"messages": [{"role": "user", "content": "a... (litellm_truncated skipped 9 chars) ...b"}]}, LITELLM_CUT),
        ({"messages": [{"role": "user", "content": "redacted-by-litellm"}]}, LITELLM_REDACTED),
        ({"event": "e", "obj": {"text": "<s>hi", "input_ids": [1]}, "out": {"text": "x"}}, SGLANG_TEMPLATE),
    ],
)  # fmt: skip
def test_what_a_logger_did_not_keep_is_no_prompt(tmp_path: Path, record: Any, said: str) -> None:
    assert one(tmp_path, record)[1] == f"line 1: {said}"


# --- folders, globs and forms that nobody knows ---

OWN = {"prompt_field": "in.0.q", "llm_field": "served.by", "id_field": "key"}


def own(number: int) -> dict[str, Any]:
    """A record of a form that nobody knows, with names that are not ours."""
    asked = json.dumps([{"q": f"{ASK} {number}"}])
    return {"in": asked, "served": {"by": "gpt-4o"}, "key": f"k{number}", "custom_id": "no", "promt": "no name of ours"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_field_map_reads_what_nobody_knows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"own{suffix}"
    records = [own(number) for number in range(5)]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows({**record, "served": json.dumps(record["served"])} for record in records)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in [*records, 3]))
    found = read(path, OWN, max_tokens=9)
    if suffix == ".jsonl":
        place, mistake = found.pop()
        assert place == "line 6"
        assert "expected an object" in str(mistake)
    expected = [(f"k{i}", Request(prompt=f"{ASK} {i}", target_llm="gpt-4o", max_tokens=9)) for i in range(5)]
    assert found == expected


def test_a_path_that_no_record_has_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(own(number)) + "\n" for number in range(3)))
    with pytest.raises(DataError, match=r"--prompt-field in.0.question: no record of .* has a value there"):
        read(tmp_path / "own.jsonl", {"prompt_field": "in.0.question"})


def test_folders_and_globs_are_read_as_in_training(tmp_path: Path) -> None:
    for name in ("a/train-0.jsonl", "a/train-1.jsonl.gz", "a/test-0.jsonl", "b/more.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        container(tmp_path / name)
    asked = [f"{ASK} {number}" for number in range(3)]
    with reading(str(tmp_path / "a"), "--input") as found:
        requests = [read_request(entry, {}) for entry in found.entries]
    assert [request.prompt for _, request in requests if isinstance(request, Request)] == asked * 2
    assert "files of other splits were left out (1): test-0.jsonl" in found.told.lines()[0]
    with reading(str(tmp_path / "a"), "--input", split="test") as found:
        assert len(list(found.entries)) == 3
    with reading(str(tmp_path / "*" / "*.*"), "--input") as found:
        places = [entry.place for entry in found.entries]
    assert len(places) == 12
    assert places[:4] == ["a/test-0.jsonl:1", "a/test-0.jsonl:2", "a/test-0.jsonl:3", "a/train-0.jsonl:1"]
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path / "*.tsv")


def test_predictions_never_replace_a_file_of_the_folder_that_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    target = container(tmp_path / "logs" / "b.jsonl")
    container(tmp_path / "logs" / "a.jsonl")
    before = target.read_bytes()
    for source in (tmp_path / "logs", tmp_path / "logs" / "*.jsonl"):
        assert main(["predict", "nowhere", "--input", str(source), "--output", str(target)]) == 2
        assert "which would be lost" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert main(["predict", "nowhere", "--prompt-field", "q", "What is TCP?"]) == 2
    assert "--prompt-field goes with --input" in capsys.readouterr().err


def test_a_serving_installation_predicts_for_logs(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in FORMS.values()]
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "r.parquet")

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT, "predict", "chat-micro", "--input", str(tmp_path / name)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("log.jsonl.gz")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["id"] for answer in answers] == ["i"] * len(FORMS)
    assert len({answer["median"] for answer in answers}) == 1
    assert all(answer["source"] == "model" for answer in answers)
    done = run("r.parquet")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "r.parquet needs the package 'pyarrow', which is not installed: pip install 'mope-llm[files]'" in line


def test_evaluate_takes_the_field_map_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def evaluate(folder: str, data: Any, *_: Any, **__: Any) -> dict[str, Any]:
        asked.append(data)
        raise DataError("enough")

    monkeypatch.setattr("mope.training.evaluate_saved.evaluate_artifact", evaluate)
    arguments = ["evaluate", "x", "--data", "own.jsonl", "--prompt-field", "in.q", "--length-field", "out.n"]
    assert main(arguments) == 2
    assert (asked[0].prompt_field, asked[0].length_field, asked[0].llm_field) == ("in.q", "out.n", None)
