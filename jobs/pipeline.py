"""Everything in order, skipping what is done: `python jobs/pipeline.py quick --source /data/CAMUS --workers 2`.

A graph of stages (preprocess, tune, train, evaluate, pool, predict; jobs/support/pipeline_stages.py), each run in this process
or submitted as a Ray job. `OUT/pipeline.json` tells what became of each; `python jobs/pipeline.py status --out OUT` shows it.
"""

import contextlib
import importlib
import logging
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from heartseg.config.experiment import Experiment, to_json
from heartseg.errors import StorageError, UserError, require
from heartseg.inference import study_files
from heartseg.models.deeplabv3 import check_installation
from heartseg.shards.loader import check_shares
from heartseg.storage import filesystem, locks
from heartseg.training import run_directory
from jobs.support import command_line, job_submission
from jobs.support.pipeline_stages import KINDS, Result, Results, Stage, Work, build_graph, find_stages, predictions_path
from jobs.support.pipeline_state import DONE, FAILED, RUNNING, STOPPED, Story, new_attempt, now

log = logging.getLogger("heartseg.jobs")
Kind = Literal["preprocess", "tune", "train", "evaluate", "pool", "predict"]


@dataclass(frozen=True)
class Options:
    """Which stages there are, which of them run, and where."""

    work: Annotated[Work, command_line.FLAT] = field(default_factory=Work)
    submit: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Submit each stage as a Ray job to the cluster of RAY_API_SERVER_ADDRESS."""
    local: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the stages in this process, as is usual."""
    begin: Annotated[Kind | None, tyro.conf.arg(name="from")] = None
    """Begin with this stage; the ones before it are taken as they are, whatever has changed."""
    until: Kind | None = None
    """End after this stage."""
    force: tuple[str, ...] = ()
    """Stages to do anew though nothing has changed (`train`, or of folds `train-2of5`); to resume one, leave it out."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say what would be done, and why; write nothing."""
    retries: int = 1
    """Further tries of a stage that fails other than by a mistake; each goes on from what is complete."""

    def __post_init__(self):
        require(not (self.submit and self.local), "--submit and --local exclude each other.")
        require(self.retries >= 0, "--retries must be at least 0.")


@dataclass(frozen=True)
class StatusOptions:
    """Whose story to tell."""

    out: str = "results"
    """Folder or URI of the pipeline."""


def run(experiment: Experiment, options: Options) -> str:
    """Bring every stage asked for to its end; returns the path of the report, or of what the last stage left."""
    check_installation()
    command_line.require_flag(
        experiment.source, "--source", "the folder of the CAMUS release, or of your own images (HEARTSEG_SOURCE)"
    )
    out = experiment.out or command_line.absolute("results", "out")
    work = options.work
    if work.predict:
        work = replace(work, predict=command_line.absolute(work.predict, "predict"))
        clips = study_files.find_clips(work.predict)  # a mistake is told now, and not after the training
        study_files.check_out(predictions_path(out, work.predict), work.predict, clips)
    stages = build_graph(experiment, out, work)
    chosen = choose(stages, options)
    if any(stage.kind in ("tune", "train") for stage in stages if stage.name in chosen):
        check_shares(experiment.train.batch_size, experiment.workers, experiment.train.accumulate)
    if options.dry_run:
        carry_out(Story.open(out), stages, chosen, options, None)
        return out
    cluster = job_submission.Cluster() if options.submit else None
    with locks.lock(out):
        story = Story.open(out)
        story.told |= {"experiment": to_json(experiment), "stages of": [stage.name for stage in stages]}
        story.told |= {"code": run_directory.code_revision(), "command": sys.argv, "last begun": now()}
        try:
            results = carry_out(story, stages, chosen, options, cluster)
        except job_submission.JobFailed as error:
            command_line.exit_with_message(f"{error}; the same command goes on from there.", 1)
    last = [stage for stage in stages if stage.name in results]
    reports = [stage for stage in last if stage.job == "evaluate"]
    return filesystem.join(results[reports[-1].name].path, "report.html") if reports else results[last[-1].name].path


