"""cluster/slurm.sbatch, run as Slurm runs it: a job trains, is stopped in time, resumes, and leaves nothing behind.

No Slurm is needed: a stub of `scontrol` names this machine and notes a requeue. Several nodes and Slurm's own handling of
signals are not tested.
"""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from heartseg.config.experiment import to_json
from heartseg.training import run_directory
from helpers import local_cluster
from helpers.experiments import ROOT, tiny_experiment
from helpers.job_process import wait_for

SCRIPT = ROOT / "cluster" / "slurm.sbatch"
EPOCHS = 12


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["python"], {}, "run it with sbatch"),
        ([], {"SLURM_JOB_ID": "7"}, "the command is missing"),
        (["python"], {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/"}, "run sbatch in the repository, not in /"),
        (["true"], {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "RAY": "/no/ray"}, "no ray program found"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(arguments, environment, message):
    environment = {"PATH": os.environ["PATH"]} | environment
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr and done.stderr.count("\n") == 1


def test_slurm_is_asked_to_signal_the_script_and_to_allow_a_requeue():
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1"} <= set(options)


class Job:
    """The script as a job of one node; `log` is its output over all its starts."""

    def __init__(self, folder: Path, *command: str, prefix: tuple[str, ...] = ()):
        self.number, self.folder, self.command = str(700 + os.getpid() % 100), folder, [*prefix, "bash", str(SCRIPT), *command]
        self.token = folder / "shared" / self.number / "token"
        (folder / "scontrol").write_text(f'#!/bin/sh\nif [ "$1" = requeue ]; then touch {folder}/requeue; else hostname; fi\n')
        (folder / "scontrol").chmod(0o755)
        self.start(restarts=0)

    def start(self, restarts: int) -> None:
        """Start the script, as sbatch does the first time and a requeue after it."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"PATH": f"{self.folder}:{environment['PATH']}", "RAY": str(Path(sys.executable).with_name("ray"))}
        environment |= {"HEARTSEG_SLURM_DIR": str(self.folder / "shared"), "OMP_NUM_THREADS": "1", "SLURM_CPUS_ON_NODE": "2"}
        environment |= {"SLURM_JOB_ID": self.number, "SLURM_RESTART_COUNT": str(restarts)}
        environment |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": socket.gethostname()}
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=log, start_new_session=True)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait(self) -> int:
        return self.process.wait(timeout=300)

    def leftovers(self) -> list[str]:
        scratch = f"/tmp/heartseg-ray.{self.number}"
        found = [scratch] if os.path.exists(scratch) else []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_text()
            except OSError:
                continue  # it has ended
            if scratch in command:
                found.append(command)
        return found


@pytest.fixture()
def submit(tmp_path):
    jobs = []

    def start(*command: str, **options) -> Job:
        (tmp_path / "job").mkdir()
        jobs.append(Job(tmp_path / "job", *command, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.process.terminate()  # the script cleans up
        job.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_that_runs_out_of_time_is_queued_again_and_resumes(submit, shards, tmp_path):
    experiment = tiny_experiment()
    experiment = replace(experiment, train=replace(experiment.train, epochs=EPOCHS), workers=2)
    config, out = tmp_path / "tiny.json", tmp_path / "runs"
    config.write_text(json.dumps(to_json(experiment)))
    job = submit("python", "jobs/train.py", "--config", str(config), "--data", shards, "--runs", str(out))

    def epochs() -> int:
        return sum(len(path.read_text().splitlines()) for path in out.glob("*/metrics.jsonl"))

    wait_for(lambda: epochs() >= 2, job.process, seconds=250)
    assert stat.S_IMODE(job.token.stat().st_mode) == 0o600 and stat.S_IMODE(job.token.parent.stat().st_mode) == 0o700
    token = job.token.read_text()
    job.process.send_signal(signal.SIGUSR1)
    job.wait()
    assert "queued again" in job.log and (job.folder / "requeue").exists() and 2 <= epochs() < EPOCHS
    job.start(restarts=1)
    assert job.wait() == 0, job.log
    (run,) = out.iterdir()
    assert [row["epoch"] for row in run_directory.read_record(str(run))] == list(range(1, EPOCHS + 1))
    # At most the epoch that the signal interrupted was trained twice; its line may be missing from the log.
    trained = re.findall(rf"epoch (\d+)/{EPOCHS}  train/loss", job.log)
    assert len(trained) - len(set(trained)) <= 1 and len(set(trained)) >= EPOCHS - 1, job.log
    assert token not in job.log and not job.token.exists() and job.leftovers() == []


@pytest.mark.slow
def test_a_failed_command_is_a_failed_job_and_one_node_listens_on_loopback_alone(submit):
    code = f"""
import os, socket
port, hosts = int(os.environ["RAY_ADDRESS"].rpartition(":")[2]), ("127.0.0.1", "{local_cluster.OTHER_ADDRESS}")
print("LISTENS ON", [host for host in hosts if not socket.socket().connect_ex((host, port))])
raise SystemExit(3)"""
    job = submit("python", "-c", code, prefix=local_cluster.ON_A_NETWORK)
    assert job.wait() == 1, job.log
    assert "LISTENS ON ['127.0.0.1']" in job.log, job.log
    assert job.leftovers() == []


@pytest.mark.slow
def test_a_job_whose_processes_are_all_signalled_as_scancel_does_leaves_nothing(submit):
    job = submit("python", "-c", "import time; print('READY', flush=True); time.sleep(300)")
    wait_for(lambda: "\nREADY" in job.log, job.process, seconds=250)
    os.killpg(job.process.pid, signal.SIGTERM)
    assert job.wait() != 0, job.log
    wait_for(lambda: job.leftovers() == [], seconds=60)
    assert not job.token.exists()
