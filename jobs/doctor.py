"""What this machine or cluster is, what is wrong with it, and how to fix it: `python jobs/doctor.py --workers 4`.

Exit code 0 if nothing is wrong, 1 if something is, 2 for a mistake on the command line.
"""

import contextlib
import json
import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heartseg.errors import StorageError, UserError, require
from heartseg.storage import filesystem
from jobs.support import command_line, ray_runtime, system_checks
from jobs.support.command_line import first_line
from jobs.support.system_checks import Finding

# What workers exchange at a time: a fifth of the seed network's gradients on GPUs, less on CPUs, to be quick.
GPU_BYTES, CPU_BYTES = 64 << 20, 8 << 20
# How long another node may take to answer; its first process imports torch.
NODE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Options:
    """What to check."""

    data: str = ""
    """Shards whose storage is read; HEARTSEG_DATA's if not given."""
    runs: str = ""
    """Folder or URI to which a file is written, read and removed; HEARTSEG_RUNS's if not given."""
    launcher: Literal["ray", "plain"] = "ray"
    """`plain` checks this machine only, and starts no Ray."""
    workers: int = 0
    """Workers that exchange data; 0 takes one a GPU or, without GPUs, one a node and at least two."""
    seconds: float = 10.0
    """Seconds that they exchange."""
    megabytes: int = 64
    """Size of the file that is written to runs."""
    json: bool = False
    """Print JSON and not a table."""

    def __post_init__(self):
        require(self.workers >= 0, "--workers must not be negative.")
        require(self.seconds > 0 and self.megabytes >= 1, "--seconds must be positive, and --megabytes at least 1.")


def run(options: Options) -> list[Finding]:
    """Every finding, in the order of the table."""
    data = options.data or os.environ.get("HEARTSEG_DATA", "")
    runs = options.runs or os.environ.get("HEARTSEG_RUNS", "")
    data, runs = data and command_line.absolute(data, "data"), runs and command_line.absolute(runs, "runs")
    checks = {"versions": system_checks.versions, **system_checks.NODE_CHECKS, "wandb": system_checks.wandb}
    if runs and not filesystem.is_uri(runs):
        checks["runs"] = partial(system_checks.disk, "runs", runs)
    if runs:
        checks["runs storage"] = partial(system_checks.round_trip, runs, options.megabytes)
    if data:
        checks["data"] = partial(system_checks.readable, data)
    if options.launcher == "ray":
        checks["workers"] = partial(check_cluster, options, runs)
    found: list[Finding] = []
    with no_new_folders(runs):
        for name, check in checks.items():
            print(f"checking {name} …", file=sys.stderr, flush=True)
            found += system_checks.run_check(name, check)
    return found


@contextlib.contextmanager
def no_new_folders(path: str) -> Iterator[None]:
    """Remove a local folder, and those above it, that did not exist before, unless another process has put something there."""
    folders = [] if filesystem.is_uri(path) or not path else [Path(path), *Path(path).parents]
    new = [folder for folder in folders if not folder.exists()]
    yield
    with contextlib.suppress(OSError):
        for folder in new:
            folder.rmdir()


def check_cluster(options: Options, runs: str) -> Iterator[Finding]:
    """The cluster as Ray sees it, its other nodes, and how fast its workers exchange data; `runs` may be empty."""
    import ray

    is_shared = ray_runtime.cluster_address() != "local"
    ray_runtime.start_ray(options.workers)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    is_open = is_shared and os.environ.get("RAY_AUTH_MODE") != "token"
    wrong = "Anyone who reaches the cluster may use it: RAY_AUTH_MODE is not token." if is_open else ""
    fix = "Restart it with RAY_AUTH_MODE=token on every node (cluster/README.md)." if is_open else ""
    numbers = {"nodes": len(nodes), "cpus": cpus, "gpus": gpus}
    yield Finding("Ray", f"nodes {len(nodes)}, CPUs {cpus}, GPUs {gpus}", wrong, fix, numbers)
    yield from other_nodes(nodes)
    number = options.workers or gpus or max(min(2, cpus), len(nodes))
    if len(nodes) > 1 and not runs:
        raise UserError("Workers on several nodes need storage that all of them see: give --runs, or set HEARTSEG_RUNS.")
    folder = filesystem.join(runs or tempfile.gettempdir(), f".doctor-{uuid.uuid4().hex[:8]}")
    try:
        resources = ray_runtime.worker_resources(number)
        trainer = ray_runtime.build_trainer(all_reduce, {"seconds": options.seconds}, number, resources, folder, tries=0)
        report = trainer.fit().return_value
    except Exception as error:
        fix = (
            "Name the network that joins the nodes in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where Ray starts, open it "
            "between them, and see NCCL_DEBUG=INFO; if the cluster is full, use fewer --workers; every node must see --runs."
        )
        yield Finding("workers", f"{number} asked for", f"They could not exchange anything: {first_line(error)}", fix)
        return
    finally:
        with contextlib.suppress(UserError, StorageError, OSError):
            filesystem.remove(folder)
    yield bandwidth(number, report)