def choose(stages: list[Stage], options: Options) -> set[str]:
    """The stages from --from to --until; raises UserError for a stage that this pipeline does not have."""
    for word, flag in [(options.begin, "--from"), (options.until, "--until"), *((word, "--force") for word in options.force)]:
        if word:
            find_stages(stages, word, flag)
    first = KINDS.index(options.begin) if options.begin else 0
    last = KINDS.index(options.until) if options.until else len(KINDS) - 1
    require(first <= last, f"--from {options.begin} comes after --until {options.until}.")
    chosen = {stage.name for stage in stages if first <= KINDS.index(stage.kind) <= last}
    for word in options.force:
        outside = not {stage.name for stage in find_stages(stages, word, "--force")} & chosen
        require(not outside, f"--force {word} lies outside --from and --until.")
    return chosen


def carry_out(
    story: Story, stages: list[Stage], chosen: set[str], options: Options, cluster: job_submission.Cluster | None
) -> dict[str, Result]:
    """Run what is to be run, in order; returns what the stages have left."""
    results: dict[str, Result] = {}
    needed = {need for stage in stages if stage.name in chosen for need in stage.needs}
    forced = {stage.name for word in options.force for stage in find_stages(stages, word, "--force")}
    for number, stage in enumerate(stages, 1):
        title = f"{number}/{len(stages)} {stage.name}"
        if stage.name not in chosen:
            if stage.name in needed:
                results[stage.name] = taken(story, stage, options.begin)
            continue
        if options.dry_run and not results.keys() >= set(stage.needs):
            print(f"{title}: would run, after {', '.join(name for name in stage.needs if name not in results)}")
            continue
        inputs = stage.inputs(results)
        reason = story.reason(stage, inputs, stage.name in forced)
        if not reason:
            results[stage.name] = story.result(stage)
            print(f"{title}: done, nothing has changed")
        elif options.dry_run:
            print(f"{title}: would run ({reason})")
        else:
            print(f"{title} ({reason})", flush=True)
            results[stage.name] = perform(story, stage, inputs, results, reason == "forced", options.retries, cluster)
    return results


def taken(story: Story, stage: Stage, begin: str) -> Result:
    """What a stage before --from has left."""
    result = story.result(stage)
    if result is None:
        raise UserError(f"--from {begin}: stage {stage.name} is not done, or its result has gone: leave --from out.")
    return result


def perform(
    story: Story,
    stage: Stage,
    inputs: dict,
    results: Results,
    forced: bool,
    retries: int,
    cluster: job_submission.Cluster | None,
) -> Result:
    """Run a stage to its end; how it ended is in the story, whatever happens."""
    anew = forced or story.is_still_forced(stage, inputs)
    command = stage.command(results, anew)
    settle(story, stage, not forced and story.is_begun(stage, inputs, command), forced, cluster)
    arguments = list(command.arguments)
    if command.experiment:
        text = filesystem.json_bytes(to_json(command.experiment))
        # A name for each content: a job that waits for its start must not read another one's.
        config = filesystem.join(story.out, "stages", f"{stage.name}-{filesystem.sha256(text)[:8]}.json")
        filesystem.publish(config, text)
        arguments = ["--config", config, *arguments]
    record = story.begin(stage, inputs, command, anew, forced)
    try:
        attempt_all(story, stage, record, arguments, retries, cluster)
    except KeyboardInterrupt:
        story.end(stage, STOPPED)
        raise
    except Exception as error:
        story.end(stage, FAILED, problem=str(error).partition("\n")[0])
        raise
    fingerprint = stage.seen(command.path)
    if fingerprint is None:
        story.end(stage, FAILED, problem=f"it left nothing complete at {command.path}")
        raise UserError(f"Stage {stage.name} left nothing complete at {command.path}: run it by hand to see why.")
    result = Result(command.path, fingerprint)
    story.end(stage, DONE, result)
    return result


