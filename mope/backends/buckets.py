"""Batches of a few fixed shapes: an engine on a GPU is fastest when a shape was prepared once and is run again.

A bucket is such a shape, requests by tokens. A batch is padded to the smallest bucket that holds it, a larger one is
split, and the padding is cut off again. Knows arrays; not what runs them: that is the same for CUDA graphs, for
TensorRT and for ONNX Runtime.

Shape suffixes: B requests, S tokens, F numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mope.backends import RunNetwork
from mope.errors import ConfigError
from mope.grid import Array

BATCHES = (1, 2, 4, 8, 16, 32)  # powers of two: at most half of a bucket's rows are padding
STEP = 16  # tokens between two widths


class Bucket(NamedTuple):
    """A shape that a network is prepared for: requests and tokens, padding included."""

    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}"


def grid(max_tokens: int, batches: Sequence[int] = BATCHES, step: int = STEP) -> list[Bucket]:
    """Every batch size with every multiple of `step` tokens, up to `max_tokens`, which is the last width."""
    widths = [*range(step, max_tokens, step), max_tokens]
    return [Bucket(batch, tokens) for batch in batches for tokens in widths]


def pad_to(bucket: Bucket, inputs: Sequence[Array], pad_id: int) -> tuple[Array, Array, Array, Array]:
    """A network's inputs, padded to a bucket's shape.

    Rows of padding have one token to attend to: attention over nothing would be 0/0.

    Args:
        bucket: at least as large as the inputs.
        inputs: token ids (B, S), attention mask (B, S), numbers (B, F), target LLM (B,).
        pad_id: token id of padding.
    """
    ids_BS, mask_BS, numbers_BF, llm_B = inputs
    rows, tokens = ids_BS.shape
    padded_ids = np.full(bucket, pad_id, dtype=ids_BS.dtype)
    padded_ids[:rows, :tokens] = ids_BS
    padded_mask = np.zeros(bucket, dtype=mask_BS.dtype)
    padded_mask[:rows, :tokens] = mask_BS
    padded_mask[rows:, 0] = 1
    missing = bucket.batch - rows
    return padded_ids, padded_mask, np.pad(numbers_BF, ((0, missing), (0, 0))), np.pad(llm_B, (0, missing))


def valid_inputs(bucket: Bucket, num_numbers: int) -> tuple[Array, Array, Array, Array]:
    """Inputs of a bucket's shape to prepare a network with: ones are a mask without padding, and ids that exist.

    Args:
        bucket: the shape.
        num_numbers: F, numbers beside the text.
    """
    ids_BS, llm_B = np.ones(bucket, np.int64), np.zeros(bucket.batch, np.int64)
    return ids_BS, ids_BS.copy(), np.ones((bucket.batch, num_numbers), np.float32), llm_B


class BucketRunner:
    """Runs a network on batches of any size through what was prepared for a few shapes.

    A bucket is captured when it is first needed, or by `warm_up`. Any number of threads may call: they take turns,
    because what is captured has one set of buffers, and a GPU runs one batch after the other anyway.

    Args:
        capture: prepares the network for a bucket. What it returns takes inputs of exactly that shape; its outputs
            may be buffers that the next call overwrites.
        buckets: shapes that may be captured.
        pad_id: token id of padding.
    """

    def __init__(self, capture: Callable[[Bucket], RunNetwork], buckets: Iterable[Bucket], pad_id: int) -> None:
        self._capture, self._pad_id = capture, pad_id
        self._buckets = sorted(buckets, key=lambda bucket: (bucket.batch * bucket.tokens, bucket))
        self._max_batch = max(bucket.batch for bucket in self._buckets)
        self._captured: dict[Bucket, RunNetwork] = {}
        self._lock = threading.Lock()

    def warm_up(self, buckets: Iterable[Bucket]) -> None:
        """Capture buckets now, so that no request waits for it."""
        with self._lock:
            for bucket in buckets:
                self._captured_for(bucket)

    def __call__(self, *inputs: Array) -> tuple[Array | None, Array | None, Array]:
        """Outputs for a batch of any size; see `mope.backends.RunNetwork`.

        Raises:
            ConfigError: inputs are wider than every bucket.
        """
        ids_BS, mask_BS, numbers_BF, llm_B = inputs
        lengths_B = mask_BS.sum(axis=1)
        num_rows = len(lengths_B)
        # rows of like length go together, where there is more than one part
        order_B = np.arange(num_rows) if num_rows <= self._max_batch else np.argsort(lengths_B, kind="stable")
        parts = []
        for start in range(0, num_rows, self._max_batch):
            rows = order_B[start : start + self._max_batch]
            tokens = int(lengths_B[rows].max())
            parts.append(self._run(ids_BS[rows, :tokens], mask_BS[rows, :tokens], numbers_BF[rows], llm_B[rows]))
        gate_BK, heads_BKN, embedding_BH = (_joined(arrays, order_B) for arrays in zip(*parts, strict=True))
        assert embedding_BH is not None, "every network has an embedding"
        return gate_BK, heads_BKN, embedding_BH

    def _run(self, *inputs: Array) -> tuple[Array | None, ...]:
        rows, tokens = inputs[0].shape
        bucket = next((b for b in self._buckets if b.batch >= rows and b.tokens >= tokens), None)
        if bucket is None:
            widest = max(b.tokens for b in self._buckets if b.batch >= rows)
            raise ConfigError(
                f"inputs of {rows} x {tokens} tokens; this engine was prepared for at most {widest} tokens"
            )
        padded = pad_to(bucket, inputs, self._pad_id)
        with self._lock:
            outputs = self._captured_for(bucket)(*padded)
            return tuple(None if output is None else output[:rows].copy() for output in outputs)

    def _captured_for(self, bucket: Bucket) -> RunNetwork:
        if bucket not in self._captured:
            self._captured[bucket] = self._capture(bucket)
        return self._captured[bucket]


def _joined(parts: Sequence[Array | None], order_B: Array) -> Array | None:
    arrays = [part for part in parts if part is not None]
    if not arrays:
        return None
    stacked = np.concatenate(arrays)
    joined = np.empty_like(stacked)
    joined[order_B] = stacked
    return joined
