"""Whether Prefect can work at all, looked at before a command imports it: its settings, its database, its server."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings

from dataset_tools.errors import UserError

SERVER_SECONDS = 10
"""How long a Prefect server may take to say that it is there."""


def prepare_prefect(verbose: bool) -> None:
    """Prefect's settings, and whether it can work at all. Must run before Prefect is imported: it reads them then.

    Raises:
        UserError: its settings are wrong, its server does not answer, or there is no place for its database.
    """
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")
    # On a busy machine the temporary server needs more than the 20 seconds that Prefect gives it.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    if not verbose:
        # They say that they need longer than expected to empty their queues.
        for name in ("EventsWorker", "APILogWorker"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    from pydantic import ValidationError

    try:
        # What Prefect prints and warns of here, is looked at here.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            from prefect.settings import PREFECT_API_URL, PREFECT_HOME

            home, url = PREFECT_HOME.value(), PREFECT_API_URL.value()
    except ValidationError as error:
        what = "; ".join(f"{error.title}.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"Prefect's settings (PREFECT_... in the environment, or its profile): {what}") from None
    except RuntimeError as error:  # of pathlib
        raise UserError(f"Prefect keeps its database in a home folder: set HOME or PREFECT_HOME ({error})") from None
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(
            f"Prefect keeps its database in {home}, where nothing can be written ({error.strerror}): set PREFECT_HOME "
            "to a folder where that can be done"
        ) from None
    if url:
        _check_server(url)


def _check_server(url: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    cure = "start that server, set PREFECT_API_URL to another (it ends in /api), or unset it for a temporary one"
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        try:
            client = get_client(httpx_settings={"timeout": SERVER_SECONDS}, sync_client=True)
            fault = client.api_healthcheck()
            if fault is None:
                client.raise_for_api_version_mismatch()
        except Exception as error:  # of the network, of what answers there instead, of the URL itself
            fault = error
    if fault is not None:
        what = " ".join(str(fault).split()) or type(fault).__name__
        raise UserError(f"there is no Prefect server at {url} (PREFECT_API_URL): {what}; {cure}")
