"""Running a predictor with TensorRT, 10 or 11: one engine per network, one fixed shape per optimisation profile.

Knows the folder `tensorrt/` that `mope-export --to tensorrt` wrote into an artifact, and what such an engine can be run
by; does not know how engines are built. Needs no torch: `cuda_runtime` says why.

The names of TensorRT's interface were checked against its bindings 10.16 and 11.4, the order of calls against a
stand-in. No engine was run on a GPU yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mope.backends import ChooseExperts, RawOutputs, RunNetwork, copy_weights, run_networks
from mope.backends.buckets import Bucket, BucketRunner
from mope.backends.cuda_runtime import DEFAULT_PRECISION, Buffer, Cuda, Gpu
from mope.backends.onnx_backend import EMBEDDING, GATE, HEADS, INPUTS, find_graphs
from mope.config import PredictorConfig, network_names
from mope.errors import ArtifactError, MopeError
from mope.extras import require
from mope.features import EncodedRequests
from mope.grid import Array
from mope.sealed import GIB, MOST_JSON, cleaned, parse_json, read_bytes, shown

TENSORRT_FOLDER, MANIFEST, MANIFEST_VERSION = "tensorrt", "manifest.json", 1
MOST_BYTES = 8 * GIB  # of an engine
BUILT_FOR = {"onnx_sha256": "the graph", "tensorrt": "TensorRT", "gpu": "the GPU"}


def required(version: str, gpu: Gpu, flags: Mapping[str, Any]) -> dict[str, str]:
    """What an engine needs in order to run: the TensorRT and the GPU that it is built with, or kinds of them.

    Args:
        version: of TensorRT.
        gpu: that is there.
        flags: the engine was, or will be, built with: `hardware_compatibility` and `version_compatible`.
    """
    is_for_all = flags["hardware_compatibility"] == "ampere_plus" and gpu.compute_capability >= (8, 0)
    return {
        "tensorrt": f"{version.partition('.')[0]}.x" if flags["version_compatible"] else version,
        "gpu": "any of SM80 or newer" if is_for_all else str(gpu),
    }


def engine_key(engine: Mapping[str, Any]) -> str:
    """SHA-256 of all that an engine depends on; two engines of one key are the same for every purpose.

    Args:
        engine: an entry of the manifest: graph, TensorRT, GPU, profiles and flags.
    """
    parts = {name: engine[name] for name in ("onnx_sha256", "tensorrt", "gpu", "profiles", "flags")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an artifact's engines, None if there are none that this mope can read."""
    name = f"{TENSORRT_FOLDER}/{MANIFEST}"
    if not os.path.lexists(folder / name):
        return None
    manifest: dict[str, Any] = parse_json(read_bytes(folder, name, MOST_JSON), folder / name)
    if not isinstance(manifest, dict) or manifest.get("format_version") != MANIFEST_VERSION:
        return None
    needed = {"network", "precision", "onnx_sha256", "tensorrt", "gpu", "profiles", "flags", "key", "sha256"}
    engines = manifest.get("engines")
    if not isinstance(engines, list) or not all(isinstance(one, dict) and needed <= one.keys() for one in engines):
        raise ArtifactError(
            f"{shown(folder / name)} is no manifest of mope-export; remove the folder {TENSORRT_FOLDER}"
        )
    return manifest


def engine_file(network: str, precision: str) -> str:
    """Name of an engine's file in `tensorrt/`."""
    return f"{network}.{precision}.engine"


class FittingEngine(NamedTuple):
    """An engine that can be run here: its bytes, whose hash was checked, its profiles, and whether it brings code."""

    plan: bytes
    profiles: list[Bucket]
    version_compatible: bool


def fitting_engines(
    folder: Path, config: PredictorConfig, precision: str, version: str, gpu: Gpu
) -> Iterator[FittingEngine]:
    """An artifact's engines, in the order of `mope.config.network_names`.

    An engine can bring code along, and TensorRT promises nothing for one that somebody made to do harm. So load engines
    that were built here.

    Args:
        folder: of the artifact.
        config: of the artifact.
        precision: of the engines.
        version: of the TensorRT that will run them.
        gpu: that will run them.

    Raises:
        ArtifactError: there are none, or they were built from other graphs, for another TensorRT or another GPU.
    """
    option = "" if precision == DEFAULT_PRECISION else f" --precision {precision}"
    type_this = f"type: mope-export {shown(folder)} --to tensorrt{option}"
    _, graphs = find_graphs(folder, config, precision)
    manifest = read_manifest(folder) or {"engines": []}
    engines = {engine["network"]: engine for engine in manifest["engines"] if engine["precision"] == precision}
    for name, graph in zip(network_names(config), graphs, strict=True):
        if name not in engines:
            raise ArtifactError(f"{shown(folder)} has no TensorRT engine of {name} in {precision}; {type_this}")
        engine = engines[name]
        here = {"onnx_sha256": graph.sha256, **required(version, gpu, engine["flags"])}
        if engine_key({**engine, **here}) != engine["key"]:
            changed = [key for key in here if engine[key] != here[key]]
            was = "; ".join(
                f"{BUILT_FOR[key]} {cleaned(str(engine[key])[:40])}, here is {here[key]:.40}" for key in changed
            )
            raise ArtifactError(
                f"{shown(folder)}: the TensorRT engine of {name} was built for {was or 'other profiles'}; {type_this}"
            )
        file = f"{TENSORRT_FOLDER}/{engine_file(name, precision)}"
        if not (folder / file).exists():
            raise ArtifactError(f"{shown(folder / file)} is missing or not the file that was built; {type_this}")
        plan = read_bytes(folder, file, MOST_BYTES)
        if hashlib.sha256(plan).hexdigest() != engine["sha256"]:
            raise ArtifactError(f"{shown(folder / file)} is missing or not the file that was built; {type_this}")
        profiles = [Bucket(*shape) for shape in engine["profiles"]]
        yield FittingEngine(plan, profiles, engine["flags"]["version_compatible"] is True)


