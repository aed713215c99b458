"""The model card of a saved predictor: Markdown with the front matter of the Hugging Face Hub.

Knows the shapes of config.json, metrics.json and provenance.json and puts them into words; a part that is missing
is left out. Computes nothing, reads nothing, and quotes no prompt.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mope.files import write_text
from mope.target_llm import describe

Facts = Mapping[str, Any]

PROMPT = "Explain TCP slow start."
TAGS = ("llm-serving", "response-length-prediction", "scheduling", "mixture-of-experts", "calibration", "quantiles")
INLINE_NAMES = 12  # names of LLMs that are listed in a sentence, at most
PARTS = {"first_turn": "first turns", "all_turns": "all turns"}
PREDICTORS = {
    "single_head": "the single head of its kind and size",
    "single_expert": "the single expert of equal size",
    "ranker": "the ranker",
    "tfidf_ridge": "TF-IDF ridge",
    "lexical_gbm": "the lexical GBM",
    "embedding_gbm": "the embedding GBM",
    "previous_answers": "the mean of previous answers",
    "prompt_length": "prompt length",
    "constant": "the constant",
}
FINE_TUNED = ("single_head", "single_expert", "ranker")
DESIGNS = {
    "shared": "one trunk, a gate and a head for each expert, trained together",
    "separate": "a gate network and a network for each expert, each expert trained on its own bucket and a margin",
}
ROUTER_PARTS = {
    "gate": "a learned gate on text and numbers",
    "rules": "rules for what a prompt asks for in so many words",
    "lookup": "a look-up of training prompts with similar embeddings",
}
COMBINATIONS = {
    "top1": "the expert that the router prefers answers alone",
    "mixture": "all experts answer, weighted by the router",
}
PLACES = {
    "base": ", meant to run on a GPU",
    "small": ", small enough for a CPU",
    "micro": ", small enough for any CPU",
}
BOTH_NUMBERS = (
    "**End to end** is what a server gets: the router chose. **Oracle-routed** sends each row to the expert of its "
    "true bucket. For that one must know how long the answer is, so no server can reach it; it shows what routing "
    "loses and must not be compared with other predictors. Papers report either of them as the error of a predictor."
)
HARMS = (
    "Two answers to the same prompt differ in length, so no predictor can be exact. Decide with a quantile that fits "
    "the harm: a high one to reserve memory, the median to order a queue.",
    "**An answer predicted short that becomes long** loses most: under shortest-first scheduling it is started early, "
    "then demoted or preempted, and its cache may be thrown away. An answer predicted long that would have been short "
    "waits behind others. Use ageing or fair shares so that no request waits for ever, and charge by true lengths "
    "once they are known.",
)
SHIFTS = (
    "Where the source of the data cut its answers short and that was not declared, the predictor has learned the "
    "cut: it expects no answers beyond it.",
    "Other users, topics or system prompts than in the data shift the lengths. Compare with true lengths before you "
    "rely on it, and keep `observe` running.",
    "Who knows the predictor can write prompts that look short. Do not bill, refuse or rank people by it.",
)
LOOKUP_NOTE = (
    "The router's look-up holds embeddings of training prompts, from which something of the prompts can be guessed. "
    "Do not publish a predictor trained on private prompts."
)


def snippet(name: str) -> str:
    """Python that loads the predictor and asks it, as the card shows it.

    Args:
        name: what `LengthPredictor.from_pretrained` is given: a folder or a Hub id.
    """
    return (
        "from mope import LengthPredictor\n\n"
        f"predictor = LengthPredictor.from_pretrained({json.dumps(name, ensure_ascii=False)})\n"
        f"prediction = predictor.predict({json.dumps(PROMPT)})\n"
        "print(prediction.median, prediction.quantile(0.9))\n"
    )


def render_card(
    config: Facts,
    metrics: Facts,
    provenance: Facts,
    plots: Sequence[str],
    *,
    name: str,
    tables: str,
    report: Sequence[str] = (),
    warnings: Sequence[str] = (),
    datasets: Sequence[str] = (),
    licences: Sequence[str] = (),
    is_public: bool = False,
) -> str:
    """The whole card.

    Args:
        config: what `config.json` holds.
        metrics: what `metrics.json` holds.
        provenance: what `provenance.json` holds.
        plots: files in the artifact's folder `plots`, in the order to show them in.
        name: what a user gives to `LengthPredictor.from_pretrained`.
        tables: the metrics as Markdown, headings of the third level.
        report: what was read, kept and dropped, one finding per line.
        warnings: what to know before trusting the data.
        datasets: ids of data sets on the Hugging Face Hub, if the data comes from there.
        licences: what the data's licences are, one source per line.
        is_public: whether all data is public by these lines; of other data the card names no licence for the predictor.
    """
    title = Path(name).name
    sections = {
        "Use": _use(config, name),
        "Results": _results(metrics, tables, plots),
        "How it was made": _making(config, metrics, provenance),
        "Data": _data(report, warnings),
        "Limits, and who loses when it errs": _limits(config, metrics),
        "Largest errors on test rows": _failures(metrics.get("failures", ())),
        "Licence and provenance": _licence(config, provenance, licences, is_public),
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items() if text)
    head = f"---\n{_front_matter(metrics, title, datasets, is_public)}\n---\n\n# {_plain(title)}"
    return f"{head}\n\n{_introduction(config)}\n\n{body}\n"


def write_card(folder: Path, text: str) -> Path:
    """Write the card as `README.md` of an existing artifact folder."""
    path = folder / "README.md"
    write_text(path, text)
    return path


def _front_matter(metrics: Facts, title: str, datasets: Sequence[str], is_public: bool) -> str:
    """YAML for the Hub. No pipeline tag: no pipeline of the Hub predicts lengths."""
    from huggingface_hub import EvalResult, ModelCardData

    measured = {"mae": "MAE (tokens)", "kendall_tau": "Kendall tau"}
    results = [
        EvalResult(
            task_type="other",
            task_name="response length prediction",
            dataset_type=datasets[0] if datasets else "other",
            dataset_name=f"test split, {PARTS.get(part, part)}",
            dataset_config=part,
            dataset_split="test",
            metric_type=key,
            metric_name=label,
            metric_value=round(result["mope"][key], 3),
        )
        for part, result in metrics.get("test", {}).items()
        for key, label in measured.items()
        if _is_number(result.get("mope", {}).get(key))
    ]
    data = ModelCardData(
        license="apache-2.0" if is_public else None,
        library_name="mope",
        tags=list(TAGS),
        datasets=list(datasets) or None,
        metrics=list(measured) if results else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _introduction(config: Facts) -> str:
    num_experts = config["num_experts"]
    how = "one expert"
    if num_experts > 1:
        how = f"a router and {num_experts} experts (Mixture of Prediction Experts)"
    return (
        "Predicts how many tokens an LLM will answer before the first one is generated, as a calibrated "
        f"distribution. It is {how}{PLACES.get(config['preset'], '')}. It is for people who run LLM servers and "
        "schedule, batch or reserve memory by the length of answers."
    )


def _use(config: Facts, name: str) -> str:
    shell = f'mope predict {shlex.quote(name)} "{PROMPT}"'
    names = config["target_llms"]
    are_few = len(names) <= INLINE_NAMES
    known = ", ".join(map(_code, names)) if are_few else f"any of {len(names)} names, listed below by their families"
    llms = (
        f"`target_llm` can be {known}. Of any other name the nearest relative among them is taken; its quantiles are "
        "wide until some of its answers were observed. "
        if names
        else ""
    )
    return (
        f"```python\n{snippet(name)}```\n\n```bash\n{shell}\n```\n\n"
        f"Lengths are counted in tokens of {_code(config['label_tokenizer'])}. Give `history`, `max_tokens` and the "
        f"other flags of a request where you know them. {llms}Give true lengths back with "
        "`predictor.observe(prediction, actual_tokens=...)`: it then corrects itself for each target LLM."
        f"{'' if are_few else _by_family(names)}"
    )


def _by_family(names: Sequence[str]) -> str:
    """All names of LLMs that a predictor knows, one line per family, folded up."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(describe(name).family or name, []).append(name)
    lines = (f"**{_plain(family)}**: {', '.join(map(_code, families[family]))}" for family in sorted(families))
    return (
        f"\n\n<details>\n<summary>The {len(names)} names of LLMs and families that it knows</summary>\n\n"
        f"{_list(lines)}\n\n</details>"
    )


