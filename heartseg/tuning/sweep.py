"""A sweep's directory, its only state: trials as runs in `trials/`, their outcomes, the table of all trials and the winner."""

import itertools
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np
import pandas
import pyarrow as pa

from heartseg.config.experiment import Experiment, canonical, flatten, from_json, identity, to_json
from heartseg.errors import require
from heartseg.labels import UNTRAINED_DICE
from heartseg.shards.reader import Shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from heartseg.tuning.search_space import RATE, SearchSpace, apply, describe, draw, grid, listed, make_axes, values_of

DESCRIPTION, OUTCOME, TRIALS = run_directory.SWEEP, "outcome.json", "trials"
# The possible outcomes; a trial without one is trained or resumed.
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
METRIC = "val/dice"


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a sweep: which trials it has, and which of them are stopped early."""

    space: SearchSpace = field(default_factory=SearchSpace)
    search: Literal["random", "grid", "optuna", "changes"] = "random"
    """`random` draws, `grid` tries every combination, `optuna` learns from ended trials, `changes` (an ablation) runs one
    trial per item of --space.changes; the recipe is always the first trial."""
    search_seed: int = 0
    """Seed of the random draw and of a grid's order; training itself uses --train.seed."""
    stop_early: bool = True
    """Stop trials that do worse than others at the same epoch (ASHA, arXiv 1810.05934)."""
    grace_epochs: int = 0
    """Epochs before any trial is stopped. 0: two or, if longer, the warm-up plus one; earlier scores reflect the warm-up."""
    reduction: float = 3.0
    """About one in this many trials continues past a rung, an epoch at which trials are compared; each rung is this many times
    later than the one before."""

    def __post_init__(self):
        require(self.search_seed >= 0, f"--search-seed must be at least 0, not {self.search_seed}.")
        require(self.grace_epochs >= 0, f"--grace-epochs must be at least 0, not {self.grace_epochs}.")
        require(self.reduction > 1, f"--reduction must be above 1, not {self.reduction:g}.")

    @property
    def unused(self) -> dict[str, str]:
        """The fields that have no effect given the others, and why."""
        axes = {one.name for one in fields(SearchSpace)} - {"changes"}
        ignored = {"search_seed", *(f"space.{name}" for name in axes)}
        if self.search != "changes":
            ignored = {"space.changes"} | ({"space.lr_points"} if self.search != "grid" else set())
        found = dict.fromkeys(ignored, f"--search {self.search} does not use it")
        early = () if self.stop_early else ("grace_epochs", "reduction")
        return found | dict.fromkeys(early, "with --no-stop-early, every trial trains to its last epoch")


@dataclass(frozen=True)
class Sweep(run_directory.Run):
    """A sweep's directory and the experiment that its trials vary; its name is their default group in wandb."""

    base: Experiment

    @property
    def plan(self) -> SweepPlan:
        """The plan that the sweep was created with."""
        return from_json(self.description["plan"], SweepPlan)


@dataclass(frozen=True)
class Trial:
    """A run of a sweep. `state` is empty until the trial has ended; `values` are those of the fields that the sweep varies."""

    run: run_directory.Run
    number: int
    values: dict
    state: str = ""
    reason: str = ""

    @property
    def record(self) -> list[dict]:
        """The metrics of each epoch trained so far, one dict per epoch."""
        return run_directory.read_record(self.run.path)


def open_sweep(
    base: Experiment, shards: Shards, plan: SweepPlan, name: str = "", fresh: bool = False, ingest: str = "auto"
) -> Sweep:
    """Create a sweep, or find the one that the same command created, also with more trials or other workers.

    All trials read the shards by the first command's `ingest`. Raises UserError if the directory belongs to another sweep or
    to a run, and for a name that is not valid for a folder.
    """
    asked = {"identity": identity(base), "data_fingerprint": shards.fingerprint, "plan": to_json(plan)}
    digest = filesystem.sha256(canonical(asked))[:8]
    name = run_directory.choose_name(base.runs, name, f"tune-{base.name}-{digest}", fresh, "sweep")
    path, described = filesystem.join(base.runs, name), filesystem.join(base.runs, name, DESCRIPTION)
    there = run_directory.read_matching(described, asked, "sweep")
    if there is None:
        there = asked | {"dataset": shards.manifest["dataset"], "wandb_id": uuid.uuid4().hex[:12], "ingest": ingest}
        groups = {group: len(patients) for group, patients in shards.groups.items()}
        there |= {"groups": groups, "experiment": to_json(base)}
        filesystem.publish_json(described, there)
    # Its trials are one group in wandb, and are in its own folder.
    tracking = replace(base.tracking, group=base.tracking.group or name, job_type="trial")
    inner = replace(base, runs=filesystem.join(path, TRIALS), tracking=tracking, ingest=there["ingest"])
    return Sweep(path, there, inner)


