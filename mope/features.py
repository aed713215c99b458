"""From a request to what a network reads: token ids of a text window, and a row of numbers.

The same code serves training and serving, so they cannot drift apart. A long prompt is cut by characters
before it is tokenised: cost does not grow with the prompt. Knows tokenizers and numbers; not what a network
makes of them.

Shape suffixes: B requests, S tokens, F numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil, log1p, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from mope.effort import level_of_budget
from mope.errors import ArtifactError, DataError, is_panic
from mope.forking import after_fork
from mope.grid import Array
from mope.request import Request
from mope.rules import RULE_NAMES, RuleHits, match_rules
from mope.sealed import cleaned
from mope.target_llm import MAX_SIZE, LlmTable, describe
from mope.triggers import Triggers, Words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mope.config import PredictorConfig

HEAD_SHARE = 0.6  # of a long prompt's window, how much is taken from its beginning
COMPARED_CHARS = 1000  # characters of this and the previous prompt that are compared, at most

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
_WORD = re.compile(r"\w+")
_DIGITS, _UPPER = b"0123456789", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# what `_WORD` finds in ASCII, in lower case, with spaces in between
_WORD_BYTES = bytes(ord(chr(c).lower()) if _WORD.match(chr(c)) else 0x20 for c in range(128)).ljust(256)

_triggers = Triggers()
_LONG_ASKS = _triggers.pattern(
    _LONG_ASK,
    "detaile detailed depth comprehensive thorough thoroughly step long full complete elaborate explain",
    starts="detaile detailed in comprehensive thorough thoroughly step long full complete elaborate explain",
)
_SHORT_ASKS = _triggers.pattern(
    _SHORT_ASK,
    "brief briefly short shorter shortly concise concisely quick quickly nutshell only just simple one",
    starts="brief briefly short shorter shortly concise concisely quick quickly in only just simple one",
)
_CODE_WORDS = _triggers.pattern(_CODE_SIGNS, "``` def class import from function const let var public select")
_CODE_PARTS = ("{", "}", ";", "<", "Traceback", "Error:")  # of the other signs of code

NUMBER_NAMES = (
    "log_prompt_chars", "log_previous_prompt_chars", "log_system_chars",
    "log_earlier_turns", "has_history", "log_last_answer", "log_mean_answer", "log_max_answer", "log_min_answer",
    "answer_spread", "last_minus_mean", "log_answer_before_last", "log_recent_answers", "recent_spread",
    "log_median_answer", "log_all_answers", "same_words", "log_same_beginning",
    "log_newlines", "question_marks", "exclamations", "log_digits", "non_ascii_share", "upper_share",
    "ends_with_question", "ends_with_colon", "wh_question", "asks_long", "asks_short", "code_signs", "log_asked_tokens",
    *(f"rule_{name}" for name in RULE_NAMES),
    "log_max_tokens", "has_max_tokens", "temperature", "has_temperature", "tools", "response_format", "thinking",
    "not_thinking", "log_thinking_budget", "has_thinking_budget", "log_llm_size", "has_llm_size", "llm_reasoning",
    "has_effort", "effort", "log_num_tools", "log_tool_chars", "tool_choice_required", "last_is_tool_result",
    "log_tool_results", "log_context_chars", "share_hangul", "share_kana", "share_han", "share_cyrillic",
    "share_greek", "share_arabic", "counts_own", "counts_cl100k",
)  # fmt: skip
NUM_FIRST = NUMBER_NAMES.index("has_effort")  # numbers of the first predictors; `more_numbers` are the others
LLM_NUMBERS = tuple(map(NUMBER_NAMES.index, ("log_llm_size", "has_llm_size", "llm_reasoning")))
# what logs say of a request and callers seldom do; each group is known or not as a whole
OPTIONAL_NUMBERS = tuple(
    tuple(map(NUMBER_NAMES.index, names))
    for names in (
        ("log_max_tokens", "has_max_tokens"),
        ("temperature", "has_temperature"),
        ("thinking", "not_thinking"),
        ("counts_own", "counts_cl100k"),
    )
)
# flags that change a prediction only if training rows had them, and the numbers by which the network sees each
_TRAINED_FLAGS = {
    "temperature": ("temperature", "has_temperature"),
    "tools": ("tools",),
    "response_format": ("response_format",),
    "thinking": ("thinking", "not_thinking"),
    "thinking_budget": ("log_thinking_budget", "has_thinking_budget"),
    "effort": ("has_effort", "effort"),
    "token_unit": ("counts_own", "counts_cl100k"),
    "llm_size": ("log_llm_size", "has_llm_size"),
    "llm_reasoning": ("llm_reasoning",),
    "llm_year": (),
}
_NO_HISTORY = (0.0,) * (NUMBER_NAMES.index("log_same_beginning") - NUMBER_NAMES.index("has_history"))
_NO_RULES = (0.0,) * len(RULE_NAMES)


# scripts in the order of their numbers, each as the first bytes of its UTF-16 code units
_SCRIPTS = (
    (0x11, 0x31, *range(0xAC, 0xD8)),  # Hangul
    (0x30,),  # kana, and CJK punctuation
    (*range(0x34, 0xA0), 0xF9, 0xFA),  # Han
    (0x04,),  # Cyrillic
    (0x03, 0x1F),  # Greek, and combining marks
    (0x06, 0xFC, 0xFD),  # Arabic
)
_CODES = tuple(bytes([number]) for number in range(1, len(_SCRIPTS) + 1))
_SCRIPT_OF = bytes(
    next((number for number, own in enumerate(_SCRIPTS, start=1) if first in own), 0) for first in range(256)
)


def ends(text: str, num_chars: int) -> str:
    """`text` itself if it has at most `num_chars` characters, else its two ends, joined by a newline."""
    if len(text) <= num_chars:
        return text
    head = int(num_chars * HEAD_SHARE)
    return text[:head] + "\n" + text[head - num_chars :]


def _without_surrogates(text: str) -> str:
    """Halves of surrogate pairs, as broken JSON escapes give them, become U+FFFD: tokenizers take UTF-8 alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def request_numbers(
    request: Request, words: Words, hits: RuleHits, compared_chars: int = COMPARED_CHARS
) -> list[float]:
    """The first `NUM_FIRST` numbers of `NUMBER_NAMES` for one request. Tens of microseconds.

    Args:
        request: the request.
        words: of its prompt, cut by `ends`.
        hits: the rules that they match.
        compared_chars: characters of this and the previous prompt that are compared.
    """
    window, seen = words.text, _triggers.seen(words)
    has_code_part = any(part in window for part in _CODE_PARTS)
    num_code = len(_CODE_SIGNS.findall(window)) if has_code_part else _CODE_WORDS.count(seen)
    num_questions, num_chars = window.count("?"), max(len(window), 1)
    plain = window.encode("ascii", "replace")  # each character beyond ASCII becomes one more "?"
    stripped = window.rstrip()
    names = hits.names
    return [
        log1p(len(request.prompt)), log1p(len(request.previous_prompt)), log1p(len(request.system)),
        log1p(request.num_earlier_turns), float(len(request.answer_estimates) > 0), *_history(request, compared_chars),
        log1p(window.count("\n")), min(num_questions, 5), min(window.count("!"), 5),
        log1p(_count(plain, _DIGITS)), (plain.count(b"?") - num_questions) / num_chars,
        _count(plain, _UPPER) / num_chars, stripped.endswith("?"), stripped.endswith(":"),
        _WH.search(window) is not None, min(_LONG_ASKS.count(seen), 3), min(_SHORT_ASKS.count(seen), 3),
        log1p(num_code), log1p(hits.tokens),
        *([name in names for name in RULE_NAMES] if names else _NO_RULES),
        0.0 if request.max_tokens is None else log1p(max(request.max_tokens, 0)), request.max_tokens is not None,
        0.0 if request.temperature is None else min(max(0.0, request.temperature), 100.0),
        request.temperature is not None, request.tools, bool(request.response_format),
        request.thinking is True, request.thinking is False,
        0.0 if request.thinking_budget is None else log1p(max(request.thinking_budget, 0)),
        request.thinking_budget is not None, *_llm_numbers(request),
    ]  # fmt: skip


