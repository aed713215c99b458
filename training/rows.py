"""The rows of a run: one data set that is reported, and others that are only learned from beside it.

Knows data sets and how they are joined; sources, formats and splits are elsewhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mope.training.config import TrainConfig
from mope.training.data.build import DataSet, build_rows, resolve_label_tokenizer
from mope.training.data.table import RowTable


@dataclass(frozen=True)
class RunRows:
    """What a run learns from, and what it is tested on.

    Attributes:
        main: the data set whose test rows are reported.
        also: further ones; their test rows are reported apart.
    """

    main: DataSet
    also: tuple[DataSet, ...] = ()

    @classmethod
    def read(cls, config: TrainConfig, tokenizer_json: str, folder: Path) -> RunRows:
        """Read all data of a run.

        Args:
            config: names the sources.
            tokenizer_json: the encoder's tokenizer, which may count the answers, too.
            folder: for its file.
        """
        sources = [config.data, *(also.model_copy(update={"min_rows": 0}) for also in config.also)]
        main, *also = (build_rows(resolve_label_tokenizer(data, tokenizer_json, folder)) for data in sources)
        return cls(main, tuple(also))

    @property
    def fingerprint(self) -> str:
        """sha256 of all sources and of every option that shapes the rows."""
        if not self.also:
            return self.main.fingerprint
        return hashlib.sha256("\n".join(data.fingerprint for data in (self.main, *self.also)).encode()).hexdigest()

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each source."""
        return {data.report.source: data.fingerprint for data in (self.main, *self.also)}

    @property
    def table(self) -> RowTable:
        """Training and validation rows of all sources, and test rows of the main one."""
        others = [data.rows.split(name).table for data in self.also for name in ("train", "validation")]
        return RowTable(pa.concat_tables([self.main.rows.table, *others])) if others else self.main.rows

    def sources_of(self, table: RowTable) -> list[str]:
        """The name of the data set that each row is from, as in `fingerprints`."""
        home = {
            row_id: data.report.source for data in (self.main, *self.also) for row_id in data.rows.strings("row_id")
        }
        return [home[row_id] for row_id in table.strings("row_id")]

    def lines(self) -> list[str]:
        """What was read, in lines for a person."""
        return [line for data in (self.main, *self.also) for line in data.report.lines()]
