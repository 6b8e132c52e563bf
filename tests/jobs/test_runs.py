"""Promises that several parts keep together: no score on training hearts, nothing lost, wandb never stops a run."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from heartseg.errors import UserError
from heartseg.storage import locks
from heartseg.training import run_directory
from helpers.experiments import ROOT, tiny_experiment
from jobs import evaluate, preprocess, train

PLAIN = train.Options(launcher="plain")


def arguments_of(shards: str, folder: Path) -> list[str]:
    """A quick recipe made tiny, as flags."""
    flags = ["quick", "--image.height", "64", "--image.width", "64", "--train.epochs", "2", "--train.batch-size", "8"]
    return [*flags, "--launcher", "plain", "--data", shards, "--runs", str(folder)]


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> str:
    """A finished run."""
    return train.run(tiny_experiment(data=shards, runs=str(tmp_path_factory.mktemp("runs"))), PLAIN)


def test_a_group_with_patients_that_the_run_was_trained_on_is_never_scored(finished, shards, phantom, tmp_path):
    divided = str(tmp_path / "shards")
    shutil.copytree(shards, divided)
    base = tiny_experiment(source=phantom, out=divided)
    other = replace(base, split=replace(base.split, seed=1))
    preprocess.run(other, preprocess.Options(launcher="plain", resplit=True))
    with pytest.raises(UserError, match="was trained on . patients of this test group"):
        evaluate.run(evaluate.Options(checkpoint=finished, data=divided, launcher="plain"))


def test_shards_are_not_divided_anew_unless_asked(shards, phantom, tmp_path):
    divided = str(tmp_path / "shards")
    shutil.copytree(shards, divided)
    base = tiny_experiment(source=phantom, out=divided)
    with pytest.raises(UserError, match="split.seed: 0 there, 5 asked"):
        preprocess.run(replace(base, split=replace(base.split, seed=5)), preprocess.Options(launcher="plain"))


def test_what_a_kill_after_the_last_checkpoint_left_out_is_made_good(finished, shards, tmp_path):
    # The checkpoint is committed, and the record's last line, the samples and the model card are not.
    shutil.copytree(Path(finished).parent, tmp_path / "runs")
    run = tmp_path / "runs" / Path(finished).name
    whole = run_directory.read_record(str(run))
    run_directory.write_record(str(run), whole[:-1])
    (run / "MODEL_CARD.md").unlink()
    (run / "samples" / "last.npz").unlink()
    train.run(tiny_experiment(data=shards, runs=str(tmp_path / "runs")), PLAIN)
    assert [epoch["epoch"] for epoch in run_directory.read_record(str(run))] == [1, 2]
    assert run_directory.read_record(str(run))[-1]["train/loss"] == whole[-1]["train/loss"]
    assert (run / "MODEL_CARD.md").exists() and (run / "samples" / "last.npz").exists()


def test_two_processes_of_torchrun_train_one_run(shards, tmp_path):
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--nproc-per-node", "2", str(ROOT / "jobs" / "train.py"), *arguments_of(shards, tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--tracking.wandb", "off"], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 epochs done") == 1
    (run,) = tmp_path.iterdir()
    assert [epoch["epoch"] for epoch in run_directory.read_record(str(run))] == [1, 2]


@pytest.mark.slow
def test_a_wandb_server_that_cannot_be_reached_never_stops_a_run(shards, tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *arguments_of(shards, tmp_path)]
    key = "0123456789" * 4
    environment = os.environ | {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept offline") == 1 and "2 epochs done" in done.stdout
    (run,) = tmp_path.iterdir()
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    assert file.stat().st_size > 1000
    assert not any(key.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_two_jobs_never_write_the_same_run(finished, shards):
    with locks.lock(finished), pytest.raises(UserError, match="Another job is writing"):
        _lock_elsewhere(finished)


def _lock_elsewhere(folder: str) -> None:
    """Take the lock as another process would; a process of its own is needed, since a lock is a process's."""
    code = f"from heartseg.storage import locks\nwith locks.lock({folder!r}): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
