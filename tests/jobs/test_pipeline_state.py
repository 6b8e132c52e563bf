"""The record of a pipeline: what an interrupted stage resumes with, forced or not, and what `status` shows of it.

The cluster is a stand-in that knows jobs by id and state, and the stages write one file: what counts here is which job is
begun, followed or stopped. test_submitted_pipeline.py does the same on a real one.
"""

import datetime
import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from heartseg.errors import UserError
from heartseg.storage import filesystem, locks
from heartseg.training import run_directory
from jobs import pipeline
from jobs.pipeline import PipelineState
from jobs.support.pipeline_stages import PipelineOptions, Stage, hash_complete


class Jobs:
    """Jobs by id; `dies` leaves a job in some state when the pipeline's process dies of it, once."""

    def __init__(self):
        self.states: dict[str, str] = {}
        self.stopped: list[str] = []
        self.dies: Callable[[Jobs, str, str], None] | None = None

    def status(self, job_id: str) -> str | None:
        return self.states.get(job_id)

    def stop(self, job_id: str) -> None:
        self.stopped.append(job_id)
        self.states[job_id] = "STOPPED"

    def run(self, job: str, arguments: list[str], job_id: str) -> None:
        if self.dies:
            dies, self.dies = self.dies, None
            dies(self, job_id, arguments[1])
            raise SystemExit("killed")
        if self.states.get(job_id) != "SUCCEEDED":
            work(arguments[1], "--overwrite" in arguments)
        self.states[job_id] = "SUCCEEDED"


def work(path: str, overwrite: bool = False) -> None:
    """What a stage's job does: another result each time, and none if a complete one is there."""
    os.makedirs(path, exist_ok=True)
    if overwrite or not os.path.exists(os.path.join(path, "result")):
        Path(path, "result").write_text(uuid.uuid4().hex)


def training(folder: Path) -> Stage:
    """A stage whose every forced result is a further run."""

    def command(results, from_scratch: bool) -> tuple[str, dict]:
        path = str(folder / run_directory.generation_name(str(folder), "run", fresh=from_scratch))
        return path, {"out": path}

    return Stage("train", "train", (), lambda results: {}, command, lambda path: hash_complete(path, "result"))


def evaluation(folder: Path) -> Stage:
    """A stage whose forced result replaces the one before."""
    scores = str(folder / "scores")
    return replace(training(folder), name="evaluate", command=lambda _, again: (scores, {"out": scores, "overwrite": again}))


def run_stage(folder: Path, stage: Stage, jobs: Jobs, is_forced: bool = False) -> tuple[str, str]:
    """Run a stage as a new process does; the path of its result and its fingerprint."""
    runner = pipeline.Runner(PipelineState.open(str(folder)), PipelineOptions(retries=0), jobs)
    result = runner.run(stage, {}, {}, is_forced)
    return result.path, result.fingerprint


def job_ids(folder: Path, stage: Stage) -> list[str]:
    return [attempt["job"] for attempt in PipelineState.open(str(folder)).attempts(stage)]


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
@pytest.mark.parametrize("make_stage", [training, evaluation])
def test_a_forced_stage_whose_process_died_is_done_once_and_not_forgotten(make_stage, end, tmp_path):
    stage, jobs = make_stage(tmp_path / "results"), Jobs()
    _, old = run_stage(tmp_path, stage, jobs)
    jobs.dies = end
    with pytest.raises(SystemExit):
        run_stage(tmp_path, stage, jobs, is_forced=True)
    (begun,) = job_ids(tmp_path, stage)
    _, new = run_stage(tmp_path, stage, jobs)
    assert new != old and jobs.stopped == []
    assert end is never_submitted or job_ids(tmp_path, stage) == [begun]
    assert sorted(os.listdir(tmp_path / "results")) == (["run", "run-2"] if make_stage is training else ["scores"])


@pytest.mark.parametrize("end", [under_way, finished])
def test_force_runs_a_stage_again_whatever_an_earlier_commands_job_has_done(end, tmp_path):
    stage, jobs = evaluation(tmp_path), Jobs()
    jobs.dies = end
    with pytest.raises(SystemExit):
        run_stage(tmp_path, stage, jobs)
    (begun,), old = job_ids(tmp_path, stage), stage.fingerprint(str(tmp_path / "scores"))
    assert run_stage(tmp_path, stage, jobs, is_forced=True)[1] != old
    assert begun not in job_ids(tmp_path, stage) and jobs.stopped == ([begun] if end is under_way else [])


def test_a_stage_whose_job_may_still_run_is_not_begun_without_its_cluster(tmp_path):
    stage, jobs = training(tmp_path / "runs"), Jobs()
    jobs.dies = under_way
    with pytest.raises(SystemExit):
        run_stage(tmp_path, stage, jobs)
    with pytest.raises(UserError, match=f"may still run as job {job_ids(tmp_path, stage)[0]}: use --submit"):
        run_stage(tmp_path, stage, None)


def test_status_counts_time_only_while_a_process_works_and_warns_of_a_job_that_may_still_run(tmp_path, capsys):
    yesterday = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)).isoformat(timespec="seconds")
    attempt = {"state": "running", "job": "train-0123abcd", "started": yesterday, "ended": None}
    record = {"state": "running", "inputs": {}, "path": "/runs/run", "attempts": [attempt], "result": None, "problem": ""}
    PipelineState(str(tmp_path), stages={"train": record}).save()
    pipeline.job(["status", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "interrupted" in shown and " 0 s " in shown and "train-0123abcd (no process follows it" in shown
    with locks.lock(str(tmp_path)):
        pipeline.job(["status", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "running" in shown and "1440 min" in shown and "may still run" not in shown


@pytest.mark.parametrize("text", ['{"stages": ', "[]", '{"stages": {"train": {"state": "done"}}}'])
def test_a_damaged_record_is_refused_with_what_to_do(text, tmp_path):
    (tmp_path / "pipeline.json").write_text(text)
    with pytest.raises(UserError, match="remove it and rerun pipeline.py"):
        PipelineState.open(str(tmp_path))


def test_a_record_has_the_fields_that_other_versions_read(tmp_path):
    run_stage(tmp_path, training(tmp_path / "runs"), Jobs())
    record = filesystem.read_json(str(tmp_path / "pipeline.json"))["stages"]["train"]
    assert record.keys() == set(["state", "inputs", "path", "arguments", "attempts", "result", "problem", "forced", "replaces"])
    assert record["result"].keys() == {"path", "fingerprint"}
    assert record["attempts"][0].keys() == {"state", "job", "started", "ended"}
