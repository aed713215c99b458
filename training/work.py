"""The work folder of a run: who trains in it, whether it may be begun anew, and the parts that a run was made in.

Knows files and locks; what is trained is elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mope import artifact
from mope.errors import ArtifactError, ConfigError
from mope.files import writable, write_text
from mope.provenance import without_secrets
from mope.sealed import LISTING

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK")  # set above 0 in the helper processes of a distributed run
LOCK, MARKER, PARTS, FINISHED = "running.lock", "run.json", "parts.json", "finished.json"


def is_helper() -> bool:
    """Whether this is a helper process of a distributed run, which works in the folder that rank 0 has locked."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in RANKS)


@contextmanager
def locked(output: Path, work: Path) -> Iterator[None]:
    """Keep other runs away from both folders until the block ends, or the process does, however it ends.

    Raises:
        ConfigError: another run is using one of them, on this machine or on another that shares the disk; or they
            can't be written.
    """
    with ExitStack() as held:
        if not is_helper():
            with writable(f"--output {output}"):
                output.parent.mkdir(parents=True, exist_ok=True)
                if work.exists() and not work.is_dir():
                    raise ConfigError(f"{work} is a file; a run keeps its checkpoints in a folder of this name")
                work.mkdir(parents=True, exist_ok=True)
            held.enter_context(_lock(output.with_name(f".{output.name}.lock"), output))
            held.enter_context(_lock(work / LOCK, work))
        yield


@contextmanager
def _lock(path: Path, folder: Path) -> Iterator[None]:
    """Hold a lock of the operating system: it ends with the process, and a file that is left behind locks nothing."""
    owner = path.with_name(f"{path.name}.json")
    lock = FileLock(path, timeout=0)
    try:
        with writable(str(path)):
            lock.acquire()
    except (Timeout, ConfigError) as error:
        if isinstance(error, Timeout) or isinstance(error.__cause__, Timeout):  # it is an OSError, too
            raise ConfigError(
                f"{folder} is in use: {_owner(owner)} trains there; wait until it is done, stop it, or choose another "
                "--output"
            ) from error
        raise
    try:
        with writable(str(owner)):
            described = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
            write_text(owner, json.dumps(described) + "\n")
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(found['pid'])} on {found['host']!s:.200} (since {found['since']!s:.40})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def check_output(output: Path, work: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse before hours of training what would be lost by them, or could not be written after them.

    Args:
        output: where the predictor will be saved.
        work: where its checkpoints lie.
        overwrite: a saved predictor in `output` may be replaced, and unless `resume` what was trained in `work`, too.
        resume: go on with what was trained in `work`.

    Raises:
        ConfigError: something else lies there, a saved predictor, or an unfinished run.
    """
    if is_helper():
        return
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / LISTING).exists()):
        raise ConfigError(f"--output {output} exists and is not a saved predictor; choose another or remove it")
    try:
        artifact.check_replaceable(
            output, overwrite=overwrite, hint="add --overwrite to replace it, or choose another --output"
        )
    except ArtifactError as error:
        raise ConfigError(f"--output: {error}") from error
    own = {LOCK, f"{LOCK}.json", MARKER, PARTS, FINISHED, "tokenizer.json"}
    if not (work / MARKER).exists() and (foreign := sorted({path.name for path in work.iterdir()} - own)):
        raise ConfigError(
            f"{work} is no work folder of a run (it holds {', '.join(foreign[:3])}); choose another --work or --output"
        )
    trained = networks(work)
    if trained and not resume and not overwrite:
        what = "a finished run" if (work / FINISHED).exists() else "an unfinished run"
        raise ConfigError(
            f"{work} holds {what} (of {', '.join(trained)}), which would be lost; add --resume to go on with it, "
            "--overwrite to throw it away and start anew, or choose another --output"
        )


def networks(work: Path) -> list[str]:
    """The networks of which a work folder holds a checkpoint or the weights."""
    kept = ("last.ckpt", "best.ckpt", "weights.safetensors")
    return sorted({path.parent.name for name in kept for path in work.glob(f"*/{name}")})


def begin(work: Path, shaping: dict[str, Any], command: Sequence[str], *, resume: bool) -> bool:
    """Begin a part of a run: check that it goes on with the settings and rows that it was begun with.

    Args:
        work: the run's folder.
        shaping: what its networks depend on: `rows`, `model` and `fit`.
        command: the command line.
        resume: go on with what is there.

    Returns:
        Whether there is something to go on with.

    Raises:
        ConfigError: it was begun with other settings or rows.
    """
    marker = work / MARKER
    goes_on = resume and marker.exists()
    if goes_on:
        begun = artifact.read_json(marker)
        if begun != shaping:
            changed = [
                f"{section}.{name}"
                for section in ("model", "fit")
                for name, value in shaping[section].items()
                if begun.get(section, {}).get(name) != value
            ]
            what = ", ".join(changed) or "the data"
            raise ConfigError(
                f"--resume: {work} was begun with other settings ({what}); type them as before, or add --overwrite "
                "instead of --resume to throw it away and start anew"
            )
    if is_helper():
        return goes_on
    parts = _ended(work) if goes_on else []
    if not goes_on:
        for name in networks(work):
            shutil.rmtree(work / name)
    (work / FINISHED).unlink(missing_ok=True)
    artifact.write_json(work / PARTS, [*parts, {"command": without_secrets(command), "started": _now()}])
    artifact.write_json(marker, shaping)
    return goes_on


def end(work: Path, *, finished: bool = False) -> list[dict[str, Any]]:
    """Note the end of a part.

    Args:
        work: the run's folder.
        finished: the predictor is saved.

    Returns:
        All parts so far: `command`, `started`, `finished`.
    """
    parts = _parts(work)
    if parts and not is_helper():
        parts[-1]["finished"] = _now()
        artifact.write_json(work / PARTS, parts)
        if finished:
            artifact.write_json(work / FINISHED, {"finished": parts[-1]["finished"]})
    return parts


def _parts(work: Path) -> list[dict[str, Any]]:
    path = work / PARTS
    return list(artifact.read_json(path)) if path.exists() else []


def _ended(work: Path) -> list[dict[str, Any]]:
    """Earlier parts; one that was killed ended, as far as is known, when it last wrote a file."""
    parts = _parts(work)
    if parts and "finished" not in parts[-1]:
        newest = max(path.stat().st_mtime for path in work.rglob("*") if path.name not in (LOCK, f"{LOCK}.json"))
        parts[-1]["finished"] = datetime.fromtimestamp(newest, timezone.utc).isoformat(timespec="seconds")
    return parts


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
