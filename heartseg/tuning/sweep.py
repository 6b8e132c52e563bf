"""A sweep's directory: its trials as runs in `trials/`, how each of them ended, the table of them all and the winner.

A sweep has no other state, so the same command resumes one that was killed.
"""

import math
import re
import uuid
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas
import pyarrow as pa

from heartseg.config.experiment import Experiment, canonical, from_json, identity, to_json
from heartseg.errors import require
from heartseg.shards.reader import Shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from heartseg.training.run_directory import Run
from heartseg.tuning.search_space import SearchSpace, apply, describe

DESCRIPTION, SUGGESTION, OUTCOME, TRIALS = "sweep.json", "trial.json", "outcome.json", "trials"
# The error that ended a trial's process.
ERROR = "error.txt"
# How a trial can have ended; one without an outcome is trained, or resumed.
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
METRIC = "val/dice"


@dataclass(frozen=True)
class SweepPlan:
    """What decides which trials there are and which of them are stopped early."""

    space: SearchSpace = field(default_factory=SearchSpace)
    search: Literal["random", "grid", "optuna", "changes"] = "random"
    """`random` draws, `grid` takes every combination, `optuna` learns from what ended, `changes` (an ablation) takes those of
    --space.changes and nothing else; the recipe is always the first trial."""
    search_seed: int = 0
    """Seed of the draw; the trainings have --train.seed."""
    stop_early: bool = True
    """Stop trials early that do worse than others did at the same epoch (ASHA, arXiv 1810.05934)."""
    grace_epochs: int = 0
    """Epochs that no trial is stopped before; 0 takes two, or the warm-up and one more: earlier, ranks reflect the warm-up."""
    reduction: float = 3.0
    """Of the trials that come to a rung, about one in so many continues; each rung is so many times later than the last."""

    def __post_init__(self):
        require(self.search_seed >= 0, "--search-seed must be at least 0.")
        require(self.grace_epochs >= 0, "--grace-epochs must be at least 0.")
        require(self.reduction > 1, "--reduction must be above 1.")


def first_rung(plan: SweepPlan, base: Experiment) -> int:
    """The epoch at which trials are first compared."""
    warmup = max([base.schedule.warmup_epochs, *plan.space.warmup_epochs])
    return plan.grace_epochs or max(2, math.ceil(warmup) + 1)


@dataclass(frozen=True)
class Sweep:
    """A sweep's directory and the experiment that its trials vary."""

    path: str
    base: Experiment
    description: dict

    @property
    def name(self) -> str:
        """The last part of its path; its trials' group in the dashboard."""
        return filesystem.last_part(self.path)


@dataclass(frozen=True)
class Trial:
    """A run of a sweep. `state` is empty while it is to be trained; `values` is what it varies, by dotted field."""

    run: Run
    number: int
    values: dict
    state: str = ""
    reason: str = ""

    @property
    def record(self) -> list[dict]:
        """Its epochs so far."""
        return run_directory.read_record(self.run.path)


def open_sweep(
    base: Experiment, shards: Shards, plan: SweepPlan, name: str = "", fresh: bool = False, ingest: str = "auto"
) -> Sweep:
    """Begin a sweep, or find the one that the same command began; more trials or other workers are the same sweep.

    All trials read shards the same way: as the sweep began, otherwise by `ingest`. Raises UserError if the directory holds
    another sweep or a run, and for a name that cannot be a folder's.
    """
    asked = {"identity": identity(base), "data_fingerprint": shards.fingerprint, "plan": to_json(plan)}
    require(not name or re.fullmatch(r"\w[\w.-]*", name) is not None, f"--sweep-name {name!r} cannot be the name of a folder.")
    digest = filesystem.sha256(canonical(asked))[:8]
    name = name if name and not fresh else run_directory.generation_name(base.runs, name or f"tune-{base.name}-{digest}", fresh)
    path = filesystem.join(base.runs, name)
    described = filesystem.join(path, DESCRIPTION)
    there = run_directory.read_matching(described, asked, "sweep")
    if there is None:
        is_free = not filesystem.exists(filesystem.join(path, run_directory.DESCRIPTION))
        require(is_free, f"{path} is a run's folder: give another --sweep-name.")
        there = asked | {"dataset": shards.manifest["dataset"], "wandb_id": uuid.uuid4().hex[:12], "ingest": ingest}
        there |= {"groups": {group: len(patients) for group, patients in shards.groups.items()}}
        there |= {"experiment": to_json(base)}  # as it was begun
        filesystem.publish_json(described, there)
    # Its trials are one group of the dashboard, and lie in its own folder.
    tracking = replace(base.tracking, group=base.tracking.group or name, job_type="trial")
    inner = replace(base, runs=filesystem.join(path, TRIALS), tracking=tracking, ingest=there["ingest"])
    return Sweep(path, inner, there)


def find_sweep(path: str) -> Sweep:
    """The sweep in a folder, as it was begun; raises UserError if the folder has none."""
    there = filesystem.read_json(filesystem.join(path, DESCRIPTION))
    return Sweep(path, replace(from_json(there["experiment"]), runs=filesystem.join(path, TRIALS)), there)


def add_trial(sweep: Sweep, shards: Shards, number: int, values: dict) -> Trial:
    """Record a trial that is to be trained; its folder is named by its number and its schedule."""
    experiment = apply(sweep.base, values)
    name = f"{number:03d}-{experiment.schedule.kind}"
    filesystem.publish_json(filesystem.join(sweep.base.runs, name, SUGGESTION), {"number": number, "values": values})
    return Trial(run_directory.open_run(experiment, shards, name=name), number, values)


