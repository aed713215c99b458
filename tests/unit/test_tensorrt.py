"""TensorRT: its parser takes every graph, profiles follow the data, engines run only where they were built for.

Engines are really built, with TensorRT-RTX, which needs no GPU. Running them is checked with stand-ins for TensorRT and
CUDA that run the same graphs on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from encoded import random_inputs, random_requests
from stand_ins import CudaRuntime, TensorRT

from mope import artifact
from mope.backends.buckets import Bucket
from mope.backends.cuda_runtime import Cuda, Gpu
from mope.backends.onnx_backend import Graph, OnnxBackend, find_graphs
from mope.backends.tensorrt_backend import TensorrtBackend, required
from mope.backends.torch_backend import TorchBackend
from mope.errors import ArtifactError, ConfigError, DataError, ExportError, MissingExtraError
from mope.export.tensorrt import EngineBuilder, export_tensorrt, profiles
from mope.grid import Array
from mope.provenance import file_sha256

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx is not installed; it has wheels for Linux on x86-64")
# TensorRT-RTX takes the calls and measures nothing
pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
LENGTHS = [3, 4, 4, 5, 9, 12, 18]


@pytest.fixture
def copy(exported: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(exported["shared"], tmp_path / "copy")


class Machine:
    """A machine with a GPU and TensorRT, or rather with stand-ins for them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.change()

    def change(self, *, gpu: str = "NVIDIA A100", sm: tuple[int, int] = (8, 0), tensorrt: str = "11.4.0.106") -> None:
        self.cuda = CudaRuntime(gpu, sm)
        self.tensorrt = TensorRT(self.cuda, tensorrt)
        modules = {"cuda.bindings.runtime": self.cuda, "tensorrt": self.tensorrt}
        for where in ("mope.backends.cuda_runtime", "mope.backends.tensorrt_backend", "mope.export.tensorrt"):
            self._patch.setattr(f"{where}.require", lambda name, *_: modules.get(name) or importlib.import_module(name))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


# which shapes


def test_profiles_follow_the_lengths_of_real_inputs() -> None:
    lengths = [10] * 50 + [60] * 45 + [200] * 5
    shapes = profiles(lengths, max_tokens=300, batch_sizes=(1, 32))
    assert shapes == [(1, 16), (1, 64), (1, 300), (32, 200), (32, 300)]  # the longest of 32 is 200, more often than not
    assert profiles(lengths[:50], 300, (1, 32)) == [(1, 16), (1, 300), (32, 16), (32, 300)]
    assert profiles([5], 20, (4, 4)) == [(4, 8), (4, 20)]


def test_no_profile_is_wider_than_the_predictor() -> None:
    assert profiles([19, 20, 500], 20, (1, 8)) == [(1, 20), (8, 20)]


def test_single_requests_have_finer_profiles_than_batches() -> None:
    lengths = np.random.default_rng(0).lognormal(3.6, 1.2, 5000).clip(1, 512).astype(int)
    shapes = profiles(lengths, 512)
    per_batch = {batch: [shape.tokens for shape in shapes if shape.batch == batch] for batch in (1, 2, 4, 8, 16, 32)}
    assert [len(widths) for widths in per_batch.values()] == [6, 2, 2, 2, 2, 2]
    assert all(widths[-1] == 512 for widths in per_batch.values())
    assert all(width % 8 == 0 for widths in per_batch.values() for width in widths)
    # half of all batches of eight are no wider than their narrower profile
    widest = np.random.default_rng(1).choice(lengths, (4000, 8)).max(axis=1)
    assert 0.45 < (widest <= per_batch[8][0]).mean() < 0.6


