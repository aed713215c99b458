"""CUDA graphs of a network in PyTorch: a forward pass of a fixed shape is recorded once and replayed by one call.

A small encoder is some hundred kernels of few microseconds, and starting them one by one from Python takes longer than
running them. Knows PyTorch and one network; which shapes there are, padding and threads are in `buckets`.

Needs transformers 5, whose attention masks never wait for the GPU while a graph is recorded; for MPNet 5.20, before
which masks and positions are made on the host, and a recording can't copy them. Its tests passed on an H200 and an H100
with PyTorch 2.11; how long a prediction takes there is in model_cards/results/2026-11-26-latency-h100.
"""

from __future__ import annotations

import numpy as np
import torch

from mope.backends import RunNetwork
from mope.backends.buckets import Bucket, valid_inputs
from mope.backends.network import MopeNetwork
from mope.grid import Array

WARM_UPS = 3  # passes before a capture, in which libraries choose kernels and take their memory


class CudaGraphs:
    """Records graphs of one network; its `capture` is what a `mope.backends.buckets.BucketRunner` takes.

    Graphs share one pool of memory, so they must not be replayed at the same time: the runner's lock sees to that.

    Args:
        network: on `device`, in evaluation mode.
        device: a GPU.
    """

    def __init__(self, network: MopeNetwork, device: torch.device) -> None:
        self._network, self._device = network, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def capture(self, bucket: Bucket) -> RunNetwork:
        """Record the network for one shape. The outputs of what is returned are buffers that its next call fills."""
        num_numbers = len(self._network.number_mean)
        pinned = [torch.from_numpy(array).pin_memory() for array in valid_inputs(bucket, num_numbers)]
        inputs = [tensor.to(self._device) for tensor in pinned]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                self._network(*inputs)
        graph = torch.cuda.CUDAGraph()
        # other threads of the process may use the GPU meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = self._network(*inputs)
        results = [
            None if output is None else torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
            for output in outputs
        ]
        inputs_host = [tensor.numpy() for tensor in pinned]
        gate_BK, heads_BKN, embedding_BH = (None if result is None else result.numpy() for result in results)
        assert embedding_BH is not None, "every network has an embedding"

        @torch.inference_mode()
        def replay(*arrays: Array) -> tuple[Array | None, Array | None, Array]:
            for buffer, array in zip(inputs_host, arrays, strict=True):
                np.copyto(buffer, array)
            with torch.cuda.stream(self._stream):
                for on_gpu, on_host in zip(inputs, pinned, strict=True):
                    on_gpu.copy_(on_host, non_blocking=True)
                graph.replay()
                for result, output in zip(results, outputs, strict=True):
                    if result is not None:
                        result.copy_(output, non_blocking=True)
            self._stream.synchronize()
            return gate_BK, heads_BKN, embedding_BH

        return replay
