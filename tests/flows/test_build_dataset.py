"""The flow build-dataset on the drawn world: cached, resumable, and the same bytes whatever happens."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import yaml

from dataset_tools.errors import UserError
from dataset_tools.records import ImageRecord
from dataset_tools.schema import EncodingSettings, Sample
from dataset_tools.shards import ShardDataset, read_manifest, verify
from dataset_tools.storage import PARTIAL_SUFFIX, open_root
from flows import cli, preflight
from flows.build_dataset import build_dataset, check_build
from flows.commands.build import build
from flows.dataset_steps import download_slot
from flows.settings import BuildSettings

pytestmark = pytest.mark.usefixtures("prefect_server")

KILLS = 5


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of some dozen pictures, in several shards of each configuration."""
    path = tmp_path_factory.mktemp("recipe") / "build.yaml"
    cue = {"kind": "annotated"}
    path.write_text(
        yaml.safe_dump(
            {
                "name": "test",
                "source": {
                    "kind": "sample",
                    **{"train": 12, "validation": 4, "test": 4},
                    **{"train_backgrounds": 3, "validation_backgrounds": 1, "test_backgrounds": 1},
                    **{"smallest": 128, "largest": 144},
                },
                "curated": {"configuration": "paired"},
                "pose": cue,
                "parsing": cue,
                "plate": cue,
                "composite": {
                    "samples": {"train": 9, "validation": 2, "test": 3},
                    "size": [96, 96],
                    "donors": {"min_height": 24, "allow_occluded": True},
                },
                "samples_per_shard": 3,
                # The world's broken pictures are a third of so small a one.
                "max_rejected_share": 0.5,
            }
        )
    )
    return path


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose build nobody disturbed, by one worker."""
    output = tmp_path_factory.mktemp("undisturbed") / "dataset"
    build_dataset(str(recipe), str(output), {"runner.workers": 1})
    return output


@pytest.fixture
def dataset(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed dataset and its work folder, to do harm to."""
    for name in ("dataset", "dataset.work"):
        subprocess.run(["cp", "-a", undisturbed.with_name(name), tmp_path / name], check=True)
    return tmp_path / "dataset"


def copy_drawn_world(undisturbed: Path, output: Path) -> None:
    """Give a build that is to begin the drawn mirror, with Prefect's word that it was drawn."""
    drawn, work = undisturbed.with_name("dataset.work"), Path(f"{output}.work")
    (work / "results").mkdir(parents=True)
    for known in [drawn / "mirror", *drawn.glob("results/draw-sample-mirror-*")]:
        subprocess.run(["cp", "-a", known, work / known.relative_to(drawn).parent], check=True)


def digests(root: Path) -> dict[str, str]:
    """sha256 of every file of a dataset."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def written_at(root: Path) -> dict[str, int]:
    """When every shard was written."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in sorted(root.rglob("*.tar"))}


def test_the_dataset_is_sound(undisturbed: Path) -> None:
    """verify finds nothing, and all splits of both configurations hold samples."""
    assert list(verify(str(undisturbed))) == []
    manifest = read_manifest(str(undisturbed))
    assert {c: set(splits) for c, splits in manifest.shards.items()} == {
        "paired": {"train", "validation", "test"},
        "composite": {"train", "validation", "test"},
    }
    sample = ShardDataset(str(undisturbed), "composite", "train")[0]
    assert sample.background is not None
    assert sample.made_by.pose.name == "annotated"
    assert max(person.keypoints[:, 2].max() for person in sample.people) > 0


def test_no_person_or_background_is_in_two_splits(undisturbed: Path) -> None:
    """Sources of the three splits are disjoint, composites included."""
    sources: dict[str, set[str]] = {}
    manifest = read_manifest(str(undisturbed))
    for configuration, splits in manifest.shards.items():
        for split in splits:
            held = ShardDataset(str(undisturbed), configuration, split)
            for index in range(len(held)):
                sources.setdefault(split, set()).update(o["sha256"] for o in held.annotations(index)["origins"])
    train, validation, test = (sources[split] for split in ("train", "validation", "test"))
    assert train
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_a_second_run_redoes_nothing(recipe: Path, dataset: Path) -> None:
    """Every shard is cached, and no file changes."""
    before, times = digests(dataset), written_at(dataset)
    summary = build_dataset(str(recipe), str(dataset))
    assert summary["cached"] == summary["shards"] > 6
    assert digests(dataset) == before
    assert written_at(dataset) == times


