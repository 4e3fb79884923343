"""One temporary Prefect server for all tests of flows."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from prefect.testing.utilities import prefect_test_harness


@pytest.fixture(scope="session", autouse=True)
def prefect_server() -> Iterator[None]:
    """A real server with a database of its own, for flows called in this process."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def server_environment() -> dict[str, str]:
    """Environment for child processes that should use the same server."""
    from prefect.settings import PREFECT_API_URL

    return {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or "", "PREFECT_LOGGING_LEVEL": "CRITICAL"}
