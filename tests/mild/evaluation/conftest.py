"""What tests of local pages share: a browser, and a page that it can reach."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@contextmanager
def _chromium() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def chromium() -> Callable[[], AbstractContextManager[Any]]:
    """Starts Chromium, as playwright drives it: ``with chromium() as browser``. Skips where there is none."""
    return _chromium


@pytest.fixture
def browser(chromium: Callable[[], AbstractContextManager[Any]]) -> Iterator[Any]:
    """Chromium, for one test."""
    with chromium() as browser:
        yield browser


@contextmanager
def _served(app: Any) -> Iterator[str]:
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        serving.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            serving.join()


@pytest.fixture
def served() -> Callable[[Any], AbstractContextManager[str]]:
    """Serves an application over HTTP: ``with served(app) as address``."""
    return _served