_NO_TOOLS, _NO_SCRIPTS = (0.0,) * 5, (0.0,) * 6
_NO_UNIT = (0.0, 0.0)
_UNITS: dict[str | None, tuple[float, float]] = {"own": (1.0, 0.0), "cl100k_base": (0.0, 1.0)}


def more_numbers(request: Request, window: str) -> list[float]:
    """The numbers of `NUMBER_NAMES` from `NUM_FIRST` on. One or two microseconds where the window is ASCII.

    Args:
        request: the request.
        window: its prompt, cut by `ends`.
    """
    effort = effort_of(request)
    tools: Sequence[float] = _NO_TOOLS
    if request.tools or request.tool_choice or request.num_tool_results:
        tools = (
            log1p(request.num_tools), log1p(request.tool_chars), request.tool_choice in ("required", "named"),
            request.last_is_tool_result, log1p(request.num_tool_results),
        )  # fmt: skip
    num_chars = len(request.prompt) + len(request.system) + len(request.previous_prompt) + request.other_chars
    return [
        effort is not None, effort or 0.0, *tools, log1p(num_chars),
        *(_NO_SCRIPTS if window.isascii() else _script_shares(window)), *_UNITS.get(request.token_unit, _NO_UNIT),
    ]  # fmt: skip


def effort_of(request: Request) -> float | None:
    """How hard the LLM thinks, from 0 to 5: as asked, or as its budget or its name says; None if unknown."""
    if request.effort is not None:
        return request.effort
    if request.thinking_budget is not None:
        return level_of_budget(request.thinking_budget)
    if request.thinking is False:
        return 0.0
    named = describe(request.target_llm).effort_level
    return None if named == 0.0 and request.thinking else named


