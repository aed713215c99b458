"""What the config of an encoder may say: sizes and kinds of its layers, nothing that makes `transformers` load more.

A config can name code for attention that `transformers` fetches from the Hugging Face Hub, quantisers, backbones and
other models. None of that is needed to build an encoder from numbers, so none of it is passed on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mope.backends.static_encoder import MODEL_TYPE, StaticConfig
from mope.errors import ArtifactError

# encoders of text with a token for the beginning and one between the parts
ENCODERS = frozenset(
    (
        "albert", "bert", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra",
        "ernie", "eurobert", "longformer", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra", "nezha",
        "nomic_bert", "nystromformer", "roberta", "roberta-prelayernorm", "roformer", "squeezebert", "xlm-roberta",
        "xlm-roberta-xl",
    )
)  # fmt: skip
# of `transformers`, in any config: what the layers of an encoder depend on
_COMMON = frozenset(("chunk_size_feed_forward", "pad_token_id", "pooler_hidden_size", "tie_word_embeddings"))
# chosen by `transformers` alone
_NEVER = re.compile(
    r"attn_implementation|experts_implementation|auto_map|quantization_config|kernel_config|use_kernels|remote_code"
)
_WORD = re.compile(r"[A-Za-z0-9_|.+-]{0,64}\Z")
_LARGEST = 1e9
_MOST_LAYERS = 256
_DEEPEST = 4  # numbers of `rope_parameters`, by kind of layer


def allowed_fields(encoder_config: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of an encoder's config that say what its layers are; other fields are left out.

    Raises:
        ArtifactError: an architecture that is none of `ENCODERS`, a field that asks for code of others, or a value that
            no encoder has.
    """
    kind = encoder_config.get("model_type")
    if kind == MODEL_TYPE:
        known = frozenset(field.name for field in fields(StaticConfig))
    elif isinstance(kind, str) and kind in ENCODERS:
        known = _fields_of(kind)
    else:
        raise ArtifactError(f"encoder of the type {kind!r:.60}; known are {MODEL_TYPE}, {', '.join(sorted(ENCODERS))}")
    allowed = {"model_type": kind}
    for name, value in encoder_config.items():
        if _NEVER.search(name):
            if value not in (None, False, "", "eager", "sdpa"):
                raise ArtifactError(f"encoder_config: {name!r:.60} asks for code that is not this predictor's")
        elif name in known and name != "model_type":
            if not _is_allowed(value) or (name.endswith("layers") and not _is_count(value)):
                raise ArtifactError(f"encoder_config: {name!r:.60} is {value!r:.60}, which no encoder has")
            allowed[name] = value
    return allowed


def _fields_of(kind: str) -> frozenset[str]:
    """Fields of an architecture's own config, in the installed `transformers`."""
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        own = inspect.signature(CONFIG_MAPPING[kind].__init__).parameters
    except KeyError as error:
        raise ArtifactError(f"the installed transformers has no encoder of the type {kind!r}; update it") from error
    of_any = inspect.signature(PretrainedConfig.__init__).parameters
    return (frozenset(own) - frozenset(of_any) - {"self", "kwargs"}) | _COMMON


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value <= _MOST_LAYERS)


def _is_allowed(value: Any, depth: int = 0) -> bool:
    """Whether a value is a number, a word, or a few of them."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int | float):
        return abs(value) <= _LARGEST  # NaN is not
    if isinstance(value, str):
        return _WORD.match(value) is not None
    if depth == _DEEPEST:
        return False
    if isinstance(value, list | tuple):
        return len(value) <= 1024 and all(_is_allowed(part, depth + 1) for part in value)
    if isinstance(value, Mapping):  # such as `rope_parameters`
        return len(value) <= 64 and all(_is_allowed([key, part], depth + 1) for key, part in value.items())
    return False
