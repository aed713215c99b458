"""`mope doctor`: what is installed, what would work, what is active, and what to type, on one screen.

Works without any engine. What could crash or hang, the import of an engine, happens in a process of its own. What an
engine's hook can say of itself is in its package: `compat` (releases, `probe`) and `commands` (`START`, `mistakes`, and
`running` and `api_key` where its servers say more of themselves).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mope import console as terminal
from mope import packaged
from mope.console import LOG_WIDTH
from mope.errors import ConfigError, ServerError, UserError
from mope.extras import require
from mope.flags import Parser
from mope.serving_hooks import checks
from mope.serving_hooks.checks import Finding
from mope.serving_hooks.fetch import fetch, readable
from mope.serving_hooks.metrics import own_version
from mope.serving_hooks.options import NO_PREDICTOR, HookOptions

if TYPE_CHECKING:
    from rich.console import Console

ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
SERVE = "serve"  # `mope serve`, which is no engine
OPTIONS = "options"  # the command that lists them
DASHBOARD = Path(__file__).parent / "dashboards" / "mope.json"
_MARK = "mope-probe "
_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "failed": "bold red"}
IMPORT_S = 600.0  # that importing an engine may take, by default: minutes where a machine is busy
_MAX_RANKS = 64  # whose ports are looked at
_ENGINE = re.compile(r'^vllm:\w+\{(?:[^}\n]*,)?engine="(\d{1,4})"', re.MULTILINE)  # a rank of vLLM's
_LABEL = re.compile(r'\b(\w+)="((?:[^"\\]|\\.)*)"')

DETAILS = """\
Says on one screen what is installed, what would work, what is active, and what to type.

