"""`mope profile`: flags, and where the profile, its measurements and its pictures go.

Knows flags and files; what is measured and fitted is in the modules beside it.
"""

from __future__ import annotations

import asyncio
import csv
import json
import re
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mope import console as terminal
from mope.errors import ConfigError, DataError, ProfileError, ServerError
from mope.extras import require
from mope.fairness.profiles import FittedProfile, Measured, load_profile, save_profile
from mope.files import check_output_file, opened, writable
from mope.flags import Parser, add_flags, flag_name, given, validated
from mope.profiling.client import ServerFacts, connected
from mope.profiling.config import ProfilingConfig
from mope.profiling.fit import Fit, checked, fit_prefill, fit_steps, saturation
from mope.profiling.sweep import Measurements, measure, planned
from mope.provenance import collect

DETAILS = """\
Measure a running OpenAI-compatible server, and write a profile from which latency, throughput and utilisation of a
request are estimated before it runs.

Prompts of several lengths are awaited on the idle server, requests are let decode together, six coefficients are
fitted, and the profile says how far off they are on settings that the fit has not seen and on requests of random
lengths beside others. The server should do nothing else meanwhile. Beside the profile: every measurement as CSV, and
pictures of the fit and of what it leaves unexplained."""
EXAMPLE = """\
mope profile --url http://127.0.0.1:8000 --output profile.json
mope profile --url http://10.0.0.5:8000 --output a100.json --model llama-3.1-8b --machine "one A100 80 GB"
mope profile --url http://127.0.0.1:8000 --output quick.json --rounds 1 --max-seconds 60 --json"""
MAX_MEDIAN_ERROR = 0.15  # beyond, the profile is called doubtful
UNITS = {"step_fixed_s": 1e3, "step_request_s": 1e6, "step_context_s": 1e9}
UNITS |= {"prefill_fixed_s": 1e3, "prefill_token_s": 1e6, "prefill_square_s": 1e9}
UNIT_NAMES = {1e3: "ms", 1e6: "µs", 1e9: "ns"}
MEANING = {
    "step_fixed_s": "a decode step",
    "step_request_s": "each running request in it",
    "step_context_s": "each token of their context",
    "prefill_fixed_s": "a first token",
    "prefill_token_s": "each prompt token before it",
    "prefill_square_s": "each prompt token squared",
}


def main(argv: list[str]) -> int:
    """Run `mope profile` and return its exit status."""
    started = datetime.now(timezone.utc)
    arguments = _parser().parse_args(argv)
    config = validated(ProfilingConfig, given(arguments).get("profile", {}), lambda place: flag_name(str(place[0])))
    for module in ("httpx2", "scipy", "matplotlib"):
        require(module, "mope profile", "profile")
    _check_output(arguments.output)
    found = Measurements()
    try:
        facts = asyncio.run(_measured(arguments.url, arguments.model, arguments.api_key, config, found))
    finally:
        if found.prefills or found.steps:
            _write_measurements(found, _beside(arguments.output, "-measurements.csv"))
    try:
        prefill, step = fit_prefill(found.prefills), fit_steps(found.steps)
    except DataError as error:
        raise DataError("; ".join([str(error), *found.notes, *_kept(found, arguments.output)])) from error
    url = re.sub(r"//[^/]*@", "//", arguments.url)  # a name and a password are nobody's business
    typed = [word.replace(arguments.url, url) for word in argv]
    command = shlex.join(collect(["mope", "profile", *typed], config.seed, {}, started)["command"])
    profile = _profile(facts, config, found, prefill, step, command, started, url)
    latency_errors, checked_N = checked(profile, found.checks)
    measured = profile.measured.model_copy(update={"latency_errors": latency_errors})
    profile = profile.model_copy(update={"measured": measured})
    found.notes.extend(_doubts(profile))
    save_profile(profile, arguments.output)
    from mope.profiling.plots import fit_plot, residual_plot

    fit_plot(profile, found.prefills, found.steps, _beside(arguments.output, "-fit.png"))
    residual_plot(prefill, step, found.checks, checked_N, profile, _beside(arguments.output, "-residuals.png"))
    if arguments.json:
        print(json.dumps({"profile": profile.model_dump(mode="json"), "notes": found.notes}, indent=2, allow_nan=False))
    else:
        _show(profile)
    for note in found.notes:
        terminal.console().print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    terminal.console().print(f"profile: {arguments.output}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _parser() -> Parser:
    parser = Parser("mope profile", DETAILS, "--url URL --output FILE [options]", EXAMPLE)
    parser.add_argument("--url", required=True, metavar="URL", help="address of the server, with or without /v1")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="profile to write, a .json file")
    parser.add_argument("--model", metavar="NAME", help="name of the LLM (default: the only one that it serves)")
    parser.add_argument("--api-key", metavar="KEY", help="sent as a bearer token; written nowhere")
    parser.add_argument("--json", action="store_true", help="print the profile as JSON on stdout instead of a table")
    add_flags(parser, "profile", ProfilingConfig)
    return parser


