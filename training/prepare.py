"""What is settled before training: grid, buckets, target LLMs, scales; all from training rows alone.

Knows rows and configs; trains nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mope.config import FORMAT_VERSION, PredictorConfig
from mope.errors import ConfigError, DataError
from mope.features import NUMBER_NAMES, RequestEncoder
from mope.grid import Array, body_edges, pareto_tail, tail_edges, tail_shares
from mope.provenance import shortened
from mope.target_llm import known_names
from mope.thoughts import ThoughtsModel
from mope.training.balance import balance, set_medians
from mope.training.batches import EncodedRows, encode_rows
from mope.training.config import ModelConfig
from mope.training.data.table import RowTable
from mope.training.encoders import Trunk
from mope.training.thoughts import thoughts_of


@dataclass(frozen=True)
class Prepared:
    """Rows, encoded, and the config of the predictor to be trained.

    Attributes:
        config: everything but the choice between top1 and mixture is final.
        encoder: turns requests into model input.
        train: encoded training rows.
        validation: encoded validation rows.
        test: encoded test rows.
        validation_history: False on the validation rows that begin a conversation.
        thoughts: which share of a response are thoughts, None if the training rows don't tell.
    """

    config: PredictorConfig
    encoder: RequestEncoder
    train: EncodedRows
    validation: EncodedRows
    test: EncodedRows
    validation_history: Array
    thoughts: ThoughtsModel | None = None


def check_borders(model: ModelConfig) -> None:
    """What is wrong with the given borders can be said before any row is read.

    Raises:
        ConfigError: their number does not fit the experts, or they do not increase.
    """
    for flag, borders, low in (
        ("--boundaries", model.boundaries, 1),
        ("--boundary-quantiles", model.boundary_quantiles, 0),
    ):
        if borders and len(borders) != model.num_experts - 1:
            raise ConfigError(
                f"{model.num_experts} experts need {model.num_experts - 1} inner borders; {flag} gives {len(borders)}"
            )
        if any(later <= earlier for earlier, later in pairwise(borders)) or any(border < low for border in borders):
            raise ConfigError(f"{flag} must increase and be at least {low}; got {', '.join(f'{b:g}' for b in borders)}")


def choose_boundaries(tokens: Array, model: ModelConfig) -> tuple[float, ...]:
    """Inner borders of the experts' buckets: given, or quantiles of the training lengths.

    Raises:
        ConfigError: the number of borders does not fit, or they do not increase.
        DataError: quantiles of the data coincide.
    """
    wanted = model.num_experts - 1
    if model.boundaries:
        borders = np.asarray(model.boundaries, dtype=np.float64)
        origin = "--boundaries"
    else:
        levels = model.boundary_quantiles or tuple(np.arange(1, model.num_experts) / model.num_experts)
        if not all(0 < level < 1 for level in levels):
            raise ConfigError(f"--boundary-quantiles lie between 0 and 1, e.g. 0.33,0.66; got {list(levels)}")
        borders = np.quantile(tokens, levels) if wanted else np.zeros(0)
        origin = "--boundary-quantiles"
    if len(borders) != wanted:
        raise ConfigError(f"{model.num_experts} experts need {wanted} inner borders; {origin} gives {len(borders)}")
    borders = np.floor(borders) + 0.5  # between two counts, so that no length is on a border
    if np.any(np.diff(borders) <= 0) or np.any(borders < 1):
        if model.boundaries:
            raise ConfigError(f"--boundaries must increase by a token and be at least 1; got {list(model.boundaries)}")
        raise DataError(
            f"the data's length quantiles coincide ({', '.join(f'{b:g}' for b in borders)} tokens); "
            f"use fewer experts than {model.num_experts} or give --boundaries"
        )
    return tuple(float(border) for border in borders)


@dataclass(frozen=True)
class Grid:
    """Bins, tail and buckets: what the lengths of answers are counted on.

    Attributes:
        boundaries: inner borders of the experts' buckets in tokens.
        edges: edges of the bins in tokens, the tail included.
        num_body_bins: bins below the tail.
        tail_shares: share of the tail's mass in each tail bin.
        tail_index: Pareto index of the tail.
    """

    boundaries: tuple[float, ...]
    edges: tuple[float, ...]
    num_body_bins: int
    tail_shares: tuple[float, ...]
    tail_index: float

    @classmethod
    def of(cls, config: PredictorConfig) -> Grid:
        """The grid of a saved predictor."""
        return cls(config.boundaries, config.edges, config.num_body_bins, config.tail_shares, config.tail_index)

    @classmethod
    def fit(cls, train: RowTable, model: ModelConfig) -> Grid:
        """A grid for the training rows."""
        tokens = train.response_tokens
        top = max(2, int(np.quantile(tokens, model.tail_quantile)))
        body = body_edges(top, model.num_bins)
        tail = tail_edges(float(body[-1]), max(model.max_grid_tokens, int(tokens.max())), model.num_tail_bins)
        index = pareto_tail(tokens, train.censored, float(body[-1]))
        return cls(
            boundaries=choose_boundaries(tokens, model),
            edges=tuple(float(edge) for edge in (*body, *tail)),
            num_body_bins=len(body) - 1,
            tail_shares=tuple(float(share) for share in tail_shares(float(body[-1]), tail, index)),
            tail_index=index,
        )


def number_edges(numbers_RF: Array, num_pieces: int) -> tuple[tuple[float, ...], ...]:
    """Edges of each number's pieces, see `mope.backends.network.PiecewiseLinear`: quantiles of the training rows.

    A number of two values, or with all but few rows at one value, has no pieces: it is none the better for them.
    """
    levels = np.linspace(0, 1, num_pieces + 1)
    quantiles_QF = np.quantile(numbers_RF.astype(np.float64), levels, axis=0)
    edges = [np.unique(quantiles_QF[:, number].round(5)) for number in range(numbers_RF.shape[1])]
    return tuple(tuple(map(float, own)) if len(own) > 2 else () for own in edges)


def prepare(
    rows: RowTable,
    model: ModelConfig,
    source: Trunk,
    label_tokenizer: str,
    grid: Grid | None = None,
    set_power: float | None = None,
) -> Prepared:
    """Settle the predictor's config from the training rows, on a given grid if there is one, and encode all rows.

    With `set_power` the rows of several data sets are balanced, see `mope.training.balance`.
    """
    train, validation, test = (rows.split(name) for name in ("train", "validation", "test"))
    llms = known_names(Counter(train.strings("target_llm")), model.min_llm_rows)
    encoder = RequestEncoder(
        source.tokenizer(),
        special_ids=source.special_ids,
        max_prompt_tokens=model.max_prompt_tokens,
        max_context_tokens=model.max_context_tokens,
        chars_per_token=model.chars_per_token,
        lexical_chars=model.lexical_chars,
        target_llms=llms,
    )
    encoded = [
        encode_rows(table, encoder, f"encoding {name} rows")
        for name, table in (("train", train), ("validation", validation), ("test", test))
    ]
    deviation = encoded[0].numbers_RF.std(axis=0, dtype=np.float64)
    constant = deviation < 1e-4
    grid = grid or Grid.fit(train, model)
    config = PredictorConfig(
        format_version=FORMAT_VERSION,
        preset=model.preset,
        design=model.design,
        num_experts=model.num_experts,
        boundaries=grid.boundaries,
        edges=grid.edges,
        num_body_bins=grid.num_body_bins,
        tail_shares=grid.tail_shares,
        tail_index=grid.tail_index,
        label_tokenizer=label_tokenizer,
        encoder=shortened(source.name),
        encoder_config=source.config,
        tokenizer_sha256=hashlib.sha256(encoder.tokenizer_json().encode()).hexdigest(),
        special_ids=source.special_ids,
        max_prompt_tokens=model.max_prompt_tokens,
        max_context_tokens=model.max_context_tokens,
        chars_per_token=model.chars_per_token,
        lexical_chars=model.lexical_chars,
        target_llms=llms,
        unnamed_llm=bool(np.mean([name == "" for name in train.strings("target_llm")]) >= 0.5),
        unknown_llms={},
        llm_dim=model.llm_dim,
        head_hidden=model.head_hidden,
        number_names=NUMBER_NAMES,
        number_mean=tuple(float(x) for x in encoded[0].numbers_RF.mean(axis=0, dtype=np.float64)),
        number_scale=tuple(float(x) for x in np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation))),
        number_edges=number_edges(encoded[0].numbers_RF, model.number_pieces),
        router_parts=model.router_parts if model.num_experts > 1 else (),
        combination="mixture",
    )
    has_history = validation.table["num_earlier_turns"].to_numpy() > 0
    learned, checked, test_rows = encoded
    if set_power is None:
        mean = float(train.response_tokens.mean())
        learned, checked = (replace(part, scale_R=np.full(len(part), mean)) for part in (learned, checked))
    else:
        medians = set_medians(_sets(train), train.response_tokens)
        shares = balance(_sets(train), learned.text_R, learned.tokens_R, medians, set_power)
        keep_R = shares.keep_T[learned.text_R]
        learned = replace(learned, weight_R=shares.weight_R, scale_R=shares.scale_R, keep_R=keep_R)
        shares = balance(_sets(validation), checked.text_R, checked.tokens_R, medians, set_power)
        weight_R = shares.weight_R * shares.keep_T[checked.text_R]  # all of its texts come each time
        checked = replace(checked, weight_R=weight_R, scale_R=shares.scale_R)
    thoughts = thoughts_of(train, encoded[0].numbers_RF, config.number_names)
    return Prepared(config, encoder, learned, checked, test_rows, has_history, thoughts)


def _sets(table: RowTable) -> Array:
    """The data set of each row; rows that name none are one."""
    return np.array(table.strings("dataset"), dtype=object).astype(str)
