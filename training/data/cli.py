"""`mope data`: what a data set holds and what looks wrong in it, on one screen, before anything is trained.

Knows arguments; imports no torch.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mope import console as terminal
from mope.errors import MissingExtraError
from mope.files import check_output_file, writable
from mope.flags import Parser, add_flags, given, validated
from mope.training.data.config import DataConfig

if TYPE_CHECKING:
    from mope.training.data.build import DataSet
    from mope.training.data.summary import Columns, Summary

DESCRIPTION = """\
Show what training would see: what was read and left out, response tokens by LLM, three rows, and what looks wrong.

Trains nothing. Reads all of a small source, and some rows of a large one. Rows that were read whole are kept in the
cache, and mope-train with the same data flags takes them from there."""
EXAMPLES = """\
mope data chats.jsonl
mope data logs/ --response-cap 2048 --plot lengths.png
mope data logs.parquet --rows all --json"""
FEW_ROWS = 1000
NEEDED = ("pyarrow", "tiktoken")


def main(argv: list[str] | None = None, *, prog: str = "mope data") -> int:
    """Run the command and return its exit status.

    Args:
        argv: arguments; the command line's if not given.
        prog: the name it was called by.
    """

    def command(arguments: list[str]) -> int:
        try:
            return _data(arguments, prog)
        except KeyboardInterrupt:
            again = shlex.join([*arguments, *([] if "--rows" in arguments else ["--rows", str(FEW_ROWS)])])
            terminal.console().print(
                f"interrupted; nothing was changed. A look at fewer rows is quicker: {prog} {again}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            return terminal.EXIT_INTERRUPTED

    return terminal.run(command, argv)


def _data(argv: list[str], prog: str) -> int:
    parser = Parser(prog, DESCRIPTION, "DATA [options]", EXAMPLES)
    parser.add_argument("data", metavar="DATA", help=DataConfig.model_fields["source"].description)
    parser.add_argument(
        "--rows",
        type=_rows,
        metavar="N",
        help="rows to read, taken from all files in turn, or all (default: all of up to 24 MB, else 10000)",
    )
    parser.add_argument("--plot", type=_png, metavar="FILE", help="PNG with the distribution of lengths by LLM")
    parser.add_argument("--json", action="store_true", help="print everything as JSON on stdout")
    add_flags(parser, "data", DataConfig, skip={"source"})
    arguments = parser.parse_args(argv)
    values = {"source": arguments.data, **given(arguments).get("data", {})}
    config = validated(DataConfig, values, lambda place: f"--{str(place[0]).replace('_', '-')}")
    missing = [module for module in NEEDED if find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{prog} needs {', '.join(missing)}, not installed: pip install 'mope-llm[train]'")

    if arguments.plot:
        check_output_file(arguments.plot, "--plot", {"DATA": arguments.data})

    terminal.console().print(f"reading {arguments.data} ...", highlight=False, markup=False, soft_wrap=True)
    from mope.training.data.sample import look

    data, sample = look(config, arguments.rows)
    summary, columns = summed_up(data, config.min_rows, sample)
    if arguments.plot:
        from mope.training.plots import response_tokens_by_llm

        names = [name or "(no LLM named)" for name in columns.llm_names]
        with writable(f"--plot {arguments.plot}"):
            response_tokens_by_llm(names, columns.llm_R, data.rows.response_tokens, data.rows.censored, arguments.plot)
    if arguments.json:
        print(json.dumps(summary.to_json(), ensure_ascii=False))
    else:
        from mope.training.data.screen import show

        show(summary, _stdout())
    return 0


def summed_up(data: DataSet, min_rows: int, sample: str | None = None) -> tuple[Summary, Columns]:
    """A summary with its doubts, and the columns that it was made from."""
    from mope.training.data.doubts import find_doubts
    from mope.training.data.summary import Columns, summarise

    columns = Columns(data.rows)
    summary = summarise(data, columns, sample=sample)
    return replace(summary, doubts=tuple(find_doubts(summary, columns, min_rows))), columns


def _stdout() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, terminal.LOG_WIDTH)
    return console


def _rows(text: str) -> int:
    if text == "all":
        return 0
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number of rows, at least 1, or all")
    return int(text)


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a name that ends in .png")
    return path
