"""Names of target LLMs: spellings, parts, relatives, and the table that finds the nearest known one.

`tests/data/llm_names.tsv` and `engine_llm_names.tsv` hold a reading of each name that a person has checked. To add
names, append lines with the name alone; then write the readings with the command below and check them by eye:

    python tests/unit/test_target_llm.py --write
"""

import csv
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope import llm_names
from mope.target_llm import MAX_SIZE, LlmTable, Reading, canonical, describe, known_names

TESTS = Path(__file__).parents[1]
GOLDENS = (TESTS / "data/llm_names.tsv", TESTS / "data/engine_llm_names.tsv")
PREDICTORS = TESTS.parent / "mope/predictors"
COLUMNS = (
    "organisation", "family", "version", "size", "variant", "date", "thinking", "effort", "reasoning", "active_size",
    "quantisation",
)  # fmt: skip
UPDATE = "if the new reading is right, run: python tests/unit/test_target_llm.py --write"


def cells(name):
    """What a line of the goldens says of a name."""
    found = describe(name)
    values = [found.name, *(getattr(found, column) for column in COLUMNS)]
    return ["" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in values]


def lines(path):
    return list(csv.reader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def write():
    """Write the goldens anew, with the names that they have."""
    for path in GOLDENS:
        names = list(dict.fromkeys(row[0] for row in lines(path)[1:]))
        table = [["name", "canonical", *COLUMNS], *([name, *cells(name)] for name in names)]
        path.write_text("".join("\t".join(row) + "\n" for row in table), encoding="utf-8")


NAMES = [row[0] for path in GOLDENS for row in lines(path)[1:]]


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_names_are_read_as_a_person_reads_them(path):
    header, *rows = lines(path)
    assert header == ["name", "canonical", *COLUMNS]
    assert len(rows) >= 60
    wrong = [
        f"{row[0]}: {column} is {found!r}, expected {expected!r}"
        for row in rows
        for column, expected, found in zip(header[1:], row[1:], cells(row[0]), strict=True)
        if found != expected
    ]
    assert not wrong, "\n".join([*wrong[:20], f"{len(wrong)} differences; {UPDATE}"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("meta-llama/Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct@hyperbolic", "llama_3.1_8b_instruct",
          "llama3.1:8b-instruct-q4_K_M", "accounts/fireworks/models/llama-v3p1-8b-instruct", "llama-3.1-8b-inst",
          "meta.llama3-1-8b-instruct-v1:0", "Llama 3.1 8B Instruct", "meta-llama/Llama-3.1-8B-Instruct-Turbo"),
         "llama-3.1-8b-instruct"),
        (("Llama-2-70B-chat-GPTQ", "TheBloke/Llama-2-70B-Chat-AWQ", "llama-2-70b-chat-int4", "llama2_chat_70b"),
         "llama-2-70b-chat"),
        (("Llama3", "llama-3", "Meta-Llama-3", "meta-llama/Meta-Llama-3"), "llama-3"),
        (("gpt-4o", "openai/gpt-4o", " GPT-4o ", "gpt-4o_chat", "azure/gpt-4o"), "gpt-4o"),
        (("gpt4_1106_preview", "gpt-4-1106-preview"), "gpt-4-1106-preview"),
        (("gpt35_turbo", "gpt-35-turbo", "gpt3.5-turbo", "gpt-3.5-turbo"), "gpt-3.5-turbo"),
        (("Sky-T1-32B/checkpoint-105", "Sky-T1-32B/step_7", "runs/Sky-T1-32B"), "sky-t1-32b"),
        (("us.anthropic.claude-3-haiku", "claude-3-haiku", "claude-haiku-3"), "claude-3-haiku"),
        (("claude-3-5-sonnet", "claude-3.5-sonnet", "claude-sonnet-3.5", "claude-3.5-sonnet_aws"), "claude-3.5-sonnet"),
        (("claude-3-5-sonnet-20241022", "us.anthropic.claude-3-5-sonnet-20241022-v2:0", "claude-3-5-sonnet@20241022"),
         "claude-3.5-sonnet-2024-10-22"),
        (("claude-opus-4", "claude-4-opus", "anthropic/claude-opus-4@reasoning=default"), "claude-4-opus"),
        (("gemini-pro-1.5", "gemini-1.5-pro", "google/gemini-1.5-pro"), "gemini-1.5-pro"),
        (("Qwen/Qwen3-8B", "/models/Qwen3-8B", "Qwen__Qwen3-8B", "Qwen3-8B-Q4_K_M.gguf", "qwen3:8b", "qwen-3-8b-fp8",
          "~/hub/models--Qwen--Qwen3-8B/snapshots/0123456789abcdef0123456789abcdef01234567"), "qwen-3-8b"),
        (("Qwen3-8B (thinking)", "qwen3-8b-think", "qwen3-8b:thinking"), "qwen-3-8b-thinking"),
        (("deepseek-chat-v3-0324", "DeepSeek-V3-0324", "deepseek/deepseek-chat-v3-0324:free"), "deepseek-v3-0324"),
        (("us.deepseek.r1-v1:0", "DeepSeek-R1", "deepseek/deepseek-r1:free"), "deepseek-r1"),
    ],
)  # fmt: skip
def test_spellings_of_a_name_are_one(names, expected):
    assert {name: canonical(name) for name in names} == dict.fromkeys(names, expected)


