"""The source `public-lengths`: answer lengths of many LLMs to public prompts, from the cache or fetched once.

Turns the rows of each set's parquet file into records of the format `lengths`, with the group that decides their
split. Knows files and groups; the sets are listed in `public_sets`, fetched by `public_fetch`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mope.errors import DataError
from mope.record_tables import open_parquet
from mope.training.data import splits
from mope.training.data.problems import Problems
from mope.training.data.public_fetch import OPTIONAL, REQUIRED, fetch, path_of
from mope.training.data.public_sets import PUBLIC_SETS, PublicSet
from mope.training.data.sources import Files, Located
from mope.training.data.tokens import load_counter

LABEL_TOKENIZER = "cl100k_base"


@dataclass(frozen=True)
class PublicLengths:
    """The public sets, each a parquet file in `folder`.

    Attributes:
        folder: where the files lie; what is missing is fetched into it by `identity`.
        cache_dir: where the tokenizer's vocabulary is kept.
        num_workers: threads that count tokens.
    """

    folder: Path
    cache_dir: Path
    num_workers: int = 1

    recorded_in: ClassVar[str | None] = LABEL_TOKENIZER
    keeps_evaluation_prompts: ClassVar[bool] = True  # its rows are such prompts; the split of each keeps it apart

    def identity(self) -> str:
        """A hash of the sets' names and rows. Sets that are not there are fetched first.

        Raises:
            DataError: a set can't be fetched, or its file lacks columns.
        """
        counter = load_counter(LABEL_TOKENIZER, num_workers=self.num_workers, cache_dir=self.cache_dir)
        fetch(PUBLIC_SETS, self.folder, counter)
        for public in PUBLIC_SETS:
            _check_columns(path_of(public, self.folder))
        return self._files().identity()

    def num_records(self) -> int | None:
        """Rows of all files."""
        return self._files().num_records()

    def records(self, problems: Problems, *, moderation: bool = False) -> Iterator[Located]:
        """Every row of every set, with an id, its set as `dataset`, and the group of its prompt."""
        for public in PUBLIC_SETS:
            number = 0
            groups: dict[str, str] = {}
            for location, row in Files((path_of(public, self.folder),)).records(problems):
                record = {name: row.get(name) for name in (*REQUIRED, *OPTIONAL)}
                record |= {"id": f"{public.name}/{number}", "dataset": public.name}
                prompt = record["prompt"]
                if isinstance(prompt, str):
                    if prompt not in groups:
                        groups[prompt] = group_of(public, prompt)
                    record["conversation_id"] = groups[prompt]
                yield location, record
                number += 1
            if not number:
                problems.warn(
                    f"{path_of(public, self.folder).name} has no rows: no file of the set was in the archive of "
                    f"{public.repository} at {public.commit[:12]}"
                )

    def _files(self) -> Files:
        return Files(tuple(path_of(public, self.folder) for public in PUBLIC_SETS))


def group_of(public: PublicSet, prompt: str) -> str:
    """The group that decides a prompt's split: the sha1 of its question's first 400 normalised characters."""
    key = splits.norm(public.question(prompt))[: splits.PROMPT_KEY_CHARS]
    return hashlib.sha1(key.encode("utf-8", "replace")).hexdigest()


def _check_columns(path: Path) -> None:
    with open_parquet(path) as file:
        lacking = [name for name in REQUIRED if name not in file.schema_arrow.names]
    if lacking:
        raise DataError(
            f"{path} lacks the columns {', '.join(lacking)}; expected {', '.join(REQUIRED)} and, where known, "
            f"{', '.join(OPTIONAL)}: mend the file, or delete it to have the set fetched"
        )
