"""``mild publish``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from flows.commands.terminal import new_console, say, stopped_in_one_line


def publish(
    dataset: Annotated[str, typer.Argument(help="Folder or URL of a dataset.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME of a dataset on the Hugging Face hub; made where needed.")],
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="Branch; made where needed.")] = "main",
    public: Annotated[
        bool, typer.Option("--public", help="For everybody to see; else a new dataset is private.")
    ] = False,
    opt_out: Annotated[
        str | None, typer.Option(metavar="LIST", help="Opt-out list that the dataset must not hold a picture of.")
    ] = None,
    squash: Annotated[
        bool, typer.Option("--squash", help="Forget the branch's earlier commits, which hold what was taken out.")
    ] = False,
) -> None:
    """Check a dataset, upload it to the hub with its card, and check it there.

    Started again, it uploads what is missing. The hub's own token is used: of HF_TOKEN, or of hf auth login.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from dataset_tools.opt_out import read_opt_out
    from dataset_tools.publishing import check_publishable
    from dataset_tools.publishing import publish as publish_dataset

    listed = None if opt_out is None else read_opt_out(opt_out)
    with stopped_in_one_line("stopped: what went up is kept, and the same command goes on"):
        for warning in check_publishable(dataset, listed, workers=os.cpu_count() or 1):
            say(f"warning: {warning}")
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=new_console(stderr=True)) as bars:
            bar = bars.add_task(repo, total=None)
            done = publish_dataset(
                dataset,
                repo,
                revision=revision,
                public=public,
                squash=squash,
                progress=lambda completed, total: bars.update(bar, completed=completed, total=total),
            )
    say(f"{len(done.uploaded)} files uploaded, {len(done.removed)} removed; {repo} is checked: commit {done.commit}")
    if done.replaced:
        say("earlier commits still hold the files that were replaced or removed; --squash forgets them")
