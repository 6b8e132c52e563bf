"""Sweeps without a cluster: which trials there are, which of them are stopped, what a sweep's directory tells."""

import json
import os
import types
from dataclasses import replace
from unittest import mock

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler

from heartseg.config.experiment import from_json, identity
from heartseg.config.recipes import quick
from heartseg.errors import UserError
from heartseg.reporting import sweep_page, sweep_plots
from heartseg.shards.reader import hold_out, open_shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from heartseg.tuning import search_space
from heartseg.tuning import sweep as sweeps
from heartseg.tuning.search_space import LogRange, SearchSpace, make_axes
from heartseg.tuning.sweep import FAILED, FINISHED, METRIC, STOPPED, SweepPlan
from helpers.experiments import tiny_experiment
from jobs import train, tune
from jobs.support import ray_trials

SPACE = SearchSpace(schedules=("cosine", "step", "one_cycle"), momentum=(0.8, 0.9), lr_points=2)


@pytest.fixture()
def held(shards):
    """The shards with a validation group held out of the training group."""
    return hold_out(open_shards(shards), 0.3)


def test_a_grid_has_every_combination_once_and_its_beginning_every_schedule():
    points = search_space.grid(make_axes(SPACE, quick()), SPACE.lr_points, seed=3)
    assert len(points) == 3 * 2 * 2 == len({json.dumps(point, sort_keys=True) for point in points})
    assert {point["schedule.kind"] for point in points[:3]} == set(SPACE.schedules)
    assert {point["optim.lr"] for point in points} == {0.0006, 0.006}
    assert LogRange(1e-4, 1e-2).points(3) == pytest.approx([1e-4, 1e-3, 1e-2])
    assert LogRange(1e-4, 1e-2).points(1) == pytest.approx([1e-3])


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


@pytest.mark.parametrize(
    "plan, says",
    [
        *(
            (SweepPlan(SearchSpace(changes=changes), search="changes"), says)
            for changes, says in [
                ((), "name at least one"), (("optim.lr",), "is not a change"), (("optim.speed=1",), "which no experiment has"),
                (("optim.lr=-1",), "optim.lr must be above 0"), (("optim.lr=0.002,",), "is not a change"),
                (("train.seed=0",), "is the recipe itself"), (("name.x=1",), "names name.x, which no"),
                (("optim.lr=fast",), "optim.lr"),
            ]
        ),
        (SweepPlan(SearchSpace(momentum=(0.9, 1.5))), "momentum"),
        (SweepPlan(SearchSpace(batch_size=(1,))), "batch_size"),
    ],
)  # fmt: skip
def test_a_trial_that_makes_no_experiment_is_refused_before_anything_starts(plan, says, shards, tmp_path):
    options = tune.Options(plan=plan)
    with pytest.raises(UserError, match=says):
        tune.run(tiny_experiment(data=shards, runs=str(tmp_path)), options)
    assert not list(tmp_path.iterdir())


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
    page = filesystem.read_bytes(sweep_page.write_page(opened, table)).decode()
    assert "optim.lr=0.01" in page and "base rates" not in page
    assert "Each change against the recipe" in page
    (axes,) = sweep_plots.differences(table, sweep_page.SCORE).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["train.seed=1", "optim.lr=0.01", "the recipe"]
    assert [text.get_text() for text in axes.child_axes[0].get_yticklabels()] == ["+0.2000", "+0.1000", "+0.0000"]


def test_the_held_out_patients_come_from_the_training_group_alone(shards):
    opened = open_shards(shards)
    held = hold_out(opened, 0.3)
    assert set(held.groups) == {"train", "val"} and len(held.groups["val"]) == 2
    assert sorted(held.groups["train"] + held.groups["val"]) == sorted(opened.groups["train"])
    assert held.groups == hold_out(opened, 0.3).groups and held.fingerprint != opened.fingerprint
    assert hold_out(opened, 0.0) is opened


def test_a_run_with_a_holdout_never_looks_at_the_reported_group(shards, tmp_path):
    experiment = tiny_experiment(data=shards, runs=str(tmp_path))
    experiment = replace(experiment, train=replace(experiment.train, epochs=1, holdout=0.3))
    path = train.run(experiment, train.Options(launcher="plain"))
    (row,) = run_directory.read_record(path)
    assert METRIC in row and not any(name.startswith("test/") for name in row)
    said = filesystem.read_json(filesystem.join(path, run_directory.DESCRIPTION))
    assert not {*said["train_patients"], *said["val_patients"]} & {*open_shards(shards).groups["test"]}


@pytest.fixture()
def sweep(held, shards, tmp_path):
    """A sweep of four trials as a sweep leaves them, their records made by hand: finished, stopped, failed, under way."""
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


def test_the_table_ranks_finished_trials_before_those_that_could_not_show_their_best(sweep):
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


