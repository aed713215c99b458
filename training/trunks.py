"""Which trunk a run trains on: an encoder, a teacher's, or a table distilled from one of them.

Knows the model's settings; what each kind of trunk is, is elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mope.errors import ConfigError
from mope.training.config import ModelConfig
from mope.training.encoders import Trunk, find_encoder
from mope.training.static import StaticTrunk
from mope.training.teacher import Teacher
from mope.training.vocabulary import cut_vocabulary

DEFAULT_ENCODER = "minilm"


def find_trunk(model: ModelConfig, teacher: Teacher | None = None) -> Trunk:
    """The trunk that the settings ask for: a named encoder, else the teacher's, else `DEFAULT_ENCODER`.

    Raises:
        ConfigError: the encoder is not there, the table is wider than it, or filters are asked for without a table.
    """
    origin: Trunk
    if teacher is not None and model.encoder is None:
        origin = teacher
    else:
        name = model.encoder or DEFAULT_ENCODER
        origin = find_encoder(name, revision=model.encoder_revision, num_layers=model.num_layers)
    if model.preset != "micro":
        if model.static_filters:
            raise ConfigError(
                f"--static-filters {model.static_filters} belongs to --preset micro, got --preset {model.preset}, "
                "whose encoder reads words in their order; leave it out, or type --preset micro"
            )
        return origin
    return StaticTrunk(origin, model.static_size, model.static_filters)


def with_vocabulary(trunk: Trunk, model: ModelConfig, texts: Sequence[str]) -> Trunk:
    """The trunk with the vocabulary that the settings ask for: `vocab_size` tokens, chosen by `texts`; else as it is.

    Raises:
        ConfigError: the tokenizer is not of the kind that can be cut, or `vocab_size` is too small.
    """
    if model.vocab_size is None:
        return trunk
    if isinstance(trunk, StaticTrunk):
        return replace(trunk, origin=cut_vocabulary(trunk.origin, model.vocab_size, texts))
    return cut_vocabulary(trunk, model.vocab_size, texts)
