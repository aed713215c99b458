"""Files of a saved predictor, read with care: the bytes that are used are those whose hash was checked.

`files.json` lists each file with its size and SHA-256. Nothing else is loaded, and each file has to be a regular file
under a known name, below a size, inside the folder. A hash shows damage, not origin: who can write a file of the folder
can write `files.json` as well. So load predictors of people you trust, as you would run their code on your data.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mope import packaged
from mope.errors import ArtifactError

LISTING = "files.json"
MAX_EXPERTS = 8
NETWORKS = ("model", "gate", *(f"expert-{k}" for k in range(MAX_EXPERTS)))
MIB, GIB = 2**20, 2**30
# what `files.json` may list, and the most bytes of each
MOST_BYTES: Mapping[str, int] = {
    "config.json": 16 * MIB,
    "router.json": 16 * MIB,
    "calibration.json": 16 * MIB,
    "thoughts.json": 16 * MIB,
    "tokenizer.json": 64 * MIB,
    "recalibration.json": 256 * MIB,
    "lookup.safetensors": 2 * GIB,
    **{f"{name}.safetensors": 8 * GIB for name in NETWORKS},
}
NEEDED = ("config.json", "router.json", "calibration.json", "tokenizer.json")
MOST_JSON = 64 * MIB  # of JSON that no hash vouches for
_BLOCK = 1 << 20
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # what became a FIFO just now does not block
)
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def cleaned(text: object, most: int = 200) -> str:
    """Text of a file for a message: no control characters, which a terminal would obey, and not longer than that."""
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(text)[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


@contextmanager
def plain_file(folder: Path, name: str, most_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file of a folder, opened for reading, and its size.

    Links are followed inside the folder, and to the blobs of the Hugging Face cache that the folder belongs to.

    Args:
        folder: that it lies in.
        name: of the file, `/` between the parts of its path. It is one that mope gives, never one from a file.
        most_bytes: of a file that is read.

    Raises:
        ArtifactError: nothing there, no regular file, a link that leads elsewhere, or too large.
    """
    path = folder / name
    try:
        root, found = folder.resolve(), path.resolve(strict=True)
        if not (found.is_relative_to(root) or _is_blob(root, found)):
            raise ArtifactError(f"{shown(path)} is a link that leads out of its folder; copy the file itself (cp -L)")
        if not stat.S_ISREG(os.lstat(found).st_mode):  # before it is opened, which a device may notice
            raise ArtifactError(f"{shown(path)} is no regular file; copy the whole folder again")
        file = os.fdopen(os.open(found, _FLAGS), "rb")
    except FileNotFoundError as error:
        raise ArtifactError(f"{shown(folder)} lacks {cleaned(name)}; copy the whole folder again") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise ArtifactError(f"{shown(path)} can't be read: {getattr(error, 'strerror', None) or error}") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{shown(path)} is no regular file; copy the whole folder again")
        if status.st_size > most_bytes:
            raise ArtifactError(f"{shown(path)} has {status.st_size} bytes; a predictor's has {most_bytes} at most")
        yield file, status.st_size


def _is_blob(root: Path, found: Path) -> bool:
    """Whether a file is a blob of the cache in which `root` is `models--*/snapshots/REVISION`."""
    repository = root.parent.parent
    return (
        root.parent.name == "snapshots"
        and repository.name.startswith("models--")
        and found.parent == (repository / "blobs").resolve()
    )


def shown(path: Path) -> str:
    """A path in a message, without what a terminal would obey."""
    return cleaned(path, 4096)


def _blocks(file: BinaryIO, size: int, where: Path) -> Iterator[bytes]:
    """A file's bytes, as many as it had when it was opened."""
    while size > 0:
        block = file.read(min(size, _BLOCK))
        if not block:
            raise ArtifactError(f"{shown(where)} became shorter while it was read; try again")
        size -= len(block)
        yield block


def read_bytes(folder: Path, name: str, most_bytes: int) -> bytes:
    """The bytes of a regular file of a folder, see `plain_file`."""
    with plain_file(folder, name, most_bytes) as (file, size):
        content = file.read(size)
    if len(content) != size:
        raise ArtifactError(f"{shown(folder / name)} became shorter while it was read; try again")
    return content


