"""An outage of the storage at any call of any job: the job stops, and nothing is deleted, overwritten or called damaged."""

import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from heartseg.errors import StorageError, UserError
from heartseg.shards import preprocessing
from heartseg.storage import filesystem, locks
from heartseg.training import distributed
from heartseg.training.worker import train_rank
from heartseg.tuning.search_space import SearchSpace
from heartseg.tuning.sweep import SweepPlan
from helpers.experiments import tiny_experiment
from jobs import compare, evaluate, export, inspect_shards, pipeline, predict, preprocess, train, tune
from jobs.support import evaluation, ray_preprocessing, ray_runtime, ray_training

PLAIN = {"launcher": "plain"}
STATE = "results/pipeline.json"  # holds how a stage ended, also with an error
# Advice that would cost a user data, and words for what an outage is not.
DESTRUCTIVE = re.compile(
    r"--(overwrite|fresh|force|resplit)|remove|delete|damaged|missing|not valid|does not exist|no finished"
)


class Flaky:
    """A file system that keeps the stack of each call; the `fail_at`-th raises pyarrow's error for a silent store."""

    def __init__(self, fail_at: int = 0):
        self.stacks, self.fail_at, self.real = [], fail_at, filesystem.resolve

    def resolve(self, path: str) -> tuple["Flaky", str]:
        self.fs, inner = self.real(path)
        return self, inner

    def __getattr__(self, name: str) -> Callable:
        method = getattr(self.fs, name)

        def call(*arguments, **options):
            frames = [(frame.f_globals.get("__name__", ""), line) for frame, line in traceback.walk_stack(None)]
            self.stacks.append([name, *(place for place in frames if place[0].startswith(("heartseg.", "jobs.")))])
            if len(self.stacks) == self.fail_at:
                raise OSError(f"When {name}: AWS Error NETWORK_CONNECTION. Details: injected")
            return method(*arguments, **options)

        return call


TRIED: set[tuple] = set()  # lines of ours, each with the line that called it, through which the jobs before met an outage


def one_from_each_place(stacks: list[list]) -> list[int]:
    """The numbers of calls that together come through each such pair of lines that no job before had."""
    numbers = []
    for number, stack in enumerate(stacks, 1):
        if not TRIED.issuperset(steps := list(zip(stack, stack[1:], strict=False))):
            numbers.append(number)
            TRIED.update(steps)
    return numbers


def experiment(at: str, seed: int = 0, **changes):
    base = tiny_experiment(source=f"{at}/source", data=f"{at}/shards", runs=f"{at}/runs", **changes)
    return replace(base, train=replace(base.train, epochs=1, seed=seed))


def run_pipeline(at: str, **options) -> str:
    return pipeline.run(replace(experiment(at, out=f"{at}/results"), data=""), pipeline.PipelineOptions(retries=0, **options))


def run_unrecorded(at: str) -> str:
    """Over complete shards, which the stage must not take for outdated."""
    os.remove(f"{at.removeprefix('file://')}/{STATE}")
    return run_pipeline(at, until="preprocess")


# Each works below a folder that `world` has filled, and gets its URI.
CHEAP = {
    "preprocess": lambda at: preprocess.run(experiment(at, out=f"{at}/new"), preprocess.Options(**PLAIN)),
    "preprocess, complete": lambda at: preprocess.run(experiment(at, out=f"{at}/shards"), preprocess.Options(**PLAIN)),
    "inspect_shards --verify": lambda at: inspect_shards.run(inspect_shards.Options(f"{at}/shards", verify=True)),
    "pipeline, preprocess": lambda at: run_pipeline(at, until="preprocess"),
    "pipeline, preprocess, unrecorded": run_unrecorded,
    "pipeline status": lambda at: pipeline.show_status(f"{at}/results"),
}
DEAR = {
    "train": lambda at: train.run(experiment(at, seed=7), train.Options(**PLAIN)),
    "train, finished": lambda at: train.run(experiment(at), train.Options(**PLAIN)),
    "evaluate": lambda at: evaluate.run(evaluate.Options(checkpoint=one_run(at), out=f"{at}/scores", **PLAIN)),
    "predict": lambda at: predict.run(predict.Options(one_run(at), f"{at}/source", f"{at}/predictions", overlays="off")),
    "compare": lambda at: compare.run(compare.Options(runs=(f"{at}/runs",), out=f"{at}/compared")),
    "export": lambda at: export.run(export.Options(one_run(at), f"{at}/exported")),
    "pipeline, all stages": lambda at: run_pipeline(at, predict=f"{at}/source"),
    "tune": lambda at: sweep(at, "another"),
    "tune, finished": lambda at: sweep(at, "sweep"),
}


def sweep(at: str, name: str) -> None:
    """A sweep of two trials of one epoch on Ray; the outage is the driver's."""
    base = experiment(at)
    held_out = replace(base, train=replace(base.train, holdout=0.3), runs=f"{at}/sweeps")
    plan = SweepPlan(SearchSpace(schedules=("cosine",), lr_points=2), search="grid", stop_early=False)
    try:
        tune.run(held_out, tune.Options(plan, trials=2, sweep_name=name))
    except UserError as error:
        assert "No trial wins" in str(error)  # after one epoch


def one_run(at: str) -> str:
    folder = Path(at.removeprefix("file://"), "runs")
    return f"{at}/runs/{min(os.listdir(folder))}"


