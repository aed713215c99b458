"""What commands write: whole or not at all, and never over what they read or over a saved predictor.

Every `--output` is checked here before the work begins, and every file gets its name only once it is complete.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mope.errors import ConfigError, MopeError

DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM)
PREDICTOR_FILES = ("files.json", "config.json")  # what every saved predictor has


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, which takes its name when the block ends without an error.

    A link stays, and the file that it leads to is replaced. A device or a pipe, which cannot be replaced, is yielded
    itself.

    Raises:
        OSError: no room, or no permission. What was there before stays.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target
        return
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # named at random, so that nobody can put a link there; made by `open`, so that the umask holds
    temporary = target.with_name(f".{target.stem[:80]}-{secrets.token_hex(8)}{target.suffix}")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: Path, *, newline: str | None = None) -> Iterator[IO[str]]:
    """A text file (UTF-8) to write that appears under its name when the block ends without an error, see `replaced`."""
    with replaced(path) as temporary, temporary.open("w", encoding="utf-8", newline=newline) as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8, line ends as they are), see `replaced`."""
    with opened(path, newline="") as file:
        file.write(text)


def check_output_file(
    path: Path, flag: str = "--output", reads: Mapping[str, str | Path | Sequence[Path]] | None = None
) -> None:
    """Refuse a file that could not be written, or whose loss would hurt, before the work begins.

    Args:
        path: the file to write.
        flag: what the user typed it after.
        reads: what the command reads, one file or several, by the flag that it was typed after.

    Raises:
        ConfigError: a folder, a file that the command reads (by whatever name or link), a file of a saved predictor,
            or a folder that can't be written to.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ConfigError(
            f"{flag} {path} is a folder; expected a file, for example {flag} {path / 'predictions.jsonl'}"
        )
    for other, read in (reads or {}).items():
        if any(same_file(target, Path(one)) for one in ([read] if isinstance(read, str | Path) else read)):
            raise ConfigError(f"{flag} {path} is the file that {other} reads, which would be lost; choose another")
    for folder in list(target.parents)[:2]:
        if target.exists() and is_predictor(folder):
            raise ConfigError(f"{flag} {path} is a file of the saved predictor {folder}; choose another")
    if target.exists() and not target.is_file():
        return
    if not target.parent.is_dir():
        raise ConfigError(f"{flag} {path} can't be written: {_missing(target.parent)}")
    with writable(f"{flag} {path}"):
        _probe(target.parent)


def make_output_folder(
    path: Path,
    flag: str = "--output",
    *,
    names: tuple[str, ...] = (),
    reads: Mapping[str, str | Path] | None = None,
) -> None:
    """Make a folder for results now: hours later is too late to hear that it can't be made.

    Args:
        path: the folder.
        flag: what the user typed it after.
        names: files that will be written into it.
        reads: see `check_output_file`.

    Raises:
        ConfigError: a file, a saved predictor (its own metrics and plots would be lost), a folder that can't be
            written to, or one where a result would replace what the command reads.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{flag} {path} is a file; expected a folder")
    if is_predictor(target):
        raise ConfigError(
            f"{flag} {path} is a saved predictor, whose own results would be lost; choose another folder, for example "
            f"{flag} {path.with_name(path.name + '-results')}"
        )
    with writable(f"{flag} {path}"):
        path.mkdir(parents=True, exist_ok=True)
        _probe(target)
    for name in names:
        check_output_file(path / name, flag, reads)


def is_predictor(folder: Path) -> bool:
    """Whether a folder holds a saved predictor, whole or damaged."""
    return all((folder / name).is_file() for name in PREDICTOR_FILES)


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file that exists: also through links, hard links and relative parts."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


@contextmanager
def writable(what: str, error_type: type[MopeError] = ConfigError) -> Iterator[None]:
    """Turn an error of the file system into one line.

    Args:
        what: was to be written, as the user typed it.
        error_type: what to raise.

    Raises:
        MopeError: of `error_type`, in place of any `OSError`.
    """
    try:
        yield
    except BrokenPipeError:  # whoever reads our output went away
        raise
    except OSError as error:
        raise error_type(f"{what} can't be written: {reason(error)}") from error


@contextmanager
def room_for(what: str, error_type: type[MopeError] = ConfigError) -> Iterator[None]:
    """Turn a full or read-only disk, whatever library met it, into one line; other errors pass.

    Args:
        what: was to be written.
        error_type: what to raise.

    Raises:
        MopeError: of `error_type`.
    """
    try:
        yield
    except MopeError:
        raise
    except Exception as error:
        if is_disk_full(error) or (isinstance(error, OSError) and error.errno in NO_ACCESS):
            raise error_type(f"{what} can't be written: {reason(error)}") from error
        raise


def reason(error: BaseException) -> str:
    """Why something could not be written or read, and what helps."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):  # one for each file
        told = "; ".join(dict.fromkeys(str(entry[-1]) for entry in error.args[0]))
    else:
        told = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    if is_disk_full(error):
        return "no space left on the disk (or in the quota); make room and try again"
    return told


def is_disk_full(error: BaseException) -> bool:
    """Whether an error comes from a full disk, whatever library raised it."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    # safetensors and shutil.copytree tell it in words alone
    return "No space left on device" in str(error) or "StorageFull" in str(error)


def _missing(folder: Path) -> str:
    if folder.exists():
        return f"{folder} is no folder"
    return f"there is no folder {folder}; type first: mkdir -p {folder}"


def _probe(folder: Path) -> None:
    """Write and remove an empty file.

    Raises:
        OSError: it can't be written.
    """
    probe = folder / f".{secrets.token_hex(8)}"
    try:
        probe.touch(exist_ok=False)
    finally:
        probe.unlink(missing_ok=True)
