"""Which trunk a run trains on: an encoder, a teacher's, or a table distilled from one of them.

Knows the model's settings; what each kind of trunk is, is elsewhere.
"""

from __future__ import annotations

from mope.training.config import ModelConfig
from mope.training.encoders import Trunk, find_encoder
from mope.training.static import StaticTrunk
from mope.training.teacher import Teacher


def find_trunk(model: ModelConfig, teacher: Teacher | None = None) -> Trunk:
    """The trunk that the settings ask for.

    Raises:
        ConfigError: the encoder is not there, or the table is wider than it.
    """
    origin: Trunk = teacher or find_encoder(model.encoder, revision=model.encoder_revision, num_layers=model.num_layers)
    return StaticTrunk(origin, model.static_size) if model.preset == "micro" else origin
