"""`mope-export --to tensorrt`: engines for the GPU at hand, from an artifact's ONNX graphs.

An engine belongs to one graph, one TensorRT and one kind of GPU, so engines are built where they are used, and the
manifest in `tensorrt/` says what they were built for. Networks are strongly typed: precision is in the graph. Each
optimisation profile is one fixed shape, as `mope.backends.buckets` explains; which shapes is taken from the lengths of
real inputs.

One builder serves TensorRT 10 and 11 and TensorRT-RTX, whose interface is the same and which builds without a GPU: the
tests build every graph with it. With TensorRT itself nothing was built yet; the names that are used were checked
against its bindings 10.16 and 11.4.

Shape suffixes: B requests, S tokens, F numbers.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mope import artifact
from mope.backends import RunNetwork
from mope.backends.buckets import BATCHES, Bucket, BucketRunner
from mope.backends.cuda_runtime import DEFAULT_PRECISION, Cuda
from mope.backends.onnx_backend import EMBEDDING, GATE, HEADS, INPUTS, Graph, find_graphs
from mope.backends.tensorrt_backend import (
    MANIFEST,
    MANIFEST_VERSION,
    MOST_BYTES,
    TENSORRT_FOLDER,
    TensorrtNetwork,
    engine_file,
    engine_key,
    read_manifest,
    required,
)
from mope.config import PredictorConfig, network_names
from mope.console import progress
from mope.errors import ConfigError, DataError, ExportError
from mope.extras import require
from mope.grid import Array
from mope.sealed import sha256_of

HardwareCompatibility = Literal["none", "ampere_plus"]
PRECISIONS = ("fp32", "fp16", "qdq")
TIMING_CACHE = "timing.cache"

WIDTH_STEP = 8  # tokens; matrix units of GPUs work on multiples of it
SINGLE = (0.1, 0.25, 0.5, 0.75, 0.9)  # quantiles of a request's length that batches of one have a profile for
BATCHED = (0.5,)  # the same of the longest of a larger batch's lengths
PERCENTILES = np.linspace(0, 1, 101)

# largest difference to ONNX Runtime on the CPU, of probabilities and of embeddings relative to their largest entry;
# it finds kernels that overflow, not what a precision costs: that is seen on real rows
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "qdq": 0.2}


def profiles(
    input_lengths: Sequence[int] | Array, max_tokens: int, batch_sizes: Sequence[int] = BATCHES
) -> list[Bucket]:
    """Shapes to optimise for, from the lengths of real inputs.

    Widths are quantiles of the lengths, rounded up to multiples of 8, and the widest input. Batches of one have five
    quantiles. A batch of b is as wide as the longest of its b lengths, whose quantile q is the quantile q^(1/b) of one
    length; it has the median of that.

    Args:
        input_lengths: tokens of real inputs, special tokens included, in any order.
        max_tokens: of the widest input that the predictor makes; longer lengths count as this one.
        batch_sizes: batches to optimise for.

    Raises:
        DataError: no length, or one below 1.
        ConfigError: no batch size, or one below 1.
    """
    lengths = np.asarray(input_lengths)
    if not lengths.size or lengths.min() < 1:
        raise DataError(
            f"{lengths.size} input lengths, the smallest {lengths.min(initial=0)}; expected some, from 1 on"
        )
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"batch sizes: got {list(batch_sizes)}; expected numbers from 1 on")
    shapes = []
    for batch in sorted(set(batch_sizes)):
        shares = np.array(SINGLE if batch == 1 else BATCHED) ** (1 / batch)
        widths = np.ceil(np.quantile(lengths, shares, method="higher") / WIDTH_STEP) * WIDTH_STEP
        shapes += [Bucket(batch, width) for width in sorted({*(min(int(w), max_tokens) for w in widths), max_tokens})]
    return shapes


class Built(NamedTuple):
    """A serialised engine, and the timing cache with what was measured for it (empty if there is none)."""

    plan: bytes
    timing_cache: bytes


class EngineBuilder:
    """Builds engines from ONNX graphs.

    Args:
        trt: the module `tensorrt` (10 or 11) or `tensorrt_rtx`.
        hardware_compatibility: `"ampere_plus"` for engines that any GPU from SM80 on runs, with fewer kernels to choose
            from.
        version_compatible: for engines that a later TensorRT of the same major version runs; may be slower.
        optimization_level: TensorRT's, 0 to 5: how long it searches.
        compute_capability: such as `"SM80"`, to build for a GPU that is not there; `tensorrt_rtx` alone can.
    """

    def __init__(
        self,
        trt: Any,
        *,
        hardware_compatibility: HardwareCompatibility = "none",
        version_compatible: bool = False,
        optimization_level: int = 3,
        compute_capability: str | None = None,
    ) -> None:
        if hardware_compatibility not in ("none", "ampere_plus"):
            raise ConfigError(f"hardware compatibility is 'none' or 'ampere_plus'; got {hardware_compatibility!r}")
        if not 0 <= optimization_level <= 5:
            raise ConfigError(f"optimization level is 0 to 5; got {optimization_level}")
        self._trt, self._compute_capability = trt, compute_capability
        self.flags = {
            "hardware_compatibility": hardware_compatibility,
            "version_compatible": version_compatible,
            "optimization_level": optimization_level,
        }
        self._logger = _logger(trt)

    def build(self, graph: Graph, shapes: Sequence[Bucket], *, precision: str, timing_cache: bytes = b"") -> Built:
        """Build an engine with one optimisation profile for each shape.

        Args:
            graph: in ONNX.
            shapes: of the profiles, in order.
            precision: of the graph. In `"fp32"` TF32 is switched off, which has the mantissa of fp16.
            timing_cache: of an earlier build; one of another GPU or TensorRT is ignored.

        Raises:
            ExportError: TensorRT does not take the graph, or can't build it.
        """
        trt = self._trt
        self._logger.problems.clear()
        builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse(graph.read()):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            reasons = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)
            raise ExportError(f"TensorRT {trt.__version__} can't read {graph.path.name}: {reasons}")
        config = builder.create_builder_config()
        config.builder_optimization_level = self.flags["optimization_level"]
        if self.flags["hardware_compatibility"] == "ampere_plus":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if self.flags["version_compatible"]:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if precision == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)
        if self._compute_capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, self._compute_capability), 0)
        for shape in shapes:
            config.add_optimization_profile(self._profile(builder, network, shape))
        cache = config.create_timing_cache(timing_cache)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            reason = self._logger.problems[0] if self._logger.problems else "no reason given"
            raise ExportError(f"TensorRT {trt.__version__} can't build {graph.path.name}: {reason}")
        measured = config.get_timing_cache()
        return Built(bytes(plan), b"" if measured is None else bytes(measured.serialize()))

    def _profile(self, builder: Any, network: Any, shape: Bucket) -> Any:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            fixed = tuple(tensor.shape)
            free = [axis for axis, size in enumerate(fixed) if size < 0]
            if free != list(range(len(free))) or len(free) > len(shape):
                raise ExportError(
                    f"{tensor.name} has the shape {fixed}; expected a free batch, and free tokens at most"
                )
            sizes = (*shape[: len(free)], *fixed[len(free) :])
            profile.set_shape(tensor.name, sizes, sizes, sizes)
        return profile


def _logger(trt: Any) -> Any:
    """A logger of a TensorRT module that keeps its errors instead of writing them to stderr."""

    class Problems(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problems: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.problems.append(message)

    return Problems()


def export_tensorrt(
    folder: Path,
    *,
    precision: str = DEFAULT_PRECISION,
    input_lengths: Sequence[int] | Array | None = None,
    batch_sizes: Sequence[int] = BATCHES,
    hardware_compatibility: HardwareCompatibility = "none",
    version_compatible: bool = False,
    optimization_level: int = 3,
    device: str = "cuda",
) -> dict[str, Any]:
    """Build the TensorRT engines of a saved predictor for the GPU at hand, into its folder `tensorrt/`.

    Every engine is run on all its shapes and compared with ONNX Runtime before it appears there. One that is there
    already and was built from the same graph, with the same profiles and flags, by the same TensorRT for the same GPU
    stays as it is. Engines of other precisions stay, too.

    Args:
        folder: of the saved predictor, with ONNX graphs of the precision.
        precision: `"fp32"`, `"fp16"` or `"qdq"`.
        input_lengths: tokens of real inputs, which give the profiles; None for those of the last build.
        batch_sizes: batches to optimise for.
        hardware_compatibility: see `EngineBuilder`.
        version_compatible: see `EngineBuilder`.
        optimization_level: see `EngineBuilder`.
        device: `"cuda"`, `"cuda:1"`, ...

    Returns:
        The manifest.

    Raises:
        ArtifactError: not a saved predictor, or without ONNX graphs of the precision.
        ConfigError: an option that cannot be, or no GPU.
        DataError: no input lengths.
        MissingExtraError: TensorRT, cuda-bindings or ONNX Runtime are not installed.
        ExportError: TensorRT does not take a graph, or an engine does not say what its graph says.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"TensorRT takes graphs in {', '.join(PRECISIONS)}; got precision {precision!r}")
    config = artifact.check(folder)
    _, graphs = find_graphs(folder, config, precision)
    trt = require("tensorrt", "mope-export --to tensorrt")
    require("onnxruntime", "mope-export --to tensorrt")
    gpu = Cuda(device).gpu()
    before = read_manifest(folder) or {"engines": [], "input_length_percentiles": None}
    if input_lengths is None:
        input_lengths = before["input_length_percentiles"]
    if input_lengths is None:
        raise DataError(
            f"{folder} has no TensorRT engines yet: give the lengths of real inputs, which profiles come from"
        )
    shapes = profiles(input_lengths, config.max_input_tokens, batch_sizes)
    builder = EngineBuilder(
        trt,
        hardware_compatibility=hardware_compatibility,
        version_compatible=version_compatible,
        optimization_level=optimization_level,
    )
    there = folder / TENSORRT_FOLDER
    engines = {
        (engine["network"], engine["precision"]): engine
        for engine in before["engines"]
        if engine["network"] in network_names(config) and engine["precision"] in PRECISIONS
    }
    temporary = Path(tempfile.mkdtemp(prefix=f".{TENSORRT_FOLDER}-", dir=folder))
    temporary.chmod(0o755)
    try:
        for name in (TIMING_CACHE, *(engine_file(*names) for names in engines)):
            if (there / name).exists():
                sha256_of(folder, f"{TENSORRT_FOLDER}/{name}", MOST_BYTES, temporary / name)
        cache = temporary / TIMING_CACHE
        with progress("building engines", len(graphs)) as advance:
            for name, graph in zip(network_names(config), graphs, strict=True):
                wanted: dict[str, Any] = {
                    "network": name,
                    "precision": precision,
                    "file": engine_file(name, precision),
                    "onnx_sha256": graph.sha256,
                    **required(trt.__version__, gpu, builder.flags),
                    "profiles": [list(shape) for shape in shapes],
                    "flags": builder.flags,
                }
                wanted["key"] = engine_key(wanted)
                path = temporary / wanted["file"]
                if not _is_there(engines.get((name, precision)), wanted["key"], path):
                    started = time.perf_counter()
                    known = cache.read_bytes() if cache.exists() else b""
                    plan, measured = builder.build(graph, shapes, precision=precision, timing_cache=known)
                    network = TensorrtNetwork(trt, plan, shapes, Cuda(device), version_compatible=version_compatible)
                    runner = BucketRunner(network.capture, shapes, config.special_ids[2])
                    difference = check_engine(runner, graph, shapes, config, precision)
                    path.write_bytes(plan)
                    cache.write_bytes(measured)
                    engines[name, precision] = {
                        **wanted,
                        "bytes": len(plan),
                        "sha256": hashlib.sha256(plan).hexdigest(),
                        "build_s": round(time.perf_counter() - started, 1),
                        "max_difference": difference,
                    }
                advance(1)
        manifest = {
            "format_version": MANIFEST_VERSION,
            "engines": list(engines.values()),
            "input_length_percentiles": np.quantile(input_lengths, PERCENTILES, method="higher").tolist(),
        }
        artifact.write_json(temporary / MANIFEST, manifest)
        shutil.rmtree(there, ignore_errors=True)
        temporary.rename(there)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _is_there(engine: Mapping[str, Any] | None, key: str, path: Path) -> bool:
    if engine is None or engine["key"] != key or not path.exists():
        return False
    return bool(sha256_of(path.parent, path.name, MOST_BYTES) == engine["sha256"])


