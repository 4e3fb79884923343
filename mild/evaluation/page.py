"""What the local pages share on which people judge pictures: their application, names, and where opinions are kept."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, StringConstraints

from dataset_tools.errors import UserError
from dataset_tools.folders import LEFT_BEHIND
from dataset_tools.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""No request leaves the page."""
PICTURE_HEADERS = {"Cache-Control": "private, max-age=86400, immutable", "X-Content-Type-Options": "nosniff"}
"""Of pictures that are named by what they hold."""

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
"""What this machine is called on itself."""

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=60)]
"""Of somebody who judges."""


class PageSettings(Settings):
    """Where a page is served."""

    host: str = "127.0.0.1"
    """Address that is listened on; ``0.0.0.0`` lets other machines of the network in, whoever sits there."""
    port: int = Field(8765, ge=0, le=65535)
    """0 takes any that is free."""


def local_page(page: Path, settings: PageSettings) -> FastAPI:
    """An application that serves ``GET /``, the page, and ``/page.css`` and ``/page.js``, what pages share.

    Served to this machine alone, it answers by this machine's names alone: a page of the web whose name leads here (DNS
    rebinding) could otherwise read the pictures, and judge, in the browser of whoever has it open.
    """
    from fastapi import FastAPI, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app, shared = FastAPI(openapi_url=None), Path(__file__)
    if settings.host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK, www_redirect=False)
    for path, file, kind in (
        ("/", page, "text/html"),
        ("/page.css", shared.with_suffix(".css"), "text/css"),
        ("/page.js", shared.with_suffix(".js"), "text/javascript"),
    ):
        content = Response(file.read_bytes(), media_type=f"{kind}; charset=utf-8", headers=HEADERS)
        app.add_api_route(path, partial(_given, content), response_model=None)
    return app


def _given(content: Any) -> Any:
    return content


@contextlib.contextmanager
def opened(place: Path, table: str) -> Iterator[sqlite3.Connection]:
    """A database of opinions, which several processes may read and write at once.

    Args:
        place: of the file; made, and its folder, where it is missing.
        table: definition of its only one, after ``CREATE TABLE IF NOT EXISTS``.

    Raises:
        UserError: as `make_opinions_folder`; or it cannot be opened.
    """
    make_opinions_folder(place.parent)
    with contextlib.ExitStack() as held:
        try:
            database = held.enter_context(contextlib.closing(sqlite3.connect(place)))
            database.execute("PRAGMA journal_mode=WAL")
            database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        except sqlite3.Error as error:
            raise UserError(f"{place} cannot be opened ({error}): where it is damaged, move it away") from None
        yield database


def make_opinions_folder(folder: Path) -> None:
    """Make the folder that opinions and tables of them lie in, where it is missing.

    Raises:
        UserError: it is a file, or holds something and no opinions, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for name in sorted(os.listdir(folder)) if not LEFT_BEHIND.fullmatch(name)]
    except OSError as error:
        raise UserError(f"{folder} cannot be a folder of opinions: {error.strerror}; move it away") from None
    if names and not any(name.endswith((".sqlite", ".lock", "table.json")) for name in names):
        raise UserError(f"{folder} holds something else than opinions ({names[0]}), which lie there: move it away")