def _results(metrics: Facts, tables: str, plots: Sequence[str]) -> str:
    read = list(_readings(metrics))
    if any("mope_oracle_routed" in result for result in metrics.get("test", {}).values()):
        read.append(BOTH_NUMBERS)
    read += _routing(metrics.get("router", {}), metrics.get("combination", {}))
    other = [
        f"### On the test split of {_plain(source)}\n\n{_list(_readings(found))}"
        for source, found in metrics.get("other_data", {}).items()
    ]
    shown = [f"![{Path(plot).stem.replace('_', ' ')}](plots/{Path(plot).name})" for plot in plots]
    return "\n\n".join(block for block in (_list(read), tables.strip(), *other, *shown) if block)


def _readings(metrics: Facts) -> Iterator[str]:
    """Each part of the test rows in words."""
    for part, results in metrics.get("test", {}).items():
        if _is_number(results.get("mope", {}).get("mae")):
            sentences = _reading(results, metrics.get("mope_minus", {}).get(part, {}))
            yield f"**{PARTS.get(part, part).capitalize()}**: {' '.join(sentences)}"


def _reading(results: Facts, differences: Facts) -> Iterator[str]:
    """Error, order and coverage on one part of the test rows, and how the others did."""
    mope = results["mope"]
    oracle = results.get("mope_oracle_routed", {}).get("mae")
    beside = f"; oracle-routed {_tokens(oracle)}" if _is_number(oracle) else ""
    yield f"MAE **{_tokens(mope['mae'])} tokens** end to end{_interval(mope.get('mae_ci'))}{beside}."
    rivals = {name: values for name, values in results.items() if name in PREDICTORS and _is_number(values.get("mae"))}
    cheap = [name for name in rivals if name not in FINE_TUNED]
    if cheap:
        best = min(cheap, key=lambda name: float(rivals[name]["mae"]))
        words = f"{PREDICTORS[best]}, the best without fine-tuning"
        yield _verdict(mope, rivals[best], words, differences.get(best, {}))
    if _is_number(taught := results.get("teacher", {}).get("mae")):
        yield f"The larger predictor that taught it has {_tokens(taught)} ({mope['mae'] / taught - 1:+.1%})."
    for name in ("single_head", "single_expert"):
        if name in rivals:
            yield _verdict(mope, rivals[name], PREDICTORS[name], differences.get(name, {}))
    if _is_number(mope.get("kendall_tau")):
        yield f"Order of the answers: Kendall's tau {mope['kendall_tau']:.3f}."
        taus = {
            name: float(rival["kendall_tau"]) for name, rival in rivals.items() if _is_number(rival.get("kendall_tau"))
        }
        if taus:
            first = max(taus, key=taus.__getitem__)
            yield f"The best of the others at that is {PREDICTORS[first]} with {taus[first]:.3f}."
    coverage = {level: share for level, share in mope.get("coverage", {}).items() if _is_number(share)}
    if coverage:
        listed = (f"{_percent(share)} under the {100 * float(level):g} % quantile" for level, share in coverage.items())
        yield f"Of the true lengths lay {', '.join(listed)}."


