"""A sweep of the learning-rate schedule: `python jobs/tune.py camus --data /data/shards --trials 12`.

Many runs of one recipe, in parallel on a cluster; poor ones are stopped early. The winner is chosen on patients held out of the
training group and written to `best.json` for `jobs/train.py --config`. Rerun the same command to resume.
"""

import importlib.util
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas

from heartseg.config.experiment import Experiment
from heartseg.errors import StorageError, UserError, require
from heartseg.models.deeplabv3 import check_installation
from heartseg.reporting.sweep_page import show_table, write_page
from heartseg.shards.reader import Shards
from heartseg.storage import filesystem, locks
from heartseg.training.data_loading import MEMORY_SHARE, free_on_machine, pixel_bytes
from heartseg.training.wandb_logger import close_trial, track_sweep
from heartseg.training.worker import check_plan, open_data
from heartseg.tuning import sweep as sweeps
from heartseg.tuning.sweep import METRIC, Sweep, SweepPlan
from jobs.support import command_line
from jobs.support.command_line import log

# Default share of the training group held out to choose the winner on: as many patients as in CAMUS's validation group.
HOLDOUT = 0.125


@dataclass(frozen=True)
class Options:
    """The trials of a sweep, and its limits."""

    plan: Annotated[SweepPlan, command_line.FLAT] = field(default_factory=SweepPlan)
    trials: int = 0
    """Total number of trials; a larger number extends the same sweep. 0: 12 or, with --search changes, the recipe
    and all changes."""
    max_concurrent: int = 0
    """Trials in parallel; 0: as many as fit on the cluster."""
    gpus_per_trial: float = 1.0
    """Share of a GPU for each trial of one worker: with 0.25, four small networks train on a GPU at a time."""
    time_budget: float = 0.0
    """Minutes after which training stops; 0: no limit."""
    sweep_name: str = ""
    """Name of the sweep's folder (default: the recipe and a hash of the configuration)."""
    fresh: bool = False
    """Start a new sweep even if the same command would resume one."""
    retry_failed: bool = False
    """Resume failed trials from their last checkpoint, after a full disk for example."""

    def __post_init__(self):
        limits = {"--trials": self.trials, "--max-concurrent": self.max_concurrent, "--time-budget": self.time_budget}
        for flag, value in limits.items():
            require(value >= 0, f"{flag} must be at least 0, not {value:g}.")
        share = self.gpus_per_trial
        require(0 < share <= 1, f"--gpus-per-trial must be above 0 and at most 1, not {share:g}.")

    @property
    def unused(self) -> dict[str, str]:
        """The experiment's fields that have no effect here, and why."""
        reads = dict.fromkeys(("source", "out", "split"), "a sweep reads the shards of --data as they are")
        every = "a trial, which may be stopped after any epoch, writes one after each"
        return reads | {"tracking.job_type": "a trial's is `trial`", "checkpoint_seconds": every}

    def trained(self, experiment: Experiment) -> list[Experiment]:
        """The recipe with each change or value that trials are made of, to be checked before any is trained."""
        return sweeps.experiments_to_check(self.plan, experiment)

    @property
    def num_trials(self) -> int:
        """The requested number of trials."""
        return self.trials or (len(self.plan.space.changes) + 1 if self.plan.search == "changes" else 12)


def run(experiment: Experiment, options: Options) -> Sweep:
    """Start or resume a sweep and run it until its trials end; returns it. Raises UserError if no trial can be chosen."""
    command_line.required_path(experiment.data, "data", "a folder of shards, or set HEARTSEG_DATA")
    command_line.required_path(experiment.runs, "runs", "a folder or URI that every node can reach, or set HEARTSEG_RUNS")
    fits_nccl = options.gpus_per_trial == 1 or experiment.workers == 1
    require(fits_nccl, f"--gpus-per-trial {options.gpus_per_trial:g} needs --workers 1: NCCL allows only one worker per GPU.")
    holdout = experiment.train.holdout or HOLDOUT
    experiment = replace(experiment, train=replace(experiment.train, holdout=holdout))
    check_installation()
    is_known = options.plan.search != "optuna" or importlib.util.find_spec("optuna")
    require(bool(is_known), "--search optuna needs Optuna: run `pip install 'heartseg[optuna]'`, or use --search random.")
    shards = open_data(experiment)
    for trained in options.trained(experiment):
        check_plan(trained, shards)
    ingest = experiment.ingest
    if ingest == "auto":  # all trials read the same way: from memory if there is enough here for one trial per core
        fits = pixel_bytes(shards) <= MEMORY_SHARE * free_on_machine() / (os.cpu_count() or 1)
        ingest = "memory" if fits else "stream"
    sweep = sweeps.open_sweep(experiment, shards, options.plan, options.sweep_name, options.fresh, ingest)
    with locks.lock(sweep.path):
        print(f"sweep {sweep.path}")
        if options.retry_failed:
            sweeps.forget_failures(sweep)
        try:
            search(sweep, shards, options)
        except (KeyboardInterrupt, StorageError):
            publish(sweep)  # results so far, without waiting for a dashboard
            raise
        conclude(sweep, options)
    return sweep