class TensorrtNetwork:
    """One engine; its `capture` is what a `mope.backends.buckets.BucketRunner` takes.

    Each profile has an execution context of its own and, unless switched off, a CUDA graph: copies to the GPU, the
    network, and copies back are one call.

    Args:
        trt: the module `tensorrt`.
        plan: the serialised engine.
        profiles: its optimisation profiles, in order.
        cuda: where to run it.
        cuda_graphs: record a graph per profile.
        version_compatible: it brings a part of TensorRT along, which is code.

    Raises:
        ArtifactError: TensorRT does not take the engine.
    """

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        profiles: Sequence[Bucket],
        cuda: Cuda,
        *,
        cuda_graphs: bool = True,
        version_compatible: bool = False,
    ) -> None:
        self._trt, self._profiles, self._cuda, self._cuda_graphs = trt, list(profiles), cuda, cuda_graphs
        logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(logger)
        self._runtime.engine_host_code_allowed = version_compatible
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ArtifactError(f"TensorRT {trt.__version__} does not take the engine; mope-export --to tensorrt again")
        self._contexts: list[Any] = []  # what a graph replays lies in the memory of its context
        self._names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]

    def capture(self, bucket: Bucket) -> RunNetwork:
        """Prepare a profile. The outputs of what is returned are buffers that its next call fills."""
        cuda, engine = self._cuda, self._engine
        cuda.use()
        context = engine.create_execution_context()
        index = self._profiles.index(bucket)
        if context is None or not context.set_optimization_profile_async(index, cuda.stream):
            raise MopeError(f"TensorRT can't prepare the profile {bucket}; is there enough memory on the GPU?")
        self._contexts.append(context)
        cuda.wait()
        inputs = [name for name in self._names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        for name in inputs:
            smallest, _, _ = engine.get_tensor_profile_shape(name, index)
            context.set_input_shape(name, tuple(smallest))  # smallest and largest are the same
        buffers = {
            name: Buffer(cuda, tuple(context.get_tensor_shape(name)), self._trt.nptype(engine.get_tensor_dtype(name)))
            for name in self._names
        }
        for name, buffer in buffers.items():
            buffer.host.fill(1)  # a mask without padding, and valid ids of tokens and target LLMs
            context.set_tensor_address(name, buffer.address)

        def enqueue() -> None:
            for name in inputs:
                cuda.to_gpu(buffers[name])
            if not context.execute_async_v3(cuda.stream):
                raise MopeError(f"TensorRT can't run the profile {bucket}")
            for name, buffer in buffers.items():
                if name not in inputs:
                    cuda.to_host(buffer)

        enqueue()  # once before recording: TensorRT does on the first run what a new shape needs
        cuda.wait()
        start: Callable[[], None] = cuda.record(enqueue) if self._cuda_graphs else enqueue
        outputs = {name: buffer.host for name, buffer in buffers.items() if name not in inputs}

        def replay(*arrays: Array) -> tuple[Array | None, Array | None, Array]:
            cuda.use()
            for name, array in zip(INPUTS, arrays, strict=True):
                np.copyto(buffers[name].host, array)
            start()
            cuda.wait()
            return outputs.get(GATE), outputs.get(HEADS), outputs[EMBEDDING]

        return replay


class TensorrtBackend:
    """Runs TensorRT engines on an NVIDIA GPU, through a CUDA graph per network and shape.

    Any number of threads may call; those that need the same network take turns.

    Args:
        runners: of the networks, in the order of `mope.config.network_names`.
        config: of the artifact.
        folder: of the artifact.
    """

    name = "tensorrt"

    def __init__(self, runners: Sequence[BucketRunner], config: PredictorConfig, folder: Path) -> None:
        self._runners, self._config, self._folder = list(runners), config, folder

    @classmethod
    def load(
        cls,
        folder: Path,
        config: PredictorConfig,
        device: str = "cuda",
        precision: str | None = None,
        *,
        cuda_graphs: bool = True,
    ) -> TensorrtBackend:
        """The engines of an artifact folder; every profile is prepared now, so that no request waits for it.

        Args:
            folder: of the artifact.
            config: of the artifact.
            device: `"cuda"`, `"cuda:1"`, ...
            precision: of the engines: `"fp32"`, `"fp16"` or `"qdq"`; None for `"fp16"`.
            cuda_graphs: record a CUDA graph per network and shape.

        Raises:
            MissingExtraError: TensorRT or cuda-bindings are not installed.
            ConfigError: there is no such GPU.
            ArtifactError: see `fitting_engines`.
        """
        trt = require("tensorrt", "the tensorrt backend")
        gpu = Cuda(device).gpu()
        runners = []
        for engine in fitting_engines(folder, config, precision or DEFAULT_PRECISION, trt.__version__, gpu):
            network = TensorrtNetwork(
                trt,
                engine.plan,
                engine.profiles,
                Cuda(device),  # a stream of its own for each network
                cuda_graphs=cuda_graphs,
                version_compatible=engine.version_compatible,
            )
            runner = BucketRunner(network.capture, engine.profiles, config.special_ids[2])
            runner.warm_up(engine.profiles)
            runners.append(runner)
        return cls(runners, config, folder)

    def run(self, encoded: EncodedRequests, choose: ChooseExperts) -> RawOutputs:
        """Outputs for a batch, in float32."""
        return run_networks(self._runners, self._config, encoded, choose)

    def save(self, folder: Path) -> None:
        """Copy the weight files, as far as the artifact has any, into a folder."""
        copy_weights(self._folder, folder, self._config)
