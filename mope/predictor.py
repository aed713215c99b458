"""`LengthPredictor`: load a saved predictor, ask it, teach it, save it.

Puts encoder, backend, router, mixture, calibration and recalibration in a row; each of them is elsewhere.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mope import artifact
from mope import packaged as packaged_predictors
from mope.backends.choice import Choice, choose
from mope.cache import CacheStats, LruCache
from mope.calibration import Calibration
from mope.epochs import Target
from mope.errors import ArtifactError, DataError
from mope.features import NUMBER_NAMES, RequestEncoder
from mope.grid import Array, cdf_at
from mope.inputs import as_requests, has_text, request_from
from mope.mixture import assemble, experts_needed
from mope.prediction import LengthPrediction
from mope.recalibration import Recalibrator
from mope.request import Request
from mope.router import Router
from mope.target_llm import describe

if TYPE_CHECKING:
    from mope.backends import Backend
    from mope.config import PredictorConfig
    from mope.serving import ServingPredictor

_logger = logging.getLogger("mope")


CACHE_SIZE = 4096
MAX_STRANGE_FAMILIES = 100  # families that are not known and that are spoken of


class _Raw(NamedTuple):
    """A prediction before what was learned while serving is applied: of a request, the same every time."""

    cumulative: Array
    route: tuple[float, ...]
    expert: int
    source: str


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
        recalibrator: what was learned while serving.
        folder: the artifact folder it came from, if any.
        choice: how the backend was chosen, if it was.
        cache_size: requests whose predictions are kept, see `from_pretrained`.
    """

    def __init__(
        self,
        config: PredictorConfig,
        backend: Backend,
        encoder: RequestEncoder,
        router: Router,
        calibration: Calibration,
        fallback: Array,
        recalibrator: Recalibrator | None = None,
        folder: Path | None = None,
        choice: Choice | None = None,
        cache_size: int = 0,
    ) -> None:
        self.config, self.backend, self.encoder, self.router = config, backend, encoder, router
        self.calibration, self.folder = calibration, folder
        self.recalibrator = Recalibrator(config.unknown_llms) if recalibrator is None else recalibrator
        self.device = "cpu" if choice is None else choice.device
        self.backend_reason = "" if choice is None else choice.reason
        self._serving: ServingPredictor | None = None
        self._starting = Lock()
        self._cache: LruCache[_Raw] = LruCache(cache_size)
        self._fallback = np.array(fallback, dtype=np.float64)
        self._fallback.flags.writeable = False
        self._edges = np.asarray(config.edges, dtype=np.float64)
        self._strange_families: set[str] = set()
        self._unseen_modes = frozenset(config.unknown_llms) - {""}

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
            ArtifactError: nothing is there, or a file is missing, changed or of another format.
            ConfigError: an unknown backend, or one that does not run on the device or in the precision.
            MissingExtraError: the backend's packages are not installed.
        """
        folder = _find(name_or_path, revision)
        config = artifact.check(folder)
        if config.number_names != NUMBER_NAMES:
            raise ArtifactError(
                f"{folder} was trained on other request features than this mope computes; train it anew"
            )
        from tokenizers import Tokenizer

        encoder = RequestEncoder.of(config, Tokenizer.from_file(str(folder / "tokenizer.json")))
        choice = choose(folder, backend, device, precision)
        _logger.info("%s: %s", folder, choice.reason)
        calibration, fallback = artifact.read_calibration(folder)
        learned = folder / "recalibration.json"
        return cls(
            config,
            choice.load(folder, config, num_threads),
            encoder,
            artifact.read_router(folder),
            calibration,
            fallback,
            Recalibrator.from_json(artifact.read_json(learned)) if learned.exists() else None,
            folder,
            choice,
            cache_size,
        )

    def predict(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        **flags: Any,
    ) -> LengthPrediction:
        """Predict the length of one answer.

        Args:
            prompt: text of the user's message.
            messages: the whole conversation instead, OpenAI-style, ending with the user's message.
            history: the messages before `prompt`, OpenAI-style.
            **flags: what else is known of the request: `target_llm` (and where its name does not tell `llm_family`,
                `llm_size` in billions of parameters, `llm_reasoning`; a family that the predictor does not know is
                logged once as a warning), `max_tokens`, `temperature`, `tools`,
                `response_format`, `thinking`, `thinking_budget`, `system`.

        Returns:
            A distribution over response tokens.

        Raises:
            DataError: no prompt, or messages that can't be read.
        """
        return self.predict_batch([request_from(prompt, messages, history, flags)])[0]

    def predict_batch(self, requests: Iterable[Request | str | Mapping[str, Any]]) -> list[LengthPrediction]:
        """Predict a batch.

        Args:
            requests: each a `Request`, a prompt, or a mapping with `prompt` or `messages`, and optionally
                `history` and the flags of `predict`.

        Returns:
            One prediction per request, in order. A request without any text gets the fallback, and
            `source` says so.
        """
        known = as_requests(requests)
        for request in known:
            if request.llm_family:
                self._check_family(request.llm_family)
        answers: dict[int, LengthPrediction] = {
            row: self.fallback("no text", request) for row, request in enumerate(known) if not has_text(request)
        }
        keys = [self.encoder.digest(request) for request in known] if self._cache else []
        for row, key in enumerate(keys):
            if row not in answers and (raw := self._cache.get(key)) is not None:
                answers[row] = self._answer(raw, known[row])
        rows = [row for row in range(len(known)) if row not in answers]
        if rows:
            for row, raw in zip(rows, self._ask([known[row] for row in rows]), strict=True):
                answers[row] = self._answer(raw, known[row])
                if keys:
                    self._cache.put(keys[row], raw)
        return [answers[row] for row in range(len(known))]

    def _check_family(self, family: str) -> None:
        """Say once of a family that it is none the predictor knows; the prediction does not change by it."""
        llms, name = self.encoder.llms, describe(family).name
        if llms.find(family) or name in self._strange_families or len(self._strange_families) >= MAX_STRANGE_FAMILIES:
            return
        self._strange_families.add(name)
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

    def close(self) -> None:
        """End the threads of `predict_async`, if there are any."""
        with self._starting:
            serving, self._serving = self._serving, None
        if serving is not None:
            serving.close()

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

    def _ask(self, requests: Sequence[Request]) -> list[_Raw]:
        encoded = self.encoder.encode(requests)

        def choose_experts(gate_BK: Array, embedding_BH: Array) -> Array:
            route_BK = self.router.probabilities(gate_BK, embedding_BH, encoded.rule_hits)
            return experts_needed(route_BK, self.config.combination)

        raw = self.backend.run(encoded, choose_experts)
        has_history = np.array([request.num_earlier_turns > 0 for request in requests])
        result = assemble(self.config, self.router, self.calibration, raw, encoded.rule_hits, has_history)
        found = []
        for cdf_E, route_K in zip(result.cdf_BE, result.route_BK, strict=True):
            own_E = cdf_E.copy()  # a view would keep the whole batch
            own_E.flags.writeable = False  # it may be in the cache
            found.append(_Raw(own_E, tuple(route_K.tolist()), int(route_K.argmax()), "model"))
        return found

    def _answer(self, raw: _Raw, request: Request) -> LengthPrediction:
        mode = _mode_of(request)
        edges, cumulative = self._corrected(raw, request, mode)
        if request.thinking_budget is not None and "thinking" in self._unseen_modes and "thinking" in mode.split("+"):
            # what it would answer without thoughts, and at most the budget of them; the network knows nothing of either
            plain = "+".join(part for part in mode.split("+") if part != "thinking")
            shorter_edges, shorter = self._corrected(raw, request, plain)
            bound = cdf_at(shorter_edges, shorter[None].repeat(len(edges), 0), edges - request.thinking_budget)
            cumulative = np.maximum(cumulative, np.where(edges > request.thinking_budget, bound, 0.0))
        return LengthPrediction(
            edges=edges,
            cumulative=cumulative,
            expert=raw.expert,
            route_probabilities=raw.route,
            source=raw.source,
            max_tokens=request.max_tokens,
            target_llm=request.target_llm,
            llm_family=request.llm_family,
            mode=mode,
            raw_cumulative=raw.cumulative,
            tail_index=self.config.tail_index,
        )

    def _corrected(self, raw: _Raw, request: Request, mode: str) -> tuple[Array, Array]:
        key = self._key_of(request.target_llm, request.llm_family, mode, raw.source)
        return self.recalibrator.correct(self._edges, raw.cumulative, key)

    def _key_of(self, llm: str | None, family: str | None, mode: str, source: str) -> Target:
        """What corrections are kept apart by; the fallback is another distribution and has its own."""
        named = describe(llm)
        known = self.encoder.llms.knows(llm) if named.name else self.config.unnamed_llm
        if not self._unseen_modes.isdisjoint(mode.split("+")):
            known = False  # of this LLM too it was not seen what it answers when asked like this
        if source != "model":
            mode = f"fallback {mode}".rstrip()
        return Target(named.name, mode, describe(family).family or named.family or "", known)

    def observe(
        self,
        prediction: LengthPrediction,
        actual_tokens: int,
        *,
        censored: bool | None = None,
        time_s: float | None = None,
    ) -> None:
        """Learn from a finished request: later predictions for its target LLM are corrected.

        Args:
            prediction: what was predicted for it, from this predictor.
            actual_tokens: tokens that were generated.
            censored: the answer was cut; if None, it counts as cut when it reached the request's `max_tokens`.
            time_s: when it finished, in seconds since 1970; now if None.

        Raises:
            DataError: fewer than 1 token, a time that is none, or a prediction that already counts what remains.
        """
        if not isinstance(prediction, LengthPrediction):
            raise DataError(f"prediction is {type(prediction).__name__}; expected what predict() gave")
        if prediction.generated or prediction.raw_cumulative is None:
            raise DataError("observe needs the prediction that predict() gave, not one made by remaining()")
        if isinstance(actual_tokens, bool) or not isinstance(actual_tokens, Integral | float):
            raise DataError(f"actual_tokens is {type(actual_tokens).__name__}; expected a number of tokens")
        if censored is None:
            censored = prediction.max_tokens is not None and actual_tokens >= prediction.max_tokens
        key = self._key_of(prediction.target_llm, prediction.llm_family, prediction.mode, prediction.source)
        self.recalibrator.observe(self._edges, prediction.raw_cumulative, key, actual_tokens, censored, time_s)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the predictor, with all that `observe` taught it, into a folder. Whole or not at all.

        What is loaded from there predicts bit for bit what this predictor does from now on. Beside what it predicted
        until now, that may differ a little: `observe` puts off working out corrections anew (of an LLM's answers until
        an eighth more are there, 50 at most; of its relatives' longer), and here all of them are.

        Raises:
            ArtifactError: the folder exists and is not a saved predictor.
        """
        target = Path(folder)
        with artifact.writing(target) as temporary:
            self.write(temporary)
            for name in ("metrics.json", "provenance.json", "README.md", "plots", "onnx"):
                source = self.folder / name if self.folder is not None else None
                if source is not None and source.is_dir():
                    shutil.copytree(source, temporary / name)
                elif source is not None and source.exists():
                    shutil.copy2(source, temporary / name)
        return target

    def write(self, folder: Path) -> None:
        """Write the files that predictions depend on into an existing folder, unsealed."""
        artifact.write_json(folder / "config.json", self.config.model_dump(mode="json"))
        (folder / "tokenizer.json").write_text(self.encoder.tokenizer_json(), encoding="utf-8")
        artifact.write_router(folder, self.router)
        artifact.write_calibration(folder, self.calibration, self._fallback)
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

    def __repr__(self) -> str:
        config = self.config
        return (
            f"LengthPredictor({config.preset}, {config.design}, {config.num_experts} experts, "
            f"encoder {config.encoder!r}, backend {self.backend_reason or self.backend.name})"
        )


def _mode_of(request: Request) -> str:
    """How an LLM is asked, as far as that changes what it answers."""
    thinking = "" if request.thinking is None else "thinking" if request.thinking else "no thinking"
    output = "" if not request.response_format else "json" if "json" in request.response_format else "format"
    return "+".join(part for part in (thinking, "tools" if request.tools else "", output) if part)


def _find(name_or_path: str | Path, revision: str | None) -> Path:
    path = packaged_predictors.located(name_or_path)
    name = str(name_or_path)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"no folder {name}, and the Hugging Face Hub gave none: {reason}") from error
