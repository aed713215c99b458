"""Engines that run a trained network: one protocol, each engine guards its own import.

Shape suffixes: B requests, K experts, N bins (the body's and one for the tail), H encoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mope.features import EncodedRequests
from mope.grid import Array

# (gate logits (B, K), embedding (B, H)) -> which experts each row needs, bool (B, K)
ChooseExperts = Callable[[Array, Array], Array]


@dataclass(frozen=True, slots=True)
class RawOutputs:
    """What the network says, before router, mixture and calibration.

    Attributes:
        gate_BK: logits of the learned gate, float32.
        heads_BKN: logits of each expert over the bins, float32; zeros where an expert was not asked.
        embedding_BH: the trunk's (or gate network's) embedding of the text, float32.
    """

    gate_BK: Array
    heads_BKN: Array
    embedding_BH: Array


class Backend(Protocol):
    """Runs the network of one artifact."""

    name: str

    def run(self, encoded: EncodedRequests, choose: ChooseExperts) -> RawOutputs:
        """Outputs for a batch. A design with separate experts runs those that `choose` asks for."""
        ...

    def save(self, folder: Path) -> None:
        """Write the weight files into a folder."""
        ...
