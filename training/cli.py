"""`mope-train` (and `mope train`): from data or a recipe to a saved predictor, in one command.

Knows flags and how a run is started; the run itself is `mope.training.run`, imported only when one starts.
"""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mope import console as terminal
from mope.errors import ConfigError, MissingExtraError
from mope.extras import EXTRAS
from mope.flags import Parser, add_flags, given
from mope.training.config import EvaluationConfig, FitConfig, ModelConfig, TrainConfig
from mope.training.data.config import DataConfig

EXAMPLES = (
    "--recipe demo --output runs/demo",
    "chats.jsonl --output runs/chats --epochs 2",
    "--recipe lmsys-base --dry-run",
)


def main(argv: list[str] | None = None, *, prog: str = "mope-train") -> int:
    """Run the command and return its exit status.

    Args:
        argv: arguments; the command line's if not given.
        prog: the name it was called by.
    """
    return terminal.run(lambda arguments: _train(arguments, prog), argv)


def parser(prog: str) -> Parser:
    """The command line of `mope-train`."""
    from mope.training.recipe import recipe_names

    made = Parser(
        prog,
        "Train a MoPE predictor of response lengths, evaluate it beside baselines, and save it with its model card.",
        "[DATA] [--recipe NAME|FILE] --output DIR [options]",
        "\n".join(f"{prog} {example}" for example in EXAMPLES),
    )
    made.add_argument("data", nargs="?", metavar="DATA", help=DataConfig.model_fields["source"].description)
    made.add_argument(
        "--recipe", metavar="NAME|FILE", help=f"{', '.join(recipe_names())}, or a YAML file; flags change it"
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="folder to save the predictor in")
    made.add_argument("--work", type=Path, metavar="DIR", help="folder for checkpoints and logs (default: OUTPUT.work)")
    made.add_argument("--resume", action="store_true", help="go on with a run that was stopped, with the same settings")
    made.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a predictor that is in OUTPUT, and without --resume throw an unfinished run away, too",
    )
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="show the data as mope data does, the config as YAML, then steps and parameters; train nothing",
    )
    made.add_argument(
        "--measure-speed", action="store_true", help="with --dry-run: try some steps, and say how long a run takes"
    )
    made.add_argument("--list-recipes", action="store_true", help="list the built-in recipes and what each needs")
    made.add_argument(
        "--test-source", metavar="TEXT", help="another data set whose test split is reported, too; or none"
    )
    made.add_argument(
        "--also",
        metavar="TEXT,...",
        help="further data sets to learn from, for example public-lengths,modern-lengths; or none",
    )
    add_flags(made, "data", DataConfig, skip={"source"})
    for section, model in (("model", ModelConfig), ("fit", FitConfig), ("evaluation", EvaluationConfig)):
        add_flags(made, section, model)
    return made


def _train(argv: list[str], prog: str) -> int:
    arguments = parser(prog).parse_args(argv)
    if arguments.list_recipes:
        _list_recipes()
        return 0
    _check_installed(prog)
    from mope.training.recipe import load_recipe
    from mope.training.teachers import named_teachers

    overrides: dict[str, Any] = {**given(arguments)}
    if arguments.data is not None:
        overrides.setdefault("data", {})["source"] = arguments.data
    if arguments.test_source is not None:
        overrides["test_data"] = {"source": None if arguments.test_source == "none" else arguments.test_source}
    if arguments.also is not None:
        overrides["also"] = [{"source": name} for name in arguments.also.split(",") if name not in ("", "none")]
    if arguments.recipe is None and arguments.data is None:
        raise ConfigError(f"got neither data nor a recipe; type for example: {prog} {EXAMPLES[0]}")
    if arguments.measure_speed and not arguments.dry_run:
        raise ConfigError("--measure-speed goes with --dry-run; a run itself says how long it takes")
    config = load_recipe(arguments.recipe, overrides)
    named_teachers(config.model)  # those that can't teach are told before anything is printed or read
    if not arguments.dry_run and arguments.output is None:
        raise ConfigError(
            f"--output is missing: where to save the predictor, for example --output runs/{_label(config.data.source)}"
        )

    from mope.training.data.sources import open_source

    for data in (config.data, *config.also, config.test_data):
        if data is not None:
            open_source(data)  # a mistyped path is told before the slow imports

    if arguments.dry_run:
        return _dry_run(config, measure_speed=arguments.measure_speed)
    output: Path = arguments.output
    work = arguments.work or Path(f"{output}.work")
    try:
        _load_training(config)
        from mope.training.fit import TrainingInterruptedError
        from mope.training.run import train

        try:
            command = [*prog.split(), *argv]
            train(config, output, work=work, resume=arguments.resume, overwrite=arguments.overwrite, command=command)
        except TrainingInterruptedError as interrupted:
            _say(f"{interrupted}: {terminal.resumed(prog, argv)}")
            return terminal.EXIT_INTERRUPTED
    except KeyboardInterrupt:
        _say(_interrupted(work, prog, argv))
        return terminal.EXIT_INTERRUPTED
    return 0