@pytest.mark.parametrize(
    ("lengths", "batches", "error", "message"),
    [
        ([], (1,), DataError, "0 input lengths"),
        ([0, 4], (1,), DataError, "the smallest 0; expected some, from 1 on"),
        ([4], (), ConfigError, "batch sizes: got []"),
        ([4], (0, 1), ConfigError, "batch sizes: got [0, 1]"),
    ],
)
def test_profiles_of_nothing(lengths: Any, batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        profiles(lengths, 20, batches)
    assert message in str(caught.value)


# building, with TensorRT-RTX for an A100 that is not there


def rtx_builder(**options: Any) -> EngineBuilder:
    import tensorrt_rtx

    return EngineBuilder(tensorrt_rtx, compute_capability="SM80", **options)


@needs_rtx
@pytest.mark.parametrize(("design", "graph"), [("shared", 0), ("separate", 0), ("separate", 1)])
def test_every_graph_becomes_an_engine(exported: dict[str, Path], design: str, graph: int) -> None:
    config = artifact.check(exported[design])
    _, paths = find_graphs(exported[design], config, "fp32")
    shapes = profiles(LENGTHS, config.max_input_tokens, (1, 32))
    assert len(shapes) > 2
    built = rtx_builder(hardware_compatibility="ampere_plus").build(paths[graph], shapes, precision="fp32")
    assert len(built.plan) > 10_000
    again = rtx_builder().build(paths[graph], shapes[:1], precision="fp32", timing_cache=built.timing_cache)
    assert len(again.plan) < len(built.plan)  # kernels for one shape, not for all


@needs_rtx
@pytest.mark.skipif(
    importlib.util.find_spec("mope.export.precisions") is None, reason="no graphs of less precision yet"
)
@pytest.mark.parametrize("precision", ["fp16", "qdq"])
@pytest.mark.parametrize(("design", "network"), [("shared", 0), ("separate", 0), ("separate", 1)])
def test_every_graph_of_less_precision_becomes_an_engine(
    exported: dict[str, Path], tmp_path: Path, design: str, network: int, precision: str
) -> None:
    precisions = importlib.import_module("mope.export.precisions")
    config = artifact.check(exported[design])
    path = tmp_path / "graph.onnx"
    if precision == "fp16":
        own = TorchBackend.load(exported[design], config).networks[network]
        precisions.write_fp16(own, path, config.max_input_tokens)
    else:
        _, paths = find_graphs(exported[design], config, "fp32")
        precisions.write_qdq(paths[network].path, path, [random_inputs(config, LENGTHS)])
    shapes = profiles(LENGTHS, config.max_input_tokens, (1, 8))
    assert len(rtx_builder().build(Graph.made_here(path), shapes, precision=precision).plan) > 10_000


@needs_rtx
def test_an_operator_that_tensorrt_does_not_know_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    config = artifact.check(exported["shared"])
    _, (graph,) = find_graphs(exported["shared"], config, "fp32")
    model = onnx.load(graph.path)
    node = next(node for node in model.graph.node if node.op_type in ("Erf", "Gelu"))
    node.op_type = "SecretGelu"
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ExportError, match=r"TensorRT .* can't read foreign\.onnx: .*SecretGelu"):
        rtx_builder().build(Graph.made_here(tmp_path / "foreign.onnx"), [Bucket(1, 8)], precision="fp32")