With a command behind --, that command is looked at instead of an example: its options, and what is often wrong.
`mope doctor options` lists all options of the hooks. The exit status is 1 if something does not work."""
EXAMPLE = """\
mope doctor vllm
mope doctor vllm -- vllm serve my/model --scheduler-cls mope.serving_hooks.vllm.make_scheduler
mope doctor vllm --url http://127.0.0.1:8000 --metrics-port 9477
mope doctor sglang -- sglang serve --model-path my/model --schedule-policy equinox
mope doctor sglang --url http://127.0.0.1:30000 --api-key KEY
mope doctor serve --url http://127.0.0.1:8400
mope doctor options"""


def main(argv: Sequence[str]) -> int:
    """Runs `mope doctor`.

    Args:
        argv: its arguments.

    Returns:
        0 if all works, 1 if something does not.

    Raises:
        ConfigError: arguments that cannot be used.
    """
    argv, words = _split(argv)
    parser = Parser("mope doctor", DETAILS, "[vllm | sglang | serve | options] [options] [-- COMMAND]", EXAMPLE)
    parser.add_argument(
        "what",
        nargs="?",
        choices=(*ENGINES, SERVE, OPTIONS),
        metavar="WHAT",
        help="an engine, serve for `mope serve`, or options (default: the engine that is installed)",
    )
    parser.add_argument("--url", metavar="URL", help="a server that runs, such as http://127.0.0.1:8000")
    parser.add_argument("--metrics-port", type=int, metavar="N", help="its metrics_port, where it does not say")
    parser.add_argument("--api-key", metavar="KEY", help="of that server, sent as a bearer token and written nowhere")
    parser.add_argument(
        "--timeout",
        type=float,
        default=IMPORT_S,
        metavar="S",
        help=f"seconds that importing the engine may take ({IMPORT_S:g}); 0 not to import it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if arguments.what == OPTIONS:
        rows = checks.option_rows()
        if arguments.json:
            print(json.dumps([{**row, "default": _plain(row["default"])} for row in rows]))
        else:
            _print_options(rows)
        return 0
    if arguments.url is not None and urlsplit(arguments.url).scheme not in ("http", "https"):
        raise ConfigError(f"--url: got {arguments.url!r}; expected an address such as http://127.0.0.1:8000")
    if arguments.what == SERVE:
        return _told(_service(words, arguments.url, arguments.api_key), as_json=arguments.json)
    engine = arguments.what or next((name for name in ENGINES if find_spec(name)), None)
    if words and engine is None:
        raise ConfigError("a command, but of which engine? Type mope doctor vllm -- COMMAND")
    report = examine(
        engine,
        words,
        url=arguments.url,
        api_key=arguments.api_key,
        metrics_port=arguments.metrics_port,
        timeout_s=arguments.timeout,
    )
    return _told(report, as_json=arguments.json)


def _told(report: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0 if report["ok"] else 1


def _service(words: Sequence[str], url: str | None, api_key: str | None) -> dict[str, Any]:
    require("prometheus_client", "mope serve", "serve")
    from mope.serving_hooks.service.doctor import examine as examine_service

    return {**examine_service(words, url, api_key), "dashboard": str(DASHBOARD)}


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def examine(
    engine: str | None,
    words: Sequence[str] = (),
    *,
    url: str | None = None,
    api_key: str | None = None,
    metrics_port: int | None = None,
    timeout_s: float = IMPORT_S,
) -> dict[str, Any]:
    """What is found, as plain JSON values.

    Args:
        engine: `vllm` or `sglang`; None for no engine.
        words: the command that starts it; none for an example.
        url: of a server that runs.
        api_key: of that server, where the command has none.
        metrics_port: of that server, where its API server does not say.
        timeout_s: for importing the engine, which happens last, and not at all where options are wrong; 0 for never.

    Returns:
        `mope` and `engine` with their versions, `findings` (each `part`, `status`, `text`), `command` that starts the
        engine with the hook, `dashboard`, and `ok`: whether nothing failed.
    """
    compat, commands = (_part(engine, "compat"), _part(engine, "commands")) if engine is not None else (None, None)
    release = compat.installed() if compat is not None else None
    found = [Finding("installed", "ok", f"mope {own_version()}, Python {sys.version.split()[0]}")]
    found += _packages(engine or "vllm")
    chosen, about = None, list[Finding]()
    if commands is not None and words:
        try:
            chosen = commands.options(commands.flags(words))
        except UserError as error:
            about.append(Finding("command", "failed", str(error)))
        about += commands.mistakes(words, chosen)
        about += checks.options(chosen) if chosen is not None else []
    if engine is not None:
        found += _engine(engine, compat, release, needed=url is None)
        if release is not None and hasattr(compat, "probe") and (words or url is None):
            if words and chosen is None:
                found.append(
                    Finding("installed", "note", f"{ENGINES[engine]} was not imported: correct the options first")
                )
            else:
                found.append(_probed(engine, timeout_s))
    found += about
    names = [chosen.predictor] if chosen is not None else [] if words else packaged.names()
    deadline_ms = (chosen or HookOptions()).deadline_ms
    found += [checks.predictor(name, deadline_ms) for name in names]
    if url is not None:
        port = metrics_port if metrics_port is not None else chosen.metrics_port if chosen is not None else None
        if commands is not None and hasattr(commands, "running"):
            key = api_key or commands.api_key(words)
            active = commands.running(url, key)
            found += active
            found += _at_ports(url, port, max(len(active), commands.num_ranks(words))) if port else []
        else:
            found += running(url, port, 1 if commands is None else commands.num_ranks(words))
    return {
        "mope": own_version(),
        "engine": engine,
        "release": release,
        "findings": [finding._asdict() for finding in found],
        "command": None if commands is None or words or url is not None else commands.START,
        "dashboard": str(DASHBOARD),
        "ok": not any(finding.status == "failed" for finding in found),
    }


def _part(engine: str, name: str) -> ModuleType | None:
    """A module of an engine's hook; None where there is none."""
    where = f"mope.serving_hooks.{engine}"
    return import_module(f"{where}.{name}") if find_spec(where) and find_spec(f"{where}.{name}") else None


