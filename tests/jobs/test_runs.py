"""Promises that several parts keep together: nothing lost, one run of many processes, wandb never stops a run."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from heartseg.errors import UserError
from heartseg.training import run_directory
from helpers.experiments import ROOT, tiny_experiment
from helpers.tracked_runs import finish, kept_rows, start, the_run, without_key
from helpers.wandb_server import KEY
from jobs import preprocess, train


def test_shards_are_not_split_again_unless_asked(shards, phantom, tmp_path):
    folder = str(shutil.copytree(shards, tmp_path / "shards"))
    base = tiny_experiment(source=phantom, out=folder)
    with pytest.raises(UserError, match="split.seed: 0 there, 5 asked"):
        preprocess.run(replace(base, split=replace(base.split, seed=5)), preprocess.Options(launcher="plain"))


def test_what_a_kill_after_the_last_checkpoint_left_out_is_completed(shards, tmp_path):
    # The checkpoint is committed, and the record's last line, the samples and the model card are not.
    experiment, plain = tiny_experiment(data=shards, runs=str(tmp_path)), train.Options(launcher="plain")
    run = Path(train.run(experiment, plain))
    whole = run_directory.read_record(str(run))
    run_directory.write_record(str(run), whole[:-1])
    (run / "MODEL_CARD.md").unlink()
    (run / "samples" / "last.npz").unlink()
    assert train.run(experiment, plain) == str(run)
    again = run_directory.read_record(str(run))
    assert [epoch["epoch"] for epoch in again] == [1, 2] and again[-1]["train/loss"] == whole[-1]["train/loss"]
    assert (run / "MODEL_CARD.md").exists() and (run / "samples" / "last.npz").exists()


def test_two_processes_of_torchrun_train_one_run(shards, tmp_path):
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--nproc-per-node", "2", str(ROOT / "jobs" / "train.py"), "quick", "--launcher", "plain"]
    command += ["--image.height", "64", "--image.width", "64", "--train.epochs", "2", "--train.batch-size", "8"]
    command += ["--data", shards, "--runs", str(tmp_path), "--tracking.wandb", "off"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 epochs done") == 1
    assert [epoch["epoch"] for epoch in run_directory.read_record(str(the_run(tmp_path)))] == [1, 2]


@pytest.mark.slow
def test_a_wandb_server_that_cannot_be_reached_never_stops_a_run(shards, tmp_path):
    folder = tmp_path / "runs"
    output = finish(start(shards, folder, 2, WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9"), folder)
    assert output.count("kept offline") == 1 and "2 epochs done" in output
    (fragment,) = the_run(folder).glob("wandb/offline-run-*/*.wandb")
    assert [row["epoch"] for row in kept_rows(fragment)] == [1, 2] and without_key(the_run(folder))
