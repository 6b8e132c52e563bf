"""A Slurm of one node, for real where Debian's slurm-wlm and munge are installed and we are root, else stubs of its programs.

Both take jobs by `submit`, signals by `signal` and tell what became of a job by `state`; `kind` says which it is.
"""

import contextlib
import os
import shutil
import signal as signals
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from helpers.experiments import ROOT

SCRIPT = ROOT / "cluster" / "slurm.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits for as long as a credential lives: 2 minutes by default.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Slurm:
    """Slurm's own programs."""

    kind = "Slurm itself"

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *command: str, options: tuple[str, ...] = ()) -> str:
        """Hand in a job; returns its number. Its output goes to `log`."""
        asked = ["sbatch", "--parsable", f"--output={self.folder}/%j.log", *options, str(SCRIPT), *command]
        return self.ask(*asked).strip()

    def log(self, job: str) -> str:
        """What the job has printed so far, over all its starts."""
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def signal(self, job: str, name: str) -> None:
        """Signal the script alone: what Slurm does before a time-out (USR1), and what ends a job in order (TERM)."""
        self.ask("scancel", "--batch", f"--signal={name}", job)

    def cancel(self, job: str) -> None:
        """Take the job away: all of its processes are told at once."""
        self.ask("scancel", job)

    def state(self, job: str) -> tuple[str, int]:
        """Slurm's word for where the job is, and its exit code."""
        said = dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)
        return said["JobState"], int(said["ExitCode"].split(":")[0])

    def wait(self, job: str, seconds: float = 300) -> tuple[str, int]:
        """The state that the job ended in."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            state, code = self.state(job)
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
                return state, code
            time.sleep(0.5)
        raise TimeoutError(f"job {job} has not ended: {self.log(job)}")


class Stub(Slurm):
    """The script run by hand: `scontrol` is a stub, a requeue starts the script again with a higher count."""

    kind = "stubs of scontrol and srun: there is no Slurm here"

    def __init__(self, folder: Path, environment: dict[str, str]):
        super().__init__(folder, environment)
        programs = folder / "stubs"
        programs.mkdir()
        (programs / "scontrol").write_text(
            f'#!/bin/sh\nif [ "$1" = requeue ]; then touch {folder}/requeue; else hostname; fi\n'
        )
        (programs / "scontrol").chmod(0o755)
        self.environment = environment | {"PATH": f"{programs}:{environment['PATH']}"}
        self.running: dict[str, tuple[subprocess.Popen, tuple[str, ...], int]] = {}

    def submit(self, *command: str, options: tuple[str, ...] = ()) -> str:
        job = str(700 + len(self.running))
        self._start(job, command, 0)
        return job

    def _start(self, job: str, command: tuple[str, ...], restarts: int) -> None:
        told = {"SLURM_JOB_ID": job, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": socket.gethostname()}
        told |= {"SLURM_CPUS_ON_NODE": "2", "SLURM_RESTART_COUNT": str(restarts)}
        with open(self.folder / f"{job}.log", "a") as log:
            process = subprocess.Popen(["bash", str(SCRIPT), *command], env=self.environment | told, stdout=log, stderr=log)
        self.running[job] = (process, command, restarts)

    def signal(self, job: str, name: str) -> None:
        self.running[job][0].send_signal(getattr(signals, f"SIG{name}"))

    def cancel(self, job: str) -> None:
        self.signal(job, "TERM")

    def state(self, job: str) -> tuple[str, int]:
        process, command, restarts = self.running[job]
        if process.poll() is None:
            return "RUNNING", 0
        if (self.folder / "requeue").exists():
            (self.folder / "requeue").unlink()
            self._start(job, command, restarts + 1)
            return "PENDING", 0
        return "COMPLETED" if process.returncode == 0 else "FAILED", process.returncode


@contextlib.contextmanager
def started(folder: Path, environment: dict[str, str]) -> Iterator[Slurm]:
    """A Slurm that takes jobs; what was started is ended."""
    if os.geteuid() or not all(shutil.which(program) for program in PROGRAMS):
        stub = Stub(folder, environment)
        yield stub
        for process, *_ in stub.running.values():
            process.terminate()  # what a failed test left; the script cleans up
            process.wait(120)
        return
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    host = socket.gethostname().partition(".")[0]
    ports = {"controller_port": free_port(), "node_port": free_port()}
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, **ports))
    environment = environment | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock"]
    munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    with contextlib.ExitStack() as stack:
        for command in (munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-c"]):
            log = stack.enter_context(open(folder / f"{command[0]}.out", "w"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            time.sleep(1)
        slurm = Slurm(folder, environment)
        for _ in range(60):
            asked = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, timeout=60)
            if "idle" in asked.stdout:
                break
            time.sleep(0.5)
        else:
            logs = "\n".join(path.read_text() for path in folder.glob("slurm*.out"))
            raise RuntimeError(f"Slurm is installed and did not start: {logs}")
        stack.callback(_end_jobs, slurm)
        yield slurm


def _end_jobs(slurm: Slurm) -> None:
    """Cancel what a failed test left, since jobs outlive Slurm's own programs."""
    slurm.ask("scancel", "--user=root")
    for _ in range(120):
        if not slurm.ask("squeue", "-h"):
            return
        time.sleep(0.5)
