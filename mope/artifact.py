"""The folder of a saved predictor: what lies in it, written whole or not at all, checked before it is read.

    config.json         what the predictor is (`PredictorConfig`)
    *.safetensors       weights of the networks
    tokenizer.json      the encoder's tokenizer
    router.json         rules and combiners; lookup.safetensors the look-up's neighbours
    calibration.json    the calibration's maps and the distribution to fall back on
    thoughts.json       which share of a response are thoughts, if that was learned
    recalibration.json  what was learned while serving, if anything
    files.json          size and SHA-256 of all of the above; what it does not list is not loaded
    metrics.json, provenance.json, README.md, plots/    for people; not needed to predict
    onnx/               what mope-export made of the weights; a copy for serving has no weights

Hashes show damage, not origin, see `mope.sealed`. No pickle anywhere.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from mope import packaged
from mope.calibration import Calibration
from mope.config import FORMAT_VERSION, PredictorConfig, network_names
from mope.errors import ArtifactError, MopeError, is_panic
from mope.files import room_for, write_text
from mope.grid import Array
from mope.router import PARTS, Lookup, Router, parts_key
from mope.rules import RuleTable
from mope.sealed import (
    LISTING,
    MOST_BYTES,
    MOST_JSON,
    NEEDED,
    NETWORKS,
    Sealed,
    cleaned,
    parse_json,
    read_bytes,
    sha256_of,
    shown,
)
from mope.thoughts import ThoughtsModel

MOST_FOR_PEOPLE = 64 * 2**20  # bytes of a file that is not needed to predict
FOR_PEOPLE = ("metrics.json", "provenance.json", "README.md")
PLOTS, ENGINES = "plots", "tensorrt"
LEARNED, THOUGHTS = "recalibration.json", "thoughts.json"
_logger = logging.getLogger("mope")


@contextmanager
def writing(folder: Path, *, overwrite: bool = False, hint: str = "choose another") -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error.

    Args:
        folder: to write. A link stays, and the folder that it leads to is written.
        overwrite: replace a saved predictor that is there.
        hint: what to do where one is there and `overwrite` is not set.

    Raises:
        ArtifactError: `folder` would be lost, see `check_replaceable`, or the disk is full or read-only. What was there
            before stays.
    """
    folder = folder.resolve()
    check_replaceable(folder, overwrite=overwrite, hint=hint)
    with room_for(shown(folder), ArtifactError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            seal(temporary)
            check_replaceable(folder, overwrite=overwrite, hint=hint)  # hours may have passed
            put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path, *, overwrite: bool, hint: str = "choose another") -> None:
    """Refuse to replace what would be missed.

    Args:
        folder: that would be replaced.
        overwrite: whether a saved predictor may be.
        hint: what to do where it may not.

    Raises:
        ArtifactError: a file, a folder that is not a saved predictor, a saved predictor unless `overwrite`, or one
            beside whose files others lie.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / LISTING).exists():
        raise ArtifactError(f"{shown(folder)} exists and is not a saved predictor; choose another or remove it")
    if not overwrite:
        raise ArtifactError(f"{shown(folder)} is a saved predictor, which would be lost; {hint}")
    if foreign := foreign_files(folder):
        some = ", ".join(map(cleaned, foreign[:3])) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise ArtifactError(
            f"{shown(folder)} also holds files that are not of the predictor and would be lost: {some}; move them first"
        )


def foreign_files(folder: Path) -> list[str]:
    """Files in a saved predictor's folder that mope did not write, by their paths in it."""
    from mope.backends.onnx_backend import MANIFEST, ONNX_FOLDER, PRECISIONS, graph_file

    graphs = (MANIFEST, *(graph_file(network, precision) for network in NETWORKS for precision in PRECISIONS))
    own = {LISTING, *MOST_BYTES, *FOR_PEOPLE, *(f"{ONNX_FOLDER}/{graph}" for graph in graphs)}
    found: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_own = name in own or (path.parent.name == PLOTS and path.suffix == ".png" and name.count("/") == 1)
        if not (is_own or name.startswith(f"{ENGINES}/")) and (path.is_symlink() or not path.is_dir()):
            found.append(name)
    return found


