"""What this machine or cluster is, and what is wrong with it, each with its mend: `python jobs/doctor.py --workers 4`.

Exit code 0 where nothing is wrong, 1 where something is, 2 for a mistake on the command line.
"""

import contextlib
import json
import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heartseg.errors import UserError
from heartseg.storage import filesystem
from jobs.support import command_line, ray_runtime, system_checks
from jobs.support.system_checks import Finding

# What workers exchange at a time: a fifth of the seed network's gradients on GPUs, less for CPUs to be quick.
GPU_BYTES, CPU_BYTES = 64 << 20, 8 << 20
# How long another node may take to say what it has; its first process imports torch.
SECONDS_OF_A_NODE = 60


@dataclass(frozen=True)
class Options:
    """What to look at."""

    data: str = ""
    """Shards whose storage is read; HEARTSEG_DATA's where not given."""
    runs: str = ""
    """Folder or URI to which a file is written, read and removed; HEARTSEG_RUNS's where not given."""
    launcher: Literal["ray", "plain"] = "ray"
    """`plain` looks at this machine only, and starts no Ray."""
    workers: int = 0
    """Workers that exchange data; 0 takes one a GPU or, without GPUs, one a node and at least two."""
    seconds: float = 10.0
    """Seconds that they exchange."""
    megabytes: int = 64
    """Size of the file that is written to runs."""
    json: bool = False
    """Print JSON and not a table."""


def run(options: Options) -> list[Finding]:
    """Every finding, in the order of the table."""
    if options.workers < 0 or options.seconds <= 0 or options.megabytes < 1:
        raise UserError("--workers must not be negative, --seconds must be positive and --megabytes at least 1.")
    data = options.data or os.environ.get("HEARTSEG_DATA", "")
    kept = options.runs or os.environ.get("HEARTSEG_RUNS", "")
    data, kept = data and command_line.absolute(data, "data"), kept and command_line.absolute(kept, "runs")
    steps: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("versions", system_checks.versions),
        ("CPUs", system_checks.processors),
        ("memory", system_checks.memory),
        ("shared memory", system_checks.shared_memory),
        ("temporary files", system_checks.temporary_disk),
        ("GPUs", system_checks.gpus),
        ("wandb", system_checks.wandb),
    ]
    if kept:
        steps.append(("runs", lambda: system_checks.round_trip(kept, options.megabytes)))
    if data:
        steps.append(("data", lambda: system_checks.readable(data)))
    if options.launcher == "ray":
        steps.append(("workers", lambda: workers(options, kept)))
    found: list[Finding] = []
    for name, check in steps:
        print(f"looking at {name} …", file=sys.stderr, flush=True)
        found += listed(name, check)
    return found


