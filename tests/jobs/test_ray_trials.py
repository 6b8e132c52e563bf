"""What Tune asks for during a sweep: every point of a small space once, and the model learns each score."""

import os
from dataclasses import replace

import pytest

from heartseg.errors import UserError
from heartseg.shards.reader import hold_out, open_shards
from heartseg.storage import filesystem
from heartseg.tuning import search_space
from heartseg.tuning.search_space import SearchSpace
from heartseg.tuning.sweep import (
    ERROR,
    FAILED,
    METRIC,
    SweepPlan,
    add_trial,
    end_trial,
    forget_failures,
    open_sweep,
    read_trials,
)
from helpers.experiments import tiny_experiment
from jobs.support import ray_trials


@pytest.fixture()
def held(shards):
    return hold_out(open_shards(shards), 0.3)


@pytest.fixture()
def base(shards, tmp_path):
    experiment = tiny_experiment(data=shards, runs=str(tmp_path))
    return replace(experiment, train=replace(experiment.train, epochs=4, holdout=0.3))


def test_optuna_skips_points_that_are_trials_already_until_the_space_is_used_up(base, held):
    space = SearchSpace(schedules=("cosine", "step", "constant"), lr_factors=(1.0, 1.0), momentum=(0.5, 0.9))
    plan = SweepPlan(space, search="optuna")
    sweep = open_sweep(base, held, plan)
    asked, given_out = ray_trials.Suggestions(sweep, held, 12, {}), []
    while (point := asked.suggest(str(len(given_out)))) != "FINISHED":
        asked.on_trial_complete(str(len(given_out)), {METRIC: len(given_out) / 10})
        given_out.append(point)
    assert len({os.path.basename(point["run"]) for point in given_out}) == len(given_out) == 6
    values = [tuple(trial.values.values()) for trial in read_trials(sweep)]
    assert len(set(values)) == 6
    # The model learns the score of each trained point once; the other points count as failed, and none is open.
    known = asked.model._ot_study.trials
    assert sorted(trial.value for trial in known if trial.state.name == "COMPLETE") == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert sum(trial.state.name == "FAIL" for trial in known) == len(known) - 5 > 0


def test_a_sweep_cannot_vary_the_length_that_its_trials_are_compared_over(base):
    for change in ("train.epochs=9", "optim.lr=0.1,train.epochs=9"):
        with pytest.raises(UserError, match="cannot vary train.epochs"):
            search_space.listed(base, (change,))


def test_a_failed_trial_that_is_resumed_forgets_its_error(base, held):
    sweep = open_sweep(base, held, SweepPlan())
    trial = add_trial(sweep, held, 0, {"schedule.kind": "cosine"})
    filesystem.publish(filesystem.join(trial.run.path, ERROR), b"no space")
    end_trial(trial.run.path, FAILED, "no space")
    forget_failures(sweep)
    assert not filesystem.exists(filesystem.join(trial.run.path, ERROR)) and not read_trials(sweep)[0].state
