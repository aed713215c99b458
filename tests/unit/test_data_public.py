"""`public-lengths`: reading made-up files of each set's form, fetching local archives, and rows with their splits."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.errors import ConfigError, DataError
from mope.training import cli as training_cli
from mope.training.data import public_fetch, splits
from mope.training.data.build import DataSet, build_rows
from mope.training.data.config import DataConfig
from mope.training.data.problems import Problems
from mope.training.data.public import PublicLengths, group_of
from mope.training.data.public_fetch import OPTIONAL, REQUIRED, SCHEMA, fetch, path_of
from mope.training.data.public_readers import (
    CapRule,
    RecordedAnswer,
    RepositoryFile,
    ends_like_json,
    ends_like_prose,
    ends_with_box,
    id_of,
    zeroeval_question,
)
from mope.training.data.public_sets import PUBLIC_SETS, PublicSet, public_sets
from mope.training.data.sources import open_source

SETS = {public.name: public for public in PUBLIC_SETS}
TEMPLATE = '\n## Question: \n\n{}\n\n\n## Instruction \n\nAnswer in JSON.\n```json\n{{"answer": "___"}}\n```\n'


class Words:
    """Counts words."""

    name = identity = "words"

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def as_lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# --- the list of sets -------------------------------------------------------------------------------------------------


def test_only_sets_whose_licence_allows_training_are_listed() -> None:
    listed = public_sets()
    assert [each["name"] for each in listed] == [
        "just_eval", "arena-hard-v0.1", "zeroeval_gsm", "zeroeval_math-l5", "zeroeval_crux", "skythought_math",
        "oasst_sampling", "gpteacher_codegen", "gpteacher_roleplay", "gpteacher_toolformer",
    ]  # fmt: skip
    for each in listed:
        assert each["licence"] in ("MIT", "Apache-2.0")
        assert re.fullmatch(r"[0-9a-f]{40}", each["commit"])
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", each["repository"])
        assert each["about"]


@pytest.mark.parametrize(
    ("name", "path", "llm"),
    [
        ("just_eval", "leaderboard/outputs/Yi-6B-Chat.to_eval.json", "Yi-6B-Chat"),
        ("just_eval", "leaderboard/outputs/vicuna-7b-v1.5.json", "vicuna-7b-v1.5"),
        ("just_eval", "leaderboard/outputs/README.md", None),
        ("just_eval", "leaderboard/eval_results/gpt-4/x.json", None),
        ("arena-hard-v0.1", "data/arena-hard-v0.1/question.jsonl", ""),
        ("arena-hard-v0.1", "data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl", "gpt-4-0314"),
        ("arena-hard-v0.1", "data/arena-hard-v2.0/question.jsonl", None),
        ("zeroeval_gsm", "result_dirs/gsm/gemma-2-27b-it@together.json", "gemma-2-27b-it@together"),
        ("zeroeval_gsm", "result_dirs/gsm.summary.json", None),
        ("zeroeval_gsm", "result_dirs/crux/Athene-70B.json", None),
        ("skythought_math", "a/evaluation/outputs/Qwen/Q-7B/aime24_eval/aime24/test_x_e-1.jsonl", "Qwen/Q-7B"),
        ("skythought_math", "evaluation/outputs/icml_models/T/checkpoint-5/m_eval/m/test.jsonl", "T/checkpoint-5"),
        ("skythought_math", "a/evaluation/outputs/home/ubuntu/dl/T-14B/amc23_eval/amc23/test.jsonl", "T-14B"),
        ("skythought_math", "a/evaluation/outputs/Qwen/Q-7B/aime24_eval/aime24/test_metrics.json", None),
        ("skythought_math", "a/evaluation/outputs/Qwen/Q-7B/aime24_eval/aime24/.test.jsonl.swp", None),
        ("oasst_sampling", "sampling_reports/oasst-sft/1k-prompts/result_00.json", ""),
        ("oasst_sampling", "sampling_reports/anthropic/claude.jsonl", ""),
        ("oasst_sampling", "config/noprefix.json", None),
        ("gpteacher_codegen", "Codegen/codegen-instruct.json", ""),
        ("gpteacher_toolformer", "Toolformer/toolformer-similarity-0.6-dataset.json", None),
    ],
)
def test_paths_of_a_set_and_the_llm_they_name(name: str, path: str, llm: str | None) -> None:
    found = SETS[name].files.fullmatch(path)
    assert (found and (found.groupdict().get("llm") or "")) == llm


# --- readers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str, dict[str, str]], list[RecordedAnswer]]:
    """The answers that a set's reader finds in files given by path and content."""

    def call(name: str, contents: dict[str, str]) -> list[RecordedAnswer]:
        files = []
        for number, (path, content) in enumerate(contents.items()):
            found = SETS[name].files.fullmatch(path)
            assert found
            (tmp_path / str(number)).write_text(content, "utf-8")
            files.append(RepositoryFile(path, found.groupdict().get("llm") or "", tmp_path / str(number)))
        return list(SETS[name].read(files))

    return call


