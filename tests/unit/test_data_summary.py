"""What `mope data` says of made-up data: its numbers are computed anew here, each warning has data that earn it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rows import table, write_lengths

from mope import cli
from mope.errors import DataError
from mope.request import Request
from mope.token_estimate import estimate_tokens
from mope.training.data import sample
from mope.training.data.build import DataSet, build_rows, is_cached
from mope.training.data.cli import summed_up
from mope.training.data.config import DataConfig
from mope.training.data.doubts import spikes
from mope.training.data.problems import NO_TEXT, DataReport, Problems
from mope.training.data.screen import _percent, show
from mope.training.data.summary import Doubt, Spread, Summary
from mope.training.data.table import RowTable

Rows = Sequence[dict[str, Any]]


def data_set(rows: RowTable, **report: Any) -> DataSet:
    said = {
        "source": "made-up", "data_format": "logs", "label_tokenizer": "recorded", "num_records": len(rows),
        "num_chats": len(rows), "num_rows": {"train": len(rows), "validation": 0, "test": 0, "reserved": 0},
        "counts": {}, "examples": {}, "warnings": (),
    }  # fmt: skip
    return DataSet(rows, DataReport(**{**said, **report}), "0")


def summary_of(rows: RowTable, min_rows: int = 0, **report: Any) -> Summary:
    return summed_up(data_set(rows, **report), min_rows)[0]


def with_columns(rows: RowTable, **columns: list[Any]) -> RowTable:
    """The rows with other values in some columns."""
    changed = rows.table
    for name, values in columns.items():
        at = changed.schema.get_field_index(name)
        changed = changed.set_column(at, changed.schema.field(at), pa.array(values, changed.schema.field(at).type))
    return RowTable(changed)


def varied(num_rows: int, low: int = 30, high: int = 3000, **flags: Any) -> tuple[list[Request], list[int]]:
    """Requests that differ, and lengths without a spike."""
    rng = np.random.default_rng(num_rows)
    tokens = np.exp(rng.uniform(np.log(low), np.log(high), num_rows)).astype(int).tolist()
    return [Request(prompt=f"tell me about number {number}", **flags) for number in range(num_rows)], tokens


def kinds(doubts: Sequence[Doubt]) -> list[str]:
    return [doubt.kind for doubt in doubts]


# --- numbers --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60))
def test_quantiles_lie_between_the_neighbours_of_their_rank(lengths: list[int]) -> None:
    spread = Spread.of(np.array(lengths))
    assert spread is not None
    ordered = sorted(lengths)
    for level, value in ((0.0, spread.min), (0.1, spread.p10), (0.5, spread.p50), (0.9, spread.p90), (1.0, spread.max)):
        rank = level * (len(ordered) - 1)
        below, above = ordered[int(rank + 1e-9)], ordered[min(int(rank + 1 + 1e-9), len(ordered) - 1)]
        assert below - 1e-6 <= value <= max(below, above) + 1e-6
    assert spread.num_rows == len(lengths)
    assert spread.min <= spread.p10 <= spread.p50 <= spread.p90 <= spread.p99 <= spread.max


def test_nothing_has_no_quantiles() -> None:
    assert Spread.of(np.array([], np.int64)) is None


FLAGS = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["", "  ", "one", "two words", "a third prompt"]),
        "target_llm": st.sampled_from([None, "llama-3-8b", "Llama-3-8B", "gpt-4", "my-own"]),
        "tools": st.booleans(),
        "response_format": st.sampled_from(["", "json_object"]),
        "thinking": st.sampled_from([None, True, False]),
        "num_earlier_turns": st.integers(0, 2),
        "max_tokens": st.sampled_from([None, 100]),
    }
)


@given(st.lists(st.tuples(FLAGS, st.integers(1, 500), st.booleans(), st.sampled_from([None, 0, 7])), min_size=1))
def test_shares_and_quantiles_by_llm_are_those_of_a_plain_count(
    made: list[tuple[dict[str, Any], int, bool, int | None]],
) -> None:
    requests = [Request(**flags) for flags, *_ in made]
    tokens, cut, thoughts = ([row[place] for row in made] for place in (1, 2, 3))
    rows = with_columns(
        table(requests, tokens, cut),
        thought_tokens=thoughts,
        label_from=["recorded" if number % 3 else "counted" for number in range(len(made))],
    )
    summary = summary_of(rows)

    def share(hold: Callable[[Request], bool]) -> float:
        return sum(map(hold, requests)) / len(requests)

    assert summary.num_rows == len(made)
    assert summary.shares["censored"] == pytest.approx(sum(cut) / len(cut))
    assert summary.shares["with_thoughts"] == pytest.approx(thoughts.count(7) / len(made))
    assert summary.shares["tools"] == pytest.approx(share(lambda request: request.tools))
    assert summary.shares["response_format"] == pytest.approx(share(lambda request: request.response_format != ""))
    assert summary.shares["thinking_asked"] == pytest.approx(share(lambda request: request.thinking is True))
    assert summary.shares["max_tokens"] == pytest.approx(share(lambda request: request.max_tokens is not None))
    assert summary.shares["first_turn"] == pytest.approx(share(lambda request: request.num_earlier_turns == 0))
    assert summary.empty_prompts == pytest.approx(share(lambda request: not request.prompt.strip()))
    prompts = [request.prompt.strip() for request in requests]
    assert summary.distinct_prompts == pytest.approx(len(set(prompts)) / len(prompts))
    most = max((prompts.count(prompt) for prompt in set(prompts) - {""}), default=0)
    assert summary.top_prompt == pytest.approx(most / len(prompts))
    assert sum(summary.label_from.values()) == len(made)
    assert summary.label_from.get("counted", 0) == -(-len(made) // 3)

    by_llm: dict[str | None, list[int]] = {}
    for request, length in zip(requests, tokens, strict=True):
        by_llm.setdefault((request.target_llm or "").lower(), []).append(length)
    assert sorted((llm.name or "").lower() for llm in summary.llms) == sorted(by_llm)  # spellings are one LLM
    sizes = [llm.response_tokens.num_rows for llm in summary.llms]
    assert sizes == sorted(sizes, reverse=True)
    for llm in summary.llms:
        lengths = by_llm[(llm.name or "").lower()]
        assert llm.response_tokens.num_rows == len(lengths)
        assert llm.response_tokens.p50 == pytest.approx(float(np.median(lengths)))
        assert llm.response_tokens.max == max(lengths)
    assert summary.prompt_tokens.max == max(estimate_tokens(request.prompt) for request in requests)
    if 7 in thoughts:
        assert summary.thought_tokens is not None
        assert (summary.thought_tokens.num_rows, summary.thought_tokens.p50) == (thoughts.count(7), 7)


def test_llms_are_shown_as_they_are_read() -> None:
    names = ["Qwen/Qwen3-8B", "qwen3:8b", "deepseek-r1", "house-blend", None]
    requests = [Request(prompt=str(number), target_llm=name) for number, name in enumerate(names * 3)]
    rows = with_columns(table(requests, range(1, 16)), llm_year=[2025, None, None, None, None] * 3)
    first, *others = summary_of(rows).llms
    assert (first.canonical, first.num_spellings, first.family, first.size) == ("qwen-3-8b", 2, "qwen", 8.0)
    assert (first.family_known, first.reasoning, first.year) == (True, None, 2025)
    found = {llm.name: llm for llm in others}
    assert found["deepseek-r1"].reasoning is True
    assert not found["house-blend"].family_known
    assert found[None].canonical == ""


@pytest.mark.parametrize("name", ["o1", "o3-mini", "openai/o4-mini-2025-04-16"])
def test_openai_s_reasoning_llms_have_a_family(name: str) -> None:
    requests = [Request(prompt=str(number), target_llm=name) for number in range(3)]
    (llm,) = summary_of(table(requests, [1, 2, 3])).llms
    assert (llm.family, llm.family_known, llm.reasoning) == ("o", True, True)


def test_ctrl_c_is_one_line_with_a_quicker_command(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "build_rows", stopped)
    status, out, err = run(write_lengths(tmp_path / "my rows.jsonl", 60), "--languages", "English")
    assert (status, out) == (130, "")
    assert err.splitlines()[-1].startswith(
        "interrupted; nothing was changed. A look at fewer rows is quicker: mope data '"
    )
    assert err.splitlines()[-1].endswith("my rows.jsonl' --languages English --rows 1000")


def test_what_the_data_say_of_an_unknown_llm_is_taken() -> None:
    said = {"llm_family": "qwen", "llm_size": 32.0, "llm_reasoning": True}
    requests = [Request(prompt=str(number), target_llm="house-blend", **said) for number in range(3)]
    (llm,) = summary_of(table(requests, [1, 2, 3])).llms
    assert (llm.family, llm.family_known, llm.size, llm.reasoning) == ("qwen", True, 32.0, True)


def test_examples_are_a_short_a_usual_and_a_long_answer() -> None:
    requests = [Request(prompt=f"prompt {number}") for number in range(101)]
    tokens = [(37 * number) % 101 + 1 for number in range(101)]
    examples = summary_of(table(requests, tokens)).examples
    assert [example.response_tokens for example in examples] == [11, 51, 91]
    assert [example.request.prompt for example in examples] == [f"prompt {tokens.index(n)}" for n in (11, 51, 91)]


def test_prompts_of_many_rows_are_looked_at_in_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mope.training.data.summary.MAX_TEXTS", 11)
    requests = [Request(prompt="" if number % 2 else f"p {number}") for number in range(101)]
    summary = summary_of(table(requests, range(1, 102)))
    assert summary.num_texts == summary.prompt_tokens.num_rows == 11
    assert summary.num_rows == summary.response_tokens.num_rows == 101
    assert summary.empty_prompts == 0  # rows 0, 10, 20, ...


def test_rows_that_are_all_reserved_are_told() -> None:
    with pytest.raises(DataError, match="all of them in reserve"):
        summary_of(table([], []), num_rows={"train": 0, "reserved": 3})


# --- warnings -------------------------------------------------------------------------------------------------------


def test_usual_rows_earn_no_warning() -> None:
    requests, tokens = varied(600, target_llm="llama-3-8b")
    assert summary_of(table(requests, tokens), min_rows=500).doubts == ()


@given(st.lists(st.sampled_from([10, 20, 63, 64, 300, 900]), min_size=1, max_size=90))
def test_values_without_neighbours_are_spikes_if_they_are_long_and_frequent(lengths: list[int]) -> None:
    # 63 and 64 are neighbours: the range of 64 holds 13 tokens up to the longest answer, or 7 where that is 64
    expected = {value: lengths.count(value) for value in (300, 900) if lengths.count(value) >= 10}
    around = lengths.count(63) / (min(max(lengths), 70) - 58)
    if lengths.count(64) >= max(10, 10 * around):
        expected[64] = lengths.count(64)
    assert dict(spikes(np.array(lengths))) == expected


@pytest.mark.parametrize("cap", [64, 256, 1024, 2048])
def test_a_cap_is_a_spike_and_a_smooth_set_has_none(cap: int) -> None:
    _, tokens = varied(3000)
    assert spikes(np.array(tokens)) == []
    capped = np.minimum(tokens, cap)
    assert spikes(capped) == [(cap, int((capped == cap).sum()))]


def test_a_cap_for_some_requests_only_is_found() -> None:
    _, tokens = varied(3000)
    some = np.where(np.arange(3000) % 2, np.minimum(tokens, 512), tokens)
    assert [value for value, _ in spikes(some)] == [512]


def earning(kind: str) -> tuple[RowTable, dict[str, Any]]:
    """Rows, and what else is reported, that earn one warning."""
    requests, tokens = varied(600, target_llm="llama-3-8b")
    report: dict[str, Any] = {}
    cut = [False] * 600
    columns: dict[str, list[Any]] = {}
    if kind == "few_rows":
        requests, tokens, cut = requests[:100], tokens[:100], cut[:100]
    elif kind == "left_out":
        report = {"counts": {"failed request, skipped": 601}, "examples": {"failed request, skipped": ("a:1",)}}
    elif kind == "short_labels":
        tokens = [1 + number % 25 for number in range(600)]
    elif kind == "equal_labels":
        tokens = [20 if number % 2 else length for number, length in enumerate(tokens)]
    elif kind == "spike":
        tokens = [min(length, 700) for length in tokens]
    elif kind == "cut_off":
        cut = [number % 4 == 0 for number in range(600)]
    elif kind == "two_tokenizers":
        columns = {"label_from": ["recorded" if number % 2 else "counted" for number in range(600)]}
        tokens = [2 * length if number % 2 else length for number, length in enumerate(tokens)]
    elif kind == "no_thoughts":
        requests, _ = varied(600, target_llm="deepseek-r1")
        columns = {"label_from": ["counted"] * 600}
    elif kind == "empty_prompts":
        report = {"counts": {NO_TEXT: 100}, "examples": {NO_TEXT: ("a:1",)}}
    elif kind == "one_prompt":
        requests = [Request(prompt="the same" if number % 3 == 0 else f"p {number}") for number in range(600)]
    elif kind == "few_prompts":
        requests = [Request(prompt=f"p {number % 60}") for number in range(600)]
    elif kind == "one_group":
        columns = {"group": ["one" if number % 4 == 0 else str(number) for number in range(600)]}
    elif kind == "one_llm":
        requests[0] = Request(prompt="rare", target_llm="gpt-4")
    return with_columns(table(requests, tokens, cut), **columns), report


@pytest.mark.parametrize(
    "kind",
    [
        "few_rows",
        "left_out",
        "short_labels",
        "equal_labels",
        "spike",
        "cut_off",
        "two_tokenizers",
        "no_thoughts",
        "empty_prompts",
        "one_prompt",
        "few_prompts",
        "one_group",
        "one_llm",
    ],
)
def test_each_warning_has_rows_that_earn_it_alone(kind: str) -> None:
    rows, report = earning(kind)
    summary = summary_of(rows, min_rows=500, **report)
    assert kinds(summary.doubts) == [kind]
    assert summary.doubts[0].text in summary.to_json()["warnings"]


def test_cut_answers_are_no_unmarked_cap() -> None:
    requests, tokens = varied(600)
    capped = [min(length, 700) for length in tokens]
    assert "spike" not in kinds(summary_of(table(requests, capped, [length == 700 for length in capped])).doubts)


def test_what_was_dropped_as_asked_is_no_warning() -> None:
    rows, _ = earning("none")
    reason = "row of a later turn, dropped as asked"
    assert summary_of(rows, counts={reason: 10**6}, examples={reason: ("a:1",)}).doubts == ()


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `mope data` with a cache of its own."""
    from mope import console as terminal

    monkeypatch.setenv("MOPE_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        terminal.console.cache_clear()  # its stderr is the one that was there when it was made
        status = cli.main(["data", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def logs(path: Path, num_rows: int = 200) -> Path:
    """Logs of two LLMs with recorded usage, a quarter of the answers cut off."""
    lines = []
    for number in range(num_rows):
        cut = number % 4 == 0
        request = {
            "model": "llama-3-8b" if number % 2 else "gpt-4",
            "messages": [{"role": "user", "content": f"question {number} about [bold] things"}],
            "max_tokens": 900,
            **({"tools": [{"type": "function", "function": {"name": "f"}}]} if number % 10 == 0 else {}),
        }
        response = {
            "choices": [
                {"message": {"role": "assistant", "content": "x"}, "finish_reason": "length" if cut else "stop"}
            ],
            "usage": {"completion_tokens": 900 if cut else 40 + number},
        }
        lines.append(json.dumps({"request": request, "response": response}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_screen_has_numbers_examples_and_warnings(run: Callable[..., Any], tmp_path: Path) -> None:
    status, out, _ = run(logs(tmp_path / "logs.jsonl"))
    assert status == 0
    assert "200 records read as logs" in out
    assert "labels: recorded 100%" in out
    assert "gpt-4, family gpt" in " ".join(out.split())
    assert out.count("  prompt:  question ") == 3
    assert "about [bold] things" in out
    assert "max_tokens 900" in out
    assert "CONVERSATION/N answers message N of it" in out
    assert "warning: " in out
    assert "expected at least 500 (--min-rows)" in out
    assert len(out.splitlines()) <= 40


def test_json_has_what_the_screen_has(run: Callable[..., Any], tmp_path: Path) -> None:
    source = logs(tmp_path / "logs.jsonl")
    status, out, _ = run(source, "--json")
    found = json.loads(out)
    rows = build_rows(DataConfig(source=str(source), min_rows=0)).rows
    assert status == 0
    assert found["report"]["num_records"] == 200
    assert found["response_tokens"]["p50"] == float(np.median(rows.response_tokens))
    assert found["shares"]["censored"] == pytest.approx(rows.censored.mean())
    assert found["shares"]["tools"] == pytest.approx(np.mean([request.tools for request in rows.requests()]))
    assert {llm["name"] for llm in found["llms"]} == {"llama-3-8b", "gpt-4"}
    assert found["examples"][0]["request"]["max_tokens"] == 900
    assert {"few_rows", "cut_off"} <= {doubt["kind"] for doubt in found["doubts"]}


def test_flags_change_what_is_shown(run: Callable[..., Any], tmp_path: Path) -> None:
    source = write_lengths(tmp_path / "rows.jsonl", 300)
    plain = json.loads(run(source, "--json")[1])
    capped = json.loads(run(source, "--json", "--response-cap", "500", "--target-llm", "gpt-4")[1])
    assert (plain["shares"]["censored"], plain["num_llms"]) == (0, 0)
    assert capped["shares"]["censored"] > 0.3
    assert [llm["name"] for llm in capped["llms"]] == ["gpt-4"]


def test_training_takes_the_rows_from_the_cache(run: Callable[..., Any], tmp_path: Path) -> None:
    source = write_lengths(tmp_path / "rows.jsonl", 300)
    config = DataConfig(source=str(source), cache_dir=tmp_path / "cache")
    assert not is_cached(config)
    assert run(source)[0] == 0
    assert is_cached(config)
    assert build_rows(config.model_copy(update={"min_rows": 0})).report.from_cache


def test_a_large_source_is_sampled_from_all_its_files_unless_it_is_cached(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    for number in range(4):
        write_lengths(tmp_path / "logs" / f"{number}.jsonl", 300, seed=number)
    monkeypatch.setattr(sample, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(sample, "SAMPLE_ROWS", 160)
    monkeypatch.setattr(sample, "BLOCK_RECORDS", 8)
    found = json.loads(run(tmp_path / "logs", "--json")[1])
    assert sum(found["report"]["num_rows"].values()) == 160
    assert found["sample"].startswith("about the first 160 rows of 4 files (")
    assert "from their beginnings alone: what comes later may differ; --rows all" in found["sample"]
    assert "few_rows" not in {doubt["kind"] for doubt in found["doubts"]}  # the source has more
    files = sample.Interleaved(sample.open_source(DataConfig(source=str(tmp_path / "logs"))), 160)  # type: ignore[arg-type]
    places = [place.split(":")[0] for place, _ in files.records(Problems())]
    assert {name: places[:160].count(name) for name in set(places)} == {f"{number}.jsonl": 40 for number in range(4)}
    assert len(places) == 1200
    whole = json.loads(run(tmp_path / "logs", "--json", "--rows", "all")[1])
    assert (whole["report"]["num_records"], whole["sample"]) == (1200, None)
    again = json.loads(run(tmp_path / "logs", "--json")[1])
    assert (again["report"]["num_records"], again["report"]["from_cache"]) == (1200, True)


def test_more_rows_than_there_are_is_no_sample(run: Callable[..., Any], tmp_path: Path) -> None:
    source = write_lengths(tmp_path / "rows.jsonl", 300)
    assert json.loads(run(source, "--json", "--rows", "5000")[1])["sample"] is None
    assert sum(json.loads(run(source, "--json", "--rows", "50")[1])["report"]["num_rows"].values()) == 50


def test_the_picture_is_a_png(run: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "lengths.png"
    assert run(logs(tmp_path / "logs.jsonl"), "--plot", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_does_not_replace_the_data(run: Callable[..., Any], tmp_path: Path) -> None:
    rows = logs(tmp_path / "logs.jsonl")
    before = rows.read_bytes()
    (tmp_path / "lengths.png").hardlink_to(rows)
    status, _, err = run(rows, "--plot", tmp_path / "lengths.png")
    assert status == 2
    assert "is the file that DATA reads, which would be lost" in err
    assert rows.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["{rows}", "--rows", "0"], "--rows: got '0'; expected a number of rows, at least 1, or all"),
        (["{rows}", "--plot", "x.pdf"], "--plot: got 'x.pdf'; expected a name that ends in .png"),
        (["{rows}", "--plot", "{rows}/x.png"], "can't be written: "),
        (["{rows}", "--min-rows", "few"], "--min-rows: got 'few'"),
        (["{rows}", "--label-tokenizer", "encoder"], "give the path of the encoder's tokenizer.json"),
        ([], "the following arguments are required: DATA"),
    ],
)
def test_mistakes_are_one_line(run: Callable[..., Any], tmp_path: Path, arguments: list[str], said: str) -> None:
    rows = write_lengths(tmp_path / "rows.jsonl", 60)
    status, out, err = run(*(argument.format(rows=rows) for argument in arguments))
    assert (status, out) == (2, "")
    errors = [line for line in err.splitlines() if not line.startswith("reading ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert said in errors[0]


def test_no_torch_is_imported(tmp_path: Path) -> None:
    source = write_lengths(tmp_path / "rows.jsonl", 60)
    script = (
        "import sys; from mope.cli import main; status = main(sys.argv[1:])\n"
        "slow = {'torch', 'transformers', 'lightning', 'sklearn', 'datasets'} & set(sys.modules)\n"
        "sys.exit(status or ', '.join(slow) or None)"
    )
    typed = [sys.executable, "-c", script, "data", str(source), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(typed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_narrow_terminal_keeps_all_numbers() -> None:
    requests, tokens = varied(50, target_llm="a-very-long-name-" * 4)
    console = Console(width=80, record=True, file=io.StringIO())
    summary = summary_of(table(requests, tokens))
    show(summary, console)
    text = console.export_text()
    assert f"{summary.response_tokens.max:,.0f}" in text
    assert f"{summary.response_tokens.p99:,.0f}" in text


def test_a_label_says_whose_tokens_it_has_where_they_are_not_the_llms_own() -> None:
    units = ["own", "cl100k_base", None]
    requests = [Request(prompt=f"p {number}", token_unit=unit) for number, unit in enumerate(units)]
    console = Console(width=200, record=True, file=io.StringIO())
    show(summary_of(table(requests, [10, 20, 30])), console)
    text = console.export_text()
    assert all(f" {label}\n" in text for label in ("10 tokens", "20 tokens of cl100k_base", "30 tokens"))
    assert "token_unit" not in text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.001, "<1%"), (0.25, "25%"), (0.999, ">99%"), (1.0, "100%")]
)
def test_a_share_is_nothing_or_all_only_if_it_is(share: float, text: str) -> None:
    assert _percent(share) == text