def test_what_may_change_lengths_stays_in_the_name():
    for names in (
        ("o3-mini", "o3-mini-high", "o3-mini-low"),
        ("qwen3-30b-a3b", "qwen3-30b-a3b-think", "qwen3-30b-a3b-nothink", "qwen3-30b-a3b-thinking-2507"),
        ("gpt-4", "gpt-4-turbo", "gpt-4o", "gpt-4.1", "gpt-4-0613"),
        ("gemma-3-4b-it", "gemma-3-4b-pt", "gemma-3-27b-it", "gemma-2-27b-it"),
        ("claude-3.7-sonnet", "claude-3.7-sonnet-20250219", "claude-3.7-sonnet:thinking"),
    ):
        assert len({canonical(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "size", "reasoning"),
    [
        ("Llama-3.1-405B-Instruct", 405, False),
        ("Mixtral-8x7B-Instruct-v0.1", 56, False),
        ("SmolLM2-135M", 0.135, False),
        ("Qwen2.5-0.5B", 0.5, False),
        ("bloomz-7b1", 7.1, False),
        ("8x7B", 56, False),  # a size alone
        ("ring-1t", 1000, True),
        ("Infinity-Instruct-3M-0613-Llama3-70B", 70, False),  # 3M is a number of rows
        ("Llama-4-Scout-17B-16E", None, False),  # 17B of how many
        ("gpt-4o-2024-08-06", None, False),
        ("o1-mini-2024-09-12", None, True),
        ("DeepSeek-R1-Distill-Qwen-7B", 7, True),
        ("QwQ-32B-Preview", 32, True),
        ("Phi-3-mini-128k-instruct", None, False),
        ("go1-lite", None, False),  # not o1
        ("x-99999b", None, False),  # no such size
    ],
)
def test_size_and_kind_are_read_from_the_name(name, size, reasoning):
    found = describe(name)
    assert found.size == (None if size is None else pytest.approx(size))
    assert found.reasoning is reasoning


@pytest.mark.parametrize(
    ("name", "thinking", "effort"),
    [
        ("qwen3-8b", None, None),
        ("claude-3.7-sonnet:thinking", True, None),
        ("claude-3.7-thinking-4k", True, "4k"),
        ("gemini-2.5-flash-preview(thinking)", True, None),
        ("ll3.3-nemotron-49b-v1-thk", True, None),
        ("qwen3-8b-nothinking", False, None),
        ("grok-4-fast-non-reasoning", False, None),
        ("gpt-5.1@reasoning=none", False, None),
        ("gpt-5_medium", True, "medium"),
        ("x-ai/grok-4.20-beta@reasoning=xhigh", True, "xhigh"),
        ("gpt-5-minimal", True, "minimal"),
        ("deepseek-reasoner", True, None),
        ("glm-z1-32b", True, None),
        ("gpt-oss-20b", True, None),
        ("mistral-medium", None, None),  # a size
        ("mistral-medium-3", None, None),
        ("phi-3-medium-4k-instruct", None, None),
        ("gpt-4o-mini", None, None),
        ("qwen-max", None, None),
    ],
)
def test_thinking_and_effort_are_read_from_the_name(name, thinking, effort):
    found = describe(name)
    assert (found.thinking, found.effort) == (thinking, effort)


@pytest.mark.parametrize(
    ("name", "lineage"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct llama-3.1-8b llama-3.1 llama-3 llama"),
        ("gpt-4o-2024-08-06", "gpt-4o-2024-08-06 gpt-4o-2024 gpt-4o gpt-4 gpt"),
        ("gpt-5-mini_medium", "gpt-5-mini-medium gpt-5-mini gpt-5 gpt"),
        ("gpt-4-0613_concise", "gpt-4-0613-concise gpt-4-0613 gpt-4 gpt"),
        ("o4-mini-high", "o4-mini-high o4-mini o4 o"),
        ("llama-3.1-nemotron-70b-instruct", "llama-3.1-nemotron-70b-instruct llama-3.1-nemotron-70b llama-3.1-nemotron "
         "llama-3.1-70b-instruct llama-3.1-70b llama-3.1 llama-3 llama"),
        ("hermes-3-llama-3.1-70b", "hermes-3-llama-3.1-70b hermes-3-llama-3.1 hermes-3-llama-3 hermes-3-llama hermes-3 "
         "hermes llama-3.1-70b llama-3.1 llama-3 llama"),
        ("deepseek-r1-distill-qwen-32b", "deepseek-r1-distill-qwen-32b deepseek-r1-distill-qwen deepseek-r1-distill "
         "deepseek-r1 qwen-32b qwen deepseek"),
    ],
)  # fmt: skip
def test_a_lineage_goes_from_the_name_to_its_family(name, lineage):
    assert " ".join(describe(name).lineage) == lineage


def test_no_name_has_no_family():
    for nothing in (None, "", "  ", "@x", "/"):
        assert describe(nothing) == describe(None)
        assert describe(nothing).family is None


awkward = st.one_of(
    st.text(max_size=300),
    st.text(st.characters(), max_size=300),  # with lone surrogates
    st.text("0123456789", max_size=300),
    st.text("-_./:@ bkmqvx013\0", max_size=300),
    st.sampled_from(["\ud800", "\0", "a" * 10_000, "-1" * 5_000, "9" * 10_000, "/x" * 5_000, "llama3" * 2_000]),
)


@given(awkward)
def test_any_text_is_a_name_or_none(name):
    found = describe(name)
    assert found.lineage[:1] == ((found.name,) if found.name else ())
    assert found.lineage[-1:] == ((found.family,) if found.name else ())
    assert len(set(found.lineage)) == len(found.lineage)
    assert found.size is None or 0 < found.size <= MAX_SIZE
    assert found.active_size is None or 0 < found.active_size <= MAX_SIZE
    assert describe(found.name).name == canonical(found.name)


composed = st.builds(
    lambda family, version, tier, size, variant, date, mark: "-".join(
        filter(None, (family, version, tier, size, variant, date, mark))
    ),
    st.sampled_from(["llama", "Meta-Llama", "qwen", "gpt", "Claude", "gemini", "gemma", "mistral", "my", "deepseek"]),
    st.sampled_from(["", "2", "3.1", "v2", "4o", "1.5"]),
    st.sampled_from(["", "mini", "pro", "sonnet", "coder", "nemotron", "tuned"]),
    st.sampled_from(["", "8b", "70B", "8x7b", "235B-A22B", "350m"]),
    st.sampled_from(["", "instruct", "it", "chat", "base"]),
    st.sampled_from(["", "2024-08-06", "20241022", "0324", "exp-1206", "preview", "002"]),
    st.sampled_from(["", "thinking", "nothink", "high", "thinking-4k"]),
)


@given(composed | st.sampled_from(NAMES))
def test_a_canonical_name_is_its_own(name):
    found, again = describe(name), describe(describe(name).name)
    assert again.name == found.name
    assert again.lineage == found.lineage
    assert (again.family, again.version, again.size, again.date) == (
        found.family, found.version, found.size, found.date,
    )  # fmt: skip


@given(composed, st.data())
def test_spelling_provider_and_quantisation_change_nothing(name, data):
    expected = canonical(name)
    change = data.draw(
        st.sampled_from(
            [
                str.upper,
                lambda text: text.replace("-", "_"),
                lambda text: text.replace("-", " "),
                lambda text: f"somebody/{text}",
                lambda text: f"meta-llama__{text}",
                lambda text: f"/models/{text}",
                lambda text: f"hub/models--somebody--{text}/snapshots/{'0af1' * 10}",
                lambda text: f"{text}/checkpoint-500",
                lambda text: f"{text}:free",
                lambda text: f"{text}@together",
                lambda text: f"{text}.Q4_K_M.gguf",
                *(lambda text, q=q: f"{text}-{q}" for q in ("AWQ", "GPTQ-Int4", "FP8-Dynamic", "w4a16", "bnb-4bit")),
            ]
        )
    )
    assert canonical(change(name)) == expected


def test_a_name_that_a_spelling_mends_is_noticed_first():
    for name in NAMES:
        text = name.lower().replace("_", "-")
        if any(pattern.search(text) for pattern, _ in llm_names.SPELLINGS):
            assert llm_names.MISSPELT.search(text), name


TABLE = LlmTable(("gpt-3.5-turbo", "gpt-4", "gpt-4o-2024-08-06", "llama-3", "llama-3-70b", "llama-3-8b", "qwen2-7b"))


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("GPT-4", None, "gpt-4"),
        ("meta-llama/Llama-3-8B-Instruct", None, "llama-3-8b"),  # nearest: the name without what is not known
        ("llama-3-405b", None, "llama-3"),
        ("gpt-4o", None, "gpt-4o-2024-08-06"),  # another word for the only one of that beginning
        ("gpt-4o-2024-11-20", None, "gpt-4o-2024-08-06"),
        ("gpt-5", None, "gpt-4o-2024-08-06"),  # the version before
        ("qwen", None, "qwen2-7b"),
        ("qwen2.5-7b-instruct", None, "qwen2-7b"),
        ("Qwen__Qwen3-8B-FP8", None, "qwen2-7b"),
        ("llama-4", None, "llama-3"),
        ("llama-3.3-70b-instruct", None, "llama-3-70b"),  # same size
        ("hermes-3-llama-3.1-8b", None, "llama-3-8b"),  # what was tuned
        ("phi-4", None, ""),
        ("my-finetune", None, ""),
        ("my-finetune", "llama-3", "llama-3"),
        (None, None, ""),
        (None, "qwen2", "qwen2-7b"),
    ],
)
def test_the_nearest_known_relative_is_found(name, family, expected):
    assert ("", *TABLE.names)[TABLE.find(name, family)] == expected


