"""Artifacts that were tampered with, their hashes made anew: each predicts sensibly, or is an ArtifactError."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope import LengthPredictor, artifact
from mope.errors import ArtifactError
from mope.packaged import PREDICTORS
from mope.request import Request

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 2**31, 2**63, 10**18, -(10**18), 10**400, 1e308, -1e308, math.nan, math.inf,
    -math.inf, 1e-320, "", "x", "1.5", "a" * 1000, "\x1b[31mred", "\ud800", [], {}, [0], [[1]], [None], {"a": 1},
    [1e308] * 5, [[[[[[1]]]]]], ["gate", "gate"], "../../etc/passwd", "/dev/zero",
)  # fmt: skip
PREDICTED = Request(prompt="hello")
PROMPTS = ("Write a list of 5 words please", "Explain TCP slow start in detail.", "\U0001f44b")

Change = Callable[[random.Random, Path], None]


def nodes(content: Any) -> Iterator[tuple[Any, Any]]:
    """Each place of a JSON value: what holds it, and under which key; of long lists the first few."""
    keys: Any = list(content) if isinstance(content, dict) else ()
    if isinstance(content, list):
        keys = range(min(len(content), 6))
    for key in keys:
        yield content, key
        yield from nodes(content[key])


def of_json(name: str) -> Change:
    """Replace or remove some values of a JSON file, or nest it deeply, or write it twice."""

    def change(rng: random.Random, folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            places = list(nodes(content))
            holder, key = rng.choice(places)
            if isinstance(holder, list) and rng.random() < 0.3:
                holder[:] = rng.choice([holder[:-1], holder + holder[:1], holder[::-1], []])
            elif isinstance(holder, dict) and rng.random() < 0.2:
                holder.pop(key, None)
            elif isinstance(holder, dict) or key < len(holder):
                value = holder[key]
                scaled = [value * factor for factor in (-1, 2, 1e9)] if type(value) in (int, float) else []
                holder[key] = copy.deepcopy(rng.choice([*VALUES, *scaled]))
        text = json.dumps(content)
        path.write_bytes(rng.choice([text] * 20 + ["[" * 5000 + text, text[: len(text) // 2], text * 2]).encode())

    return change


def of_bytes(name: str) -> Change:
    """Flip some bits, or cut a file."""

    def change(rng: random.Random, folder: Path) -> None:
        path = folder / name
        content = bytearray(path.read_bytes())
        reach = len(content) if rng.random() < 0.5 else min(len(content), 2000)  # where the names and sizes are
        for _ in range(rng.choice((1, 5, 20))):
            content[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        path.write_bytes(content[: rng.choice([None, None, None, rng.randrange(len(content))])])

    return change


def of_tensors(name: str) -> Change:
    """Other shapes, types and numbers under the names of a safetensors file, or other names."""

    def change(rng: random.Random, folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / name)
        key = rng.choice(sorted(tensors))
        tensor = tensors[key]
        changed = {
            "nan": lambda: np.full_like(tensor, np.nan) if tensor.dtype.kind == "f" else tensor,
            "huge": lambda: np.full_like(tensor, np.inf) if tensor.dtype.kind == "f" else tensor + 200,
            "short": lambda: tensor[:-1].copy(),
            "flat": lambda: tensor.reshape(-1).copy(),
            "double": lambda: tensor.astype(np.float64),
            "whole": lambda: tensor.astype(np.int64),
            "empty": lambda: tensor[:0].copy(),
        }[rng.choice(("nan", "huge", "short", "flat", "double", "whole", "empty"))]()
        if rng.random() < 0.2:
            del tensors[key]
            key = rng.choice(["other", key + ".x", "\x1b[31m"])
        tensors[key] = changed
        save_file(tensors, folder / name)

    return change


def sealed_again(folder: Path) -> None:
    """Make hashes anew, of everything, so that they hide nothing of what comes after them."""
    artifact.seal(folder)
    manifest = folder / "onnx" / "manifest.json"
    try:
        said = json.loads(manifest.read_text())
        for graph in said["graphs"]:
            graph["sha256"] = hashlib.sha256((manifest.parent / graph["file"]).read_bytes()).hexdigest()
        manifest.write_text(json.dumps(said))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # it was the manifest


def outcome(folder: Path, backend: str) -> str:
    """`"refused"` or `"predicts"`. Anything else fails."""
    try:
        predictor = LengthPredictor.from_pretrained(folder, backend=backend, cache_size=0)
    except ArtifactError as error:
        return "refused" if str(error).isprintable() else repr(error)
    for prompt in PROMPTS:
        for llm in (None, "gpt-4", "newllm-7b"):
            prediction = predictor.predict(prompt, target_llm=llm)
            check(prediction.edges, prediction.cumulative)
            assert 0 < prediction.quantile(0.1) <= prediction.median <= prediction.quantile(0.9) < math.inf
            assert 0 < prediction.mean < math.inf
            predictor.observe(prediction, 17)
    check(predictor.fallback("no text", PREDICTED).edges, predictor.fallback("no text", PREDICTED).cumulative)
    return "predicts"


def check(edges: Any, cumulative: Any) -> None:
    assert np.isfinite(edges).all()
    assert (np.diff(edges) > 0).all()
    assert np.isfinite(cumulative).all()
    assert 0 <= cumulative[0] <= cumulative[-1] <= 1 + 1e-9
    assert (np.diff(cumulative) >= -1e-9).all()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    """A tiny one for torch, and one of the packaged for ONNX Runtime; both learned something."""
    made = {}
    for backend, source in (("torch", tiny), ("onnx", PREDICTORS / "chat-micro")):
        predictor = LengthPredictor.from_pretrained(source, backend=backend)
        for number in range(40):
            llm = "gpt-4" if number % 2 else "newllm"
            predictor.observe(
                predictor.predict(f"hi {number}", target_llm=llm), 30 + number, time_s=1.7e9 + 300 * number
            )
        made[backend] = predictor.save_pretrained(tmp_path_factory.mktemp(backend) / "original")
    return made


BOTH: dict[str, Change] = {
    name: of_json(name)
    for name in ("config.json", "router.json", "calibration.json", "recalibration.json", "tokenizer.json")
}
CHANGES: dict[str, dict[str, Change]] = {
    "torch": {
        **BOTH,
        **{f"bytes of {name}": of_bytes(name) for name in ("model.safetensors", "lookup.safetensors", "router.json")},
        **{f"tensors of {name}": of_tensors(name) for name in ("model.safetensors", "lookup.safetensors")},
    },
    "onnx": {
        **BOTH,
        "manifest": of_json("onnx/manifest.json"),
        "bytes of the graph": of_bytes("onnx/model.int8.onnx"),
        "bytes of the tokenizer": of_bytes("tokenizer.json"),
    },
}
NUM_EACH = 20


@pytest.mark.parametrize(("backend", "what"), [(backend, what) for backend, whats in CHANGES.items() for what in whats])
def test_it_predicts_or_is_refused(originals: dict[str, Path], tmp_path: Path, backend: str, what: str) -> None:
    found: Counter[str] = Counter()
    for seed in range(NUM_EACH):
        folder = Path(shutil.copytree(originals[backend], tmp_path / str(seed)))
        rng = random.Random(f"{backend} {what} {seed}")
        CHANGES[backend][what](rng, folder)
        sealed_again(folder)
        found[outcome(folder, backend)] += 1
        shutil.rmtree(folder)
    assert found["refused"] > 0  # or it changes nothing
    assert set(found) <= {"refused", "predicts"}


def test_untouched_originals_predict(originals: dict[str, Path]) -> None:
    for backend, folder in originals.items():
        sealed_again(folder)
        assert outcome(folder, backend) == "predicts"
