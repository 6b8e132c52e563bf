"""A pipeline's story: what an interrupted stage goes on with, forced or not, and what `status` tells of it.

The cluster is a stand-in that knows jobs by id and state, and the stages write one file: what counts here is which job is
begun, followed or stopped. tests/test_submit.py does the same on a real one.
"""

import datetime
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from heartseg.storage import locks
from heartseg.training import run_directory
from jobs.pipeline import perform
from jobs.support.pipeline_stages import Command, Stage, complete
from jobs.support.pipeline_state import Story, new_attempt


class Jobs:
    """Jobs by id; `dies` is what has become of one when the pipeline's command dies of it, once."""

    def __init__(self):
        self.states: dict[str, str] = {}
        self.stopped: list[str] = []
        self.dies: Callable[[str, str], None] | None = None

    def status(self, job_id: str) -> str | None:
        return self.states.get(job_id)

    def stop(self, job_id: str) -> None:
        self.stopped.append(job_id)
        self.states[job_id] = "STOPPED"

    def run(self, job: str, arguments: list[str], job_id: str) -> None:
        if self.dies:
            dies, self.dies = self.dies, None
            dies(job_id, arguments[0])
            raise SystemExit("killed")
        if self.states.get(job_id) != "SUCCEEDED":
            work(arguments[0], "--overwrite" in arguments)
        self.states[job_id] = "SUCCEEDED"


def work(path: str, overwrite: bool = False) -> None:
    """What a stage's job does: another result each time, and none where a complete one lies."""
    os.makedirs(path, exist_ok=True)
    if overwrite or not os.path.exists(os.path.join(path, "result")):
        Path(path, "result").write_text(uuid.uuid4().hex)


def training(folder: Path) -> Stage:
    """A stage whose every forced result is a further run."""

    def command(results, anew: bool) -> Command:
        path = str(folder / run_directory.generation_name(str(folder), "run", fresh=anew))
        return Command([path], path)

    return Stage("train", "train", (), lambda results: {}, command, lambda path: complete(path, "result"))


def evaluation(folder: Path) -> Stage:
    """A stage whose forced result takes the place of the one before."""

    def command(results, anew: bool) -> Command:
        return Command([str(folder / "scores"), *(["--overwrite"] if anew else [])], str(folder / "scores"))

    return Stage("evaluate", "evaluate", (), lambda results: {}, command, lambda path: complete(path, "result"))


def done(story: Story, stage: Stage, jobs: Jobs, forced: bool = False) -> str:
    """Perform a stage; the path of its result."""
    return perform(story, stage, {}, {}, forced, 0, jobs).path


def attempts(story: Story, stage: Stage) -> list[str]:
    return [attempt["job"] for attempt in story.stages[stage.name]["attempts"]]


def never_submitted(jobs: Jobs, job_id: str, path: str) -> None:
    pass


def still_waiting(jobs: Jobs, job_id: str, path: str) -> None:
    jobs.states[job_id] = "PENDING"


def under_way(jobs: Jobs, job_id: str, path: str) -> None:
    os.makedirs(path, exist_ok=True)
    jobs.states[job_id] = "RUNNING"


def finished(jobs: Jobs, job_id: str, path: str) -> None:
    work(path, overwrite=True)
    jobs.states[job_id] = "SUCCEEDED"


@pytest.mark.parametrize("end", [never_submitted, still_waiting, under_way, finished])
def test_a_forced_training_whose_command_died_is_done_once_and_not_forgotten(end, tmp_path):
    story, stage, jobs = Story(str(tmp_path)), training(tmp_path / "runs"), Jobs()
    assert done(story, stage, jobs).endswith("/run")
    jobs.dies = lambda job_id, path: end(jobs, job_id, path)
    with pytest.raises(SystemExit):
        done(story, stage, jobs, forced=True)
    (begun,) = attempts(story, stage)
    story = Story.open(str(tmp_path))
    assert done(story, stage, jobs).endswith("/run-2")
    assert sorted(os.listdir(tmp_path / "runs")) == ["run", "run-2"] and jobs.stopped == []
    assert end is never_submitted or attempts(story, stage) == [begun]


@pytest.mark.parametrize("end", [never_submitted, still_waiting, under_way, finished])
def test_a_forced_evaluation_whose_command_died_takes_the_place_of_the_old_one(end, tmp_path):
    story, stage, jobs = Story(str(tmp_path)), evaluation(tmp_path), Jobs()
    old = stage.seen(done(story, stage, jobs))
    jobs.dies = lambda job_id, path: end(jobs, job_id, path)
    with pytest.raises(SystemExit):
        done(story, stage, jobs, forced=True)
    (begun,) = attempts(story, stage)
    story = Story.open(str(tmp_path))
    assert stage.seen(done(story, stage, jobs)) != old
    assert jobs.stopped == [] and (end is never_submitted or attempts(story, stage) == [begun])


@pytest.mark.parametrize("end", [under_way, finished])
def test_force_does_it_again_whatever_a_job_of_an_earlier_command_has_done(end, tmp_path):
    story, stage, jobs = Story(str(tmp_path)), evaluation(tmp_path), Jobs()
    jobs.dies = lambda job_id, path: end(jobs, job_id, path)
    with pytest.raises(SystemExit):
        done(story, stage, jobs)
    (begun,), old = attempts(story, stage), stage.seen(str(tmp_path / "scores"))
    story = Story.open(str(tmp_path))
    assert stage.seen(done(story, stage, jobs, forced=True)) != old
    assert begun not in attempts(story, stage) and jobs.stopped == ([begun] if end is under_way else [])


def test_status_counts_time_only_while_somebody_is_at_it_and_doubts_what_became_of_a_job(tmp_path, capsys):
    from jobs import pipeline

    story = Story(str(tmp_path))
    yesterday = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)).isoformat(timespec="seconds")
    attempt = new_attempt("train-0123abcd") | {"started": yesterday}
    story.stages["train"] = {"state": "running", "inputs": {}, "path": "/runs/run", "attempts": [attempt]}
    story.stages["train"] |= {"result": None, "problem": "", "forced": False}
    story.save()
    pipeline.job(["status", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "interrupted" in said and " 0 s " in said and "train-0123abcd" in said and "its job may still run" in said
    with locks.lock(str(tmp_path)):
        pipeline.job(["status", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "running" in said and "1440 min" in said and "may still run" not in said
