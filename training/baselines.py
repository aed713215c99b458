"""What MoPE is measured against: predictors that fine-tune no encoder, fitted on the same rows.

Knows `RowTable` and returns response tokens per row; does not know MoPE, how errors are reported or where they go.
All of them aim at the median, the best guess for the mean absolute error. Censored rows enter with the length at
which they were cut off: a median does not ask how much longer they would have been.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import joblib
import lightgbm
import numpy as np
import numpy.typing as npt
from rich.console import Console
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from mope.console import working
from mope.errors import DataError
from mope.flags import NONE
from mope.training.data.table import RowTable

FloatArray = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating[Any]]
Embed = Callable[[list[str]], npt.NDArray[Any]]

MAX_CHARS_READ = 4000  # of a prompt, by word patterns and TF-IDF; its size is counted whole


class Fitted(NamedTuple):
    """What a baseline gave.

    Attributes:
        predicted: response tokens, shape (rows,).
        seconds: that fitting and predicting took.
    """

    predicted: FloatArray
    seconds: float


class Baseline(Protocol):
    """A predictor of response tokens."""

    name: str

    def fit(self, train: RowTable, validation: RowTable) -> None:
        """Fit on the training rows; the validation rows choose options and when to stop."""

    def predict(self, rows: RowTable) -> FloatArray:
        """Predicted response tokens, shape (rows,), at least 1."""


class Constant:
    """The median of the training rows, for every row."""

    name = "constant"

    def fit(self, train: RowTable, validation: RowTable) -> None:
        """Take the median of the training rows."""
        self._median = float(np.median(train.response_tokens))

    def predict(self, rows: RowTable) -> FloatArray:
        """Predicted response tokens, shape (rows,)."""
        return np.full(len(rows), self._median)


class PreviousAnswers:
    """The mean length of the conversation's earlier answers: what a server can do without reading the prompt.

    Where there are none, as on first turns, the median of the training rows that have none.
    """

    name = "previous_answers"

    def fit(self, train: RowTable, validation: RowTable) -> None:
        """Take the median of the training rows without earlier answers."""
        alone = np.array([not len(tokens) for tokens in train.earlier_answer_tokens()])
        labels = train.response_tokens[alone] if alone.any() else train.response_tokens
        self._median_alone = float(np.median(labels))

    def predict(self, rows: RowTable) -> FloatArray:
        """Predicted response tokens, shape (rows,), at least 1."""
        earlier = rows.earlier_answer_tokens()
        means = [np.mean(tokens) if len(tokens) else self._median_alone for tokens in earlier]
        return np.maximum(np.array(means, dtype=np.float64), 1.0)


class BoostedTrees:
    """LightGBM on features of the prompt: absolute error as loss, stopped early on the validation rows.

    Args:
        name: of the baseline.
        features: makes a matrix of shape (rows, features) from prompts.
        seed: of the sampling of rows and features for each tree.
    """

    def __init__(self, name: str, features: Callable[[list[str]], Features], *, seed: int = 0) -> None:
        self.name = name
        self._features = features
        self._params = {
            "objective": "l1",
            "learning_rate": 0.05,
            "num_leaves": 31,
            "min_data_in_leaf": 40,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "feature_fraction": 0.5,
            "lambda_l2": 1.0,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": joblib.cpu_count(only_physical_cores=True),
            "verbosity": -1,
        }

    def fit(self, train: RowTable, validation: RowTable) -> None:
        """Grow trees until 50 in a row have not lowered the error on the validation rows."""
        train_set = lightgbm.Dataset(self._features(train.strings("prompt")), train.response_tokens)
        stop_set = train_set.create_valid(self._features(validation.strings("prompt")), validation.response_tokens)
        self._booster = lightgbm.train(
            self._params,
            train_set,
            num_boost_round=2000,
            valid_sets=[stop_set],
            callbacks=[lightgbm.early_stopping(50, verbose=False)],
        )

    def predict(self, rows: RowTable) -> FloatArray:
        """Predicted response tokens, shape (rows,), at least 1."""
        predicted = self._booster.predict(self._features(rows.strings("prompt")))
        return np.maximum(np.asarray(predicted, dtype=np.float64), 1.0)


class TfidfRidge:
    """Ridge regression of log(1 + tokens) on TF-IDF weights of the prompt's words and word pairs.

    Ridge fits the mean of the logarithm. Carried back with exp this is a geometric mean, not a mean: near the
    median of lengths, which are skewed to the right, and so the right guess for the absolute error.

    Args:
        alphas: penalties to choose from, by mean absolute error on the validation rows.
        max_terms: how many words and pairs to keep, the most frequent ones.
    """

    name = "tfidf_ridge"

    def __init__(
        self, *, alphas: Sequence[float] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0), max_terms: int = 200_000
    ) -> None:
        self._alphas = alphas
        self._vectorizer = TfidfVectorizer(
            ngram_range=(1, 2),
            token_pattern=r"\w+|[^\w\s]",
            max_features=max_terms,
            sublinear_tf=True,
            dtype=np.float32,
        )

    def fit(self, train: RowTable, validation: RowTable) -> None:
        """Fit one ridge per penalty and keep the best."""
        train_terms = self._vectorizer.fit_transform(_texts(train))
        validation_terms = self._vectorizer.transform(_texts(validation))
        log_labels = np.log1p(train.response_tokens)
        errors = []
        ridges = []
        for alpha in self._alphas:
            ridges.append(Ridge(alpha=alpha, solver="sparse_cg", tol=1e-3).fit(train_terms, log_labels))
            errors.append(np.abs(_tokens(ridges[-1], validation_terms) - validation.response_tokens).mean())
        self._ridge = ridges[int(np.argmin(errors))]

    def predict(self, rows: RowTable) -> FloatArray:
        """Predicted response tokens, shape (rows,), at least 1."""
        return _tokens(self._ridge, self._vectorizer.transform(_texts(rows)))


def default_baselines(embed: Embed | None, *, seed: int = 0) -> list[Baseline]:
    """The baselines of `metrics.json`, cheapest first.

    Args:
        embed: frozen embeddings, from N texts to shape (N, H); asked once for each set of rows. None leaves the
            baseline on them out.
        seed: of the boosted trees.
    """

    plain: list[Baseline] = [
        Constant(),
        PreviousAnswers(),
        BoostedTrees("prompt_length", prompt_sizes, seed=seed),
        BoostedTrees("lexical_gbm", lexical_features, seed=seed),
        TfidfRidge(),
    ]
    if embed is None:
        return plain

    def embeddings_and_lexical(prompts: list[str]) -> Features:
        return np.hstack([np.asarray(embed(prompts), np.float32), lexical_features(prompts).astype(np.float32)])

    return [*plain, BoostedTrees("embedding_gbm", embeddings_and_lexical, seed=seed)]


def fit_and_predict(
    baselines: Sequence[Baseline],
    train: RowTable,
    validation: RowTable,
    rows: RowTable,
    *,
    console: Console | None = None,
) -> dict[str, Fitted]:
    """Fit each baseline and predict `rows` with it, saying one line for each, and more while it takes long.

    Returns:
        What each gave, by name.

    Raises:
        DataError: no training or no validation rows.
    """
    if not len(train) or not len(validation):
        raise DataError(
            f"got {len(train)} train and {len(validation)} validation rows for the baselines; expected some of both"
        )
    found: dict[str, Fitted] = {}
    for baseline in baselines:
        what = f"fitting the baseline {baseline.name} on {len(train):,} rows (--baselines chooses them, or {NONE})"
        with working(what) if console else nullcontext():
            start_s = time.perf_counter()
            baseline.fit(train, validation)
            predicted = baseline.predict(rows)
            seconds = time.perf_counter() - start_s
        found[baseline.name] = Fitted(predicted, seconds)
        if console:
            console.print(f"{baseline.name:<17} fitted on {len(train):,} rows in {seconds:.1f} s", highlight=False)
    return found


# Counted in the first MAX_CHARS_READ characters of the lower-cased prompt.
LEXICAL_PATTERNS = {
    name: re.compile(pattern, re.MULTILINE)
    for name, pattern in {
        "sentence_ends": r"[.!?](?:\s|$)",
        "question_marks": r"\?",
        "exclamation_marks": r"!",
        "commas": r",",
        "colons": r":",
        "quotes": r"[\"“”]",
        "brackets": r"[()\[\]{}<>]",
        "code_fences": r"```",
        "code_marks": r"[;={}]|`[^`\n]+`",
        "numbers": r"\d+",
        "list_items": r"^\s*(?:[-*•]|\d+[.)])\s",
        "links": r"https?://",
        "question_words": r"\b(?:what|why|how|when|where|who|which)\b",
        "yes_no_opening": r"\A\s*(?:is|are|was|were|do|does|did|can|could|should|will|would|has|have)\b",
        "you": r"\byou(?:r)?\b",
        "write": r"\b(?:write|rewrite|create|generate|compose|draft|make)\b",
        "explain": r"\b(?:explain|describe|discuss|elaborate|tell me)\b",
        "list": r"\b(?:list|lists|enumerate|examples?|ideas|steps|bullets?)\b",
        "translate": r"\b(?:translate|translation)\b",
        "summarise": r"\b(?:summari[sz]e|summary|tl;?dr|shorten)\b",
        "compare": r"\b(?:compare|difference|versus|vs)\b",
        "fix": r"\b(?:fix|debug|error|correct|improve)\b",
        "code_words": r"\b(?:code|function|script|program|python|javascript|html|css|sql|class|api)\b",
        "long_forms": r"\b(?:essay|article|blog|story|report|plan|letter|poem|song|outline)\b",
        "ask_long": r"\b(?:detailed|comprehensive|in[- ]depth|long|longer|full|complete|more)\b",
        "ask_short": r"\b(?:short|shorter|brief|briefly|concise|one word|one sentence|only|just)\b",
        "continue": r"\b(?:continue|go on|keep going|next)\b",
        "table": r"\b(?:table|csv|json|yaml|markdown)\b",
        "courtesy": r"\b(?:please|thanks?|thank you)\b",
    }.items()
}
SIZE_FEATURES = ("chars", "words", "lines")
LEXICAL_FEATURES = (
    *SIZE_FEATURES,
    "mean_word_chars",
    "distinct_word_share",
    "upper_case_share",
    "non_ascii_share",
    "largest_number",
    *LEXICAL_PATTERNS,
)


def prompt_sizes(prompts: list[str]) -> FloatArray:
    """How long each prompt is: characters, words, lines; shape (prompts, 3)."""
    return np.array([_sizes(prompt) for prompt in prompts], dtype=np.float64).reshape(-1, len(SIZE_FEATURES))


def lexical_features(prompts: list[str]) -> FloatArray:
    """What can be read off the words of each prompt, shape (prompts, len(LEXICAL_FEATURES)).

    In the spirit of Clairvoyant (arXiv 2606.07248): sizes, punctuation, code, and words that ask for short or
    long answers. About 0.1 ms per prompt.
    """
    rows = [_lexical_row(prompt) for prompt in prompts]
    return np.array(rows, dtype=np.float64).reshape(-1, len(LEXICAL_FEATURES))


def _sizes(prompt: str) -> tuple[int, int, int]:
    return len(prompt), len(prompt.split()), prompt.count("\n") + 1


def _lexical_row(prompt: str) -> list[float]:
    text = prompt[:MAX_CHARS_READ]
    lower = text.lower()
    words = lower.split()
    num_chars = max(len(text), 1)
    numbers = [min(float(digits), 1e6) for digits in re.findall(r"(?a)\d+", text)]
    return [
        *_sizes(prompt),
        sum(map(len, words)) / max(len(words), 1),
        len(set(words)) / max(len(words), 1),
        sum(map(str.isupper, text)) / num_chars,
        (len(text.encode("utf-8", "replace")) - len(text)) / num_chars,
        max(numbers, default=0.0),
        *(len(pattern.findall(lower)) for pattern in LEXICAL_PATTERNS.values()),
    ]


def _texts(rows: RowTable) -> list[str]:
    """Prompts for TF-IDF; an empty one becomes a mark of its own, so that there is always a term."""
    return [prompt[:MAX_CHARS_READ].strip() or "?" for prompt in rows.strings("prompt")]


def _tokens(ridge: Ridge, terms: Any) -> FloatArray:
    return np.maximum(np.expm1(np.asarray(ridge.predict(terms), dtype=np.float64)), 1.0)
