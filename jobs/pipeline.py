"""The whole pipeline, skipping finished stages: `python jobs/pipeline.py quick --source /data/CAMUS --workers 2`.

A graph of stages (preprocess, tune, train, evaluate, pool, predict; jobs/support/pipeline_stages.py), each run in this process
or submitted as a Ray job. `OUT/pipeline.json` records the state of each; `python jobs/pipeline.py status --out OUT` shows it.
"""

import contextlib
import importlib
import json
import sys
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heartseg.config.experiment import Experiment, to_json
from heartseg.datasets.image_folder import open_source
from heartseg.errors import StorageRefused, UserError, require
from heartseg.inference import study_files
from heartseg.models.deeplabv3 import check_installation
from heartseg.shards.loader import check_shares
from heartseg.storage import filesystem, locks
from heartseg.training import run_directory
from heartseg.tuning.sweep import SweepPlan
from jobs.support import command_line
from jobs.support.command_line import first_line, log
from jobs.support.job_submission import ALIVE, Cluster, JobFailed
from jobs.support.pipeline_stages import KINDS, PipelineOptions, Result, Results, Stage, build_graph, predictions_path
from jobs.support.pipeline_state import DONE, FAILED, RUNNING, STOPPED, PipelineState, begin_attempt, timestamp


def run(experiment: Experiment, options: PipelineOptions) -> str:
    """Run the requested stages; returns the path of the report, or of the last stage's result."""
    check_installation()
    meaning = "the folder of the CAMUS release, or of your own images, or set HEARTSEG_SOURCE"
    command_line.required_path(experiment.source, "source", meaning)
    out = experiment.out or command_line.absolute("results", "out")
    if options.predict:  # a mistake is reported now, and not after the training
        options = replace(options, predict=command_line.absolute(options.predict, "predict"))
        clips = study_files.find_clips(options.predict)
        study_files.check_out(predictions_path(out, options.predict), options.predict, clips)
    stages = build_graph(experiment, out, options)
    chosen, forced = choose_stages(stages, options)
    if chosen[0].kind == "preprocess":
        open_source(experiment.source, options.patient_pattern, options.dataset)
    if any(stage.kind in ("tune", "train") for stage in chosen):
        check_shares(experiment.train.batch_size, experiment.workers, experiment.train.accumulate)
    if options.dry_run:
        Runner(PipelineState.open(out), options).run_all(stages, chosen, forced)
        return out
    cluster = Cluster() if options.submit else None
    with locks.lock(out):
        state = PipelineState.open(out)
        state.metadata |= {"experiment": to_json(experiment), "stages of": [stage.name for stage in stages]}
        state.metadata |= {"code": run_directory.code_revision(), "command": sys.argv, "last begun": timestamp()}
        runner = Runner(state, options, cluster)
        try:
            results = runner.run_all(stages, chosen, forced)
        except JobFailed as error:
            command_line.exit_with_message(f"{error}; rerun the same command to resume.", 1)
    reports = [stage for stage in chosen if stage.job == "evaluate"]
    last = (reports or chosen)[-1]
    path = filesystem.join(results[last.name].path, "report.html") if reports else results[last.name].path
    if cluster or runner.last is not last:
        print(path)  # otherwise its job has just printed it; a cluster's log may end with other lines
    return path


def choose_stages(stages: list[Stage], options: PipelineOptions) -> tuple[list[Stage], list[Stage]]:
    """The stages from --from to --until, and those of --force; raises UserError for unknown stages and conflicting flags."""
    kinds = list(dict.fromkeys(stage.kind for stage in stages))
    known = {stage.name for stage in stages}.union(kinds)
    for flag, names in (("--from", [options.begin]), ("--until", [options.until]), ("--force", options.force)):
        for name in filter(None, names):
            require(name in known, f"{flag} {name} is not a stage of this pipeline: use {', '.join(kinds)}.")
    first, last = KINDS.index(options.begin or KINDS[0]), KINDS.index(options.until or KINDS[-1])
    require(first <= last, f"--from {options.begin} comes after --until {options.until}: swap them.")
    chosen = [stage for stage in stages if first <= KINDS.index(stage.kind) <= last]
    forced = [stage for stage in stages if {stage.name, stage.kind} & set(options.force)]
    outside = [stage.name for stage in forced if stage not in chosen]
    require(not outside, f"--force {' '.join(outside)} is outside the range of --from and --until: leave one of them out.")
    return chosen, forced


