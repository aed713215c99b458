"""A run's origin is told fully, and without telling on the person who ran it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest

from mope import provenance
from mope.provenance import collect, file_sha256


def test_a_run_is_described_with_what_json_can_hold() -> None:
    started = datetime.now(timezone(timedelta(hours=2))) - timedelta(hours=1)
    described = collect(["mope-train", "--recipe", "demo"], 7, {"sharegpt": {"sha256": "ab12", "rows": 3}}, started)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert described["command"] == ["mope-train", "--recipe", "demo"]
    assert described["seed"] == 7
    assert described["data"] == {"sharegpt": {"sha256": "ab12", "rows": 3}}
    assert described["packages"]["mope-llm"] == "0.1.0"
    assert described["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert described["machine"]["num_cores"] >= 1
    assert described["started"].endswith("+00:00")
    elapsed = datetime.fromisoformat(described["finished"]) - datetime.fromisoformat(described["started"])
    assert timedelta(minutes=59) < elapsed < timedelta(minutes=61)


def test_paths_are_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "/home/alice/.venv/bin/mope-train",
        "--data=/home/alice/a.jsonl,/home/alice/b.jsonl",
        "--output",
        f"{tmp_path}/runs/small",
        "~/rows.csv",
        "runs/demo",
        "and/or",
    ]
    described = collect(command, None, {"/home/alice/rows.csv": {"files": [Path("/home/alice/rows.csv"), 4]}})
    assert described["command"] == [
        "mope-train", "--data=a.jsonl,b.jsonl", "--output", "runs/small", "rows.csv", "runs/demo", "and/or",
    ]  # fmt: skip
    assert described["data"] == {"rows.csv": {"files": ["rows.csv", 4]}}
    assert "alice" not in json.dumps(described)


@pytest.mark.parametrize("secret", [["--hub-token", "hf_abc"], ["--hub-token=hf_abc"], ["--api-key", "hf_abc"]])
def test_secrets_are_not_written_down(secret: list[str]) -> None:
    command = collect(["mope", *secret, "--label-tokenizer", "cl100k_base"], None, {})["command"]
    assert "hf_abc" not in json.dumps(command)
    assert command[-2:] == ["--label-tokenizer", "cl100k_base"]


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_checkout_gives_its_commit_and_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_CHECKOUT", tmp_path)
    assert collect([], None, {})["git"] is None
    git(tmp_path, "init", "--quiet")
    assert collect([], None, {})["git"] is None
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert collect([], None, {})["git"] == {"commit": head, "dirty": False}
    (tmp_path / "new.py").touch()
    assert collect([], None, {})["git"] == {"commit": head, "dirty": True}


def test_a_repository_around_an_installed_wheel_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "someone else's")
    site_packages = tmp_path / ".venv" / "site-packages"
    site_packages.mkdir(parents=True)
    monkeypatch.setattr(provenance, "_CHECKOUT", site_packages)
    assert collect([], None, {})["git"] is None


def test_gpus_are_named_only_if_torch_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert collect([], None, {})["machine"]["gpus"] == []
    assert "torch" not in sys.modules
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda index: f"GPU {index}"
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert collect([], None, {})["machine"]["gpus"] == ["GPU 0", "GPU 1"]


def test_a_file_is_hashed_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000  # more than one block
    (tmp_path / "rows").write_bytes(content)
    assert file_sha256(tmp_path / "rows") == hashlib.sha256(content).hexdigest()