def _verdict(mope: Facts, rival: Facts, rival_name: str, difference: Facts) -> str:
    """MoPE against one rival; where there is a paired interval, only one on one side of zero tells them apart."""
    interval, gap = difference.get("ci"), difference.get("mae_difference")
    if interval and _is_number(gap):
        verdict = "is better than" if interval[1] < 0 else "is worse than" if interval[0] > 0 else "can't be told from"
        paired = f"; difference {gap:+,.1f}{_interval(interval, '+,.1f')}"
    else:
        verdict = "has a lower MAE than" if mope["mae"] < rival["mae"] else "has no lower MAE than"
        paired = ""
    return f"It {verdict} {rival_name} (MAE {_tokens(rival['mae'])}{paired})."


def _routing(router: Facts, combination: Facts) -> Iterator[str]:
    """What the router's parts and the combination bring, the experts staying the same."""
    tried = {parts: values.get("mae_end_to_end") for parts, values in router.get("ablation", {}).items()}
    for errors, words in (
        (tried, "some of the router's parts"),
        (combination.get("test_mae", {}), "either way to combine the experts"),
    ):
        known = {name: float(mae) for name, mae in errors.items() if _is_number(mae)}
        if len(known) > 1:
            listed = ", ".join(f"{_code(name)} {_tokens(mae)}" for name, mae in known.items())
            best = min(known, key=known.__getitem__)
            yield f"MAE end to end on all turns with {words}: {listed}. Lowest: {_code(best)}."
    if _is_number(router.get("accuracy")):
        yield f"The router's first choice is the true bucket for {_percent(router['accuracy'])} of the test rows."