def find_sweep(path: str) -> Sweep:
    """The sweep in a folder, as it was created; raises UserError if there is none."""
    there = filesystem.read_json(filesystem.join(path, DESCRIPTION))
    return Sweep(path, there, replace(from_json(there["experiment"]), runs=filesystem.join(path, TRIALS)))


def recipe_values(sweep: Sweep) -> dict:
    """The recipe's own values of the fields that trials vary, the schedule's kind first."""
    space, base = sweep.plan.space, sweep.base
    return listed(base, space.changes)[0] if sweep.plan.search == "changes" else values_of(base, make_axes(space, base))


def candidates(sweep: Sweep) -> Iterator[dict]:
    """The points to train, in order, the recipe's own first; a random search is endless and may repeat points."""
    plan, axes = sweep.plan, make_axes(sweep.plan.space, sweep.base)
    yield recipe_values(sweep)
    if plan.search == "changes":
        yield from listed(sweep.base, plan.space.changes)[1:]
    elif plan.search == "grid":
        yield from grid(axes, plan.space.lr_points, plan.search_seed)
    else:
        yield from (draw(axes, number, plan.search_seed) for number in itertools.count())


def experiments_to_check(plan: SweepPlan, base: Experiment) -> list[Experiment]:
    """The recipe alone, and with each listed change or axis value, which trials combine. Raises UserError for a bad one."""
    axes = make_axes(plan.space, base)
    for name, values in axes.items():
        require(name == RATE or len(set(values)) == len(values), f"--space lists a value of {name} twice: leave one out.")
    alone = [{}, *({name: value} for name, values in axes.items() for value in values)]
    return [apply(base, point) for point in (listed(base, plan.space.changes) if plan.search == "changes" else alone)]


def add_trial(sweep: Sweep, shards: Shards, number: int, values: dict) -> Trial:
    """Create a trial to train; its folder is named after its number and schedule."""
    experiment = apply(sweep.base, values)
    name = f"{number:03d}-{experiment.schedule.kind}"
    return Trial(run_directory.open_run(experiment, shards, name), number, values)


def read_trials(sweep: Sweep) -> list[Trial]:
    """All trials so far, by number."""
    trials, fields = [], recipe_values(sweep)
    for name in filesystem.list_names(sweep.base.runs):
        path = filesystem.join(sweep.base.runs, name)
        if filesystem.exists(filesystem.join(path, run_directory.DESCRIPTION)):
            run, outcome = run_directory.find_run(path), filesystem.join(path, OUTCOME)
            ended = filesystem.read_json(outcome) if filesystem.exists(outcome) else {}
            settings = flatten(run.description["experiment"])
            trials.append(Trial(run, int(name.partition("-")[0]), {field: settings[field] for field in fields}, **ended))
    return sorted(trials, key=lambda trial: trial.number)


def rungs(sweep: Sweep) -> list[int]:
    """The epochs at which trials are compared and some stopped, never the last epoch; none without early stopping."""
    plan, epochs = sweep.plan, sweep.base.train.epochs
    warmup = max([sweep.base.schedule.warmup_epochs, *plan.space.warmup_epochs])
    found, rung = set(), float(plan.grace_epochs or max(2, math.ceil(warmup) + 1))
    while plan.stop_early and math.ceil(rung) < epochs:
        found.add(math.ceil(rung))
        rung *= plan.reduction
    return sorted(found)


def stop_if_behind(sweep: Sweep, path: str, epoch: int) -> bool:
    """End the trial at `path` if `epoch` is a rung at which too many others were better (ASHA); returns True if so."""
    if epoch not in rungs(sweep):
        return False
    scores = {t.run.path: {row["epoch"]: row.get(METRIC, np.nan) for row in t.record} for t in read_trials(sweep)}
    own, reduction = scores.pop(path), sweep.plan.reduction
    others = [reached[epoch] for reached in scores.values() if not np.isnan(reached.get(epoch, np.nan))]
    # A trial faster than Tune may have finished already.
    if not others or len(own) >= sweep.base.train.epochs or not own.get(epoch, np.nan) < np.quantile(others, 1 - 1 / reduction):
        return False
    reason = f"not among the best 1 in {reduction:g} of the trials that had reached it"
    end_trial(path, STOPPED, f"{METRIC} {own[epoch]:.4f} at epoch {epoch}, {reason}")
    return True


