"""Fetching public sets of answers: a repository's archive, the files it needs of it, the lengths of the answers.

Streams the archive of the one commit, keeps only the files that a set reads, counts its answers and writes one parquet
file per set. Knows networks, archives and the form of the file; does not know how a set writes its answers down.
"""

from __future__ import annotations

import gzip
import http.client
import shutil
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from mope.console import console, progress
from mope.errors import DataError
from mope.files import replaced
from mope.training.data.formats import tidy
from mope.training.data.problems import Problems
from mope.training.data.public_readers import RecordedAnswer, RepositoryFile
from mope.training.data.public_sets import PublicSet
from mope.training.data.tokens import TokenCounter

ARCHIVE = "https://codeload.github.com/{repository}/tar.gz/{commit}"
TIMEOUT_S = 60.0  # without a byte
CHUNK_BYTES = 1 << 20
BATCH_CHARS = 4_000_000  # answer text that is counted at once

SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("target_llm", pa.string(), nullable=False),
        pa.field("response_tokens", pa.int32(), nullable=False),  # of cl100k_base
        pa.field("censored", pa.bool_(), nullable=False),
        pa.field("temperature", pa.float32()),
        pa.field("max_tokens", pa.int32()),
        pa.field("reasoning_tokens", pa.int32()),  # of the thoughts, next to `response_tokens`
        pa.field("reasoning_source", pa.string()),  # text, usage or difference (usage minus the visible answer)
        pa.field("completion_tokens", pa.int32()),  # as the API recorded it, in the LLM's own tokens
        pa.field("thinking", pa.bool_()),
        pa.field("tools", pa.bool_()),
        pa.field("language", pa.string()),
        pa.field("task", pa.string()),  # part of the set
        pa.field("history", pa.list_(pa.int32())),  # lengths of the conversation's earlier answers
        pa.field("group", pa.string()),  # what decides the split, where it is not the prompt
        pa.field("castillo_split", pa.string()),  # train, validate or test, as CASTILLO has it
        pa.field("output_sizes", pa.list_(pa.int32())),  # of several answers, `response_tokens` their median
    ]
)
REQUIRED = tuple(field.name for field in SCHEMA if not field.nullable)
OPTIONAL = tuple(field.name for field in SCHEMA if field.nullable)


def path_of(public: PublicSet, folder: Path) -> Path:
    """The set's file in `folder`."""
    return folder / f"{public.name}.parquet"


def fetch(sets: Sequence[PublicSet], folder: Path, counter: TokenCounter) -> None:
    """Make the file of each set that has none in `folder`; one that is there stays as it is.

    A repository is fetched once for all its sets. A set none of whose files are in the archive gets a file without
    rows.

    Args:
        sets: those that are wanted.
        folder: where the files lie; made if it is not there.
        counter: counts the tokens of the answers.

    Raises:
        DataError: an archive can't be fetched, or holds something else than it should; one line that says which
            files can be put in their place.
    """
    missing = sorted((each for each in sets if not path_of(each, folder).exists()), key=_origin)
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for (repository, commit), of_archive in groupby(missing, key=_origin):
        wanted = list(of_archive)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as unpacked:
            try:
                files = _unpack(ARCHIVE.format(repository=repository, commit=commit), wanted, Path(unpacked))
            except (OSError, EOFError, zlib.error, tarfile.TarError, http.client.HTTPException) as error:
                raise _not_fetched(repository, commit, error, sets, folder) from error
            for public in wanted:
                _write(public, files[public.name], path_of(public, folder), counter)


def _origin(public: PublicSet) -> tuple[str, str]:
    return public.repository, public.commit


def _not_fetched(repository: str, commit: str, error: Exception, sets: Sequence[PublicSet], folder: Path) -> DataError:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    names = ", ".join(path.name for path in (path_of(each, folder) for each in sets) if not path.exists())
    return DataError(
        f"{repository} at {commit[:12]} can't be fetched from GitHub ({why}); connect to the network, or put "
        f"{names} into {folder}, each with the columns {', '.join(REQUIRED)} (lengths in cl100k_base tokens) and, "
        f"where known, {', '.join(OPTIONAL)}"
    )


class _Counting:
    """A file that says how far it has been read."""

    def __init__(self, file: IO[bytes], advance: Callable[[int], None]) -> None:
        self._file = file
        self._advance = advance
        self._num_bytes = 0

    def read(self, num_bytes: int = -1) -> bytes:
        """The next bytes; progress is told in whole megabytes."""
        content = self._file.read(num_bytes)
        before, self._num_bytes = self._num_bytes, self._num_bytes + len(content)
        if step := self._num_bytes // 1_000_000 - before // 1_000_000:
            self._advance(step)
        return content


