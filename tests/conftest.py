"""What every test runs under: offline, seeded, two threads, caches in a temporary folder; and tiny predictors.

Imports nothing of mope before a fixture is asked for it. The environment is set before any test module imports a
library that reads it.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    from commands import Run

    from mope.predictor import LengthPredictor

_caches = tempfile.TemporaryDirectory(prefix="mope-tests-")  # removed when Python exits
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=str(Path(_caches.name, "huggingface")),
    MOPE_CACHE=str(Path(_caches.name, "mope")),
    MPLBACKEND="agg",
    OMP_NUM_THREADS="2",  # torch, LightGBM, faiss and scikit-learn all start with this many
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("HF_TOKEN", None)

# the same examples on every machine, and no time limit on one that is busy
hypothesis.settings.register_profile("mope", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("mope")

LOOPBACK = ("localhost", "127.0.0.1", "::1", "", None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; its status, stdout and stderr."""
    from mope import console as terminal
    from mope.cli import main

    def call(*arguments: str, program: Callable[[list[str]], int] = main) -> tuple[int, str, str]:
        terminal.console.cache_clear()  # its stderr is the one that was there when it was made
        status = program([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(autouse=True)
def own_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test seals by another secret is no seal in the next one."""
    if carried := sys.modules.get("mope.serving_hooks.carried"):
        monkeypatch.setattr(carried.seals, "_blank", carried.seals._blank)
        monkeypatch.setattr(carried.seals, "num_refused", 0)


@pytest.fixture(autouse=True, scope="session")
def offline() -> Iterator[None]:
    """Let a test that reaches for the network fail at once, and say so."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise RuntimeError(f"a test tried to reach {address[0]}: tests are offline")
        connect(self, address)

    def guarded_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in LOOPBACK:
            raise RuntimeError(f"a test tried to look up {host}: tests are offline")
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_resolve)
        yield


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Folder of the committed predictor: three experts, shared design."""
    return Path(__file__).parent / "data" / "tiny"


@pytest.fixture
def predictor(tiny: Path) -> LengthPredictor:
    """The committed predictor, freshly loaded, in torch."""
    from mope.predictor import LengthPredictor

    return LengthPredictor.from_pretrained(tiny, backend="torch")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BERT with one layer of 16 hidden units and random weights."""
    from make_tiny_artifact import save_encoder

    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_separate(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Folder of a predictor like the committed one, in the separate design with two experts."""
    from make_tiny_artifact import make_predictor

    return make_predictor(tiny_encoder, "separate", 2).save_pretrained(tmp_path_factory.mktemp("separate") / "tiny")


@pytest.fixture(scope="session")
def graphs_made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let each network become a graph once: the exporter takes seconds even for a tiny one."""
    from mope.backends.network import MopeNetwork
    from mope.export import graphs, precisions, run

    folder = tmp_path_factory.mktemp("graphs")

    def write_graph(network: MopeNetwork, path: Path, max_tokens: int) -> None:
        digest = hashlib.sha256(str(max_tokens).encode())
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tensor.dtype}".encode() + tensor.numpy().tobytes())
        made = folder / digest.hexdigest()
        if not made.exists():
            graphs.write_graph(network, made, max_tokens)
        shutil.copyfile(made, path)

    with pytest.MonkeyPatch.context() as patch:
        for module in (precisions, run):
            patch.setattr(module, "write_graph", write_graph)
        yield


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_separate: Path, graphs_made_once: None
) -> dict[str, Path]:
    """Folders of both with ONNX graphs in fp32, by their design; a test that changes one takes a copy."""
    from mope.export.run import export_onnx

    folders = {}
    for name, source in (("shared", tiny), ("separate", tiny_separate)):
        folders[name] = shutil.copytree(source, tmp_path_factory.mktemp("exported") / name)
        export_onnx(folders[name], data="none")
    return folders
