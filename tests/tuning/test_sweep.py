"""Sweeps without a cluster: their trials, early stopping, and the contents of a sweep's directory."""

import json
import os
import types
from dataclasses import replace

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler

from heartseg.config.experiment import from_json, identity, to_json
from heartseg.config.recipes import quick
from heartseg.errors import UserError
from heartseg.reporting import sweep_page
from heartseg.shards.reader import hold_out, open_shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from heartseg.tuning import search_space
from heartseg.tuning import sweep as sweeps
from heartseg.tuning.search_space import SearchSpace, make_axes
from heartseg.tuning.sweep import FAILED, FINISHED, METRIC, STOPPED, SweepPlan
from helpers.experiments import tiny_experiment
from helpers.pages import outside_links
from jobs import tune
from jobs.support import ray_trials


def page_of(sweep: sweeps.Sweep, table: pandas.DataFrame) -> str:
    return filesystem.read_bytes(sweep_page.write_page(sweep, table)).decode()


SPACE = SearchSpace(schedules=("cosine", "step", "one_cycle"), momentum=(0.8, 0.9), lr_points=2)


@pytest.fixture()
def held(shards):
    return hold_out(open_shards(shards), 0.3)


def test_a_grid_has_every_combination_once_and_its_beginning_every_schedule():
    points = search_space.grid(make_axes(SPACE, quick()), SPACE.lr_points, seed=3)
    assert len(points) == 3 * 2 * 2 == len({json.dumps(point, sort_keys=True) for point in points})
    assert {point["schedule.kind"] for point in points[:3]} == set(SPACE.schedules)
    assert {point["optim.lr"] for point in points} == {0.0006, 0.006}
    axes = {"schedule.kind": ("cosine",), "optim.lr": (1e-4, 1e-2)}
    for lr_points, rates in ((3, {1e-4, 1e-3, 1e-2}), (1, {1e-3})):
        assert {point["optim.lr"] for point in search_space.grid(axes, lr_points, seed=3)} == rates


@given(seed=st.integers(0, 1000), number=st.integers(0, 50))
def test_a_drawn_trial_depends_on_its_number_alone_and_lies_in_the_space(seed, number):
    axes = make_axes(SPACE, quick())
    point = search_space.draw(axes, number, seed)
    assert point == search_space.draw(axes, number, seed)
    assert point["schedule.kind"] == SPACE.schedules[number % 3]
    assert 0.0006 <= point["optim.lr"] <= 0.006 and point["optim.momentum"] in SPACE.momentum
    assert search_space.apply(quick(), point).optim.momentum == point["optim.momentum"]


def test_listed_changes_are_trials_of_their_own_beside_the_recipe():
    changes = ("loss.kind=cross_entropy", "optim.lr=0.004,train.seed=1", "model.aux_head=true", "schedule.milestones=[0.2,0.4]")
    own, *points = search_space.listed(quick(), changes)
    assert own["schedule.kind"] == "cosine" and all(point.keys() == own.keys() for point in points)
    described = [search_space.describe(own, point) for point in [own, *points]]
    assert described == ["-", *changes[:3], "schedule.milestones=[0.2, 0.4]"]
    changed = search_space.apply(quick(), points[1])
    assert (changed.optim.lr, changed.train.seed, changed.loss) == (0.004, 1, quick().loss)
    assert search_space.apply(quick(), points[2]).model.aux_head is True


BAD_CHANGES = [
    ((), "name at least one"), (("optim.lr",), "is not a change"), (("optim.speed=1",), "which is not a setting"),
    (("optim.lr=-1",), "optim.lr must be above 0"), (("optim.lr=0.002,",), "is not a change"),
    (("train.seed=0",), "repeats the recipe"), (("name.x=1",), "names name.x, which is not"),
    (("optim.lr=fast",), "optim.lr"), (("optim.lr=0.1,train.epochs=9",), "cannot vary train.epochs"),
]  # fmt: skip
BAD_PLANS = [(SweepPlan(SearchSpace(changes=changes), search="changes"), says) for changes, says in BAD_CHANGES]
BAD_PLANS += [(SweepPlan(SearchSpace(momentum=(1.5,))), "momentum"), (SweepPlan(SearchSpace(batch_size=(1,))), "batch_size")]