def sha256_of(folder: Path, name: str, most_bytes: int, copy_to: Path | None = None) -> str:
    """SHA-256 of a regular file of a folder, see `plain_file`; 1 MiB at a time.

    Args:
        folder: see `plain_file`.
        name: see `plain_file`.
        most_bytes: see `plain_file`.
        copy_to: also write what is hashed there.
    """
    digest = hashlib.sha256()
    with plain_file(folder, name, most_bytes) as (file, size):
        if copy_to is None:
            for block in _blocks(file, size, folder / name):
                digest.update(block)
        else:
            with copy_to.open("wb") as copied:
                for block in _blocks(file, size, folder / name):
                    digest.update(block)
                    copied.write(block)
    return digest.hexdigest()


def parse_json(content: bytes, where: Path) -> Any:
    """What strict JSON says.

    Raises:
        ArtifactError: it is not JSON, has NaN or Infinity, or is nested too deeply. Names the file `where`.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else cleaned(error)
        raise ArtifactError(f"{shown(where)} can't be read: {reason}") from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


class Fingerprint(NamedTuple):
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


class Sealed:
    """A saved predictor's files as `files.json` lists them. Each is checked as it is read.

    Args:
        folder: of the predictor.

    Raises:
        ArtifactError: not a saved predictor, or one whose list is damaged, or that lacks a file of the list.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ArtifactError(packaged.not_found(cleaned(folder, 4096)))
        if not os.path.lexists(folder / LISTING):
            raise ArtifactError(
                f"{shown(folder)} has no {LISTING}: not a predictor saved by mope, or an unfinished copy"
            )
        listed = parse_json(read_bytes(folder, LISTING, MIB), folder / LISTING)
        if not isinstance(listed, dict) or "config.json" not in listed:
            raise self._unlisted()
        self.files = {name: self._fingerprint(name, entry) for name, entry in listed.items()}
        for name in self.files:
            if not (folder / name).exists():
                raise ArtifactError(f"{shown(folder)} lacks {name}, which {LISTING} names; copy the whole folder again")

    def _unlisted(self) -> ArtifactError:
        return ArtifactError(
            f"{shown(self.folder / LISTING)} does not list a predictor's files; copy the whole folder again"
        )

    def _fingerprint(self, name: str, entry: Any) -> Fingerprint:
        if name not in MOST_BYTES:
            raise ArtifactError(
                f"{shown(self.folder / LISTING)} names {cleaned(repr(name), 80)}, which is no file of a predictor; "
                "copy the whole folder again, or update mope (pip install -U mope-llm)"
            )
        size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(sha256, str) or not _SHA256.match(sha256):
            size, sha256 = -1, ""  # no file has these
        return Fingerprint(size, sha256)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> bytes:
        """The bytes of a listed file.

        Raises:
            ArtifactError: it is not listed, or not what was saved; see `plain_file`.
        """
        expected = self._expected(name)
        content = read_bytes(self.folder, name, MOST_BYTES[name])
        self._compare(name, expected, Fingerprint(len(content), hashlib.sha256(content).hexdigest()))
        return content

    def json(self, name: str) -> Any:
        """What a listed JSON file says, see `read`."""
        return parse_json(self.read(name), self.folder / name)

    def verify(self, name: str, copy_to: Path | None = None) -> None:
        """Check a listed file without keeping it in memory, and copy it if asked to, see `read`."""
        expected = self._expected(name)
        with plain_file(self.folder, name, MOST_BYTES[name]) as (_, size):
            pass
        # of a file of another size there is nothing to hash
        sha256 = sha256_of(self.folder, name, MOST_BYTES[name], copy_to) if size == expected.size else ""
        self._compare(name, expected, Fingerprint(size, sha256))

    def _expected(self, name: str) -> Fingerprint:
        if name not in self.files:
            raise ArtifactError(
                f"{shown(self.folder)} has no {name} that {LISTING} lists, so nothing vouches for it; copy the whole "
                "folder again"
            )
        return self.files[name]

    def _compare(self, name: str, expected: Fingerprint, found: Fingerprint) -> None:
        if found != expected:
            raise ArtifactError(
                f"{shown(self.folder / name)} is not the file that was saved (size or SHA-256 differs); copy it again"
            )