@needs_rtx
def test_shapes_that_the_graph_cannot_have_are_refused(exported: dict[str, Path]) -> None:
    config = artifact.check(exported["shared"])
    _, (graph,) = find_graphs(exported["shared"], config, "fp32")
    too_wide = config.encoder_config["max_position_embeddings"] * 2
    with pytest.raises(ExportError, match=r"can't build model"):
        rtx_builder().build(graph, [Bucket(1, too_wide)], precision="fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hardware_compatibility": "all"}, "got 'all'"), ({"optimization_level": 9}, "0 to 5; got 9")],
)
def test_options_of_the_builder(machine: Machine, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineBuilder(machine.tensorrt, **options)


# exporting and running, with stand-ins


@pytest.mark.parametrize("design", ["shared", "separate"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_engines_say_what_the_graphs_say(
    exported: dict[str, Path], tmp_path: Path, machine: Machine, design: str, cuda_graphs: bool
) -> None:
    folder = shutil.copytree(exported[design], tmp_path / design)
    config = artifact.check(folder)
    export_tensorrt(folder, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1, 4))
    plain = OnnxBackend.load(folder, config)
    backend = TensorrtBackend.load(folder, config, precision="fp32", cuda_graphs=cuda_graphs)

    def choose(gate_BK: Array, _: Array) -> Array:
        return gate_BK >= np.median(gate_BK, axis=1, keepdims=True)

    launches = machine.cuda.num_launches
    for seed, lengths in enumerate(([3], [20], [7, 3, 9], [4] * 9, list(range(1, 21)))):
        encoded = random_requests(config, lengths, seed)
        one, other = plain.run(encoded, choose), backend.run(encoded, choose)
        np.testing.assert_allclose(one.gate_BK, other.gate_BK, atol=2e-5)  # sums of another order
        np.testing.assert_allclose(one.heads_BKN, other.heads_BKN, atol=2e-5)
        np.testing.assert_allclose(one.embedding_BH, other.embedding_BH, atol=2e-5)
    assert (machine.cuda.num_launches > launches) == cuda_graphs
    backend.save(tmp_path)
    assert (tmp_path / f"{'model' if design == 'shared' else 'gate'}.safetensors").exists()


def test_threads_take_turns(copy: Path, machine: Machine) -> None:
    config = artifact.check(copy)
    export_tensorrt(copy, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1, 2))
    plain = OnnxBackend.load(copy, config)
    backend = TensorrtBackend.load(copy, config, precision="fp32")
    batches = [random_requests(config, [1 + seed % 20] * (1 + seed % 2), seed) for seed in range(16)]
    found: list[Any] = [None] * len(batches)

    def work(start: int) -> None:
        for i in range(start, len(batches), 4):
            found[i] = backend.run(batches[i], lambda *_: np.array(True))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for encoded, other in zip(batches, found, strict=True):
        np.testing.assert_allclose(plain.run(encoded, lambda *_: np.array(True)).heads_BKN, other.heads_BKN, atol=2e-5)


def test_the_manifest_and_what_is_built_again(copy: Path, machine: Machine) -> None:
    manifest = export_tensorrt(copy, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1, 4))
    (engine,) = manifest["engines"]
    assert (engine["file"], engine["tensorrt"], engine["gpu"]) == (
        "model.fp32.engine",
        "11.4.0.106",
        "NVIDIA A100 (SM80)",
    )
    shapes = profiles(LENGTHS, artifact.check(copy).max_input_tokens, (1, 4))
    assert engine["profiles"] == [list(shape) for shape in shapes]
    assert engine["max_difference"] < 1e-3
    assert json.loads((copy / "tensorrt" / "manifest.json").read_text()) == manifest
    assert str(copy) not in json.dumps(manifest)
    assert (copy / "tensorrt" / "timing.cache").read_bytes() == b"measured."
    percentiles = manifest["input_length_percentiles"]
    assert (percentiles[0], percentiles[50], percentiles[100]) == (3, 5, 18)

    assert export_tensorrt(copy, precision="fp32", batch_sizes=(1, 4)) == manifest  # by the lengths of before
    assert machine.tensorrt.num_built == 1
    export_tensorrt(copy, precision="fp32", batch_sizes=(1, 2))
    assert machine.tensorrt.num_built == 2
    assert (copy / "tensorrt" / "timing.cache").read_bytes() == b"measured.measured."
    assert sorted(path.name for path in (copy / "tensorrt").iterdir()) == [
        "manifest.json", "model.fp32.engine", "timing.cache",
    ]  # fmt: skip
    artifact.check(copy)


def test_a_timing_cache_of_another_gpu_is_left_out(copy: Path, machine: Machine) -> None:
    export_tensorrt(copy, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1,))
    (copy / "tensorrt" / "timing.cache").write_bytes(b"of another GPU")
    machine.change(gpu="NVIDIA H200", sm=(9, 0))
    export_tensorrt(copy, precision="fp32", batch_sizes=(1,))
    assert (copy / "tensorrt" / "timing.cache").read_bytes() == b"measured."