@pytest.mark.parametrize(("plan", "says"), BAD_PLANS)
def test_a_trial_that_makes_no_experiment_is_refused_before_anything_starts(plan, says, shards, tmp_path):
    with pytest.raises(UserError, match=says):
        tune.run(tiny_experiment(data=shards, runs=str(tmp_path)), tune.Options(plan=plan))
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_gpu_is_for_trials_of_one_worker(shards, tmp_path):
    experiment, options = tiny_experiment(data=shards, runs=str(tmp_path)), tune.Options(gpus_per_trial=0.25)
    with pytest.raises(UserError, match="--gpus-per-trial 0.25 needs --workers 1"):
        tune.run(replace(experiment, workers=2), options)
    with pytest.raises(UserError, match="at most 1, not 2"):
        tune.Options(gpus_per_trial=2)


def test_an_ablation_has_as_many_trials_as_changes_and_its_table_and_page_name_them(held, shards, tmp_path):
    changes = ("optim.lr=0.01", "train.seed=1")
    options = tune.Options(plan=SweepPlan(SearchSpace(changes=changes), search="changes"))
    assert options.num_trials == 3 and replace(options, trials=2).num_trials == 2
    experiment = tiny_experiment(data=shards, runs=str(tmp_path))
    opened = sweeps.open_sweep(experiment, held, options.plan)
    for number, point in enumerate(search_space.listed(opened.base, changes)):
        trial = sweeps.add_trial(opened, held, number, point)
        run_directory.write_record(trial.run.path, [{"epoch": 1, METRIC: 0.5 + number / 10, "seconds": 1.0}])
        sweeps.end_trial(trial.run.path, FINISHED)
    table, best = sweeps.write_results(opened)
    assert list(table["change"]) == ["train.seed=1", "optim.lr=0.01", "-"] and best.train.seed == 1
    page = page_of(opened, table)
    assert "optim.lr=0.01" in page and "base rates" not in page and "Each change compared with the recipe" in page
    (axes,) = sweep_page.differences(table, sweep_page.SCORE).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["train.seed=1", "optim.lr=0.01", "the recipe"]
    assert [text.get_text() for text in axes.child_axes[0].get_yticklabels()] == ["+0.2000", "+0.1000", "+0.0000"]


def test_the_held_out_patients_come_from_the_training_group_alone(shards, held):
    opened = open_shards(shards)
    assert set(held.groups) == {"train", "val"} and len(held.groups["val"]) == 2
    assert sorted(held.groups["train"] + held.groups["val"]) == sorted(opened.groups["train"])
    assert held.groups == hold_out(opened, 0.3).groups and held.fingerprint != opened.fingerprint
    assert hold_out(opened, 0.0) is opened


@pytest.fixture()
def base(sweep):
    return replace(sweep.base, runs=os.path.dirname(sweep.path), ingest="auto")


@pytest.fixture()
def sweep(held, shards, tmp_path):
    """A sweep of four trials as a sweep leaves them, with handmade records: finished, stopped, failed, under way."""
    experiment = tiny_experiment(data=shards, runs=str(tmp_path))
    experiment = replace(experiment, train=replace(experiment.train, epochs=4, holdout=0.3))
    opened = sweeps.open_sweep(experiment, held, SweepPlan())
    scores = {"constant": [0.1, 0.2, 0.5, 0.4], "cosine": [0.3, 0.9], "step": [], "one_cycle": [0.2, 0.3, 0.4, 0.45]}
    for number, (kind, reached) in enumerate(scores.items()):
        trial = sweeps.add_trial(opened, held, number, {"schedule.kind": kind, "optim.lr": 0.01 * (number + 1)})
        rows = [{"epoch": epoch, METRIC: value, "seconds": 1.5} for epoch, value in enumerate(reached, 1)]
        run_directory.write_record(trial.run.path, rows)
        states = {"constant": (FINISHED, ""), "cosine": (STOPPED, "too low"), "step": (FAILED, "no memory")}
        if kind in states:
            sweeps.end_trial(trial.run.path, *states[kind])
    return opened