def put_in_place(finished: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`, in place of what is there."""
    if not folder.exists():
        finished.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-replaced-", dir=folder.parent))
    replaced = aside / folder.name
    try:
        folder.rename(replaced)
        try:
            finished.rename(folder)
        except OSError:
            replaced.rename(folder)
            raise
    except OSError:
        with suppress(OSError):
            aside.rmdir()  # which fails if the old folder could not be put back: it stays there
        raise
    shutil.rmtree(aside, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write `files.json`: size and hash of each file that predictions depend on."""
    for path in folder.rglob("*"):  # some writers make files that their owner alone can read
        if not path.is_symlink():  # `chmod` would change what it points at
            path.chmod(0o755 if path.is_dir() else 0o644)
    names = sorted(name for name in MOST_BYTES if os.path.lexists(folder / name))
    write_json(folder / LISTING, {name: _fingerprint(folder, name) for name in names})


def _fingerprint(folder: Path, name: str) -> dict[str, Any]:
    return {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder, name, MOST_BYTES[name])}


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Let whatever a damaged or hostile predictor makes fail end in one line.

    Raises:
        ArtifactError: in place of any error that is not one of mope's.
    """
    try:
        yield
    except MopeError:
        raise
    except Exception as error:
        raise _unloadable(folder, error) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise _unloadable(folder, error) from error


def _unloadable(folder: Path, error: BaseException) -> ArtifactError:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {cleaned(lines[0])}" if lines else type(error).__name__
    return ArtifactError(f"{shown(folder)} can't be loaded ({reason}); copy the whole folder again")


def check(folder: Path) -> PredictorConfig:
    """Read the config of a saved predictor after checking that every file is there and unchanged.

    Raises:
        ArtifactError: not a saved predictor, a missing or changed file, or an unknown format version.
    """
    saved = Sealed(folder)
    config = config_of(saved)
    for name in saved.files:
        if name != "config.json":
            saved.verify(name)
    return config


def read_config(folder: Path) -> PredictorConfig:
    """Read what a saved predictor is, without looking at its other files.

    Raises:
        ArtifactError: no config, an unknown format version, or a value that cannot be used.
    """
    return config_of(Sealed(folder))


def config_of(saved: Sealed) -> PredictorConfig:
    """The config of a saved predictor, see `read_config`."""
    folder, content = saved.folder, saved.json("config.json")
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        is_newer = type(version) is int and version > FORMAT_VERSION
        raise ArtifactError(
            f"{shown(folder)} has format version {cleaned(version, 40)}; this mope reads version {FORMAT_VERSION}: "
            f"{'update mope (pip install -U mope-llm)' if is_newer else 'train or convert it anew'}"
        )
    if missing := [name for name in NEEDED if name not in saved]:
        raise ArtifactError(
            f"{shown(folder / LISTING)} does not list {', '.join(missing)}; copy the whole folder again"
        )
    try:
        return PredictorConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = cleaned(".".join(map(str, first["loc"])) or "config", 80)
        raise ArtifactError(f"{shown(folder / 'config.json')}: {where}: {cleaned(first['msg'])}") from error


def find(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a predictor: a folder, a packaged predictor's, or what the Hugging Face Hub has under a name.

    Args:
        name_or_path: a path, the name of a packaged predictor, or a Hub id such as `"user/name"`.
        revision: revision of a Hub id.

    Of a Hub id only files of a predictor are fetched: those that `files.json` may list, ONNX graphs, and what is for
    people. TensorRT engines are not: they hold code, and belong to one machine.

    Raises:
        ArtifactError: a Hub id that the Hub does not give. A path is not looked at.
    """
    path = packaged.located(name_or_path)
    name = str(name_or_path)
    if not path.exists() and (told := packaged.unfinished(path)):
        raise ArtifactError(told)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from mope.backends.onnx_backend import MANIFEST, ONNX_FOLDER, PRECISIONS, graph_file

    graphs = (MANIFEST, *(graph_file(network, precision) for network in NETWORKS for precision in PRECISIONS))
    patterns = [LISTING, *MOST_BYTES, *FOR_PEOPLE, "plots/*.png", *(f"{ONNX_FOLDER}/{graph}" for graph in graphs)]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = cleaned(name)
        made = f"; mope-train DATA --output {where} would make it" if path.parent.is_dir() else ""
        raise ArtifactError(
            f"no folder {where}, and the Hugging Face Hub gave none: {cleaned(reason, 400)}{made}"
        ) from error


def weight_files(config: PredictorConfig) -> list[str]:
    """Names of an artifact's weight files, in the order of `mope.config.network_names`."""
    return [f"{name}.safetensors" for name in network_names(config)]


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
    missing = [name for name in weight_files(config) if not (folder / name).exists()]
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
    provenance = read_json(path) if path.exists() else None
    command = provenance.get("command") if isinstance(provenance, dict) else None
    named = [after for flag, after in pairwise(command if isinstance(command, list) else ()) if flag == "--recipe"]
    return next((name for name in named if name in packaged.recipes()), None)


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (no NaN), the same bytes for the same content; whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path, most_bytes: int = MOST_JSON) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: it is missing, no regular file, too large, or not strict JSON.
    """
    return parse_json(read_bytes(path.parent, path.name, most_bytes), path)


def read_learned(saved: Sealed) -> Any:
    """What a predictor learned while serving; None if it was saved without.

    Raises:
        ArtifactError: it is there and `files.json` does not list it: no mope ever saved it like this.
    """
    if LEARNED not in saved and os.path.lexists(saved.folder / LEARNED):
        raise ArtifactError(
            f"{shown(saved.folder / LEARNED)} is not listed in {LISTING}, so it was not saved with this predictor; "
            "remove it, or copy the whole folder again"
        )
    return saved.json(LEARNED) if LEARNED in saved else None


def read_thoughts(saved: Sealed) -> ThoughtsModel | None:
    """Which share of a response are thoughts; None if the predictor did not learn that.

    Raises:
        ArtifactError: a value that cannot be used.
    """
    if THOUGHTS not in saved:
        return None
    where = saved.folder / THOUGHTS
    with loading(where):
        return ThoughtsModel.model_validate(saved.json(THOUGHTS))


def copy_for_people(folder: Path, target: Path, *, plots: bool = True) -> None:
    """Copy what an artifact has for people and no prediction depends on; what is no regular file is left out."""
    names = [name for name in FOR_PEOPLE if os.path.lexists(folder / name)]
    drawn = sorted((folder / "plots").glob("*.png")) if plots else []
    for name in [*names, *(f"plots/{path.name}" for path in drawn)]:
        (target / name).parent.mkdir(exist_ok=True)
        try:
            sha256_of(folder, name, MOST_FOR_PEOPLE, target / name)
        except ArtifactError as error:
            _logger.warning("left out of the copy: %s", error)


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


def read_router(saved: Sealed, num_experts: int) -> Router:
    """Read what `write_router` wrote.

    Args:
        saved: the predictor.
        num_experts: K.

    Raises:
        ArtifactError: a value that cannot be used.
    """
    from safetensors.numpy import load

    content, where = saved.json("router.json"), saved.folder / "router.json"
    with loading(where):
        boundaries = _numbers(content["boundaries"], where, (num_experts - 1,))
        prior = _numbers(content["prior"], where, (num_experts,))
        rules = {str(name): _numbers(pair, where, (2,)).tolist() for name, pair in content["rules"].items()}
        parts = tuple(content["parts"])
        combiners: dict[str, tuple[Array, Array]] = {}
        for key, combiner in content["combiners"].items():
            bias = _numbers(combiner["bias"], where, (num_experts,))
            weights = np.asarray(combiner["weights"], dtype=np.float64).reshape(-1, num_experts)
            num_parts = 0 if key == "prior" else len(str(key).split("+"))
            combiners[key] = _numbers(weights, where, (num_parts * num_experts, num_experts)), bias
        lookup = None
        if content["lookup"] is not None:
            tensors = load(saved.read("lookup.safetensors"))
            lookup = Lookup(tensors["embeddings"], tensors["buckets"], **content["lookup"])
        is_right = (
            set(parts) <= set(PARTS)
            and (np.diff(boundaries) > 0).all()
            and (boundaries > 0).all()
            and (prior >= 0).all()
            and abs(prior.sum() - 1.0) < 1e-6
            and all(deviation > 0 for _, deviation in rules.values())
            and (num_experts == 1 or not parts or parts_key(parts) in combiners)
            and ("lookup" not in parts or lookup is not None)
            and (lookup is None or _is_lookup(lookup, num_experts))
        )
    if not is_right:
        raise _unusable(where)
    table = RuleTable({name: (mean, deviation) for name, (mean, deviation) in rules.items()})
    return Router(boundaries, prior, table, lookup, combiners, parts)


def _is_lookup(lookup: Lookup, num_experts: int) -> bool:
    embeddings, buckets = lookup.embeddings_MH, lookup.buckets_M
    return bool(
        embeddings.ndim == 2
        and 0 < len(embeddings) == len(buckets)
        and embeddings.dtype.kind == "f"
        and buckets.ndim == 1
        and buckets.dtype.kind == "u"
        and buckets.max() < num_experts
        and np.isfinite(embeddings).all()
        and type(lookup.neighbours) is int
        and 0 < lookup.neighbours <= 10_000
        and isinstance(lookup.sharpness, int | float)
        and 0 <= lookup.sharpness <= 300
    )


def _numbers(value: Any, where: Path, shape: tuple[int, ...]) -> Array:
    """Finite numbers of a shape, float64.

    Raises:
        ArtifactError: they are others.
    """
    numbers = np.asarray(value, dtype=np.float64)
    if numbers.shape != shape or not np.isfinite(numbers).all() or np.abs(numbers).max(initial=0.0) > 1e12:
        raise _unusable(where)
    return numbers


def _unusable(where: Path) -> ArtifactError:
    return ArtifactError(f"{shown(where)} holds numbers that no predictor has; copy the whole folder again")


def write_calibration(folder: Path, calibration: Calibration, fallback: Array) -> None:
    """Write `calibration.json`: the maps, and the cumulative distribution to fall back on, shape (E,)."""
    content = {
        "knots": calibration.knots.tolist(),
        "first_turn": calibration.first_turn.tolist(),
        "later_turn": calibration.later_turn.tolist(),
        "fallback_cumulative": fallback.tolist(),
    }
    write_json(folder / "calibration.json", content)


def read_calibration(saved: Sealed, num_edges: int) -> tuple[Calibration, Array]:
    """Read what `write_calibration` wrote.

    Args:
        saved: the predictor.
        num_edges: E.

    Raises:
        ArtifactError: a value that cannot be used.
    """
    content, where = saved.json("calibration.json"), saved.folder / "calibration.json"
    with loading(where):
        num_knots = len(content["knots"])
        maps = [_numbers(content[name], where, (num_knots,)) for name in ("knots", "first_turn", "later_turn")]
        fallback = _numbers(content["fallback_cumulative"], where, (num_edges,))
        is_right = (np.diff(maps[0]) > 0).all() and all(
            np.array_equal(values[[0, -1]], [0.0, 1.0]) and (np.diff(values) >= 0).all() for values in maps
        )
    if not (is_right and (np.diff(fallback) >= 0).all() and fallback[0] >= 0 and 0 < fallback[-1] <= 1):
        raise _unusable(where)
    return Calibration(*maps), fallback
