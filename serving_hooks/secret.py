"""The secret that a server's own processes share, and callers do not know.

The front end seals with it what it tells the scheduler, and names clients after their keys with it. An operator may
give it; otherwise the first process that needs one draws it into a file that the others read. Knows files and the
environment; no engine.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from mope.errors import ConfigError
from mope.serving_hooks.options import HookOptions

NAME = "mope-secret"  # of the file
_MIN_CHARS = 16  # of an operator's own; a drawn one has 64
_HOW = "give one with the option `secret`, as `env:NAME` or `file:/path`"


def load(options: HookOptions) -> bytes:
    """The server's secret, 32 bytes, the same in each of its processes on this machine.

    It is what the option `secret` names. Without that option it lies in the folder of the option `state`; without
    `state` in a folder of this user below the system's folder for temporary files. A file that is missing is made,
    readable by this user alone.

    Raises:
        ConfigError: a secret that cannot be read or is too short, or a file that others could have written.
    """
    if options.secret is not None:
        return blake2b(_given(options.secret), digest_size=32).digest()
    if options.state is not None:
        folder = options.state.expanduser().absolute().parent
        return _kept(folder / NAME, private=False)
    return _kept(Path(tempfile.gettempdir()) / f"mope-{os.getuid()}" / NAME, private=True)


def _given(where: str) -> bytes:
    kind, _, name = where.partition(":")
    if kind == "env":
        text = os.environ.get(name, "")
        if not text:
            raise ConfigError(f"secret: the environment has no variable {name}")
    else:
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"secret: {name} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(text) < _MIN_CHARS:
        raise ConfigError(f"secret: {where} holds {len(text)} characters; expected at least {_MIN_CHARS}")
    return text.encode()


def _kept(path: Path, *, private: bool) -> bytes:
    """The secret of a file, drawn where there is none yet. Processes that start at once get the same.

    Args:
        path: the file.
        private: whether its folder lies where others may write, so that it must be ours alone.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if private:
            _expect_ours(path.parent.lstat(), path.parent, stat.S_ISDIR)
        with suppress(FileNotFoundError):
            return _read(path)
        descriptor, drawn = tempfile.mkstemp(prefix=f"{NAME}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
            with suppress(FileExistsError):  # another process was first
                os.link(drawn, path)
        finally:
            os.unlink(drawn)
        return _read(path)
    except OSError as error:
        raise ConfigError(f"secret: {path} can be neither read nor made ({error.strerror or error}); {_HOW}") from error


def _read(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        _expect_ours(os.fstat(file.fileno()), path, stat.S_ISREG)
        text = file.read(65)
    try:
        if len(text) != 64:
            raise ValueError
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        raise ConfigError(f"secret: {path} does not hold 64 hexadecimal digits; remove it, or {_HOW}") from None


def _expect_ours(found: os.stat_result, path: Path, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"secret: {path} is not this user's alone (chmod go-rwx {path}); remove it, or {_HOW}")
