"""The secret that processes of a server share: the same for all, and nobody else's."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mope.errors import ConfigError
from mope.serving_hooks import secret
from mope.serving_hooks.options import HookOptions


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def load(**options: Any) -> bytes:
    return secret.load(HookOptions(**options))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_drawn_once_and_lies_where_others_cannot_read_it(temporary: Path) -> None:
    first = load()
    assert (len(first), load()) == (32, first)
    folder = temporary / f"mope-{os.getuid()}"
    assert [mode(folder), mode(folder / secret.NAME)] == [0o700, 0o600]
    assert [path.name for path in folder.iterdir()] == [secret.NAME]


def test_with_a_state_it_is_kept_with_it(temporary: Path) -> None:
    kept = load(state=temporary / "kept" / "state.json")
    assert mode(temporary / "kept" / secret.NAME) == 0o600
    assert load(state=temporary / "kept" / "other.json") == kept != load()


def test_processes_that_start_at_once_have_the_same(temporary: Path) -> None:
    code = (
        "import sys, tempfile; from mope.serving_hooks import secret; from mope.serving_hooks.options import "
        "HookOptions; sys.stdin.read(); print(secret.load(HookOptions()).hex())"
    )
    environment = {**os.environ, "TMPDIR": str(temporary)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, env=environment, text=True)
        for _ in range(4)
    ]
    assert len({process.communicate("")[0] for process in processes} | {load().hex() + "\n"}) == 1


def test_an_operator_gives_one(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "0123456789abcdef")
    (temporary / "file").write_text("0123456789abcdef\n")
    assert load(secret="env:MY_SECRET") == load(secret=f"file:{temporary / 'file'}")
    monkeypatch.setenv("MY_SECRET", "0123456789abcdeF")
    assert load(secret="env:MY_SECRET") != load(secret=f"file:{temporary / 'file'}")
    assert not (temporary / f"mope-{os.getuid()}").exists()


def test_what_cannot_be_used_says_what_to_do(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT", "tiny")
    for given, said in (
        ("env:NOT_THERE", "no variable NOT_THERE"),
        ("env:SHORT", "holds 4 characters; expected at least 16"),
        (f"file:{temporary / 'nowhere'}", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(secret=given)
    with pytest.raises(ConfigError) as raised:
        HookOptions.read({"secret": "hunter2hunter2hunter2"}, "--additional-config")
    assert "expected `env:NAME` or `file:/path`" in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("trap", ["open folder", "link to a folder", "open file", "link to a file", "other content"])
def test_what_others_may_have_written_is_not_believed(temporary: Path, trap: str) -> None:
    folder = temporary / f"mope-{os.getuid()}"
    if trap == "link to a folder":
        (temporary / "theirs").mkdir(mode=0o700)
        folder.symlink_to(temporary / "theirs")
    else:
        folder.mkdir(mode=0o700)
    file = folder / secret.NAME
    if trap == "open folder":
        folder.chmod(0o777)
    elif trap == "link to a file":
        (temporary / "theirs").write_text("00" * 32)
        (temporary / "theirs").chmod(0o600)
        file.symlink_to(temporary / "theirs")
    elif trap != "link to a folder":
        file.write_text("00" * 32 if trap == "open file" else "00")
        file.chmod(0o644 if trap == "open file" else 0o600)
    with pytest.raises(ConfigError, match=r"secret: .*(not this user's alone|digits|read nor made).*option `secret`"):
        load()