def settle(story: Story, stage: Stage, is_same: bool, forced: bool, cluster: job_submission.Cluster | None) -> None:
    """Stop an earlier job of a stage that still runs and would make something else; refuse where nobody can be asked."""
    for attempt in story.stages.get(stage.name, {}).get("attempts", []):
        if not attempt["job"]:
            continue
        if cluster:
            if not is_same and cluster.status(attempt["job"]) in job_submission.ALIVE:
                cluster.stop(attempt["job"])
        elif attempt["state"] == RUNNING and not forced:
            raise UserError(
                f"Stage {stage.name} may still run as job {attempt['job']}: give --submit to follow it, or, if its cluster "
                f"has gone, --force {stage.name}."
            )


def attempt_all(
    story: Story, stage: Stage, record: dict, arguments: list[str], retries: int, cluster: job_submission.Cluster | None
) -> None:
    """Try a stage, once and `retries` times more; a mistake of the user's is not tried again, a store that was away is."""
    for left in range(retries, -1, -1):
        attempt = begin_attempt(story, stage, record, cluster)
        try:
            if cluster:
                cluster.run(stage.job, arguments, attempt["job"])
            else:
                importlib.import_module(f"jobs.{stage.job}").job(arguments)
            return
        except Exception as error:
            if isinstance(error, UserError):  # the mend that a job's sentence names, as it is spelled here
                error.args = (str(error).replace("--overwrite", f"--force {stage.name}"),)
            if not left or (isinstance(error, UserError) and not isinstance(error, StorageError)):
                raise
            attempt |= {"state": FAILED, "ended": now()}
            story.save()
            log.warning("%s failed, and is tried again: %s", stage.name, str(error).partition("\n")[0])
            if stage.seen(record["path"]) is None:  # what it has finished since is kept
                arguments = [word for word in arguments if word != "--overwrite"]
            if not cluster:
                shut_down_ray()


def begin_attempt(story: Story, stage: Stage, record: dict, cluster: job_submission.Cluster | None) -> dict:
    """A new attempt, or the one whose job is still on the cluster; a job's id is written down before there is the job."""
    last = record["attempts"][-1] if record["attempts"] else None
    if last and last["job"] and cluster:
        # Whatever the story says: who wrote it may have been killed, or have failed to stop the job.
        status = cluster.status(last["job"])
        if status in job_submission.ALIVE or (status == "SUCCEEDED" and last["state"] == RUNNING):
            last |= {"state": RUNNING, "ended": None}
            story.save()
            return last
    if last and last["state"] == RUNNING:
        last["state"] = "killed"
    name = f"{stage.name}-{uuid.uuid4().hex[:8]}" if cluster else ""
    record["attempts"].append(new_attempt(name))
    story.save()
    return record["attempts"][-1]


def shut_down_ray() -> None:
    """End this process's Ray, if it has one; a stage that failed may have left it in any state."""
    with contextlib.suppress(Exception):
        import ray

        ray.shutdown()


def show_status(options: StatusOptions) -> None:
    """Print the story of a pipeline."""
    out = command_line.absolute(options.out, "out")
    story = Story.open(out)
    if not story.stages:
        raise UserError(f"{out} holds no pipeline ({out}/pipeline.json): give --out.")
    print(story.table(story.told.get("stages of", list(story.stages)), locks.is_held(out)))


def job(argv: Sequence[str]) -> None:
    """The command line."""
    if argv and argv[0] == "status":
        about = "Show what became of each stage of a pipeline."
        show_status(command_line.parse_line(StatusOptions, argv[1:], "python jobs/pipeline.py status", about))
        return
    about = "Preprocess, (tune,) train, evaluate and predict, skipping what is done. --out: results by default."
    experiment, options = command_line.parse(Options(), argv, "pipeline.py", about)
    print(run(experiment, options))


if __name__ == "__main__":
    command_line.main(job)
