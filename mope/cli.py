"""`mope`: train, predict and evaluate from the shell.

Knows arguments, lines and tables; what a command needs is imported when it runs, so that `mope --help` is quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mope import console as terminal
from mope.errors import ConfigError
from mope.field_map import FieldMap, RequestFields
from mope.files import check_output_file
from mope.flags import Parser, add_flags, flag_name, given, validated
from mope.predict_files import LEVELS, InterruptedPredictionsError, PredictedFiles, answer_of
from mope.reader import read_flags
from mope.record_folders import TRAIN, local_files
from mope.request import TOKEN_UNITS
from mope.request_files import STDIN

if TYPE_CHECKING:
    from argparse import Namespace

    from mope.prediction import LengthPrediction
    from mope.predictor import LengthPredictor

PROMPT_WIDTH = 40

PREDICT_EXAMPLE = """\
mope predict chat-small "Explain TCP slow start." --target-llm llama-3-8b --max-tokens 512
echo "Explain TCP slow start." | mope predict runs/demo --json
mope predict runs/demo --input requests.jsonl --output predictions.jsonl
mope predict runs/demo --input 'logs/*.jsonl.gz' --prompt-field request.question --llm-field served.by"""
PREDICT_DETAILS = """\
Predict how many tokens an LLM will answer.

With --input, each record of the files becomes one line {"id", "median", "mean", "quantiles": {"0.1", "0.5", "0.9",
"0.99"}, "expert", "source"}, in the same order. A record is {"prompt" or "messages", "history"?, "target_llm"?,
"max_tokens"?, ...}, the body of a request to OpenAI, Anthropic, vLLM, SGLang or Ollama, or what mope-train reads: a log
of a gateway, a batch, a trace; in other forms --prompt-field and its like say where it holds what. Files are JSON, JSON
Lines, CSV or TSV (also .gz or .zst), parquet, Arrow or Feather.

Where thoughts of the LLM are known, "thoughts" has their share of the response, their tokens and the visible tokens.

