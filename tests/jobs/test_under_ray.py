"""The same training, preprocessing and scores under Ray as without it, and wandb runs on disk."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from heartseg.config.experiment import TrackingConfig
from heartseg.shards.reader import open_shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from helpers.experiments import ROOT, tiny_experiment
from jobs import evaluate, preprocess, train
from jobs.support import ray_preprocessing

pytestmark = pytest.mark.usefixtures("ray_session")
LOSSES = ("train/loss", "test/loss")


def losses(path: str) -> list[float]:
    return [epoch[name] for epoch in run_directory.read_record(path) for name in LOSSES]


@pytest.fixture(scope="module")
def plain_run(shards, tmp_path_factory) -> str:
    """The reference: one process without a launcher."""
    folder = str(tmp_path_factory.mktemp("plain"))
    return train.run(tiny_experiment(data=shards, runs=folder), train.Options(launcher="plain"))


@pytest.fixture(scope="module")
def two_workers(shards, tmp_path_factory) -> str:
    """Two Ray workers, tracked by wandb offline; a batch of 7 does not divide between them."""
    folder = str(tmp_path_factory.mktemp("two"))
    tracked = TrackingConfig(wandb="offline", group="promises")
    return train.run(tiny_experiment(data=shards, runs=folder, workers=2, tracking=tracked), train.Options())


def test_one_ray_worker_has_the_losses_of_one_plain_process(plain_run, shards, tmp_path):
    path = train.run(tiny_experiment(data=shards, runs=str(tmp_path)), train.Options())
    assert losses(path) == pytest.approx(losses(plain_run), rel=1e-6)


def test_two_workers_follow_one_also_where_the_batch_does_not_divide(plain_run, two_workers):
    # Measured: the first epoch differs by 5e-8, with the weight of shares left out by 1e-4 and 1e-3; after that, rounding
    # in fp32 grows to 3e-4.
    two, one = losses(two_workers), losses(plain_run)
    assert two[:2] == pytest.approx(one[:2], rel=1e-5)
    assert two == pytest.approx(one, rel=2e-3)


def test_preprocessing_under_ray_gives_the_bytes_of_one_process(phantom, shards, tmp_path):
    preprocess.run(tiny_experiment(source=phantom, out=str(tmp_path), workers=2), preprocess.Options())
    for name in filesystem.list_names(shards):
        if not name.startswith("."):
            assert (tmp_path / name).read_bytes() == (Path(shards) / name).read_bytes(), name


def test_scores_do_not_depend_on_the_number_of_workers(two_workers, shards):
    out = evaluate.run(evaluate.Options(checkpoint=two_workers, workers=2))
    shared = filesystem.read_json(filesystem.join(out, "summary.json"))
    filesystem.remove(out)
    out = evaluate.run(evaluate.Options(checkpoint=two_workers, launcher="plain"))
    alone = filesystem.read_json(filesystem.join(out, "summary.json"))
    assert shared["images"] == alone["images"] == 8
    assert shared["scores"]["dice"]["mean"] == pytest.approx(alone["scores"]["dice"]["mean"], abs=1e-6)


def test_a_wandb_run_on_disk_holds_configuration_curves_and_overlays(two_workers):
    (file,) = Path(two_workers).glob("wandb/offline-run-*/*.wandb")
    wandb = str(Path(sys.executable).with_name("wandb"))
    shown = subprocess.run([wandb, "leet", "inspect", "--json", str(file)], capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in shown.splitlines()]
    text = json.dumps(records)
    assert "val/dice" in text and "test/dice" in text and "optim.lr" in text and "promises" in text
    assert len(list(file.parent.glob("files/media/images/**/*.png"))) >= 4
    # One run, from one rank, and nothing of it outside the run's directory.
    assert len(list(Path(two_workers).glob("wandb/offline-run-*"))) == 1


def test_a_users_mistake_in_a_worker_comes_back_as_a_sentence(shards, tmp_path):
    import shutil

    from heartseg.errors import UserError

    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    part = damaged / "part-00000.parquet"
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 2] ^= 1
    part.write_bytes(raw)
    with pytest.raises(UserError, match="part-00000.parquet is damaged"):
        train.run(tiny_experiment(data=str(damaged), runs=str(tmp_path / "runs")), train.Options())


def test_more_workers_than_cores_are_refused_before_a_cluster_starts(shards, tmp_path):
    code = "import sys; sys.argv[1:] = sys.argv[2:]; from jobs.support import ray_runtime; ray_runtime.start_ray(4096)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "4096 workers" in done.stderr


def test_too_many_workers_for_the_batch_are_refused(shards, tmp_path):
    from heartseg.errors import UserError

    experiment = tiny_experiment(data=shards, runs=str(tmp_path))
    crowded = replace(experiment, workers=4)
    with pytest.raises(UserError, match="--workers 3 or fewer"):
        train.run(crowded, train.Options())


def test_storage_that_one_worker_cannot_see_is_said_by_all(shards, tmp_path):
    # One of two ranks looks for the run where it is not: both must come back at once, with that rank's sentence.
    import torch.multiprocessing as mp

    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_look_for_storage, args=(shards, str(tmp_path / "store"), queue), nprocs=2)
    said = {queue.get(), queue.get()}
    assert len(said) == 1 and "Worker 1 on" in said.pop()


def _look_for_storage(rank: int, shards: str, store: str, queue) -> None:
    import torch
    import torch.distributed as dist

    from heartseg.errors import UserError
    from heartseg.training import distributed

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        run = (
            run_directory.open_run(tiny_experiment(data=shards, runs=f"{store}-runs"), open_shards(shards))
            if rank == 0
            else None
        )
        train.see_storage(run.path if run else "/nowhere", shards, distributed.current(torch.device("cpu")))
    except UserError as error:
        queue.put(str(error))
    finally:
        dist.destroy_process_group()


def test_a_preprocess_that_waits_for_cpus_says_so_and_goes_on_when_they_are_free(phantom, tmp_path, monkeypatch, caplog):
    import ray

    @ray.remote(num_cpus=2)
    class Holder:
        def hold(self) -> None:
            pass

    holder = Holder.remote()
    ray.get(holder.hold.remote())
    monkeypatch.setattr(ray_preprocessing, "SECONDS_OF_SILENCE", 1)
    freed = threading.Timer(4, lambda: ray.kill(holder))
    freed.start()
    with caplog.at_level("INFO", logger="heartseg.jobs"):
        preprocess.run(tiny_experiment(source=phantom, out=str(tmp_path), workers=2), preprocess.Options())
    assert "0 of the cluster's 2 CPUs are free" in caplog.text
    assert filesystem.exists(str(tmp_path / "manifest.json"))