def search(sweep: Sweep, shards: Shards, options: Options) -> None:
    """Train the trials that have not ended. Raises KeyboardInterrupt on interruption (Tune just returns), and StorageError."""
    known = sweeps.read_trials(sweep)
    if len(known) >= options.num_trials and all(trial.state for trial in known):
        return
    if options.plan.stop_early and not sweeps.rungs(sweep):
        log.info("No trial is stopped early: %d epochs leave no time for a comparison.", sweep.base.train.epochs)
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial may fail before its first epoch ends
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # otherwise Tune prints its own tables among our lines
    from ray import tune

    from jobs.support import ray_runtime, ray_trials

    workers, share = sweep.base.workers, options.gpus_per_trial
    ray_runtime.start_ray(workers)
    ray_runtime.check_own_gpus(workers)
    # More trials than fit would wait, time out and count as failed.
    concurrent = min(options.max_concurrent or options.num_trials, ray_runtime.room_for(workers, share))
    trials, each = command_line.counted(options.num_trials, "trial"), command_line.counted(workers, "worker")
    log.info("%s, %d at a time, %s each", trials, concurrent, each)
    resources, budget_s = ray_runtime.worker_resources(workers * concurrent, share), options.time_budget * 60
    progress = ray_trials.Progress(lambda: publish(sweep))
    tuner = tune.Tuner(
        # The actor that starts a trial's workers takes no core from them, and is on the head, which is not a spot node.
        tune.with_resources(ray_trials.train_trial, {"CPU": 0, "node:__internal_head__": 0.001}),
        tune_config=tune.TuneConfig(
            search_alg=ray_trials.Suggestions(sweep, shards, options.num_trials, resources),
            scheduler=ray_trials.Rungs(sweep),
            num_samples=-1,
            max_concurrent_trials=concurrent,
            time_budget_s=budget_s or None,
        ),
        run_config=tune.RunConfig(
            name=filesystem.last_part(sweep.path),
            storage_path=filesystem.join(sweep.path, "ray"),
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[progress],
            verbose=0,
        ),
    )
    began = time.monotonic()
    tuner.fit()
    if progress.outage:
        raise progress.outage
    is_time_up = budget_s and time.monotonic() - began >= budget_s
    if not is_time_up and any(not trial.state for trial in sweeps.read_trials(sweep)):
        raise KeyboardInterrupt


def publish(sweep: Sweep) -> tuple[pandas.DataFrame, Experiment | None, str]:
    """Write the tables, the current winner and the page, which can be read while the sweep runs."""
    table, best = sweeps.write_results(sweep)
    return table, best, write_page(sweep, table)


def conclude(sweep: Sweep, options: Options) -> None:
    """Publish and print the results; on the dashboard, end each trial's run and add one for the sweep."""
    table, best, page = publish(sweep)
    trials = sweeps.read_trials(sweep)
    for trial in trials:
        if trial.state == sweeps.STOPPED:
            close_trial(trial.run, trial.record, trial.reason)  # its own process had no time for that
    if len(table):
        track_sweep(sweep.base, sweep, table, page)
        print(show_table(table))
    trained, asked = sweeps.epochs_saved(sweep, table)
    if asked and options.plan.stop_early:
        print(f"{trained} of {asked} epochs trained: early stopping saved {1 - trained / asked:.0%}")
    if failed := [trial for trial in trials if trial.state == sweeps.FAILED]:
        print(f"{command_line.counted(len(failed), 'trial')} failed (first: {failed[0].reason}); --retry-failed resumes them")
    print(f"page {page}")
    if best:
        winner = table.iloc[0]
        print(f"best {winner['trial']}  {METRIC} {winner[f'best {METRIC}']:.4f}  {filesystem.join(sweep.path, 'best.json')}")
    elif failed and len(failed) == len(trials):
        problem = f"All {len(trials)} trials of {sweep.path} failed (first: {failed[0].reason})"
        raise UserError(f"{problem}: fix the cause, then rerun the same command with --retry-failed.")
    elif (table["state"] == sweeps.FINISHED).any():
        raise UserError(f"{sweep.path}: {sweeps.why_no_winner(table)}")
    else:
        print("no trial has finished: rerun the same command to resume, with a longer --time-budget")


def job(argv: list[str]) -> None:
    about = "Sweep the learning-rate schedule; rerun the same command to resume."
    experiment, options = command_line.parse(Options(), argv, "tune.py", about)
    command_line.refuse_unused(SweepPlan(), options.plan, options.plan.unused)
    run(experiment, options)


if __name__ == "__main__":
    command_line.main(job)
