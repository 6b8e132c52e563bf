"""Promises that several parts keep together: shards stay as they were split, and a resumed run is completed."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from heartseg.errors import UserError
from heartseg.training import run_directory
from helpers.experiments import tiny_experiment
from jobs import preprocess, train


def test_shards_are_not_split_again_unless_asked(shards, phantom, tmp_path):
    base = tiny_experiment(source=phantom, out=str(shutil.copytree(shards, tmp_path / "shards")))
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
