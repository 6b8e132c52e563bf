"""Faults, injected for real: killed processes, a disk that fills, memory that runs out, a cluster that is too small.

pytest prints a table: how many recorded epochs each fault made the run train again (an epoch in progress is not recorded, nor
is one whose checkpoint was incomplete), and the seconds to the next recorded epoch.
"""

import os
import re
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


def test_a_killed_worker_restarts_and_the_record_has_no_gap(shards, tmp_path, fault_table):
    job = Job(shards, tmp_path)
    job.wait_for_epoch(2)
    recorded, killed = job.kill("RayTrainWorker"), time.monotonic()
    job.wait_for_epoch(recorded + 1)
    seconds = time.monotonic() - killed
    fault_table("a worker killed (SIGKILL)", trained_again(job.finish()), seconds)
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
def test_the_same_command_resumes_after_the_driver_was_killed(shards, tmp_path, fault_table):
    job = Job(shards, tmp_path)
    job.wait_for_epoch(3)
    job.process.kill()
    first, _ = job.process.communicate()
    kept = checkpoint.last(job.run()).epoch
    again, started = Job(shards, tmp_path), time.monotonic()
    again.wait_for_epoch(kept + 1)
    seconds = time.monotonic() - started
    fault_table("the driver killed, the command rerun", trained_again(first, again.finish()), seconds)
    assert kept >= 3
    assert_every_epoch_once(again.run())


@pytest.mark.parametrize("launcher", ["plain", pytest.param("ray", marks=pytest.mark.slow)])
def test_sigterm_ends_in_order_and_the_same_command_resumes(shards, tmp_path, launcher, fault_table):
    job = Job(shards, tmp_path, launcher=launcher)
    job.wait_for_epoch(2)
    recorded = len(run_directory.read_record(job.run()))
    job.process.terminate()
    output, _ = job.process.communicate(timeout=60)
    assert job.process.returncode == 143, output[-3000:]
    assert "rerun the same command to resume" in output and "Traceback" not in output
    kept = checkpoint.last(job.run()).epoch
    assert kept >= recorded  # what was being written became complete
    again, started = Job(shards, tmp_path, launcher=launcher), time.monotonic()
    again.wait_for_epoch(kept + 1)
    seconds = time.monotonic() - started
    lost = trained_again(output, again.finish())
    assert lost == 0  # an epoch that was reported is kept
    fault_table(f"SIGTERM ({launcher}), the command rerun", lost, seconds)
    assert_every_epoch_once(again.run())


def test_a_full_disk_is_a_one_line_error_and_complete_checkpoints_stay(shards, tmp_path, fault_table):
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
    again, started = Job(shards, tmp_path, launcher="plain"), time.monotonic()
    again.wait_for_epoch(kept.epoch + 1)
    seconds = time.monotonic() - started
    fault_table("the disk full, then freed", trained_again(output, again.finish()), seconds)
    assert_every_epoch_once(str(run))


@pytest.mark.parametrize("rate", ["1000", "20"])
def test_a_run_that_diverges_ends_with_a_one_line_error_and_a_finite_checkpoint(shards, tmp_path, rate, fault_table):
    # At once, or while the rate climbs over the first five epochs.
    job = Job(shards, tmp_path, "--optim.lr", rate, "--optim.clip-norm", "0", "--schedule.warmup-epochs", "5", launcher="plain")
    output, _ = job.process.communicate(timeout=200)
    assert job.process.returncode == 2 and "Traceback" not in output, output[-2000:]
    (epoch,) = map(int, re.findall(r"The loss of epoch (\d+), step \d+ is not finite \(batch of patient\d+", output))
    kept = checkpoint.last(job.run())
    assert (kept.epoch if kept else 0) == epoch - 1 == job.num_epochs()
    assert ("the checkpoint of the epoch before is kept" if kept else "there is no checkpoint yet") in output
    assert kept is None or all(value.isfinite().all() for value in kept.weights().values())
    fault_table(f"a loss that is not finite in epoch {epoch}: reported", trained_again(output), None)


def test_out_of_memory_is_a_one_line_error_with_the_batch_and_image_size(shards, tmp_path, fault_table):
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
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    fault_table("out of memory: reported, from the command", trained_again(done.stdout), time.monotonic() - started)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "ran out of memory (cpu) with 24 of a batch's 24 images of 64 x 64" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_a_one_line_error_after_a_few_tries(shards, tmp_path, ray_session, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    experiment = tiny_experiment(data=shards, runs=str(tmp_path), workers=3)
    with pytest.raises(UserError, match="no room for 3 workers of 1 CPU"):
        train.run(experiment, train.Options())


def test_elastic_workers_are_given_as_a_range(tmp_path):
    for line in (["--workers", "1:4"], ["--workers=1:4"]):
        experiment, _ = command_line.parse(train.Options(), ["quick", *line], "train.py", "")
        assert (experiment.min_workers, experiment.workers) == (1, 4)
    with pytest.raises(UserError, match="--min-workers must be at least 0 and no more than"):
        command_line.parse(train.Options(), ["quick", "--workers", "4:1"], "train.py", "")
    assert replace(tiny_experiment(), workers=2).min_workers == 0
