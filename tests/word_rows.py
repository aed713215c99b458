"""Rows of made-up records, their answers counted in words, so that tests can say what is right."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mope.training.data.build import DataSet, build_rows
from mope.training.data.config import DataConfig


class WordRows:
    """Reads files and records as training does.

    Args:
        folder: for the tokenizer, the cache and the file of records.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        tokenizer = tokenizers.Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
        tokenizer.save(str(folder / "tokenizer.json"))

    def of_file(self, path: Path, **options: Any) -> DataSet:
        """The rows of a file."""
        return build_rows(
            DataConfig(
                source=str(path), label_tokenizer=str(self._folder / "tokenizer.json"), min_rows=0, num_workers=1,
                cache_dir=self._folder / "cache", **options,
            )
        )  # fmt: skip

    def of_records(self, records: Iterable[Mapping[str, Any]], **options: Any) -> DataSet:
        """The rows of records, written as JSON Lines."""
        path = self._folder / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        return self.of_file(path, **options)
