"""`mope replay`: flags, and where the figures go.

Knows flags and files; what is replayed and how is in the modules beside it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mope import artifact
from mope import console as terminal
from mope.extras import require
from mope.fairness import FairnessConfig, load_profile
from mope.files import make_output_folder, opened, write_text
from mope.flags import Parser, add_flags, flag_name, given, validated
from mope.provenance import collect, shortened
from mope.serving_hooks.replay.compare import Compared, compare
from mope.serving_hooks.replay.config import ReplayConfig
from mope.serving_hooks.replay.engine import EngineSettings
from mope.serving_hooks.replay.predictions import residual_sigma
from mope.serving_hooks.replay.report import print_report, to_markdown
from mope.serving_hooks.replay.workloads import TRACE, WORKLOADS

FORMAT_VERSION = 1
FILES = ("replay.json", "replay.md", "requests.csv")
DETAILS = """\
Replay workloads through the real scheduler of an engine, under a virtual clock: no model, no GPU, minutes in seconds.

Shows what a policy does to whom: how evenly clients are served, who waits how long, what is recomputed. Times are what
--profile says that steps take; they compare policies, and do not measure a GPU. Every policy sees the same requests and
predictions. The scheduler never sees how long an answer will be: it ends when the fake LLM ends it.

workloads:
{workloads}"""
EXAMPLE = """\
mope replay --workload two-clients --policies fcfs,vtc,equinox --seeds 5 --output runs/replay
mope replay --workload vtc-overload,27-clients --policies fcfs,vtc,vtc-predicted --predictions none,noisy,oracle
mope replay --workload trace --trace requests.jsonl --profile a10g/llama-3.1-8b --kv-tokens 20000 --json"""


def main(argv: list[str]) -> int:
    """Run `mope replay` and return its exit status."""
    started = datetime.now(timezone.utc)
    arguments = _parser().parse_args(argv)
    typed = given(arguments)

    def named(place: tuple[int | str, ...]) -> str:
        return flag_name(str(place[0]))

    config = validated(ReplayConfig, typed.get("replay", {}), named)
    settings = validated(EngineSettings, typed.get("engine", {}), named)
    fairness = validated(FairnessConfig, typed.get("fairness", {}), named)
    options = {"profile": fairness.profile, **{key: getattr(fairness, key) for key in typed.get("fairness", {})}}
    for flag, folder in (("--output", arguments.output), ("--plots", arguments.plots)):
        if folder is not None:
            reads = {"--trace": config.trace} if config.trace else {}
            make_output_folder(folder, flag, names=FILES if flag == "--output" else (), reads=reads)
    plots = arguments.plots or (arguments.output and arguments.output / "plots")
    if arguments.plots:
        require("matplotlib", "--plots")
    from mope.serving_hooks.replay.engine_vllm import VllmEngine, load_vllm

    load_vllm()
    found = compare(config, settings, options, VllmEngine)
    result = {
        "format_version": FORMAT_VERSION,
        "provenance": collect(["mope", "replay", *argv], None, {"workloads": list(config.workload)}, started),
        "config": shortened(config.model_dump(mode="json")),
        "settings": settings.model_dump(mode="json"),
        "fairness": shortened(options),
        "profile": shortened(fairness.profile),
        "kv_tokens": settings.kv_tokens or load_profile(fairness.profile).capacity_tokens,
        "tau": config.tau,
        "sigma": residual_sigma(config.tau),
        "num_seeds": config.seeds,
        "workloads": [_shown(compared, config.seeds) for compared in found],
    }
    if arguments.output:
        _save(arguments.output, result, found)
    if plots:
        _draw(found, plots, required=arguments.plots is not None)
    if arguments.json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        print_report(result)
    return 0


def _parser() -> Parser:
    known = "\n".join(f"  {workload.name:<24}{workload.about}" for workload in WORKLOADS.values())
    known += f"\n  {TRACE:<24}recorded requests, from --trace FILE"
    parser = Parser("mope replay", DETAILS.format(workloads=known), "[options]", EXAMPLE)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for replay.json, replay.md, requests.csv and plots"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="folder for pictures (default: plots in --output)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on stdout instead of tables")
    add_flags(parser, "replay", ReplayConfig)
    add_flags(parser, "engine", EngineSettings)
    add_flags(parser, "fairness", FairnessConfig, skip={"policy", "weights", "idle_clients", "max_clients"})
    return parser


def _shown(compared: Compared, num_seeds: int) -> dict[str, Any]:
    first = next(iter(compared.runs))
    return {
        "name": compared.workload.name,
        "about": compared.workload.about,
        "engine": compared.version,
        "load": compared.load,
        "rate": compared.rate,
        "duration_s": compared.duration_s,
        "num_seeds": num_seeds,
        "variants": compared.summary(),
        "differences_from": first,
        "differences": compared.differences(),
        "runs": compared.runs,
    }


def _save(folder: Path, result: dict[str, Any], found: Sequence[Compared]) -> None:
    artifact.write_json(folder / "replay.json", result)
    write_text(folder / "replay.md", to_markdown(result))
    with opened(folder / "requests.csv", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["workload", "policy", "client", "prompt_tokens", "response_tokens", "predicted_tokens", "arrival_s",
             "admitted_s", "first_token_s", "finish_s", "num_preemptions", "recomputed_tokens"]
        )  # fmt: skip
        for compared in found:
            for variant, outcome in compared.outcomes.items():
                for one in outcome.records:
                    times = (one.arrival.arrival_s, one.admitted_s, one.first_token_s, one.finish_s)
                    predicted = "" if one.predicted is None else f"{one.predicted:.1f}"
                    writer.writerow(
                        [compared.workload.name, variant, one.arrival.client, one.arrival.prompt_tokens,
                         one.response_tokens, predicted, *(f"{moment:.6f}" for moment in times), one.num_preemptions,
                         one.recomputed_tokens]
                    )  # fmt: skip
    terminal.console().print(f"figures are in {folder}", highlight=False, markup=False, soft_wrap=True)


def _draw(found: Sequence[Compared], folder: Path, *, required: bool) -> None:
    try:
        require("matplotlib", "pictures")
    except ImportError as error:
        if required:
            raise
        terminal.console().print(f"no pictures: {error}", highlight=False, markup=False, soft_wrap=True)
        return
    from mope.serving_hooks.replay.plots import draw

    for compared in found:
        draw(compared, folder)