def _script_shares(window: str) -> list[float]:
    """Shares of the letters of six scripts. Some microseconds for 2,000 characters."""
    encoded = window.encode("utf-16-le", "surrogatepass")
    scripts = encoded[1::2].translate(_SCRIPT_OF)
    hangul, kana, han, cyrillic, greek, arabic = map(scripts.count, _CODES)
    if kana or greek:
        units = np.frombuffer(encoded, dtype="<u2")
        kana = int(np.count_nonzero(units - np.uint16(0x3040) < 0xC0))  # wraps below
        greek -= int(np.count_nonzero(units - np.uint16(0x0300) < 0x70))
    return [count / len(window) for count in (hangul, kana, han, cyrillic, greek, arabic)]


def _llm_numbers(request: Request) -> tuple[float, float, float]:
    """What is known of the target LLM: log of its size, whether that is known, whether it reasons."""
    named = describe(request.target_llm)
    size = named.size if request.llm_size is None else request.llm_size
    reasoning = named.reasoning if request.llm_reasoning is None else request.llm_reasoning
    return (0.0, 0.0, float(reasoning)) if size is None else (log1p(min(size, MAX_SIZE)), 1.0, float(reasoning))


def _count(text: bytes, letters: bytes) -> int:
    return len(text) - len(text.translate(None, letters))


def _history(request: Request, compared_chars: int) -> Sequence[float]:
    """What the conversation's earlier answers and the prompt before tell; zeros on a first turn."""
    if not request.answer_estimates:
        return _NO_HISTORY
    tokens = request.answer_estimates
    answers = [log1p(count) for count in tokens]
    mean, recent = sum(answers) / len(answers), answers[-3:]
    faded = weight = 0.0
    for answer in answers:  # each answer counts half of the one after it
        faded, weight = 0.5 * faded + answer, 0.5 * weight + 1.0
    prompt, previous = request.prompt[:compared_chars], request.previous_prompt[:compared_chars]
    return [
        answers[-1], mean, max(answers), min(answers), _deviation(answers), answers[-1] - mean,
        answers[-2:][0], faded / weight, _deviation(recent),
        _median(answers), log1p(sum(tokens)), _shared_words(prompt, previous),
        log1p(_same_beginning(prompt, previous)),
    ]  # fmt: skip


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _shared_words(first: str, second: str) -> float:
    """Words that two texts share, of all the words in either."""
    words: set[Any]
    others: set[Any]
    if first.isascii() and second.isascii():
        words, others = (set(text.encode().translate(_WORD_BYTES).split()) for text in (first, second))
    else:
        words, others = (set(_WORD.findall(text.lower())) for text in (first, second))
    num_shared = len(words & others)
    return num_shared / max(len(words) + len(others) - num_shared, 1)