def test_just_eval_takes_the_llm_from_the_generator_or_the_file(read: Any) -> None:
    records = [
        {"id": 7, "instruction": "Hi?", "output": "Hello.", "generator": "Llama-2-chat.p=1.0.t=0.0"},
        {"id": 8, "instruction": "Who?", "output": "Me an... (truncated)", "generator": "results//llama.json"},
        {"id": 9, "instruction": "What?", "output": None},
    ]
    assert read("just_eval", {"leaderboard/outputs/llama.to_eval.json": json.dumps(records)}) == [
        RecordedAnswer(prompt_id="7", prompt="Hi?", target_llm="Llama-2-chat", text="Hello."),
        RecordedAnswer(prompt_id="8", prompt="Who?", target_llm="llama", text="Me an... (truncated)", is_cut=True),
        RecordedAnswer(prompt_id="9", prompt="What?", target_llm="llama", text=""),
    ]


def test_arena_hard_joins_answers_to_questions_in_any_order(read: Any) -> None:
    answers = as_lines(
        {"question_id": "q2", "model_id": "m", "choices": [{"turns": [{"content": "Two."}, {"content": "more"}]}]},
        {"question_id": "q9", "model_id": "m", "choices": [{"turns": [{"content": "No question."}]}]},
        {"question_id": "q1", "model_id": "m", "choices": []},
    )
    questions = as_lines(*({"question_id": f"q{n}", "turns": [{"content": f"Ask {n}"}]} for n in (1, 2)))
    folder = "data/arena-hard-v0.1"
    assert read(
        "arena-hard-v0.1", {f"{folder}/model_answer/m.jsonl": answers, f"{folder}/question.jsonl": questions}
    ) == [
        RecordedAnswer(prompt_id="q2", prompt="Ask 2", target_llm="m", text="Two."),
        RecordedAnswer(prompt_id="q9", prompt="", target_llm="m", text="No question."),
        RecordedAnswer(prompt_id="q1", prompt="Ask 1", target_llm="m", text=""),
    ]


def test_zeroeval(read: Any) -> None:
    prompt = TEMPLATE.format("How many?")
    records = [
        {"session_id": 3, "id": 3, "chat_history": [prompt], "output": ['{"answer": "3"}'], "model_input": "n/a"},
        {"session_id": "t#4", "chat_history": [prompt], "output": [None]},
    ]
    assert read("zeroeval_crux", {"result_dirs/crux/gemma@together.json": json.dumps(records)}) == [
        RecordedAnswer(prompt_id="3", prompt=prompt, target_llm="gemma@together", text='{"answer": "3"}'),
        RecordedAnswer(prompt_id="t#4", prompt=prompt, target_llm="gemma@together", text=""),
    ]


def test_skythought_gives_every_sample(read: Any) -> None:
    lines = as_lines({"idx": 0, "question": "1 + 1?", "code": ["2", "\\boxed{2}"]}, {"idx": 1, "question": "2?"})
    found = read("skythought_math", {"x/evaluation/outputs/Qwen/Q/amc23_eval/amc23/test.jsonl": lines})
    assert [(answer.target_llm, answer.prompt, answer.text) for answer in found] == [
        ("Qwen/Q", "1 + 1?", "2"), ("Qwen/Q", "1 + 1?", "\\boxed{2}"), ("Qwen/Q", "2?", ""),
    ]  # fmt: skip
    assert found[0].prompt_id == hashlib.sha1(b"1 + 1?").hexdigest()[:12] == id_of("1 + 1?")


