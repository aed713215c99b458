"""Where a predictor comes from: command, versions, commit, machine, data.

Knows how to ask Python, git and the operating system; does not know what was trained. What it collects is published
with the predictor, so it holds no user name, no secret and no absolute path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "mope-llm", "datasets", "faiss-cpu", "lightgbm", "lightning", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu",
    "pyarrow", "safetensors", "scikit-learn", "scipy", "tiktoken", "tokenizers", "torch", "transformers",
)  # fmt: skip
SECRET_FLAGS = ("token", "key", "password", "secret")  # the last word of a flag whose value is never written down
_CHECKOUT = Path(__file__).resolve().parent.parent


def collect(
    command: Sequence[str], seed: int | None, data: Mapping[str, Any], started: datetime | None = None
) -> dict[str, Any]:
    """Describe a run, for `provenance.json`.

    Args:
        command: the command line, program first.
        seed: the run's random seed.
        data: name of a data set -> its hash, or a mapping of what identifies it. Paths in it are shortened.
        started: when the run began, with a time zone; the run is taken to finish now.

    Returns:
        A dictionary that JSON can hold. A fact that cannot be had is None.
    """
    return {
        "command": without_secrets(command),
        "started": _utc(started) if started else None,
        "finished": _utc(datetime.now(timezone.utc)),
        "seed": seed,
        "data": shortened(data),
        "git": _git(),
        "python": platform.python_version(),
        "packages": _versions(),
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_model(),
            "num_cores": num_cores(),
            "gpus": _gpus(),
        },
    }


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; reads 1 MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _utc(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).isoformat(timespec="seconds")


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command line without values of flags that are secrets, and without absolute paths."""
    safe: list[str] = []
    hide_next = False
    for position, argument in enumerate(command):
        flag, equals, _ = argument.partition("=")
        secret = argument.startswith("--") and flag.rpartition("-")[2].lower() in SECRET_FLAGS
        if hide_next:
            safe.append("***")
        elif secret and equals:
            safe.append(f"{flag}=***")
        else:
            safe.append(Path(argument).name if position == 0 else shortened(argument))
        hide_next = secret and not equals
    return safe


def shortened(value: Any) -> Any:
    """The same value with every absolute path made relative to the working folder, or else cut to its last part."""
    if isinstance(value, Mapping):
        return {str(shortened(key)): shortened(item) for key, item in value.items()}
    if isinstance(value, str | os.PathLike):
        text = str(value)
        flag, equals, rest = text.partition("=") if text.startswith("--") else ("", "", text)
        return flag + equals + ",".join(_short_path(part) for part in rest.split(","))
    if isinstance(value, Sequence):
        return [shortened(item) for item in value]
    return value


def _short_path(text: str) -> str:
    path = Path(text)
    if not path.is_absolute() and not text.startswith("~"):
        return text
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from; None where it is installed from a wheel."""
    if not (_CHECKOUT / ".git").exists():
        return None
    commit = _git_output("rev-parse", "HEAD")
    changes = _git_output("status", "--porcelain")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git_output(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_CHECKOUT, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    """Versions of the packages that shape a predictor, read from their metadata without importing them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str | None:
    """Name of this machine's processor; None if that cannot be had."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or None


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")  # a run that has not imported torch has used no GPU
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
