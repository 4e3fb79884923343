"""What deployments need of a Prefect server and of its workers: code to run, work pools, automations for dead runs."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY
from prefect.workers.process import ProcessWorker

from dataset_tools.errors import UserError

POOLS = {"mild-cpu": "Whatever a processor does in good time.", "mild-gpu": "What wants a GPU."}
"""Work pools by kind; `prefect.yaml` says which deployment runs in which."""
DEPLOYED = ("build-dataset", "train", "pretrain-base", "evaluate", "select-plates", "pipeline")
"""Flows that have deployments."""
PARTS = ("build-shards",)
"""Flows that only those call."""
MISSED = 3
"""Heartbeats without which a run is taken for dead."""
PATIENCE = timedelta(hours=1)
"""A run that crashes again within this time after it was started again is left as it is."""

_HEARTBEAT = "prefect.flow-run.heartbeat"
_NOT_RUNNING = ("Completed", "Failed", "TimedOut", "Crashed", "Cancelling", "Cancelled", "Suspended")
"""States in which no heartbeat is due."""


def installed_code() -> dict[str, str]:
    """Pull step: flows and recipes are those of the ``mild`` that is installed where the worker runs."""
    return {"directory": str(Path(__file__).parents[1])}


def cloned_code(repository: str, branch: str) -> list[dict[str, Any]]:
    """Pull steps: every run clones a git repository; an empty branch is its own default."""
    where = {"repository": repository} | ({"branch": branch} if branch else {})
    return [{"prefect.deployments.steps.git_clone": where}]


def create_pools(client: SyncPrefectClient) -> None:
    """Create the work pools that are not there; those that are stay as they are."""
    template = ProcessWorker.get_default_base_job_template()
    for name, description in POOLS.items():
        pool = WorkPoolCreate(name=name, type="process", description=description, base_job_template=template)
        try:
            client.create_work_pool(pool)
        except ObjectAlreadyExists:
            continue


def automations() -> list[AutomationCore]:
    """Two automations: a run without heartbeats is marked as crashed, and a crashed run is started again.

    They are two, as one automation that did both would start a completed run again, too: a heartbeat may reach the
    server after the state that ended its run, and no other follows. Of the two, the first one's change is then refused
    by the server, which lets no ended run crash, and so the second one never hears of it.

    Raises:
        UserError: heartbeats are switched off.
    """
    every = PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value()
    if every is None:
        raise UserError("PREFECT_FLOWS_HEARTBEAT_FREQUENCY is none: without heartbeats nobody hears that a run is dead")
    return [
        AutomationCore(
            name="mild: a run without heartbeats has crashed",
            description=f"Its worker is dead, or was cut off: {MISSED} heartbeats are missing.",
            trigger=EventTrigger(
                after={_HEARTBEAT},
                expect={_HEARTBEAT, *(f"prefect.flow-run.{state}" for state in _NOT_RUNNING)},
                **_each_run_of(*DEPLOYED, *PARTS),
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=MISSED * every),
            ),
            actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"{MISSED} heartbeats are missing")],
        ),
        AutomationCore(
            name="mild: a crashed run is started again",
            description=f"It goes on from what is finished; once within {PATIENCE}.",
            trigger=EventTrigger(
                expect={"prefect.flow-run.Crashed"},
                **_each_run_of(*DEPLOYED),
                posture=Posture.Reactive,
                threshold=1,
                within=PATIENCE,
            ),
            actions=[ChangeFlowRunState(state=StateType.SCHEDULED, message="started again after a crash")],
        ),
    ]


def create_automations(client: SyncPrefectClient) -> None:
    """Create the automations, or bring them up to date by name; equal ones are not touched, so that they go on."""
    for wanted in automations():
        found = client.read_automations_by_name(wanted.name)
        if not found:
            client.create_automation(wanted)
        elif AutomationCore(**found[0].model_dump(exclude={"id"})) != wanted:
            client.update_automation(found[0].id, wanted)


def _each_run_of(*flows: str) -> dict[str, Any]:
    return {
        "match": ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        "match_related": ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": list(flows)}),
        "for_each": {"prefect.resource.id"},
    }
