"""The pipeline as a graph of stages: which run, which are skipped, which run again, and what it records and resumes."""

import datetime
import importlib
import json
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from heartseg.config.experiment import SplitConfig, to_json
from heartseg.errors import UserError
from heartseg.storage import filesystem, locks
from heartseg.training import run_directory
from heartseg.tuning.search_space import SearchSpace
from heartseg.tuning.sweep import SweepPlan
from helpers.experiments import tiny_experiment
from jobs import pipeline
from jobs.support import command_line
from jobs.support.pipeline_stages import PipelineOptions, Result, Stage, build_graph, hash_complete
from jobs.support.pipeline_state import PipelineState
from jobs.tune import Options as TuneOptions


def tiny(source: str, out: str | Path, **train):
    experiment = tiny_experiment(source=source, out=str(out))
    return replace(experiment, train=replace(experiment.train, epochs=1, **train))


def records(out: str | Path) -> dict[str, dict]:
    return PipelineState.open(str(out)).stages


def attempts(out: str | Path) -> dict[str, int]:
    return {name: len(record["attempts"]) for name, record in records(out).items()}


@pytest.fixture(scope="module", autouse=True)
def plain():
    """Stages run in this process, without Ray."""
    real = importlib.import_module

    def import_plain(name: str) -> SimpleNamespace:
        plain = [] if name == "jobs.predict" else ["--launcher", "plain"]
        return SimpleNamespace(job=lambda arguments: real(name).job([*arguments, *plain]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "importlib", SimpleNamespace(import_module=import_plain))
        yield


@pytest.fixture(scope="module")
def finished(phantom, plain, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pipeline") / "out"
    pipeline.run(tiny(phantom, out), PipelineOptions())
    return out


@pytest.fixture()
def copy(finished, tmp_path) -> Path:
    """The same pipeline at the same path, for tests that change it; it is restored afterwards."""
    shutil.copytree(finished, tmp_path / "kept")
    yield finished
    shutil.rmtree(finished)
    shutil.copytree(tmp_path / "kept", finished)


def test_finished_stages_are_skipped_and_status_and_a_dry_run_show_the_others(finished, phantom, tmp_path, capsys):
    report = pipeline.run(tiny(phantom, finished), PipelineOptions())
    assert os.path.getsize(report) > 50_000 and report.startswith(records(finished)["evaluate"]["result"]["path"])
    assert capsys.readouterr().out.count("done, nothing has changed") == 3
    assert attempts(finished) == {"preprocess": 1, "train": 1, "evaluate": 1}
    pipeline.job(["status", "--out", str(finished)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["preprocess", "done"], ["train", "done"], ["evaluate", "done"]]
    with pytest.raises(UserError, match="holds no pipeline"):
        pipeline.job(["status", "--out", str(tmp_path)])
    before = (finished / "pipeline.json").read_bytes()
    pipeline.run(tiny(phantom, finished, seed=3), PipelineOptions(dry_run=True))
    shown = capsys.readouterr().out
    assert "1/3 preprocess: done" in shown and "3/3 evaluate: would run, after train" in shown
    assert "2/3 train: would run (changed: configuration.train.seed: 0 there, 3 requested)" in shown
    assert (finished / "pipeline.json").read_bytes() == before


@pytest.mark.slow
def test_a_changed_setting_or_force_trains_another_run_and_nothing_else(copy, phantom):
    changed = pipeline.run(tiny(phantom, copy, seed=3), PipelineOptions(until="train"))
    again = pipeline.run(tiny(phantom, copy, seed=3), PipelineOptions(force=("train",), until="train"))
    assert again == f"{changed}-2" == records(copy)["train"]["result"]["path"] and len(list((copy / "runs").iterdir())) == 3
    assert attempts(copy) == {"preprocess": 1, "train": 1, "evaluate": 1}


def test_a_missing_result_is_made_again_and_a_changed_split_divides_the_shards_again(copy, phantom):
    experiment, (shards,), until = tiny(phantom, copy), copy.glob("shards-*"), PipelineOptions(until="preprocess")
    evaluated = Path(records(copy)["evaluate"]["result"]["path"])
    (evaluated / "summary.json").unlink()
    pipeline.run(experiment, PipelineOptions())
    assert (evaluated / "summary.json").exists()
    pipeline.run(replace(experiment, split=SplitConfig("ratio", test_share=0.5)), until)
    assert len(filesystem.read_json(str(shards / "splits.json"))["groups"]["test"]) == 4
    (shards / "part-00000.parquet").unlink()
    pipeline.run(experiment, until)
    assert (shards / "part-00000.parquet").exists()
    assert len(filesystem.read_json(str(shards / "splits.json"))["groups"]["test"]) == 2


def test_a_mistake_is_not_retried_and_the_flag_that_its_message_names_fixes_it(phantom, tmp_path, caplog):
    source = Path(shutil.copytree(phantom, tmp_path / "damaged"))
    (source / "database_nifti" / "patient0001" / "patient0001_2CH_ED.nii.gz").write_bytes(b"no gzip")
    experiment, until = tiny(str(source), tmp_path / "out"), PipelineOptions(until="preprocess")
    with pytest.raises(UserError, match=" recordings cannot be used .* or raise --max-quarantined"):
        pipeline.run(experiment, until)
    assert attempts(tmp_path / "out") == {"preprocess": 1}
    pipeline.run(replace(experiment, ingest="memory"), replace(until, max_quarantined=0.5))
    configs = [filesystem.read_json(str(path))["ingest"] for path in (tmp_path / "out" / "stages").iterdir()]
    assert sorted(configs) == ["auto", "memory"]  # it ran as asked now, and not as asked when it failed
    assert records(tmp_path / "out")["preprocess"]["state"] == "done"

    stray = tmp_path / "new" / "shards-64x64-ratio" / "part-00099.parquet"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"of other shards")
    with pytest.raises(UserError, match="give --overwrite or another --out"):
        pipeline.run(tiny(phantom, tmp_path / "new"), until)
    assert "In a pipeline, use --force preprocess instead of --overwrite." in caplog.messages
    pipeline.run(tiny(phantom, tmp_path / "new"), replace(until, force=("preprocess",)))
    assert attempts(tmp_path / "new") == {"preprocess": 1} and not stray.exists()  # forced, it starts over


def test_options_that_would_be_ignored_or_fail_late_are_refused_at_once(phantom, tmp_path):
    for options, says in [
        ({"predict": str(tmp_path / "nowhere")}, "nowhere"),
        ({"force": ("train",), "until": "preprocess"}, "--force train is outside"),
        ({"plan": SweepPlan(search="grid")}, "add --tune TRIALS"),
        ({"retry_failed": True}, "add --tune TRIALS"),
    ]:
        with pytest.raises(UserError, match=says):
            pipeline.run(tiny(phantom, tmp_path / "out"), PipelineOptions(**options))
    (tmp_path / "studies").symlink_to(os.path.join(phantom, "database_nifti"))
    inside = os.path.join(phantom, "database_nifti", "out")  # the next run would outline this one's masks
    with pytest.raises(UserError, match="would put files inside"):
        pipeline.run(tiny(phantom, inside), PipelineOptions(predict=str(tmp_path / "studies")))
    with pytest.raises(UserError, match="elsewhere does not exist"):
        pipeline.run(tiny(str(tmp_path / "elsewhere"), tmp_path / "out"), PipelineOptions())
    with pytest.raises(UserError, match="batch of 7 over 4 workers"):
        pipeline.run(replace(tiny(phantom, tmp_path / "out"), workers=4), PipelineOptions())
    assert not (tmp_path / "out").exists() and not os.path.exists(inside)


def test_from_uses_earlier_results_as_they_are(finished, phantom, tmp_path):
    elsewhere = replace(tiny(phantom, finished), source=str(tmp_path))  # the files themselves have gone
    assert pipeline.run(elsewhere, PipelineOptions(begin="train")).endswith("report.html")
    other = replace(elsewhere, split=SplitConfig("ratio", test_share=0.5))
    assert pipeline.run(other, PipelineOptions(begin="train")).endswith("report.html")
    with pytest.raises(UserError, match="stage preprocess is not done"):
        pipeline.run(tiny(phantom, tmp_path / "new"), PipelineOptions(begin="train"))
    with pytest.raises(UserError, match="is not a stage of this pipeline: use preprocess, train, evaluate"):
        pipeline.run(tiny(phantom, finished), PipelineOptions(until="tune"))
    with pytest.raises(UserError, match="comes after --until"):
        pipeline.run(tiny(phantom, finished), PipelineOptions(begin="evaluate", until="train"))


def test_a_failure_is_retried_an_interruption_is_not_and_a_rerun_resumes(phantom, tmp_path, monkeypatch, capsys):
    ends = [RuntimeError("the weather"), RuntimeError("the weather"), KeyboardInterrupt()]
    real = pipeline.importlib.import_module
    broken = SimpleNamespace(import_module=lambda name: (_ for _ in ()).throw(ends.pop(0)) if ends else real(name))
    monkeypatch.setattr(pipeline, "importlib", broken)
    experiment, until = tiny(phantom, tmp_path), PipelineOptions(until="preprocess")
    with pytest.raises(RuntimeError, match="the weather"):
        pipeline.run(experiment, until)
    record = records(tmp_path)["preprocess"]
    assert (record["state"], record["problem"], len(record["attempts"])) == ("failed", "the weather", 2)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(experiment, until)
    record = records(tmp_path)["preprocess"]
    assert record["state"] == "stopped" and record["attempts"][2]["ended"]
    pipeline.run(experiment, replace(until, dry_run=True))
    assert "1/3 preprocess: would run (stopped)" in capsys.readouterr().out
    pipeline.run(experiment, until)
    assert attempts(tmp_path)["preprocess"] == 4 and records(tmp_path)["preprocess"]["state"] == "done"


@pytest.mark.slow
def test_folds_score_every_patient_once_by_a_model_that_has_not_seen_them(phantom, tmp_path):
    options = PipelineOptions(folds=2, predict=os.path.join(phantom, "database_nifti", "patient0001"))
    report = pipeline.run(tiny(phantom, tmp_path), options)
    summary = filesystem.read_json(os.path.join(os.path.dirname(report), "summary.json"))
    assert (summary["patients"], summary["images"], summary["group"]) == (8, 32, "out-of-fold")
    parts = [filesystem.read_json(os.path.join(path, "summary.json")) for path in summary["evaluations"]]
    means = [part["scores"]["dice"]["mean"] for part in parts]
    assert summary["scores"]["dice"]["mean"] == pytest.approx(sum(means) / 2)  # as many images in each
    (predictions,) = tmp_path.glob("predictions-patient0001-*")
    assert (predictions / "ef.csv").exists()
    studies = json.loads((predictions / "studies.json").read_text())
    assert len(studies["made_with"]["checkpoints"]) == 2


def test_a_sweeps_plan_survives_its_flags():
    space = SearchSpace(("cosine", "step"), changes=("optim.lr=0.1",))
    plan = SweepPlan(space, "changes", stop_early=False, reduction=4.0)
    flags = command_line.as_flags(to_json(plan))
    assert command_line.parse_line(TuneOptions, flags, "tune.py", "Sweep.").plan == plan


def test_the_graph_has_each_stage_after_what_it_needs():
    graph = build_graph(tiny("/somewhere", "/out"), "/out", PipelineOptions(folds=3, tune=4, predict="/new"))
    seen: set[str] = set()
    for stage in graph:
        assert set(stage.needs) <= seen
        seen.add(stage.name)
    assert len(graph) == 3 * 4 + 2 and graph[-2].name == "pool" and len(graph[-1].needs) == 3


def test_the_winner_of_a_sweep_is_what_is_trained_on_the_whole_training_group(tmp_path):
    asked, options = tiny("/somewhere", tmp_path), PipelineOptions(tune=2, plan=SweepPlan(search="grid"))
    stages = {stage.name: stage for stage in build_graph(asked, str(tmp_path), options)}
    results = {"preprocess": Result("/shards", "of shards"), "tune": Result(str(tmp_path / "sweep"), "of a sweep")}

    _, flags = stages["tune"].command(results, False)
    swept, config = flags.pop("config"), tmp_path / "swept.json"
    config.write_text(json.dumps(to_json(swept)))
    line = [*command_line.as_flags(flags), "--config", str(config)]
    understood, plan = command_line.parse(TuneOptions(), line, "tune.py", "Sweep.")
    assert understood == swept and plan.plan == options.plan and plan.trials == 2

    best = replace(swept, optim=replace(swept.optim, lr=0.5), schedule=replace(swept.schedule, kind="step"))
    best = replace(best, train=replace(best.train, holdout=0.125, batch_size=4))
    filesystem.publish_json(str(tmp_path / "sweep" / "best.json"), to_json(best))
    trained = stages["train"].inputs(results)["configuration"]
    assert trained["optim"]["lr"] == 0.5 and trained["schedule"]["kind"] == "step"
    assert trained["train"]["batch_size"] == 4 and trained["train"]["holdout"] == asked.train.holdout == 0


class Jobs:
    """Jobs by id, in place of a cluster; each of `deaths` is a job's state when the pipeline's process is killed."""

    def __init__(self, *deaths: str | None):
        self.states, self.stopped, self.deaths = {}, [], [*deaths]

    def status(self, job_id: str) -> str | None:
        return self.states.get(job_id)

    def stop(self, job_id: str) -> None:
        self.stopped.append(job_id)
        self.states[job_id] = "STOPPED"

    def run(self, job: str, arguments: list[str], job_id: str) -> None:
        if self.deaths:
            self.states[job_id] = self.deaths.pop()
            if self.states[job_id] == "RUNNING":
                os.makedirs(arguments[1], exist_ok=True)
            elif self.states[job_id] == "SUCCEEDED":
                work(arguments[1], overwrite=True)
            raise SystemExit("killed")
        if self.states.get(job_id) != "SUCCEEDED":
            work(arguments[1], "--overwrite" in arguments)
        self.states[job_id] = "SUCCEEDED"


def work(path: str, overwrite: bool = False) -> None:
    """A stage's job: a different result each time, and none if a complete one exists."""
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


def run_stage(folder: Path, stage: Stage, jobs: Jobs, is_forced: bool = False, **inputs) -> tuple[str, str]:
    """Run a stage as a new process does; the path of its result and its fingerprint."""
    runner = pipeline.Runner(PipelineState.open(str(folder)), PipelineOptions(retries=0), jobs)
    result = runner.run(stage, inputs, {}, is_forced)
    return result.path, result.fingerprint


def job_ids(folder: Path, stage: Stage) -> list[str]:
    return [attempt["job"] for attempt in PipelineState.open(str(folder)).attempts(stage)]


@pytest.mark.parametrize("end", [None, "PENDING", "RUNNING", "SUCCEEDED"])  # None: it was never submitted
@pytest.mark.parametrize("make_stage", [training, evaluation])
def test_a_forced_stage_whose_process_died_is_done_once_and_not_forgotten(make_stage, end, tmp_path):
    stage, jobs = make_stage(tmp_path / "results"), Jobs()
    _, old = run_stage(tmp_path, stage, jobs)
    jobs.deaths = [end]
    with pytest.raises(SystemExit):
        run_stage(tmp_path, stage, jobs, is_forced=True)
    (begun,) = job_ids(tmp_path, stage)
    _, new = run_stage(tmp_path, stage, jobs)
    assert new != old and jobs.stopped == []
    assert end is None or job_ids(tmp_path, stage) == [begun]
    assert sorted(os.listdir(tmp_path / "results")) == (["run", "run-2"] if make_stage is training else ["scores"])


@pytest.mark.parametrize("end", ["RUNNING", "SUCCEEDED"])
def test_force_runs_a_stage_again_whatever_an_earlier_commands_job_has_done_if_its_cluster_is_there(end, tmp_path):
    stage, jobs = evaluation(tmp_path), Jobs(end)
    with pytest.raises(SystemExit):
        run_stage(tmp_path, stage, jobs)
    (begun,), old = job_ids(tmp_path, stage), stage.fingerprint(str(tmp_path / "scores"))
    if end == "RUNNING":  # without its cluster no one knows whether it still runs
        with pytest.raises(UserError, match=f"may still be running as job {begun}: use --submit"):
            run_stage(tmp_path, stage, None)
    assert run_stage(tmp_path, stage, jobs, is_forced=True)[1] != old
    assert begun not in job_ids(tmp_path, stage) and jobs.stopped == ([begun] if end == "RUNNING" else [])


@pytest.mark.parametrize(("end", "inputs"), [("RUNNING", {"epochs": 1}), ("STOPPED", {})])
def test_a_job_of_other_settings_is_stopped_and_replaced_and_a_stopped_one_resumes_as_another_job(end, inputs, tmp_path):
    stage, jobs = evaluation(tmp_path), Jobs(end)
    with pytest.raises(SystemExit):
        run_stage(tmp_path, stage, jobs)
    (begun,) = job_ids(tmp_path, stage)
    run_stage(tmp_path, stage, jobs, **inputs)
    assert jobs.stopped == ([begun] if inputs else [])
    assert (begun in job_ids(tmp_path, stage)) == (not inputs) and job_ids(tmp_path, stage)[-1] != begun


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
    assert "running" in shown and "1440 min" in shown and "may still be running" not in shown


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
