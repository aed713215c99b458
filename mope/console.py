"""The terminal: where messages and progress go, and how a command ends.

Knows terminals and exit statuses; does not know what any command does. Everything here writes to stderr, so that
stdout stays free for what a command prints as its result.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from mope.errors import UserError
from mope.files import NO_ACCESS, is_disk_full, reason

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + 2  # as a shell reports SIGINT
EXIT_BROKEN_PIPE = 128 + 13  # as a shell reports SIGPIPE

LOG_WIDTH = 110  # columns of tables in a log
LOG_INTERVAL_S = 30.0  # between two lines of progress where there is no terminal to draw a bar on


@cache
def console() -> Console:
    """The console on stderr that all commands share."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    return console


def run(main: Callable[[list[str]], int], arguments: list[str] | None = None) -> int:
    """Run a command and turn the way it ended into an exit status.

    A `UserError` becomes one line on stderr and status 2, Ctrl-C becomes status 130, and a reader that went away
    (`mope predict ... | head`) ends the command quietly. A disk that is full or read-only is one line, too. Anything
    else is a bug and keeps its traceback.

    Args:
        main: the command; takes the arguments after the program's name and returns an exit status.
        arguments: the command line without the program's name; `sys.argv[1:]` if not given.

    Returns:
        The exit status, for `sys.exit`.
    """
    try:
        status = main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()  # here, where a broken pipe is still caught
    except UserError as error:
        _say_error(str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        console().print("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # what is still buffered has no reader: without this, Python complains about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if not (is_disk_full(error) or error.errno in NO_ACCESS):
            raise
        _say_error(f"{error.filename or 'a file'}: {reason(error)}{_elsewhere(error.filename)}")
        return EXIT_USER_ERROR
    return status


def resumed(prog: str, arguments: list[str]) -> str:
    """The command line that goes on with what an interrupted one did.

    Args:
        prog: the command, such as `"mope predict"`.
        arguments: of the interrupted one.
    """
    return f"{prog} {shlex.join([*(one for one in arguments if one != '--resume'), '--resume'])}"


def _say_error(text: str) -> None:
    line = " ".join(text.split("\n"))
    console().print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def _elsewhere(path: object) -> str:
    """What to type where a file of the cache can't be written."""
    cache = os.environ.get("MOPE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "mope")
    in_cache = isinstance(path, str) and os.path.abspath(path).startswith(os.path.abspath(cache))
    return "; the environment variable MOPE_CACHE names another folder for the cache" if in_cache else ""


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show how far a long piece of work is: a bar on a terminal, a line now and then in a log.

    Use it as `with progress("counting tokens", num_rows) as advance: ...; advance(num_done)`.

    Args:
        description: what is being done, in a few words.
        total: how many steps there are; None if that is not known.

    Yields:
        A function to call with the number of steps done since the last call.
    """
    draw = _bar if console().is_terminal else _log
    with draw(description, total) as advance:
        yield advance


@contextmanager
def working(description: str) -> Iterator[None]:
    """Say what is being done while it shows nothing itself: a spinner on a terminal, a line every half minute in a log.

    Args:
        description: what is being done, in a few words.
    """
    if console().is_terminal:
        with console().status(description):
            yield
        return
    started, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(LOG_INTERVAL_S):
            line = f"{description}: {time.monotonic() - started:.0f} s so far"
            console().print(line, highlight=False, markup=False, soft_wrap=True)

    teller = threading.Thread(target=tell, daemon=True, name="mope-working")
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


@contextmanager
def _bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console()) as bars:
        task = bars.add_task(description, total=total)
        yield lambda steps: bars.advance(task, steps)


@contextmanager
def _log(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    started = last_line = time.monotonic()
    done = 0

    def line() -> None:
        share = f"/{total:,} ({done / total:.0%})" if total else ""
        text = f"{description}: {done:,}{share}, {time.monotonic() - started:.0f} s"
        console().print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(steps: int) -> None:
        nonlocal done, last_line
        done += steps
        if time.monotonic() - last_line >= LOG_INTERVAL_S:
            last_line = time.monotonic()
            line()

    yield advance
    line()