def test_best_json_is_a_complete_experiment_whose_run_is_the_trials(sweep):
    _, best = sweeps.write_results(sweep)
    there = from_json(filesystem.read_json(filesystem.join(sweep.path, "best.json")))
    assert there == best and there.tracking.group == "" and not there.runs.startswith(sweep.path)
    assert identity(there) == sweeps.read_trials(sweep)[0].run.description["identity"]


def test_the_same_command_finds_the_sweep_and_another_one_is_refused(sweep, held):
    base = replace(sweep.base, runs=os.path.dirname(sweep.path), ingest="auto")
    same = sweeps.open_sweep(replace(base, data="/elsewhere", workers=2), held, SweepPlan())
    assert same.path == sweep.path and (same.base.data, same.base.workers) == ("/elsewhere", 2)
    assert sweeps.open_sweep(base, held, SweepPlan(search="grid")).path != sweep.path
    with pytest.raises(UserError, match="plan.search_seed: 0 there, 1 asked"):
        sweeps.open_sweep(base, held, SweepPlan(search_seed=1), name=sweep.name)
    assert sweeps.open_sweep(base, held, SweepPlan(), fresh=True).name == f"{sweep.name}-2"


def test_a_suggestion_that_a_kill_left_without_its_run_is_completed(sweep, held):
    begun = filesystem.join(sweep.base.runs, "009-cosine")
    filesystem.publish_json(filesystem.join(begun, sweeps.SUGGESTION), {"number": 9, "values": {"schedule.kind": "cosine"}})
    assert len(sweeps.read_trials(sweep)) == 4
    sweeps.repair_incomplete_trials(sweep, held)
    assert sweeps.read_trials(sweep)[-1].number == 9


def live(name: str) -> types.SimpleNamespace:
    """A trial as Tune has it: an id of its own, and the path of a run, which cannot be written, in its configuration."""
    return types.SimpleNamespace(trial_id=f"tune's {name}", config={"run": f"/dev/null/{name}"})


def tell(scheduler: ray_trials.Rungs, name: str, epoch: int, score: float) -> str:
    return scheduler.on_trial_result(None, live(name), {"epoch": epoch, METRIC: score})


def remembered(name: str, scores: list[float], state: str = "") -> types.SimpleNamespace:
    """A trial of an earlier command."""
    record = [{"epoch": epoch, METRIC: score} for epoch, score in enumerate(scores, 1)]
    return types.SimpleNamespace(run=types.SimpleNamespace(path=f"/dev/null/{name}", name=name), record=record, state=state)


@given(data=st.data(), epochs=st.integers(3, 12), reduction=st.sampled_from([2.0, 3.0]))
def test_rungs_filled_from_records_decide_about_a_new_trial_as_undisturbed_ones_would(data, epochs, reduction):
    plan, undisturbed = SweepPlan(reduction=reduction), ray_trials.Rungs(SweepPlan(reduction=reduction), 1, epochs)
    score = st.floats(0, 1)
    known = [
        remembered(str(number), data.draw(st.lists(score, max_size=epochs - 1)), STOPPED)
        for number in range(data.draw(st.integers(1, 6)))
    ]
    undisturbed.replay([])
    for trial in known:
        undisturbed.on_trial_add(None, live(trial.run.name))
    with mock.patch.object(ray_trials, "end_trial"), mock.patch.object(run_directory, "read_record", return_value=[]):
        for epoch in range(1, epochs):
            for trial in known:
                for row in trial.record[epoch - 1 : epoch]:
                    tell(undisturbed, trial.run.name, epoch, row[METRIC])
        resumed = ray_trials.Rungs(plan, 1, epochs)
        resumed.replay(known)
        for scheduler in (undisturbed, resumed):
            scheduler.on_trial_add(None, live("new"))
        for epoch in range(1, epochs):
            value = data.draw(score)
            assert tell(undisturbed, "new", epoch, value) == tell(resumed, "new", epoch, value)


def test_a_resumed_trial_that_was_best_at_its_rung_is_not_judged_there_again():
    resumed = ray_trials.Rungs(SweepPlan(reduction=3.0), 1, 9)
    resumed.replay([remembered("weak", [0.4], STOPPED), remembered("best", [0.5])])
    resumed.on_trial_add(None, live("best"))
    assert tell(resumed, "best", 2, 0.3) == TrialScheduler.CONTINUE  # a dip between two rungs


def test_a_trial_that_had_passed_its_rung_or_has_come_to_its_end_is_not_stopped_at_the_resume(sweep):
    first, _, _, last = sweeps.read_trials(sweep)
    os.remove(filesystem.join(first.run.path, sweeps.OUTCOME))  # complete, and killed before it could say so
    run_directory.write_record(
        last.run.path, [{"epoch": e, METRIC: v, "seconds": 1.0} for e, v in enumerate([0.15, 0.16, 0.9], 1)]
    )
    ray_trials.build_scheduler(SweepPlan(reduction=2.0, grace_epochs=2), sweep.base, sweeps.read_trials(sweep))
    assert [trial.state for trial in sweeps.read_trials(sweep)] == ["", STOPPED, FAILED, ""]


