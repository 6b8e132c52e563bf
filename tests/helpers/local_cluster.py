"""A cluster of this machine as `cluster/local.sh` starts it, on ports of its own, and commands that are read while they run."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers.experiments import ROOT
from jobs.support.ray_runtime import free_port

SCRIPT = str(ROOT / "cluster" / "local.sh")


@contextlib.contextmanager
def started(folder: Path, **variables: str) -> Iterator[dict[str, str]]:
    """The cluster while the block runs; yields the environment of its clients. `variables` are set before it starts."""
    environment = os.environ | variables
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HEARTSEG_CLUSTER_DIR": str(folder)}
    ports = {name: str(free_port()) for name in ("PORT", "DASHBOARD_PORT", "AGENT_PORT", "CLIENT_PORT")}
    environment |= {f"HEARTSEG_CLUSTER_{name}": port for name, port in ports.items()}
    environment.pop("RAY_ADDRESS", None)
    subprocess.run([SCRIPT, "start", "--num-cpus", "2"], env=environment, check=True, timeout=200)
    address = f"http://127.0.0.1:{ports['DASHBOARD_PORT']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_API_SERVER_ADDRESS": address}
    try:
        yield environment | token
    finally:
        subprocess.run([SCRIPT, "stop"], env=environment, check=True, timeout=200)


def restore_sigint() -> None:
    """Undo that a shell makes commands in the background ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def begin_until(command: list[str], environment: dict[str, str], text: str) -> subprocess.Popen:
    """Start a command and wait until it prints a text; fails with its output if it ends before."""
    begun = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=restore_sigint
    )
    lines = []
    for line in begun.stdout:
        lines.append(line)
        if text in line:
            return begun
    raise AssertionError("".join(lines))