def test_a_deleted_shard_and_a_flipped_byte_are_redone_alone(recipe: Path, dataset: Path) -> None:
    """The next run finds both, redoes those two and leaves the others untouched."""
    before, times = digests(dataset), written_at(dataset)
    deleted, flipped = "paired/train-000001.tar", "composite/train-000002.tar"
    (dataset / deleted).unlink()
    data = bytearray((dataset / flipped).read_bytes())
    data[len(data) // 2] ^= 1
    (dataset / flipped).write_bytes(data)
    summary = build_dataset(str(recipe), str(dataset))
    assert summary["cached"] == summary["shards"] - 2
    assert digests(dataset) == before
    changed = {path for path, moment in written_at(dataset).items() if moment != times[path]}
    assert changed == {deleted, flipped}


def test_a_setting_of_the_compositor_rebuilds_no_curated_shard(recipe: Path, dataset: Path) -> None:
    """Synthetic shards depend on it, curated ones do not."""
    times = written_at(dataset)
    build_dataset(str(recipe), str(dataset), {"composite.seed": 7})
    changed = {path for path, moment in written_at(dataset).items() if moment != times[path]}
    assert changed == {path for path in times if path.startswith("composite/")}
    assert list(verify(str(dataset))) == []


def test_fewer_samples_leave_no_shard_of_the_earlier_plan(recipe: Path, dataset: Path) -> None:
    """Shards that the new plan does not have are removed, the others stay cached."""
    summary = build_dataset(str(recipe), str(dataset), {"composite.samples": {"train": 0, "validation": 2, "test": 3}})
    assert not list(dataset.glob("composite/train-*"))
    assert summary["cached"] == summary["shards"]
    assert list(verify(str(dataset))) == []


@pytest.mark.parametrize("runner", [{"workers": 4}, {"kind": "ray", "workers": 2}], ids=str)
def test_the_task_runner_does_not_change_a_byte(
    recipe: Path, undisturbed: Path, tmp_path: Path, runner: dict[str, Any]
) -> None:
    """One worker, four, threads or Ray: the same dataset."""
    copy_drawn_world(undisturbed, tmp_path / "dataset")
    build_dataset(str(recipe), str(tmp_path / "dataset"), {f"runner.{key}": value for key, value in runner.items()})
    assert digests(tmp_path / "dataset") == digests(undisturbed)


def test_workers_of_a_cluster_in_another_folder_make_the_same_bytes_and_leave_nothing_there(
    recipe: Path, undisturbed: Path, tmp_path: Path, forked_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is named relative to where the flow runs. What one worker of two lacks is told before any picture."""
    from distributed import Client, LocalCluster

    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    copy_drawn_world(undisturbed, here / "dataset")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        runner = {"runner.kind": "dask", "runner.address": cluster.scheduler_address}
        client.run(os.chdir, elsewhere)
        build_dataset(str(recipe), "dataset", runner)
        assert digests(here / "dataset") == digests(undisturbed)
        broken, _ = client.scheduler_info(n_workers=-1)["workers"]
        client.run(_break_worker, workers=[broken])
        with pytest.raises(UserError, match="1 of 2 workers cannot be used") as told:
            build_dataset(str(recipe), "other", runner)
    assert broken in str(told.value)
    assert "pillow is 0.1, not" in str(told.value) and "does not see what the flow wrote into" in str(told.value)
    assert os.listdir(elsewhere) == [] and not list(here.glob("other*/preflight*")) and not (here / "other").exists()


def _break_worker() -> None:
    """Let this process have another version of a package, and a disk of its own."""
    software = preflight._software()
    preflight._software = lambda: software | {"pillow": "0.1"}  # type: ignore[assignment]
    preflight.open_root = lambda place: open_root(f"{place}-of-this-machine")


def test_a_worker_that_is_killed_in_the_middle_of_a_shard_changes_no_byte_and_leaves_nothing(
    recipe: Path, undisturbed: Path, tmp_path: Path, forked_workers: None
) -> None:
    """Another one does its shard."""
    from distributed import Client, LocalCluster

    copy_drawn_world(undisturbed, tmp_path / "dataset")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        before = client.scheduler_info(n_workers=-1)["workers"]
        client.run(_die_in_a_shard, workers=[next(iter(before))])
        runner = {"runner.kind": "dask", "runner.address": cluster.scheduler_address}
        build_dataset(str(recipe), str(tmp_path / "dataset"), runner)
        assert next(iter(before)) not in client.scheduler_info(n_workers=-1)["workers"]
    assert digests(tmp_path / "dataset") == digests(undisturbed)
    assert not list(tmp_path.rglob(f"*{PARTIAL_SUFFIX}"))


def _die_in_a_shard() -> None:
    """Let this process end (SIGKILL) at the second sample that it writes."""
    calls, whole = itertools.count(1), Sample.to_parts

    def to_parts(sample: Sample, encoding: EncodingSettings) -> dict[str, bytes]:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(sample, encoding)

    Sample.to_parts = to_parts  # type: ignore[method-assign]


def test_a_build_that_is_killed_again_and_again_ends_with_the_same_bytes(
    recipe: Path, undisturbed: Path, tmp_path: Path, forks: ForkServerContext
) -> None:
    """SIGKILL at random moments; each next run redoes only what was not finished."""
    output = tmp_path / "dataset"
    chance = random.Random(20261121)
    kills = 0
    copy_drawn_world(undisturbed, output)
    while True:
        finished, times, before = finished_shards(output), written_at(output), signs_of_work(output)
        child = forks.Process(target=build, args=(str(recipe),), kwargs={"output": str(output)})
        child.start()
        if kills < KILLS:
            # The moment counts from the first sign of work, so that kills do not all fall into the beginning.
            while child.is_alive() and signs_of_work(output) == before:
                child.join(0.01)
            child.join(chance.uniform(0, 1.5))
        if kills < KILLS and child.is_alive():
            child.kill()
            kills += 1
        child.join()
        now = written_at(output)
        assert {path: now[path] for path in finished} == {path: times[path] for path in finished}
        if child.exitcode == -signal.SIGKILL:
            continue
        assert child.exitcode == 0
        assert digests(output) == digests(undisturbed)
        if kills == KILLS:
            break
        # It was done before its turn to be killed: begin anew.
        shutil.rmtree(output)
        shutil.rmtree(f"{output}.work")
        copy_drawn_world(undisturbed, output)
    assert not list(tmp_path.rglob(f"*{PARTIAL_SUFFIX}"))


def signs_of_work(output: Path) -> set[str]:
    """Every file below the dataset and its work folder (folders may vanish while this looks)."""
    places = (output, Path(f"{output}.work"))
    return {os.path.join(folder, name) for place in places for folder, _, names in os.walk(place) for name in names}


def finished_shards(output: Path) -> set[str]:
    """Shards whose results Prefect has kept, whole."""
    finished = set()
    for path in Path(f"{output}.work", "results").glob("build-*"):
        try:
            result = json.loads(json.loads(path.read_bytes())["result"])
        except ValueError:
            continue
        shard = result["data"]["shard"]
        if shard["samples"]:
            finished.add(shard["path"])
    return finished


BROKEN = {
    "truncated-image", "not-an-image", "empty-file", "decompression-bomb", "not-found", "empty-mask",
    "mask-covers-everything", "mask-size-mismatch", "missing-mask", "converted-cmyk", "converted-16-bit",
    "converted-palette",
}  # fmt: skip


def test_bad_input_is_set_aside_with_its_reason(undisturbed: Path) -> None:
    """The sample world ships one of each fault; each has a named row, and the run ended well."""
    rows = pq.read_table(undisturbed / "rejected.parquet").to_pylist()
    reasons = {row["reason"] for row in rows}
    assert reasons >= BROKEN
    assert all(row["message"] for row in rows)
    assert any("../" in row["image_id"] for row in rows)


def refused(recipe: Path, output: Path, key: str, value: Any) -> list[str]:
    """Arguments of a build for which a setting is changed to one that cannot be used."""
    return ["build", str(recipe), "--output", str(output), "--set", f"{key}={json.dumps(value)}"]


@pytest.mark.parametrize(
    ("key", "complaint"), [("composit.seed", "did you mean 'composite'"), ("composite.sed", "did you mean 'seed'")]
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    key: str, complaint: str,
) -> None:  # fmt: skip
    """Exit code 2, one line on stderr, no file."""
    monkeypatch.setattr(sys, "argv", ["mild", *refused(recipe, tmp_path / "out", key, 1)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    errors = capfd.readouterr().err
    assert stop.value.code == 2, errors
    assert complaint in errors
    assert len(errors.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_not_there_is_one_line_of_the_whole_process(
    recipe: Path, tmp_path: Path, server_environment: dict[str, str]
) -> None:
    """Exit code 2, one line on stderr, no file."""
    changed = refused(recipe, tmp_path / "out", "source", {"kind": "openimages", "root": "/nowhere/at/all"})
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *changed], env=server_environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "/nowhere/at/all" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_at_the_door(recipe: Path, tmp_path: Path) -> None:
    """A file where the folder should be: said before anything runs."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        build_dataset(str(recipe), str(tmp_path / "file/dataset"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("output", ["photos", "photos/dataset", "linked/dataset", "masks/dataset"])
def test_an_output_among_the_pictures_that_are_read_is_refused(tmp_path: Path, output: str) -> None:
    for name in ("photos", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "photos")
    source = {"kind": "folder", "photos": str(tmp_path / "photos"), "masks": str(tmp_path / "masks")}
    with pytest.raises(UserError, match="in which pictures are searched: name one beside it"):
        check_build(BuildSettings.check({"name": "mine", "source": source}, origin="test"), str(tmp_path / output))
    assert not any((tmp_path / "photos").iterdir())


def test_an_output_among_the_clips_that_are_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    source = {"kind": "video", "clips": [str(tmp_path / "other"), str(tmp_path / "clips")]}
    with pytest.raises(UserError, match="in which pictures are searched: name one beside it"):
        check_build(BuildSettings.check({"name": "mine", "source": source}, origin="test"), f"{tmp_path}/clips/street")


class Pictures(SimpleHTTPRequestHandler):
    """Serves a mirror's pictures; one of them never arrives while ``hangs`` names it."""

    hangs: ClassVar[str] = ""
    released: ClassVar[threading.Event] = threading.Event()

    def do_GET(self) -> None:
        """Answer, or keep the connection open in silence."""
        if self.hangs and self.hangs in self.path:
            self.released.wait()
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.mark.usefixtures("no_download_limit")
def test_a_picture_that_times_out_is_tried_again_by_the_next_run(undisturbed: Path, tmp_path: Path) -> None:
    """It is set aside as time-out; the next run redoes its shard, and no other, and finds the picture."""
    mirror = undisturbed.with_name("dataset.work") / "mirror"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Pictures, directory=str(mirror)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fetch = {"timeout_seconds": 5, "attempts": 1, "allow_private_addresses": True}
    images = f"http://127.0.0.1:{server.server_port}/images"
    recipe = tmp_path / "build.yaml"
    source = {"kind": "openimages", "root": str(mirror), "images": images, "fetch": fetch}
    recipe.write_text(
        yaml.safe_dump({"name": "test", "source": source, "samples_per_shard": 4, "max_rejected_share": 0.5})
    )
    held = ShardDataset(str(undisturbed), "paired", "train")
    Pictures.hangs = held.keys[0].removeprefix("openimages-")
    try:
        build_dataset(str(recipe), str(tmp_path / "dataset"))
        rows = pq.read_table(tmp_path / "dataset/rejected.parquet").to_pylist()
        assert [row["image_id"] for row in rows if row["reason"] == "time-out" and row["transient"]] == [Pictures.hangs]
        Pictures.hangs = ""
        summary = build_dataset(str(recipe), str(tmp_path / "dataset"))
    finally:
        Pictures.released.set()
        server.shutdown()
        server.server_close()
    assert summary["cached"] == summary["shards"] - 1
    assert "time-out" not in summary["rejected"]
    assert list(verify(str(tmp_path / "dataset"))) == []


@pytest.mark.parametrize(("image", "asked"), [("https://pictures.example/1.jpg", 1), ("/pictures/1.jpg", 0)])
def test_a_slot_of_the_download_limit_is_asked_for_where_pictures_come_over_a_network(
    image: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    @contextlib.contextmanager
    def recorded(name: str, occupy: int) -> Iterator[None]:
        names.append(name)
        yield

    monkeypatch.setattr("flows.dataset_steps.concurrency", recorded)
    with download_slot([ImageRecord("1", "openimages", "train", "people", "one", image)]):
        assert names == ["mild-downloads"] * asked


def shards_with(dataset: Path, image: str) -> set[str]:
    """Shards in which a picture, or somebody of it, is."""
    manifest = read_manifest(str(dataset))
    held = [shard for splits in manifest.shards.values() for shards in splits.values() for shard in shards]
    return {
        shard.path
        for shard in held
        for sample in ShardDataset.of_shards(str(dataset), [shard])
        if image in {origin.id for origin in sample.origins}
    }


@pytest.mark.parametrize(("role", "kind"), [("image", "sha256"), ("background", "id")])
def test_who_is_added_to_the_opt_out_list_is_gone_after_the_next_build_and_the_rest_stays(
    recipe: Path, dataset: Path, tmp_path: Path, role: str, kind: str
) -> None:
    """Of the curated shards one is redone, of the composites those of its split, or of a background those that may
    read it; nothing names the picture then."""
    configuration = "paired" if role == "image" else "composite"
    origin = next(o for s in ShardDataset(str(dataset), configuration, "train") for o in s.origins if o.role == role)
    before, times = shards_with(dataset, origin.id), written_at(dataset)
    listed = tmp_path / "opt-out.csv"
    listed.write_text(f"kind,value\n{kind},{getattr(origin, kind)}\n")
    summary = build_dataset(str(recipe), str(dataset), {"opt_out": str(listed)})
    assert shards_with(dataset, origin.id) == set() and summary["rejected"]["opted-out"] == 1
    now = written_at(dataset)  # of a shard that lost its only picture there is no tar
    changed = {path for path in times if now.get(path) != times[path]}
    in_split = {path for path in times if path.startswith("composite/train")}
    assert before and (changed == before | in_split if role == "image" else before <= changed <= in_split)
    for path in dataset.rglob("*"):
        assert path.is_dir() or origin.id.encode() not in path.read_bytes(), path
    assert list(verify(str(dataset))) == []
    rows = pq.read_table(dataset / "rejected.parquet").to_pylist()
    assert [row["image_id"] for row in rows if row["reason"] == "opted-out"] == [""]
    assert "somebody asked for it: 1;" in (dataset / "README.md").read_text()
    if role == "background":
        return  # What follows needs no second proof.
    # The same list changes nothing more; without it the picture is back, as it was, in composites too.
    again = build_dataset(str(recipe), str(dataset), {"opt_out": str(listed)})
    assert again["cached"] == again["shards"]
    build_dataset(str(recipe), str(dataset))
    assert shards_with(dataset, origin.id) == before


def test_an_opt_out_list_that_is_not_understood_ends_the_build_before_it_begins(
    recipe: Path, dataset: Path, tmp_path: Path
) -> None:
    before = digests(dataset)
    listed = tmp_path / "opt-out.csv"
    listed.write_text("id,ok\nsha,123\n")
    with pytest.raises(UserError, match="line 2 of the opt-out list"):
        build_dataset(str(recipe), str(dataset), {"opt_out": str(listed)})
    assert digests(dataset) == before


def test_blurred_faces_and_what_looks_alike_in_one_build(recipe: Path, dataset: Path) -> None:
    """Drawn people have poses: their faces are blurred wherever they are pasted; the drawn world has two alike."""
    changes = {"anonymise": {"faces": True}, "curated.quality": {"near_duplicates": 10}}
    build_dataset(str(recipe), str(dataset), changes)
    assert list(verify(str(dataset))) == []
    for configuration in ("paired", "composite"):
        for sample in ShardDataset(str(dataset), configuration, "train"):
            people = [origin for origin in sample.origins if origin.role != "background"]
            assert all("blur" in origin.transform for origin in people)
    assert "are blurred beyond recovery" in (dataset / "README.md").read_text()
    again = build_dataset(str(recipe), str(dataset), changes)
    assert again["cached"] == again["shards"]