def test_oasst_keeps_settings_and_leaves_steered_answers_out(read: Any) -> None:
    def result(config: str, outputs: list[Any], **params: Any) -> dict[str, Any]:
        return {"sampling_config": config, "sampling_params": params, "outputs": outputs}

    steered = ("length_2_lang_de", "humor_0.1", "quality_0.1_humor_0.9", "k50_creative", "k50_serious")
    report = {
        "model_name": "org/llama-sft",
        "prompts": [
            {
                "prompt": "Hi",
                "results": [
                    result(
                        "greedy", ["Hello", "Ho<|endoftext|>"], do_sample=False, temperature=1.0, max_new_tokens=400
                    ),
                    result("k50", ["Hey"], do_sample=True, temperature=0.8, max_new_tokens=128),
                    result("sample", ["Yo"], temperature=0.7, max_tokens=512),
                    *(result(config, ["no"]) for config in steered),
                ],
            }
        ],
    }
    found = read("oasst_sampling", {"sampling_reports/a/r.jsonl": json.dumps(report, indent=1)})
    assert {answer.target_llm for answer in found} == {"org/llama-sft"}
    assert [(answer.text, answer.is_cut, answer.temperature, answer.max_tokens) for answer in found] == [
        ("Hello", None, 0.0, 400), ("Ho", False, 0.0, 400), ("Hey", None, 0.8, 128), ("Yo", None, 0.7, None),
    ]  # fmt: skip
    assert read("oasst_sampling", {"sampling_reports/a/list.json": "[1, 2]"}) == []


def test_gpteacher_puts_the_input_under_the_instruction(read: Any) -> None:
    records = [
        {"instruction": "Add.", "input": "1, 2", "response": "3"},
        {"instruction": "Rhyme.", "input": "", "response": "Time."},
    ]
    found = read("gpteacher_codegen", {"Codegen/codegen-instruct.json": json.dumps(records)})
    assert [(answer.prompt, answer.text, answer.target_llm) for answer in found] == [
        ("Add.\n\n1, 2", "3", "gpt-4"), ("Rhyme.", "Time.", "gpt-4"),
    ]  # fmt: skip


def test_a_file_that_is_not_json_is_named(read: Any) -> None:
    with pytest.raises(DataError, match=r"Codegen/codegen-instruct\.json is not JSON: "):
        read("gpteacher_codegen", {"Codegen/codegen-instruct.json": "[1,"})


# --- caps -------------------------------------------------------------------------------------------------------------


def answer_of(llm: str = "llama", text: str = "x", **fields: Any) -> RecordedAnswer:
    return RecordedAnswer(prompt_id="1", prompt="p", target_llm=llm, text=text, **fields)


@pytest.mark.parametrize(
    ("name", "answer", "num_tokens", "is_cut"),
    [
        ("just_eval", answer_of("gpt-4-0314", "Done."), 1022, False),
        ("just_eval", answer_of("gpt-4-0314", "Done."), 1023, True),
        ("just_eval", answer_of("Yi-6B-Chat", "and the"), 2866, False),
        ("just_eval", answer_of("Yi-6B-Chat", "and the"), 2868, True),
        ("just_eval", answer_of("Yi-6B-Chat", "and so on."), 4095, False),
        ("just_eval", answer_of("Yi-6B-Chat", "and so on."), 4096, True),
        ("just_eval", answer_of("tulu-2-dpo-7b", "and the"), 1500, True),
        ("just_eval", answer_of("tulu-2-dpo-70b", "and the"), 90_000, False),
        ("just_eval", answer_of("vicuna", "the ris ... (truncated)", is_cut=True), 30, True),
        ("arena-hard-v0.1", answer_of("gpt-4-0613"), 4095, True),
        ("zeroeval_gsm", answer_of("Phi-3", '{"answer": "42"}\n```'), 3900, False),
        ("zeroeval_gsm", answer_of("Phi-3", '{"answer": "42'), 3900, True),
        ("zeroeval_gsm", answer_of("Llama@sambanova", '{"a'), 1500, True),
        ("skythought_math", answer_of("Qwen/Qwen2.5-14B-Instruct", "so x = "), 20_000, False),
        ("skythought_math", answer_of("Qwen/Qwen2.5-14B-Instruct", "so x = "), 22_000, True),
        ("skythought_math", answer_of("Sky-T1-math-wrong-5K-27B", "so x = "), 2_800, True),
        ("skythought_math", answer_of("google/gemma-2-27b-it", "\\boxed{3}"), 2_800, False),
        ("oasst_sampling", answer_of("llama", "The end.", max_tokens=400), 379, False),
        ("oasst_sampling", answer_of("llama", "The end.", max_tokens=400), 380, True),
        ("oasst_sampling", answer_of("llama", "and then", max_tokens=400), 280, True),
        ("oasst_sampling", answer_of("llama", "and then", max_tokens=400, is_cut=False), 399, False),
        ("oasst_sampling", answer_of("gpt4all-lora", "and then", max_tokens=400), 300, True),
        ("oasst_sampling", answer_of("gpt-4", "and then"), 1024, False),
        ("gpteacher_roleplay", answer_of("gpt-4", "and then"), 9_999, False),
    ],
)  # fmt: skip
def test_caps_of_the_sets(name: str, answer: RecordedAnswer, num_tokens: int, is_cut: bool) -> None:
    assert SETS[name].cap_rule.is_cut_off(answer, num_tokens) is is_cut