def test_finished_trials_rank_before_those_that_could_not_show_their_best_and_the_first_is_the_winner(sweep):
    table, best = sweeps.write_results(sweep)
    assert list(table["trial"]) == ["000-constant", "001-cosine", "003-one_cycle", "002-step"]
    assert list(table["state"]) == [FINISHED, STOPPED, "not finished", FAILED]
    assert table.loc[0, "best_epoch"] == 3 and table.loc[0, f"last {METRIC}"] == 0.4 and table.loc[0, "seconds"] == 6.0
    assert table.loc[3, "reason"] == "no memory" and pandas.isna(table.loc[3, f"best {METRIC}"])
    assert sweeps.epochs_saved(sweep, table) == (6, 8)
    for name in ("sweep.csv", "sweep.parquet"):
        read = pandas.read_csv if name.endswith("csv") else pandas.read_parquet
        assert list(read(filesystem.join(sweep.path, name))["trial"]) == list(table["trial"])
    assert best.schedule.kind == "constant" and best.optim.lr == 0.01
    # `best.json` is a complete experiment whose run is the trial's.
    there = from_json(filesystem.read_json(filesystem.join(sweep.path, "best.json")))
    assert there == best and there.tracking.group == "" and not there.runs.startswith(sweep.path)
    assert identity(there) == sweeps.read_trials(sweep)[0].run.description["identity"]
    # The page needs no network, and shows who won and what was saved.
    page = page_of(sweep, table)
    assert "000-constant" in page and "25 % saved" in page and "no memory" in page
    assert page.count("<svg") == 3 and not outside_links(page)
    assert "schedule.kind" in sweep_page.show_table(table).splitlines()[0]


def test_a_sweep_without_a_trial_or_whose_trials_have_learned_nothing_has_a_page_and_no_winner(sweep, base, held):
    empty = sweeps.open_sweep(base, held, SweepPlan(), "empty")
    table, best = sweeps.write_results(empty)
    assert best is None and "No trial has finished" in page_of(empty, table)
    for trial in sweeps.read_trials(sweep):
        run_directory.write_record(trial.run.path, [{"epoch": e, METRIC: 0.0114 * e, "seconds": 1.0} for e in range(1, 5)])
    table, best = sweeps.write_results(sweep)
    page = page_of(sweep, table)
    assert best is None and not filesystem.exists(filesystem.join(sweep.path, "best.json"))
    assert "No trial wins: the highest val/dice of the finished trials is 0.0456" in page and 'class="hero"' not in page
    with pytest.raises(UserError, match="No trial wins.*--train.epochs"):
        tune.conclude(sweep, tune.Options())


def test_the_same_command_finds_the_sweep_and_another_one_is_refused(sweep, base, held):
    same = sweeps.open_sweep(replace(base, data="/elsewhere", workers=2), held, SweepPlan())
    assert same.path == sweep.path and (same.base.data, same.base.workers) == ("/elsewhere", 2)
    assert sweeps.open_sweep(base, held, SweepPlan(search="grid")).path != sweep.path
    with pytest.raises(UserError, match="plan.search_seed: 0 there, 1 requested"):
        sweeps.open_sweep(base, held, SweepPlan(search_seed=1), name=sweep.name)
    assert sweeps.open_sweep(base, held, SweepPlan(), fresh=True).name == f"{sweep.name}-2"
    with pytest.raises(UserError, match="--sweep-name"):
        sweeps.open_sweep(base, held, SweepPlan(), "../up")
    with pytest.raises(UserError, match=r"not a run's folder \(it has sweep.json\): give another --run-name"):
        run_directory.open_run(base, held, name=sweep.name)
    run_directory.open_run(base, held, name="a-run")
    with pytest.raises(UserError, match="not a sweep's folder"):
        sweeps.open_sweep(base, held, SweepPlan(), "a-run")


@pytest.mark.parametrize(
    ("plan", "epochs", "found"),
    [(SweepPlan(), 9, [2, 6]), (SweepPlan(), 6, [2]), (SweepPlan(grace_epochs=1, reduction=2.5), 9, [1, 3, 7]),
     (SweepPlan(SearchSpace(warmup_epochs=(0.0, 2.5))), 9, [4]), (SweepPlan(), 2, []), (SweepPlan(stop_early=False), 9, [])],
)  # fmt: skip
def test_the_first_rung_waits_for_the_warm_up_and_there_is_none_at_the_last_epoch(plan, epochs, found):
    base = replace(quick(), train=replace(quick().train, epochs=epochs))  # its warm-up takes one epoch
    assert sweeps.rungs(sweeps.Sweep("", {"plan": to_json(plan)}, base)) == found


