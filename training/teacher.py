"""Distillation: a saved predictor teaches a smaller one.

The student answers on its teacher's grid, with its teacher's experts, and learns from the distributions that the
teacher gives for the training rows. A student that is a cut of its teacher's transformer starts from its weights.
Knows saved predictors and rows; what is minimised is in `objectives`.

Shape suffixes: R rows, K experts, N bins (the body's and one for the tail).
"""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from mope.backends import RawOutputs
from mope.backends.network import Encoder, MopeNetwork
from mope.backends.torch_backend import TorchBackend
from mope.config import PredictorConfig
from mope.console import console
from mope.errors import ConfigError
from mope.grid import Array
from mope.predictor import LengthPredictor
from mope.provenance import file_sha256
from mope.training.batches import EncodedRows, Targets, encode_rows
from mope.training.config import ModelConfig
from mope.training.data.table import RowTable
from mope.training.encoders import first_layers
from mope.training.routing import collect


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
        """The predictor itself."""
        return LengthPredictor.from_pretrained(self.folder, backend="torch", device=self.device)

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
        if label_tokenizer != settings.label_tokenizer:
            raise ConfigError(
                f"{asked} counts tokens with {settings.label_tokenizer!r}; type --label-tokenizer "
                f"{settings.label_tokenizer}"
            )

    def begin(self, student: MopeNetwork) -> None:
        """Give a student on this teacher's trunk its gate and heads to begin with, where they fit."""
        own = student.state_dict()
        shared = {
            name: tensor
            for name, tensor in self.network.state_dict().items()
            if name.startswith(("gate.", "heads.", "llm.")) and name in own and own[name].shape == tensor.shape
        }
        student.load_state_dict(shared, strict=False)

    def teach(self, rows: EncodedRows, table: RowTable, fingerprint: str, cache_dir: Path) -> EncodedRows:
        """The rows with what the teacher says of them.

        Args:
            rows: as the student reads them.
            table: the same rows.
            fingerprint: of the data set that they are from.
            cache_dir: where the answers are kept, for a run that is resumed and for other students.
        """
        asked = "\n".join([file_sha256(self.folder / "files.json"), fingerprint, *table.strings("row_id")])
        cache = cache_dir / "teachers" / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.safetensors"
        if cache.exists():
            console().print(f"the teacher was asked before: its answers are taken from {cache}", highlight=False)
            saved = load_file(cache)
            return replace(rows, targets=Targets(saved["log_mix"], saved["log_gate"]))
        encoded = encode_rows(table, self.predictor.encoder, "encoding rows for the teacher")
        raw = collect(self.predictor.backend, encoded, self.settings.num_experts, "asking the teacher")
        targets = mixture_targets(raw)
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        save_file({"log_mix": targets.log_mix_RN, "log_gate": targets.log_gate_RK}, partial)
        partial.replace(cache)
        return replace(rows, targets=targets)


def mixture_targets(raw: RawOutputs) -> Targets:
    """Logarithms of the network's own mixture over the bins and of its gate, in float16."""
    log_gate_RK = _log_softmax(raw.gate_BK)
    log_heads_RKN = _log_softmax(raw.heads_BKN)
    log_mix_RN = np.logaddexp.reduce(log_gate_RK[:, :, None] + log_heads_RKN, axis=1)
    return Targets(log_mix_RN.astype(np.float16), log_gate_RK.astype(np.float16))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
