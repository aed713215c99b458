"""From a request to what a network reads: token ids of a text window, and a row of numbers.

The same code serves training and serving, so they cannot drift apart. A long prompt is cut by characters
before it is tokenised: cost does not grow with the prompt. Knows tokenizers and numbers; not what a network
makes of them.

Shape suffixes: B requests, S tokens, F numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mope.grid import Array
from mope.request import Request
from mope.rules import RULE_NAMES, RuleHits, match_rules

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mope.config import PredictorConfig

HEAD_SHARE = 0.6  # of a long prompt's window, how much is taken from its beginning
COMPARED_CHARS = 1000  # characters of this and the previous prompt that are compared

_WH = re.compile(r"^\W*(?:what|which|who|whom|whose|when|where|why|how)\b", re.I)
_LONG_ASK = re.compile(
    r"\b(?:detailed?|in[- ]depth|comprehensive|thorough(?:ly)?|step[- ]by[- ]step|long|full|complete|elaborate"
    r"|explain)\b",
    re.I,
)
_SHORT_ASK = re.compile(
    r"\b(?:brief(?:ly)?|short(?:er|ly)?|concise(?:ly)?|quick(?:ly)?|in a nutshell|only|just|simple|one)\b", re.I
)
_CODE_SIGNS = re.compile(
    r"```|[{};]\s*$|^[^\S\n]*(?:def|class|import|from|function|const|let|var|public|SELECT)\b|</?\w+>|Traceback|Error:",
    re.M,
)
_NON_ASCII = re.compile(r"[^\x00-\x7f]")
_DIGIT = re.compile(r"[0-9]")
_UPPER = re.compile(r"[A-Z]")
_WORD = re.compile(r"\w+")

NUMBER_NAMES = (
    "log_prompt_chars", "log_previous_prompt_chars", "log_system_chars",
    "log_earlier_turns", "has_history", "log_last_answer", "log_mean_answer", "log_max_answer", "log_min_answer",
    "answer_spread", "last_minus_mean", "log_answer_before_last", "log_recent_answers", "recent_spread",
    "log_median_answer", "log_all_answers", "same_words", "log_same_beginning",
    "log_newlines", "question_marks", "exclamations", "log_digits", "non_ascii_share", "upper_share",
    "ends_with_question", "ends_with_colon", "wh_question", "asks_long", "asks_short", "code_signs", "log_asked_tokens",
    *(f"rule_{name}" for name in RULE_NAMES),
    "log_max_tokens", "has_max_tokens", "temperature", "has_temperature", "tools", "response_format", "thinking",
    "not_thinking",
)  # fmt: skip


def ends(text: str, num_chars: int) -> str:
    """`text` itself if it has at most `num_chars` characters, else its two ends, joined by a newline."""
    if len(text) <= num_chars:
        return text
    head = int(num_chars * HEAD_SHARE)
    return text[:head] + "\n" + text[head - num_chars :]


def _without_surrogates(text: str) -> str:
    """Halves of surrogate pairs, as broken JSON escapes give them, become U+FFFD: tokenizers take UTF-8 alone."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def request_numbers(request: Request, window: str, hits: RuleHits) -> list[float]:
    """The numbers of `NUMBER_NAMES` for one request.

    Args:
        request: the request.
        window: its prompt, cut by `ends`.
        hits: the rules that the window matches.
    """
    chars = max(len(window), 1)
    numbers = [
        np.log1p(len(request.prompt)), np.log1p(len(request.previous_prompt)), np.log1p(len(request.system)),
        np.log1p(request.num_earlier_turns), float(len(request.answer_bytes) > 0), *_history(request),
        np.log1p(window.count("\n")), min(window.count("?"), 5), min(window.count("!"), 5),
        np.log1p(len(_DIGIT.findall(window))), len(_NON_ASCII.findall(window)) / chars,
        len(_UPPER.findall(window)) / chars, float(window.rstrip().endswith("?")), float(window.rstrip().endswith(":")),
        float(_WH.search(window) is not None),
        min(len(_LONG_ASK.findall(window)), 3), min(len(_SHORT_ASK.findall(window)), 3),
        np.log1p(len(_CODE_SIGNS.findall(window))), np.log1p(hits.tokens),
        *(float(name in hits.names) for name in RULE_NAMES),
        0.0 if request.max_tokens is None else np.log1p(max(request.max_tokens, 0)),
        float(request.max_tokens is not None),
        0.0 if request.temperature is None else min(max(0.0, request.temperature), 100.0),
        float(request.temperature is not None),
        float(request.tools), float(bool(request.response_format)),
        float(request.thinking is True), float(request.thinking is False),
    ]  # fmt: skip
    return [float(number) for number in numbers]


