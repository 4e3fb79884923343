"""What may go wrong around a build: files of others, other runs, sources that fail, things that change meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent

from dataset_tools.errors import UserError
from dataset_tools.shards import read_manifest, verify
from dataset_tools.sources.sample import SampleSettings, write_mirror
from dataset_tools.storage import open_root
from flows import build_dataset as module
from flows import caching
from flows.build_dataset import build_dataset
from flows.commands.build import build
from flows.dataset_steps import build_curated_shard
from flows.output_lock import HOLDER, sole_run

pytestmark = pytest.mark.usefixtures("prefect_server")

WORLD = SampleSettings(
    train=16, validation=1, test=1, train_backgrounds=12, validation_backgrounds=1, test_backgrounds=1,
    smallest=128, largest=160, broken=False,
)  # fmt: skip
CURATION = {"images_per_stratum": 3, "backgrounds": 12, "seed": 0}


class Pictures(SimpleHTTPRequestHandler):
    """Serves a mirror's pictures and notes which; they wait while ``held``."""

    asked: ClassVar[list[str]] = []
    held: ClassVar[threading.Event | None] = None
    busy: ClassVar[str] = ""
    """Of paths that end so; none are where it is empty."""

    def do_GET(self) -> None:
        """Answer."""
        self.asked.append(self.path)
        if self.held is not None:
            self.held.wait()
        if self.busy and self.path.endswith(self.busy):
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mirror in OpenImages' format, without the broken pictures that the sample world ships."""
    root = tmp_path_factory.mktemp("drawn") / "mirror"
    write_mirror(WORLD, str(root))
    return root


@pytest.fixture(scope="module")
def built(drawn: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> dict[str, Any]:
    """What a build tells that read it, with no fault anywhere."""
    folder = tmp_path_factory.mktemp("built")
    return build_dataset(recipe(folder, drawn), str(folder / "dataset"))


def copy_built(built: dict[str, Any], output: Path) -> None:
    """Let a build stand at ``output``, where the next goes on."""
    for end in ("", ".work"):
        shutil.copytree(f"{built['dataset']}{end}", f"{output}{end}")


def pictures_of(built: dict[str, Any]) -> list[str]:
    """Names of the pictures of its samples, in their order."""
    held = [f"{built['dataset']}/{shard.path}" for shard in read_manifest(built["dataset"]).shards["real"]["train"]]
    samples = [json.loads(Path(f"{tar[:-4]}.index.json").read_text())["samples"] for tar in held]
    return [sample["key"].removeprefix("openimages-") for listed in samples for sample in listed]


@pytest.fixture
def mirror(drawn: Path, tmp_path: Path) -> Path:
    """A copy of it, to do harm to."""
    shutil.copytree(drawn, tmp_path / "mirror")
    return tmp_path / "mirror"


@pytest.fixture
def pictures(drawn: Path, no_download_limit: None) -> Iterator[str]:
    """The pictures of the mirror by HTTP, on this machine."""
    Pictures.asked, Pictures.held, Pictures.busy = [], None, ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Pictures, directory=str(drawn)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/images"
    if Pictures.held is not None:
        Pictures.held.set()
    server.shutdown()
    server.server_close()


def recipe(folder: Path, mirror: Path, source: dict[str, Any] | None = None, **settings: Any) -> str:
    """Settings that read a mirror as OpenImages."""
    values: dict[str, Any] = {
        "name": "test",
        "source": {"kind": "openimages", "root": str(mirror), "images": f"{mirror}/images", "splits": ["train"]},
        "samples_per_shard": 4,
    }
    values["source"] |= {"curation": CURATION, **(source or {})}
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump(values | settings))
    return str(path)


