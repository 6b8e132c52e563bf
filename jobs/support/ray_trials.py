"""What Ray Tune calls during a sweep: which trial comes next, how one is trained, and which are stopped early.

Each trial is a Ray Train run of its own, started and resumed like any other; Tune supervises them and stores nothing itself.
"""

import logging
import time
import types
from collections.abc import Callable

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from heartseg.config.experiment import Experiment, canonical, from_json, identity, to_json
from heartseg.errors import UserError
from heartseg.shards.reader import Shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from heartseg.tuning import search_space
from heartseg.tuning.search_space import LogRange
from heartseg.tuning.sweep import (
    ERROR,
    FAILED,
    FINISHED,
    METRIC,
    STOPPED,
    Sweep,
    SweepPlan,
    Trial,
    add_trial,
    end_trial,
    first_rung,
    read_trials,
)
from jobs.support import command_line, ray_runtime, ray_training

log = logging.getLogger("heartseg.jobs")
# Within this time after a trial, Ray Train's controller ends with the trial's actor; until then it would replace lost workers.
SECONDS_TO_LEAVE = 10.0
# After so many known points in a row, a space counts as used up.
MOST_DRAWS = 1000


def train_trial(config: dict) -> None:
    """Train one trial to its end, in an actor of Tune's, and write how it ended: Tune's own result is not stored.

    No lock: the sweep's own covers its trials, and a trial that Tune ends would leave its lock behind.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    command_line.configure_logging()
    run, experiment = run_directory.find_run(config["run"]), from_json(config["experiment"])
    try:
        ray_training.train_with_ray(experiment, run, resources=config["resources"], callbacks=[TuneReportCallback()])
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, ray_training.WorkersDied):
            end_trial(run.path, FAILED, str(error))
            return  # trying again would not help
        # Not an end yet: Tune tries once more, and the reason may be that the sweep's own process is ending.
        filesystem.publish(filesystem.join(run.path, ERROR), (str(error).partition("\n")[0] or type(error).__name__).encode())
        raise
    end_trial(run.path, FINISHED)


class Suggestions(Searcher):
    """Trials to train: first those that an earlier command left unfinished, then new ones, starting with the recipe itself."""

    def __init__(self, sweep: Sweep, shards: Shards, plan: SweepPlan, num_trials: int, resources: dict):
        super().__init__(metric=METRIC, mode="max")
        self.sweep, self.shards, self.plan, self.num_trials, self.resources = sweep, shards, plan, num_trials, resources
        known = read_trials(sweep)
        self.waiting = [trial for trial in known if not trial.state]
        self.count, self.next_number = len(known), 1 + max((trial.number for trial in known), default=-1)
        self.seen = {canonical(trial.run.description["identity"]) for trial in known}
        self.axes, self.points = search_space.make_axes(plan.space, sweep.base), []  # the points that follow the recipe
        if plan.search == "grid":
            self.points = search_space.grid(self.axes, plan.space.lr_points, plan.search_seed)
        if plan.search == "changes":
            own, *self.points = search_space.listed(sweep.base, plan.space.changes)
            self.axes = dict.fromkeys(own)
        self.model = build_model_search(self.axes, plan, known) if plan.search == "optuna" else None
        # The model's id of a trial: for an id that it has seen before, it suggests the same point again.
        self.of_model: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict | str:
        trial = self.waiting.pop(0) if self.waiting else self.new_trial(trial_id)
        if trial is None:
            return Searcher.FINISHED
        experiment = to_json(search_space.apply(self.sweep.base, trial.values))
        return {"run": trial.run.path, "experiment": experiment, "resources": self.resources}

    def new_trial(self, trial_id: str) -> Trial | None:
        """The next point that is not yet a trial; None if there are enough, or if the space holds no more."""
        for attempt in range(MOST_DRAWS):
            values = self.next_values(trial_id, attempt) if self.count < self.num_trials else None
            if values is None:
                break
            number, self.next_number = self.next_number, self.next_number + 1
            asked = canonical(identity(search_space.apply(self.sweep.base, values)))
            if asked not in self.seen:
                self.seen.add(asked)
                self.count += 1
                return add_trial(self.sweep, self.shards, number, values)
            self.on_trial_complete(trial_id, error=True)  # a point that is not trained has no score
        if self.count < self.num_trials:
            log.info("The search space holds no more than %d trials.", self.count)
            self.num_trials = self.count
        return None

    def next_values(self, trial_id: str, attempt: int) -> dict | None:
        """The values of the next trial: the recipe's own for the first, None if the space holds no more."""
        number = self.next_number
        if number == 0:
            return search_space.values_of(self.sweep.base, self.axes)
        if self.model:
            self.of_model[trial_id] = f"{trial_id}-{attempt}"
            return self.model.suggest(self.of_model[trial_id])
        if self.plan.search in ("grid", "changes"):
            return self.points[number - 1] if number <= len(self.points) else None
        return search_space.draw(self.axes, number - 1, self.plan.search_seed)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if trial_id in self.of_model:
            known_as = self.of_model.pop(trial_id)
            self.model.on_trial_complete(known_as, result, error or METRIC not in (result or {}))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to store: the sweep's directory has everything."""

    restore = save