def end_trial(path: str, state: str, reason: str = "") -> None:
    """Record a trial's outcome: finished, stopped early, or failed, with a reason; the first outcome is final."""
    if not filesystem.exists(filesystem.join(path, OUTCOME)):
        filesystem.publish_json(filesystem.join(path, OUTCOME), {"state": state, "reason": reason})


def forget_failures(sweep: Sweep) -> None:
    """Mark failed trials as unfinished, to resume them."""
    for trial in read_trials(sweep):
        if trial.state == FAILED:
            filesystem.remove(filesystem.join(trial.run.path, OUTCOME))


def tabulate(sweep: Sweep) -> pandas.DataFrame:
    """One row per trial, finished trials first, then by best validation Dice: settings, outcome, epochs, seconds, Dice."""
    rows, own, best = [], recipe_values(sweep), f"best {METRIC}"
    for trial in read_trials(sweep):
        record = pandas.DataFrame(trial.record, columns=["epoch", METRIC, "seconds"], dtype=float)
        scores = record[METRIC]
        seen = {"epochs": len(record), "best_epoch": int(scores.idxmax()) + 1 if scores.notna().any() else 0}
        seen |= {best: scores.max(), f"last {METRIC}": scores.get(len(scores) - 1), "seconds": record["seconds"].sum()}
        ended = {"state": trial.state or "not finished", "reason": trial.reason}
        rows.append({"trial": trial.run.name, "change": describe(own, trial.values)} | trial.values | ended | seen)
    columns = ["trial", *["change"] * (sweep.plan.search == "changes"), *own]
    columns += ["state", "reason", "epochs", "best_epoch", best, f"last {METRIC}", "seconds"]
    table = pandas.DataFrame(rows, columns=columns)
    order = table.assign(done=table["state"] == FINISHED).sort_values(["done", best], ascending=False).index
    table = table.loc[order].reset_index(drop=True)
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table


def epochs_saved(sweep: Sweep, table: pandas.DataFrame) -> tuple[int, int]:
    """Epochs that the finished and the stopped trials trained, and epochs that they would train without early stopping."""
    counted = table.loc[table["state"].isin((FINISHED, STOPPED)), "epochs"]
    return int(counted.sum()), len(counted) * sweep.base.train.epochs


def why_no_winner(table: pandas.DataFrame) -> str:
    """Why no trial can win; empty if the first row can."""
    highest = table.loc[table["state"] == FINISHED, f"best {METRIC}"].max()
    if pandas.isna(highest):
        return "No trial has finished."
    fix = f"below {UNTRAINED_DICE} a model outlines nothing yet. Train longer (--train.epochs), or check the data."
    low = f"No trial wins: the highest {METRIC} of the finished trials is {highest:.4f}, and {fix}"
    return low if highest < UNTRAINED_DICE else ""


def write_results(sweep: Sweep) -> tuple[pandas.DataFrame, Experiment | None]:
    """Write `sweep.parquet`, `sweep.csv` and `best.json`; returns the table and the winner (None if no trial has learned).

    The winner is the best finished trial as a complete experiment for jobs/train.py. It was chosen on `val/dice`
    of patients held out from the training group, never on a reported group.
    """
    table = tabulate(sweep)
    filesystem.publish(filesystem.join(sweep.path, "sweep.csv"), table.to_csv(index=False).encode())
    filesystem.write_table(filesystem.join(sweep.path, "sweep.parquet"), pa.Table.from_pandas(table, preserve_index=False))
    if why_no_winner(table):
        return table, None
    best = run_directory.find_run(filesystem.join(sweep.base.runs, table.loc[0, "trial"]))
    experiment = from_json(best.description["experiment"])
    alone = replace(experiment.tracking, group="", job_type="train")
    outside = sweep.path.removesuffix("/" + sweep.name)
    experiment = replace(experiment, data=sweep.base.data, runs=outside, tracking=alone)
    filesystem.publish_json(filesystem.join(sweep.path, "best.json"), to_json(experiment))
    return table, experiment