@pytest.mark.parametrize(
    ("flags", "other", "message"),
    [
        ({}, {"gpu": "NVIDIA H200", "sm": (9, 0)}, r"the GPU NVIDIA A100 \(SM80\), here is NVIDIA H200 \(SM90\)"),
        ({}, {"tensorrt": "11.5.0"}, "TensorRT 11.4.0.106, here is 11.5.0"),
        (
            {"hardware_compatibility": "ampere_plus"},
            {"gpu": "NVIDIA T4", "sm": (7, 5)},
            "any of SM80 or newer, here is NVIDIA T4",
        ),
        ({"version_compatible": True}, {"tensorrt": "12.0.1"}, r"TensorRT 11\.x, here is 12\.x"),
    ],
)
def test_an_engine_of_another_machine_is_refused(
    copy: Path, machine: Machine, flags: Any, other: Any, message: str
) -> None:
    export_tensorrt(copy, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1,), **flags)
    machine.change(**other)
    with pytest.raises(ArtifactError, match=message + ".*type: mope-export .* --to tensorrt") as caught:
        TensorrtBackend.load(copy, artifact.check(copy), precision="fp32")
    assert "\n" not in str(caught.value)


def test_compatible_engines_run_elsewhere(copy: Path, machine: Machine) -> None:
    export_tensorrt(
        copy,
        precision="fp32",
        input_lengths=LENGTHS,
        batch_sizes=(1,),
        hardware_compatibility="ampere_plus",
        version_compatible=True,
    )
    machine.change(gpu="NVIDIA H200", sm=(9, 0), tensorrt="11.9.0")
    assert TensorrtBackend.load(copy, artifact.check(copy), precision="fp32").name == "tensorrt"


def test_an_engine_of_another_graph_or_a_changed_one_is_refused(copy: Path, machine: Machine) -> None:
    config = artifact.check(copy)
    export_tensorrt(copy, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1,))
    engine = copy / "tensorrt" / "model.fp32.engine"
    engine.write_bytes(engine.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=r"model\.fp32\.engine is missing or not the file that was built"):
        TensorrtBackend.load(copy, config, precision="fp32")
    graph = copy / "onnx" / "model.fp32.onnx"
    model = onnx.load(graph)
    model.doc_string = "trained again"
    onnx.save(model, graph)
    manifest = json.loads((copy / "onnx" / "manifest.json").read_text())
    manifest["graphs"][0]["sha256"] = file_sha256(graph)
    (copy / "onnx" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"was built for the graph [0-9a-f]{40}, here is [0-9a-f]{40}; type:"):
        TensorrtBackend.load(copy, config, precision="fp32")
    shutil.rmtree(copy / "tensorrt")
    with pytest.raises(ArtifactError, match="no TensorRT engine of model in fp32; type: mope-export"):
        TensorrtBackend.load(copy, config, precision="fp32")


@pytest.mark.parametrize("version_compatible", [False, True])
def test_code_of_an_engine_runs_only_where_it_was_built_with_some(
    copy: Path, machine: Machine, version_compatible: bool
) -> None:
    options = {"input_lengths": LENGTHS, "batch_sizes": (1,), "version_compatible": version_compatible}
    export_tensorrt(copy, precision="fp32", **options)
    TensorrtBackend.load(copy, artifact.check(copy), precision="fp32")
    assert machine.tensorrt.runtimes
    assert {runtime.engine_host_code_allowed for runtime in machine.tensorrt.runtimes} == {version_compatible}


def test_a_damaged_manifest_of_engines_is_one_line(copy: Path, machine: Machine) -> None:
    export_tensorrt(copy, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1,))
    path = copy / "tensorrt" / "manifest.json"
    saved = json.loads(path.read_text())
    for engines in (None, [3], [{}], [{"network": "../../x", "precision": "fp32"}]):
        path.write_text(json.dumps({**saved, "engines": engines}))
        with pytest.raises(ArtifactError, match="is no manifest of mope-export"):
            TensorrtBackend.load(copy, artifact.check(copy), precision="fp32")
    saved["engines"].append({**saved["engines"][0], "network": "../../x"})
    path.write_text(json.dumps(saved))
    (copy.parent / "x.fp32.engine").write_text("not of this folder")
    export_tensorrt(copy, precision="fp32", batch_sizes=(1,))
    assert [one["network"] for one in json.loads(path.read_text())["engines"]] == ["model"]
    assert {one.name for one in (copy / "tensorrt").iterdir()} >= {"manifest.json", "model.fp32.engine"}