@pytest.mark.parametrize(
    ("scores", "epoch", "state"),
    [([0.2, 0.6], 2, STOPPED), ([0.2, 0.7], 2, ""), ([0.2], 1, ""), ([0.9, 0.8, 0.1], 3, ""), ([0.2, 0.6, 0.6, 0.6], 2, ""),
     ([0.2, None], 2, "")],
    ids=["behind", "among the best third", "before the rung", "a dip after it", "finished before Tune knew", "no score"],
)  # fmt: skip
@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_trial_is_stopped_if_it_is_behind_at_a_rung_also_when_a_kill_came_in_between(sweep, scores, epoch, state, is_resumed):
    path = sweeps.read_trials(sweep)[3].run.path  # the others had 0.2 and 0.9 at the rung, epoch 2
    scheduler = None if is_resumed else ray_trials.Rungs(sweep)
    run_directory.write_record(path, [{"epoch": e, METRIC: score} for e, score in enumerate(scores, 1)])
    if scheduler:
        action = scheduler.on_trial_result(None, types.SimpleNamespace(config={"run": path}), {"epoch": epoch})
        assert action == (TrialScheduler.STOP if state else TrialScheduler.CONTINUE)
    else:
        ray_trials.Rungs(sweep)
    last = sweeps.read_trials(sweep)[3]
    assert last.state == state and ("not among the best 1 in 3" in last.reason) == bool(state)


def test_an_outcome_that_is_there_stays_and_failures_can_be_forgotten(sweep):
    finished = sweeps.read_trials(sweep)[0].run.path
    sweeps.end_trial(finished, STOPPED, "a moment too late")
    assert sweeps.read_trials(sweep)[0].state == FINISHED
    sweeps.forget_failures(sweep)
    assert [trial.state for trial in sweeps.read_trials(sweep)] == [FINISHED, STOPPED, "", ""]


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_grids_and_draws_begin_with_the_recipe_try_nothing_twice_and_end_with_their_space(base, held, search):
    small = SweepPlan(SearchSpace(schedules=("cosine", "step"), lr_factors=(1.0, 1.0)), search=search)
    asked = ray_trials.Suggestions(sweeps.open_sweep(base, held, small), held, 12, {})
    assert [asked.suggest(str(number)) == "FINISHED" for number in range(3)] == [False, False, True]
    plan = SweepPlan(SearchSpace(schedules=("cosine", "step"), lr_factors=(1.0, 2.0), lr_points=2), search=search)
    opened = sweeps.open_sweep(base, held, plan)
    asked = ray_trials.Suggestions(opened, held, 4, {})
    given_out = [asked.suggest(str(number)) for number in range(6)]
    found = sweeps.read_trials(opened)
    assert [trial.number for trial in found][0] == 0 and found[0].values["optim.lr"] == base.optim.lr
    assert len({json.dumps(trial.values) for trial in found}) == len(found) == 4
    assert given_out[4:] == ["FINISHED", "FINISHED"]
    # The same command again: what is unfinished comes first, in order, and no new trial is needed.
    again = ray_trials.Suggestions(opened, held, 5, {})
    assert [again.suggest(str(n))["run"] for n in range(4)] == [trial.run.path for trial in found]
    assert (again.suggest("4") == "FINISHED") == (search == "grid")  # whose four combinations are used up


def test_optuna_skips_points_that_are_trials_already_until_the_space_is_used_up(base, held):
    space = SearchSpace(schedules=("cosine", "step", "constant"), lr_factors=(1.0, 1.0), momentum=(0.5, 0.9))
    opened = sweeps.open_sweep(base, held, SweepPlan(space, search="optuna"))
    asked, given_out = ray_trials.Suggestions(opened, held, 12, {}), []
    while (point := asked.suggest(str(len(given_out)))) != "FINISHED":
        asked.on_trial_complete(str(len(given_out)), {METRIC: len(given_out) / 10})
        given_out.append(point)
    assert len({point["run"] for point in given_out}) == len(given_out) == 6
    assert len({tuple(trial.values.values()) for trial in sweeps.read_trials(opened)}) == 6
    # The model learns the score of each trained point once; the other points count as failed, and none is open.
    known = asked.model._ot_study.trials
    assert sorted(trial.value for trial in known if trial.state.name == "COMPLETE") == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert sum(trial.state.name == "FAIL" for trial in known) == len(known) - 5 > 0