@given(st.integers(1, 5000), st.integers(0, 6000), st.sampled_from(["Done.", "and"]), st.sampled_from(["gpt-4", "m"]))
def test_a_longer_answer_is_cut_off_if_a_shorter_one_is(cap: int, num_tokens: int, text: str, llm: str) -> None:
    rule = CapRule(cap_of=lambda answer: cap, is_finished=ends_like_prose)
    answer = answer_of(llm, text)
    assert rule.is_cut_off(answer, num_tokens) <= rule.is_cut_off(answer, num_tokens + 1)
    assert rule.is_cut_off(answer, cap)
    assert not rule.is_cut_off(answer, int(0.69 * cap) - 1)


def test_ends_of_answers() -> None:
    for text in ("Yes.", "Why?!", "(see above)", "```\ncode\n```\n", "他说。", "| a | b |"):
        assert ends_like_prose(text), text
    for text in ("and the", "1. First,", "", "x ="):
        assert not ends_like_prose(text), text
    assert ends_like_json('```json\n{"a": 1}\n```')
    assert not ends_like_json('{"a": {"b": 1}, "c')
    assert ends_with_box("so \\boxed{12}. Done.")
    assert not ends_with_box("\\boxed{12} " + "but wait " * 60)


# --- splits -----------------------------------------------------------------------------------------------------------


def rule_of_the_splits(question: str) -> str:
    """The rule in words: hash of a hash of the normalised question's first 400 characters, in hundredths."""
    normalised = re.sub(r"[^a-z0-9\u0080-\uffff]+", " ", question.lower()).strip()[:400]
    inner = hashlib.sha1(normalised.encode()).hexdigest()
    bucket = int(hashlib.sha1(f"mope-split-v1:{inner}".encode()).hexdigest()[:8], 16) % 100
    return "train" if bucket < 70 else "validation" if bucket < 80 else "test" if bucket < 90 else "reserved"


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=900))
def test_the_split_of_a_prompt_is_that_of_its_first_400_characters(prompt: str) -> None:
    found = group_of(SETS["oasst_sampling"], prompt)
    assert splits.SPLITS[splits.split_of(found)] == rule_of_the_splits(prompt)


@pytest.mark.parametrize("question", ["How many?", "def f(x):\n    return x  # ## Instruct", "Line\n\nLine"])
def test_a_template_does_not_change_the_split(question: str) -> None:
    prompt = TEMPLATE.format(question)
    assert zeroeval_question(prompt) == question
    assert zeroeval_question("no template") == "no template"
    assert group_of(SETS["zeroeval_gsm"], prompt) == group_of(SETS["skythought_math"], question)
    assert group_of(SETS["just_eval"], prompt) != group_of(SETS["just_eval"], question)


# --- fetching ---------------------------------------------------------------------------------------------------------

