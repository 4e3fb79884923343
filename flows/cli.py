"""The ``mild`` command line: what all commands have in common, such as errors, signals and exit codes.

Each command is a file of `flows.commands`, which imports what it needs when it runs, so that ``mild --help`` is quick.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import typer
from rich.text import Text
from typer.core import TyperGroup

from dataset_tools.errors import UserError, what_to_mend
from flows.commands.ablate import ablate
from flows.commands.build import build
from flows.commands.deploy import deploy
from flows.commands.erase import erase
from flows.commands.evaluate import evaluate
from flows.commands.inspect import inspect
from flows.commands.judge import judge
from flows.commands.mask import mask
from flows.commands.pretrain import pretrain
from flows.commands.publish import publish
from flows.commands.quickstart import quickstart
from flows.commands.rate import rate
from flows.commands.recompose import recompose
from flows.commands.review import review
from flows.commands.select import select
from flows.commands.terminal import new_console
from flows.commands.train import train
from flows.commands.verify import verify
from flows.commands.weights import weights

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Base of what is wrong with a command line; typer has its own, and not under a public name."""
MISSING = "the module {} is not installed; in the folder of this project run: pip install '.[flows,judge]'"


class _Commands(TyperGroup):
    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """As everywhere in this program, what is wrong with a command line is one `UserError`."""
        if not standalone_mode:
            return super().main(*arguments, standalone_mode=False, **options)  # type: ignore[misc]
        if not arguments and not sys.argv[1:]:
            arguments = (["--help"],)
        try:
            code = super().main(*arguments, standalone_mode=False, **options)  # type: ignore[misc]
        except UsageError as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "mild"
            what = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
            raise UserError(f"{what}; see {command} --help") from None
        except typer.Abort:
            sys.exit(128 + signal.SIGINT)
        sys.exit(code or 0)


app = typer.Typer(
    cls=_Commands, pretty_exceptions_enable=False, help="Erase people from pictures: build datasets, train, evaluate."
)
for command in (
    *(build, train, evaluate, ablate, judge, rate, pretrain, quickstart, deploy),
    *(mask, erase, recompose, inspect, verify, select, review, publish),
):
    app.command()(command)
app.add_typer(weights, name="weights")


def main() -> None:
    """Entry point. What the user must mend becomes one line. Exit codes:

    ==== ===========================================================================================
    0    all is done
    1    `erase`, `mask` or `judge` set something aside, `verify` found something, or a defect (a traceback)
    2    there is something that the user must mend
    3    something got worse than in the run before (``mild evaluate --fail-on-regression``)
    129  ended by SIGHUP
    130  ended by SIGINT (Ctrl-C)
    143  ended by SIGTERM
    ==== ===========================================================================================
    """
    for stream in (sys.stdout, sys.stderr):
        # File names can be anything; printing them must not fail.
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with _signals_as_exits():
            app()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("flows", "mild", "dataset_tools", ""):
            raise
        _complain(MISSING.format(error.name))
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > 128:
            _end(error.code)
        raise
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT)
    except Exception as error:
        complaint = what_to_mend(error)
        if complaint is None:
            raise
        _complain(complaint)


def _complain(what: str) -> NoReturn:
    line = Text.assemble(("error:", "bold red"), " ", " ".join(what.split("\n")))
    new_console(stderr=True).print(line, soft_wrap=True)
    _end(2)


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """Inside, a signal that would kill at once ends the program in order: blocks are left, child processes ended."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    # What nohup ignores stays ignored. SIGINT is Python's own KeyboardInterrupt.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(code: int) -> NoReturn:
    """End after a signal or an error; where threads still work in vain, at once."""
    settings = sys.modules.get("flows.settings")
    if settings is not None and settings.Threads.are_left_working():
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for child in multiprocessing.active_children():
            child.terminate()
        # Prefect's temporary server is ended by one of these. Python itself would wait for the threads first.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