def _unpack(address: str, sets: Sequence[PublicSet], folder: Path) -> dict[str, list[RepositoryFile]]:
    """The files of each set, in the order of their paths; nothing else of the archive is kept."""
    files: dict[str, list[RepositoryFile]] = {public.name: [] for public in sets}
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:
        size = response.headers.get("Content-Length")
        total = int(size) // 1_000_000 if size and size.isdigit() else None
        with (
            progress(f"fetching {sets[0].repository} (MB)", total) as advance,
            # gzip is undone here, not by tarfile, which takes an archive that breaks off between two files for whole
            gzip.GzipFile(fileobj=_Counting(response, advance)) as plain,  # type: ignore[call-overload]
            tarfile.open(fileobj=plain, mode="r|") as archive,
        ):
            for member in archive:
                name = member.name.partition("/")[2]  # without the folder that GitHub puts around all
                for public in sets:
                    found = public.files.fullmatch(name) if member.isfile() else None
                    source = archive.extractfile(member) if found else None
                    if found and source:
                        content = folder / str(sum(map(len, files.values())))
                        with content.open("wb") as target:
                            shutil.copyfileobj(source, target, CHUNK_BYTES)
                        llm = found.groupdict().get("llm") or ""
                        files[public.name].append(RepositoryFile(name, llm, content))
            while plain.read(CHUNK_BYTES):  # to the end, where the checksum is
                pass
    return {name: sorted(found, key=lambda file: file.name) for name, found in files.items()}


def _write(public: PublicSet, files: Sequence[RepositoryFile], path: Path, counter: TokenCounter) -> None:
    """Count the answers of a set and write its file, first under another name."""
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    seen: set[tuple[str, str]] = set()
    num_empty = num_repeated = 0
    with progress(f"counting tokens of {public.name}") as advance:
        for batch in _batches(_tidied(public.read(files))):
            texts = list(dict.fromkeys(text for answer in batch for text in answer.texts if text))
            num_tokens = dict(zip(texts, counter.count(texts), strict=True))
            for answer in batch:
                asked = (answer.target_llm, answer.prompt_id)
                if not answer.prompt or answer.is_empty:
                    num_empty += 1
                elif not public.has_repeats and asked in seen:
                    num_repeated += 1
                else:
                    seen.add(asked)
                    row = _row(public, answer, num_tokens)
                    for name, values in columns.items():
                        values.append(row.get(name))
            advance(len(batch))
    with replaced(path) as whole:
        pq.write_table(pa.table(columns, schema=SCHEMA), whole, compression="zstd")
    console().print(
        f"{public.name}: {len(columns['prompt']):,} answers kept in {path} ({num_empty:,} without a text and "
        f"{num_repeated:,} repeated ones left out)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _row(public: PublicSet, answer: RecordedAnswer, num_tokens: Mapping[str, int]) -> dict[str, object]:
    """Columns of an answer; those that are left out are not known."""
    if answer.sizes:
        length = int(median(answer.sizes))
    elif answer.num_tokens is not None:
        length = answer.num_tokens
    else:
        length = num_tokens[answer.text]
    thoughts, source = answer.thought_tokens, "usage"
    if answer.thoughts.strip():
        thoughts, source = num_tokens[answer.thoughts], "text"
    elif thoughts is None and answer.has_difference and answer.completion_tokens is not None:
        thoughts, source = max(answer.completion_tokens - length, 0), "difference"
    return {
        "prompt_id": answer.prompt_id,
        "prompt": answer.prompt,
        "target_llm": answer.target_llm,
        "response_tokens": length,
        "censored": public.cap_rule.is_cut_off(answer, length),
        "temperature": answer.temperature,
        "max_tokens": answer.max_tokens,
        "reasoning_tokens": thoughts,
        "reasoning_source": None if thoughts is None else source,
        "completion_tokens": answer.completion_tokens,
        "thinking": answer.thinking,
        "tools": answer.tools,
        "language": answer.language,
        "task": answer.task,
        "history": [num_tokens.get(text, 0) for text in answer.history] if public.has_history else None,
        "group": answer.group,
        "castillo_split": answer.castillo_split,
        "output_sizes": list(answer.sizes) or None,
    }


def _tidied(answers: Iterable[RecordedAnswer]) -> Iterator[RecordedAnswer]:
    """Answers without the NULs and lone surrogates that neither Arrow nor tokenizers take."""
    uncounted = Problems()

    def tidied(text: str) -> str:
        return tidy(text, "", uncounted)

    for answer in answers:
        yield replace(
            answer,
            prompt_id=tidied(answer.prompt_id),
            prompt=tidied(answer.prompt),
            target_llm=tidied(answer.target_llm),
            text=tidied(answer.text),
            thoughts=tidied(answer.thoughts),
            history=tuple(map(tidied, answer.history)),
            task=None if answer.task is None else tidied(answer.task),
            group=None if answer.group is None else tidied(answer.group),
        )


def _batches(answers: Iterable[RecordedAnswer]) -> Iterator[list[RecordedAnswer]]:
    batch: list[RecordedAnswer] = []
    num_chars = 0
    for answer in answers:
        batch.append(answer)
        num_chars += sum(map(len, answer.texts))
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
