"""`pipeline.json`: what became of each stage, written whole at every step, so that the same command goes on after any end.

It holds the experiment and, by stage, its state, inputs, attempts (with times and job ids) and result.
"""

import datetime
import json
import time
from dataclasses import asdict, dataclass, field

from heartseg.config.experiment import first_difference
from heartseg.errors import UserError
from heartseg.storage import filesystem
from jobs.support.pipeline_stages import Command, Result, Stage

NAME = "pipeline.json"
RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"


def now() -> str:
    """The time as it is written down."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass
class Story:
    """The record of a pipeline in its folder; `save` after each change."""

    out: str
    told: dict = field(default_factory=dict)
    stages: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def open(cls, out: str) -> "Story":
        """The story so far; an empty one where nothing was begun."""
        path = filesystem.join(out, NAME)
        if not filesystem.exists(path):
            return cls(out)
        try:
            there = filesystem.read_json(path)
        except UserError:
            there = None
        if not isinstance(there, dict) or not isinstance(there.get("stages"), dict):
            raise UserError(f"{path} tells no pipeline's story: remove it, and what is complete is found again.")
        return cls(out, {key: value for key, value in there.items() if key != "stages"}, there["stages"])

    def save(self) -> None:
        """Write it, whole or not at all."""
        filesystem.publish_json(filesystem.join(self.out, NAME), self.told | {"stages": self.stages})

    def result(self, stage: Stage) -> Result | None:
        """What a stage left, if it is done and still there as it was."""
        record = self.stages.get(stage.name, {})
        if record.get("state") != DONE or stage.seen(record["result"]["path"]) != record["result"]["fingerprint"]:
            return None
        return Result(**record["result"])

    def reason(self, stage: Stage, inputs: dict, is_forced: bool) -> str:
        """Why a stage is to run; empty where it need not."""
        record = self.stages.get(stage.name)
        if is_forced:
            return "forced"
        if not record:
            return "not begun"
        difference = first_difference(record["inputs"], plain(inputs))
        if difference:
            return f"changed: {_short(difference)}"
        if record["state"] != DONE:
            return "interrupted" if record["state"] == RUNNING else record["state"]
        return "" if self.result(stage) else "its result is gone or another"

    def is_begun(self, stage: Stage, inputs: dict, command: Command) -> bool:
        """True where the stage was begun with these inputs and this path, and has not come to its end."""
        before = self.stages.get(stage.name, {})
        return before.get("inputs") == plain(inputs) and before.get("path") == command.path and before["state"] != DONE

    def is_still_forced(self, stage: Stage, inputs: dict) -> bool:
        """True where a forced stage was interrupted and what it replaces is still there, or, replacing nothing, nothing is."""
        record = self.stages.get(stage.name, {})
        if not record.get("forced") or record["state"] == DONE or record["inputs"] != plain(inputs):
            return False
        replaced = record.get("replaces")
        if replaced is None:  # a new run, say, which goes on once it is begun
            return not filesystem.exists(record["path"])
        return stage.seen(record["path"]) == replaced

    def begin(self, stage: Stage, inputs: dict, command: Command, is_anew: bool, is_asked: bool) -> dict:
        """The record of a stage that runs now; attempts at the same thing before stay in it.

        `is_anew`: what is complete is done again; `is_asked`: because this very command says so, whatever was tried before.
        """
        before = self.stages.get(stage.name, {})
        is_same = self.is_begun(stage, inputs, command) and not is_asked
        record = {"state": RUNNING, "inputs": plain(inputs), "path": command.path, "arguments": command.arguments}
        record |= {"attempts": before["attempts"] if is_same else [], "result": None, "problem": ""}
        for attempt in record["attempts"]:
            if attempt["state"] == RUNNING and not attempt["job"]:
                attempt["state"] = "killed"
        record |= {"forced": is_anew, "replaces": stage.seen(command.path) if is_anew else None}
        self.stages[stage.name] = record
        self.save()
        return record

    def end(self, stage: Stage, state: str, result: Result | None = None, problem: str = "") -> None:
        """Write down how a stage, and its last attempt, ended."""
        record = self.stages[stage.name]
        record |= {"state": state, "result": asdict(result) if result else None, "problem": problem}
        if record["attempts"] and record["attempts"][-1]["state"] == RUNNING:
            record["attempts"][-1] |= {"state": state, "ended": now()}
        self.save()

    def table(self, names: list[str], is_held: bool) -> str:
        """The stages on a terminal; `is_held`: somebody is at it."""
        lines = [f"{'stage':<18}{'state':<13}{'time':>9}  {'tries':>5}  result"]
        for name in names:
            record = self.stages.get(name)
            if not record:
                lines.append(f"{name:<18}{'not begun':<13}")
                continue
            state = "interrupted" if record["state"] == RUNNING and not is_held else record["state"]
            spent = sum(_seconds(attempt, is_held) for attempt in record["attempts"])
            shown = record["problem"] or (record["result"] or record)["path"]
            lines.append(f"{name:<18}{state:<13}{_clock(spent):>9}  {len(record['attempts']):>5}  {shown}")
            jobs = [attempt for attempt in record["attempts"] if attempt["job"]]
            if jobs and state != DONE:
                doubt = " (nobody follows it: its job may still run)" if jobs[-1]["state"] == RUNNING and not is_held else ""
                lines.append(f"{'':<18}{'job':<13}{jobs[-1]['job']}{doubt}")
        return "\n".join(lines)


def plain(value: dict) -> dict:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def new_attempt(job: str) -> dict:
    """An attempt at a stage that begins now; `job` is its id on a cluster, empty in this process."""
    return {"state": RUNNING, "job": job, "started": now(), "ended": None}


def _seconds(attempt: dict, is_held: bool) -> float:
    """How long it took, or takes; 0 where that is not known, since whoever wrote the story was killed."""
    if not attempt["ended"]:
        began = datetime.datetime.fromisoformat(attempt["started"]).timestamp()
        return time.time() - began if attempt["state"] == RUNNING and is_held else 0.0
    ends = [datetime.datetime.fromisoformat(attempt[key]).timestamp() for key in ("started", "ended")]
    return ends[1] - ends[0]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _short(difference: str) -> str:
    return difference if len(difference) <= 100 else difference.partition(":")[0]