def _interrupted(work: Path, prog: str, argv: list[str]) -> str:
    """What is kept where Ctrl-C ended a run beside the training of a network, and what goes on with it."""
    from mope.training.work import networks

    if not networks(work):
        return f"interrupted before anything was trained; to begin again: {shlex.join([*prog.split(), *argv])}"
    return f"interrupted; what was trained is kept in {work}; add --resume to go on: {terminal.resumed(prog, argv)}"


def _load_training(config: TrainConfig) -> None:
    """Import what trains, which takes seconds, and refuse devices that are not there."""
    _say("loading torch and Lightning ...")
    from mope.training.quiet import quiet

    quiet()
    _check_hardware(config.fit)


def _dry_run(config: TrainConfig, *, measure_speed: bool) -> int:
    """Show the data, then the settings on stdout, then steps and parameters."""
    from mope.training.recipe import dump

    _say(f"reading {config.data.source} ...")
    _show_data(config)
    print(dump(config), end="", flush=True)
    _load_training(config)
    return _show_plan(config, measure_speed=measure_speed)


def _show_data(config: TrainConfig) -> None:
    """The screen of `mope data` for the main data set. Without the encoder's tokenizer, it needs no torch.

    Raises:
        DataError: the run would refuse these rows.
    """
    from mope.training.data.build import build_rows, check_learnable
    from mope.training.data.cli import summed_up
    from mope.training.data.screen import show

    if config.data.label_tokenizer == "encoder":
        from mope.training.plan import main_rows
        from mope.training.quiet import quiet

        quiet()
        data = main_rows(config)
    else:
        data = build_rows(config.data, learnable=False)
    summary, _ = summed_up(data, config.data.min_rows)
    show(summary, terminal.console())
    _say("")
    check_learnable(config.data, data)


def _show_plan(config: TrainConfig, *, measure_speed: bool) -> int:
    from mope.training.plan import MEASURE_S, make_plan

    for line in make_plan(config, measure_s=MEASURE_S if measure_speed else None).lines():
        _say(line)
    return 0


def _say(line: str) -> None:
    terminal.console().print(line, highlight=False, markup=False, soft_wrap=True)


def _check_hardware(fit: FitConfig) -> None:
    """Refuse devices that are not there before the data are read."""
    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from mope.training.fit import resolve_precision

    names = ("accelerator", "devices", "num_nodes", "strategy")
    try:
        L.Trainer(
            **fit.model_dump(include=set(names)),
            precision=resolve_precision(fit),
            logger=False,
            enable_checkpointing=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        asked = " ".join(f"--{name.replace('_', '-')} {getattr(fit, name)}" for name in names)
        reason = " ".join(str(error).split())
        raise ConfigError(f"{asked} --precision {fit.precision} can't be used here: {reason}") from error


def _check_installed(prog: str) -> None:
    """Say at once what is missing, rather than after the data were read."""
    missing = [module for module, extra in EXTRAS.items() if extra in ("torch", "train") and find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{prog} needs {', '.join(missing)}, not installed: pip install 'mope-llm[train]'")


def _label(source: str) -> str:
    return Path(source.rstrip("/*")).name.partition(".")[0] or "mine"


def _list_recipes() -> None:
    from mope.training.recipe import recipe_names, recipe_summary

    table = Table("recipe", "what it is", box=None, padding=(0, 2, 1, 0))
    for name in recipe_names():
        table.add_row(name, recipe_summary(name))
    Console().print(table)