def _same_beginning(first: str, second: str) -> int:
    """How many characters two texts share at their beginning; by halving, since a loop over characters is slow."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True, slots=True)
class EncodedRequests:
    """A batch as a network and a router read it.

    Attributes:
        token_ids: per request, the ids with special tokens, unpadded.
        numbers_BF: raw numbers of the encoder's `number_names`, float32, shape (B, F).
        llm_B: index of the target LLM, 0 for an unknown one, int64, shape (B,).
        rule_hits: one per request.
    """

    token_ids: list[list[int]]
    numbers_BF: Array
    llm_B: Array
    rule_hits: list[RuleHits]

    def take(self, rows: Sequence[int]) -> EncodedRequests:
        """The requests at some positions, in that order."""
        return EncodedRequests(
            [self.token_ids[row] for row in rows],
            self.numbers_BF[rows],
            self.llm_B[rows],
            [self.rule_hits[row] for row in rows],
        )

    def padded(self, pad_id: int) -> tuple[Array, Array]:
        """Token ids and attention mask, int64, shape (B, S)."""
        return pad(self.token_ids, pad_id)


def pad(token_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Array, Array]:
    """Right-padded ids and the attention mask, int64, shape (B, S)."""
    if len(token_ids) == 1:  # nothing to pad, and ten times as quick
        alone = np.array(token_ids, dtype=np.int64)
        return alone, np.ones(alone.shape, dtype=np.int64)
    lengths = np.array([len(ids) for ids in token_ids])
    mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
    padded = np.full(mask.shape, pad_id, dtype=np.int64)
    padded[mask] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])
    return padded, mask.astype(np.int64)


class RequestEncoder:
    """Turns requests into `EncodedRequests`.

    The text is `[CLS] prompt [SEP] context [SEP]`, where context is the previous prompt, or the system
    prompt on a first turn; the head and the tail of a long prompt are kept. Special tokens that a user writes
    are text. Cost: about 0.1 ms per request, most of it tokenising, bounded for any prompt length.

    Args:
        tokenizer: the encoder's tokenizer.
        special_ids: ids of the tokens that stand for `[CLS]`, `[SEP]` and padding.
        max_prompt_tokens: window of the prompt in tokens.
        max_context_tokens: window of the context in tokens, 0 to leave it out.
        chars_per_token: characters kept per input token before tokenising; English words have about 5.
        lexical_chars: characters of the prompt, from both ends, that rules and lexical numbers look at.
        target_llms: names of known target LLMs, see `mope.target_llm.LlmTable`.
        number_names: the numbers to compute, in order.

    Raises:
        ArtifactError: a number that this version does not compute.
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
        number_names: Sequence[str] = NUMBER_NAMES,
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._cls, self._sep, self.pad_id = special_ids
        self._max_prompt, self._max_context = max_prompt_tokens, max_context_tokens
        self._chars_per_token, self._lexical_chars = chars_per_token, lexical_chars
        # what of a text's ends any window or comparison reads
        window_chars = chars_per_token * max(max_prompt_tokens, max_context_tokens)
        self._compared_chars = min(COMPARED_CHARS, lexical_chars)
        self._read_chars = max(lexical_chars, window_chars, ceil(self._compared_chars / HEAD_SHARE))
        self.llms = LlmTable(target_llms)
        self.number_names = tuple(number_names)
        self._takes_more = not set(NUMBER_NAMES[NUM_FIRST:]).isdisjoint(number_names)
        self._picked = _picked(self.number_names, NUMBER_NAMES if self._takes_more else NUMBER_NAMES[:NUM_FIRST])
        after_fork(self._leave_threads)

    def _leave_threads(self) -> None:
        """In the child of a fork: the threads of the tokenizer's batches are not there, and waiting for them hangs."""
        if "TOKENIZERS_PARALLELISM" in os.environ:  # otherwise tokenizers does this itself
            os.environ["TOKENIZERS_PARALLELISM"] = "false"

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
            number_names=config.number_names,
        )

    def encode(self, requests: Sequence[Request]) -> EncodedRequests:
        """Encode a batch of requests.

        Raises:
            DataError: the tokenizer fails on a text, as a regular expression in it may on a text made for that.
        """
        prompts = self._windows([request.prompt for request in requests], self._max_prompt)
        contexts = self._windows([request.previous_prompt or request.system for request in requests], self._max_context)
        numbers, hits = [], []
        for request in requests:
            words = Words(ends(request.prompt, self._lexical_chars))
            hits.append(match_rules(words))
            row = request_numbers(request, words, hits[-1], self._compared_chars)
            if self._takes_more:
                row += more_numbers(request, words.text)
            numbers.append(row if self._picked is None else [row[column] for column in self._picked])
        return EncodedRequests(
            token_ids=[
                [self._cls, *prompt, self._sep, *context, *([self._sep] if context else [])]
                for prompt, context in zip(prompts, contexts, strict=True)
            ],
            numbers_BF=np.array(numbers, dtype=np.float32).reshape(len(requests), len(self.number_names)),
            llm_B=np.array([self.llms.find(request.target_llm, request.llm_family) for request in requests], np.int64),
            rule_hits=hits,
        )

    def digest(self, request: Request) -> bytes:
        """16 bytes that stand for all that `encode` reads of a request: what has the same is encoded the same.

        Holds no text, and costs microseconds for any prompt length.
        """
        rest: tuple[Any, ...] = (
            len(request.prompt), len(request.previous_prompt), len(request.system), request.answer_estimates,
            request.num_earlier_turns, self.llms.find(request.target_llm, request.llm_family), _llm_numbers(request),
            request.max_tokens, request.temperature, request.tools, bool(request.response_format), request.thinking,
            request.thinking_budget,
        )  # fmt: skip
        if self._takes_more:
            rest += (
                effort_of(request), request.num_tools, request.tool_chars, request.tool_choice,
                request.num_tool_results, request.last_is_tool_result, request.other_chars, request.token_unit,
            )  # fmt: skip
        digest = blake2b(repr(rest).encode(), digest_size=16)
        for text in (request.prompt, request.previous_prompt, request.system):
            digest.update(ends(text, self._read_chars).encode("utf-8", "surrogatepass"))
        return digest.digest()

    def knows(self, number: str) -> bool:
        """Whether a number of `NUMBER_NAMES` is among those that are computed."""
        return number in self.number_names

    def check_ids(self, vocab_size: int) -> None:
        """Raise ArtifactError if the tokenizer gives ids that a network of this many token vectors does not know."""
        highest = max(self._tokenizer.get_vocab().values(), default=0)
        if highest >= vocab_size:
            raise ArtifactError(f"tokenizer.json has the token id {highest}; the network knows {vocab_size} tokens")

    def tokenizer_json(self) -> str:
        """The tokenizer as one JSON text."""
        return self._tokenizer.to_str()

    def _windows(self, texts: list[str], num_tokens: int) -> list[list[int]]:
        windows: list[list[int]] = [[] for _ in texts]
        rows = [row for row, text in enumerate(texts) if text] if num_tokens else []
        if rows:
            num_chars, head = self._chars_per_token * num_tokens, int(num_tokens * HEAD_SHARE)
            cut = [_without_surrogates(ends(texts[row], num_chars)) for row in rows]
            for row, encoded in zip(rows, self._tokenised(cut), strict=True):
                ids = encoded.ids
                windows[row] = ids if len(ids) <= num_tokens else ids[:head] + ids[head - num_tokens :]
        return windows

    def _tokenised(self, texts: list[str]) -> list[Any]:
        try:
            # unlike `encode`, this one releases the GIL
            return list(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        except BaseException as error:
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"the tokenizer can't read a text: {cleaned(reason)}") from error


def _picked(wanted: tuple[str, ...], computed: tuple[str, ...]) -> list[int] | None:
    """Positions of the wanted numbers among those that are computed; None if they are the same."""
    if unknown := [name for name in wanted if name not in computed]:
        raise ArtifactError(
            f"the predictor was trained on request features that this mope does not compute: {cleaned(unknown[0])}; "
            "update mope, or train it anew"
        )
    return None if wanted == computed else [computed.index(name) for name in wanted]


def unread_flags(config: PredictorConfig) -> tuple[str, ...]:
    """Flags that change no prediction, since no training row had them and nothing is believed of them either."""
    seen = {name for name, scale in zip(config.number_names, config.number_scale, strict=True) if scale}
    believed = {"thinking": ("thinking", "thinking_budget"), "tools": ("tools",), "json": ("response_format",)}
    by_prior = {flag for mode in config.unknown_llms for flag in believed.get(mode, ())}
    return tuple(flag for flag, numbers in _TRAINED_FLAGS.items() if seen.isdisjoint(numbers) and flag not in by_prior)
