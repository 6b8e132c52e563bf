"""What Ray Tune calls during a sweep: which trial comes next, how one is trained, and which are stopped early.

Each trial is a Ray Train run of its own, begun and resumed like any other; Tune supervises them and keeps nothing itself.
"""

import logging
import types
from dataclasses import replace

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from heartseg import locks, runs, search_space, storage, sweeps
from heartseg.config import canonical, from_json, identity
from heartseg.errors import UserError
from heartseg.search_space import LogRange
from heartseg.shards import Shards
from heartseg.sweeps import METRIC, Sweep, Trial
from jobs import runtime, train

log = logging.getLogger("heartseg.jobs")
# What a trial's process last said before it gave up.
ERROR = "error.txt"


def train_trial(config: dict) -> None:
    """Train one trial to its end, in an actor of Tune's; how it ended is written down, since Tune's own word is not kept."""
    from ray.tune.integration.ray_train import TuneReportCallback

    runtime.show_log()
    run = runs.find_run(config["run"])
    experiment = replace(from_json(run.description["experiment"]), workers=config["workers"])
    runtime.free_placement(run.path)  # of an actor before this one, which died
    try:
        with locks.lock(run.path):
            train.train_with_ray(experiment, run, resources=config["resources"], callbacks=[TuneReportCallback()])
    except UserError as error:
        sweeps.end_trial(run.path, sweeps.FAILED, str(error))
        return  # trying again would not help
    except Exception as error:
        # No end yet: Tune tries once more, and all of this may be the end of the sweep's own process.
        storage.publish(storage.join(run.path, ERROR), (str(error).partition("\n")[0] or type(error).__name__).encode())
        raise
    sweeps.end_trial(run.path, sweeps.FINISHED)


class Suggestions(Searcher):
    """Trials to be trained: first those that an earlier command left unfinished, then new ones, the recipe itself first."""

    def __init__(self, sweep: Sweep, shards: Shards, plan: sweeps.Plan, num_trials: int, config: dict):
        super().__init__(metric=METRIC, mode="max")
        self.sweep, self.shards, self.plan, self.config = sweep, shards, plan, config
        self.num_trials = num_trials
        self.axes = search_space.make_axes(plan.space, sweep.base)
        known = sweeps.read_trials(sweep)
        self.waiting = [trial for trial in known if not trial.state]
        self.count, self.next_number = len(known), 1 + max((trial.number for trial in known), default=-1)
        self.seen = {canonical(trial.run.description["identity"]) for trial in known}
        self.points = search_space.grid(self.axes, plan.space.lr_points, plan.seed) if plan.search == "grid" else []
        self.model = build_model_search(self.axes, plan, known) if plan.search == "optuna" else None
        self.of_model: set[str] = set()

    def suggest(self, trial_id: str) -> dict | str:
        trial = self.waiting.pop(0) if self.waiting else self.new_trial(trial_id)
        return self.config | {"run": trial.run.path} if trial else Searcher.FINISHED

    def new_trial(self, trial_id: str) -> Trial | None:
        """The next point that is not yet a trial; None where there are enough, or a grid is used up."""
        while self.count < self.num_trials:
            values = self.next_values(trial_id)
            if values is None:
                return None
            number, self.next_number = self.next_number, self.next_number + 1
            asked = canonical(identity(search_space.apply(self.sweep.base, values)))
            if asked not in self.seen:
                self.seen.add(asked)
                self.count += 1
                return sweeps.add_trial(self.sweep, self.shards, number, values)
        return None

    def next_values(self, trial_id: str) -> dict | None:
        """What the next trial varies: the recipe's own values for the first."""
        number = self.next_number
        if number == 0:
            return search_space.values_of(self.sweep.base, self.axes)
        if self.model:
            self.of_model.add(trial_id)
            return self.model.suggest(trial_id)
        if self.plan.search == "grid":
            return self.points[number - 1] if number <= len(self.points) else None
        return search_space.draw(self.axes, number - 1, self.plan.seed)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if trial_id in self.of_model:
            self.model.on_trial_complete(trial_id, result, error or METRIC not in (result or {}))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's directory has it all."""

    restore = save


