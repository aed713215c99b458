"""Distillation: saved predictors teach a smaller one.

The student answers on its teacher's grid, with its teacher's experts, and learns from the distributions that the
teacher gives for the training rows; further teachers are asked for rows like those that they learned from. A student
that is a cut of its teacher's transformer starts from its weights. Knows saved predictors and rows; what is minimised
is in `objectives`.

Shape suffixes: R rows, K experts, N bins (the body's and one for the tail).
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from mope import artifact
from mope.artifact import weight_files
from mope.backends import RawOutputs
from mope.backends.network import Encoder, MopeNetwork
from mope.backends.torch_backend import TorchBackend
from mope.config import PredictorConfig
from mope.console import console
from mope.errors import ConfigError
from mope.files import replaced
from mope.grid import Array
from mope.predictor import LengthPredictor
from mope.provenance import file_sha256, shortened
from mope.training.batches import Targets, encode_rows
from mope.training.config import ModelConfig
from mope.training.data.table import RowTable
from mope.training.encoders import first_layers
from mope.training.prepare import Grid
from mope.training.routing import collect

LEAST = 1e-12  # probability that a teacher gives any bin
FORM = "2"  # of kept answers; those of form 1 may be transposed


@dataclass(frozen=True)
class Teacher:
    """A saved predictor that teaches.

    Attributes:
        folder: where it lies.
        num_layers: layers that its students keep of its trunk, None for all.
        device: where it runs.
    """

    folder: Path
    num_layers: int | None = None
    device: str = "cpu"

    @cached_property
    def predictor(self) -> LengthPredictor:
        """The predictor itself; one that was exported for serving answers without torch, on all cores."""
        if (self.folder / weight_files(artifact.check(self.folder))[0]).exists():
            return LengthPredictor.from_pretrained(self.folder, backend="torch", device=self.device)
        return LengthPredictor.from_pretrained(self.folder, num_threads=os.cpu_count() or 1)

    @property
    def settings(self) -> PredictorConfig:
        """Its config."""
        return self.predictor.config

    @property
    def network(self) -> MopeNetwork:
        """Its first network: trunk, gate, and in the shared design all heads."""
        backend = self.predictor.backend
        assert isinstance(backend, TorchBackend)
        return backend.networks[0]

    # --- as the trunk of its student ---

    @property
    def name(self) -> str:
        """The encoder that the teacher was started from."""
        return self.settings.encoder

    @cached_property
    def config(self) -> dict[str, Any]:
        """Architecture of the student's trunk."""
        config = copy.deepcopy(self.settings.encoder_config)
        if self.num_layers is not None:
            config["num_hidden_layers"] = min(self.num_layers, config["num_hidden_layers"])
        return config

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as one JSON text."""
        return self.predictor.encoder.tokenizer_json()

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """Ids of the tokens that stand for `[CLS]`, `[SEP]` and padding."""
        return self.settings.special_ids

    def tokenizer(self) -> Tokenizer:
        """A fresh tokenizer."""
        return Tokenizer.from_str(self.tokenizer_json)

    def load(self) -> Encoder:
        """A copy of the teacher's trunk, cut to `num_layers`."""
        return first_layers(copy.deepcopy(self.network.encoder).cpu(), self.num_layers)

    # --- as a teacher ---

    def check(self, model: ModelConfig, label_tokenizer: str) -> None:
        """Refuse a student that can't learn from this teacher.

        Raises:
            ConfigError: other experts, borders or tokens than the teacher's, or separate networks.
        """
        settings = self.settings
        asked = f"teacher {self.folder}"
        if model.num_experts != settings.num_experts:
            raise ConfigError(f"{asked} has {settings.num_experts} experts; type --num-experts {settings.num_experts}")
        if model.boundaries or model.boundary_quantiles:
            raise ConfigError(f"{asked} settles the borders of the experts; drop --boundaries and --boundary-quantiles")
        if model.design != "shared":
            raise ConfigError("a student has one trunk with all experts; type --design shared, or drop --teacher")
        self.check_tokens(label_tokenizer)

    def check_tokens(self, label_tokenizer: str) -> None:
        """Refuse a student that counts other tokens than this teacher does.

        Raises:
            ConfigError: it does.
        """
        own = self.settings.label_tokenizer
        if label_tokenizer != own:
            raise ConfigError(f"teacher {self.folder} counts tokens with {own!r}; type --label-tokenizer {own}")

    def begin(self, student: MopeNetwork) -> None:
        """Give a student on this teacher's trunk its gate and heads to begin with, where they fit."""
        own = student.state_dict()
        shared = {
            name: tensor
            for name, tensor in self.network.state_dict().items()
            if name.startswith(("gate.", "heads.", "llm.")) and name in own and own[name].shape == tensor.shape
        }
        student.load_state_dict(shared, strict=False)

    def learned_from(self, source: str) -> bool:
        """Whether this predictor was trained on a data set of that name; one that does not say was."""
        provenance = artifact.read_json(self.folder / "provenance.json")
        known = provenance.get("data")
        return not known or shortened(source) in known

    def answers(self, table: RowTable, grid: Grid, fingerprint: str, cache_dir: Path) -> Targets:
        """What the teacher says of rows, on a grid that may not be its own.

        Args:
            table: the rows.
            grid: of the student.
            fingerprint: of the data set that the rows are from.
            cache_dir: where the answers are kept, for a run that is resumed and for other students.
        """
        asked = [FORM, file_sha256(self.folder / "files.json"), repr(grid), fingerprint, *table.strings("row_id")]
        name = hashlib.sha256("\n".join(asked).encode()).hexdigest()[:32]
        cache = cache_dir / "teachers" / f"{name}.safetensors"
        if cache.exists():
            console().print(f"the teacher was asked before: its answers are taken from {cache}", highlight=False)
            saved = load_file(cache)
            return Targets(saved["log_mix"], saved["log_gate"])
        encoded = encode_rows(table, self.predictor.encoder, f"encoding rows for the teacher {self.folder.name}")
        raw = collect(self.predictor.backend, encoded, self.settings.num_experts, f"asking {self.folder.name}")
        targets = mixture_targets(raw)
        if grid != Grid.of(self.settings):
            targets = on_grid(targets.log_mix_RN, Grid.of(self.settings), grid)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replaced(cache) as whole:
            save_file({"log_mix": targets.log_mix_RN, "log_gate": targets.log_gate_RK}, whole)
        return targets


