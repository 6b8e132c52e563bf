"""Faults, injected for real: killed processes, a disk that fills, memory that runs out."""

import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest

from heartseg.errors import UserError
from heartseg.models import checkpoint
from heartseg.training import run_directory
from helpers.experiments import ROOT, tiny_experiment
from helpers.job_process import EPOCHS, Job, trained_again
from jobs import train
from jobs.support import command_line, ray_runtime


def assert_every_epoch_once(run: str) -> None:
    assert [epoch["epoch"] for epoch in run_directory.read_record(run)] == list(range(1, EPOCHS + 1))


def test_a_killed_worker_restarts_and_the_record_has_no_gap(shards, tmp_path, measurement):
    job = Job(shards, tmp_path)
    job.wait_for_epoch(2)
    recorded, killed = job.kill("RayTrainWorker"), time.monotonic()
    job.wait_for_epoch(recorded + 1)
    measurement(f"a worker killed: {time.monotonic() - killed:.1f} s to the next epoch")
    # An epoch whose checkpoint was incomplete is trained again.
    assert trained_again(job.finish()) <= 1
    assert_every_epoch_once(job.run())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_progresses_survives_more_deaths_than_ray_allows_in_one_run(shards, tmp_path):
    job, recorded = Job(shards, tmp_path), 0
    for _ in range(ray_runtime.MAX_TRIES + 2):
        job.wait_for_epoch(recorded + 1)
        recorded = job.kill("RayTrainWorker")
    assert "advanced in between" in job.finish()
    assert_every_epoch_once(job.run())


@pytest.mark.slow
def test_the_same_command_resumes_after_the_driver_was_killed(shards, tmp_path, measurement):
    job = Job(shards, tmp_path)
    job.wait_for_epoch(3)
    job.process.kill()
    first, _ = job.process.communicate()
    kept = checkpoint.last(job.run()).epoch
    again, started = Job(shards, tmp_path), time.monotonic()
    again.wait_for_epoch(kept + 1)
    measurement(f"the driver killed, the command rerun: {time.monotonic() - started:.1f} s to the next epoch")
    assert kept >= 3 and trained_again(first, again.finish()) <= 1
    assert_every_epoch_once(again.run())


@pytest.mark.parametrize("launcher", ["plain", pytest.param("ray", marks=pytest.mark.slow)])
def test_sigterm_ends_in_order_and_the_same_command_resumes(shards, tmp_path, launcher):
    job = Job(shards, tmp_path, launcher=launcher)
    job.wait_for_epoch(2)
    recorded = job.num_epochs()
    job.process.terminate()
    output, _ = job.process.communicate(timeout=60)
    assert job.process.returncode == 143, output[-3000:]
    assert "rerun the same command to resume" in output and "Traceback" not in output
    assert checkpoint.last(job.run()).epoch >= recorded  # what was being written became complete
    assert trained_again(output, Job(shards, tmp_path, launcher=launcher).finish()) == 0  # an epoch that was reported is kept
    assert_every_epoch_once(job.run())


def test_a_full_disk_is_a_one_line_error_and_complete_checkpoints_stay(shards, tmp_path):
    # A small file system in its own mount namespace; after the second epoch, another process fills it.
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""mount -t tmpfs -o size=400m tmpfs {disk} || exit 99
        (until ls {disk}/quick-*/checkpoints/epoch_0002/checkpoint.json; do sleep 0.05; done; cat /dev/zero > {disk}/ballast) \\
            > /dev/null 2>&1 &
        "$@"; code=$?
        rm {disk}/ballast; cp -r {disk}/quick-* {tmp_path}/; exit $code"""
    job = Job(shards, disk, launcher="plain", prefix=("unshare", "-rm", "sh", "-c", script, "sh"))
    output, _ = job.process.communicate(timeout=200)
    assert job.process.returncode == 2, output[-2000:]
    assert "No space left on device" in output and "Traceback" not in output
    (run,) = tmp_path.glob("quick-*")
    kept = checkpoint.last(str(run))
    record = [epoch["epoch"] for epoch in run_directory.read_record(str(run))]
    assert record == list(range(1, kept.epoch + 1)) and kept.weights()
    assert trained_again(output, Job(shards, tmp_path, launcher="plain").finish()) <= 1
    assert_every_epoch_once(str(run))


def test_out_of_memory_is_a_one_line_error_with_the_batch_and_image_size(shards, tmp_path):
    # The address space has room for the network and its average, and not for gradients and activations.
    code = """
        import resource, sys
        sys.path.insert(0, sys.argv.pop(1))
        from jobs import train
        from jobs.support import command_line
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 900 * 2**20,) * 2)
        command_line.main(train.job)"""
    command = [sys.executable, "-c", textwrap.dedent(code), str(ROOT), "quick", "--data", shards, "--runs", str(tmp_path)]
    command += ["--launcher", "plain", "--image.height", "64", "--image.width", "64", "--train.batch-size", "24"]
    command += ["--model.backbone", "resnet101", "--tracking.wandb", "off", "--train.precision", "fp32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr[-2000:]
    assert "ran out of memory (cpu) with 24 of a batch's 24 images of 64 x 64" in done.stderr
    assert "Traceback" not in done.stderr


def test_elastic_workers_are_given_as_a_range(tmp_path):
    for line in (["--workers", "1:4"], ["--workers=1:4"]):
        experiment, _ = command_line.parse(train.Options(), ["quick", *line], "train.py", "")
        assert (experiment.min_workers, experiment.workers) == (1, 4)
    with pytest.raises(UserError, match="--min-workers must be at least 0 and no more than"):
        command_line.parse(train.Options(), ["quick", "--workers", "4:1"], "train.py", "")
    assert replace(tiny_experiment(), workers=2).min_workers == 0