def other_nodes(nodes: list[dict]) -> Iterator[Finding]:
    """What the cluster's other nodes are, a row each, and whatever is wrong there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here, answers = ray.get_runtime_context().get_node_id(), {}
    for node in nodes:
        if node["NodeID"] != here:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answers[node["NodeManagerAddress"]] = ray.remote(num_cpus=0, scheduling_strategy=there)(check_node).remote()
    for address, answer in answers.items():
        try:
            host, found = ray.get(answer, timeout=NODE_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            wrong = f"Node {address} does not answer ({type(error).__name__})."
            yield Finding(f"node {address}", "–", wrong, "See its Ray logs, and start Ray on it again.")
        else:
            yield from describe_node(f"node {host} ({address})", found)


def check_node() -> tuple[str, list[Finding]]:
    """The name of the machine that this runs on, and what it has."""
    checks = system_checks.NODE_CHECKS | {"versions": system_checks.versions}
    return socket.gethostname(), [one for name, check in checks.items() for one in system_checks.run_check(name, check)]


def describe_node(name: str, found: list[Finding]) -> Iterator[Finding]:
    """Another node's findings as one row, then whatever is wrong there; other versions than here are."""
    yield Finding(name, "; ".join(f"{one.name}: {one.found}" for one in found))
    here = {one.name: one.found for one in system_checks.versions()}
    for one in found:
        if not one.wrong and one.found != here.get(one.name, one.found):
            wrong = f"{one.name} is {one.found} there and {here[one.name]} here."
            one = replace(one, wrong=wrong, fix="Give every node the same image.")
        if one.wrong:
            yield replace(one, name=f"{one.name} of {name}", wrong=f"{name}: {one.wrong}")


def all_reduce(config: dict) -> dict:
    """One worker: sum a tensor over all of them for a while; the bytes, seconds and rounds, and who took part."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    device, number = get_device(), dist.get_world_size()
    num_bytes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    ones = torch.ones(num_bytes // 4, device=device)
    dist.all_reduce(ones)  # opens the connections; the sum is checked
    is_right = bool((ones == number).all())
    values, rounds, more = torch.zeros_like(ones), 0, torch.ones(1, device=device)
    started = time.perf_counter()
    while more.item():
        for _ in range(5):
            dist.all_reduce(values)
        rounds += 5
        # Rank 0's clock decides for all, since each must take part in every round.
        more.fill_(float(time.perf_counter() - started < config["seconds"]))
        dist.broadcast(more, src=0)
    measured = {"bytes": num_bytes, "seconds": time.perf_counter() - started, "rounds": rounds, "is_right": is_right}
    machines: list[tuple[str, str] | None] = [None] * number
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dist.all_gather_object(machines, (socket.gethostname(), name))
    return measured | {"backend": dist.get_backend(), "machines": machines}


def bandwidth(number: int, report: dict) -> Finding:
    """The exchange in GB/s as NCCL's tests count it: each worker sends and receives 2 (n - 1) / n of the tensor a round."""
    bus = report["bytes"] * report["rounds"] / report["seconds"] * 2 * (number - 1) / number / 1e9
    hosts, devices = (sorted(set(names)) for names in zip(*report["machines"], strict=True))
    found = f"{number} on {len(hosts)} host{'s' if len(hosts) > 1 else ''} ({', '.join(devices)}), {report['backend']}, "
    found += f"{bus:.2f} GB/s for {report['seconds']:.0f} s" if number > 1 else "nothing to exchange"
    wrong = ("The sum over the workers was wrong.", "Find the broken GPU or link; run this again.")
    numbers = {"workers": number, "gb_per_s": bus, "hosts": len(hosts)} | {name: report[name] for name in ("rounds", "backend")}
    return Finding("workers", found, *(() if report["is_right"] else wrong), numbers=numbers)


def findings_text(found: list[Finding]) -> str:
    """The findings as a table and, below it, what is wrong and how to fix it."""
    width = max(len(finding.name) for finding in found)
    lines = [f"{'!' if f.wrong else ' '} {f.name.ljust(width)}  {f.found}" for f in found]
    wrong = [f"! {f.wrong}\n  {f.fix}" for f in found if f.wrong]
    return "\n".join([*lines, "", *(wrong or ["Nothing is wrong."])])


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what is printed or logged meanwhile, also by Ray and C code: stdout holds only the result."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def job(argv: Sequence[str]) -> None:
    """The command line."""
    about = "Check this machine or cluster, and report what is wrong and how to fix it."
    options = command_line.parse_line(Options, argv, "python jobs/doctor.py", about)
    if options.launcher == "plain":
        no_workers = dict.fromkeys(("workers", "seconds"), "--launcher plain starts no workers")
        command_line.refuse_unused(Options(), options, no_workers)
    with stdout_to_stderr():
        found = run(options)
    wrong = any(finding.wrong for finding in found)
    if options.json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        print(findings_text(found))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    command_line.main(job)
