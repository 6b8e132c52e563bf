"""cluster/slurm.sbatch on a Slurm of one node: a job trains, is stopped in time, goes on, and leaves nothing behind."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from heartseg.config.experiment import to_json
from heartseg.training import run_directory
from helpers import slurm_cluster
from helpers.experiments import ROOT, tiny_experiment

RAY = str(Path(sys.executable).with_name("ray"))
EPOCHS = 30


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["python"], {}, "this is for sbatch"),
        ([], {"SLURM_JOB_ID": "7"}, "there is no command"),
        (["python"], {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/"}, "call sbatch in the repository, not in /"),
        (["true"], {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "RAY": "/nowhere/ray"}, "there is no ray program"),
    ],
)
def test_a_wrong_call_is_refused_in_one_sentence(arguments, environment, said):
    environment = {"PATH": os.environ["PATH"]} | environment
    command = ["bash", str(slurm_cluster.SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, "") and said in done.stderr and done.stderr.count("\n") == 1


def test_slurm_is_told_to_warn_the_script_and_to_queue_it_again():
    options = [line.split()[1] for line in slurm_cluster.SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1"} <= set(options)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, told):
    """Slurm, or what stands for it; the session's end says which."""
    folder = tmp_path_factory.mktemp("slurm")
    dropped = ("RAY_ADDRESS", "SLURM_CONF", "HEARTSEG_SLURM_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"RAY": RAY, "HEARTSEG_SLURM_DIR": str(folder / "shared"), "OMP_NUM_THREADS": "1"}
    with slurm_cluster.started(folder, environment) as found:
        told(f"cluster/slurm.sbatch was tested on {found.kind}")
        yield found


def leftovers(job: str) -> list[str]:
    """Processes and folders of a job that has ended."""
    scratch = f"/tmp/heartseg-ray.{job}"
    found = [scratch] if os.path.exists(scratch) else []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if scratch in line.read_text():
                found.append(line.read_text())
        except OSError:
            continue  # it ended meanwhile
    return found


def until(met, slurm: slurm_cluster.Slurm, job: str, seconds: float = 250) -> None:
    """Wait for a condition; fails with the job's output."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, slurm.log(job)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_that_runs_out_of_time_is_queued_again_and_resumes(slurm, shards, tmp_path):
    experiment = tiny_experiment()
    experiment = replace(experiment, train=replace(experiment.train, epochs=EPOCHS), workers=2)
    config, out = tmp_path / "tiny.json", tmp_path / "runs"
    config.write_text(json.dumps(to_json(experiment)))
    command = ["python", "jobs/train.py", "--config", str(config), "--data", shards, "--runs", str(out)]
    job = slurm.submit(*command, options=("--cpus-per-task=2",))

    def epochs() -> int:
        return sum(len(path.read_text().splitlines()) for path in out.glob("*/metrics.jsonl"))

    until(lambda: epochs() >= 2, slurm, job)
    token = slurm.folder / "shared" / job / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    first_token = token.read_text()
    slurm.signal(job, "USR1")
    until(lambda: "queued again" in slurm.log(job), slurm, job)
    assert 2 <= epochs() < EPOCHS
    # A stand-in of Slurm's starts the job again when it is asked for its state.
    until(lambda: slurm.state(job) and token.exists() and token.read_text() not in ("", first_token), slurm, job)
    assert slurm.wait(job) == ("COMPLETED", 0), slurm.log(job)
    (run,) = out.iterdir()
    assert [row["epoch"] for row in run_directory.read_record(str(run))] == list(range(1, EPOCHS + 1))
    # At most the one that the signal cut short was trained twice; the log may lack the line that was on its way just then.
    told = re.findall(rf"epoch (\d+)/{EPOCHS}  train/loss", slurm.log(job))
    assert len(told) - len(set(told)) <= 1 and len(set(told)) >= EPOCHS - 1, slurm.log(job)
    assert first_token not in slurm.log(job) and not token.exists() and leftovers(job) == []


@pytest.mark.slow
def test_a_failed_command_is_a_failed_job(slurm):
    job = slurm.submit("python", "-c", "raise SystemExit(3)")
    assert slurm.wait(job) == ("FAILED", 1), slurm.log(job)
    assert leftovers(job) == []


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_ends_in_order_and_leaves_nothing(slurm, tmp_path):
    mark = tmp_path / "stopped"
    code = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(mark)!r}, 'w').write('in order'), sys.exit(1)))\n"
        "print('READY', flush=True)\n"
        "time.sleep(300)"
    )
    job = slurm.submit("python", "-c", code)
    until(lambda: "\nREADY" in slurm.log(job), slurm, job)
    slurm.signal(job, "TERM")
    assert slurm.wait(job) == ("FAILED", 1) and mark.read_text() == "in order"
    assert leftovers(job) == []


@pytest.mark.slow
def test_a_job_that_is_cancelled_leaves_nothing(slurm):
    job = slurm.submit("python", "-c", "import time; print('READY', flush=True); time.sleep(300)")
    until(lambda: "\nREADY" in slurm.log(job), slurm, job)
    slurm.cancel(job)
    assert slurm.wait(job)[0] in ("CANCELLED", "FAILED")
    until(lambda: leftovers(job) == [], slurm, job, 60)
    assert not (slurm.folder / "shared" / job / "token").exists()
