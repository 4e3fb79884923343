"""Serving a local page until Ctrl-C ends it."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from dataset_tools.errors import UserError
from flows.commands.terminal import say

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mild.evaluation.page import PageSettings

Port = Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes any that is free.")]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets everybody in who reaches this machine.")]


def serve(app: FastAPI, settings: PageSettings, verb: str) -> None:
    """Serve, and say where: ``verb`` is what people do there.

    Raises:
        UserError: the address cannot be listened on.
    """
    import uvicorn

    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listening = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise UserError(
            f"{settings.host} port {settings.port} cannot be listened on: {error.strerror or error}; "
            "name another with --port"
        ) from None
    with listening:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"{verb} at http://{host}:{listening.getsockname()[1]}/ (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
