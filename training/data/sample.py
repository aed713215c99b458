"""Which part of a source a first look reads, so that it takes seconds: all of a small one, some rows of a large one.

Knows sizes of files and how to take records from several of them in turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import numpy as np
from rich import filesize

from mope.training.data.build import DataSet, build_rows, is_cached
from mope.training.data.config import DataConfig
from mope.training.data.problems import Problems
from mope.training.data.sources import Files, Hub, Located, open_source

ALL_ROWS = 0  # of `look`: read everything
SAMPLE_ROWS = 10_000  # of a large source
WHOLE_BYTES = 24_000_000  # files of at most this size are read whole
PACKED_FACTOR = 4  # of text in a compressed or parquet file, about
PACKED = (".gz", ".parquet", ".zst", ".bz2", ".xz")
HASH_BYTES = 2_000_000_000  # of files up to this size, the hash is made to find their rows in the cache
MAX_FILES = 100  # that a sample is taken from
BLOCK_RECORDS = 64  # taken from a file before the next one's turn: neighbours may be pieces of a conversation


@dataclass(frozen=True)
class Interleaved:
    """Records of several files in turn, so that the first rows come from all of them.

    Its identity is the files' names, sizes and times, not their content: nothing is read twice.
    """

    files: Files
    num_rows: int

    recorded_in: ClassVar[str | None] = None
    reader: ClassVar[None] = None
    keeps_evaluation_prompts: ClassVar[bool] = False

    def identity(self) -> str:
        """What changes with the files, short of a change that keeps size and time."""
        digest = hashlib.sha256(f"sample of {self.num_rows}\n".encode())
        for path in self.files.paths:
            stat = path.stat()
            digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def num_records(self) -> int | None:
        """Not known: reading ends with a number of rows."""
        return None

    def records(self, problems: Problems, *, moderation: bool = False) -> Iterator[Located]:
        """Blocks of records, one of each file in turn."""
        paths = self.files.paths
        chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MAX_FILES)).astype(int))
        block = max(1, min(BLOCK_RECORDS, self.num_rows // len(chosen)))
        streams = [
            replace(self.files, paths=(paths[number],)).records(problems, moderation=moderation) for number in chosen
        ]
        while streams:
            left = []
            for stream in streams:
                taken = list(islice(stream, block))
                yield from taken
                if len(taken) == block:
                    left.append(stream)
            streams = left


def look(config: DataConfig, num_rows: int | None = None) -> tuple[DataSet, str | None]:
    """Rows for a first look at a source, few or unlearnable ones, too.

    Rows that are in the cache are taken from there, all of them, unless `num_rows` asks for fewer.

    Args:
        config: source and filters.
        num_rows: rows to read; `ALL_ROWS` for all; None for all of a small source and `SAMPLE_ROWS` of a large one.

    Returns:
        The rows, and what part of the source was read, in words (None: all that `config` names).

    Raises:
        UserError: as `build_rows` raises.
    """
    source = open_source(config)
    size = _num_bytes(source) if isinstance(source, Files) else 0
    large = isinstance(source, Hub) or _weight(source) > WHOLE_BYTES
    if num_rows is None and large and not (size <= HASH_BYTES and is_cached(config)):
        num_rows = SAMPLE_ROWS
    if not num_rows or (config.max_rows is not None and config.max_rows <= num_rows):
        return build_rows(config, learnable=False), None
    limited = config.model_copy(update={"max_rows": num_rows})
    sampled = Interleaved(source, num_rows) if isinstance(source, Files) else None
    data = build_rows(limited, source=sampled, learnable=False)
    if sum(data.report.labels.values()) < num_rows:  # the source has no more
        return data, None
    of = ""
    if isinstance(source, Files):
        num_files = len(source.paths)
        of = f" of {num_files:,} files" if num_files > 1 else " of the file"
        of += f" ({filesize.decimal(size)}), from {'their beginnings' if num_files > 1 else 'its beginning'} alone"
    return data, f"about the first {num_rows:,} rows{of}: what comes later may differ; --rows all reads everything"


def _num_bytes(source: Files) -> int:
    return sum(path.stat().st_size for path in source.paths)


def _weight(source: object) -> int:
    """About how many bytes of text there are to read; 0 for what is no local file."""
    if not isinstance(source, Files):
        return 0
    return sum(path.stat().st_size * (PACKED_FACTOR if path.name.endswith(PACKED) else 1) for path in source.paths)
