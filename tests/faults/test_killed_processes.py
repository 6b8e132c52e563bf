"""Faults, injected for real: killed processes, a disk that fills, memory that runs out."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from heartseg.models import checkpoint
from heartseg.training import run_directory
from helpers.experiments import tiny_experiment
from helpers.job_process import Job, changed_train, epochs_of, train_arguments, trained_again
from jobs import train


def terminate_after(job: Job, epoch: int) -> str:
    """SIGTERM to a training once an epoch is recorded; returns its output."""
    job.wait_for_epoch(epoch)
    recorded = len(epochs_of(job.run()))
    job.process.terminate()
    output, _ = job.process.communicate(timeout=240)
    assert job.process.returncode == 143, output[-3000:]
    assert "rerun the same command to resume" in output and "Traceback" not in output
    assert checkpoint.last(job.run()).epoch >= recorded  # what was being written became complete
    return output


@pytest.mark.slow
def test_sigterm_ends_cleanly_and_the_same_command_resumes(shards, tmp_path):
    job = Job(shards, tmp_path, "plain")
    output = terminate_after(job, 2)
    assert trained_again(output, Job(shards, tmp_path, "plain").finish()) == 0  # an epoch that was reported is kept
    assert epochs_of(job.run()) == list(range(1, 7))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_ray_the_same_command_resumes_after_its_driver_was_killed_and_after_sigterm(shards, tmp_path, measurement):
    job = Job(shards, tmp_path, epochs=8)
    job.wait_for_epoch(2)
    job.process.kill()
    first, _ = job.process.communicate()
    kept, recorded = checkpoint.last(job.run()).epoch, len(epochs_of(job.run()))
    again, started = Job(shards, tmp_path, epochs=8), time.monotonic()
    again.wait_for_epoch(recorded + 1)
    measurement(f"the driver killed, the command rerun: {time.monotonic() - started:.1f} s to the next epoch")
    second = terminate_after(again, recorded + 2)
    # An epoch whose checkpoint was incomplete is trained again; after SIGTERM, one that was reported is kept.
    assert kept >= 2 and trained_again(first, second) <= 1
    assert trained_again(second, Job(shards, tmp_path, epochs=8).finish()) == 0
    assert epochs_of(job.run()) == list(range(1, 9))


def test_what_a_kill_after_the_last_checkpoint_left_out_is_completed(shards, tmp_path):
    # The checkpoint is committed, and the record's last line, the samples and the model card are not.
    experiment, plain = tiny_experiment(data=shards, runs=str(tmp_path)), train.Options(launcher="plain")
    run = Path(train.run(experiment, plain))
    whole = run_directory.read_record(str(run))
    run_directory.write_record(str(run), whole[:-1])
    (run / "MODEL_CARD.md").unlink()
    (run / "samples" / "last.npz").unlink()
    assert train.run(experiment, plain) == str(run)
    again = run_directory.read_record(str(run))
    assert [epoch["epoch"] for epoch in again] == [1, 2] and again[-1]["train/loss"] == whole[-1]["train/loss"]
    assert (run / "MODEL_CARD.md").exists() and (run / "samples" / "last.npz").exists()


@pytest.mark.slow
def test_a_full_disk_is_a_one_line_error_and_complete_checkpoints_stay(shards, tmp_path):
    # A small file system in its own mount namespace; after the second epoch, another process fills it.
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""mount -t tmpfs -o size=400m tmpfs {disk} || exit 99
        (until ls {disk}/quick-*/checkpoints/epoch_0002/checkpoint.json; do sleep 0.05; done; cat /dev/zero > {disk}/ballast) \\
            > /dev/null 2>&1 &
        "$@"; code=$?
        rm {disk}/ballast; cp -r {disk}/quick-* {tmp_path}/; exit $code"""
    job = Job(shards, disk, "plain", prefix=("unshare", "-rm", "sh", "-c", script, "sh"))
    output, _ = job.process.communicate(timeout=400)
    assert job.process.returncode == 2, output[-2000:]
    assert "No space left on device" in output and "Traceback" not in output
    (run,) = map(str, tmp_path.glob("quick-*"))
    kept = checkpoint.last(run)
    assert epochs_of(run) == list(range(1, kept.epoch + 1)) and kept.weights()
    train.job(train_arguments(shards, tmp_path, "plain", epochs=6))
    assert epochs_of(run) == list(range(1, 7))


@pytest.mark.slow
def test_out_of_memory_is_a_one_line_error_with_the_batch_and_image_size(shards, tmp_path):
    # The address space has room for the network and its average, and not for gradients and activations.
    limit = "import resource; pages = int(open('/proc/self/statm').read().split()[0]); "
    limit += "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 900 * 2**20,) * 2)"
    command = [*changed_train(limit), "quick", "--data", shards, "--runs", str(tmp_path)]
    command += ["--launcher", "plain", "--image.height", "64", "--image.width", "64", "--train.batch-size", "24"]
    command += ["--model.backbone", "resnet101", "--tracking.wandb", "off", "--train.precision", "fp32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr[-2000:]
    assert "ran out of memory (cpu) with 24 of a batch's 24 images of 64 x 64" in done.stderr
    assert "Traceback" not in done.stderr