def lessons(
    teachers: Sequence[Teacher],
    first: Teacher | None,
    table: RowTable,
    sources: Sequence[str],
    fingerprints: Mapping[str, str],
    grid: Grid,
    cache_dir: Path,
) -> Targets:
    """What several teachers say of rows: the mean over those that learned from a row's data set.

    Args:
        teachers: who is asked.
        first: the one of them who is asked where none learned from a row's data set; None: such rows get NaN.
        table: the rows.
        sources: the name of each row's data set.
        fingerprints: of each data set.
        grid: of the student.
        cache_dir: see `Teacher.answers`.
    """
    named = np.array(sources, dtype=object)
    mix_RN = np.zeros((len(table), grid.num_body_bins + 1), dtype=np.float32)
    gate_RK = np.zeros((len(table), len(grid.boundaries) + 1), dtype=np.float32)
    for source, fingerprint in fingerprints.items():
        rows = np.flatnonzero(named == source)
        if not len(rows):
            continue
        asked = [teacher for teacher in teachers if teacher.learned_from(source)]
        if not asked and first is None:
            mix_RN[rows] = gate_RK[rows] = np.nan
        asked = asked or ([first] if first is not None else [])
        for teacher in asked:
            said = teacher.answers(table.take(rows), grid, fingerprint, cache_dir)
            mix_RN[rows] += np.exp(said.log_mix_RN.astype(np.float32)) / len(asked)
            gate_RK[rows] += np.exp(said.log_gate_RK.astype(np.float32)) / len(asked)
    return Targets(_log(mix_RN), _log(gate_RK))


def on_grid(log_mix_RN: Array, own: Grid, other: Grid) -> Targets:
    """Mixtures on one grid brought to another, and how much of each lies in the other's buckets, in float16.

    Cumulative probability is linear in log(tokens) between two edges; a tail is spread by its Pareto shares.
    """
    p_RN = np.exp(log_mix_RN.astype(np.float64))
    spread_RM = np.concatenate([p_RN[:, :-1], p_RN[:, -1:] * np.asarray(own.tail_shares)], axis=1)
    cdf_RE = np.concatenate([np.zeros((len(p_RN), 1)), spread_RM.cumsum(axis=1)], axis=1)
    cdf_RE /= cdf_RE[:, -1:]

    def masses(inner: Array) -> Array:
        """What lies between the given edges, and below the first and above the last of them."""
        log_edges, log_inner = np.log(own.edges), np.log(inner)
        right = np.clip(np.searchsorted(log_edges, log_inner), 1, len(log_edges) - 1)
        share = (log_inner - log_edges[right - 1]) / (log_edges[right] - log_edges[right - 1])
        share = np.clip(share, 0.0, 1.0)
        below = cdf_RE[:, right - 1] * (1 - share) + cdf_RE[:, right] * share
        ends = np.zeros((len(below), 1))
        return np.diff(np.concatenate([ends, below, ends + 1], axis=1), axis=1)

    body = np.asarray(other.edges[1 : other.num_body_bins + 1])
    return Targets(_log(masses(body)), _log(masses(np.asarray(other.boundaries))))


def _log(probabilities: Array) -> Array:
    """Logarithms in float16; what is below `LEAST` counts as that."""
    return np.log(np.maximum(probabilities, LEAST)).astype(np.float16, order="C")  # as safetensors writes it


def mixture_targets(raw: RawOutputs) -> Targets:
    """Logarithms of the network's own mixture over the bins and of its gate, in float16."""
    log_gate_RK = _log_softmax(raw.gate_BK)
    log_heads_RKN = _log_softmax(raw.heads_BKN)
    log_mix_RN = np.logaddexp.reduce(log_gate_RK[:, :, None] + log_heads_RKN, axis=1)
    return Targets(log_mix_RN.astype(np.float16), log_gate_RK.astype(np.float16))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
