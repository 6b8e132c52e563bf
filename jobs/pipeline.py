"""The whole pipeline, skipping what is done: `python jobs/pipeline.py quick --source /data/CAMUS --workers 2`.

A graph of stages (preprocess, tune, train, evaluate, pool, predict; jobs/support/pipeline_stages.py), each run in this process
or submitted as a Ray job. `OUT/pipeline.json` records the state of each; `python jobs/pipeline.py status --out OUT` shows it.
"""

import contextlib
import importlib
import json
import logging
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from heartseg.config.experiment import Experiment, to_json
from heartseg.errors import StorageRefused, UserError, require
from heartseg.inference import study_files
from heartseg.models.deeplabv3 import check_installation
from heartseg.shards.loader import check_shares
from heartseg.storage import filesystem, locks
from heartseg.training import run_directory
from jobs.support import command_line
from jobs.support.job_submission import ALIVE, Cluster, JobFailed
from jobs.support.pipeline_stages import KINDS, Kind, Result, Results, Stage, Work, build_graph, predictions_path
from jobs.support.pipeline_state import DONE, FAILED, RUNNING, STOPPED, PipelineState, timestamp

log = logging.getLogger("heartseg.jobs")


@dataclass(frozen=True)
class Options:
    """Which stages there are, which of them run, and where."""

    work: Annotated[Work, command_line.FLAT] = field(default_factory=Work)
    submit: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Submit each stage as a Ray job to the cluster of RAY_API_SERVER_ADDRESS."""
    local: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the stages in this process, the default."""
    begin: Annotated[Kind | None, tyro.conf.arg(name="from")] = None
    """First stage to run; uses the results of those before it as they are, whatever has changed."""
    until: Kind | None = None
    """Last stage to run."""
    force: tuple[str, ...] = ()
    """Stages to run from scratch though nothing has changed (`train`, or `train-2of5` of folds); leave it out to resume one."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show what would run, and why; write nothing."""
    retries: int = 1
    """Further attempts at a stage that fails other than by a user's mistake; each resumes from what is complete."""

    def __post_init__(self):
        require(not (self.submit and self.local), "--submit and --local exclude each other.")
        require(self.retries >= 0, "--retries must be at least 0.")


@dataclass(frozen=True)
class StatusOptions:
    """Which pipeline to show."""

    out: str = "results"
    """Folder or URI of the pipeline."""


def run(experiment: Experiment, options: Options) -> str:
    """Run the stages asked for; returns the path of the report, or of the last stage's result."""
    check_installation()
    meaning = "the folder of the CAMUS release, or of your own images (HEARTSEG_SOURCE)"
    command_line.require_flag(experiment.source, "--source", meaning)
    out = experiment.out or command_line.absolute("results", "out")
    work = options.work
    if work.predict:  # a mistake is reported now, and not after the training
        work = replace(work, predict=command_line.absolute(work.predict, "predict"))
        study_files.check_out(predictions_path(out, work.predict), work.predict, study_files.find_clips(work.predict))
    stages = build_graph(experiment, out, work)
    chosen, forced = choose_stages(stages, options)
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
        try:
            results = Runner(state, options, cluster).run_all(stages, chosen, forced)
        except JobFailed as error:
            command_line.exit_with_message(f"{error}; rerun the same command to resume.", 1)
    reports = [stage for stage in chosen if stage.job == "evaluate"]
    last = results[(reports or chosen)[-1].name].path
    return filesystem.join(last, "report.html") if reports else last


def choose_stages(stages: list[Stage], options: Options) -> tuple[list[Stage], list[Stage]]:
    """The stages from --from to --until, and those of --force among them; raises UserError for a stage that does not exist."""

    def find(name: str, flag: str) -> list[Stage]:
        known = ", ".join(dict.fromkeys(stage.kind for stage in stages))
        found = [stage for stage in stages if name in (stage.name, stage.kind)]
        require(bool(found), f"{flag} {name}: this pipeline has no such stage, only {known}.")
        return found

    first = KINDS.index(find(options.begin, "--from")[0].kind) if options.begin else 0
    last = KINDS.index(find(options.until, "--until")[0].kind) if options.until else len(KINDS) - 1
    require(first <= last, f"--from {options.begin} comes after --until {options.until}.")
    chosen = [stage for stage in stages if first <= KINDS.index(stage.kind) <= last]
    forced = [stage for name in options.force for stage in find(name, "--force")]
    outside = [stage.kind for stage in forced if stage not in chosen]
    require(not outside, f"--force {' '.join(outside)} lies outside --from and --until.")
    return chosen, forced