OLDER = LlmTable(
    ("claude-3-5-sonnet-20241022", "claude-3-opus-20240229", "gemini-1.5-flash", "gemini-1.5-pro", "llama-2-70b-chat",
     "llama-3-70b-instruct", "llama-3.1", "llama-3.1-70b-instruct", "o1-mini", "o1-preview", "qwen", "gpt-4o-mini",
     "gpt-4o", "mistral-7b-instruct-v0.1", "mistral-7b-instruct-v0.3")
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.3-70b-instruct", "llama-3.1-70b-instruct"),
        ("llama-3.2-3b-instruct", "llama-3.1"),
        ("llama-1-70b", "llama-2-70b-chat"),  # nothing older
        ("Qwen3-8B", "qwen"),
        ("claude-sonnet-4.5", "claude-3-5-sonnet-20241022"),
        ("claude-opus-4", "claude-3-opus-20240229"),
        ("gemini-2.5-pro-preview-05-06", "gemini-1.5-pro"),
        ("gemini-3-flash", "gemini-1.5-flash"),
        ("o3-mini-high", "o1-mini"),
        ("gpt-5-mini", "gpt-4o-mini"),
        ("gpt-4.1", "gpt-4o"),
        ("mistral-7b-instruct-v0.2", "mistral-7b-instruct-v0.1"),
    ],
)
def test_another_version_of_the_same_size_comes_before_the_family(name, expected):
    found = OLDER.read(name)
    assert found == Reading(OLDER.names.index(expected) + 1, "relative", expected)