def _packages(extra: str) -> list[Finding]:
    runtimes = _versions(("onnxruntime", "onnxruntime-gpu", "torch"))
    exporter = _versions(("prometheus-client",))
    with_onnx = any(name.startswith("onnx") for name in runtimes)
    missing = f"no onnxruntime, which the packaged predictors need: pip install 'mope-llm[{extra}]'"
    return [
        Finding("installed", "ok", ", ".join(runtimes)) if with_onnx else Finding("installed", "warning", missing),
        Finding("installed", "ok", ", ".join(exporter))
        if exporter
        else Finding("installed", "warning", f"no prometheus-client, so no metrics: pip install 'mope-llm[{extra}]'"),
    ]


def _versions(names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def _engine(engine: str, compat: ModuleType | None, release: str | None, *, needed: bool) -> list[Finding]:
    title = ENGINES[engine]
    if compat is None:
        return [Finding("installed", "failed", f"this release of mope has no hook for {title}")]
    tested = f"tested: {compat.TESTED[0]} to {compat.TESTED[-1]}, {len(compat.TESTED)} releases"
    if release is None:
        text = f"{title} is not installed for {sys.executable}: run mope doctor in the environment that it is in"
        return [Finding("installed", "failed" if needed else "note", f"{text} ({tested})")]
    standing = compat.standing(release)
    if standing == "tested":
        return [Finding("installed", "ok", f"{title} {release}: tested")]
    too_old = standing.startswith("older")
    text = f"{title} {release}: {standing} ({tested})"
    return [Finding("installed", "failed" if too_old else "warning", text)]


def _probed(engine: str, timeout_s: float) -> Finding:
    """What an engine's hook says of the engine, asked in a process of its own."""
    title, part = ENGINES[engine], "installed"
    if not timeout_s:
        return Finding(part, "note", f"{title} was not imported (--timeout 0): whether its classes fit is not known")
    told_s = f"importing {title}, for {timeout_s:g} s at most (--timeout)"
    terminal.console().print(told_s, highlight=False, markup=False, soft_wrap=True)
    here = "import json, sys; sys.path = [folder for folder in sys.path if folder]"  # as where vLLM's own script starts
    code = f"{here}; from mope.serving_hooks.{engine}.compat import probe; print({_MARK!r} + json.dumps(probe()))"
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **quiet},
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"{title} could not be imported within {timeout_s:g} s, so whether its classes fit is not known; "
        return Finding(part, "warning", f"{text}--timeout gives it longer")
    told = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not told:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Finding(part, "failed", f"{title} cannot be imported: {said[:200]}")
    wrong = json.loads(told[-1].removeprefix(_MARK))
    if wrong:
        return Finding(part, "failed", f"{title} is not as the hook expects: {'; '.join(wrong)}")
    return Finding(part, "ok", f"{title}'s classes are as the hook expects")


# -- a server that runs


def running(url: str, metrics_port: int | None = None, num_ranks: int = 1) -> list[Finding]:
    """Whether a server has the hook on, by what it and the hook's ports show.

    Args:
        url: of its API.
        metrics_port: of the hook, where its front end does not say.
        num_ranks: data-parallel engines, as far as the command says; the server's own metrics may name more.
    """
    part = "active"
    try:
        shown = fetch(f"{url.rstrip('/')}/metrics")
    except ServerError as error:
        return [Finding(part, "failed", f"{url}/metrics does not answer: {error}")]
    found = []
    front = _labels(shown, "mope_front_on")
    if front is None:
        found.append(
            Finding(part, "failed", f"{url}: no middleware of mope's is on, so requests carry no client or prediction")
        )
    else:
        outcomes: dict[str, float] = {}
        for labels, num in _samples(shown, "mope_front_predictions_total"):
            outcome = readable(labels.get("outcome", ""))
            outcomes[outcome] = outcomes.get(outcome, 0.0) + num
        made = outcomes.get("made", 0.0)
        identity, predictor = readable(front.get("identity")), readable(front.get("predictor"))
        text = f"{url}: middleware on, clients by {identity}, predictor {predictor}"
        text += f"; {made:.0f} predictions made, {sum(outcomes.values()) - made:.0f} not"
        predicts = all(value for _, value in _samples(shown, "mope_front_predicts"))
        wrong = checks.no_predictions(predicts, outcomes, "vllm") if front.get("predictor") != NO_PREDICTOR else None
        found.append(Finding(part, "warning" if wrong else "ok", f"{text}; {wrong}" if wrong else text))
        said = front.get("metrics_port", "")
        if metrics_port is None and said.isdecimal() and 0 < int(said) < 65_536:
            metrics_port = int(said)
    if not metrics_port:
        text = "whether the scheduler is on is in the server's log (mope is on: ...), or at its metrics_port"
        return [*found, Finding(part, "note", text)]
    return [*found, *_at_ports(url, metrics_port, max(num_ranks, len(set(_ENGINE.findall(shown)))))]