def test_a_trial_whose_last_epoch_the_rungs_would_have_stopped_is_stopped_at_the_resume(sweep):
    under_way = sweeps.read_trials(sweep)[3]
    run_directory.write_record(under_way.run.path, [{"epoch": 1, METRIC: 0.05, "seconds": 1.0}])
    ray_trials.build_scheduler(SweepPlan(reduction=2.0, grace_epochs=1), sweep.base, sweeps.read_trials(sweep))
    assert sweeps.read_trials(sweep)[3].state == STOPPED


def test_the_first_rung_waits_for_the_warm_up():
    base = quick()
    assert sweeps.first_rung(SweepPlan(), base) == 2  # its warm-up takes one epoch
    longer = SweepPlan(SearchSpace(warmup_epochs=(0.0, 2.5)))
    assert sweeps.first_rung(longer, base) == 4 and sweeps.first_rung(replace(longer, grace_epochs=1), base) == 1


def test_an_outcome_that_is_there_stays_and_failures_can_be_forgotten(sweep):
    first = sweeps.read_trials(sweep)[0]
    sweeps.end_trial(first.run.path, STOPPED, "a moment too late")
    assert sweeps.read_trials(sweep)[0].state == FINISHED
    sweeps.forget_failures(sweep)
    assert [trial.state for trial in sweeps.read_trials(sweep)] == [FINISHED, STOPPED, "", ""]


@pytest.mark.parametrize("name", ["../up", " ", "a/b"])
def test_a_name_that_is_no_folder_is_refused(sweep, held, name):
    with pytest.raises(UserError, match="--sweep-name"):
        sweeps.open_sweep(sweep.base, held, SweepPlan(), name)


def test_no_trial_is_stopped_at_its_last_epoch():
    scheduler = ray_trials.Rungs(SweepPlan(reduction=2.0), 1, 4)
    for name, scores in {"good": [0.9, 0.9, 0.9, 0.9], "late": [0.95, 0.95, 0.95, 0.1]}.items():
        scheduler.on_trial_add(None, live(name))
        assert {tell(scheduler, name, epoch, score) for epoch, score in enumerate(scores, 1)} == {TrialScheduler.CONTINUE}


def test_the_page_needs_no_network_and_says_who_won_and_what_was_saved(sweep):
    table, _ = sweeps.write_results(sweep)
    page = filesystem.read_bytes(sweep_page.write_page(sweep, table)).decode()
    assert "000-constant" in page and "25 % saved" in page and "no memory" in page
    assert page.count("<svg") == 3 and "<script" not in page and "<img" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    assert "schedule.kind" in sweep_page.show_table(table).splitlines()[0]


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_grids_and_draws_begin_with_the_recipe_try_nothing_twice_and_end_with_their_space(sweep, held, search):
    base = replace(sweep.base, runs=os.path.dirname(sweep.path), ingest="auto")
    small = SweepPlan(SearchSpace(schedules=("cosine", "step"), lr_factors=(1.0, 1.0)), search=search)
    asked = ray_trials.Suggestions(sweeps.open_sweep(base, held, small), held, small, 12, {})
    assert [asked.suggest(str(number)) == "FINISHED" for number in range(3)] == [False, False, True]
    plan = SweepPlan(SearchSpace(schedules=("cosine", "step"), lr_factors=(1.0, 2.0), lr_points=2), search=search)
    opened = sweeps.open_sweep(base, held, plan)
    asked = ray_trials.Suggestions(opened, held, plan, 4, {})
    given_out = [asked.suggest(str(number)) for number in range(6)]
    found = sweeps.read_trials(opened)
    assert [trial.number for trial in found][0] == 0 and found[0].values["optim.lr"] == base.optim.lr
    assert len({json.dumps(trial.values) for trial in found}) == len(found) == 4
    assert given_out[4:] == ["FINISHED", "FINISHED"]
    # The same command again: what is unfinished comes first, in order, and no new trial is needed.
    again = ray_trials.Suggestions(opened, held, plan, 5, {})
    assert [again.suggest(str(n))["run"] for n in range(4)] == [trial.run.path for trial in found]
    assert (again.suggest("4") == "FINISHED") == (search == "grid")  # whose four combinations are used up


def test_a_sweep_without_a_trial_has_tables_and_a_page(sweep, held):
    empty = sweeps.open_sweep(replace(sweep.base, runs=os.path.dirname(sweep.path)), held, SweepPlan(), "empty")
    table, best = sweeps.write_results(empty)
    assert best is None and "No trial has finished" in filesystem.read_bytes(sweep_page.write_page(empty, table)).decode()