def test_a_reading_says_how_an_llm_was_found():
    assert TABLE.read("openai/GPT-4") == Reading(2, "exact", "gpt-4")
    assert TABLE.read("gpt-4-0613") == Reading(2, "relative", "gpt-4")
    assert TABLE.read("phi-4") == Reading(0, "unknown", None)
    assert TABLE.read("phi-4", "gpt-4") == Reading(2, "relative", "gpt-4")
    for name in NAMES:
        found = TABLE.read(name)
        assert found.index == TABLE.find(name)
        assert (found.how == "exact") == TABLE.knows(name)
        assert (found.how == "unknown") == (found.index == 0) == (found.name is None)
        assert found.name is None or found.name == TABLE.names[found.index - 1]


@pytest.mark.parametrize("predictor", sorted(path.parent.name for path in PREDICTORS.glob("*/config.json")))
def test_released_predictors_keep_their_indices(predictor):
    stored = json.loads((PREDICTORS / predictor / "config.json").read_text(encoding="utf-8"))["target_llms"]
    table = LlmTable(stored)
    assert [table.read(name) for name in stored] == [
        Reading(index, "exact", name) for index, name in enumerate(stored, start=1)
    ]


def test_old_spellings_in_a_table_are_found_by_all_spellings():
    table = LlmTable(("llama-3.1-405b-inst", "llama-3.1-405b-instruct", "claude-3-5-sonnet", "qwen2.5-7b-instruct"))
    assert table.find("Llama-3.1-405B-Inst-fp8") == 1
    assert table.find("meta-llama/Llama-3.1-405B-Instruct-FP8") == 2
    assert table.find("anthropic/claude-3.5-sonnet") == table.find("claude-sonnet-3.5") == 3
    assert table.find("qwen-2.5-7b-instruct") == table.find("Qwen__Qwen2.5-7B-Instruct") == 4


