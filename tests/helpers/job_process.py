"""`jobs/train.py` as a separate process that tests watch and kill."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from heartseg.training import run_directory
from helpers.experiments import ROOT

EPOCHS = 10


class Job:
    """A process of `jobs/train.py`; a mark in their environment identifies its child processes."""

    def __init__(self, shards: str, folder: Path, *arguments: str, launcher: str = "ray", prefix: tuple[str, ...] = ()):
        self.runs = folder
        command = [*prefix, sys.executable, str(ROOT / "jobs" / "train.py"), "quick", "--data", shards, "--runs", str(folder)]
        command += ["--image.height", "64", "--image.width", "64", "--train.epochs", str(EPOCHS), "--train.batch-size", "8"]
        command += ["--train.precision", "fp32", "--tracking.wandb", "off", "--launcher", launcher, *arguments]
        # Plain SGD without averaged weights: checkpoints of 130 MB, a third of AdamW's.
        command += ["--optim.kind", "sgd", "--optim.ema-decay", "0"]
        self.start(command)

    def start(self, command: list[str]) -> None:
        """Start the process."""
        self.mark = uuid.uuid4().hex
        environment = os.environ | {"HEARTSEG_TEST_MARK": self.mark, "OMP_NUM_THREADS": "1"}
        environment["RAY_DEDUP_LOGS"] = "0"  # trained_again counts every line of an epoch
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
        )

    def run(self) -> str:
        """The run's folder, once it exists."""
        return wait_for(lambda: next((str(f) for f in self.runs.glob("quick-*") if (f / "experiment.json").exists()), None))

    def wait_for_epoch(self, epoch: int) -> None:
        """Return once an epoch is recorded."""
        wait_for(lambda: self.num_epochs() >= epoch, self.process)

    def kill(self, title: str) -> int:
        """SIGKILL one of this job's processes by its title; returns the number of recorded epochs."""
        os.kill(next(iter(self.pids(title))), signal.SIGKILL)
        return self.num_epochs()

    def pids(self, title: str) -> set[int]:
        """This job's processes whose title contains some words."""
        return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid, title)}

    def num_epochs(self) -> int:
        """The number of recorded epochs."""
        return len(run_directory.read_record(self.run()))

    def _is_ours(self, pid: int, title: str) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/comm").read_bytes()
            return title.encode() in words and self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    def finish(self, seconds: float = 200) -> str:
        """Wait for the end; returns what was printed and asserts success."""
        output, _ = self.process.communicate(timeout=seconds)
        assert self.process.returncode == 0, output[-3000:]
        return output


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 120):
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        assert process is None or process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    raise AssertionError(f"not met within {seconds:g} s")


def trained_again(*outputs: str) -> int:
    """How many recorded epochs were trained again: repeated lines of an epoch's end in the outputs together."""
    ended = re.findall(r"epoch (\d+)/\d+  train/loss", "".join(outputs))
    return len(ended) - len(set(ended))