def test_an_engine_that_does_not_say_what_its_graph_says_never_appears(copy: Path, machine: Machine) -> None:
    machine.tensorrt.scale = 1.5
    with pytest.raises(ExportError, match=r"as an engine: .* differs from ONNX Runtime by .* at 1x"):
        export_tensorrt(copy, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1,))
    machine.tensorrt.scale = float("nan")
    with pytest.raises(ExportError, match="differs from ONNX Runtime by nan"):
        export_tensorrt(copy, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1,))
    assert not [path for path in copy.iterdir() if "tensorrt" in path.name]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int8"}, ConfigError, "TensorRT takes graphs in fp32, fp16, qdq; got precision 'int8'"),
        ({"precision": "fp32"}, DataError, "give the lengths of real inputs"),
        ({"input_lengths": [4]}, ArtifactError, "no ONNX graph of model in fp16.*--to onnx-fp16"),
        ({"precision": "fp32", "device": "cuda:3"}, ConfigError, "device 'cuda:3' can't be used: 1 GPUs are there"),
        ({"precision": "fp32", "device": "cpu"}, ConfigError, "expected device 'cuda'"),
    ],
)
def test_exports_that_cannot_be(
    copy: Path, machine: Machine, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export_tensorrt(copy, **options)


def test_what_an_engine_needs() -> None:
    none = {"hardware_compatibility": "none", "version_compatible": False}
    a100 = Gpu("NVIDIA A100", (8, 0))
    assert required("11.4.0", a100, none) == {"tensorrt": "11.4.0", "gpu": "NVIDIA A100 (SM80)"}
    both = {"hardware_compatibility": "ampere_plus", "version_compatible": True}
    assert required("11.4.0", a100, both) == {"tensorrt": "11.x", "gpu": "any of SM80 or newer"}
    assert required("10.16.1", Gpu("NVIDIA T4", (7, 5)), both) == {"tensorrt": "10.x", "gpu": "NVIDIA T4 (SM75)"}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is None, reason="runs on an NVIDIA GPU with TensorRT")
@pytest.mark.parametrize("design", ["shared", "separate"])
def test_real_engines_say_what_the_graphs_say(exported: dict[str, Path], tmp_path: Path, design: str) -> None:
    folder = shutil.copytree(exported[design], tmp_path / design)
    config = artifact.check(folder)
    export_tensorrt(folder, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1, 4))
    plain = OnnxBackend.load(folder, config)
    backend = TensorrtBackend.load(folder, config, precision="fp32")
    for lengths in ([3], [20], [7, 3, 9], [4] * 9):
        encoded = random_requests(config, lengths)
        one, other = (engine.run(encoded, lambda gate_BK, _: gate_BK == gate_BK) for engine in (plain, backend))
        np.testing.assert_allclose(one.heads_BKN, other.heads_BKN, atol=1e-3)


# without a GPU


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_one_line_says_what_to_install(exported: dict[str, Path]) -> None:
    folder = exported["shared"]
    for call in (
        lambda: export_tensorrt(folder, precision="fp32", input_lengths=LENGTHS),
        lambda: TensorrtBackend.load(folder, artifact.check(folder)),
    ):
        with pytest.raises(
            MissingExtraError, match=r"needs the package 'tensorrt'.*pip install 'mope-llm\[tensorrt\]'"
        ):
            call()


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = CudaRuntime()
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (35, None))
    monkeypatch.setattr("mope.backends.cuda_runtime.require", lambda *_: runtime)
    with pytest.raises(ConfigError, match=r"device 'cuda' can't be used: the driver gives no NVIDIA GPU \(error 35\)"):
        Cuda()


def test_memory_is_given_back(copy: Path, machine: Machine) -> None:
    export_tensorrt(copy, precision="fp32", input_lengths=LENGTHS, batch_sizes=(1,))
    assert machine.cuda.memory == {}