def build_model_search(axes: search_space.Axes, plan: SweepPlan, known: list[Trial]) -> Searcher:
    """Optuna's tree of Parzen estimators, with the scores of the trials of an earlier command."""
    from ray.tune.search.optuna import OptunaSearch

    space = {
        name: tune.loguniform(axis.low, axis.high) if isinstance(axis, LogRange) else tune.choice(axis)
        for name, axis in axes.items()
    }
    # Another seed after each resume, or the same first points would be suggested again.
    search = OptunaSearch(OptunaSearch.convert_search_space(space), METRIC, "max", seed=(plan.search_seed + len(known)) % 2**32)
    for trial in known:
        reached = [row[METRIC] for row in trial.record if row.get(METRIC) is not None]
        if trial.state in (FINISHED, STOPPED) and reached and trial.number:
            search.add_evaluated_point(trial.values, reached[-1])
    return search


class Rungs(ASHAScheduler):
    """Asynchronous successive halving that writes which trials it stops, and counts those of an earlier command.

    Tune does not store its rungs, and gives a resumed trial a new id: here a trial's id is its run's name.
    """

    def __init__(self, plan: SweepPlan, grace: int, epochs: int):
        # There is no rung at the last epoch: a trial that reaches it has finished.
        super().__init__(
            time_attr="epoch", max_t=epochs - 1, grace_period=grace, reduction_factor=plan.reduction, stop_last_trials=False
        )
        self.set_search_properties(METRIC, "max")
        self.epochs = epochs

    def replay(self, known: list[Trial]) -> None:
        """Fill the rungs with the records of `known`.

        Only an unfinished trial's last epoch is judged: its earlier ones were, when there were fewer trials to compare with.
        """
        records = {trial.run.path: [row for row in trial.record if row["epoch"] < self.epochs] for trial in known}
        under_way = [trial.run.path for trial in known if not trial.state and 0 < len(trial.record) < self.epochs]
        last = {path: records[path].pop() for path in under_way}
        for path in records:
            super().on_trial_add(None, _as_trial(path))
        rows = [(row, path) for path, record in records.items() for row in record]
        for row, path in sorted(rows, key=lambda pair: pair[0]["epoch"]):
            super().on_trial_result(None, _as_trial(path), row)
        for path, row in last.items():
            if super().on_trial_result(None, _as_trial(path), row) == TrialScheduler.STOP:
                end_trial(path, STOPPED, self.reason(row))

    def reason(self, row: dict) -> str:
        """Why a trial is stopped at an epoch."""
        reached = f"{METRIC} {row[METRIC]:.4f} at epoch {row['epoch']}"
        return f"{reached}, not among the best 1 in {self._reduction_factor:g} of the trials that reached it before"

    def on_trial_add(self, tune_controller, trial) -> None:
        super().on_trial_add(tune_controller, _as_trial(trial.config["run"]))

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        path = trial.config["run"]
        action = super().on_trial_result(tune_controller, _as_trial(path), result)
        if action == TrialScheduler.STOP:
            if len(run_directory.read_record(path)) >= self.epochs:
                return TrialScheduler.CONTINUE  # it was faster than Tune, and has finished
            end_trial(path, STOPPED, self.reason(result))
        return action

    def on_trial_complete(self, tune_controller, trial, result: dict) -> None:
        super().on_trial_complete(tune_controller, _as_trial(trial.config["run"]), result)

    def on_trial_remove(self, tune_controller, trial) -> None:
        self._trial_info.pop(_as_trial(trial.config["run"]).trial_id, None)

    on_trial_error = on_trial_remove


def _as_trial(path: str) -> types.SimpleNamespace:
    """What the rungs see of the trial of a run's folder."""
    return types.SimpleNamespace(trial_id=filesystem.last_part(path))


def build_scheduler(plan: SweepPlan, base: Experiment, known: list[Trial]) -> TrialScheduler:
    """Early stopping, if it is asked for and there is an epoch to save."""
    grace, epochs = first_rung(plan, base), base.train.epochs
    if plan.stop_early and grace < epochs:
        scheduler = Rungs(plan, grace, epochs)
        scheduler.replay(known)
        return scheduler
    if plan.stop_early:
        log.info("No trial is stopped early: the first comparison would be at epoch %d of %d.", grace, epochs)
    return FIFOScheduler()


class Progress(tune.Callback):
    """Logs a line for each epoch of each trial, ends the trials that Tune gives up, and frees what ended trials reserved.

    `on_end` is called whenever a trial has ended.
    """

    def __init__(self, on_end: Callable[[], None]):
        self.on_end = on_end
        self.leaving: list[tuple[float, str]] = []

    def on_step_end(self, iteration: int, trials: list, **info) -> None:
        while self.leaving and time.monotonic() >= self.leaving[0][0]:
            ray_runtime.free_placement(self.leaving.pop(0)[1])

    def on_trial_result(self, iteration: int, trials: list, trial, result: dict, **info) -> None:
        name = filesystem.last_part(trial.config["run"])
        ended = sum(other.is_finished() for other in trials)
        if METRIC in result:
            log.info("%s  epoch %d  %s %.4f  (%d trials ended)", name, result["epoch"], METRIC, result[METRIC], ended)

    def on_trial_complete(self, iteration: int, trials: list, trial, **info) -> None:
        self.leaving.append((time.monotonic() + SECONDS_TO_LEAVE, trial.config["run"]))
        self.on_end()

    def on_trial_error(self, iteration: int, trials: list, trial, **info) -> None:
        path = trial.config["run"]
        noted = filesystem.join(path, ERROR)
        reason = filesystem.read_bytes(noted).decode() if filesystem.exists(noted) else "its process died twice"
        end_trial(path, FAILED, reason)
        log.warning("%s failed: %s", filesystem.last_part(path), reason)
        self.on_trial_complete(iteration, trials, trial)
