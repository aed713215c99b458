"""Fixed shapes for GPUs: padding and splitting change no result, and the network can be recorded as a CUDA graph."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoded import random_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mope import artifact
from mope.backends import RunNetwork
from mope.backends.buckets import Bucket, BucketRunner, grid, pad_to
from mope.backends.torch_backend import TorchBackend, empty_networks
from mope.config import PredictorConfig
from mope.errors import ConfigError
from mope.grid import Array

MAX_TOKENS = 20


@pytest.fixture
def config(tiny: Path) -> PredictorConfig:
    return artifact.check(tiny)


def in_one_buffer(run: RunNetwork) -> Callable[[Bucket], RunNetwork]:
    """A capture as a runner sees one on a GPU: one shape alone, and outputs that the next call overwrites."""

    def capture(bucket: Bucket) -> RunNetwork:
        buffers: list[Any] = []

        def replay(*inputs: Array) -> tuple[Array | None, Array | None, Array]:
            assert [array.shape for array in inputs[:2]] == [bucket, bucket]
            assert {len(array) for array in inputs} == {bucket.batch}
            outputs = run(*inputs)
            if not buffers:
                buffers.extend(None if output is None else np.empty_like(output) for output in outputs)
            for buffer, output in zip(buffers, outputs, strict=True):
                if buffer is not None:
                    buffer[...] = output
            time.sleep(1e-3)  # time for another thread to come in between, if it could
            return tuple(buffers)  # type: ignore[return-value]

        return replay

    return capture


def assert_same(one: Any, other: Any) -> None:
    for expected, found in zip(one, other, strict=True):
        if expected is None:
            assert found is None
        else:
            np.testing.assert_allclose(expected, found, atol=2e-5)  # sums of another order


@pytest.mark.parametrize(
    "lengths",
    [[1], [20], [7, 3], [2, 20, 5], [4] * 9, [5] * 70, list(range(1, 21)) * 4],
    ids=["one token", "widest", "two", "three", "nine", "seventy alike", "eighty"],
)
@pytest.mark.parametrize("design", ["shared", "separate"])
def test_padding_and_splitting_change_no_result(
    design: str, lengths: list[int], request: pytest.FixtureRequest, tiny_separate: Path, tiny: Path
) -> None:
    folder = {"shared": tiny, "separate": tiny_separate}[design]
    config = artifact.check(folder)
    inputs = random_inputs(config, lengths)
    for plain in TorchBackend.load(folder, config)._runners:
        runner = BucketRunner(in_one_buffer(plain), grid(MAX_TOKENS, step=8), config.special_ids[2])
        assert_same(plain(*inputs), runner(*inputs))


def test_what_stands_in_padding_does_not_matter(tiny: Path, config: PredictorConfig) -> None:
    (plain,) = TorchBackend.load(tiny, config)._runners
    inputs = random_inputs(config, [5, 9])
    ids, mask, numbers, llm = pad_to(Bucket(4, 16), inputs, pad_id=config.special_ids[2])
    assert (ids.shape, mask.shape, numbers.shape, llm.shape) == ((4, 16), (4, 16), (4, numbers.shape[1]), (4,))
    assert mask.sum(axis=1).tolist() == [5, 9, 1, 1]
    outputs = plain(ids, mask, numbers, llm)
    assert_same(plain(*inputs), [output[:2] for output in outputs if output is not None])
    assert all(np.isfinite(output).all() for output in outputs if output is not None)


def test_the_smallest_bucket_that_holds_a_batch_is_captured_once(tiny: Path, config: PredictorConfig) -> None:
    (plain,) = TorchBackend.load(tiny, config)._runners
    captured: Counter[Bucket] = Counter()

    def capture(bucket: Bucket) -> RunNetwork:
        captured[bucket] += 1
        return in_one_buffer(plain)(bucket)

    runner = BucketRunner(capture, grid(MAX_TOKENS, step=8), config.special_ids[2])
    runner.warm_up([Bucket(1, 8)])
    for lengths in ([3], [8], [9, 2, 2], [17], [1] * 33, [20] * 2):
        runner(*random_inputs(config, lengths))
    expected = [(1, 8), (4, 16), (1, 20), (32, 8), (2, 20)]  # 33 are 32 and 1
    assert captured == Counter(Bucket(*shape) for shape in expected)


def test_inputs_wider_than_every_bucket_are_an_error(tiny: Path, config: PredictorConfig) -> None:
    (plain,) = TorchBackend.load(tiny, config)._runners
    runner = BucketRunner(in_one_buffer(plain), [Bucket(2, 8)], config.special_ids[2])
    with pytest.raises(ConfigError, match="1 x 9 tokens; this engine was prepared for at most 8 tokens"):
        runner(*random_inputs(config, [9]))


def test_threads_take_turns(tiny: Path, config: PredictorConfig) -> None:
    (plain,) = TorchBackend.load(tiny, config)._runners
    runner = BucketRunner(in_one_buffer(plain), [Bucket(4, MAX_TOKENS)], config.special_ids[2])
    batches = [random_inputs(config, [1 + seed % 20] * (1 + seed % 4), seed) for seed in range(24)]
    expected = [plain(*inputs) for inputs in batches]
    found: list[Any] = [None] * len(batches)

    def work(index: int) -> None:
        for i in range(index, len(batches), 4):
            found[i] = runner(*batches[i])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


def test_the_grid() -> None:
    assert grid(40, batches=(1, 4), step=16) == [(1, 16), (1, 32), (1, 40), (4, 16), (4, 32), (4, 40)]
    assert grid(16, batches=(1,), step=16) == [(1, 16)]
    assert str(Bucket(8, 64)) == "8x64"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_network_never_looks_at_values_while_it_is_recorded(
    tiny: Path, config: PredictorConfig, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, where tensors have no values, anything that would wait for the GPU is an error."""
    (network,) = TorchBackend.load(tiny, config, precision=precision).networks
    inputs = [torch.from_numpy(array).to("meta") for array in random_inputs(config, [5, 9])]
    with (
        torch.inference_mode(),
        pytest.raises(Exception, match="meta"),
    ):  # the probe: a mask without a graph is looked at
        network.to("meta")(*inputs)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.inference_mode():
        gate, heads, embedding = network(*inputs)
    assert (gate.shape, heads.shape[:2], embedding.shape[0]) == ((2, 3), (2, 3), 2)


