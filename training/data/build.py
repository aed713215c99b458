"""From a source to rows in Arrow files: stream, count tokens, join, split, keep in a cache.

Nothing here grows with the texts: rows go to disk as they come, and what joins conversations is kept as 64-bit
hashes in arrays. Knows the order of the work; formats, files, tokenizers and the split rule are elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from mope.console import console as shared_console
from mope.console import progress
from mope.errors import ConfigError, DataError
from mope.field_map import FieldMap
from mope.training.data import problems as reasons
from mope.training.data.batches import opened
from mope.training.data.config import DataConfig
from mope.training.data.formats import Chat, Unusable, detect_format, normaliser, unknown_format
from mope.training.data.problems import DataReport, Problems
from mope.training.data.sources import Located, Source, open_source
from mope.training.data.staging import Staging
from mope.training.data.table import RowTable
from mope.training.data.tokens import TokenCounter, load_counter

ROWS_VERSION = 11  # part of the fingerprint: raise it whenever the same source would give other rows
DETECTION_RECORDS = 50
ADVANCE_RECORDS = 256  # between two updates of the progress bar
BATCH_CHARS = 4_000_000  # answer text that is counted at once
NOT_IN_FINGERPRINT = {"source", "label_tokenizer", "min_rows", "num_workers", "cache_dir"}


@dataclass(frozen=True)
class DataSet:
    """Rows to train and test on, and how they came about.

    Attributes:
        rows: train, validation and test rows in the order of the source; never reserved ones.
        report: what was read, kept and dropped.
        fingerprint: sha256 of the source's content and of every option that shapes the rows.
    """

    rows: RowTable
    report: DataReport
    fingerprint: str


def resolve_label_tokenizer(data: DataConfig, tokenizer_json: str, folder: Path) -> DataConfig:
    """Data settings whose tokenizer `encoder` has become a file with the given content in `folder`."""
    if data.label_tokenizer != "encoder":
        return data
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(tokenizer_json, encoding="utf-8")
    return data.model_copy(update={"label_tokenizer": str(path)})


def build_rows(
    config: DataConfig, *, console: Console | None = None, source: Source | None = None, learnable: bool = True
) -> DataSet:
    """Read a source into leak-safe rows, or take them from the cache.

    Args:
        config: source, filters, tokenizer and limits.
        console: where to say that the cache was used; stderr if not given.
        source: what to read in place of `config.source`, such as a sample of it.
        learnable: refuse too few training rows, and rows that all have one length.

    Returns:
        The rows, memory-mapped from the cache folder, with their report.

    Raises:
        DataError: a source that can't be read, too few training rows, or nothing to learn from them.
        ConfigError: a tokenizer that is not known, can't be had, or is not the one of the source's lengths.
        MissingExtraError: a package that the source needs is not installed.
    """
    out = console or shared_console()
    if config.label_tokenizer == "encoder":
        raise ConfigError("label_tokenizer 'encoder' names no file here; give the path of the encoder's tokenizer.json")
    counter = load_counter(config.label_tokenizer, num_workers=config.num_workers, cache_dir=config.cache_dir)
    source = source or open_source(config)
    if source.recorded_in not in (None, config.label_tokenizer):
        raise ConfigError(
            f"the lengths of {config.source} are counted in {source.recorded_in} tokens, not in "
            f"{config.label_tokenizer}; type --label-tokenizer {source.recorded_in}"
        )
    fingerprint = _fingerprint(config, source, counter)
    folder = _folder(config, fingerprint)
    from_cache = folder.is_dir()
    if from_cache:
        out.print(f"rows of {config.source} taken from the cache {folder}", highlight=False, soft_wrap=True)
    else:
        _build(config, source, counter, folder)
    report = DataReport.from_json(
        {**json.loads((folder / "report.json").read_text("utf-8")), "source": config.source, "from_cache": from_cache}
    )
    with pa.memory_map(str(folder / "rows.arrow")) as file:
        rows = RowTable(pa.ipc.open_file(file).read_all())
    data = DataSet(rows, report, fingerprint)
    if learnable:
        check_learnable(config, data)
    return data


def is_cached(config: DataConfig) -> bool:
    """Whether `build_rows` would take the rows from the cache. Reads files once, for their hash.

    Raises:
        DataError: a source that can't be read.
        ConfigError: a tokenizer that is not known.
        MissingExtraError: a package that the source needs is not installed.
    """
    counter = load_counter(config.label_tokenizer, num_workers=config.num_workers, cache_dir=config.cache_dir)
    return _folder(config, _fingerprint(config, open_source(config), counter)).is_dir()


def _folder(config: DataConfig, fingerprint: str) -> Path:
    return config.cache_dir / "rows" / fingerprint[:32]


def _fingerprint(config: DataConfig, source: Source, counter: TokenCounter) -> str:
    options = config.model_dump(mode="json", exclude=NOT_IN_FINGERPRINT)
    parts = {"version": ROWS_VERSION, "source": source.identity(), "tokenizer": counter.identity, **options}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_learnable(config: DataConfig, data: DataSet) -> None:
    """Refuse rows that nothing can be learned from.

    Raises:
        DataError: too few training rows, or all of one length.
    """
    rows, report = data.rows, data.report
    num_train = report.num_rows["train"]
    if num_train < config.min_rows:
        dropped = sum(report.counts.values())
        others = ", ".join(f"{count:,} are for {name}" for name, count in report.num_rows.items() if name != "train")
        raise DataError(
            f"{config.source}: {num_train:,} training rows of {report.num_records:,} records ({others}; {dropped:,} "
            f"problems counted); expected at least min_rows = {config.min_rows:,}: give more data, or lower --min-rows"
        )
    is_train = pc.equal(rows.table["split"], "train").to_numpy()
    train = rows.response_tokens[is_train]
    if len(train) > 1 and train.min() == train.max():
        raise DataError(
            f"{config.source}: all {len(train):,} training answers have {train[0]} tokens: there is nothing to learn"
        )


def _build(config: DataConfig, source: Source, counter: TokenCounter, folder: Path) -> None:
    """Write `rows.arrow` and `report.json` to a temporary folder and rename it to `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        problems = Problems()
        records = _Records(config, source, problems)
        with (
            Staging(
                config,
                problems,
                partial / "staged.arrow",
                counted_with=counter.name,
                keep_evaluation_prompts=source.keeps_evaluation_prompts,
            ) as staging,
            progress("reading records", source.num_records()) as advance,
        ):
            done = 0
            for chat, num_tokens in _counted(records.chats(staging), counter):
                staging.add(chat, num_tokens)
                if records.num_read - done >= ADVANCE_RECORDS:
                    advance(records.num_read - done)
                    done = records.num_read
                if config.max_rows and staging.num_rows >= config.max_rows:
                    break
            advance(records.num_read - done)
        if not staging.num_rows:
            raise records.nothing_found()
        num_rows = staging.finish(partial / "rows.arrow")
        report = DataReport(
            source=config.source,
            data_format=records.data_format,
            label_tokenizer=source.recorded_in or staging.label_tokenizer(),
            num_records=records.num_read,
            num_chats=staging.num_chats,
            num_rows=num_rows,
            counts={reason: count for reason, count in problems.counts.items() if count},
            examples={reason: tuple(places) for reason, places in problems.examples.items()},
            warnings=tuple(problems.warnings),
            families=dict(records.families),
            labels=dict(staging.labels),
        )
        (partial / "report.json").write_text(json.dumps(report.to_json(), indent=1) + "\n", "utf-8")
        (partial / "staged.arrow").unlink()
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster with the same rows
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Records:
    """The source's records and what became of them."""

    def __init__(self, config: DataConfig, source: Source, problems: Problems) -> None:
        self.num_read = 0
        self._config = config
        self._problems = problems
        self._others: dict[str | None, tuple[int, str]] = {}  # other formats that records look like, count and first
        self.families: Counter[str] = Counter()  # forms of logs among the chats
        self._reader = source.reader
        records = source.records(problems, moderation=config.moderation == "drop")
        self._records = records if self._reader else opened(records, problems)
        self._head: list[Located] = list(islice(self._records, DETECTION_RECORDS))
        self.data_format = self._format()

    def _format(self) -> str:
        if self._reader:
            return "lengths"
        if self._config.data_format != "auto":
            return self._config.data_format
        if not self._head:
            raise self.nothing_found()
        found = detect_format(record for _, record in self._head)
        if found is None:
            raise self._unknown_format()
        return found

    def _unknown_format(self) -> DataError:
        config = self._config
        records = [record for _, record in self._head]
        return unknown_format(config.source, records, config.data_format, FieldMap.of(config).columns)

    def chats(self, staging: Staging) -> Iterator[Chat]:
        """Chats that pass the filters, each with an id of its own."""
        config = self._config
        languages = {language.lower() for language in config.languages}
        normalise = self._reader or normaliser(
            self.data_format,
            self._problems,
            drop_redacted=config.redacted == "drop",
            drop_flagged=config.moderation == "drop",
        )
        for location, record in chain(self._head, self._records):
            self.num_read += 1
            try:
                chat = normalise(record, location)
            except Unusable as unusable:
                self._problems.add(unusable.reason, location)
                other = detect_format([record]) if unusable.reason == reasons.WRONG_COLUMNS else None
                if other not in (None, self.data_format):
                    count, first = self._others.get(other, (0, location))
                    self._others[other] = count + 1, first
                continue
            if languages and (chat.language or "").lower() not in languages:
                self._problems.add(reasons.OTHER_LANGUAGE, location)
            elif staging.is_new(chat):
                if chat.family:
                    self.families[chat.family] += 1
                yield chat
        for other, (count, first) in self._others.items():
            self._problems.warn(
                f"{count:,} records look like {other}, the first is {first}, but all are read as "
                f"{self.data_format}, so they are lost: put each format in a source of its own"
            )

    def nothing_found(self) -> DataError:
        """Why there is not a single row."""
        counts = self._problems.counts
        if self._head and counts[reasons.WRONG_COLUMNS] == self.num_read:
            return self._unknown_format()
        why = [f"{count:,} x {reason}" for reason, count in counts.most_common(3)]
        said = "; ".join(why + self._problems.warnings) or "it is empty"
        return DataError(f"{self._config.source}: no row in {self.num_read:,} records: {said}")


def _counted(chats: Iterable[Chat], counter: TokenCounter) -> Iterator[tuple[Chat, Mapping[str, int]]]:
    """Chats with the label tokens of their answers; one batch is counted while the next is read."""

    def count(texts: list[str]) -> dict[str, int]:
        return dict(zip(texts, counter.count(texts), strict=True)) if texts else {}

    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[list[Chat], Future[dict[str, int]]] | None = None
        for batch in _batches(chats):
            texts = list(dict.fromkeys(text for chat in batch for text in chat.texts()))
            last, waiting = waiting, (batch, pool.submit(count, texts))
            if last:
                num_tokens = last[1].result()
                yield from ((chat, num_tokens) for chat in last[0])
        if waiting:
            num_tokens = waiting[1].result()
            yield from ((chat, num_tokens) for chat in waiting[0])


def _batches(chats: Iterable[Chat]) -> Iterator[list[Chat]]:
    batch: list[Chat] = []
    num_chars = 0
    for chat in chats:
        batch.append(chat)
        num_chars += 1000 + sum(map(len, chat.texts()))
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