def _making(config: Facts, metrics: Facts, provenance: Facts) -> str:
    encoder = config["encoder_config"]
    size = [
        words.format(encoder[key])
        for key, words in (
            *(("model_type", "{}"), ("num_hidden_layers", "{} layers"), ("hidden_size", "width {}")),
            *(("vector_size", "{} numbers a token"), ("num_filters", "{} filters over three tokens in a row")),
        )
        if encoder.get(key)
    ]
    parts = [ROUTER_PARTS[part] for part in config["router_parts"]]
    top = config["edges"][config["num_body_bins"]]
    made = [
        f"**Encoder**: {_code(config['encoder'])}{_in_brackets(size)}. It reads up to {config['max_prompt_tokens']} "
        f"tokens of the prompt, both ends of a longer one, up to {config['max_context_tokens']} of the previous or "
        f"system prompt, and {len(config['number_names'])} numbers.",
        *_taught(config, provenance.get("config", {})),
        f"**Design**: {config['design']}: {DESIGNS[config['design']]}.",
        f"**Experts**: {'; '.join(_buckets(config['boundaries']))} tokens.",
        f"**Router**: {'; '.join(parts)}." if parts else "",
        f"**Combination**: {config['combination']}: {COMBINATIONS[config['combination']]}." if parts else "",
        f"**Distribution**: {config['num_body_bins']} log-spaced bins up to {top:,.0f} tokens, above that a Pareto "
        f"tail of index {config['tail_index']:.2f}, fitted to the training answers.",
        "**Calibration**: the cumulative probabilities are mapped to what was observed on the validation split, "
        "first and later turns apart.",
        f"**Label tokenizer**: {_code(config['label_tokenizer'])}.",
        *_training(metrics.get("training", {}), provenance.get("config", {}).get("fit", {})),
        *_run(provenance),
    ]
    return _list(filter(None, made))


def _taught(config: Facts, settings: Facts) -> Iterator[str]:
    """Who taught it, if it was."""
    model, share = settings.get("model", {}), settings.get("fit", {}).get("teacher_weight", 0.0)
    if teacher := model.get("teacher"):
        begun = "its vectors were distilled" if config["preset"] == "micro" else "its trunk was cut"
        begun = "" if model.get("encoder") else f": {begun} from that predictor's trunk"
        beside = "".join(f", beside it {_code(name)}" for name in model.get("co_teachers", ()))
        whose = "the mean of their distributions" if beside else "its distributions"
        yield (
            f"**Teacher**: {_code(teacher)}{beside}{begun}; {_percent(share)} of the loss followed {whose}, the rest "
            "the true lengths."
        )
    elif others := model.get("co_teachers"):
        yield (
            f"**Teachers**: {', '.join(map(_code, others))}, each for the data sets that it learned from, where "
            f"{_percent(share)} of the loss followed the mean of their distributions, the rest the true lengths."
        )


def _buckets(boundaries: Sequence[float]) -> list[str]:
    """The answers that each expert is for, in whole tokens; a length equal to a border belongs below it."""
    lows = [1, *(math.floor(border) + 1 for border in boundaries)]
    highs = [math.floor(border) for border in boundaries]
    ranges = [f"{low:,} to {high:,}" for low, high in zip(lows, highs, strict=False)] + [f"{lows[-1]:,} and more"]
    return [f"expert {expert} for {tokens}" for expert, tokens in enumerate(ranges)]