def repair_incomplete_trials(sweep: Sweep, shards: Shards) -> None:
    """Complete the trials of which a kill left the suggestion without its run."""
    for name in filesystem.list_names(sweep.base.runs):
        path = filesystem.join(sweep.base.runs, name)
        if filesystem.exists(filesystem.join(path, SUGGESTION)) and not filesystem.exists(
            filesystem.join(path, run_directory.DESCRIPTION)
        ):
            add_trial(sweep, shards, **filesystem.read_json(filesystem.join(path, SUGGESTION)))


def read_trials(sweep: Sweep) -> list[Trial]:
    """All trials so far, by number."""
    trials = []
    for name in filesystem.list_names(sweep.base.runs):
        path = filesystem.join(sweep.base.runs, name)
        if filesystem.exists(filesystem.join(path, run_directory.DESCRIPTION)):
            suggestion, outcome = filesystem.join(path, SUGGESTION), filesystem.join(path, OUTCOME)
            ended = filesystem.read_json(outcome) if filesystem.exists(outcome) else {}
            trials.append(Trial(run_directory.find_run(path), **filesystem.read_json(suggestion), **ended))
    return sorted(trials, key=lambda trial: trial.number)


def end_trial(path: str, state: str, reason: str = "") -> None:
    """Record how a trial has ended: finished, stopped early, or failed for a reason; the first outcome stays."""
    if filesystem.exists(filesystem.join(path, OUTCOME)):
        return
    filesystem.publish_json(filesystem.join(path, OUTCOME), {"state": state, "reason": reason})


def forget_failures(sweep: Sweep) -> None:
    """Let failed trials be resumed."""
    for trial in read_trials(sweep):
        if trial.state == FAILED:
            # The error of the next try may be another.
            filesystem.remove(filesystem.join(trial.run.path, ERROR))
            filesystem.remove(filesystem.join(trial.run.path, OUTCOME))


def tabulate(sweep: Sweep) -> pandas.DataFrame:
    """One row a trial, the best first: what it varied, how it ended, epochs, seconds, best and last validation Dice.

    `rank` counts finished trials before the others: a stopped one could not show its best.
    """
    rows, trials = [], read_trials(sweep)
    is_listed = sweep.description["plan"]["search"] == "changes"
    for trial in trials:
        record = trial.record
        scores = [row.get(METRIC, np.nan) for row in record]
        seen = bool(scores) and not np.all(np.isnan(scores))
        rows.append(
            {"trial": trial.run.name}
            | ({"change": describe(trials[0].values, trial.values)} if is_listed else {})
            | {**trial.values, "state": trial.state or "not finished", "reason": trial.reason}
            | {"epochs": len(record), "best_epoch": int(np.nanargmax(scores)) + 1 if seen else 0}
            | {f"best {METRIC}": float(np.nanmax(scores)) if seen else np.nan}
            | {f"last {METRIC}": scores[-1] if scores else np.nan, "seconds": sum(row["seconds"] for row in record)}
        )
    if not rows:
        columns = ["rank", "trial", "schedule.kind", "state", "epochs", f"best {METRIC}", f"last {METRIC}", "seconds"]
        return pandas.DataFrame({name: [] for name in columns}, dtype=object)
    table = pandas.DataFrame(rows)
    order = table.assign(done=table["state"] == FINISHED).sort_values(["done", f"best {METRIC}"], ascending=False).index
    table = table.loc[order].reset_index(drop=True)
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table


def epochs_saved(sweep: Sweep, table: pandas.DataFrame) -> tuple[int, int]:
    """Epochs trained, and epochs that the same trials would have taken without early stopping; failed ones left out."""
    counted = table[table["state"].isin((FINISHED, STOPPED))]
    return int(counted["epochs"].sum()), len(counted) * sweep.base.train.epochs


def winner(sweep: Sweep, table: pandas.DataFrame) -> Experiment | None:
    """The best finished trial as a complete experiment that jobs/train.py reproduces; None if no trial finished.

    It was chosen on `val/dice` of patients held out of the training group, and on no reported group.
    """
    finished = table[(table["state"] == FINISHED) & table[f"best {METRIC}"].notna()]
    if finished.empty:
        return None
    best = next(trial for trial in read_trials(sweep) if trial.run.name == finished.iloc[0]["trial"])
    experiment = from_json(best.run.description["experiment"])
    alone = replace(experiment.tracking, group="", job_type="train")
    outside = sweep.path.removesuffix("/" + sweep.name)
    return replace(experiment, data=sweep.base.data, runs=outside, tracking=alone)


def write_results(sweep: Sweep) -> tuple[pandas.DataFrame, Experiment | None]:
    """Write `sweep.parquet`, `sweep.csv` and `best.json`; returns the table and the winner."""
    table = tabulate(sweep)
    filesystem.publish(filesystem.join(sweep.path, "sweep.csv"), table.to_csv(index=False).encode())
    filesystem.write_table(filesystem.join(sweep.path, "sweep.parquet"), pa.Table.from_pandas(table, preserve_index=False))
    best = winner(sweep, table)
    if best:
        filesystem.publish_json(filesystem.join(sweep.path, "best.json"), to_json(best))
    return table, best
