"""Two hosts on one machine: network namespaces joined by a veth pair, each with its own /tmp and /dev/shm, and Ray on both.

They share only the program's files; data and runs are on an S3 server of the first host. The tests observe through a link of
their own, which Ray does not use. Needs root, iproute2 and util-linux.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers import s3_server
from helpers.job_process import wait_for

RAY = str(Path(sys.executable).with_name("ray"))
PORT, S3_PORT = 6379, 5005
OWN_FILES = "mount --make-rprivate / && mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && exec sleep infinity"
S3 = """
import sys, threading
from moto.server import ThreadedMotoServer

ThreadedMotoServer("0.0.0.0", int(sys.argv[1])).start()
threading.Event().wait()
"""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def missing() -> str:
    """Why this machine cannot make two hosts; empty if it can."""
    programs = [name for name in ("ip", "unshare", "nsenter") if not shutil.which(name)]
    return f"needs root and {', '.join(programs) or 'nothing more'}" if programs or os.geteuid() else ""


@dataclass
class Host:
    """A network namespace with an address on the link between the hosts, its own mounts, and its own processes."""

    name: str
    address: str
    link: str
    environment: dict[str, str]
    logs: Path
    keeper: subprocess.Popen | None = None
    init: int = 0
    outputs: dict[subprocess.Popen, Path] = field(default_factory=dict)

    def boot(self) -> None:
        command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", OWN_FILES]
        self.keeper = subprocess.Popen(["ip", "netns", "exec", self.name, *command])
        (self.init,) = wait_for(lambda: [pid for pid in children(self.keeper) if is_sleep(pid)], self.keeper, seconds=10)

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """Start a command on this host; its output goes to a file, since an unread pipe would block it."""
        inside = ["nsenter", "--target", str(self.init), "--mount", "--net", "--pid", "--", *command]
        variables = self.environment | {"GLOO_SOCKET_IFNAME": self.link} | environment
        path = self.logs / str(time.monotonic_ns())
        with path.open("w") as output:
            process = subprocess.Popen(inside, env=variables, stdout=output, stderr=subprocess.STDOUT)
        self.outputs[process] = path
        return process

    def output(self, process: subprocess.Popen) -> str:
        return self.outputs[process].read_text()

    def run(self, *command: str, timeout: float = 250, **environment: str) -> tuple[int, str]:
        process = self.start(*command, **environment)
        try:
            return process.wait(timeout), self.output(process)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(self.output(process)) from None

    def stop(self, process: subprocess.Popen) -> str:
        """Ask a command on this host to end (SIGTERM), and return its output."""
        # nsenter does not pass signals to the command that it waits for.
        for child in children(process):
            os.kill(child, signal.SIGTERM)
        process.wait(timeout=100)
        return self.output(process)

    def kill(self) -> None:
        """Cut the power: when the host's first process dies, so do all others."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        for process in (self.keeper, *self.outputs):
            process.wait()
        self.outputs.clear()

    def join(self, head: "Host") -> None:
        """Start Ray on this host, as the head or as a node of it; one CPU, so that each takes one worker."""
        role = ["--head", "--port", str(PORT)] if head is self else ["--address", f"{head.address}:{PORT}"]
        command = [RAY, "start", *role, "--node-ip-address", self.address, "--num-cpus", "1", "--disable-usage-stats"]
        code, output = self.run(*command, timeout=100)
        assert code == 0, output


@contextlib.contextmanager
def joined() -> Iterator[tuple[Host, Host]]:
    """Two hosts with Ray on both and an S3 server on the first, whose bucket this process can also access."""
    tag = f"hs{os.getpid() % 10000}"
    kept = ("PATH", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "two-hosts-0123456789abcdef0123456789", "HOME": "/tmp"}
    environment |= s3_server.KEYS | {"AWS_ENDPOINT_URL": f"http://10.77.0.1:{S3_PORT}", "OMP_NUM_THREADS": "1"}
    # A link that is down is noticed in seconds and not in half a minute.
    environment |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
    environment |= {"RAY_health_check_failure_threshold": "3", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    environment |= {"RAY_worker_niceness": "0"}  # as in conftest.py
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first = Host(f"{tag}a", "10.77.0.1", f"{tag}x", environment, logs)
        second = Host(f"{tag}b", "10.77.0.2", f"{tag}y", environment, logs)
        for host in (first, second):
            ip("netns", "add", host.name)
            stack.callback(ip, "netns", "del", host.name)
            host.boot()
            stack.callback(host.kill)
            ip("-n", host.name, "link", "set", "lo", "up")
        ip("link", "add", first.link, "netns", first.name, "type", "veth", "peer", "name", second.link, "netns", second.name)
        observer, observed = f"{tag}u", f"{tag}v"
        ip("link", "add", observer, "type", "veth", "peer", "name", observed, "netns", first.name)
        stack.callback(ip, "link", "del", observer)
        ip("addr", "add", "10.78.0.2/24", "dev", observer)
        ip("link", "set", observer, "up")
        ip("-n", first.name, "addr", "add", "10.78.0.1/24", "dev", observed)
        ip("-n", first.name, "link", "set", observed, "up")
        for host in (first, second):
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.link)
            ip("-n", host.name, "link", "set", host.link, "up")
        first.start(sys.executable, "-c", S3, str(S3_PORT))
        wait_for(lambda: has_bucket(f"http://10.78.0.1:{S3_PORT}"), seconds=30)
        stack.enter_context(s3_server.environment(**s3_server.KEYS, AWS_ENDPOINT_URL=f"http://10.78.0.1:{S3_PORT}"))
        first.join(first)
        second.join(first)
        yield first, second


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_sleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "sleep"


def has_bucket(url: str) -> bool:
    """True once the S3 server answers and has created its bucket."""
    try:
        s3_server.make_bucket(url, "bucket")
        return True
    except OSError:
        return False