def test_a_relative_is_not_the_llm_itself():
    assert TABLE.knows("gpt-4")
    assert TABLE.knows("openai/gpt-4o")
    assert not TABLE.knows("gpt-4o-2024-11-20")
    assert not TABLE.knows("llama-3-8b-instruct")
    assert not TABLE.knows("llama-3.3-70b-instruct")
    assert not TABLE.knows("qwen")
    assert not TABLE.knows(None)


def test_families_are_words_that_find_something():
    assert TABLE.families() == ("gpt", "llama", "qwen")
    assert all(TABLE.find(family) for family in TABLE.families())
    assert LlmTable(()).families() == ()


def test_parents_are_relatives_in_the_table():
    parents = dict(zip(TABLE.names, TABLE.parents()[1:], strict=True))
    assert TABLE.parents()[0] == 0
    assert [TABLE.names[parents[name] - 1] for name in ("llama-3-8b", "llama-3-70b")] == ["llama-3"] * 2
    assert parents["gpt-4"] == parents["llama-3"] == 0
    assert parents["gpt-4o-2024-08-06"] == TABLE.find("gpt-4")
    assert LlmTable(()).parents() == [0]


def test_llms_with_rows_and_relatives_of_several_are_known():
    counts = {
        "Llama-3-8B-Instruct": 60,
        "meta-llama/llama-3-8b-instruct": 10,
        "Llama-3-70B-Instruct": 40,
        "gpt-4": 99,
        "": 500,
    }
    assert known_names(counts, 50) == ("gpt-4", "llama-3", "llama-3-8b-instruct")
    assert known_names(counts, 200) == ()
    assert known_names({}, 1) == ()


names = st.from_regex(r"(llama|qwen|gpt)-[1-3](\.[12])?(-(8|70)b)?(-chat|-it)?", fullmatch=True)


@given(st.dictionaries(names | st.sampled_from(NAMES), st.integers(1, 100), max_size=12), st.integers(1, 150))
def test_a_known_name_finds_itself_and_an_unknown_one_a_relative(counts, min_rows):
    table = LlmTable(known_names(counts, min_rows))
    rows = Counter()
    for name, count in counts.items():
        for start in describe(name).lineage:
            rows[start] += count
    for position, name in enumerate(table.names, start=1):
        assert table.find(name) == position
        assert rows[name] >= min_rows
    for name, count in counts.items():
        assert table.find(name) or count < min_rows
    parents = table.parents()
    for index, parent in enumerate(parents):
        assert parent == 0 or table.names[parent - 1] in describe(table.names[index - 1]).lineage[1:]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/unit/test_target_llm.py --write")
    write()
