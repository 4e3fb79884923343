"""``mild deploy``."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import yaml

from dataset_tools.errors import UserError
from flows.commands.prefect_server import prepare_prefect
from flows.commands.terminal import Verbose, say

DEFINITIONS = Path("prefect.yaml")


def deploy(
    data: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where deployments write, on a disk that all workers share.")
    ] = "build",
    repository: Annotated[
        str,
        typer.Option(metavar="URL", help="Git repository that every run clones; default: the mild of each worker."),
    ] = "",
    branch: Annotated[str, typer.Option(help="Of the repository; default: its own.")] = "",
    verbose: Verbose = False,
) -> None:
    """Give a Prefect server the deployments of prefect.yaml, work pools, and automations for runs that died."""
    prepare_prefect(verbose)
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    from dataset_tools.storage import local_place
    from dataset_tools.storage_options import is_secret_url, scrub
    from flows.deployment import POOLS, cloned_code, create_automations, create_pools

    if not PREFECT_API_URL.value():
        raise UserError("deployments live on a server: run prefect server start, and set PREFECT_API_URL to its /api")
    if branch and not repository:
        raise UserError("--branch is of a --repository: name both")
    if repository and is_secret_url(repository):
        raise UserError(
            f"--repository {scrub(repository)} carries a password or token, which the server would store and show: "
            "take it out, and let git know it where the workers run (git credential, or ssh)"
        )
    if not DEFINITIONS.is_file():
        raise UserError(f"there is no {DEFINITIONS} here: run this in the folder of the project")
    place = local_place(data, "what deployments write")
    definitions = yaml.safe_load(DEFINITIONS.read_text(encoding="utf-8"))
    if repository:
        definitions["pull"] = cloned_code(repository, branch)
    with get_client(sync_client=True) as client:
        create_pools(client)
        _deploy_all(definitions, place)
        create_automations(client)
    say(f"{len(definitions['deployments'])} deployments, which write below {place}")
    for pool in POOLS:
        say(f"prefect worker start --pool {pool}")


def _deploy_all(definitions: dict[str, object], data: str) -> None:
    """``prefect deploy --all``, in this process. Raises `UserError` with what Prefect says where it fails."""
    from prefect.cli import app

    arguments, said = sys.argv, io.StringIO()
    os.environ["MILD_DATA"] = data  # prefect.yaml names it
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prefect.yaml")
        file.write_text(yaml.safe_dump(definitions), encoding="utf-8")
        sys.argv = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        try:
            with contextlib.redirect_stdout(said):
                app()
        except SystemExit as end:
            if end.code:
                raise UserError(f"prefect deploy: {' '.join(said.getvalue().split())[-500:]}") from None
        finally:
            sys.argv = arguments