def check_engine(
    run: RunNetwork, graph: Graph, shapes: Sequence[Bucket], config: PredictorConfig, precision: str
) -> float:
    """Compare an engine with its graph in ONNX Runtime on the CPU, on random inputs of every shape, filled and padded.

    Args:
        run: the engine.
        graph: in ONNX.
        shapes: to try.
        config: of the artifact.
        precision: of the graph.

    Returns:
        The largest difference, as `TOLERANCES` has it.

    Raises:
        ExportError: it is above that, or not a number.
    """
    session = require("onnxruntime", "mope-export").InferenceSession(graph.read(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    worst = 0.0
    for seed, shape in enumerate(shapes):
        inputs = _random_inputs(config, shape, seed)
        expected = dict(zip(names, session.run(None, dict(zip(INPUTS, inputs, strict=True))), strict=True))
        for name, found in zip((GATE, HEADS, EMBEDDING), run(*inputs), strict=True):
            if found is None:
                continue
            difference = _difference(name, expected[name], found)
            if not difference <= TOLERANCES[precision]:
                raise ExportError(
                    f"{graph.path.name} as an engine: {name} differs from ONNX Runtime by {difference:.2g} at {shape}; "
                    f"at most {TOLERANCES[precision]:g} is allowed"
                )
            worst = max(worst, difference)
    return worst


def _random_inputs(config: PredictorConfig, shape: Bucket, seed: int) -> tuple[Array, Array, Array, Array]:
    """Rows of one token up to the shape's width, the last one as wide as the shape."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(1, shape.tokens, shape.batch + 1).astype(int)[1:]
    mask_BS = (np.arange(shape.tokens) < lengths[:, None]).astype(np.int64)
    ids_BS = np.where(
        mask_BS, rng.integers(0, config.encoder_config["vocab_size"], mask_BS.shape), config.special_ids[2]
    )
    numbers_BF = np.array(config.number_mean) + rng.normal(scale=3, size=(shape.batch, len(config.number_mean)))
    llm_B = rng.integers(0, len(config.target_llms) + 1, shape.batch)
    return ids_BS, mask_BS, numbers_BF.astype(np.float32), llm_B


def _difference(name: str, expected: Array, found: Array) -> float:
    if name == EMBEDDING:
        return float(np.abs(expected - found).max() / max(np.abs(expected).max(), 1e-12))
    return float(np.abs(_probabilities(expected) - _probabilities(found)).max())


def _probabilities(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return result