def _at_ports(url: str, port: int, num_ranks: int) -> list[Finding]:
    """What the hook says at the port of each rank on the machine of a server."""
    host = urlsplit(url).hostname or "127.0.0.1"
    if ":" in host:
        host = f"[{host}]"
    found = [_scheduler(f"http://{host}:{port + rank}/metrics", rank) for rank in range(min(num_ranks, _MAX_RANKS))]
    if num_ranks > _MAX_RANKS:
        found.append(Finding("active", "note", f"only the first {_MAX_RANKS} of {num_ranks} ranks were looked at"))
    return found


def _scheduler(address: str, rank: int = 0) -> Finding:
    try:
        shown = fetch(address)
    except ServerError as error:
        text = f"{address} does not answer: {error}; it listens at metrics_host"
        if not rank:
            return Finding("active", "failed", text)
        text += f". Rank {rank} may be on another machine, or have taken a free port, which its log names"
        return Finding("active", "warning", text)
    about = _labels(shown, "mope_info")
    if about is None:
        return Finding("active", "failed", f"{address} is not mope's")
    if _sum(shown, "mope_failed"):
        failure = readable((_labels(shown, "mope_failure_info") or {}).get("failure", ""), 1000)
        return Finding("active", "failed", f"{address}: the hook has failed and is off: {failure}")
    num = _sum(shown, "mope_client_arrived_total")
    policy, engine = readable(about.get("policy")), readable(about.get("engine"))
    which = f" rank {rank}:" if rank else ""
    return Finding("active", "ok", f"{address}:{which} policy {policy} in {engine}, {num:.0f} requests so far")


def _samples(shown: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Samples of a metric in what Prometheus is told: their labels and values."""
    found = []
    for line in shown.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")):
            labels, _, value = line.removeprefix(name).rpartition(" ")
            with suppress(ValueError):  # not as Prometheus writes them
                found.append((dict(_LABEL.findall(labels)), float(value)))
    return found


def _labels(shown: str, name: str) -> dict[str, str] | None:
    samples = _samples(shown, name)
    return samples[0][0] if samples else None


def _sum(shown: str, name: str, **labels: str) -> float:
    return sum(value for found, value in _samples(shown, name) if labels.items() <= found.items())


# -- the screen


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    return console


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = _console()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    last = None
    for finding in report["findings"]:
        part = finding["part"]
        status = Text(finding["status"], style=_COLOURS[finding["status"]])
        table.add_row(Text(part if part != last else "", style="bold"), status, Text(finding["text"]))
        last = part
    console.print(table)
    if report["command"]:
        console.print("\nInstalling activates nothing; to start with it:" if report["engine"] else "\nto start it:")
        console.print(Text(report["command"]), soft_wrap=True)
    console.print(f"\ndashboard for Grafana: {report['dashboard']}", markup=False, soft_wrap=True)


def _print_options(rows: Iterable[dict[str, Any]]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console = _console()
    for row in rows:
        values = f"  default {json.dumps(_plain(row['default']))}; {row['values']}"
        console.print(Text.assemble((row["name"], "bold"), (values, "cyan")))
        console.print(Padding(Text(row["text"]), (0, 0, 0, 4)))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
