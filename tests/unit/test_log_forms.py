"""Each form of log in which people have their requests: the right labels, or a refusal that says why."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from all_log_forms import FORMS
from log_forms import NUM, Row, write
from word_rows import WordRows

from mope.errors import DataError


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> WordRows:
    return WordRows(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if not form.refused])
def test_a_log_gives_the_labels_that_the_engine_generated(name: str, rows: WordRows, tmp_path: Path) -> None:
    form = FORMS[name]
    data = rows.of_file(write(FORMS[name], tmp_path))
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
def test_a_log_without_labels_is_refused_for_that_reason(name: str, rows: WordRows, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=FORMS[name].refused) as caught:
        rows.of_file(write(FORMS[name], tmp_path))
    assert "\n" not in str(caught.value)