def _training(training: Facts, settings: Facts) -> Iterator[str]:
    """Rows, settings, and what it took to train each network."""
    rows = [f"{name} {count:,}" for name, count in training.get("rows", {}).items()]
    if rows:
        yield f"**Rows used**: {', '.join(rows)}."
    if settings:
        yield (
            f"**Settings**: up to {settings['epochs']:g} epochs in batches of {settings['batch_size']}, learning rate "
            f"{settings['learning_rate']:g} (encoder) and {settings['head_learning_rate']:g} (gate and heads)."
        )
        if settings.get("average_decay"):
            yield f"**Weights**: a running average over training, decay {settings['average_decay']:g} a step."
    words = {"num_steps": "{:,} steps", "seconds": "{:,.0f} s", "validation_loss": "validation loss {:.3f}"}
    for network, values in training.get("networks", {}).items():
        done = [text.format(values[key]) for key, text in words.items() if _is_number(values.get(key))]
        if done:
            yield f"**Training of {_code(network)}**: {', '.join(done)}."


def _run(provenance: Facts) -> Iterator[str]:
    """Command, time, machine and versions."""
    if parts := provenance.get("parts"):
        yield "**Commands**: " + ", then ".join(_code(shlex.join(part["command"])) for part in parts)
        spans = [[datetime.fromisoformat(part[key]) for key in ("started", "finished")] for part in parts]
        minutes = sum((finished - started).total_seconds() for started, finished in spans) / 60
        span = f"from {parts[0]['started']} to {parts[-1]['finished']}"
        yield f"**Time**: {minutes:,.0f} minutes in {len(parts)} parts, {span}, evaluation included"
    elif provenance.get("command"):
        yield f"**Command**: {_code(shlex.join(provenance['command']))}"
    if not parts and provenance.get("started") and provenance.get("finished"):
        started, finished = (datetime.fromisoformat(provenance[key]) for key in ("started", "finished"))
        minutes = (finished - started).total_seconds() / 60
        span = f"from {provenance['started']} to {provenance['finished']}"
        yield f"**Time**: {minutes:,.0f} minutes, {span}, evaluation included"
    if provenance.get("seed") is not None:
        yield f"**Seed**: {provenance['seed']}"
    machine = provenance.get("machine", {})
    cores = f"{machine['num_cores']} cores" if machine.get("num_cores") else None
    hardware = [text for text in (machine.get("cpu"), cores, *machine.get("gpus", ()), machine.get("platform")) if text]
    if hardware:
        yield f"**Hardware**: {_plain(', '.join(hardware))}"
    versions = {"python": provenance.get("python"), **provenance.get("packages", {})}
    listed = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    if listed:
        yield f"**Versions**: {listed}"


def _data(report: Sequence[str], warnings: Sequence[str]) -> str:
    findings = [line for line in report if not line.startswith("warning: ")]
    told = dict.fromkeys([*warnings, *(line.removeprefix("warning: ") for line in report if line not in findings)])
    return _list([*map(_plain, findings), *(f"**Warning**: {_plain(warning)}" for warning in told)])


def _limits(config: Facts, metrics: Facts) -> str:
    return _list(
        [
            *HARMS,
            *_biases(metrics.get("by_length", {})),
            *_languages(metrics.get("by_language", {})),
            *_llms(metrics.get("by_target_llm", {}), config["target_llms"]),
            *SHIFTS,
            f"Of a long prompt, only {config['max_prompt_tokens']} tokens are read, none from its middle.",
            *([LOOKUP_NOTE] if "lookup" in config["router_parts"] else []),
        ]
    )


MIN_BIAS_ROWS = 10  # an average over fewer is none


