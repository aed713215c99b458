"""The predictors that MoPE is held against, trained on the same rows and measured on the same test rows.

Knows how each is trained and turned into tokens; the frozen ones themselves are in `baselines`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression

from mope.backends.network import MopeNetwork, embed
from mope.config import PredictorConfig
from mope.console import console, progress
from mope.features import RequestEncoder, pad
from mope.flags import NONE
from mope.grid import Array, quantiles_at
from mope.mixture import cumulative
from mope.request import Request
from mope.training.baselines import default_baselines, fit_and_predict
from mope.training.batches import EncodedRows
from mope.training.config import TrainConfig
from mope.training.data.table import RowTable
from mope.training.encoders import Trunk
from mope.training.evaluate import Evaluation, EvaluationRows
from mope.training.experts import train_baseline
from mope.training.fit import native_bf16
from mope.training.prepare import Prepared
from mope.training.progress import FROZEN, WholeRun
from mope.training.routing import BATCH_ROWS


def compare(
    evaluation: Evaluation,
    rows: EvaluationRows,
    tables: dict[str, RowTable],
    prepared: Prepared,
    source: Trunk,
    config: TrainConfig,
    work: Path,
    *,
    resume: bool,
    whole: WholeRun | None = None,
) -> dict[str, Path]:
    """Train every baseline that the config asks for and add it to the evaluation.

    Args:
        evaluation: MoPE's own; extended in place.
        rows: the test rows.
        tables: the rows of each split.
        prepared: the same rows, encoded.
        source: the encoder that the fine-tuned baselines start from.
        config: of the run.
        work: folder for their checkpoints.
        resume: see `mope.training.fit.fit`.
        whole: what the command has still to do.

    Returns:
        The fine-tuned baselines' training logs by name.
    """
    samples = config.evaluation.bootstrap_samples
    wanted = set(config.evaluation.baselines)
    chosen = [
        b for b in default_baselines(frozen_embeddings(source, prepared), seed=config.fit.seed) if b.name in wanted
    ]
    if chosen:
        found = fit_and_predict(chosen, tables["train"], tables["validation"], rows.table, console=console())
        for name, fitted in found.items():
            evaluation.add(name, rows, fitted.predicted, samples=samples, seconds=fitted.seconds)
    if whole is not None:
        whole.done(FROZEN)
    logs: dict[str, Path] = {}
    for name in config.evaluation.fine_tuned:
        console().print(f"next the baseline {name}, trained like MoPE (--fine-tuned {NONE} leaves such ones out)")
        network, result, scale = train_baseline(name, prepared, source, config.fit, work, resume=resume, whole=whole)
        outputs_RN = head_outputs(network, rows.encoded, f"predicting with {name}")
        score = outputs_RN[:, 0]
        if name == "single_head":
            predicted = medians_of(outputs_RN, prepared.config)
        elif name == "ranker":
            known = ~prepared.validation.censored_R
            seen = head_outputs(network, prepared.validation, f"predicting with {name}")[:, 0]
            predicted = tokens_of_scores(seen[known], prepared.validation.tokens_R[known], score)
        else:
            predicted = np.maximum(score * scale, 1.0)
        evaluation.add(name, rows, predicted, samples=samples, seconds=result.seconds)
        logs[name] = result.csv
    return logs


def tokens_of_scores(scores: Array, tokens: Array, wanted: Array) -> Array:
    """Tokens for a ranker's scores: isotonic regression of log tokens on validation rows, ties kept apart.

    The order of the scores, and so Kendall's tau, stays what it was: a slope too small to matter in tokens is
    added where the regression is flat.
    """
    fitted = IsotonicRegression(out_of_bounds="clip").fit(scores, np.log(tokens))
    spread = float(np.std(scores)) or 1.0
    return np.asarray(np.exp(fitted.predict(wanted)) + 1e-3 * (wanted - scores.mean()) / spread).clip(min=0.5)


def medians_of(logits_RN: Array, config: PredictorConfig) -> Array:
    """Median tokens of one head's distributions, shape (rows,)."""
    alone = np.ones((len(logits_RN), 1))
    cdf_RE = cumulative(logits_RN[:, None], alone, config.tail_shares, "mixture")
    return quantiles_at(np.asarray(config.edges), cdf_RE, np.array([0.5]))[:, 0]


@torch.inference_mode()
def head_outputs(network: MopeNetwork, rows: EncodedRows, description: str) -> Array:
    """The outputs of a network's only head for every row, shape (rows, outputs)."""
    network.eval()
    found: list[Array] = []
    order: list[Array] = []
    with progress(description, total=len(rows)) as advance:
        for chosen in rows.by_length(BATCH_ROWS):
            batch = rows.batch(chosen)
            _, heads, _ = network(
                batch["input_ids_BS"], batch["attention_mask_BS"], batch["numbers_BF"], batch["llm_B"]
            )
            found.append(heads[:, 0].numpy())
            order.append(chosen)
            advance(len(chosen))
    back = np.argsort(np.concatenate(order))
    return np.concatenate(found).astype(np.float64)[back]


def frozen_embeddings(source: Trunk, prepared: Prepared) -> Callable[[list[str]], Array]:
    """A function that embeds prompts with the encoder as it was pre-trained: mean pooling, the prompt's window."""
    config = prepared.config
    encoder = RequestEncoder.of(config.model_copy(update={"max_context_tokens": 0}), source.tokenizer())

    @torch.inference_mode()
    def embed_prompts(prompts: list[str]) -> Array:
        model = source.load()
        model.train(False)
        ids = [encoder.encode([Request(prompt=prompt)]).token_ids[0] for prompt in prompts]
        order = np.argsort([len(row) for row in ids], kind="stable")
        embeddings = np.empty((len(ids), model.config.hidden_size), dtype=np.float32)
        with progress("embedding prompts", total=len(ids)) as advance:
            for start in range(0, len(ids), BATCH_ROWS):
                rows = order[start : start + BATCH_ROWS]
                padded_BS, mask_BS = (
                    torch.from_numpy(array) for array in pad([ids[row] for row in rows], encoder.pad_id)
                )
                with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16()):
                    embeddings[rows] = embed(model, padded_BS, mask_BS).numpy()
                advance(len(rows))
        return embeddings

    return embed_prompts
