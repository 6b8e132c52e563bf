"""Sweeps on a real Ray: parallel trials, early stopping, a failed trial, kills and resumes, and the records in wandb."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from heartseg.config.experiment import TrackingConfig
from heartseg.datasets.phantom import write_phantom
from heartseg.errors import StorageError
from heartseg.storage import filesystem
from heartseg.tuning import sweep as sweeps
from heartseg.tuning.search_space import SearchSpace
from helpers.experiments import ROOT, tiny_experiment
from helpers.job_process import Job, wait_for
from helpers.tracked_runs import kept_records
from jobs import preprocess, tune
from jobs.support import ray_trials

pytestmark = pytest.mark.slow


def tracked(folder: str) -> tuple[dict, list[dict]]:
    """The run record (group, job type, tags, configuration) and the rows that a run or a sweep has kept for wandb."""
    fragments = sorted(Path(folder).glob("wandb/offline-run-*/*.wandb"))
    records = [record for fragment in fragments for record in kept_records(fragment)]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return next(record["run"] for record in records if record["type"] == "run"), rows


@pytest.fixture(scope="module")
def small_sweep(ray_session, shards, tmp_path_factory) -> sweeps.Sweep:
    """Two trials of two epochs; the second's base rate is ten million times the first's."""
    folder = str(tmp_path_factory.mktemp("sweep"))
    experiment = tiny_experiment(data=shards, runs=folder, tracking=TrackingConfig(wandb="offline"))
    unclipped = replace(experiment.optim, clip_norm=0.0)
    experiment = replace(experiment, optim=unclipped)
    space = SearchSpace(schedules=("cosine",), lr_factors=(1.0, 1e7), lr_points=2)
    options = tune.Options(plan=sweeps.SweepPlan(space, search="grid", stop_early=False), trials=2)
    sweep = tune.run(experiment, options)
    assert tune.run(experiment, options).path == sweep.path  # again: nothing is left to do
    return sweep


def test_a_trial_that_fails_reports_why_and_the_sweep_continues(small_sweep):
    assert small_sweep.base.train.holdout == tune.HOLDOUT > 0
    finished, failed = sweeps.read_trials(small_sweep)
    assert failed.state == sweeps.FAILED and "is not finite" in failed.reason and "patient" in failed.reason
    assert finished.state == sweeps.FINISHED and [row["epoch"] for row in finished.record] == [1, 2]


def test_in_the_dashboard_each_trial_is_a_run_of_the_sweeps_group_and_the_sweeps_own_has_table_and_page(small_sweep):
    trial = sweeps.read_trials(small_sweep)[0]
    run, rows = tracked(trial.run.path)
    assert run["run_group"] == small_sweep.name and run["job_type"] == "trial"
    assert trial.values["schedule.kind"] in run["tags"] and "schedule.kind" in json.dumps(run["config"])
    assert [row["epoch"] for row in rows] == [1, 2] and sweeps.METRIC in rows[0]
    run, (row, *_) = tracked(small_sweep.path)
    assert run["run_group"] == small_sweep.name and run["job_type"] == "sweep"
    assert "trials" in json.dumps(row) and "page" in json.dumps(row)
    assert list(Path(small_sweep.path).glob("wandb/offline-run-*/files/media/html/*.html"))


def test_a_trial_that_meets_an_outage_twice_is_not_a_failure_and_the_same_command_resumes_it(small_sweep, monkeypatch):
    trial, folder = sweeps.read_trials(small_sweep)[0].run.path, small_sweep.path.rpartition("/")[0]
    os.remove(f"{trial}/{sweeps.OUTCOME}")  # as a kill before the trial's end would leave it
    experiment = replace(small_sweep.base, runs=folder, ingest="auto", tracking=TrackingConfig(wandb="offline"))

    def train_trial_without_storage(config: dict) -> None:
        def fail(path: str) -> None:
            raise StorageError(f"{path} cannot be reached (injected): check its disk or network.")

        filesystem.exists = fail  # in the trial's own process
        ray_trials.train_trial(config)

    again = tune.Options(plan=small_sweep.plan, trials=2)
    with monkeypatch.context() as patch:
        patch.setattr(ray_trials, "train_trial", train_trial_without_storage)
        with pytest.raises(StorageError, match="cannot be reached"):
            tune.run(experiment, again)
    assert sweeps.read_trials(small_sweep)[0].state == ""
    assert tune.run(experiment, again).path == small_sweep.path
    assert sweeps.read_trials(small_sweep)[0].state == sweeps.FINISHED


class SweepJob(Job):
    """`jobs/tune.py` as its own process: 5 trials of up to 6 epochs, 4 schedules."""

    trials, epochs = 5, 6

    def __init__(self, shards: str, folder: Path):
        self.runs = folder
        command = [sys.executable, str(ROOT / "jobs" / "tune.py"), "quick", "--data", shards, "--runs", str(folder)]
        command += ["--image.height", "64", "--image.width", "64", "--train.batch-size", "8", "--train.holdout", "0.25"]
        command += ["--train.epochs", str(self.epochs), "--trials", str(self.trials), "--optim.ema-decay", "0"]
        # Without batch statistics so few images learn steadily, and what is behind at a rung is behind at the end.
        command += ["--model.norm", "group", "--optim.lr", "0.001", "--space.lr-factors", "0.003", "0.3"]
        self.start(command)

    def sweep(self) -> sweeps.Sweep:
        path = wait_for(lambda: next((f for f in self.runs.glob("tune-*") if (f / sweeps.DESCRIPTION).exists()), None))
        return sweeps.find_sweep(str(path))

    def num_epochs(self) -> int:
        return sum(len(trial.record) for trial in sweeps.read_trials(self.sweep()))

    def num_ended(self) -> int:
        return sum(bool(trial.state) for trial in sweeps.read_trials(self.sweep()))


@pytest.fixture(scope="module")
def more_shards(tmp_path_factory) -> str:
    """30 patients, so that a trial's score means something."""
    folder = tmp_path_factory.mktemp("more")
    write_phantom(str(folder / "tree"), patients=30, scale=0.25, workers=2)
    experiment = tiny_experiment(source=str(folder / "tree"), out=str(folder / "shards"))
    preprocess.run(experiment, preprocess.Options(launcher="plain"))
    return str(folder / "shards")