A record that is no request becomes {"id", "error"}: it is counted on stderr, the others are predicted, and the exit
status is 0. If none is a request, the status is 2 and no --output appears. The id is custom_id, id or request_id, a
text or a number; a record on line 7 without one gets the id "line 7", of several files "FILE:7". Repeated ids are
counted on stderr."""


def main(argv: list[str] | None = None) -> int:
    """Run `mope` and return its exit status.

    Args:
        argv: arguments; the command line's if not given.
    """
    return terminal.run(_main, argv)


def _main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]][0](argv[1:])
    commands = "\n".join(f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = Parser(
        "mope",
        f"Predicts how many tokens an LLM will answer, before the first one is generated.\n\ncommands:\n{commands}",
        "COMMAND [options]",
        'mope train --recipe demo --output runs/demo\nmope predict runs/demo "Explain TCP slow start."',
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="its own options: mope COMMAND --help")
    parser.add_argument("--version", action="version", version=_version())
    parser.parse_args(argv)
    return 0


def _version() -> str:
    from importlib.metadata import version

    return f"mope {version('mope-llm')}"


def _train(argv: list[str]) -> int:
    from mope.training.cli import main as train

    return train(argv, prog="mope train")


def _data(argv: list[str]) -> int:
    from mope.training.data.cli import main as data

    return data(argv)


def _predict(argv: list[str]) -> int:
    from mope.backends.choice import BACKENDS

    parser = Parser("mope predict", PREDICT_DETAILS, "ARTIFACT [PROMPT ...] [options]", PREDICT_EXAMPLE)
    parser.add_argument(
        "artifact",
        metavar="ARTIFACT",
        help="folder of a saved predictor, one that comes with mope (chat-small, chat-micro), or a Hub id",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; none or - reads one prompt from stdin")
    parser.add_argument(
        "--input",
        metavar="PATH",
        help="requests, or logs of them: a file, folder or glob of JSON, CSV, parquet, ...; - for JSON from stdin",
    )
    parser.add_argument("--output", metavar="FILE", help="JSON Lines with predictions (default: stdout)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="with --output: go on where Ctrl-C ended the same command, with what it kept in OUTPUT.partial",
    )
    parser.add_argument("--json", action="store_true", help="print JSON Lines instead of a table")
    parser.add_argument("--target-llm", metavar="NAME", help="the LLM that will answer, where a request names none")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="cap on response tokens, where a request has none")
    parser.add_argument(
        "--effort",
        metavar="LEVEL",
        help="reasoning effort (none, minimal, low, medium, high, xhigh, or 0 to 5), where a request says none",
    )
    parser.add_argument(
        "--token-unit",
        choices=TOKEN_UNITS,
        help="count the LLM's own tokens, or those of cl100k_base (default: as trained)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="requests predicted at once (default: 64)"
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="engine that runs the network (default: the quickest that mope-export wrote and that is installed, else "
        "torch)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu, or what --backend needs)"
    )
    parser.add_argument(
        "--precision", metavar="NAME", help="of what was exported, for example int8 (default: the backend's own)"
    )
    add_flags(parser, "fields", RequestFields)
    parser.add_argument(
        "--hub-split",
        default=TRAIN,
        metavar="TEXT",
        help=f"of a folder whose files are named by splits (default: {TRAIN})",
    )
    arguments = parser.parse_intermixed_args(argv)  # prompts may stand behind flags
    fields = given(arguments).get("fields", {})
    if fields and not arguments.input:
        raise ConfigError(f"{flag_name(next(iter(fields)))} goes with --input: it says where its records hold what")
    if arguments.input and arguments.prompts:
        raise ConfigError("got prompts and --input; give one of them")
    if arguments.output and not arguments.input:
        raise ConfigError("--output goes with --input; to save predictions of prompts type --json > FILE")
    if arguments.resume and arguments.output in (None, STDIN):
        raise ConfigError("--resume goes with --output: what an interrupted command predicted is kept beside it")
    for flag, value in (("--batch-size", arguments.batch_size), ("--max-tokens", arguments.max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag}: got {value}; expected at least 1")
    if arguments.input:
        if arguments.output not in (None, STDIN):
            found = None if arguments.input == STDIN else local_files(arguments.input, arguments.hub_split)
            check_output_file(Path(arguments.output), reads={"--input": found[0] if found else arguments.input})
        return _predict_lines(arguments, FieldMap.of(RequestFields(**fields)), argv)
    prompts = _prompts(arguments.prompts)
    predictor = _load(arguments)
    predictions = predictor.predict_batch([{"prompt": prompt, **_defaults(arguments)} for prompt in prompts])
    if arguments.json:
        for number, prediction in enumerate(predictions, start=1):
            print(json.dumps(answer_of(number, prediction)))
    else:
        _print_table(predictor, prompts, predictions)
    return 0


def _prompts(typed: Sequence[str]) -> list[str]:
    """The prompts that were typed; `-`, or none at all, stands for what comes from stdin."""
    if typed and STDIN not in typed:
        return list(typed)
    if sys.stdin.isatty():
        terminal.console().print("type the prompt, then Ctrl-D on a line of its own")
    read = sys.stdin.read().removesuffix("\n")
    if not read:
        raise ConfigError("no prompt: none was typed and stdin is empty; type one in quotes, or --input FILE")
    return [read if prompt == STDIN else prompt for prompt in typed or [STDIN]]


def _load(arguments: Namespace) -> LengthPredictor:
    from mope.predictor import LengthPredictor

    if arguments.backend in (None, "torch") and find_spec("torch"):
        _check_device(arguments.device or "cpu")
    return LengthPredictor.from_pretrained(
        arguments.artifact, backend=arguments.backend, device=arguments.device, precision=arguments.precision
    )


def _check_device(device: str) -> None:
    from mope.extras import require

    torch = require("torch", "a predictor")
    try:
        available = torch.device(device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError as error:
        raise ConfigError(f"--device: got {device!r}; expected cpu, cuda or cuda:NUMBER") from error
    if not available:
        raise ConfigError(f"--device: got {device!r}, but torch finds no GPU; type --device cpu")


def _defaults(arguments: Namespace) -> dict[str, Any]:
    """Flags of a request that were typed for all of them."""
    typed = {name: getattr(arguments, name) for name in ("target_llm", "max_tokens", "effort", "token_unit")}
    typed |= read_flags({"effort": arguments.effort}, strict=True)
    return {name: value for name, value in typed.items() if value is not None}


def _print_table(predictor: LengthPredictor, prompts: Sequence[str], predictions: Sequence[LengthPrediction]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="response tokens", title_justify="left", box=None, padding=(0, 2, 0, 0))
    thoughts = [prediction.thoughts for prediction in predictions]
    shows_thoughts = any(part is not None for part in thoughts)
    for heading in ("prompt", "median", "80% within", "99% below", *["thoughts"] * shows_thoughts, "expert", "route"):
        table.add_column(heading, justify="left" if heading in ("prompt", "expert") else "right")
    for prompt, prediction, part in zip(prompts, predictions, thoughts, strict=True):
        low, median, high, top = prediction.quantiles(LEVELS)
        text = Text(" ".join(prompt.split()))
        text.truncate(PROMPT_WIDTH, overflow="ellipsis")
        expert, route = prediction.source, ""
        if prediction.expert >= 0:
            expert = predictor.config.expert_names[prediction.expert]
            route = f"{prediction.route_probabilities[prediction.expert]:.0%}"
        share = ["" if part is None else f"{part.share:.0%}"] * shows_thoughts
        table.add_row(text, f"{median:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{top:,.0f}", *share, Text(expert), route)
    Console().print(table)


def _predict_lines(arguments: Namespace, fields: FieldMap, argv: list[str]) -> int:
    """Predict every request of a file, a folder or a glob."""
    from rich.markup import escape

    files = PredictedFiles(
        source=arguments.input,
        output=arguments.output,
        fields=fields,
        split=arguments.hub_split,
        defaults=_defaults(arguments),
        batch_size=arguments.batch_size,
        resume=arguments.resume,
    )
    try:
        warnings = files.write(lambda: _load(arguments))
    except InterruptedPredictionsError as interrupted:
        command = "" if "--resume" not in str(interrupted) else f": {terminal.resumed('mope predict', argv)}"
        terminal.console().print(f"{interrupted}{command}", highlight=False, markup=False, soft_wrap=True)
        return terminal.EXIT_INTERRUPTED
    for warning in warnings:
        terminal.console().print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    return 0


def _evaluate(argv: list[str]) -> int:
    from mope.training.data.config import DataConfig

    parser = Parser(
        "mope evaluate",
        "Evaluate a saved predictor on the test rows of a data set: errors, ranking, calibration, router.\n"
        "Lengths are counted with the tokenizer that it was trained for.",
        "ARTIFACT --data SOURCE [options]",
        "mope evaluate runs/demo --data sharegpt\n"
        "mope evaluate runs/demo --data chats.jsonl --turns first --output runs/demo-on-chats\n"
        "mope evaluate chat-small --data castillo --observe 20 200 --baselines none",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder of a saved predictor, or one that comes with mope")
    parser.add_argument("--data", required=True, metavar="SOURCE", help=DataConfig.model_fields["source"].description)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for metrics.json and plots")
    parser.add_argument(
        "--baselines",
        metavar="NAMES",
        help="baselines to fit on the data's training rows and show beside it, or none (default: all but those that "
        "need an encoder)",
    )
    parser.add_argument(
        "--observe",
        type=_num_answers,
        nargs="+",
        default=(),
        metavar="N",
        help="predict the test rows again after N training answers of each LLM were observed; several N are possible",
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON on stdout instead of tables")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add_flags(parser, "data", DataConfig, skip={"source", "label_tokenizer", "min_rows"})
    arguments = parser.parse_args(argv)
    typed = given(arguments).get("data", {})
    data = validated(
        DataConfig, {"source": arguments.data, **typed}, lambda place: f"--{str(place[0]).replace('_', '-')}"
    )
    _check_device(arguments.device)

    from mope.training.evaluate_saved import evaluate_artifact, named_baselines, show

    found = evaluate_artifact(
        arguments.artifact,
        data,
        arguments.output,
        baselines=named_baselines(arguments.baselines),
        observe=arguments.observe,
        device=arguments.device,
    )
    show(found, as_json=arguments.json)
    return 0


def _num_answers(text: str) -> int:
    from argparse import ArgumentTypeError

    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"got {text!r}; expected a number of answers, at least 1")
    return int(text)


def _export(argv: list[str]) -> int:
    from mope.export.cli import main as export

    return export(argv, prog="mope export")


def _bench(argv: list[str]) -> int:
    from mope.bench.cli import main as bench

    return bench(argv)


def _profile(argv: list[str]) -> int:
    from mope.profiling.cli import main as profile

    return profile(argv)


def _serve(argv: list[str]) -> int:
    from mope.serving_hooks.service.cli import main as serve

    return serve(argv)


def _replay(argv: list[str]) -> int:
    from mope.serving_hooks.replay.cli import main as replay

    return replay(argv)


def _report(argv: list[str]) -> int:
    from mope.serving_hooks.report import main as report

    return report(argv)


def _doctor(argv: list[str]) -> int:
    from mope.serving_hooks.doctor import main as doctor

    return doctor(argv)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "data": (_data, "show what a data set holds and what looks wrong in it, before training"),
    "train": (_train, "train a predictor on chats or logs, evaluate and save it"),
    "predict": (_predict, "predict the response tokens of prompts or of a file of requests"),
    "evaluate": (_evaluate, "evaluate a saved predictor on a data set"),
    "bench": (_bench, "measure latency, throughput, start and memory on real prompts"),
    "profile": (_profile, "measure a running LLM server, and write how long its steps take"),
    "export": (_export, "export a saved predictor to ONNX"),
    "serve": (_serve, "serve predictions over HTTP, and learn from finished requests"),
    "report": (_report, "who used what in a period: tokens, GPU seconds, budgets, by client or group"),
    "replay": (_replay, "replay workloads through an engine's real scheduler under a virtual clock"),
    "doctor": (_doctor, "say what is installed, what would work and what is active in a serving engine"),
}