def digests(root: Path) -> dict[str, str]:
    """sha256 of every file."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Files of others ----------------------------------------------------------------------------------------------------


def test_what_no_run_on_this_output_made_stays_whatever_it_is_called(drawn: Path, tmp_path: Path) -> None:
    """Files and folders that end in .partial, shards of somebody else, another run's files under construction."""
    output = tmp_path / "out"
    mine = [
        output / ".notes.partial",
        output / "real/.train-000000.tar.0a1b2c3d.partial",
        output / "real/train-000099.tar",
        output / "real/photo-000001.jpg",
        output / "composite/train-000000.tar",
        output / "other/.train-000000.tar.0a1b2c3d.mild-partial",
        output / "downloads/.film.partial/part-1",
        Path(f"{output}.work/.cache.partial/x"),
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    settings = recipe(tmp_path, drawn)
    build_dataset(settings, str(output))
    build_dataset(settings, str(output), {"samples_per_shard": 100})
    assert [path for path in mine if not path.exists() or path.read_text() != "mine"] == []


@pytest.mark.parametrize("name", ["README.md", "real/train-000000.tar"])
def test_what_a_build_would_overwrite_is_refused_where_no_build_wrote_it(
    drawn: Path, tmp_path: Path, name: str
) -> None:
    """Somebody's own file stands where a file of the dataset would go: it stays, and the message names it."""
    own = tmp_path / "out" / name
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(UserError, match=re.escape(f"holds {name}")):
        build_dataset(recipe(tmp_path, drawn), str(tmp_path / "out"))
    assert own.read_text() == "mine"


def test_after_a_build_that_did_not_end_a_card_of_somebody_else_is_refused_as_before(
    drawn: Path, tmp_path: Path, pictures: str
) -> None:
    source = {"images": pictures, "fetch": {"attempts": 1, "allow_private_addresses": True}}
    settings, output = recipe(tmp_path, drawn, source), tmp_path / "out"
    Pictures.busy = ".jpg"
    with pytest.raises(UserError, match="none of the pictures could be used"):
        build_dataset(settings, str(output))
    (output / "README.md").write_text("mine")
    Pictures.busy = ""
    with pytest.raises(UserError, match=r"holds README\.md"):
        build_dataset(settings, str(output))
    assert (output / "README.md").read_text() == "mine"
    (output / "README.md").unlink()
    for _ in range(2):  # its own it may replace
        assert build_dataset(settings, str(output), {"description": "Other words."})["samples"]


def test_the_contact_sheet_of_a_part_that_is_gone_goes_with_it(drawn: Path, tmp_path: Path) -> None:
    settings, output = recipe(tmp_path, drawn), tmp_path / "out"
    build_dataset(settings, str(output), {"source.splits": ["train", "test"]})
    (output / "card/notes.png").write_text("mine")
    assert (output / "card/real-test.png").exists()
    build_dataset(settings, str(output))
    assert sorted(path.name for path in (output / "card").iterdir()) == ["notes.png", "real-train.png"]


def test_no_manifest_stands_where_a_shard_was_tried_again_and_lost(drawn: Path, tmp_path: Path, pictures: str) -> None:
    """A picture that was busy is asked for again, and by then all are: nothing says that the dataset is whole."""
    source = {"images": pictures, "fetch": {"attempts": 1, "allow_private_addresses": True}}
    settings = recipe(tmp_path, drawn, source, samples_per_shard=100, max_rejected_share=0.5)
    built = build_dataset(settings, str(tmp_path / "out"))
    Pictures.busy = f"{pictures_of(built)[0]}.jpg"
    again = build_dataset(settings, str(tmp_path / "other"))
    assert again["rejected"] == {"http-error": 1} and again["samples"] == built["samples"] - 1
    Pictures.busy = ".jpg"
    with pytest.raises(UserError, match="none of the pictures could be used"):
        build_dataset(settings, str(tmp_path / "other"))
    assert not (tmp_path / "other/manifest.json").exists()
    Pictures.busy = ""
    assert build_dataset(settings, str(tmp_path / "other"))["digest"] == built["digest"]


# Other runs ---------------------------------------------------------------------------------------------------------


def test_the_second_of_two_runs_on_one_output_is_told_of_the_first_and_spoils_nothing(
    drawn: Path, built: dict[str, Any], pictures: str, tmp_path: Path, forks: ForkServerContext
) -> None:
    """Another seed, started while the first waits for its pictures; later runs give what an undisturbed one does."""
    source = {"images": pictures, "fetch": {"allow_private_addresses": True, "timeout_seconds": 600}}
    settings, output = recipe(tmp_path, drawn, source), tmp_path / "out"
    Pictures.held = threading.Event()
    first = forks.Process(target=build, args=(settings,), kwargs={"output": str(output)})
    first.start()
    while not Pictures.asked and first.is_alive():
        first.join(0.01)
    with pytest.raises(UserError, match=f"another run is at work on it .*process {first.pid},"):
        build_dataset(settings, str(output), {"source.curation.seed": 1})
    Pictures.held.set()
    first.join()
    assert first.exitcode == 0
    assert read_manifest(str(output)).digest() == built["digest"]
    assert build_dataset(settings, str(output), {"source.curation.seed": 1})["digest"] != built["digest"]
    assert build_dataset(settings, str(output))["digest"] == built["digest"]


def test_on_a_store_a_holder_that_lives_is_respected_and_one_that_died_is_taken_over(bucket: str) -> None:
    """There is no lock of the kernel there: the file that names the holder is renewed, or its process is looked for."""
    output = f"{bucket}/dataset"
    filesystem, place = module.open_root(f"{output}.work/{HOLDER}")
    with sole_run(output):
        holder = json.loads(filesystem.cat_file(place))
        with pytest.raises(UserError, match="another run is at work"), sole_run(output):
            pass
        assert json.loads(filesystem.cat_file(place))["id"] == holder["id"]
    assert not filesystem.exists(place)
    (dead := subprocess.Popen([sys.executable, "-c", ""])).wait()
    for left in (holder | {"process": dead.pid}, holder | {"host": "elsewhere", "renewed": holder["renewed"] - 3600}):
        filesystem.pipe_file(place, json.dumps(left).encode())
        with sole_run(output):
            assert json.loads(filesystem.cat_file(place))["id"] != left["id"]


def test_on_a_store_a_holder_that_was_taken_over_is_told_so_and_leaves_the_other_alone(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.output_lock.RENEWED_EVERY", 0.01)
    output = f"{bucket}/dataset"
    filesystem, place = module.open_root(f"{output}.work/{HOLDER}")
    with contextlib.ExitStack() as ends:
        ends.enter_context(sole_run(output))
        other = json.loads(filesystem.cat_file(place)) | {"id": "another's"}
        renewal = next(thread for thread in threading.enumerate() if thread.name == "renewal")
        while renewal.is_alive():  # until it has seen that it lost
            filesystem.pipe_file(place, json.dumps(other).encode())
        with pytest.raises(UserError, match="another run took it over"):
            ends.pop_all().close()
    filesystem.invalidate_cache()
    assert json.loads(filesystem.cat_file(place)) == other


def test_an_output_that_is_named_by_a_link_is_the_same_output(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "link").symlink_to("dataset")
    taken = pytest.raises(UserError, match="another run is at work")
    with sole_run(str(tmp_path / "dataset")), taken, sole_run(str(tmp_path / "link")):
        pass
    assert not (tmp_path / "link.work").exists()


# Sources that fail --------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Events that tell that a dataset is ready."""
    events: list[dict[str, Any]] = []
    monkeypatch.setattr("flows.events.emit_event", lambda name, **event: events.append(event))
    return events


def test_a_wrong_setting_fails_the_run_and_is_forgotten_once_it_is_right(
    drawn: Path, built: dict[str, Any], pictures: str, tmp_path: Path, ready: list[dict[str, Any]]
) -> None:
    """No dataset, no event, the reasons and a file that has them; then the dataset of somebody who erred in nothing."""
    right = {"images": pictures, "fetch": {"allow_private_addresses": True, "attempts": 1}}
    output = tmp_path / "out"
    for wrong, reason in (
        ({"images": "/nowhere"}, "no-such-folder"),
        ({"fetch": {"attempts": 1}}, "private-address"),
    ):
        with pytest.raises(UserError, match=f"{reason} [0-9]+; .*rejected.parquet") as told:
            build_dataset(recipe(tmp_path, drawn, {**right, **wrong}), str(output))
        (named,) = re.findall(r"; (\S+rejected\.parquet)", str(told.value))
        assert reason in pq.read_table(named)["reason"].to_pylist()
        assert not (output / "manifest.json").exists()
        assert ready == []
    assert build_dataset(recipe(tmp_path, drawn, right), str(output))["digest"] == built["digest"]


def test_pictures_that_were_absent_are_found_once_they_are_there(
    built: dict[str, Any], mirror: Path, tmp_path: Path
) -> None:
    """None of a mirror's pictures is there, or half: the run fails. One is not: it ends, and the next fetches it."""
    names = sorted((mirror / "images/train").iterdir())
    settings, output = recipe(tmp_path, mirror), str(tmp_path / "out")
    for picture in names:
        picture.rename(tmp_path / picture.name)
    with pytest.raises(UserError, match="none of the pictures could be used: not-found"):
        build_dataset(settings, output)
    for picture in names[::2]:
        (tmp_path / picture.name).rename(picture)
    with pytest.raises(UserError, match=r"of 8 pictures \(..%\) were set aside, more than max_rejected_share \(0.2\)"):
        build_dataset(settings, output)
    for picture in names[1::2]:
        (tmp_path / picture.name).rename(picture)
    one = mirror / f"images/train/{pictures_of(built)[0]}.jpg"
    one.rename(tmp_path / one.name)
    assert build_dataset(settings, output)["samples"] == built["samples"] - 1
    (tmp_path / one.name).rename(one)
    assert build_dataset(settings, output)["digest"] == built["digest"]


def test_backgrounds_that_are_lacking_are_told_before_a_shard_is_built(drawn: Path, tmp_path: Path) -> None:
    """Nothing was fetched for a dataset that could not come about."""
    composite = {"samples": {"train": 4}, "size": [96, 96], "donors": {"min_height": 24}}
    settings = recipe(tmp_path, drawn, {"curation": CURATION | {"backgrounds": 0}}, composite=composite)
    with pytest.raises(UserError, match="split train has no person-free background"):
        build_dataset(settings, str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/real/*"))


# What changes -------------------------------------------------------------------------------------------------------


def test_a_picture_and_an_archive_of_masks_that_are_replaced_in_place_are_noticed(
    built: dict[str, Any], mirror: Path, tmp_path: Path
) -> None:
    """Their names are as before; the shards that hold them are built anew, others stay."""
    settings, output = recipe(tmp_path, mirror), tmp_path / "out"
    copy_built(built, output)
    picture = mirror / f"images/train/{pictures_of(built)[0]}.jpg"
    with Image.open(picture) as old:
        darker = Image.fromarray((np.asarray(old.convert("RGB")) // 2).astype(np.uint8))
    darker.save(picture)
    replaced = build_dataset(settings, str(output))
    assert (replaced["cached"], replaced["shards"]) == (built["shards"] - 1, built["shards"])
    assert replaced["digest"] != built["digest"]
    archive = mirror / f"v5/train-masks/train-masks-{picture.name[0]}.zip"
    with zipfile.ZipFile(archive) as read:
        members = {name: read.read(name) for name in read.namelist()}
    with zipfile.ZipFile(archive, "w") as written:
        for name, data in members.items():
            written.writestr(name, data if not name.startswith(picture.stem) else b"no mask any more")
    again = build_dataset(settings, str(output))
    assert again["cached"] < again["shards"]
    assert again["rejected"] != replaced["rejected"]


def test_other_versions_of_what_decides_about_bytes_build_every_shard_anew(
    drawn: Path, built: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another Pillow may decode to other pixels."""
    settings, output = recipe(tmp_path, drawn), str(tmp_path / "out")
    copy_built(built, tmp_path / "out")
    known = caching._version
    monkeypatch.setattr(caching, "_version", lambda package: "999" if package == "pillow" else known(package))
    assert build_dataset(settings, output)["cached"] == 0


def test_a_manifest_never_stands_while_shards_change_to_others_than_it_lists(
    drawn: Path, built: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes first where pixels will differ, and stays where only the number of workers does."""
    settings, output = recipe(tmp_path, drawn), tmp_path / "out"
    copy_built(built, output)
    stood = []
    run = module.run_steps

    def watched(step: Any, *rest: Any, **options: Any) -> Any:
        if step is build_curated_shard:
            stood.append((output / "manifest.json").exists())
        return run(step, *rest, **options)

    monkeypatch.setattr(module, "run_steps", watched)
    build_dataset(settings, str(output), {"curated.fetch_workers": 3, "source.fetch.attempts": 2})
    build_dataset(settings, str(output), {"curated.decode.max_side": 100})
    assert stood == [True, False]


@pytest.mark.parametrize("to", ["a disk", "a store"])
def test_a_dataset_that_was_copied_to_another_place_is_built_anew_nowhere(
    drawn: Path, built: dict[str, Any], tmp_path: Path, to: str, request: pytest.FixtureRequest
) -> None:
    """Times of files, and what a store calls them, are others there, bytes are not."""
    place = str(tmp_path) if to == "a disk" else request.getfixturevalue("bucket")
    filesystem, base = open_root(f"{place}/copy")
    for end in ("", ".work"):
        filesystem.put(f"{built['dataset']}{end}/", f"{base}{end}/", recursive=True)

    def results() -> dict[str, Any]:
        return {path: filesystem.modified(path) for path in filesystem.find(f"{base}.work/results")}

    before = results()
    summary = build_dataset(recipe(tmp_path, drawn), f"{place}/copy")
    assert summary["cached"] == summary["shards"] > 1 and summary["digest"] == built["digest"]
    assert results() == before  # of every step


def test_the_same_settings_give_the_same_files_wherever_they_lie(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages about pictures name no folder of this machine, absolute or relative, with or without spaces."""
    found = []
    for name in ("one", "the other one"):
        place = tmp_path / name
        shutil.copytree(drawn, place / "mirror")
        for picture in sorted((place / "mirror/images/train").iterdir())[::4]:
            picture.unlink()
        for archive in sorted((place / "mirror/v5/train-masks").iterdir())[::2]:
            archive.write_bytes(b"no archive")
        monkeypatch.chdir(place)
        settings = recipe(place, Path("mirror"), max_rejected_share=0.9)
        build_dataset(settings, "out")
        found.append(digests(place / "out"))
        assert pq.read_table(place / "out/rejected.parquet").num_rows > 2
    assert found[0] == found[1]


def test_the_event_is_of_a_place_and_comes_when_the_dataset_there_is_another(
    drawn: Path, tmp_path: Path, ready: list[dict[str, Any]]
) -> None:
    """Not again for a build that changed nothing; its resource is the absolute place, whatever the dataset's name."""
    settings, output = recipe(tmp_path, drawn), tmp_path / "out"
    digest = [
        build_dataset(settings, str(output), changes)["digest"] for changes in ({}, {}, {"source.curation.seed": 5})
    ]
    assert [event["payload"]["digest"] for event in ready] == [digest[0], digest[2]]
    assert {event["resource"]["prefect.resource.id"] for event in ready} == {f"mild.dataset.{output.as_uri()}"}
    assert {event["payload"]["dataset"] for event in ready} == {str(output)}


@pytest.mark.parametrize(("flow", "what"), [("train", "dataset"), ("evaluate", "adapters")])
def test_what_comes_next_starts_for_the_deployment_before_it_alone(tmp_path: Path, flow: str, what: str) -> None:
    """Not for the pipeline's, which does it by itself, nor for what anybody makes that goes by the same name."""
    deployments = yaml.safe_load(Path(__file__).parents[2].joinpath("prefect.yaml").read_text())["deployments"]
    (wanted,) = [
        trigger
        for deployment in deployments
        if deployment["entrypoint"].endswith(f":{flow}")
        for trigger in deployment.get("triggers", [])
    ]
    trigger = EventTrigger(
        posture="Reactive",
        threshold=1,
        within=timedelta(0),
        **{name: wanted[name] for name in ("expect", "match", "match_related")},
    )
    event = {
        "occurred": datetime.now(UTC),
        "received": datetime.now(UTC),
        "event": f"mild.{what}.ready",
        "resource": {"prefect.resource.id": f"mild.{what}.{tmp_path.as_uri()}", "prefect.resource.name": "sample"},
        "id": uuid.uuid4(),
    }
    flow_run = {"prefect.resource.id": "prefect.flow-run.1", "prefect.resource.role": "flow-run"}
    deployment = {
        **{"prefect.resource.id": "prefect.deployment.1", "prefect.resource.role": "deployment"},
        "prefect.resource.name": "sample",
    }
    assert trigger.covers(ReceivedEvent(**event, related=[flow_run, deployment]))
    assert not trigger.covers(ReceivedEvent(**event, related=[flow_run]))


def test_a_build_looks_each_table_up_once(drawn: Path, tmp_path: Path, serve_files: Callable[..., Any]) -> None:
    """But for the smallest, by which the door tells whether anything is there: when called, and when Prefect calls."""
    server = serve_files(drawn)
    source = {"root": server.url, "images": f"{drawn}/images", "fetch": {"allow_private_addresses": True}}
    build_dataset(recipe(tmp_path, drawn, source), str(tmp_path / "out"))
    looked_up = Counter(path for method, path in server.asked if method == "HEAD" and path.endswith(".csv"))
    assert sorted(looked_up.values()) == [1, 1, 1, 1, 3]


def test_composites_fetch_the_backgrounds_that_they_use_and_no_more(
    drawn: Path, built: dict[str, Any], pictures: str, tmp_path: Path
) -> None:
    """Three composites on one of many backgrounds each: three pictures are asked for, not all."""
    source = {"images": pictures, "fetch": {"allow_private_addresses": True}}
    composite = {"samples": {"train": 3}, "size": [96, 96], "donors": {"min_height": 24, "allow_occluded": True}}
    build_dataset(recipe(tmp_path, drawn, source, composite=composite), str(tmp_path / "out"))
    people = {f"/images/train/{name}.jpg" for name in pictures_of(built)}
    assert people < set(Pictures.asked)
    assert len(set(Pictures.asked) - people) == 3
    assert list(verify(str(tmp_path / "out"))) == []
