"""`jobs/train.py` as a separate process that tests watch and kill."""

import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

from heartseg.training import run_directory
from helpers.experiments import ROOT

# An environment variable that a process passes to its children, Ray's workers among them: its value identifies them.
MARK = "HEARTSEG_TEST_MARK"


def train_arguments(shards: str, folder: Path, launcher: str, epochs: int) -> list[str]:
    small = ["--image.height", "64", "--image.width", "64", "--train.batch-size", "8", "--train.precision", "fp32"]
    # Plain SGD without averaged weights: checkpoints of 130 MB, a third of AdamW's.
    small += ["--optim.kind", "sgd", "--optim.ema-decay", "0", "--tracking.wandb", "off", "--checkpoint-seconds", "0"]
    return ["quick", "--data", shards, "--runs", str(folder), "--launcher", launcher, "--train.epochs", str(epochs), *small]


def changed_train(change: str) -> list[str]:
    """The command of `jobs/train.py`, without flags, after statements that change `ray_runtime` or the process."""
    code = f"import functools, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'; from jobs import train; "
    code += f"from jobs.support import command_line, ray_runtime; {change}; command_line.main(train.job)"
    return [sys.executable, "-c", code]


class Job:
    """A process of `jobs/train.py`; a mark in their environment identifies its child processes."""

    def __init__(self, shards: str, folder: Path, launcher: str = "ray", epochs: int = 6, prefix: tuple[str, ...] = ()):
        self.runs = folder
        arguments = train_arguments(shards, folder, launcher, epochs)
        self.start([*prefix, sys.executable, str(ROOT / "jobs" / "train.py"), *arguments])

    def start(self, command: list[str]) -> None:
        self.mark = uuid.uuid4().hex
        environment = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"}
        environment["RAY_DEDUP_LOGS"] = "0"  # trained_again counts every line of an epoch
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
        )

    def run(self) -> str:
        return wait_for(lambda: next((str(f) for f in self.runs.glob("quick-*") if (f / "experiment.json").exists()), None))

    def wait_for_epoch(self, epoch: int) -> None:
        wait_for(lambda: len(epochs_of(self.run())) >= epoch, self.process)

    def pids(self, title: str) -> set[int]:
        return marked_pids(title, self.mark)

    def finish(self, seconds: float = 400) -> str:
        output, _ = self.process.communicate(timeout=seconds)
        assert self.process.returncode == 0, output[-3000:]
        return output


def marked_pids(title: str, mark: str) -> set[int]:
    """The processes whose title contains some words and whose environment holds a mark."""

    def is_one(pid: str) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/comm").read_bytes()
            return title.encode() in words and mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    return {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_one(pid)}


def epochs_of(run: str) -> list[int]:
    return [epoch["epoch"] for epoch in run_directory.read_record(run)]


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 240):
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        assert process is None or process.poll() is None, (process.communicate()[0] or "")[-3000:]
        time.sleep(0.02)
    raise AssertionError(f"not met within {seconds:g} s")


def trained_again(*outputs: str) -> int:
    """The number of recorded epochs that were trained again, from repeated lines of epochs in all outputs."""
    ended = re.findall(r"epoch (\d+)/\d+  train/loss", "".join(outputs))
    return len(ended) - len(set(ended))
