"""Each form of log in which people have their requests: the right labels, or a refusal that says why."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from log_forms import NUM, Row, write
from stream_forms import FORMS
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mope.errors import DataError
from mope.training.data.build import DataSet, build_rows
from mope.training.data.config import DataConfig


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Rows of a file, counted in words."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = tokenizers.Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))

    def call(path: Path, **options: Any) -> DataSet:
        return build_rows(
            DataConfig(
                source=str(path), label_tokenizer=str(folder / "tokenizer.json"), min_rows=0, num_workers=1,
                cache_dir=folder / "cache", **options,
            )
        )  # fmt: skip

    return call


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if not form.refused])
def test_a_log_gives_the_labels_that_the_engine_generated(name: str, build: Any, tmp_path: Path) -> None:
    form = FORMS[name]
    data = build(write(name, tmp_path))
    assert data.report.data_format == form.read_as
    assert dict(data.report.counts) == dict(form.counts)
    expected = {form.prompt(i): form.rows(i) for i in range(NUM)}
    assert sum(data.report.num_rows.values()) == sum(map(len, expected.values()))
    found = defaultdict(list)
    for row in data.rows.table.to_pylist():
        found[row["prompt"]].append(
            Row(row["response_tokens"], row["thought_tokens"], row["censored"], row["label_from"])
        )
        assert form.request.items() <= row.items()
    assert len(found) > 2  # the others are reserved
    assert {prompt: expected[prompt] for prompt in found} == found


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.refused])
def test_a_log_without_labels_is_refused_for_that_reason(name: str, build: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=FORMS[name].refused) as caught:
        build(write(name, tmp_path))
    assert "\n" not in str(caught.value)