class HostTensors(TorchDispatchMode):
    """Notes every operation that reads or makes a tensor with values on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.add(str(func))
        return result


def as_mpnet(config: PredictorConfig) -> PredictorConfig:
    """The same predictor on a trunk of the kind that `chat-base` has."""
    sizes = {name: config.encoder_config[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64}
    return config.model_copy(update={"encoder_config": {"model_type": "mpnet", **sizes}})


@pytest.mark.parametrize("trunk", ["bert", "mpnet"])
def test_no_tensor_is_made_on_the_host_while_it_is_recorded(
    config: PredictorConfig, trunk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the host can't be copied to the GPU then. The meta device stands for the GPU."""
    if trunk == "mpnet" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20):
        pytest.skip("transformers before 5.20 makes MPNet's mask and positions on the host")
    (network,) = empty_networks(as_mpnet(config) if trunk == "mpnet" else config)
    network = network.eval().to("meta")
    inputs = [torch.from_numpy(array).to("meta") for array in random_inputs(config, [5, 9])]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.inference_mode(), HostTensors() as host:
        network(*inputs)
        assert host.found == set()
        torch.ones(1).to("meta")  # what would be noted
    assert host.found


def test_a_trunk_in_half_precision(tiny: Path, config: PredictorConfig, tmp_path: Path) -> None:
    (network,) = TorchBackend.load(tiny, config, precision="fp16").networks
    assert {p.dtype for p in network.encoder.parameters()} == {torch.float16}
    assert {p.dtype for name, p in network.named_parameters() if not name.startswith("encoder.")} == {torch.float32}
    (plain,) = TorchBackend.load(tiny, config)._runners
    (half,) = TorchBackend.load(tiny, config, precision="fp16")._runners
    inputs = random_inputs(config, [1, 20, 7])
    for expected, found in zip(plain(*inputs), half(*inputs), strict=True):
        assert found is not None
        assert found.dtype == np.float32
        np.testing.assert_allclose(expected, found, atol=2e-2)  # a half has 11 bits, logits are below 10


def test_a_predictor_in_half_precision_saves_the_weights_it_was_trained_with(
    tiny: Path, config: PredictorConfig, tmp_path: Path
) -> None:
    TorchBackend.load(tiny, config, precision="fp16").save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "the torch backend runs in fp32 or fp16; got precision 'int8'"),
        ({"device": "cuda:99"}, "device 'cuda:99' can't be used"),
    ],
)
def test_options_that_cannot_be(tiny: Path, config: PredictorConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchBackend.load(tiny, config, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs: needs an NVIDIA GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_graphs_on_a_gpu_say_what_the_cpu_says(
    tiny: Path, config: PredictorConfig, precision: str, tolerance: float
) -> None:
    (plain,) = TorchBackend.load(tiny, config)._runners
    (graphs,) = TorchBackend.load(tiny, config, "cuda", precision)._runners
    for lengths in ([1], [20], [7, 3, 9], [4] * 40):
        inputs = random_inputs(config, lengths)
        for expected, found in zip(plain(*inputs), graphs(*inputs), strict=True):
            np.testing.assert_allclose(expected, found, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs: needs an NVIDIA GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_graphs_of_mpnet_on_a_gpu_say_what_the_cpu_says(
    config: PredictorConfig, precision: str, tolerance: float, tmp_path: Path
) -> None:
    mpnet = as_mpnet(config)
    TorchBackend(empty_networks(mpnet), mpnet).save(tmp_path)
    (plain,) = TorchBackend.load(tmp_path, mpnet)._runners
    (graphs,) = TorchBackend.load(tmp_path, mpnet, "cuda", precision)._runners
    for lengths in ([1], [20], [7, 3, 9], [4] * 40):
        inputs = random_inputs(config, lengths)
        for expected, found in zip(plain(*inputs), graphs(*inputs), strict=True):
            np.testing.assert_allclose(expected, found, atol=tolerance)