TEACHER = {
    "Codegen/codegen-instruct.json": json.dumps(
        [
            {"instruction": "Sum up", "input": "1 2", "response": "three words here"},
            {"instruction": "Sum up", "input": "1 2", "response": "again"},
            {"instruction": "Nothing", "input": "", "response": " "},
            {"instruction": "Odd \ud800 \0 text", "input": "", "response": "\udfff <|endoftext|>"},
        ]
    ),
    "Roleplay/roleplay-simple-deduped-roleplay-instruct.json": json.dumps([{"instruction": "Be", "response": "I am"}]),
    "Roleplay/other.json": "not JSON, never read",
    "LICENSE": "MIT",
}
GPTEACHER = [public for public in PUBLIC_SETS if public.repository == "teknium1/GPTeacher"]


def archive(path: Path, contents: dict[str, str]) -> Path:
    """A gzipped tar file with one folder around all, as GitHub makes it."""
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "0" * 40}) as file:
        folder = tarfile.TarInfo("GPTeacher-4810751")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name, content in contents.items():
            member = tarfile.TarInfo(f"GPTeacher-4810751/{name}")
            member.size = len(content.encode())
            file.addfile(member, io.BytesIO(content.encode()))
    return path


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that stands for the archive of GPTeacher; other archives do not exist."""
    monkeypatch.setattr(public_fetch, "ARCHIVE", f"file://{tmp_path}/{{repository}}/{{commit}}.tar.gz")
    (tmp_path / "teknium1" / "GPTeacher").mkdir(parents=True)
    return tmp_path / "teknium1" / "GPTeacher" / f"{GPTEACHER[0].commit}.tar.gz"


def rows_in(path: Path) -> list[dict[str, Any]]:
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    return list(table.to_pylist())


def test_an_archive_becomes_a_file_per_set(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive(served, TEACHER)
    fetch(GPTEACHER, tmp_path / "kept", Words())
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "gpteacher_codegen.parquet", "gpteacher_roleplay.parquet", "gpteacher_toolformer.parquet",
    ]  # fmt: skip
    first, second = rows_in(tmp_path / "kept" / "gpteacher_codegen.parquet")
    assert {name: value for name, value in first.items() if value is not None} == {
        "prompt_id": id_of("Sum up\n\n1 2"), "prompt": "Sum up\n\n1 2", "target_llm": "gpt-4", "response_tokens": 3,
        "censored": False,
    }  # fmt: skip
    assert (second["prompt"], second["response_tokens"]) == ("Odd \ufffd  text", 2)
    assert [row["prompt"] for row in rows_in(tmp_path / "kept" / "gpteacher_roleplay.parquet")] == ["Be"]
    assert rows_in(tmp_path / "kept" / "gpteacher_toolformer.parquet") == []  # not in this archive


def test_repeats_are_kept_where_a_set_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_fetch, "ARCHIVE", f"file://{tmp_path}/archive.tar.gz")
    outputs = ["and so", "and so", "well " * 10]
    result = {"sampling_config": "k50", "sampling_params": {"max_new_tokens": 10, "temperature": 0.5}}
    report = {"model_name": "m", "prompts": [{"prompt": "Hi", "results": [{**result, "outputs": outputs}]}]}
    archive(tmp_path / "archive.tar.gz", {"sampling_reports/x/r.json": json.dumps(report)})
    fetch([SETS["oasst_sampling"]], tmp_path, Words())
    rows = rows_in(tmp_path / "oasst_sampling.parquet")
    assert [(row["response_tokens"], row["censored"]) for row in rows] == [(2, False), (2, False), (10, True)]
    assert {(row["temperature"], row["max_tokens"]) for row in rows} == {(0.5, 10)}


def test_a_file_that_is_there_is_used_as_it_is(served: Path, tmp_path: Path) -> None:
    archive(served, TEACHER)
    mine = tmp_path / "kept" / "gpteacher_codegen.parquet"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    fetch(GPTEACHER, tmp_path / "kept", Words())
    assert mine.read_bytes() == b"mine"
    served.unlink()
    fetch(GPTEACHER, tmp_path / "kept", Words())  # all are there: nothing is opened


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_an_archive_that_breaks_off_leaves_nothing(served: Path, tmp_path: Path, share: float) -> None:
    filler = {f"a{number}.txt": random.Random(number).randbytes(4000).hex() for number in range(5)}
    content = archive(served, {**TEACHER, **filler}).read_bytes()
    served.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="teknium1/GPTeacher at 481075123c29 can't be fetched"):
        fetch(GPTEACHER, tmp_path / "kept", Words())
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_changed_byte_is_noticed(served: Path, tmp_path: Path) -> None:
    content = bytearray(archive(served, TEACHER).read_bytes())
    content[-6] ^= 1  # of the checksum
    served.write_bytes(content)
    with pytest.raises(DataError, match="can't be fetched"):
        fetch(GPTEACHER, tmp_path / "kept", Words())
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_failed_write_leaves_nothing(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(table: pa.Table, path: Path, **options: Any) -> None:
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    archive(served, TEACHER)
    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(KeyboardInterrupt):
        fetch(GPTEACHER, tmp_path / "kept", Words())
    assert list((tmp_path / "kept").iterdir()) == []


def test_without_a_network_the_error_says_what_to_put_where(served: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "just_eval.parquet").touch()
    with pytest.raises(DataError) as caught:
        fetch(PUBLIC_SETS, tmp_path / "kept", Words())
    said = str(caught.value)
    assert "\n" not in said
    assert "connect to the network, or put arena-hard-v0.1.parquet, zeroeval_gsm.parquet, " in said
    assert "just_eval.parquet" not in said
    assert f"into {tmp_path / 'kept'}, each with the columns {', '.join(REQUIRED)}" in said
    assert all(name in said for name in ("cl100k_base", *OPTIONAL))


# --- rows -------------------------------------------------------------------------------------------------------------


def put(public: PublicSet, cache: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> None:
    """The set's file in the cache."""
    path = path_of(public, cache / "public-lengths")
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [{"prompt_id": "x", "target_llm": "llama", "censored": False, "response_tokens": 9, **row} for row in rows]
    pq.write_table(pa.Table.from_pylist(whole, schema=schema), path)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataSet]:
    """Rows of the given sets; the others have none. Whatever would be fetched does not exist."""
    monkeypatch.setattr(public_fetch, "ARCHIVE", f"file://{tmp_path}/no-network/{{repository}}/{{commit}}")

    def call(rows: dict[str, list[dict[str, Any]]], **options: Any) -> DataSet:
        for public in PUBLIC_SETS:
            put(public, tmp_path, rows.get(public.name, []))
        options = {"cache_dir": tmp_path, "min_rows": 0, "num_workers": 1, **options}
        return build_rows(DataConfig(source="public-lengths", **options))

    return call


