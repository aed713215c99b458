"""Local files as a source of records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mope.field_map import NO_FIELDS, FieldMap
from mope.log_records import canonical
from mope.record_files import UNREADABLE, Selection, location, read_file
from mope.record_folders import left_out_warning
from mope.record_tables import num_rows
from mope.training.data.formats import COLUMNS, MODERATION_COLUMN
from mope.training.data.problems import Problems

CHUNK_BYTES = 1 << 20
PARTS_OF_RECORDS = COLUMNS - {"dataset"}  # a list under one of these names is a part of one record

Located = tuple[str, Mapping[str, Any]]  # "file:line" and the record


@dataclass(frozen=True)
class Files:
    """Local files, in a fixed order.

    Attributes:
        paths: of the files.
        expected_records: how many records they hold, if that is known.
        fields: where the records hold what.
        left_out: names of files of other splits, which the report names.
    """

    paths: tuple[Path, ...]
    expected_records: int | None = None
    fields: FieldMap = NO_FIELDS
    left_out: tuple[str, ...] = ()

    recorded_in: ClassVar[str | None] = None
    reader: ClassVar[None] = None
    keeps_evaluation_prompts: ClassVar[bool] = False

    def identity(self) -> str:
        """A hash of names and contents."""
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                content = hashlib.sha256()
                while chunk := file.read(CHUNK_BYTES):
                    content.update(chunk)
            digest.update(f"{path.name}\0{content.hexdigest()}\n".encode())
        for name in self.left_out:  # the report names them
            digest.update(f"without {name}\n".encode())
        return digest.hexdigest()

    def num_records(self) -> int | None:
        """How many records there are, where the files say so."""
        if any(path.suffix.lower() != ".parquet" for path in self.paths):
            return self.expected_records
        return sum(num_rows(path) or 0 for path in self.paths)

    def records(self, problems: Problems, *, moderation: bool = False) -> Iterator[Located]:
        """Every record of every file; `moderation` also loads LMSYS's moderation flags."""
        if self.left_out:
            problems.warn(left_out_warning(self.left_out))
        source = self.paths[0].name if len(self.paths) == 1 else f"{len(self.paths):,} files"
        yield from self.fields.apply(self._raw(problems, moderation), problems, source)

    def _raw(self, problems: Problems, moderation: bool) -> Iterator[Located]:
        selection = Selection(
            lambda name: canonical(name) in COLUMNS or self.fields.needs(name),
            (MODERATION_COLUMN, "flagged") if moderation else None,
        )
        for path in self.paths:
            if path.stat().st_size == 0:
                problems.warn(f"{path.name} is empty")
                continue
            for entry in read_file(path, problems, parts=PARTS_OF_RECORDS, selection=selection):
                place = location(path.name, entry.place)
                if entry.record is None:
                    problems.add(UNREADABLE, place)
                else:
                    yield place, entry.record
