"""What commands share with the terminal: what they print on, and options that several of them have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.text import Text

from dataset_tools.errors import UserError
from dataset_tools.settings import read_yaml

UNBROKEN = 100_000
"""Columns of a file or pipe, where a line ends only where it ends."""

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting, such as composite.seed=3. Repeatable."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log.")]

Instances = Annotated[
    str | None,
    typer.Option(
        metavar="NETWORK",
        help="What finds people: a name of mild weights list, a hub id, a folder or a file; default: what is here of "
        "that list. It sees photographs at 2048 pixels a side at most.",
    ),
]


def new_console(*, stderr: bool = False) -> Console:
    """A console on standard output, or on standard error."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=UNBROKEN)


console = new_console()


def say(line: str) -> None:
    """One line of output, as it is: names of files are no markup."""
    console.print(Text(line), soft_wrap=True)


def parsed(changes: list[str] | None) -> dict[str, Any]:
    """Settings to change, dotted name to value, of `Changes`. Raises `UserError`."""
    parsed = {}
    for change in changes or []:
        key, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"--set {change}: write it as key=value")
        try:
            parsed[key] = read_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {change}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    return parsed


@contextlib.contextmanager
def stopped_in_one_line(line: str = "stopped: nothing was written") -> Iterator[None]:
    """Ctrl-C ends with a line, its own or this one, and the exit code that shells expect of it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        new_console(stderr=True).print(Text(str(stop) or line), soft_wrap=True)
        raise typer.Exit(130) from None
