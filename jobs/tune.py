"""A sweep of the learning-rate schedule: `python jobs/tune.py camus --data /data/shards --trials 12`.

Many runs of one recipe, in parallel on a cluster, bad ones stopped early; the winner is chosen on patients held out of the
training group and written down as `best.json`, which `jobs/train.py --config` takes. The same command goes on with a sweep.
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heartseg import locks, search_space, storage, sweeps
from heartseg.config import Experiment
from heartseg.errors import UserError, require
from heartseg.model import check_installation
from heartseg.runs import Run
from heartseg.shards import Shards
from heartseg.sweep_page import show_table, write_page
from heartseg.sweeps import Sweep
from heartseg.tracking import close_trial, track_sweep
from heartseg.training import check_plan, open_data
from jobs import runtime

log = logging.getLogger("heartseg.jobs")
# Share of the training group that the winner is chosen on where the recipe names none; as many as a CAMUS validation group.
HOLDOUT = 0.125


@dataclass(frozen=True)
class Options:
    """What to try, and how much of it."""

    plan: Annotated[sweeps.Plan, runtime.FLAT] = field(default_factory=sweeps.Plan)
    trials: int = 12
    """Trials in all; with more than before, the same sweep goes on."""
    max_concurrent: int = 0
    """Trials at a time; as many as the cluster has room for where 0."""
    time_budget: float = 0.0
    """Minutes after which no more is trained; 0 sets no end."""
    sweep_name: str = ""
    """Name of the sweep's folder; the recipe and a hash of the configuration where not given."""
    fresh: bool = False
    """Begin a new sweep where the same command would go on with one."""

    def __post_init__(self):
        require(self.trials >= 1, "--trials must be at least 1.")
        require(min(self.max_concurrent, self.time_budget) >= 0, "--max-concurrent and --time-budget must be at least 0.")


def run(experiment: Experiment, options: Options) -> Sweep:
    """Begin a sweep or go on with it, until its trials have ended; returns it. Raises UserError where no trial finished."""
    runtime.require(experiment.data, "--data", "a folder of shards (HEARTSEG_DATA does as well)")
    holdout = experiment.train.holdout or HOLDOUT
    experiment = replace(experiment, train=replace(experiment.train, holdout=holdout))
    check_installation()
    shards = open_data(experiment)
    check_plan(experiment, shards)
    search_space.check_points(experiment, search_space.make_axes(options.plan.space, experiment))
    sweep = sweeps.open_sweep(experiment, shards, options.plan, options.sweep_name, options.fresh)
    with locks.lock(sweep.path):
        print(f"sweep {sweep.path}")
        sweeps.mend_trials(sweep, shards)
        search(sweep, shards, experiment, options)
        conclude(sweep)
    return sweep


def search(sweep: Sweep, shards: Shards, experiment: Experiment, options: Options) -> None:
    """Train what is to be trained. Raises KeyboardInterrupt where it was interrupted: Tune just returns."""
    known = sweeps.read_trials(sweep)
    if len(known) >= options.trials and all(trial.state for trial in known):
        return
    # Tune looks for reports as often as Ray Train does; its 2 s would be most of a small trial's epoch.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial may fail before its first epoch ends
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # or Tune prints tables of its own beside our lines
    runtime.start_ray(experiment.workers)
    from ray import tune

    from jobs import trials

    concurrent = options.max_concurrent or runtime.room_for(experiment.workers)
    config = {"workers": experiment.workers, "resources": runtime.worker_resources(experiment.workers * concurrent)}
    scheduler = trials.build_scheduler(options.plan, experiment.train.epochs, known)
    suggestions = trials.Suggestions(sweep, shards, options.plan, options.trials, config)
    log.info("%d trials, %d at a time, %d worker(s) each", options.trials, concurrent, experiment.workers)
    tuner = tune.Tuner(
        # The actor that starts a trial's workers takes no core from them, and stays where no spot node is lost.
        tune.with_resources(trials.train_trial, {"CPU": 0, "node:__internal_head__": 0.001}),
        tune_config=tune.TuneConfig(
            search_alg=suggestions,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=concurrent,
            time_budget_s=options.time_budget * 60 or None,
        ),
        run_config=tune.RunConfig(
            name=storage.last_part(sweep.path),
            storage_path=storage.join(sweep.path, "ray"),
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[trials.Progress()],
            verbose=0,
        ),
    )
    tuner.fit()
    if not options.time_budget and any(not trial.state for trial in sweeps.read_trials(sweep)):
        raise KeyboardInterrupt


def conclude(sweep: Sweep) -> None:
    """Table, winner and page; what early stopping saved; and in the dashboard, an end for each trial and one run for all."""
    table, best = sweeps.write_results(sweep)
    for trial in sweeps.read_trials(sweep):
        if trial.state == sweeps.STOPPED:
            close_trial(trial.run, trial.record, trial.reason)  # its own process had no time to
    page = write_page(sweep, table)
    track_sweep(sweep.base, Run(sweep.path, sweep.description), table, page)
    print(show_table(table))
    trained, asked = sweeps.epochs_saved(sweep, table)
    if asked:
        print(f"{trained} epochs trained; without early stopping {asked}: {1 - trained / asked:.0%} saved")
    if best is None:
        reasons = [trial.reason for trial in sweeps.read_trials(sweep) if trial.reason]
        raise UserError(f"No trial of {sweep.path} finished{f' ({reasons[0]})' if reasons else ''}: see its sweep.csv.")
    first = table.iloc[0]
    print(
        f"best {first['trial']}  {sweeps.METRIC} {first[f'best {sweeps.METRIC}']:.4f}  {storage.join(sweep.path, 'best.json')}"
    )
    print(f"page {page}")


def job(argv: Sequence[str]) -> None:
    """The command line."""
    run(*runtime.parse(Options(), argv, "tune.py", "Sweep the learning-rate schedule; the same command goes on."))


if __name__ == "__main__":
    runtime.main(job)