@dataclass
class Runner:
    """Runs stages, in this process or on a cluster, and records their state."""

    state: PipelineState
    options: Options
    cluster: Cluster | None = None

    def run_all(self, stages: list[Stage], chosen: list[Stage], forced: list[Stage]) -> dict[str, Result]:
        """Run the chosen stages that are not up to date, in order; returns their results. A dry run only prints."""
        results: dict[str, Result] = {}
        needed = {need for stage in chosen for need in stage.needs}
        for number, stage in enumerate(stages, 1):
            title, missing = f"{number}/{len(stages)} {stage.name}", [need for need in stage.needs if need not in results]
            if stage not in chosen:
                if stage.name in needed:
                    result, flag = self.state.result(stage), f"--from {self.options.begin}"
                    require(result is not None, f"{flag}: stage {stage.name} is not done, or its result is gone: omit {flag}.")
                    results[stage.name] = result
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
                print(f"{title} ({reason})", flush=True)
                results[stage.name] = self.run(stage, inputs, results, stage in forced)
        return results

    def run(self, stage: Stage, inputs: dict, results: Results, is_forced: bool) -> Result:
        """Run a stage; after a failure that is not the user's mistake try again, --retries times, from what is complete."""
        before = self.state.stages.get(stage.name)
        for _ in range(self.options.retries):
            try:
                return self.attempt(stage, inputs, results, is_forced)
            except Exception as error:
                if isinstance(error, (UserError, StorageRefused)):
                    raise
                log.warning("%s failed, trying again: %s", stage.name, _first_line(error))
            # Once the attempt is recorded, the state knows whether the stage still has to start from scratch.
            is_forced = is_forced and self.state.stages.get(stage.name) is before
            if not self.cluster:
                shut_down_ray()
        return self.attempt(stage, inputs, results, is_forced)

    def attempt(self, stage: Stage, inputs: dict, results: Results, is_forced: bool) -> Result:
        """Run a stage once; the state records how it ended."""
        from_scratch = is_forced or self.state.is_still_forced(stage, inputs)
        command = stage.command(results, from_scratch)
        unfinished = None if is_forced else self.state.unfinished(stage, inputs)
        is_resumed = unfinished is not None and unfinished["path"] == command.path
        job_id = self.choose_job(stage, is_resumed, is_forced)
        arguments = command_line.as_flags(command.flags)
        if command.experiment:
            text = filesystem.json_bytes(to_json(command.experiment))
            # Named by its content: a job that waits to be started must not read the configuration of a later one.
            config = filesystem.join(self.state.out, "stages", f"{stage.name}-{filesystem.sha256(text)[:8]}.json")
            filesystem.publish(config, text)
            arguments = ["--config", config, *arguments]
        self.state.begin(stage, inputs, command.path, arguments, job_id, from_scratch, is_resumed)
        try:
            if self.cluster:
                self.cluster.run(stage.job, arguments, job_id)
            else:
                importlib.import_module(f"jobs.{stage.job}").job(arguments)
            fingerprint = stage.fingerprint(command.path)
            require(
                fingerprint is not None, f"{stage.name} left nothing complete at {command.path}: run it by hand to see why."
            )
        except KeyboardInterrupt:
            self.state.end(stage, STOPPED)
            raise
        except Exception as error:
            self.state.end(stage, FAILED, problem=_first_line(error))
            if "--overwrite" in str(error):
                log.warning("In a pipeline, --force %s does what --overwrite does.", (*stage.needs, stage.name)[0])
            raise
        result = Result(command.path, fingerprint)
        self.state.end(stage, DONE, result)
        return result

    def choose_job(self, stage: Stage, is_resumed: bool, is_forced: bool) -> str:
        """The id of the job to follow, otherwise of a new one; empty without a cluster. Stops jobs that do something else.

        Raises UserError without a cluster if an earlier job may still run.
        """
        attempts = [attempt for attempt in self.state.attempts(stage) if attempt["job"]]
        if not self.cluster:
            is_unknown = bool(attempts) and attempts[-1]["state"] == RUNNING and not is_forced
            fix = f"use --submit to follow it, or --force {stage.name} if its cluster is gone"
            require(not is_unknown, f"Stage {stage.name} may still run as job {attempts and attempts[-1]['job']}: {fix}.")
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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def shut_down_ray() -> None:
    """Shut down this process's Ray; a stage that failed may have left it in any state."""
    with contextlib.suppress(Exception):
        import ray

        ray.shutdown()


def show_status(options: StatusOptions) -> None:
    """Print the state of each stage of a pipeline."""
    out = command_line.absolute(options.out, "out")
    state = PipelineState.open(out)
    require(bool(state.stages), f"{out} holds no pipeline ({out}/pipeline.json is missing): give --out.")
    print(state.format_table(locks.is_held(out)))


def job(argv: Sequence[str]) -> None:
    """The command line."""
    if argv and argv[0] == "status":
        about = "Show the state of each stage of a pipeline."
        show_status(command_line.parse_line(StatusOptions, argv[1:], "python jobs/pipeline.py status", about))
        return
    about = "Preprocess, (tune,) train, evaluate and predict, skipping what is done. --out: results by default."
    experiment, options = command_line.parse(Options(), argv, "pipeline.py", about)
    print(run(experiment, options))


if __name__ == "__main__":
    command_line.main(job)