@dataclass
class Runner:
    """Runs stages, in this process or on a cluster, and records their state."""

    state: PipelineState
    options: PipelineOptions
    cluster: Cluster | None = None
    last: Stage | None = None
    """The last stage that ran, if any."""

    def run_all(self, stages: list[Stage], chosen: list[Stage], forced: list[Stage]) -> dict[str, Result]:
        """Run the chosen stages that are not up to date, in order; returns their results. A dry run only prints."""
        results: dict[str, Result] = {}
        needed = {need for stage in chosen for need in stage.needs}
        for number, stage in enumerate(stages, 1):
            title, missing = f"{number}/{len(stages)} {stage.name}", [need for need in stage.needs if need not in results]
            if stage not in chosen:
                if stage.name in needed:
                    results[stage.name] = self.state.result(stage)
                    problem = f"--from {self.options.begin}: stage {stage.name} is not done, or its result is missing"
                    require(results[stage.name] is not None, f"{problem}: omit --from {self.options.begin}.")
                continue
            if missing:  # in a dry run only
                print(f"{title}: would run, after {', '.join(missing)}")
                continue
            inputs = json.loads(json.dumps(stage.inputs(results)))  # as they are read back from the file
            reason = self.state.reason_to_run(stage, inputs, stage in forced)
            if not reason:
                results[stage.name] = self.state.result(stage)
                print(f"{title}: done, nothing has changed")
            elif self.options.dry_run:
                print(f"{title}: would run ({reason})")
            else:
                print(f"{title} ({reason})".removesuffix(" (not started)"), flush=True)
                results[stage.name] = self.run(stage, inputs, results, stage in forced)
                self.last = stage
        return results

    def run(self, stage: Stage, inputs: dict, results: Results, is_forced: bool) -> Result:
        """Run a stage; after a failure that is not a user error, retry up to --retries times, each from completed work."""
        before = self.state.stages.get(stage.name)
        for retries_left in range(self.options.retries, -1, -1):
            # Once an attempt is recorded, the state knows whether the stage still has to start from scratch.
            is_forced = is_forced and self.state.stages.get(stage.name) is before
            try:
                return self.attempt(stage, inputs, results, is_forced)
            except Exception as error:
                if not retries_left or isinstance(error, (UserError, StorageRefused)):
                    raise
                log.warning("%s failed, trying again: %s", stage.name, first_line(error))
            with contextlib.suppress(Exception):  # the stage may have left this process's Ray in any state
                import ray

                ray.shutdown()

    def attempt(self, stage: Stage, inputs: dict, results: Results, is_forced: bool) -> Result:
        """Run a stage once, and record how it ended."""
        last = self.state.stages.get(stage.name, {})
        unfinished = last if last.get("inputs") == inputs and last["state"] != DONE else {}
        from_scratch = is_forced
        if unfinished.get("forced"):  # was it interrupted before it replaced the old result, or created its new folder?
            old, path = unfinished.get("replaces"), unfinished["path"]
            from_scratch |= stage.fingerprint(path) == old if old else not filesystem.exists(path)
        path, flags = stage.command(results, from_scratch)
        if "config" in flags:
            text = filesystem.json_bytes(to_json(flags["config"]))
            # Named by its content: a job that waits to be started must not read the configuration of a later one.
            flags["config"] = filesystem.join(self.state.out, "stages", f"{stage.name}-{filesystem.sha256(text)[:8]}.json")
            filesystem.publish(flags["config"], text)
        arguments, is_resumed = command_line.as_flags(flags), not is_forced and unfinished.get("path") == path
        job_id = self.choose_job(stage, is_resumed, is_forced)
        self.state.stages[stage.name] = {
            "state": RUNNING, "inputs": inputs, "path": path, "arguments": arguments, "result": None, "problem": "",
            "attempts": begin_attempt(last["attempts"] if is_resumed else [], job_id),
            "forced": from_scratch, "replaces": stage.fingerprint(path) if from_scratch else None,
        }  # fmt: skip
        self.state.save()
        try:
            if self.cluster:
                self.cluster.run(stage.job, arguments, job_id)
            else:
                importlib.import_module(f"jobs.{stage.job}").job(arguments)
                if stage.kind == "tune" and "ray" in sys.modules:  # a stopped trial may have left a reservation
                    sys.modules["ray"].shutdown()
            fingerprint = stage.fingerprint(path)
            require(bool(fingerprint), f"{stage.name} left no complete result at {path}: run it by hand to see why.")
        except (KeyboardInterrupt, Exception) as error:
            is_stopped = isinstance(error, KeyboardInterrupt)
            self.state.end(stage, STOPPED if is_stopped else FAILED, problem="" if is_stopped else first_line(error))
            if "--overwrite" in str(error):
                log.warning("In a pipeline, use --force %s instead of --overwrite.", (*stage.needs, stage.name)[0])
            raise
        result = Result(path, fingerprint)
        self.state.end(stage, DONE, result)
        return result

    def choose_job(self, stage: Stage, is_resumed: bool, is_forced: bool) -> str:
        """The id of the job to follow, or of a new one; empty without a cluster. Stops the stage's other live jobs."""
        attempts = [attempt for attempt in self.state.attempts(stage) if attempt["job"]]
        if not self.cluster:
            if attempts and attempts[-1]["state"] == RUNNING and not is_forced:
                fix = f"use --submit to follow it, or --force {stage.name} if its cluster is gone."
                raise UserError(f"Stage {stage.name} may still be running as job {attempts[-1]['job']}: {fix}")
            return ""
        for attempt in attempts:
            # The process that wrote the state may have been killed, or have failed to stop the job: ask the cluster.
            status = self.cluster.status(attempt["job"])
            is_unread = status == "SUCCEEDED" and attempt["state"] == RUNNING
            if is_resumed and attempt is attempts[-1] and (status in ALIVE or is_unread):
                return attempt["job"]
            if status in ALIVE:
                self.cluster.stop(attempt["job"])
        return f"{stage.name}-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class StatusOptions:
    """The pipeline to show."""

    out: str = "results"
    """Folder or URI of the pipeline."""


def show_status(out: str) -> None:
    """Print the state of each stage of a pipeline."""
    path = command_line.absolute(out, "out")
    state = PipelineState.open(path)
    require(bool(state.stages), f"{path} holds no pipeline ({path}/pipeline.json is missing): check --out.")
    print(state.format_table(locks.is_held(path)))


def job(argv: list[str]) -> None:
    if argv and argv[0] == "status":
        about = "Show the state of each stage of a pipeline."
        show_status(command_line.parse_line(StatusOptions, argv[1:], "python jobs/pipeline.py status", about).out)
        return
    about = "Preprocess, train, evaluate and, on request, tune and predict; skips completed stages (default --out: results)."
    experiment, options = command_line.parse(PipelineOptions(), argv, "pipeline.py", about)
    command_line.refuse_unused(SweepPlan(), options.plan, options.plan.unused)
    run(experiment, options)


if __name__ == "__main__":
    command_line.main(job)
