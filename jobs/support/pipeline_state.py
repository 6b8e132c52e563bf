"""The state of a pipeline's stages in `OUT/pipeline.json`: which have run, on which inputs, and which must run again."""

import contextlib
import datetime
from dataclasses import dataclass, field

from heartseg.config.experiment import first_difference
from heartseg.errors import UserError
from heartseg.storage import filesystem
from jobs.support.pipeline_stages import Result, Stage

RECORD = "pipeline.json"
RUNNING, DONE, FAILED, STOPPED, KILLED = "running", "done", "failed", "stopped", "killed"


def timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass
class PipelineState:
    """The contents of `pipeline.json`; every change is saved immediately, so that rerunning the same command resumes."""

    out: str
    metadata: dict = field(default_factory=dict)
    """The experiment, the command, the revision of the code and the names of all stages."""
    stages: dict[str, dict] = field(default_factory=dict)
    """By name: state, inputs, path, command line, attempts (each with its times and job id), result and problem."""

    @classmethod
    def open(cls, out: str) -> "PipelineState":
        """The state in a folder, empty if no pipeline was started there."""
        path = filesystem.join(out, RECORD)
        if not filesystem.exists(path):
            return cls(out)
        with contextlib.suppress(UserError, AttributeError, KeyError, TypeError):
            metadata = filesystem.read_json(path)
            stages = metadata.pop("stages")
            if all({"state", "inputs", "path", "attempts", "result"} <= record.keys() for record in stages.values()):
                return cls(out, metadata, stages)
        fix = "remove it and rerun pipeline.py, which keeps what is complete."
        raise UserError(f"{path} is not a pipeline's record: {fix}")

    def save(self) -> None:
        filesystem.publish_json(filesystem.join(self.out, RECORD), self.metadata | {"stages": self.stages})

    def result(self, stage: Stage) -> Result | None:
        """The result of a stage that is done, if it has not changed since."""
        record = self.stages.get(stage.name, {})
        if record.get("state") != DONE or stage.fingerprint(record["result"]["path"]) != record["result"]["fingerprint"]:
            return None
        return Result(**record["result"])

    def reason_to_run(self, stage: Stage, inputs: dict, is_forced: bool) -> str:
        """Why a stage must run; empty if its result is up to date."""
        record = self.stages.get(stage.name)
        if is_forced or not record:
            return "forced" if is_forced else "not started"
        if difference := first_difference(record["inputs"], inputs):
            return f"changed: {difference if len(difference) <= 100 else difference.partition(':')[0]}"
        if record["state"] != DONE:
            return "interrupted" if record["state"] == RUNNING else record["state"]
        return "" if self.result(stage) else "its result is missing or was changed"

    def attempts(self, stage: Stage) -> list[dict]:
        """The attempts at a stage so far, each of which resumed the one before."""
        return self.stages.get(stage.name, {}).get("attempts", [])

    def end(self, stage: Stage, state: str, result: Result | None = None, problem: str = "") -> None:
        """Record how a stage and its last attempt ended."""
        record = self.stages[stage.name]
        record |= {"state": state, "result": result and result._asdict(), "problem": problem}
        record["attempts"][-1] |= {"state": state, "ended": timestamp()}
        self.save()

    def format_table(self, is_locked: bool) -> str:
        """All stages as a table for a terminal; `is_locked` means that a process is working on the pipeline."""
        lines = [f"{'stage':<18}{'state':<13}{'time':>9}  {'tries':>5}  result"]
        for name in self.metadata.get("stages of", list(self.stages)):
            record = self.stages.get(name)
            if not record:
                lines.append(f"{name:<18}not started")
                continue
            attempts, is_orphaned = record["attempts"], record["state"] == RUNNING and not is_locked
            state = "interrupted" if is_orphaned else record["state"]
            now = timestamp() if is_locked else None  # the duration of a killed process's attempt is unknown
            spans = [(attempt["started"], attempt["ended"] or (attempt["state"] == RUNNING and now)) for attempt in attempts]
            times = [map(datetime.datetime.fromisoformat, span) for span in spans if all(span)]
            minutes, seconds = divmod(round(sum((ended - started).total_seconds() for started, ended in times)), 60)
            duration = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
            shown = record["problem"] or (record["result"] or record)["path"]
            lines.append(f"{name:<18}{state:<13}{duration:>9}  {len(attempts):>5}  {shown}")
            if state != DONE and attempts and attempts[-1]["job"]:
                note = " (no process follows it: the job may still be running)" if is_orphaned else ""
                lines.append(f"{'':<18}{'job':<13}{attempts[-1]['job']}{note}")
        return "\n".join(lines)


def begin_attempt(attempts: list[dict], job: str) -> list[dict]:
    """The attempts so far, and a new one whose job id is `job` (may be empty), unless the last attempt has that id."""
    for attempt in attempts:
        if attempt["state"] == RUNNING:
            attempt["state"] = KILLED
    if job and attempts and attempts[-1]["job"] == job:
        attempts[-1] |= {"state": RUNNING, "ended": None}
        return attempts
    return [*attempts, {"state": RUNNING, "job": job, "started": timestamp(), "ended": None}]