@pytest.mark.timeout(1500)
def test_a_sweep_killed_half_way_resumes_with_each_epoch_once_and_trials_that_fall_behind_are_stopped(more_shards, tmp_path):
    first = SweepJob(more_shards, tmp_path)
    wait_for(lambda: first.num_epochs() >= 2 * SweepJob.trials, first.process, seconds=300)
    first.process.kill()
    first.process.wait()
    time.sleep(3)  # its workers end within two seconds
    ended = {trial.run.path: trial.record for trial in sweeps.read_trials(first.sweep()) if trial.state}
    before = first.num_epochs()
    second = SweepJob(more_shards, tmp_path)
    wait_for(lambda: second.num_epochs() > before, second.process, seconds=300)
    workers = wait_for(lambda: second.pids("RayTrainWorker"), second.process, seconds=200)
    ended_before = second.num_ended()
    os.kill(min(workers), signal.SIGKILL)
    wait_for(lambda: second.pids("RayTrainWorker") - workers, second.process, seconds=200)
    # No other trial's worker has gone for it, unless its trial came to an end.
    assert workers - {min(workers)} <= second.pids("RayTrainWorker") or second.num_ended() > ended_before
    output = second.finish(seconds=600)
    print(output[output.index("rank") :])
    table = sweeps.tabulate(second.sweep())
    assert len(table) == SweepJob.trials and set(table["state"]) == {sweeps.FINISHED, sweeps.STOPPED}
    assert table.loc[0, "state"] == sweeps.FINISHED and table["schedule.kind"].nunique() == 4
    trained, planned = sweeps.epochs_saved(second.sweep(), table)
    assert trained < planned
    for trial in sweeps.read_trials(second.sweep()):
        assert [row["epoch"] for row in trial.record] == list(range(1, len(trial.record) + 1))
        assert ended.get(trial.run.path, trial.record) == trial.record  # what had ended was not run again
        assert tracked(trial.run.path)
