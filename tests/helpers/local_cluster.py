"""A cluster of this machine, as `cluster/local.sh` starts it, on ports of its own; commands heard until they speak."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers.experiments import ROOT

SCRIPT = str(ROOT / "cluster" / "local.sh")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(folder: Path, **variables: str) -> Iterator[dict[str, str]]:
    """The cluster while the block runs; gives the environment of its clients. `variables` are set before it starts."""
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


def heed_ctrl_c() -> None:
    """A command that a shell has put into the background inherits that SIGINT is ignored; these are not to."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def begin_until(command: list[str], environment: dict[str, str], said: str) -> subprocess.Popen:
    """Start a command and wait until it says something; fails with all that it said where it ends before."""
    begun = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed_ctrl_c
    )
    heard = []
    for line in begun.stdout:
        heard.append(line)
        if said in line:
            return begun
    raise AssertionError("".join(heard))