@pytest.fixture(scope="module")
def world(phantom, tmp_path_factory) -> Path:
    """A source, its shards, the pipeline that made them, and the folder of runs."""
    folder = tmp_path_factory.mktemp("world")
    at = f"file://{folder}"
    shutil.copytree(phantom, folder / "source")
    preprocess.run(experiment(at, out=f"{at}/shards"), preprocess.Options(**PLAIN))
    with pytest.MonkeyPatch.context() as patch:
        stay_here(patch)
        run_pipeline(at, until="preprocess")
    return folder


@pytest.fixture(scope="module")
def trained(world, ray_session) -> Path:
    at = f"file://{world}"
    sweep(at, "sweep")
    path = train.run(experiment(at), train.Options(**PLAIN)).removeprefix("file://")
    shutil.copytree(path, path + "-copy")
    return world


def stay_here(patch: pytest.MonkeyPatch) -> None:
    """Run the work of Ray's workers in this process, so that the outage affects it."""

    def train_here(experiment, run, profile: bool) -> None:
        with distributed.plain_ranks() as ranks:
            train_rank(experiment, run, ranks, partial(distributed.wrap_model, ranks=ranks, train=experiment.train))

    def score_here(plan, tasks: list[list[str]], workers: int):
        return (evaluation.score_predicted(evaluation.Predictor(plan).predict(patients)) for patients in tasks)

    patch.setattr(ray_preprocessing, "write_parts_with_ray", lambda tasks, workers: preprocessing.write_parts_here(tasks))
    patch.setattr(ray_training, "train_with_ray", train_here)
    patch.setattr(evaluation, "score_on_ray", score_here)


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 of every file but claims, and the halves of what did not get its name; of a part also when it was written."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not {locks.LOCK_NAME, "ray", "placement_group"} & set(path.parts) and path.suffix != ".part":
            written = path.stat().st_mtime_ns if path.name.startswith("part-") else 0
            found[str(path.relative_to(folder))] = filesystem.sha256(path.read_bytes()), written
    return found


def restore(world: Path, kept: Path) -> None:
    """Copy the folders that have changed; a copy keeps when each file was written."""
    for name in {*os.listdir(world), *os.listdir(kept)}:
        now, then = ({p.relative_to(at): p.stat().st_mtime_ns for p in at.rglob("*")} for at in (world / name, kept / name))
        if now != then:
            shutil.rmtree(world / name)
            if then:
                shutil.copytree(kept / name, world / name)


def check_outages(name: str, job: Callable, world: Path, monkeypatch, measurement, tries: int = 1000) -> None:
    """Run a job undisturbed, then again with the outage at a call from each place, or at `tries` of them, evenly spread."""
    stay_here(monkeypatch)
    before, kept = contents(world), world.with_name(f"{world.name}-kept")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(world, kept)

    def attempt(fail_at: int) -> tuple[Flaky, Exception | None]:
        restore(world, kept)
        flaky, error = Flaky(fail_at), None
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "resolve", flaky.resolve)
            try:
                job(f"file://{world}")
            except StorageError as caught:
                error = caught
        return flaky, error

    undisturbed, error = attempt(0)
    assert error is None
    after, calls, stopped = contents(world), len(undisturbed.stacks), 0
    places = one_from_each_place(undisturbed.stacks)
    numbers = sorted({places[round(place)] for place in np.linspace(0, len(places) - 1, min(tries, len(places)))})
    for number in numbers:
        _, error = attempt(number)
        found = contents(world)
        changed = [file for file in before if found.get(file) != before[file]]
        if error or after.get(STATE) != before.get(STATE):
            changed = [file for file in changed if file != STATE]
        assert not changed, f"call {number} of {name} changed {changed}"
        if error is None:  # a call whose failure changes nothing, such as the removal of a claim
            assert found.keys() == after.keys(), f"call {number} of {name} hides that it failed"
            continue
        stopped += 1
        assert not DESTRUCTIVE.search(str(error)) and "cannot be reached" in str(error), f"call {number} of {name}: {error}"
    tried = f"{calls} calls from {len(places)} new places, {len(numbers)} tried"
    measurement(f"outage in {name}: {tried}, {stopped} stopped the job, 0 changed a file")
    assert stopped
    restore(world, kept)


@pytest.mark.parametrize("name", CHEAP)
def test_an_outage_at_a_call_from_any_place_stops_a_job_and_changes_nothing(name, world, monkeypatch, measurement):
    check_outages(name, CHEAP[name], world, monkeypatch, measurement)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", DEAR)
def test_an_outage_at_any_of_some_places_stops_any_job_and_changes_nothing(name, trained, monkeypatch, measurement):
    # Some take half a second, two half a minute.
    tries = {"train, finished": 12, "predict": 12, "tune, finished": 12, "tune": 1, "export": 1}.get(name, 4)
    check_outages(name, DEAR[name], trained, monkeypatch, measurement, tries)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_outage_in_rays_workers_stops_a_training_and_changes_nothing(trained, monkeypatch):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    real, before, at = ray_training.worker, contents(trained), f"file://{trained}"
    monkeypatch.setattr(ray_runtime, "build_trainer", partial(ray_runtime.build_trainer, tries=0))

    def worker(config: dict) -> dict:
        filesystem.resolve = Flaky(5).resolve
        return real(config)

    monkeypatch.setattr(ray_training, "worker", worker)
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        train.run(experiment(at, seed=8), train.Options())
    assert not DESTRUCTIVE.search(str(caught.value))
    assert before.items() <= contents(trained).items()