def test_rows_have_the_split_of_their_question_and_name_their_set(build: Any) -> None:
    questions = [f"How many birds are on {number} trees?" for number in range(200)]
    rows = {
        "just_eval": [{"prompt": question, "target_llm": llm} for question in questions for llm in ("a", "b", "b")],
        "zeroeval_gsm": [{"prompt": TEMPLATE.format(question), "response_tokens": 5} for question in questions],
    }
    data = build(rows)
    table = data.rows.table.to_pylist()
    assert {row["dataset"] for row in table} == {"just_eval", "zeroeval_gsm"}
    assert len(table) == sum(4 for question in questions if rule_of_the_splits(question) != "reserved") < 800
    for row in table:
        assert row["split"] == rule_of_the_splits(zeroeval_question(row["prompt"]))
        assert row["group"] == hashlib.sha1(splits.norm(zeroeval_question(row["prompt"])).encode()).hexdigest()
    assert data.report.num_rows["reserved"] == 800 - len(table)
    assert not data.report.counts  # equal rows may be chance: kept
    assert len({row["row_id"] for row in table}) == len(table)
    assert (data.report.data_format, data.report.label_tokenizer) == ("lengths", "cl100k_base")


def test_settings_and_caps_of_a_row(build: Any) -> None:
    row = {"prompt": "Which of them is it?", "temperature": 0.0, "max_tokens": 9}
    assert rule_of_the_splits(row["prompt"]) != "reserved"
    others = [{"response_tokens": 8}, {"response_tokens": 7, "censored": True}]
    table = build({"oasst_sampling": [row, *({**row, **other} for other in others)]}).rows.table
    assert table["censored"].to_pylist() == [True, False, True]
    assert table["temperature"].to_pylist() == [0.0] * 3
    assert table["max_tokens"].to_pylist() == [9] * 3


