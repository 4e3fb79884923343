"""The cached steps that fetch what a web list names, before the rest of `flows.build_dataset` reads it.

The unit of work is a share of the hosts: all URLs of one host are in one step, so that no other visits it meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import BaseModel

from dataset_tools.downloads import DOWNLOAD_SCHEMA, Download, are_there, download
from dataset_tools.records import Rejection, rejections_to_table
from dataset_tools.sources.weblist import DownloadedSettings, WeblistSettings, WebRow, rows_to_table
from dataset_tools.storage import Listings, is_url, remove_partials
from dataset_tools.web import WebSettings, host_of
from flows.caching import Files, Job, cached_step, write_named
from flows.dataset_steps import PICTURES, read_table
from flows.record_table import parquet_bytes

PICTURE_FOLDER = "downloads"
"""Below the work folder. What lies there stays, whatever the settings: it need not be fetched again."""
URLS_PER_STEP = 2_000
"""About."""


class ReadWeblistJob(Job):
    """Read the rows of a web list."""

    step: ClassVar[str] = "read-weblist"
    version: ClassVar[int] = 1
    source: WeblistSettings
    fingerprint: str

    def determines(self) -> Any:
        """The list's content and the settings that it is read by."""
        return self.fingerprint


class ReadWeblist(BaseModel):
    """Two tables below ``work``."""

    files: Files
    rows: str
    """Name of the table of `dataset_tools.sources.weblist.ROW_SCHEMA`."""
    rejected: str
    """Name of the table of rows that cannot be used."""

    def is_sound(self, job: Job, listings: Listings) -> bool:
        """Whether the tables are as they were written."""
        return self.files.is_sound(job, listings)

    def told(self) -> str:
        """How many rows can be used."""
        return f"rows: {self.files.rows}"


@cached_step
def read_weblist(job: ReadWeblistJob) -> ReadWeblist:
    """Write the rows, and what is wrong with those that cannot be used."""
    rejected: list[Rejection] = []

    def usable() -> Iterator[WebRow]:
        for row in job.source.open().rows():
            if isinstance(row, Rejection):
                rejected.append(row)
            else:
                yield row

    table = rows_to_table(usable())
    rows = write_named(job, "weblist.parquet", parquet_bytes(table))
    left_out = write_named(job, "weblist-rejected.parquet", parquet_bytes(rejections_to_table(rejected)))
    return ReadWeblist(files=Files.of(job, "work", [rows, left_out], len(table)), rows=rows, rejected=left_out)


class DownloadJob(Job):
    """Fetch what URLs name."""

    step: ClassVar[str] = "download"
    version: ClassVar[int] = 1
    packages: ClassVar[tuple[str, ...]] = (*PICTURES, "imagehash", "scipy")
    urls: tuple[str, ...]
    settings: WebSettings

    def label(self) -> str:
        """The first host."""
        return host_of(self.urls[0])

    def determines(self) -> Any:
        """What is asked for and what is taken, not how fast."""
        return [self.urls, self.settings.rules()]


class Downloaded(BaseModel):
    """Result of fetching."""

    files: Files
    table: str
    """Name below ``work`` of the table of what each URL gave."""
    moved: list[str]
    """URLs on other hosts that redirects led to."""
    transient: int
    """How many URLs another run may fetch."""

    def is_sound(self, job: Job, listings: Listings) -> bool:
        """Whether table and pictures are there, and nothing is worth another try."""
        if self.transient or not self.files.is_sound(job, listings):
            return False
        rows = read_table(job.work, self.table).to_pylist()
        return are_there((Download(**row) for row in rows), f"{job.work}/{PICTURE_FOLDER}")

    def told(self) -> str:
        """How many URLs were asked for, and what is left to do."""
        return f"URLs: {self.files.rows}, moved: {len(self.moved)}, to be tried again: {self.transient}"


@cached_step
def download_urls(job: DownloadJob) -> Downloaded:
    """Fetch what does not lie there from another time; what failed for a while is all that is tried again."""
    given = download(job.urls, f"{job.work}/{PICTURE_FOLDER}", job.settings)
    table = pa.Table.from_pylist([each.model_dump() for each in given], schema=DOWNLOAD_SCHEMA)
    name = write_named(job, "downloads.parquet", parquet_bytes(table))
    return Downloaded(
        files=Files.of(job, "work", [name], len(given)),
        table=name,
        moved=sorted({each.final_url for each in given if each.status == "moved"}),
        transient=sum(each.transient for each in given),
    )


def fetch_weblist(
    source: WeblistSettings, place: dict[str, str], run: Callable[[Any, Sequence[Job]], list[Any]]
) -> DownloadedSettings:
    """Fetch what a web list names; gives the source that reads it.

    Args:
        place: ``root`` and ``work`` of the jobs.
        run: runs a step with each of some jobs; gives their results.
    """
    work = place["work"]
    if not is_url(work):
        for folder in Path(work, PICTURE_FOLDER).glob("*/*"):
            remove_partials(folder)
    listed: ReadWeblist
    [listed] = run(read_weblist, [ReadWeblistJob(**place, source=source, fingerprint=source.open().fingerprint())])
    urls: list[str] = read_table(work, listed.rows, columns=["url"])["url"].to_pylist()
    known: set[str] = set()
    tables: list[str] = []
    # Redirects to other hosts are followed by one in each round.
    for _ in range(source.web.max_redirects + 1):
        urls = [url for url in dict.fromkeys(urls) if url not in known]
        known.update(urls)
        jobs = [DownloadJob(**place, urls=share, settings=source.web) for share in by_host(urls)]
        done: list[Downloaded] = run(download_urls, jobs)
        tables += [each.table for each in done]
        urls = [url for each in done for url in each.moved]
    return DownloadedSettings(
        weblist=source,
        folder=work,
        rows=listed.rows,
        rejected=listed.rejected,
        downloads=tuple(tables),
        pictures=PICTURE_FOLDER,
    )


def by_host(urls: Sequence[str]) -> list[tuple[str, ...]]:
    """Shares of URLs; all of one host are in one, whatever else is in the list."""
    count = -(-len(urls) // URLS_PER_STEP)
    shares: list[list[str]] = [[] for _ in range(count)]
    for url in urls:
        digest = hashlib.sha256(host_of(url).encode()).digest()
        shares[int.from_bytes(digest[:8], "big") % count].append(url)
    return [tuple(share) for share in shares if share]
