"""A flow run that waits for people by Prefect's own pause, and goes on when they say so."""

from __future__ import annotations

import contextlib
from pathlib import Path
from uuid import UUID

from fsspec.implementations.local import LocalFileSystem
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import FlowPauseTimeout, NotPausedError, ObjectNotFound
from prefect.flow_runs import pause_flow_run, resume_flow_run, suspend_flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import BaseModel

from dataset_tools.storage import write_bytes

WAITING = "waiting.json"
"""Below the work folder: which run waits."""
LOOKED_EVERY = 2
"""Seconds between looks of a paused run at whether it was resumed."""
PAUSE_KEY = "people"
"""A run that was resumed, and so begins anew, does not wait a second time."""


class _Waiting(BaseModel):
    flow_run: UUID
    name: str
    api: str
    """Of the temporary server that the run has started; empty where it uses one that others know."""


def is_suspended_while_waiting() -> bool:
    """Whether this flow run ends until it is resumed, so that its worker is free: those of deployments do."""
    run = FlowRunContext.get()
    assert run is not None and run.flow_run is not None
    return run.flow_run.deployment_id is not None and run.flow_run.parent_task_run_id is None


def wait_for_people(work: str, hours: float) -> None:
    """Wait until this flow run is resumed, by `resume_waiting` or on Prefect's page.

    Args:
        hours: that a run which is not suspended waits at most.

    Raises:
        FlowPauseTimeout: nobody has resumed it.
        prefect.exceptions.Pause: it is suspended; once resumed it begins anew, and this call does nothing.
    """
    run, place = FlowRunContext.get(), Path(work, WAITING)
    assert run is not None and run.flow_run is not None
    with get_client(sync_client=True) as client:
        api = "" if PREFECT_API_URL.value() else str(client.api_url)
    waiting = _Waiting(flow_run=run.flow_run.id, name=run.flow_run.name, api=api)
    write_bytes(LocalFileSystem(), str(place), waiting.model_dump_json().encode())
    if is_suspended_while_waiting():
        suspend_flow_run(key=PAUSE_KEY)
        place.unlink(missing_ok=True)
        return
    try:
        pause_flow_run(timeout=max(1, round(3600 * hours)), poll_interval=LOOKED_EVERY, key=PAUSE_KEY)
    finally:
        place.unlink(missing_ok=True)


def resume_waiting(work: str) -> str:
    """Let the run that waits go on; gives what came of it, as one sentence."""
    again = "give the command that proposed the plates again, and it goes on from here"
    try:
        waiting = _Waiting.model_validate_json(Path(work, WAITING).read_bytes())
    except FileNotFoundError:
        return f"No flow run waits for it: {again}."
    server = temporary_settings({PREFECT_API_URL: waiting.api}) if waiting.api else contextlib.nullcontext()
    try:
        with server:
            resume_flow_run(waiting.flow_run)
    except NotPausedError:
        return f"Flow run {waiting.name} does not wait any more: {again} if it has not gone on by itself."
    except FlowPauseTimeout:
        return f"Flow run {waiting.name} has waited too long and has ended: {again}."
    except ObjectNotFound:
        return (
            f"This Prefect server knows no flow run {waiting.name}: set PREFECT_API_URL to that of its own, or {again}."
        )
    except Exception as error:  # of the network, of what answers there instead
        what = " ".join(str(error).split()) or type(error).__name__
        return f"Flow run {waiting.name} could not be resumed ({what}): {again}."
    return f"Flow run {waiting.name} goes on."