def _history(request: Request) -> list[float]:
    """What the conversation's earlier answers and the prompt before tell; zeros on a first turn."""
    if not request.answer_bytes:
        return [0.0] * 13
    tokens = np.asarray(request.answer_bytes, dtype=np.float64) / 4  # about four bytes a token
    answers = np.log1p(tokens)
    fading = 0.5 ** np.arange(len(answers))[::-1]  # each answer counts half of the one after it
    prompt, previous = request.prompt[:COMPARED_CHARS], request.previous_prompt[:COMPARED_CHARS]
    shorter = min(len(prompt), len(previous))
    words, previous_words = set(_WORD.findall(prompt.lower())), set(_WORD.findall(previous.lower()))
    return [
        answers[-1], answers.mean(), answers.max(), answers.min(), answers.std(), answers[-1] - answers.mean(),
        answers[-2:][0], (fading @ answers) / fading.sum(), answers[-3:].std(),
        np.median(answers), np.log1p(tokens.sum()),
        len(words & previous_words) / max(len(words | previous_words), 1),
        np.log1p(next((i for i, (a, b) in enumerate(zip(prompt, previous, strict=False)) if a != b), shorter)),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class EncodedRequests:
    """A batch as a network and a router read it.

    Attributes:
        token_ids: per request, the ids with special tokens, unpadded.
        numbers_BF: raw numbers of `NUMBER_NAMES`, float32, shape (B, F).
        llm_B: index of the target LLM, 0 for an unknown one, int64, shape (B,).
        rule_hits: one per request.
    """

    token_ids: list[list[int]]
    numbers_BF: Array
    llm_B: Array
    rule_hits: list[RuleHits]

    def padded(self, pad_id: int) -> tuple[Array, Array]:
        """Token ids and attention mask, int64, shape (B, S)."""
        return pad(self.token_ids, pad_id)


def pad(token_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Array, Array]:
    """Right-padded ids and the attention mask, int64, shape (B, S)."""
    lengths = np.array([len(ids) for ids in token_ids])
    mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
    padded = np.full(mask.shape, pad_id, dtype=np.int64)
    padded[mask] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])
    return padded, mask.astype(np.int64)


class RequestEncoder:
    """Turns requests into `EncodedRequests`.

    The text is `[CLS] prompt [SEP] context [SEP]`, where context is the previous prompt, or the system
    prompt on a first turn; the head and the tail of a long prompt are kept. Special tokens that a user writes
    are text. Cost: about 50 microseconds per request, bounded for any prompt length.

    Args:
        tokenizer: the encoder's tokenizer.
        special_ids: ids of the tokens that stand for `[CLS]`, `[SEP]` and padding.
        max_prompt_tokens: window of the prompt in tokens.
        max_context_tokens: window of the context in tokens, 0 to leave it out.
        chars_per_token: characters kept per input token before tokenising; English words have about 5.
        lexical_chars: characters of the prompt, from both ends, that rules and lexical numbers look at.
        target_llms: names of known target LLMs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        special_ids: tuple[int, int, int],
        max_prompt_tokens: int,
        max_context_tokens: int,
        chars_per_token: int,
        lexical_chars: int,
        target_llms: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._cls, self._sep, self.pad_id = special_ids
        self._max_prompt, self._max_context = max_prompt_tokens, max_context_tokens
        self._chars_per_token, self._lexical_chars = chars_per_token, lexical_chars
        self._llm_index = {name: index for index, name in enumerate(target_llms, start=1)}

    @classmethod
    def of(cls, config: PredictorConfig, tokenizer: Tokenizer) -> RequestEncoder:
        """The encoder of a saved predictor."""
        return cls(
            tokenizer,
            special_ids=config.special_ids,
            max_prompt_tokens=config.max_prompt_tokens,
            max_context_tokens=config.max_context_tokens,
            chars_per_token=config.chars_per_token,
            lexical_chars=config.lexical_chars,
            target_llms=config.target_llms,
        )

    def encode(self, requests: Sequence[Request]) -> EncodedRequests:
        """Encode a batch of requests."""
        windows = [ends(request.prompt, self._lexical_chars) for request in requests]
        hits = [match_rules(window) for window in windows]
        prompts = self._windows([request.prompt for request in requests], self._max_prompt)
        contexts = self._windows([request.previous_prompt or request.system for request in requests], self._max_context)
        numbers = [request_numbers(*row) for row in zip(requests, windows, hits, strict=True)]
        return EncodedRequests(
            token_ids=[
                [self._cls, *prompt, self._sep, *context, *([self._sep] if context else [])]
                for prompt, context in zip(prompts, contexts, strict=True)
            ],
            numbers_BF=np.asarray(numbers, dtype=np.float32).reshape(len(requests), len(NUMBER_NAMES)),
            llm_B=np.array([self._llm_index.get(request.target_llm or "", 0) for request in requests], dtype=np.int64),
            rule_hits=hits,
        )

    def tokenizer_json(self) -> str:
        """The tokenizer as one JSON text."""
        return self._tokenizer.to_str()

    def _windows(self, texts: list[str], num_tokens: int) -> list[list[int]]:
        if num_tokens == 0:
            return [[] for _ in texts]
        cut = [_without_surrogates(ends(text, self._chars_per_token * num_tokens)) for text in texts]
        head = int(num_tokens * HEAD_SHARE)
        encoded: list[Any] = self._tokenizer.encode_batch_fast(cut, add_special_tokens=False)
        return [
            ids if len(ids) <= num_tokens else ids[:head] + ids[head - num_tokens :] for ids in (e.ids for e in encoded)
        ]