def build_model_search(axes: search_space.Axes, plan: sweeps.Plan, known: list[Trial]) -> Searcher:
    """Optuna's tree of Parzen estimators, told what the trials of an earlier command reached."""
    try:
        from ray.tune.search.optuna import OptunaSearch

        space = {
            name: tune.loguniform(axis.low, axis.high) if isinstance(axis, LogRange) else tune.choice(axis)
            for name, axis in axes.items()
        }
        # Another seed after each resume, or the same first points would be suggested again.
        search = OptunaSearch(OptunaSearch.convert_search_space(space), METRIC, "max", seed=plan.seed + len(known))
    except (ImportError, AssertionError) as error:
        raise UserError("--search optuna needs Optuna: pip install 'heartseg[optuna]', or take --search random.") from error
    for trial in known:
        reached = [row[METRIC] for row in trial.record if row.get(METRIC) is not None]
        if trial.state in (sweeps.FINISHED, sweeps.STOPPED) and reached and trial.number:
            search.add_evaluated_point(trial.values, reached[-1])
    return search


class Rungs(ASHAScheduler):
    """Asynchronous successive halving that writes down whom it stops, and knows what trials of an earlier command reached.

    Tune does not keep its rungs over a restart: without them, a resumed sweep would let trials go on that the first would stop.
    """

    def __init__(self, plan: sweeps.Plan, epochs: int, known: list[Trial]):
        # No rung at the last epoch: whoever comes there has finished.
        super().__init__(
            time_attr="epoch",
            max_t=epochs - 1,
            grace_period=plan.grace_epochs,
            reduction_factor=plan.reduction,
            stop_last_trials=False,
        )
        self.set_search_properties(METRIC, "max")
        self.epochs, self.known = epochs, known

    def replay(self) -> None:
        """Fill the rungs with the records of `known`; trials in progress that they would have stopped are stopped now."""
        stand_ins = {trial.run.path: types.SimpleNamespace(trial_id=trial.run.name) for trial in self.known}
        for stand_in in stand_ins.values():
            self.on_trial_add(None, stand_in)
        actions = {}
        rows = [(row, trial) for trial in self.known for row in trial.record]
        for row, trial in sorted(rows, key=lambda pair: pair[0]["epoch"]):
            if row["epoch"] < self.epochs:
                action = super().on_trial_result(None, stand_ins[trial.run.path], row)
                actions.setdefault(trial.run.path, []).append(action)
        for trial in self.known:
            if not trial.state and TrialScheduler.STOP in actions.get(trial.run.path, []):
                sweeps.end_trial(trial.run.path, sweeps.STOPPED, "early, before the sweep was resumed")

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP:
            reached = f"{METRIC} {result[METRIC]:.4f} at epoch {result['epoch']}"
            reason = f"{reached}, not among the best 1 in {self._reduction_factor:g} of those that came there before"
            sweeps.end_trial(trial.config["run"], sweeps.STOPPED, reason)
        return action


def build_scheduler(plan: sweeps.Plan, epochs: int, known: list[Trial]) -> TrialScheduler:
    """Early stopping where it is asked for and there is an epoch to save."""
    if not plan.stop_early or epochs - 1 < plan.grace_epochs:
        return FIFOScheduler()
    scheduler = Rungs(plan, epochs, known)
    scheduler.replay()
    return scheduler


class Progress(tune.Callback):
    """One line for each epoch of each trial, a reason for every trial that Tune gives up, and room where one has ended."""

    def on_trial_result(self, iteration: int, trials: list, trial, result: dict, **info) -> None:
        name = storage.last_part(trial.config["run"])
        ended = sum(other.is_finished() for other in trials)
        log.info("%s  epoch %d  %s %.4f  (%d trials ended)", name, result["epoch"], METRIC, result[METRIC], ended)

    def on_trial_complete(self, iteration: int, trials: list, trial, **info) -> None:
        runtime.free_placement(trial.config["run"])

    def on_trial_error(self, iteration: int, trials: list, trial, **info) -> None:
        path = trial.config["run"]
        runtime.free_placement(path)
        said = storage.join(path, ERROR)
        reason = storage.read_bytes(said).decode() if storage.exists(said) else "its process died twice"
        sweeps.end_trial(path, sweeps.FAILED, reason)
        log.warning("%s failed: %s", storage.last_part(path), reason)
