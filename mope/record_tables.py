"""Records from files of columns: parquet, and Arrow as `datasets` and Feather write it. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mope.errors import DataError
from mope.extras import require
from mope.record_files import Entry, Selection

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 512
_ARROW_FILE, _FEATHER_1 = b"ARROW1", b"FEA1"


def read_table(path: Path, selection: Selection | None) -> Iterator[Entry]:
    """Every row of a parquet, Arrow or Feather file.

    Args:
        path: of the file.
        selection: the columns to load; all if not given, or if the file has none of them.

    Raises:
        DataError: the file can't be read, or is damaged.
        MissingExtraError: pyarrow is not installed.
    """
    arrow = _arrow(path)
    row = 0
    try:
        for batch in _parquet(path, selection) if path.suffix.lower() == ".parquet" else _arrow_file(path, selection):
            batch.validate(full=True)  # a damaged one could crash the process
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for record in batch.slice(start, BATCH_ROWS).to_pylist():
                    yield Entry(f"row {row}", record)
                    row += 1
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} is damaged after row {row}: {_line(error)}") from error


def num_rows(path: Path) -> int | None:
    """How many rows a file has, where it says so."""
    if path.suffix.lower() == ".parquet":
        with open_parquet(path) as file:
            return int(file.metadata.num_rows)
    return None


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file.

    Raises:
        DataError: it is none, or can't be read.
        MissingExtraError: pyarrow is not installed.
    """
    arrow = _arrow(path)
    parquet = require("pyarrow.parquet", path.name, "files")
    try:
        return parquet.ParquetFile(path, pre_buffer=False)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} can't be read as parquet: {_line(error)}") from error


def _arrow(path: Path) -> Any:
    return require("pyarrow", path.name, "files")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _parquet(path: Path, selection: Selection | None) -> Iterator[pa.RecordBatch]:
    with open_parquet(path) as file:
        columns = _selected(file.schema_arrow.names, selection)
        if columns and selection and selection.pruned:
            column, leaf = selection.pruned
            leaves = (file.schema.column(position).path for position in range(len(file.schema)))
            columns += [path for path in leaves if path.startswith(column) and path.endswith(leaf)]
        yield from file.iter_batches(BATCH_ROWS, columns=columns or None, use_threads=False)


def _arrow_file(path: Path, selection: Selection | None) -> Iterator[pa.RecordBatch]:
    """Batches of a file that holds a stream (as `datasets` saves them) or is one of Arrow's files (Feather)."""
    arrow = _arrow(path)
    with path.open("rb") as file:
        mark = file.read(6)
    if mark.startswith(_FEATHER_1):
        raise DataError(f"{path.name} is Feather of version 1; write it anew with pyarrow.feather.write_feather")
    with arrow.memory_map(str(path)) as source:
        try:
            reader = arrow.ipc.open_file(source) if mark == _ARROW_FILE else arrow.ipc.open_stream(source)
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path.name} can't be read as Arrow: {_line(error)}") from error
        names = _selected(reader.schema.names, selection)
        if names and selection and selection.pruned and selection.pruned[0] in reader.schema.names:
            names = list(dict.fromkeys([*names, selection.pruned[0]]))
        batches = (
            (reader.get_batch(number) for number in range(reader.num_record_batches)) if mark == _ARROW_FILE else reader
        )
        for batch in batches:
            yield batch.select(names) if names else batch


def _selected(names: list[str], selection: Selection | None) -> list[str]:
    return [name for name in names if selection.wanted(name)] if selection else []
