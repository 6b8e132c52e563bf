"""Trainings and bare trackers that talk to a wandb server, for tests of tracking to start, kill and wait for."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import wandb

from heartseg.config.experiment import TrackingConfig, from_json
from heartseg.models import checkpoint
from heartseg.shards.reader import open_shards
from heartseg.training import run_directory, wandb_logger
from heartseg.training.run_directory import Run
from helpers.experiments import ROOT, tiny_experiment
from helpers.job_process import wait_for
from helpers.wandb_server import KEY, Server

EPOCHS = 8
WANDB = str(Path(sys.executable).with_name("wandb"))
# What tests cannot wait for: wandb sends every 15 s, and tries again after 2 s. It takes whole seconds.
FAST = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1", "WANDB_X_FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "1"}


def start(shards: str, folder: Path, epochs: int = EPOCHS, **environment: str) -> subprocess.Popen:
    """A plain training process on tiny shards; its output goes to `folder`.log."""
    sizes = ["--image.height", "64", "--image.width", "64", "--train.batch-size", "8", "--train.epochs", str(epochs)]
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "quick", *sizes, "--launcher", "plain"]
    command += ["--data", shards, "--runs", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | FAST | environment
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def tracked_run(shards: str, folder: Path) -> Run:
    experiment = tiny_experiment(data=shards, runs=str(folder), tracking=TrackingConfig())
    return run_directory.open_run(experiment, open_shards(shards))


def track(run: Run, epochs: int, pause_s: float = 0, artifact: bool = False, **environment: str) -> dict[str, float]:
    """Track a run like a training would, or resume it, without training; returns the seconds that calls took."""
    record, slowest_s = run_directory.read_record(run.path), 0.0
    wandb.teardown()  # what earlier tests of this process left, WANDB_SERVICE included, which the patch would restore
    with patch.dict(os.environ, FAST | environment):
        tracker = wandb_logger.build_tracker(from_json(run.description["experiment"]), run, True, record)
        for epoch in range(len(record) + 1, epochs + 1):
            record.append({"epoch": epoch, "test/dice": epoch / epochs})
            run_directory.write_record(run.path, record)
            began = time.monotonic()
            tracker.log(record[-1])
            slowest_s = max(slowest_s, time.monotonic() - began)
            time.sleep(pause_s)
        if artifact:  # a server that is silent holds it for 20 s
            tracker.artifact(checkpoint.save(run.path, {}, {}, {"epoch": epochs}).path, "of no shards")
        began = time.monotonic()
        tracker.finish()
        finish_s = time.monotonic() - began
        wandb.teardown()
    return {"slowest_log_s": slowest_s, "finish_s": finish_s}


def start_tracking(run: Run, epochs: int, pause_s: float, **environment: str) -> subprocess.Popen:
    asked = f"track(find_run({run.path!r}), {epochs}, {pause_s})"
    code = f"from helpers.tracked_runs import track\nfrom heartseg.training.run_directory import find_run\n{asked}"
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen, folder: Path) -> str:
    """Wait for a training process to succeed; returns its output and that of earlier ones."""
    assert process.wait(timeout=400) == 0, folder.with_suffix(".log").read_text()
    return folder.with_suffix(".log").read_text()


def kill_after(condition, process: subprocess.Popen) -> None:
    """SIGKILL as soon as a condition holds: no handler runs, nothing is finished."""
    wait_for(condition, process)
    process.kill()
    process.wait()


def the_run(folder: Path) -> Path:
    (path,) = [entry for entry in folder.iterdir() if entry.is_dir()]
    return path


def sync(server: Server, *arguments: str) -> str:
    """The command that our messages and the README name."""
    environment = os.environ | server.environment()
    done = subprocess.run([WANDB, "sync", *arguments], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stderr


def kept_records(fragment: Path) -> list[dict]:
    """All records of a `.wandb` file, by wandb's own reader."""
    asked = [WANDB, "leet", "inspect", "--json", str(fragment)]
    return [json.loads(line) for line in subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()]


def kept_rows(fragment: Path) -> list[dict]:
    return [record["history"]["item"] for record in kept_records(fragment) if record["type"] == "history"]


def assert_same(rows: list[dict], record: list[dict]) -> None:
    assert [row["epoch"] for row in rows] == [epoch["epoch"] for epoch in record]
    for row, epoch in zip(rows, record, strict=True):
        assert {name: row[name] for name in epoch} == pytest.approx(epoch)


def without_key(run: Path) -> bool:
    return not any(KEY.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())