def listed(name: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """A check's findings; a check that fails is one."""
    try:
        found = check()
    except UserError as error:
        return [Finding(name, "–", str(error), "As said; then run this again.")]
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return [Finding(name, "–", f"This could not be looked at ({type(error).__name__}: {reason}).", "See the sentence.")]
    return found if isinstance(found, list) else [found]


def workers(options: Options, kept: str) -> list[Finding]:
    """The cluster as Ray sees it, and what its workers exchange in a second; `kept` is where runs go, empty for nowhere."""
    import ray

    joined = os.environ.get("RAY_ADDRESS", "local") != "local"
    ray_runtime.start_ray(options.workers)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    wrong, mend = "", ""
    if joined and os.environ.get("RAY_AUTH_MODE") != "token":
        wrong = "The cluster may be used by whoever reaches it: RAY_AUTH_MODE is not token."
        mend = "Start it anew with RAY_AUTH_MODE=token on every node (cluster/README.md)."
    numbers = {"nodes": len(nodes), "cpus": cpus, "gpus": gpus}
    cluster = Finding("Ray", f"nodes {len(nodes)}, CPUs {cpus}, GPUs {gpus}", wrong, mend, numbers)
    number = options.workers or gpus or max(min(2, cpus), len(nodes))
    seen = [cluster, *other_nodes(nodes)]
    if len(nodes) > 1 and not kept:
        wrong = "Several nodes need a place that they share, and none was given."
        return [*seen, Finding("workers", f"{number} asked for", wrong, "Give --runs, or set HEARTSEG_RUNS.")]
    folder = filesystem.join(kept, f".doctor-{uuid.uuid4().hex[:8]}") if kept else tempfile.mkdtemp(prefix="heartseg-doctor-")
    try:
        heard = exchange(number, options.seconds, folder)
    except Exception as error:
        sentence = str(error).splitlines()[0] if str(error) else type(error).__name__
        mend = (
            "Name the network that joins the nodes in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where Ray starts, open it "
            "between them, and see NCCL_DEBUG=INFO; without room, take fewer --workers; every node must see --runs."
        )
        return [*seen, Finding("workers", f"{number} asked for", f"They could not exchange anything: {sentence}", mend)]
    finally:
        with contextlib.suppress(UserError, OSError):
            filesystem.remove(folder)
    return [*seen, bandwidth(number, heard), *mixed(heard["machines"])]


def other_nodes(nodes: list[dict]) -> list[Finding]:
    """What the cluster's other nodes are, a line each, and whatever is wrong there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    asked = {}
    for node in nodes:
        if node["NodeID"] != here:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[node["NodeManagerAddress"]] = ray.remote(num_cpus=0, scheduling_strategy=there)(look_around).remote()
    found = []
    for address, answer in asked.items():
        try:
            host, told = ray.get(answer, timeout=SECONDS_OF_A_NODE)
        except ray.exceptions.RayError as error:
            wrong = f"Node {address} does not answer ({type(error).__name__})."
            found.append(Finding(f"node {address}", "–", wrong, "See its Ray logs, and start Ray on it again."))
            continue
        name = f"node {host} ({address})"
        found.append(Finding(name, "; ".join(f"{one.name} {one.found}" for one in told)))
        found += [replace(one, name=f"{one.name} of {name}", wrong=f"{name}: {one.wrong}") for one in told if one.wrong]
    return found


def look_around() -> tuple[str, list[Finding]]:
    """The name of the machine that this runs on, and what it has."""
    looks = (
        system_checks.processors,
        system_checks.memory,
        system_checks.shared_memory,
        system_checks.temporary_disk,
        system_checks.gpus,
    )
    return socket.gethostname(), [one for look in looks for one in listed(look.__name__, look)]


def exchange(number: int, seconds: float, folder: str) -> dict:
    """Let so many workers add up a tensor again and again; what rank 0 saw. Raises what Ray Train raises.

    `folder` is Ray Train's own, which every node must see.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = ray_runtime.worker_resources(number)
    trainer = TorchTrainer(
        all_reduce,
        train_loop_config={"seconds": seconds},
        scaling_config=ScalingConfig(num_workers=number, use_gpu="GPU" in resources, resources_per_worker=resources),
        run_config=RunConfig(
            storage_path=folder,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    return trainer.fit().return_value


def all_reduce(config: dict) -> dict:
    """One worker: add up a tensor over all of them for a while; the bytes, seconds and rounds, and who took part."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    device, number = get_device(), dist.get_world_size()
    num_bytes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    ones = torch.ones(num_bytes // 4, device=device)
    dist.all_reduce(ones)  # the connections are made here, and the sum is looked at
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
    taken = time.perf_counter() - started
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = {finding.name: finding.found for finding in system_checks.versions()}
    machines: list[dict | None] = [None] * number
    dist.all_gather_object(machines, {"host": socket.gethostname(), "device": name, "versions": versions})
    backend = dist.get_backend()
    return {"bytes": num_bytes, "seconds": taken, "rounds": rounds, "right": is_right, "backend": backend, "machines": machines}


def bandwidth(number: int, heard: dict) -> Finding:
    """The exchange in GB/s as NCCL's tests count it: each worker sends and takes 2 (n - 1) / n of the tensor a round."""
    per_s = heard["bytes"] * heard["rounds"] / heard["seconds"]
    bus = per_s * 2 * (number - 1) / number / 1e9
    hosts = sorted({machine["host"] for machine in heard["machines"]})
    devices = sorted({machine["device"] for machine in heard["machines"]})
    numbers = {"workers": number, "gb_per_s": bus, "rounds": heard["rounds"], "backend": heard["backend"], "hosts": len(hosts)}
    if number == 1:
        return Finding("workers", f"1 on {hosts[0]} ({devices[0]}): nothing to exchange", numbers=numbers)
    where = f"{number} on {len(hosts)} host{'s' if len(hosts) > 1 else ''} ({', '.join(devices)})"
    found = f"{where}, {heard['backend']}, {bus:.2f} GB/s for {heard['seconds']:.0f} s"
    if not heard["right"]:
        return Finding("workers", found, "The sum over the workers was wrong.", "Look for a broken GPU or link: run it again.")
    return Finding("workers", found, numbers=numbers)


def mixed(machines: list[dict]) -> list[Finding]:
    """A finding for every package that the workers have in several versions."""
    found = []
    for name in machines[0]["versions"]:
        kinds = sorted({machine["versions"].get(name, "–") for machine in machines})
        if len(kinds) > 1:
            wrong = f"The workers have {name} in several versions: {', '.join(kinds)}."
            found.append(Finding(f"{name} of workers", ", ".join(kinds), wrong, "Give every node the same image."))
    return found


def table_text(found: list[Finding]) -> str:
    """The findings as a table, and below it what is wrong."""
    width = max(len(finding.name) for finding in found)
    lines = [f"{'!' if f.wrong else ' '} {f.name.ljust(width)}  {f.found}" for f in found]
    wrong = [f"! {f.wrong}\n  {f.mend}" for f in found if f.wrong]
    return "\n".join(lines) + "\n\n" + ("\n".join(wrong) if wrong else "Nothing is wrong.")


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """What Ray and its workers print goes to stderr meanwhile, so that stdout holds the result alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def job(argv: Sequence[str]) -> None:
    """The command line."""
    options = command_line.parse_line(Options, argv, "python jobs/doctor.py", "Tell what this machine or cluster is.")
    with quiet_stdout():
        found = run(options)
    wrong = any(finding.wrong for finding in found)
    as_json = {"ok": not wrong, "findings": [asdict(finding) for finding in found]}
    print(json.dumps(as_json, indent=2) if options.json else table_text(found))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    command_line.main(job)
