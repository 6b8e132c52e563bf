"""`pipeline.json`: the state of each stage, written whole at every step, so that a rerun of the same command resumes.

It holds the experiment and, by stage, its state, inputs, attempts (with times and job ids) and result.
"""

import datetime
from dataclasses import asdict, dataclass, field

from heartseg.config.experiment import first_difference
from heartseg.errors import UserError, require
from heartseg.storage import filesystem
from jobs.support.pipeline_stages import Result, Stage

NAME = "pipeline.json"
RUNNING, DONE, FAILED, STOPPED, KILLED = "running", "done", "failed", "stopped", "killed"


def timestamp() -> str:
    """The current time, as the file holds it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass
class PipelineState:
    """What `pipeline.json` holds; every change is saved at once."""

    out: str
    metadata: dict = field(default_factory=dict)
    """The experiment, the command, the revision of the code and the names of all stages."""
    stages: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def open(cls, out: str) -> "PipelineState":
        """The state in a folder; an empty one if no pipeline was started there."""
        path = filesystem.join(out, NAME)
        if not filesystem.exists(path):
            return cls(out)
        try:
            metadata = filesystem.read_json(path)
            stages = metadata.pop("stages")
            is_readable = all({"state", "inputs", "path", "attempts", "result"} <= record.keys() for record in stages.values())
        except (UserError, AttributeError, KeyError, TypeError):
            is_readable = False
        fix = "remove it and rerun pipeline.py, which keeps what is complete."
        require(is_readable, f"{path} is not the record of a pipeline: {fix}")
        return cls(out, metadata, stages)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        filesystem.publish_json(filesystem.join(self.out, NAME), self.metadata | {"stages": self.stages})

    def result(self, stage: Stage) -> Result | None:
        """The result of a stage, if it is done and its result has not changed since."""
        record = self.stages.get(stage.name, {})
        if record.get("state") != DONE or stage.fingerprint(record["result"]["path"]) != record["result"]["fingerprint"]:
            return None
        return Result(**record["result"])

    def reason_to_run(self, stage: Stage, inputs: dict, is_forced: bool) -> str:
        """Why a stage has to run; empty if its result is up to date."""
        record = self.stages.get(stage.name)
        if is_forced:
            return "forced"
        if not record:
            return "not begun"
        if difference := first_difference(record["inputs"], inputs):
            return f"changed: {difference if len(difference) <= 100 else difference.partition(':')[0]}"
        if record["state"] != DONE:
            return "interrupted" if record["state"] == RUNNING else record["state"]
        return "" if self.result(stage) else "its result is missing or was changed"

    def unfinished(self, stage: Stage, inputs: dict) -> dict | None:
        """The record of a stage that was begun with these inputs and has not ended successfully."""
        record = self.stages.get(stage.name)
        return record if record and record["inputs"] == inputs and record["state"] != DONE else None

    def is_still_forced(self, stage: Stage, inputs: dict) -> bool:
        """True if a forced stage was interrupted before it replaced the old result, or before it created its new folder."""
        record = self.unfinished(stage, inputs)
        if not record or not record.get("forced"):
            return False
        old, path = record.get("replaces"), record["path"]
        return stage.fingerprint(path) == old if old else not filesystem.exists(path)

    def attempts(self, stage: Stage) -> list[dict]:
        """The attempts at a stage so far, each of which resumed the one before."""
        return self.stages.get(stage.name, {}).get("attempts", [])

    def begin(
        self, stage: Stage, inputs: dict, path: str, arguments: list[str], job: str, from_scratch: bool, is_resumed: bool
    ) -> None:
        """Record a new attempt, or that the last one's job is followed; `job` is its id, empty in this process."""
        attempts = self.attempts(stage) if is_resumed else []
        for attempt in attempts:
            if attempt["state"] == RUNNING:
                attempt["state"] = KILLED
        if job and attempts and attempts[-1]["job"] == job:
            attempts[-1] |= {"state": RUNNING, "ended": None}
        else:
            attempts.append({"state": RUNNING, "job": job, "started": timestamp(), "ended": None})
        record = {"state": RUNNING, "inputs": inputs, "path": path, "arguments": arguments}
        record |= {"attempts": attempts, "result": None, "problem": "", "forced": from_scratch}
        record["replaces"] = stage.fingerprint(path) if from_scratch else None
        self.stages[stage.name] = record
        self.save()

    def end(self, stage: Stage, state: str, result: Result | None = None, problem: str = "") -> None:
        """Record how a stage and its last attempt ended."""
        record = self.stages[stage.name]
        record |= {"state": state, "result": asdict(result) if result else None, "problem": problem}
        record["attempts"][-1] |= {"state": state, "ended": timestamp()}
        self.save()

    def format_table(self, is_locked: bool) -> str:
        """All stages as a table for a terminal; `is_locked`: a process is working on the pipeline now."""
        lines = [f"{'stage':<18}{'state':<13}{'time':>9}  {'tries':>5}  result"]
        for name in self.metadata.get("stages of", list(self.stages)):
            record = self.stages.get(name)
            if not record:
                lines.append(f"{name:<18}not begun")
                continue
            attempts, is_orphaned = record["attempts"], record["state"] == RUNNING and not is_locked
            state = "interrupted" if is_orphaned else record["state"]
            now = timestamp() if is_locked else None  # the time of an attempt whose process was killed is unknown
            spans = [(attempt["started"], attempt["ended"] or (attempt["state"] == RUNNING and now)) for attempt in attempts]
            minutes, seconds = divmod(round(sum(_seconds(*span) for span in spans if all(span))), 60)
            duration = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
            shown = record["problem"] or (record["result"] or record)["path"]
            lines.append(f"{name:<18}{state:<13}{duration:>9}  {len(attempts):>5}  {shown}")
            if state != DONE and attempts and attempts[-1]["job"]:
                note = " (no process follows it: the job may still run)" if is_orphaned else ""
                lines.append(f"{'':<18}{'job':<13}{attempts[-1]['job']}{note}")
        return "\n".join(lines)


def _seconds(started: str, ended: str) -> float:
    return (datetime.datetime.fromisoformat(ended) - datetime.datetime.fromisoformat(started)).total_seconds()
