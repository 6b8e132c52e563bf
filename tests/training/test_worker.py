"""The promises of a run without Ray: it resumes to the same bits, learns, and predicts."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import heartseg
from heartseg.config import recipes
from heartseg.config.experiment import ImageConfig, to_json
from heartseg.config.training import ScheduleConfig
from heartseg.datasets.image_folder import open_source
from heartseg.datasets.phantom import write_phantom
from heartseg.errors import UserError
from heartseg.models import checkpoint, precision
from heartseg.shards import reader
from heartseg.shards.preprocessing import write_shards
from heartseg.training import run_directory, worker
from heartseg.training.distributed import Ranks
from helpers.experiments import ROOT, tiny_experiment


def train(experiment, report=lambda metrics: None):
    run = run_directory.open_run(experiment, reader.open_shards(experiment.data))
    worker.train_rank(experiment, run, Ranks(0, 1, torch.device("cpu")), lambda model: model, report)
    return run


def stop(metrics):
    raise InterruptedError(metrics)  # stands for whatever ends a process after an epoch


def scores(run) -> list[dict]:
    """The record without columns that depend on the clock."""
    record = run_directory.read_record(run.path)
    return [{k: v for k, v in epoch.items() if k not in ("seconds", "images_per_s")} for epoch in record]


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    base = tiny_experiment(data=shards, runs=str(tmp_path_factory.mktemp("trained")))
    experiment = replace(base, train=replace(base.train, epochs=4))
    return train(experiment), experiment


def test_a_run_computes_in_the_faster_precision_of_the_machine_that_it_starts_on_and_keeps_it(shards, tmp_path, monkeypatch):
    experiment = tiny_experiment(data=shards, runs=str(tmp_path))
    experiment = replace(experiment, train=replace(experiment.train, precision="auto"))
    for rates, kept in (({"fp32": 100.0, "bf16": 80.0}, "fp32"), ({"fp32": 100.0, "bf16": 400.0}, "bf16")):
        monkeypatch.setattr(precision, "cpu_rates", lambda rates=rates: rates)
        begun = run_directory.open_run(experiment, reader.open_shards(shards), kept)
        assert worker.choose_precision(experiment, begun, Ranks(0, 1, torch.device("cpu"))) == kept
    with pytest.raises(InterruptedError):
        train(experiment, stop)
    monkeypatch.setattr(precision, "cpu_rates", lambda: {"fp32": 100.0, "bf16": 80.0})
    resumed = train(experiment)
    assert resumed.description["precision"] == run_directory.find_run(resumed.path).description["precision"] == "bf16"
    assert checkpoint.last(resumed.path).card["experiment"]["train"]["precision"] == "auto"  # a prediction chooses


def test_measuring_the_precisions_changes_neither_random_numbers_nor_threads():
    before = torch.random.get_rng_state(), torch.get_num_threads()
    with torch.inference_mode():
        assert min(precision.cpu_rates.__wrapped__().values()) > 0
    assert torch.equal(torch.random.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(shards, tmp_path):
    # Dropout, augmentation and batch statistics are on: whatever draws or accumulates must come back.
    base = tiny_experiment(data=shards)
    noisy = replace(base.augment, rotate_deg=10, noise=0.1, gamma=0.2)
    model, optim = replace(base.model, norm="batch", dropout=0.5), replace(base.optim, kind="adamw", lr=0.002)
    experiment = replace(base, model=model, augment=noisy, optim=optim)
    undisturbed = train(replace(experiment, runs=str(tmp_path / "a")))
    with pytest.raises(InterruptedError):
        train(replace(experiment, runs=str(tmp_path / "b")), stop)
    resumed = train(replace(experiment, runs=str(tmp_path / "b")))
    assert [epoch["epoch"] for epoch in scores(resumed)] == [1, 2]
    assert scores(resumed) == scores(undisturbed)
    weights = [checkpoint.last(run.path).weights() for run in (undisturbed, resumed)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_short_epochs_share_a_checkpoint_and_the_best_of_them_is_kept(shards, tmp_path, monkeypatch):
    written, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: written.append(args[-1]["epoch"]) or save(*args))
    base = tiny_experiment(data=shards, runs=str(tmp_path), checkpoint_seconds=600)
    # A rate that rises until it ruins the scores, so that the best epoch is usually neither the first nor the last.
    one_cycle = ScheduleConfig(kind="one_cycle", rise=0.99)
    ruined = replace(base, schedule=one_cycle, optim=replace(base.optim, lr=2.0, ema_decay=0.0))
    run = train(replace(ruined, train=replace(base.train, epochs=8, holdout=0.3)))
    record = run_directory.read_record(run.path)
    assert [row["epoch"] for row in record] == list(range(1, 9))
    best = max(record, key=lambda row: row["val/dice"])["epoch"]
    assert written == [1, *({best} - {1, 8}), 8]
    assert checkpoint.best(run.path).epoch == best and checkpoint.last(run.path).epoch == 8


def test_a_run_that_an_error_ends_leaves_its_last_whole_epoch_and_one_that_is_killed_its_last_checkpoint(trained, tmp_path):
    undisturbed, experiment = trained
    experiment = replace(experiment, checkpoint_seconds=600)

    def stop_after_3(metrics):
        if metrics["epoch"] == 3:
            shutil.copytree(tmp_path / "b", tmp_path / "c", ignore=shutil.ignore_patterns(".*.part"))  # as after a kill
            stop(metrics)

    with pytest.raises(InterruptedError):
        train(replace(experiment, runs=str(tmp_path / "b")), stop_after_3)
    for folder, last, recorded in (("b", 3, {3}), ("c", 1, {2, 3})):
        again = replace(experiment, runs=str(tmp_path / folder))
        left = run_directory.open_run(again, reader.open_shards(experiment.data))
        assert checkpoint.last(left.path).epoch == last and len(run_directory.read_record(left.path)) in recorded
        assert scores(train(again)) == scores(undisturbed)


@pytest.mark.slow
def test_the_demo_scores_its_first_epoch_as_it_trained_it(tmp_path):
    write_phantom(str(tmp_path / "phantom"), patients=40, scale=0.25)
    recipe = recipes.quick()
    data = write_shards(open_source(str(tmp_path / "phantom")), str(tmp_path / "shards"), recipe.image, recipe.split).path
    twenty = replace(recipe.train, epochs=20, batch_size=8)
    off = replace(recipe.tracking, wandb="off")
    with pytest.raises(InterruptedError) as stopped:
        train(replace(recipe, data=data, runs=str(tmp_path / "runs"), train=twenty, tracking=off), stop)
    (metrics,) = stopped.value.args
    assert metrics["val/dice"] > 0.3 and metrics["test/dice"] > 0.3, metrics


def test_training_learns_every_reported_key_is_there_and_a_finished_run_is_not_trained_again(trained):
    run, experiment = trained
    before = os.stat(run.path + "/metrics.jsonl").st_mtime_ns
    train(experiment)
    assert os.stat(run.path + "/metrics.jsonl").st_mtime_ns == before
    record = run_directory.read_record(run.path)
    assert record[-1]["train/loss"] < record[0]["train/loss"]
    wanted = {f"{group}/{name}" for group in ("train", "test") for name in ("loss", "accuracy", "dice", "iou", "dice4")}
    assert wanted | {"lr", "images_per_s", "epoch"} <= record[0].keys()
    assert Path(run.path, "MODEL_CARD.md").read_text().count("not a medical device") == 1
    assert np.load(Path(run.path, "samples", "last.npz"))["predictions"].shape[1:] == (64, 64)
    # The Python API loads the run, and predicts on the image's own grid.
    mask = heartseg.load(run.path).predict(np.zeros((211, 173), np.uint8))
    assert mask.shape == (211, 173) and mask.dtype == np.uint8 and mask.max() <= 3


def test_another_grid_and_plateau_without_a_validation_group_are_refused_before_training(shards):
    opened = reader.open_shards(shards)
    with pytest.raises(UserError, match="64 x 64, but tiny expects 96 x 64"):
        worker.check_plan(tiny_experiment(image=ImageConfig(96, 64)), opened)
    with pytest.raises(UserError, match="plateau needs a validation group.*holdout"):
        worker.check_plan(tiny_experiment(schedule=ScheduleConfig("plateau")), opened)


def test_the_plain_launcher_trains_and_evaluates_where_ray_cannot_be_imported(shards, tmp_path):
    config, plain = tmp_path / "tiny.json", ["--data", shards, "--launcher", "plain"]
    config.write_text(json.dumps(to_json(tiny_experiment())))
    training = ["--config", str(config), "--runs", str(tmp_path), "--run-name", "mine", *plain]
    code = "import sys; sys.modules['ray'] = None\nfrom jobs import evaluate, train\n"
    code += f"train.job({training}); evaluate.job({['--checkpoint', str(tmp_path / 'mine'), *plain]})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert "2 epochs done" in done.stdout, done.stderr
    report = done.stdout.splitlines()[-1]
    assert report.endswith("report.html") and os.path.getsize(report) > 10_000


def test_a_run_names_the_revision_of_its_code_or_the_hash_of_its_files():
    revision = run_directory.code_revision()
    assert re.fullmatch(r"git [0-9a-f]{40}(-dirty)?" if (ROOT / ".git").exists() else r"sha256 [0-9a-f]{64}", revision)
    assert hashlib.sha256(b"").hexdigest() not in revision  # of no file at all
