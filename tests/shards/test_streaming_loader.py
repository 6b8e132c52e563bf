"""A stream feeds what memory would: every row once, N workers as one, damage named, nothing waited for in silence."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from heartseg.config.experiment import to_json
from heartseg.errors import OneRankError, StorageError, UserError
from heartseg.models import checkpoint
from heartseg.shards import loader, reader, writer
from heartseg.shards.loader import LANES, Stream, share
from heartseg.shards.reader import PartRows, Shards
from heartseg.storage import filesystem
from heartseg.training import data_loading, run_directory, worker
from heartseg.training.distributed import Ranks
from helpers.experiments import ROOT, tiny_experiment

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
PARTS = st.lists(st.integers(1, 9), min_size=1, max_size=30)


class Numbered(Stream):
    """A stream whose pixels are the number of the row, read from nowhere."""

    def _read(self, piece):
        part, rows = piece
        first = sum(held.rows for held in self.index[:part])
        pixels = torch.from_numpy(first + rows).view(-1, 1, 1).expand(-1, 2, 2)
        return pixels[:, None], pixels


def numbered(rows_of_parts: list[int], rank: int = 0, world: int = 1) -> Numbered:
    index = [PartRows({"file": f"part-{i:05d}.parquet"}, [], rows) for i, rows in enumerate(rows_of_parts)]
    return Numbered(Shards("nowhere", {}, {}), index, rank, world, CPU)


def rows_in(batches) -> list[list[int]]:
    found = list(batches)
    for images, masks in found:
        torch.testing.assert_close(images[:, 0] * 255, masks.float())
    return [masks[:, 0, 0].tolist() for _, masks in found]


@given(parts=PARTS, size=st.integers(2, 40), world=st.integers(1, 5), epoch=st.integers(0, 3))
def test_every_row_comes_once_an_epoch_and_ranks_together_have_the_batches_of_one(parts, size, world, epoch):
    assume(size <= sum(parts) and size // world >= 2)  # what check_plan lets through
    alone = rows_in(numbered(parts).training_batches(size, 7, epoch))
    ranks = [rows_in(numbered(parts, rank, world).training_batches(size, 7, epoch)) for rank in range(world)]
    assert [sum(shares, []) for shares in zip(*ranks, strict=True)] == alone
    assert [len(share) for share in ranks[-1]] == [len(range(size)[share(size, world - 1, world)])] * len(alone)
    assert len(alone) == sum(parts) // size and set(map(len, alone)) == {size}
    assert len(set(sum(alone, []))) == len(alone) * size and set(sum(alone, [])) <= set(range(sum(parts)))
    assert [numbered(parts).batch_rows(size, 7, epoch, step) for step in range(len(alone))] == alone


@given(parts=PARTS, size=st.integers(1, 12), world=st.integers(1, 5))
def test_every_row_is_evaluated_once_over_all_ranks_and_in_order(parts, size, world):
    found = [row for rank in range(world) for row in rows_in(numbered(parts, rank, world).evaluation_batches(size))]
    assert sum(found, []) == list(range(sum(parts))) and all(0 < len(batch) <= size for batch in found)


def test_the_order_changes_with_epoch_and_seed_and_mixes_parts_in_a_batch():
    parts = [64] * 40
    orders = [loader.stream_order(parts, 12, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order[:3].ravel()) for order in orders}) == 4
    # 12 lanes: a batch of 12 has 12 parts, but where two lanes meet in one.
    assert np.mean([len(set(batch)) for batch in orders[0] // 64]) > 11.5
    assert not any((np.diff(lane) > 0).all() for lane in (orders[0][:64] % 64).T)


def test_a_worker_reads_its_lanes_and_holds_a_part_of_each_however_many_parts_there_are():
    for parts, rank, world in ((40, 0, 1), (40, 1, 4), (400, 0, 1), (400, 1, 4)):
        source, alive, most, lock = numbered([8] * parts, rank, world), Counter(), [0], threading.Lock()

        def counted(piece, read=source._read, alive=alive, most=most, lock=lock):
            images, masks = read(piece)
            array = masks.numpy().copy()  # lives as long as any view of it, such as what is left of a piece
            weakref.finalize(array, lambda: alive.update(now=-1))
            with lock:
                alive.update(read=1, now=1)
                most[0] = max(most[0], alive["now"])
            return images, torch.from_numpy(array)

        object.__setattr__(source, "_read", counted)
        list(source.training_batches(16, 0, 0))
        assert parts // world <= alive["read"] <= parts / world + (2 if world > 1 else 1) * LANES / world
        assert most[0] <= LANES / world + loader.PARTS_AHEAD + 3


@pytest.fixture(scope="module")
def parted(phantom, tmp_path_factory) -> str:
    """The shards of the phantom in four parts of two patients; every group has patients in several of them."""
    from jobs import preprocess

    folder = str(tmp_path_factory.mktemp("parted"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(writer.PATIENTS_PER_PART, "stills", 2)
        preprocess.run(tiny_experiment(source=phantom, out=folder), preprocess.Options(launcher="plain"))
    return folder


def opened_as(kind: str, folder: str) -> data_loading.TrainingData:
    return data_loading.open_groups(reader.open_shards(folder), kind, ALONE)


def assert_same_pixels(found, wanted) -> None:
    for (images, masks), (other_images, other_masks) in zip(found, wanted, strict=True):
        assert torch.equal(images, other_images) and torch.equal(masks, other_masks)


def test_a_stream_has_the_pixels_of_memory_and_the_rows_by_number(parted):
    memory, streamed = opened_as("memory", parted), opened_as("stream", parted)
    for group in ("train", "test"):
        one, other = memory.loaders[group], streamed.loaders[group]
        assert len(one) == len(other) > 0
        assert_same_pixels(other.evaluation_batches(5), one.evaluation_batches(5))
    frames = reader.load_groups(reader.open_shards(parted), ["train"])["train"]
    rows = [streamed.loaders["train"].batch_rows(7, 3, 1, step) for step in range(3)]
    wanted = [(frames.images[batch].float().div(255), frames.masks[batch]) for batch in rows]
    assert_same_pixels(streamed.loaders["train"].training_batches(7, 3, 1), wanted)
    one, other = (source.rows("train", [20, 0, 7, 23, 7]) for source in (memory, streamed))
    assert torch.equal(one.images, other.images) and torch.equal(one.masks, other.masks)
    assert one.table.to_pylist() == other.table.to_pylist()
    assert len(reader.read_rows(reader.open_shards(parted), [], [])) == 0


def test_a_stream_from_an_object_store_is_that_of_a_folder(parted, s3):
    folder = f"s3://bucket/{uuid.uuid4().hex[:8]}"
    for name in filesystem.list_names(parted):
        if not name.startswith("."):
            filesystem.publish(f"{folder}/{name}", filesystem.read_bytes(os.path.join(parted, name)))
    found = opened_as("stream", folder).loaders["train"].training_batches(7, 0, 0)
    assert_same_pixels(found, opened_as("stream", parted).loaders["train"].training_batches(7, 0, 0))


def test_a_damaged_part_is_named_when_it_is_read_and_a_missing_one_before(parted, tmp_path):
    copied = shutil.copytree(parted, tmp_path / "shards")
    part = copied / "part-00002.parquet"
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 2] ^= 1
    part.write_bytes(raw)
    streamed = opened_as("stream", str(copied))
    # An error of one rank, which is tried again: the others do not know of it.
    with pytest.raises(OneRankError, match="part-00002.parquet is damaged"):
        list(streamed.loaders["train"].training_batches(7, 0, 0))
    part.write_bytes(raw[:-1])
    with pytest.raises(UserError, match="part-00002.parquet is damaged .not the size"):
        opened_as("stream", str(copied))
    part.unlink()
    with pytest.raises(UserError, match="part-00002.parquet is missing"):
        opened_as("stream", str(copied))


def test_a_part_that_never_arrives_is_logged_and_then_given_up(parted, tmp_path, monkeypatch, caplog):
    copied = shutil.copytree(parted, tmp_path / "shards")
    streamed = opened_as("stream", str(copied))
    part = copied / "part-00001.parquet"
    part.unlink()
    os.mkfifo(part)  # whoever opens it waits for somebody to write
    monkeypatch.setattr(loader, "SAY_AFTER_S", 0.2)
    monkeypatch.setattr(loader, "GIVE_UP_AFTER_S", 0.6)
    with pytest.raises(StorageError, match="part-00001.parquet did not arrive within"):
        list(streamed.loaders["train"].training_batches(7, 0, 0))
    assert caplog.text.count("part-00001.parquet has not arrived after") == 3
    while threads():
        with contextlib.suppress(OSError):
            os.close(os.open(part, os.O_WRONLY | os.O_NONBLOCK))
        time.sleep(0.05)


def test_an_interrupted_epoch_leaves_no_thread(parted):
    batches = opened_as("stream", parted).loaders["train"].training_batches(7, 0, 0)
    next(batches)
    batches.close()
    for thread in threads():
        thread.join(10)
    assert not threads()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stream"]


def begin(experiment, report=lambda metrics: None) -> run_directory.Run:
    """Open the run of an experiment and train it in this process; the run as its directory has it then."""
    run = run_directory.open_run(experiment, reader.open_shards(experiment.data))
    worker.train_rank(experiment, run, ALONE, lambda model: model, report)
    return run_directory.find_run(run.path)


def scores(run: run_directory.Run) -> list[dict]:
    """The record without what depends on the clock."""
    record, clock = run_directory.read_record(run.path), ("seconds", "images_per_s")
    return [{key: value for key, value in epoch.items() if key not in clock} for epoch in record]


def test_a_run_resumes_as_it_began_whatever_the_machine_and_equals_an_undisturbed_one(parted, tmp_path, monkeypatch, caplog):
    base = tiny_experiment(data=parted)
    asked = begin(replace(base, runs=str(tmp_path / "asked"), ingest="stream"))

    def stop_after_first(metrics):
        if metrics["epoch"] == 1:
            raise InterruptedError

    by_size = replace(base, runs=str(tmp_path / "auto"))
    monkeypatch.setattr(data_loading, "free_on_machine", lambda: 1e6)
    caplog.clear()
    with pytest.raises(InterruptedError), caplog.at_level("INFO"):
        begin(by_size, stop_after_first)
    assert "0.0 GB of pixels; a worker may use 0.0 GB, a quarter of its free memory" in caplog.text
    monkeypatch.setattr(data_loading, "free_on_machine", lambda: 1e12)
    resumed = begin(by_size)
    assert scores(resumed) == scores(asked) and len(scores(asked)) == 2
    one, other = (checkpoint.last(run.path).weights() for run in (asked, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed.description["ingest"] == asked.description["ingest"] == "stream"
    assert "(from stream)" in filesystem.read_bytes(filesystem.join(resumed.path, run_directory.MODEL_CARD)).decode()
    # Asked for in so many words, it is a run of its own.
    assert resumed.name != asked.name
    with pytest.raises(UserError, match="holds another run .ingest: None there, stream requested"):
        run_directory.open_run(replace(by_size, ingest="stream"), reader.open_shards(parted), resumed.name)
    # A run from before there was a choice was read from memory.
    described = filesystem.join(resumed.path, run_directory.DESCRIPTION)
    filesystem.publish_json(described, {key: value for key, value in resumed.description.items() if key != "ingest"})
    monkeypatch.setattr(data_loading, "free_on_machine", lambda: 0.0)
    assert begin(by_size).description["ingest"] == "memory"


def test_the_choice_is_by_size_unless_asked_or_begun(parted, monkeypatch, caplog):
    experiment, opened = tiny_experiment(data=parted), reader.open_shards(parted)
    needed = 32 * 2 * 64 * 64
    assert data_loading.pixel_bytes(opened) == needed

    def chosen(free: float, asked: str = "auto", begun: str | None = None) -> str:
        monkeypatch.setattr(data_loading, "free_on_machine", lambda: free)
        return data_loading.choose(replace(experiment, ingest=asked), opened, begun, ALONE)

    assert chosen(4 * needed) == "memory" and chosen(4 * needed - 1) == "stream"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert chosen(8 * needed) == "memory" and chosen(8 * needed - 1) == "stream"
    assert chosen(0, "memory") == "memory" and "go into memory (--ingest memory), which leaves little room" in caplog.text
    assert chosen(1e12, "stream") == "stream" == chosen(1e12, "memory", "stream") and chosen(0, "auto", "memory") == "memory"


GB = 2**30


def test_free_memory_is_what_the_tightest_container_leaves(tmp_path):
    def put(name: str, text: object) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    put("proc/meminfo", "MemTotal: 9 kB\nMemAvailable: 8388608 kB")
    assert data_loading.free_on_machine(str(tmp_path)) == 8 * GB
    put("proc/self/cgroup", "0::/job/step")
    for folder, most, taken, cache in (("job", 6 * GB, 3 * GB, GB), ("job/step", "max", GB, 0)):
        for name, value in (("max", most), ("current", taken), ("stat", f"anon 5\ninactive_file {cache}")):
            put(f"sys/fs/cgroup/{folder}/memory.{name}", value)
    assert data_loading.free_on_machine(str(tmp_path)) == 4 * GB
    version_1 = {"limit_in_bytes": 2 * GB, "usage_in_bytes": GB, "stat": f"cache 7\ntotal_inactive_file {GB // 2}"}
    for name, value in version_1.items():
        put(f"sys/fs/cgroup/memory/memory.{name}", value)
    assert data_loading.free_on_machine(str(tmp_path)) == 1.5 * GB
    assert 2**24 < data_loading.free_on_machine() < 2**50


@pytest.mark.slow
def test_two_processes_that_stream_follow_one(parted, tmp_path):
    experiment = tiny_experiment(data=parted, runs=str(tmp_path / "two"), ingest="stream")
    (tmp_path / "tiny.json").write_text(json.dumps(to_json(replace(experiment, ingest="auto"))))
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--nproc-per-node", "2", str(ROOT / "jobs" / "train.py"), "--config", str(tmp_path / "tiny.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["--launcher", "plain", "--ingest", "stream"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"Batches stream from {parted} (--ingest stream).") == 1 and "2 epochs done" in done.stdout
    one = run_directory.read_record(begin(replace(experiment, runs=str(tmp_path / "one"))).path)
    (run,) = (tmp_path / "two").iterdir()
    two = run_directory.read_record(str(run))
    assert [epoch["workers"] for epoch in two] == [2, 2]
    # Measured: 5e-7 and 2e-5 in the first epoch, 4e-4 in the second, all of it rounding; from memory it is as much.
    assert two[0]["train/loss"] == pytest.approx(one[0]["train/loss"], rel=1e-5)
    for name in ("train/loss", "test/loss"):
        assert [epoch[name] for epoch in two] == pytest.approx([epoch[name] for epoch in one], rel=2e-3)


@pytest.mark.slow
def test_a_damaged_part_that_one_of_two_workers_meets_on_the_way_ends_both_with_its_name(parted, tmp_path, ray_session):
    # The two hold every CPU there is: a stream needs none besides. What the keeper shows is read at the start, by all.
    from jobs import train

    opened = reader.open_shards(parted)
    file = next(part["file"] for part in opened.manifest["parts"] if not {*part["patients"]} & {*opened.groups["test"]})
    copied = shutil.copytree(parted, tmp_path / "shards")
    raw = bytearray((copied / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copied / file).write_bytes(raw)
    experiment = tiny_experiment(data=str(copied), runs=str(tmp_path / "runs"), workers=2, ingest="stream")
    with pytest.raises(UserError, match=f"{file} is damaged"):
        train.run(experiment, train.Options())
