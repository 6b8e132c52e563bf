"""A cluster on this machine, started by `cluster/local.sh` on its own ports, and commands whose output is read as they run."""

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
# Runs a command in a network namespace that has another address beside loopback.
OTHER_ADDRESS = "192.0.2.77"
NETWORK = f"""
ip link set lo up
ip link add v0 type veth peer name v1
ip addr add {OTHER_ADDRESS}/24 dev v0
ip link set v0 up
ip link set v1 up
ip route add default dev v0
exec "$@"
"""
ON_A_NETWORK = ("unshare", "-rn", "sh", "-ec", NETWORK, "sh")


def settings(folder: Path) -> dict[str, str]:
    ports = {f"HEARTSEG_CLUSTER_{name}PORT": str(free_port()) for name in ("", "DASHBOARD_", "AGENT_", "CLIENT_")}
    return ports | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HEARTSEG_CLUSTER_DIR": str(folder)}


@contextlib.contextmanager
def started(folder: Path, **variables: str) -> Iterator[dict[str, str]]:
    """The cluster while the block runs; yields the environment of its clients. `variables` are set before it starts."""
    environment = os.environ | variables | settings(folder)
    environment.pop("RAY_ADDRESS", None)
    subprocess.run([SCRIPT, "start", "--num-cpus", "2"], env=environment, check=True, timeout=400)
    address = f"http://127.0.0.1:{environment['HEARTSEG_CLUSTER_DASHBOARD_PORT']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_API_SERVER_ADDRESS": address}
    try:
        yield environment | token
    finally:
        subprocess.run([SCRIPT, "stop"], env=environment, check=True, timeout=400)


def begin_until(command: list[str], environment: dict[str, str], text: str) -> subprocess.Popen:
    """Start a command and wait until it prints a text; fails with its output if it ends before."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A shell makes commands in the background ignore SIGINT.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = subprocess.Popen(command, env=environment, **options)
    lines = []
    for line in begun.stdout:
        lines.append(line)
        if text in line:
            return begun
    raise AssertionError("".join(lines))
