"""Ray Tune's callbacks during a sweep: the next trial, the training of a trial, and early stopping.

Each trial is its own Ray Train run, started and resumed like any other; Tune supervises them and stores nothing itself.
"""

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

from ray import cloudpickle, tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from heartseg.config.experiment import from_json, to_json
from heartseg.errors import StorageError, UserError
from heartseg.shards.reader import Shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from heartseg.tuning import search_space
from heartseg.tuning import sweep as sweeps
from jobs.support import command_line, ray_runtime, ray_training
from jobs.support.command_line import log

# Seconds until Ray Train's controller has ended after its trial's actor; until then it would replace lost workers.
SECONDS_TO_LEAVE = 10.0
MOST_DRAWS = 1000  # points in a row that are trials already, after which a space counts as exhausted


def train_trial(config: dict) -> None:
    """Train one trial to its end, in an actor of Tune's, and record its outcome, since Tune's result is not stored."""
    # No lock: the sweep's own covers its trials, and a trial that Tune ends would leave its lock behind.
    command_line.configure_logging()
    run, experiment = run_directory.find_run(config["run"]), from_json(config["experiment"])
    try:
        ray_training.train_with_ray(experiment, run, trial=config["resources"])
    except ray_training.WorkersDied:
        raise  # not final: Tune tries once more after this and any unexpected error, including outages
    except UserError as error:
        sweeps.end_trial(run.path, sweeps.FAILED, str(error))
        return
    sweeps.end_trial(run.path, sweeps.FINISHED)


class Suggestions(Searcher):
    """Trials to train: first those that an earlier command left unfinished, then new ones, starting with the recipe itself."""

    def __init__(self, sweep: sweeps.Sweep, shards: Shards, num_trials: int, resources: dict):
        super().__init__(metric=sweeps.METRIC, mode="max")
        self.sweep, self.shards, self.num_trials, self.resources = sweep, shards, num_trials, resources
        known = sweeps.read_trials(sweep)
        self.waiting = [trial for trial in known if not trial.state]
        self.last_number = max((trial.number for trial in known), default=-1)
        self.tried = [trial.values for trial in known]
        self.model, self.of_model = build_model_search(sweep, known) if sweep.plan.search == "optuna" else None, {}
        self.drawn = 0  # points so far; not a generator, since Tune pickles its searcher

    def suggest(self, trial_id: str) -> dict | str:
        trial = self.waiting.pop(0) if self.waiting else self.new_trial(trial_id)
        if trial is None:
            return Searcher.FINISHED
        experiment = to_json(search_space.apply(self.sweep.base, trial.values))
        return {"run": trial.run.path, "experiment": experiment, "resources": self.resources}

    def new_trial(self, trial_id: str) -> sweeps.Trial | None:
        """The next point that is not yet a trial; None if there are enough trials or no more points."""
        if len(self.tried) >= self.num_trials:
            return None
        points = enumerate(sweeps.candidates(self.sweep))
        for number, point in itertools.islice(points, self.drawn, self.drawn + MOST_DRAWS):
            self.drawn = number + 1
            name = str(number) if self.model and number else ""  # the model's name for the point; the first one is the recipe
            values = self.model.suggest(name) if name else point
            if values not in self.tried:
                self.tried.append(values)
                self.of_model[trial_id] = name
                self.last_number += 1
                return sweeps.add_trial(self.sweep, self.shards, self.last_number, values)
            if name:
                self.model.on_trial_complete(name, error=True)  # an untrained point has no score
        log.info("The search space is exhausted after %d trials.", len(self.tried))
        self.num_trials = len(self.tried)
        return None

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if name := self.of_model.pop(trial_id, None):
            self.model.on_trial_complete(name, result, error or sweeps.METRIC not in (result or {}))

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the sweep's directory holds everything."""

    restore = save


def build_model_search(sweep: sweeps.Sweep, known: list[sweeps.Trial]) -> Searcher:
    """Optuna's tree-structured Parzen estimator, given the scores of earlier commands' trials."""
    from ray.tune.search.optuna import OptunaSearch

    axes = search_space.make_axes(sweep.plan.space, sweep.base)
    space = {name: tune.loguniform(*axis) if name == search_space.RATE else tune.choice(axis) for name, axis in axes.items()}
    # Another seed after each resume: otherwise the same first points would be suggested again.
    seed = (sweep.plan.search_seed + len(known)) % 2**32
    search = OptunaSearch(OptunaSearch.convert_search_space(space), sweeps.METRIC, "max", seed=seed)
    for trial in known:
        reached = [row[sweeps.METRIC] for row in trial.record if not math.isnan(row.get(sweeps.METRIC, math.nan))]
        if trial.state in (sweeps.FINISHED, sweeps.STOPPED) and reached and trial.number:
            search.add_evaluated_point(trial.values, reached[-1])
    return search


class Rungs(FIFOScheduler):
    """Starts trials in order and stops those that fall behind."""

    def __init__(self, sweep: sweeps.Sweep):
        super().__init__()
        self.sweep = sweep
        for trial in sweeps.read_trials(sweep):
            # The trial may have been killed between an epoch and its comparison with the others.
            if not trial.state and trial.record:
                sweeps.stop_if_behind(sweep, trial.run.path, trial.record[-1]["epoch"])

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        is_behind = sweeps.stop_if_behind(self.sweep, trial.config["run"], result.get("epoch", 0))
        return TrialScheduler.STOP if is_behind else TrialScheduler.CONTINUE


class Progress(tune.Callback):
    """Logs epochs, records trials that Tune gives up, frees ended trials' reservations; calls `on_end` after each trial."""

    def __init__(self, on_end: Callable[[], None]):
        self.on_end = on_end
        self.leaving: list[tuple[float, str]] = []
        self.outage: StorageError | None = None  # the first that left a trial unfinished

    def on_step_end(self, iteration: int, trials: list, **info) -> None:
        while self.leaving and time.monotonic() >= self.leaving[0][0]:
            ray_runtime.free_placement(self.leaving.pop(0)[1])

    def on_trial_result(self, iteration: int, trials: list, trial, result: dict, **info) -> None:
        if sweeps.METRIC in result:
            name, ended = filesystem.last_part(trial.config["run"]), sum(other.is_finished() for other in trials)
            score = f"{sweeps.METRIC} {result[sweeps.METRIC]:.4f}"
            log.info("%s  epoch %d  %s  (%d trials ended)", name, result["epoch"], score, ended)

    def on_trial_complete(self, iteration: int, trials: list, trial, **info) -> None:
        self.leaving.append((time.monotonic() + SECONDS_TO_LEAVE, trial.config["run"]))
        self.on_end()

    def on_trial_error(self, iteration: int, trials: list, trial, **info) -> None:
        name, file = filesystem.last_part(trial.config["run"]), trial.pickled_error_file
        error = getattr(cloudpickle.loads(Path(file).read_bytes()), "cause", None) if file else None
        if isinstance(error, StorageError):  # not the trial's fault: it can be resumed
            self.outage = self.outage or error
            log.warning("%s is not finished: %s", name, error)
        else:
            reason = command_line.first_line(error) if error else "its process died twice"
            sweeps.end_trial(trial.config["run"], sweeps.FAILED, reason)
            log.warning("%s failed: %s", name, reason)
        self.on_trial_complete(iteration, trials, trial)