def test_evaluation_prompts_of_this_source_are_kept(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "is_evaluation_prompt", lambda prompt: True)
    prompts = [f"a prompt of a benchmark, number {number}" for number in range(20)]
    data = build({"just_eval": [{"prompt": prompt, "response_tokens": 9 + at} for at, prompt in enumerate(prompts)]})
    assert sum(data.report.num_rows.values()) == 20
    assert not data.report.counts


def test_rows_per_prompt_are_limited_across_llms(build: Any) -> None:
    prompts = [
        prompt for prompt in map("question {} of many".format, range(40)) if rule_of_the_splits(prompt) != "reserved"
    ]
    rows = {
        "oasst_sampling": [
            {"prompt": prompt, "target_llm": f"llm-{at}", "response_tokens": 9 + at}
            for prompt in prompts
            for at in range(30)
        ]
    }
    data = build(rows, max_rows_per_prompt=3)
    kept = [row["prompt"] for row in data.rows.table.to_pylist()]
    assert sorted(kept) == sorted(prompts * 3)
    assert len(set(data.rows.table["target_llm"].to_pylist())) > 20  # chosen by hash, not by place


def test_a_set_without_rows_is_a_warning(build: Any) -> None:
    warnings = build({"just_eval": [{"prompt": "p"}, {"prompt": "q"}]}).report.warnings
    assert len(warnings) == len(PUBLIC_SETS) - 1
    assert any(warning.startswith("skythought_math.parquet has no rows: no file of the set") for warning in warnings)


def test_rows_change_the_fingerprint_and_are_cached(build: Any) -> None:
    first, again = build({"just_eval": [{"prompt": "p"}]}), build({"just_eval": [{"prompt": "p"}]})
    other = build({"just_eval": [{"prompt": "q"}]})
    assert (first.report.from_cache, again.report.from_cache, other.report.from_cache) == (False, True, False)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_file_that_lacks_columns_is_named(build: Any, tmp_path: Path) -> None:
    build({"just_eval": [{"prompt": "p"}]})
    lacking = pa.schema([SCHEMA.field(name) for name in ("prompt", "target_llm", "censored")])
    put(SETS["zeroeval_gsm"], tmp_path, [{"prompt": "p"}], lacking)
    source = open_source(DataConfig(source="public-lengths", cache_dir=tmp_path))
    with pytest.raises(
        DataError, match=r"zeroeval_gsm\.parquet lacks the columns prompt_id, response_tokens; expected"
    ):
        source.identity()


def test_another_label_tokenizer_is_refused(build: Any) -> None:
    with pytest.raises(
        ConfigError, match="are counted in cl100k_base tokens, not in o200k_base; type --label-tokenizer"
    ):
        build({"just_eval": [{"prompt": "p"}]}, label_tokenizer="o200k_base")


def test_the_source_counts_with_cl100k_base(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bpe_openai")
    monkeypatch.setattr("mope.training.data.public.PUBLIC_SETS", tuple(GPTEACHER))
    archive(served, TEACHER)
    source = open_source(DataConfig(source="public-lengths", cache_dir=tmp_path, num_workers=1))
    assert isinstance(source, PublicLengths)
    assert source.identity() == source.identity()
    assert source.num_records() == 3
    (_, record), *_ = source.records(Problems())
    assert record["id"] == "gpteacher_codegen/0"
    assert source.reader is not None
    assert (record["prompt"], record["response_tokens"], record["dataset"]) == (
        "Sum up\n\n1 2", 3, "gpteacher_codegen",
    )  # fmt: skip


def test_a_folder_of_that_name_is_read_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "public-lengths").mkdir()
    (tmp_path / "public-lengths" / "mine.jsonl").write_text('{"prompt": "p", "response_tokens": 3}\n')
    assert not isinstance(open_source(DataConfig(source="public-lengths")), PublicLengths)


def test_a_dry_run_without_a_network_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_encoder: Path
) -> None:
    from mope import console as terminal

    monkeypatch.setattr(public_fetch, "ARCHIVE", f"file://{tmp_path}/no-network/{{repository}}/{{commit}}")
    terminal.console.cache_clear()  # its stderr is the one that was there when it was made
    arguments = ["--dry-run", "--cache-dir", tmp_path / "cache", "--encoder", tiny_encoder, "--accelerator", "cpu"]
    assert training_cli.main(["public-lengths", *map(str, arguments)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert f"into {tmp_path / 'cache' / 'public-lengths'}, each with the columns prompt_id" in line