def _biases(by_length: Facts) -> Iterator[str]:
    """The buckets of true length that are guessed too short and too long by most."""
    biases = {
        name: float(values["bias"])
        for name, values in by_length.items()
        if _is_number(values.get("bias")) and values.get("num_rows", MIN_BIAS_ROWS) >= MIN_BIAS_ROWS
    }
    if not biases:
        return
    shortest, longest = (choose(biases, key=biases.__getitem__) for choose in (min, max))
    for name, words, wrong in ((shortest, "short", biases[shortest] < 0), (longest, "long", biases[longest] > 0)):
        if wrong:
            off = f"by {_tokens(abs(biases[name]))} tokens on average"
            yield f"Test answers of {_plain(name)} tokens are predicted too {words}, {off}."


def _languages(by_language: Facts) -> Iterator[str]:
    worse = "can get worse predictions, and schedules that rest on these serve them worse."
    if by_language:
        listed = ", ".join(f"{_plain(name)} {values['num_rows']:,}" for name, values in by_language.items())
        yield f"Test rows by language: {listed}. People who write in languages that are rare here {worse}"
    else:
        yield f"Errors were not measured by language. People who write in languages that are rare in the data {worse}"


def _llms(by_target_llm: Facts, known: Sequence[str]) -> Iterator[str]:
    if by_target_llm:
        worst = max(by_target_llm, key=lambda name: float(by_target_llm[name]["mae"]))
        error = _tokens(by_target_llm[worst]["mae"])
        yield f"Of the LLMs among the test rows, {_plain(worst)} has the highest MAE, {error} tokens."
    other = "is not named above" if known else "did not write the data's answers"
    yield (
        f"LLMs differ in how much they say. For an LLM that {other}, expect a bias until `observe` has seen some of "
        "its answers; one that thinks aloud before it answers is another case still."
    )


def _failures(failures: Sequence[Facts]) -> str:
    """Lengths alone: the prompts may not be quoted."""
    columns = {
        "actual": "true tokens",
        "predicted": "predicted median",
        "quantile_90": "90 % quantile",
        "prompt_chars": "prompt characters",
    }
    shown = [row for row in failures if all(_is_number(row.get(key)) for key in columns)]
    if not shown:
        return ""
    table = [
        "| " + " | ".join(["error", *columns.values()]) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for row in shown:
        kind = "too short" if row["predicted"] < row["actual"] else "too long"
        table.append("| " + " | ".join([kind, *(f"{row[key]:,.0f}" for key in columns)]) + " |")
    return "\n".join(table)


def _licence(config: Facts, provenance: Facts, licences: Sequence[str], is_public: bool) -> str:
    predictor = (
        "The predictor is under Apache-2.0." if is_public else "Its licence is for the owner of the data to choose."
    )
    git = provenance.get("git") or {}
    changed = " with uncommitted changes" if git.get("dirty") else ""
    sources = [f"{_code(name)}: {_code(_words(value))}" for name, value in provenance.get("data", {}).items() if value]
    return _list(
        [
            f"{predictor} The encoder {_code(config['encoder'])} that it was started from and "
            "the data have licences of their own: read them before you publish or sell it.",
            "No text of the data is in this folder.",
            *licences,
            *([f"Data it was trained on, with its fingerprint: {'; '.join(sources)}."] if sources else []),
            *([f"Code: commit {_code(git['commit'])}{changed}."] if git.get("commit") else []),
            "`provenance.json` holds the whole record, `files.json` the hash of each file that predictions depend on.",
        ]
    )


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items() if item is not None)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _in_brackets(words: Sequence[str]) -> str:
    return f" ({', '.join(words)})" if words else ""


def _interval(interval: Sequence[float] | None, form: str = ",.1f") -> str:
    return f" (95 % interval {interval[0]:{form}} to {interval[1]:{form}})" if interval else ""


def _tokens(value: float) -> str:
    return f"{value:,.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _without_folders(text: str) -> str:
    """The text on one line, absolute paths in it cut to their last part; addresses on the web stay."""
    return re.sub(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\,()]+[/\\])+", "", " ".join(text.split()))


def _plain(text: str) -> str:
    """A text from outside as Markdown that shows it as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", _without_folders(text))


def _code(text: str) -> str:
    return "`" + _without_folders(text).replace("`", "'") + "`"
