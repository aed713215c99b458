"""`LengthPredictor`: load a saved predictor, ask it, teach it, save it.

Puts encoder, backend, router, mixture, calibration and recalibration in a row; each of them is elsewhere.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mope import artifact
from mope.backends import largest_input
from mope.backends.choice import Choice, choose
from mope.backends.onnx_backend import copy_graphs
from mope.cache import CacheStats, LruCache
from mope.calibration import Calibration
from mope.corrector import Answering, Corrector, as_carried, kind_of, mode_of
from mope.errors import ArtifactError, DataError
from mope.features import EncodedRequests, RequestEncoder, unread_flags
from mope.files import same_file, write_text
from mope.forking import after_fork
from mope.grid import Array
from mope.inputs import FLAGS, RequestFlags, as_request, as_requests, has_text, request_from, unknown_field
from mope.mixture import assemble, experts_needed
from mope.packaged import is_packaged
from mope.prediction import LengthPrediction
from mope.recalibration import Recalibrator
from mope.request import Request
from mope.router import Router
from mope.sealed import Sealed, shown
from mope.target_llm import Reading, describe

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mope.backends import Backend, RawOutputs
    from mope.config import PredictorConfig
    from mope.serving import ServingPredictor
    from mope.thoughts import ThoughtsModel

_logger = logging.getLogger("mope")


CACHE_SIZE = 4096
NO_DISTRIBUTION = "the predictor's network gives no distribution (NaN, or another shape); copy the whole folder again"
MAX_UNKNOWN_FAMILIES = 100  # unknown families that are logged
CHUNK_TOKENS, CHUNK_REQUESTS = 8192, 64  # of the input of one pass through the network, padding included
ENCODED_AT_ONCE = 1024  # requests of a batch whose input is in memory at the same time


class _Raw(NamedTuple):
    """A prediction before what was learned while serving is applied: of a request, the same every time."""

    cumulative: Array
    route: tuple[float, ...]
    expert: int
    source: str
    prompt_odds: float | None = None  # see `mope.thoughts`; None where the prompt was not read, or nothing was learned


class LengthPredictor:
    """Predicts how many tokens an LLM will answer, as a calibrated distribution.

    Make one with `from_pretrained`.

    Args:
        config: what the predictor is.
        backend: runs its network.
        encoder: turns requests into the network's input.
        router: gives the route.
        calibration: corrects the mixture.
        fallback: cumulative distribution of the training answers at the grid's edges, shape (E,).
        corrector: corrects raw predictions by what was learned while serving; a new one if None.
        folder: the artifact folder it came from, if any.
        choice: how the backend was chosen, if it was.
        cache_size: requests whose predictions are kept, see `from_pretrained`.
        thoughts: says which share of a response are thoughts, if that was learned.
    """

    def __init__(
        self,
        config: PredictorConfig,
        backend: Backend,
        encoder: RequestEncoder,
        router: Router,
        calibration: Calibration,
        fallback: Array,
        corrector: Corrector | None = None,
        folder: Path | None = None,
        choice: Choice | None = None,
        cache_size: int = 0,
        thoughts: ThoughtsModel | None = None,
    ) -> None:
        self.config, self.backend, self.encoder, self.router = config, backend, encoder, router
        self.calibration, self.folder, self.thoughts = calibration, folder, thoughts
        self.corrector = Corrector(config) if corrector is None else corrector
        self.device = "cpu" if choice is None else choice.device
        self.backend_reason = "" if choice is None else choice.reason
        self._loading: dict[str, Any] | None = None  # how `from_pretrained` was asked
        self._saved_to: set[Path] = set()
        self._serving: ServingPredictor | None = None
        self._starting = Lock()
        self._cache: LruCache[_Raw] = LruCache(cache_size)
        self._fallback = as_carried(np.asarray(fallback))
        self._unknown_families: set[str] = set()
        self._unread = unread_flags(config)
        after_fork(self._renew_lock)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        backend: str | None = None,
        device: str | None = None,
        num_threads: int = 1,
        precision: str | None = None,
        cache_size: int = CACHE_SIZE,
        revision: str | None = None,
    ) -> LengthPredictor:
        """Load a predictor from a folder, the package itself or the Hugging Face Hub.

        Args:
            name_or_path: a folder that `save_pretrained` or `mope-train` wrote, the name of a predictor that comes with
                the package (`mope.packaged.names()`), or a Hub id.
            backend: engine that runs the network: `"torch"`, or for what `mope-export` wrote `"onnx"` (on the CPU,
                without torch), `"onnx-gpu"` or `"tensorrt"`. If None, the quickest that is exported and installed;
                `backend_reason` says why.
            device: where it runs, for example `"cpu"`, `"cuda"` or `"cuda:1"`; if None, the CPU, or the first GPU for
                backends that need one.
            num_threads: threads of each call in ONNX Runtime on the CPU; torch has its own setting.
            precision: of the network, for example `"int8"`; the backend's own if None.
            cache_size: requests whose predictions are kept, so that a repeated one costs microseconds; about 1 kB
                each, without its text. What `observe` learns applies to them, too. 0 keeps none.
            revision: revision of a Hub id.

        Raises:
            ArtifactError: nothing is there, a file is missing, changed or of another format, or what it says can't be
                used. Hashes show damage, not origin, see `mope.sealed`.
            ConfigError: an unknown backend, or one that does not run on the device or in the precision.
            MissingExtraError: the backend's packages are not installed.
        """
        folder = artifact.find(name_or_path, revision)
        with artifact.loading(folder):
            saved = Sealed(folder)
            config = artifact.config_of(saved)
            from tokenizers import Tokenizer

            encoder = RequestEncoder.of(config, Tokenizer.from_buffer(saved.read("tokenizer.json")))
            calibration, fallback = artifact.read_calibration(saved, len(config.edges))
            router = artifact.read_router(saved, config.num_experts)
            corrector = Corrector(config, artifact.read_learned(saved))
            thoughts = artifact.read_thoughts(saved)
            choice = choose(folder, backend, device, precision)
            _logger.info("%s: %s", shown(folder), choice.reason)
            if choice.backend != "torch":  # which checks its weights as it reads them
                for name in saved.files.keys() & set(artifact.weight_files(config)):
                    saved.verify(name)
            network = choice.load(folder, config, num_threads)
            predictor = cls(
                config, network, encoder, router, calibration, fallback, corrector, folder, choice, cache_size, thoughts
            )
            predictor._try_out()
        predictor._loading = {
            "backend": choice.backend,
            "device": choice.device,
            "precision": choice.precision,
            "num_threads": num_threads,
            "cache_size": cache_size,
        }
        return predictor

    def _try_out(self) -> None:
        """Predict the largest input, and encode a text: so that no request is the first to find a fault.

        ONNX Runtime on the CPU gets a short one: it loads in less time than a wide one takes, and says itself, each
        time, what a graph can't be run on.

        Raises:
            ArtifactError: the network gives no distributions, or knows fewer tokens than the tokenizer.
        """
        says_itself = self.backend.name == "onnx"
        encoded = largest_input(self.config, short=says_itself)
        raw = self.backend.run(encoded, lambda gate_BK, _: np.ones(gate_BK.shape, dtype=bool))
        if not all(np.isfinite(part).all() for part in (raw.gate_BK, raw.heads_BKN, raw.embedding_BH)):
            raise ArtifactError(NO_DISTRIBUTION)
        for turns in (0, 1):
            self._finish(raw, encoded, np.array([turns > 0]))
        if not says_itself:
            self.encoder.check_ids(self.config.encoder_config["vocab_size"])
        self.encoder.encode([Request(prompt="Say hello. \U0001f44b \u1234", system="Be brief.")])

    def predict(
        self,
        prompt: Request | str | Mapping[str, Any] | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        **flags: Unpack[RequestFlags],
    ) -> LengthPrediction:
        """Predict the length of one answer.

        Args:
            prompt: text of the user's message; or a whole request, as `predict_batch` takes it, and nothing else.
            messages: the whole conversation instead, OpenAI-style, ending with the user's message.
            history: the messages before `prompt`, OpenAI-style.
            **flags: what else is known of the request, see `mope.inputs.RequestFlags`: `target_llm` (and where its name
                does not tell, `llm_family`, `llm_size` in billions of parameters, `llm_reasoning`, `llm_year`),
                `max_tokens`, `temperature`, `tools` (or `num_tools` and `tool_chars`), `tool_choice`,
                `response_format`, `thinking`, `thinking_budget`, `effort`, `token_unit`, `system`. A flag that this
                predictor was not trained on changes nothing and is logged once, as is a family that it does not know.

        Returns:
            A distribution over response tokens.

        Raises:
            DataError: no prompt, a flag that does not exist, or a value that can't be read.
        """
        for name in flags:
            if name not in FLAGS:
                raise DataError(unknown_field(name, FLAGS))
        if prompt is None or isinstance(prompt, str | bytes):
            request = request_from({"prompt": prompt, "messages": messages, "history": history, **flags})
        elif messages is not None or history or flags:
            beside = {"messages": messages is not None, "history": bool(history), **dict.fromkeys(flags, True)}
            named = ", ".join(name for name, given in beside.items() if given)
            raise DataError(f"a whole request was given, and {named} as well; put all of it into the request")
        else:
            request = as_request(prompt)
        return self.predict_batch([request])[0]

    def predict_batch(self, requests: Iterable[Request | str | Mapping[str, Any]]) -> list[LengthPrediction]:
        """Predict a batch of any size: it is worked through in parts of like length, in flat memory.

        Args:
            requests: each a `Request`, a prompt, or a mapping: the body of an HTTP request, or `prompt` or `messages`
                with the flags of `predict`, see `mope.inputs.as_request`.

        Returns:
            One prediction per request, in order. A request without any text gets the fallback, and
            `source` says so.

        Raises:
            DataError: not a batch, or a request that can't be read.
        """
        known = as_requests(requests)
        for request in known:
            self._say_what_is_not_read(request)
        answers: dict[int, LengthPrediction] = {
            row: self.fallback("no text", request) for row, request in enumerate(known) if not has_text(request)
        }
        keys = [self.encoder.digest(request) for request in known] if self._cache else []
        for row, key in enumerate(keys):
            if row not in answers and (raw := self._cache.get(key)) is not None:
                answers[row] = self._answer(raw, known[row])
        rows = [row for row in range(len(known)) if row not in answers]
        for place, raw in self._ask([known[row] for row in rows]):
            row = rows[place]
            answers[row] = self._answer(raw, known[row])
            if keys:
                self._cache.put(keys[row], raw)
        return [answers[row] for row in range(len(known))]

    def known_llms(self) -> tuple[str, ...]:
        """LLMs that this predictor was trained on, and groups of them, spelt like `LengthPrediction.llm`, sorted."""
        return tuple(sorted({describe(name).name for name in self.config.target_llms}))

    def _say_what_is_not_read(self, request: Request) -> None:
        """Log a flag that no training row had, and an unknown family: each once."""
        unread = [flag for flag in self._unread if getattr(request, flag) not in (None, False, "")]
        if unread:
            self._unread = tuple(flag for flag in self._unread if flag not in unread)
            _logger.warning(
                "this predictor was not trained on %s: ignored, here and from now on (said once)", ", ".join(unread)
            )
        if request.llm_family:
            self._check_family(request.llm_family)

    def _check_family(self, family: str) -> None:
        """Log unknown LLM families once. The prediction is unaffected."""
        llms, name = self.encoder.llms, describe(family).name
        seen = self._unknown_families
        if llms.find(family) or name in seen or len(seen) >= MAX_UNKNOWN_FAMILIES:
            return
        seen.add(name)
        families = llms.families()
        near = get_close_matches(name, list(dict.fromkeys([*families, *llms.names])), n=3)
        _logger.warning(
            "llm_family %r is not known%s: predicted as if none were given, until answers were observed; %s",
            name,
            f" (did you mean {' or '.join(near)}?)" if near else "",
            f"known are {', '.join(families)}" if families else "this predictor was trained without names of LLMs",
        )

    async def predict_async(
        self, request: Request | str | Mapping[str, Any], *, deadline_s: float | None = None
    ) -> LengthPrediction:
        """Predict one request without blocking the event loop, and never later than its deadline.

        The same as `ServingPredictor.predict` with its defaults; its threads start with the first call.

        Args:
            request: a `Request`, a prompt, or a mapping as `predict_batch` takes it.
            deadline_s: seconds after which the fallback is given instead, with the source `"fallback:deadline"`.

        Raises:
            DataError: a request that can't be read.
        """
        with self._starting:
            if self._serving is None:
                from mope.serving import ServingPredictor

                self._serving = ServingPredictor(self)
        return await self._serving.predict(request, deadline_s=deadline_s)

    def _renew_lock(self) -> None:
        """In the child of a fork, where nobody is left to release it."""
        self._starting = Lock()

    def close(self) -> None:
        """End the threads of `predict_async`, if there are any."""
        with self._starting:
            serving, self._serving = self._serving, None
        if serving is not None:
            serving.close()

    @property
    def recalibrator(self) -> Recalibrator:
        """What `observe` taught."""
        return self.corrector.recalibrator

    @property
    def cache_stats(self) -> CacheStats:
        """Hits and misses of the cache of repeated requests, and its size."""
        return self._cache.stats

    def fallback(self, reason: str, request: Request) -> LengthPrediction:
        """The length distribution of the training answers, for when the network cannot be asked.

        Args:
            reason: why, in a few words; `source` becomes `"fallback:<reason>"`.
            request: its cap still holds.
        """
        return self._answer(_Raw(self._fallback, tuple(self.router.prior), -1, f"fallback:{reason}"), request)

    def _ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, _Raw]]:
        """Positions of requests and what the network makes of each, in some order."""
        if len(requests) == 1:
            yield 0, self._run(requests, self.encoder.encode(requests))[0]
            return
        for start in range(0, len(requests), ENCODED_AT_ONCE):
            part = requests[start : start + ENCODED_AT_ONCE]
            encoded = self.encoder.encode(part)
            for rows in chunks([len(ids) for ids in encoded.token_ids]):
                for row, raw in zip(rows, self._run([part[row] for row in rows], encoded.take(rows)), strict=True):
                    yield start + row, raw

    def _run(self, requests: Sequence[Request], encoded: EncodedRequests) -> list[_Raw]:
        """One pass through the network."""

        def choose_experts(gate_BK: Array, embedding_BH: Array) -> Array:
            route_BK = self.router.probabilities(gate_BK, embedding_BH, encoded.rule_hits)
            return experts_needed(route_BK, self.config.combination)

        raw = self.backend.run(encoded, choose_experts)
        return self._finish(raw, encoded, np.array([request.num_earlier_turns > 0 for request in requests]))

    def _finish(self, raw: RawOutputs, encoded: EncodedRequests, has_history_B: Array) -> list[_Raw]:
        result = assemble(self.config, self.router, self.calibration, raw, encoded.rule_hits, has_history_B)
        cdf_BE, route_BK = result.cdf_BE, result.route_BK
        if cdf_BE.shape != (len(has_history_B), len(self._fallback)) or not isfinite(cdf_BE.sum() + route_BK.sum()):
            raise ArtifactError(NO_DISTRIBUTION)
        odds_B: Sequence[float | None] = [None] * len(cdf_BE)
        if self.thoughts is not None:
            odds_B = self.thoughts.prompt_odds(encoded.numbers_BF, self.config.number_names).tolist()
        return [
            _Raw(as_carried(cdf_E), tuple(route_K.tolist()), int(route_K.argmax()), "model", odds)
            for cdf_E, route_K, odds in zip(cdf_BE, route_BK, odds_B, strict=True)
        ]

    def _answer(self, raw: _Raw, request: Request) -> LengthPrediction:
        reading = self.encoder.llms.read(request.target_llm, request.llm_family)
        answering = self._answering(request, reading, raw.source)
        edges, cumulative = self.corrector.correct(raw.cumulative, answering)
        share: float | None = None
        if self.thoughts is not None and raw.prompt_odds is not None:
            share = self.thoughts.share(request, raw.prompt_odds)
        return LengthPrediction(
            edges=edges,
            cumulative=cumulative,
            expert=raw.expert,
            route_probabilities=raw.route,
            source=raw.source,
            max_tokens=request.max_tokens,
            target_llm=request.target_llm,
            predicted_like=reading.name,
            answering=answering,
            raw_cumulative=raw.cumulative,
            tail_index=self.config.tail_index,
            thought_share=share,
        )

    def _answering(self, request: Request, reading: Reading, source: str) -> Answering:
        """Which LLM answers a request, and how it is asked."""
        named = describe(request.target_llm)
        return Answering(
            llm=named.name,
            family=describe(request.llm_family).family or named.family or "",
            kind=kind_of(
                named.size if request.llm_size is None else request.llm_size,
                named.reasoning if request.llm_reasoning is None else request.llm_reasoning,
            ),
            mode=mode_of(request),
            known=reading.how == "exact" if named.name else self.config.unnamed_llm,
            thinking_budget=request.thinking_budget,
            fallback=source != "model",
        )

    def observe(
        self,
        prediction: LengthPrediction,
        actual_tokens: int,
        *,
        censored: bool | None = None,
        time_s: float | None = None,
        client: str | None = None,
    ) -> bool:
        """Learn from a finished request: later predictions for its target LLM are corrected.

        Do not give answers whose length the client forced, see `mope.reader.is_forced`.

        Args:
            prediction: what was predicted for it, from this predictor.
            actual_tokens: tokens that were generated. More than 131,072 count as that many;
                `recalibrator.num_clamped` says how often.
            censored: the answer was cut; if None, it counts as cut when it reached the request's `max_tokens`.
            time_s: when it finished, in seconds since 1970; now if None.
            client: name of the client that sent it, such as a customer of yours; the name is not kept. A client then
                has at most a tenth of the newest 400 observations of an LLM, or an equal share where there are fewer
                than ten clients. Its lengths above the 99 % quantile count as that, unless other clients have such
                lengths, too. None learns everything, which is right where all requests are your own.

        Returns:
            False if it was not learned, because the client has more than its share.

        Raises:
            DataError: fewer than 1 token, a time that is not one, or a prediction that already counts what remains.
        """
        if not isinstance(prediction, LengthPrediction):
            raise DataError(f"prediction is {type(prediction).__name__}; expected what predict() gave")
        if prediction.generated or prediction.raw_cumulative is None or prediction.answering is None:
            raise DataError("observe needs the prediction that predict() gave, not one made by remaining()")
        edges = self.corrector.edges
        if len(prediction.raw_cumulative) != len(edges) or not np.array_equal(prediction.edges[: len(edges)], edges):
            raise DataError("observe needs a prediction of this predictor; got one of another")
        if censored is not None and not isinstance(censored, bool | np.bool_):
            raise DataError(f"censored is true, false or None; got {censored!r}")
        if isinstance(actual_tokens, bool) or not isinstance(actual_tokens, Integral | float):
            raise DataError(f"actual_tokens is {type(actual_tokens).__name__}; expected a number of tokens")
        if client is not None and not isinstance(client, str):
            raise DataError(f"client is {type(client).__name__}; expected a name or None")
        if censored is None:
            censored = prediction.max_tokens is not None and actual_tokens >= prediction.max_tokens
        raw, answering = prediction.raw_cumulative, prediction.answering
        return self.corrector.observe(raw, answering, actual_tokens, censored=censored, time_s=time_s, client=client)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the predictor, with all that `observe` taught it, into a folder. Whole or not at all.

        What is loaded from there predicts bit for bit what this predictor does from now on. Beside what it predicted
        until now, that may differ a little: `observe` puts off working out corrections anew (of an LLM's answers until
        an eighth more are there, 50 at most; of its relatives' longer), and here all of them are.

        Of the folder that it was loaded from, it copies plots, card, metrics, provenance and ONNX graphs: regular files
        under these names, never what a link out of the folder points at.

        Args:
            folder: to write. The folder that this predictor was loaded from, or saved to before, is replaced.
            overwrite: replace any other saved predictor in `folder`, too.

        Raises:
            ArtifactError: the folder exists and is not a saved predictor, is another one, or has files of others in it;
                a file that is copied was changed; the disk is full.
        """
        target = Path(folder)
        known = {*self._saved_to, *([] if self.folder is None or is_packaged(self.folder) else [self.folder])}
        own = any(same_file(folder, target) for folder in known)
        hint = "choose another, or pass overwrite=True"
        with artifact.writing(target, overwrite=overwrite or own, hint=hint) as temporary:
            self.write(temporary)
            if self.folder is not None:
                artifact.copy_for_people(self.folder, temporary)
                copy_graphs(self.folder, temporary)
            engines = target / artifact.ENGINES
            if own and engines.is_dir():  # they belong to these weights, and take minutes to build
                shutil.copytree(engines, temporary / artifact.ENGINES, symlinks=True)
        self._saved_to.add(target.resolve())
        return target

    def write(self, folder: Path) -> None:
        """Write the files that predictions depend on into an existing folder, unsealed."""
        artifact.write_json(folder / "config.json", self.config.model_dump(mode="json"))
        write_text(folder / "tokenizer.json", self.encoder.tokenizer_json())
        artifact.write_router(folder, self.router)
        artifact.write_calibration(folder, self.calibration, self._fallback)
        if self.thoughts is not None:
            artifact.write_json(folder / artifact.THOUGHTS, self.thoughts.model_dump(mode="json"))
        if len(self.recalibrator):
            artifact.write_json(folder / "recalibration.json", self.recalibrator.to_json())
        self.backend.save(folder)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the predictor to the Hugging Face Hub.

        Args:
            repo_id: `"user/name"`.
            private: make a new repository private.
            token: access token; the one that `hf auth login` saved if None.

        Returns:
            Address of the commit.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as parent:
            folder = self.save_pretrained(Path(parent) / "predictor")
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Upload mope predictor")
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its artifact's folder, which has to be there where it is unpickled, and what `observe` taught.

        Raises:
            TypeError: it was not loaded from a folder.
        """
        if self.folder is None or self._loading is None:
            raise TypeError(
                "this predictor was not loaded from a folder, so it can't be pickled: save_pretrained() it, and pickle "
                "what from_pretrained() loads from there"
            )
        return _unpickled, (str(self.folder.absolute()), self._loading, self.recalibrator.to_json())

    def __repr__(self) -> str:
        config = self.config
        return (
            f"LengthPredictor({config.preset}, {config.design}, {config.num_experts} experts, "
            f"encoder {config.encoder!r}, backend {self.backend_reason or self.backend.name})"
        )


def _unpickled(folder: str, loading: dict[str, Any], learned: dict[str, Any]) -> LengthPredictor:
    predictor = LengthPredictor.from_pretrained(folder, **loading)
    predictor.recalibrator.restore(learned)
    return predictor


def chunks(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions of inputs in parts of like length, each small enough for one pass: shortest first.

    Args:
        lengths: tokens of each input.
    """
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) == CHUNK_REQUESTS or (len(rows) + 1) * lengths[row] > CHUNK_TOKENS):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
