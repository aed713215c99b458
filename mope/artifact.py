"""The folder of a saved predictor: what lies in it, written whole or not at all, checked before it is read.

    config.json         what the predictor is (`PredictorConfig`)
    *.safetensors       weights of the networks
    tokenizer.json      the encoder's tokenizer
    router.json         rules and combiners; lookup.safetensors the look-up's neighbours
    calibration.json    the calibration's maps and the distribution to fall back on
    recalibration.json  what was learned while serving, if anything
    files.json          size and SHA-256 of all of the above
    metrics.json, provenance.json, README.md, plots/    for people; not needed to predict
    onnx/               what mope-export made of the weights; a copy for serving has no weights

Knows files, hashes and JSON; not what the numbers mean. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from mope import packaged
from mope.calibration import Calibration
from mope.config import FORMAT_VERSION, PredictorConfig, network_names
from mope.errors import ArtifactError
from mope.grid import Array
from mope.provenance import file_sha256
from mope.router import Lookup, Router
from mope.rules import RuleTable

HASHED = (".json", ".safetensors")
FOR_PEOPLE = frozenset({"files.json", "metrics.json", "provenance.json"})


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error.

    Raises:
        ArtifactError: `folder` exists and is not a saved predictor: it will not be replaced.
    """
    folder = folder.resolve()
    if folder.exists() and not ((folder / "files.json").exists() or (folder.is_dir() and not any(folder.iterdir()))):
        raise ArtifactError(f"{folder} exists and is not a saved predictor; choose another --output or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        seal(temporary)
        put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(finished: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`, in place of what is there."""
    replaced = folder.with_name(f".{folder.name}-replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(replaced)
    try:
        finished.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write `files.json`: size and hash of each file that predictions depend on."""
    for path in folder.rglob("*"):  # some writers make files that their owner alone can read
        path.chmod(0o755 if path.is_dir() else 0o644)
    files = sorted(p for p in folder.iterdir() if p.suffix in HASHED and p.name not in FOR_PEOPLE)
    write_json(folder / "files.json", {path.name: _fingerprint(path) for path in files})


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def check(folder: Path) -> PredictorConfig:
    """Read the config of a saved predictor after checking that every file is there and unchanged.

    Raises:
        ArtifactError: not a saved predictor, a missing or changed file, or an unknown format version.
    """
    if not folder.is_dir():
        raise ArtifactError(packaged.not_found(str(folder)))
    if not (folder / "files.json").exists():
        raise ArtifactError(f"{folder} has no files.json: not a predictor saved by mope, or an unfinished copy")
    listed = read_json(folder / "files.json")
    if not isinstance(listed, dict) or "config.json" not in listed:
        raise ArtifactError(f"{folder / 'files.json'} does not list a predictor's files; copy the whole folder again")
    for name, expected in listed.items():
        path = folder / name
        if not path.exists():
            raise ArtifactError(f"{folder} lacks {name}, which files.json names; copy the whole folder again")
        if expected != _fingerprint(path):
            raise ArtifactError(f"{path} is not the file that was saved (size or SHA-256 differs); copy it again")
    return read_config(folder)


def read_config(folder: Path) -> PredictorConfig:
    """Read what a saved predictor is, without looking at its other files.

    Raises:
        ArtifactError: no config, an unknown format version, or a value that cannot be used.
    """
    saved = read_json(folder / "config.json")
    version = saved.get("format_version") if isinstance(saved, dict) else None
    if version != FORMAT_VERSION:
        is_newer = isinstance(version, int) and version > FORMAT_VERSION
        raise ArtifactError(
            f"{folder} has format version {version}; this mope reads version {FORMAT_VERSION}: "
            f"{'update mope (pip install -U mope-llm)' if is_newer else 'train or convert it anew'}"
        )
    try:
        return PredictorConfig.model_validate(saved)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{folder / 'config.json'}: {where}: {first['msg']}") from error


def find(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a predictor: a folder, a packaged predictor's, or what the Hugging Face Hub has under a name.

    Args:
        name_or_path: a path, the name of a packaged predictor, or a Hub id such as `"user/name"`.
        revision: revision of a Hub id.

    Raises:
        ArtifactError: a Hub id that the Hub does not give. A path is not looked at.
    """
    path = packaged.located(name_or_path)
    name = str(name_or_path)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"no folder {name}, and the Hugging Face Hub gave none: {reason}") from error


def check_weights(folder: Path, config: PredictorConfig, who: str, instead: str = "") -> None:
    """Refuse a copy for serving, which has ONNX graphs alone, where the weights of its networks are needed.

    Args:
        folder: of the artifact.
        config: of the artifact.
        who: what needs the weights, in words that complete "... needs them".
        instead: what else could be done, a clause of its own.

    Raises:
        ArtifactError: it has none. Says where they are, or which recipe makes them.
    """
    missing = [name for name in map("{}.safetensors".format, network_names(config)) if not (folder / name).exists()]
    if not missing:
        return
    recipe = recipe_of(folder)
    where = [] if packaged.is_packaged(folder) else ["they are in the folder that it was exported from"]
    where += [f"mope-train --recipe {recipe} --output DIR makes such"] if recipe else []
    raise ArtifactError(
        f"{packaged.shown(folder)} was exported for serving and has no PyTorch weights ({', '.join(missing)}); {who} "
        f"needs them: {', or '.join([*where, *([instead] if instead else [])])}"
    )


def recipe_of(folder: Path) -> str | None:
    """The built-in recipe that a predictor was trained by, as far as its provenance says so."""
    path = folder / "provenance.json"
    command = read_json(path).get("command") if path.exists() else None
    named = [after for flag, after in pairwise(command or ()) if flag == "--recipe"]
    return next((name for name in named if name in packaged.recipes()), None)


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (no NaN), the same bytes for the same content."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} can't be read: {error}") from error


def write_router(folder: Path, router: Router) -> None:
    """Write `router.json` and, if there is a look-up, `lookup.safetensors`."""
    from safetensors.numpy import save_file

    lookup = router.lookup
    content = {
        "boundaries": router.boundaries.tolist(),
        "prior": router.prior.tolist(),
        "parts": list(router.parts),
        "rules": {name: list(values) for name, values in router.rules.parameters.items()},
        "combiners": {
            key: {"weights": weights.tolist(), "bias": bias.tolist()}
            for key, (weights, bias) in router.combiners.items()
        },
        "lookup": None if lookup is None else {"neighbours": lookup.neighbours, "sharpness": lookup.sharpness},
    }
    write_json(folder / "router.json", content)
    if lookup is not None:
        save_file({"embeddings": lookup.embeddings_MH, "buckets": lookup.buckets_M}, folder / "lookup.safetensors")


def read_router(folder: Path) -> Router:
    """Read what `write_router` wrote."""
    from safetensors.numpy import load_file

    saved = read_json(folder / "router.json")
    lookup = None
    if saved["lookup"] is not None:
        tensors = load_file(folder / "lookup.safetensors")
        lookup = Lookup(tensors["embeddings"], tensors["buckets"], **saved["lookup"])
    combiners: Mapping[str, tuple[Array, Array]] = {
        key: (np.asarray(c["weights"]).reshape(-1, len(c["bias"])), np.asarray(c["bias"]))
        for key, c in saved["combiners"].items()
    }
    rules = RuleTable({name: (float(values[0]), float(values[1])) for name, values in saved["rules"].items()})
    boundaries, prior = np.asarray(saved["boundaries"], dtype=np.float64), np.asarray(saved["prior"])
    return Router(boundaries, prior, rules, lookup, combiners, tuple(saved["parts"]))


def write_calibration(folder: Path, calibration: Calibration, fallback: Array) -> None:
    """Write `calibration.json`: the maps, and the cumulative distribution to fall back on, shape (E,)."""
    content = {
        "knots": calibration.knots.tolist(),
        "first_turn": calibration.first_turn.tolist(),
        "later_turn": calibration.later_turn.tolist(),
        "fallback_cumulative": fallback.tolist(),
    }
    write_json(folder / "calibration.json", content)


def read_calibration(folder: Path) -> tuple[Calibration, Array]:
    """Read what `write_calibration` wrote."""
    saved = read_json(folder / "calibration.json")
    maps = (np.asarray(saved[name]) for name in ("knots", "first_turn", "later_turn"))
    return Calibration(*maps), np.asarray(saved["fallback_cumulative"])