def _check_output(path: Path) -> None:
    """Say now that the profile can't be written: minutes later is too late."""
    if path.suffix != ".json":
        raise ConfigError(f"--output: got {str(path)!r}; expected a file that ends in .json")
    with writable(f"--output {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    check_output_file(path)
    if path.exists():
        try:
            load_profile(path)
        except ProfileError as error:
            raise ConfigError(f"--output {path} exists and is not a profile ({error}); choose another") from error


async def _measured(
    url: str, model: str | None, api_key: str | None, config: ProfilingConfig, found: Measurements
) -> ServerFacts:
    """Measure, with a bar that shows how far it is; what was measured is in `found`, however it ends."""
    async with connected(url, model=model, api_key=api_key, timeout_s=config.timeout_s, seed=config.seed) as server:
        plan = planned(config, server.facts.max_model_len, server.facts.capacity_tokens)
        try:
            await asyncio.wait_for(server.get_ready(), config.max_seconds)
        except asyncio.TimeoutError as error:
            raise ServerError("the server's first answers took longer than --max-seconds") from error
        found.notes.extend([*server.notes, *plan.notes])
        total = plan.num_settings * config.rounds + config.num_checks
        with terminal.progress(f"measuring {server.facts.llm}", total) as advance:
            await measure(server, config, plan, found, advance)
        return server.facts


def _profile(
    facts: ServerFacts,
    config: ProfilingConfig,
    found: Measurements,
    prefill: Fit,
    step: Fit,
    command: str,
    started: datetime,
    url: str,
) -> FittedProfile:
    requests, tokens_per_s = saturation(found.steps)
    prompts = [one.prompt_tokens for one in found.prefills]
    running = [one.num_running for one in found.steps]
    contexts = [round(one.context_tokens) for one in found.steps]
    return FittedProfile(
        name=facts.llm,
        **step.coefficients,
        **prefill.coefficients,
        saturated_requests=requests,
        saturated_tokens_per_s=round(tokens_per_s, 1),
        capacity_tokens=facts.capacity_tokens,
        chunk_tokens=config.chunk_tokens,
        measured=Measured(
            url=url,
            server=facts.software,
            llm=facts.llm,
            date=started.isoformat(timespec="seconds"),
            command=command,
            machine=config.machine,
            complete=found.complete,
            num_prefills=len(prompts),
            num_steps=len(running),
            prompt_tokens=(min(prompts), max(prompts)),
            num_running=(min(running), max(running)),
            context_tokens=(min(contexts), max(contexts)),
            prefill_errors=prefill.errors,
            step_errors=step.errors,
        ),
    )


def _doubts(profile: FittedProfile) -> list[str]:
    """What a reader should know before relying on a profile."""
    measured = profile.measured
    doubts = [f"{MEANING[name]}: could not be told from 0" for name in UNITS if getattr(profile, name) == 0]
    named = {"first tokens": measured.prefill_errors, "decode steps": measured.step_errors}
    if measured.latency_errors:
        named["latencies"] = measured.latency_errors
    for what, errors in named.items():
        if errors.median > MAX_MEDIAN_ERROR:
            doubts.append(
                f"half of the {what} are more than {errors.median:.0%} off; measure while the server and this machine "
                "do nothing else, or with more --rounds"
            )
    return doubts


def _kept(found: Measurements, output: Path) -> Sequence[str]:
    """Where an unfinished measurement lies, if there is anything of it."""
    if not found.prefills and not found.steps:
        return ()
    return (f"what was measured is in {_beside(output, '-measurements.csv')}",)


def _write_measurements(found: Measurements, path: Path) -> None:
    with opened(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "prompt_tokens", "response_tokens", "num_running", "context_tokens", "seconds"])
        for prefill in found.prefills:
            writer.writerow(["prefill", prefill.prompt_tokens, "", 0, 0, f"{prefill.seconds:.6f}"])
        for steps in found.steps:
            context = f"{steps.context_tokens:.1f}"
            writer.writerow(["step", steps.wanted_context, "", steps.num_running, context, f"{steps.seconds:.6f}"])
        for check in found.checks:
            load = [check.num_running, check.context_tokens, f"{check.latency_s:.6f}"]
            writer.writerow(["check", check.prompt_tokens, check.response_tokens, *load])


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(output.stem + ending)


def _show(profile: FittedProfile) -> None:
    from rich.console import Console

    measured = profile.measured
    costs = _table(f"{profile.name} on {measured.server}", "what it costs", "time")
    for name, scale in UNITS.items():
        costs.add_row(MEANING[name], f"{scale * getattr(profile, name):,.3f} {UNIT_NAMES[scale]}")
    costs.add_row("highest throughput, tokens/s", f"{profile.saturated_tokens_per_s:,.0f}")
    costs.add_row("with so many requests", f"{profile.saturated_requests:,}")
    errors = _table("error on what was not fitted", "time", "measurements", "median", "9 of 10 below")
    rows = {
        "first token": measured.prefill_errors,
        "decode step": measured.step_errors,
        "latency beside others": measured.latency_errors,
    }
    for name, found in rows.items():
        if found:
            errors.add_row(name, f"{found.num_measurements:,}", f"{found.median:.1%}", f"{found.p90:.1%}")
    for table in (costs, errors):
        Console().print(table)


def _table(title: str, first: str, *others: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
