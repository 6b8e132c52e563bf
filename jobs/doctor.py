"""Checks a machine or cluster, and reports what is wrong and how to fix it: `python jobs/doctor.py --workers 4`.

Exit code 0 if nothing is wrong, 1 if something is, 2 for a mistake on the command line. The checks leave no files
behind and show no secrets. Imports that need torch are local, so that a missing torch is reported as a finding.
"""

import base64
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heartseg.errors import StorageError, UserError, io_errors_as_user_errors, require
from heartseg.storage import filesystem
from jobs.support import command_line
from jobs.support.command_line import counted, first_line

GIB = 1 << 30
# With less than this, training is likely to fail: a worker's memory, a run's checkpoints, Ray's object store.
LEAST_MEMORY, LEAST_DISK, LEAST_SHARED = 2 * GIB, 5 * GIB, 1 * GIB
# Bytes that workers exchange at a time: over a quarter of the seed network's gradients on GPUs, less on CPUs, to be quick.
GPU_BYTES, CPU_BYTES = 64 << 20, 8 << 20
WANDB_TIMEOUT_S, KEY_REFUSED = 5.0, "refuses the key"
# Seconds for another node to answer; its first process imports torch.
NODE_TIMEOUT_S = 60
REINSTALL = "Install the project: pip install -e ."


@dataclass(frozen=True)
class Options:
    """What to check."""

    data: str = ""
    """Shards to test reading from (default: HEARTSEG_DATA)."""
    runs: str = ""
    """Folder or URI in which to write, read and remove a test file (default: HEARTSEG_RUNS)."""
    launcher: Literal["ray", "plain"] = "ray"
    """`plain` checks this machine only, and starts no Ray."""
    workers: int = 0
    """Workers that exchange data; 0: one per GPU or, without GPUs, one per node and at least two."""
    seconds: float = 10.0
    """Seconds for which the workers exchange data."""
    megabytes: int = 64
    """Size of the file that is written to --runs."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self):
        require(self.workers >= 0, f"--workers must be at least 0, not {self.workers}.")
        require(self.seconds > 0, f"--seconds must be above 0, not {self.seconds:g}.")
        require(self.megabytes >= 1, f"--megabytes must be at least 1, not {self.megabytes}.")


@dataclass(frozen=True)
class Finding:
    """A row of the table: what was found and, if something is `wrong`, one line about that and one on how to `fix` it."""

    name: str
    found: str
    wrong: str = ""
    fix: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def unless(self, is_well: bool) -> "Finding":
        """The same finding, without the problem if all is well."""
        return replace(self, wrong="", fix="") if is_well else self


def run(options: Options) -> list[Finding]:
    """Run all checks; returns their findings, in the order of the table."""
    data = options.data or os.environ.get("HEARTSEG_DATA", "")
    runs = options.runs or os.environ.get("HEARTSEG_RUNS", "")
    data, runs = data and command_line.absolute(data, "data"), runs and command_line.absolute(runs, "runs")
    checks = {"versions": check_versions, **NODE_CHECKS, "wandb": check_wandb}
    new_folders = []
    if runs and not filesystem.is_uri(runs):
        checks["runs"] = partial(check_disk, "runs", runs)
        new_folders = [folder for folder in (Path(runs), *Path(runs).parents) if not folder.exists()]
    if runs:
        checks["runs storage"] = partial(check_round_trip, runs, options.megabytes)
    if data:
        checks["data"] = partial(check_shards, data)
    if options.launcher == "ray":
        checks["workers"] = partial(check_cluster, options, runs)
    found: list[Finding] = []
    for name, check in checks.items():
        print(f"checking {name} …", file=sys.stderr, flush=True)
        found += run_check(name, check)
    with contextlib.suppress(OSError):  # a folder that another process has used stays
        for folder in new_folders:
            folder.rmdir()
    return found


def run_check(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Run a check; returns its findings and, if it raises an error, one more about that."""
    found: list[Finding] = []
    try:
        with io_errors_as_user_errors():
            found.extend(check())
    except Exception as error:
        is_known = isinstance(error, (UserError, StorageError))
        wrong = first_line(error) if is_known else f"This check failed ({type(error).__name__}: {first_line(error)})."
        found.append(Finding(name, "–", wrong, "Fix this, then run the doctor again."))
    return found


def check_versions() -> Iterator[Finding]:
    """The versions of Python and the main packages, with any that are missing; also incompatible torch and torchvision."""
    yield Finding("python", platform.python_version())
    missing = []
    for package in ("torch", "torchvision", "ray", "wandb", "pyarrow"):
        try:
            yield Finding(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
            yield Finding(package, "–", f"{package} is not installed.", REINSTALL)
    try:
        from heartseg.models.deeplabv3 import check_installation
        from heartseg.training import run_directory

        yield Finding("heartseg", run_directory.code_revision())
        check_installation()
    except ModuleNotFoundError as error:
        if not missing:  # otherwise it is reported above
            yield Finding("heartseg", "–", f"heartseg cannot be imported: {error}.", REINSTALL)


def check_processors(group: str = "/sys/fs/cgroup") -> Iterator[Finding]:
    """The machine's CPUs, and the number that this process may use."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = usable
    with contextlib.suppress(OSError, ValueError):  # not a control group of version 2, or its limit is `max`
        granted, period = map(int, Path(group, "cpu.max").read_text().split())
        quota = granted / period
    found = f"{cores}" + f", {usable} for this process" * (usable < cores)
    found += f", {quota:g} by the container's limit" * (quota < usable)
    wrong = f"The container may use {quota:g} of {usable} CPUs, but programs start a thread for each CPU that they see."
    threads = max(1, int(quota))
    fix = f"Set OMP_NUM_THREADS={threads}, and --num-cpus {threads} when you start Ray."
    yield Finding("CPUs", found, wrong, fix).unless(quota >= usable or bool(os.environ.get("OMP_NUM_THREADS")))


def free_space(name: str, where: str, free: float, least: int, fix: str) -> Finding:
    """A finding on free bytes, which is wrong if there are fewer than `least`."""
    found = f"{free / GIB:.1f} GiB of {where} is free"
    wrong = f"{found}, but at least {least / GIB:g} GiB should be."
    return Finding(name, found, wrong, fix, {"free_bytes": free}).unless(free >= least)


def check_memory(root: str = "/") -> Iterator[Finding]:
    """Free memory, within the container's limit if any, as training counts it."""
    from heartseg.training.data_loading import free_on_machine

    fix = "Stop other programs, raise the container's limit, or use fewer --workers."
    yield free_space("memory", "memory", free_on_machine(root), LEAST_MEMORY, fix)


def check_shared_memory(path: str = "/dev/shm") -> Iterator[Finding]:
    """Space for Ray's object store, through which workers exchange data; without it, the store is on disk and slow."""
    free = shutil.disk_usage(path).free if os.path.exists(path) else 0
    fix = "Without it, Ray uses the slow disk. Docker: give --shm-size 8g; Kubernetes: an emptyDir with medium Memory."
    yield free_space("shared memory", path, free, LEAST_SHARED, fix)


def check_disk(name: str, folder: str) -> Iterator[Finding]:
    """Free space on the disk of a local folder, which need not exist yet."""
    there = next(place for place in (Path(folder), *Path(folder).absolute().parents) if place.exists())
    fix = "Free up space, or give another folder (TMPDIR for temporary files, --runs for runs)."
    yield free_space(name, f"the disk of {folder}", shutil.disk_usage(there).free, LEAST_DISK, fix)


def check_gpus() -> Iterator[Finding]:
    """The GPUs that torch sees, with CUDA and NCCL, or a GPU that only the driver sees."""
    import torch

    cuda = torch.version.cuda
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            kind = torch.cuda.get_device_properties(number)
            yield Finding(f"GPU {number}", f"{kind.name}, {kind.total_memory / GIB:.0f} GiB")
        has_nccl = torch.distributed.is_nccl_available()
        found = f"{cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version())) if has_nccl else '–'}"
        wrong, fix = "This torch has no NCCL, which workers on GPUs need.", "Install torch's CUDA build for Linux."
        yield Finding("CUDA", found, wrong, fix).unless(has_nccl)
    elif shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version"):
        built = f"built for CUDA {cuda}" if cuda else "built without CUDA"
        fix = "Install torch for the CUDA version in nvidia-smi; check CUDA_VISIBLE_DEVICES; run containers with --gpus all."
        yield Finding("GPUs", "none", f"There is an NVIDIA driver, but torch, {built}, cannot use a GPU.", fix)
    else:
        yield Finding("GPUs", "none")


def check_precision() -> Iterator[Finding]:
    """What `--train.precision auto` uses on this machine's CPUs, and the measured rates per core that decide it."""
    import torch

    from heartseg.models import precision

    found = f"{precision.fastest(torch.device('cpu'))} on CPUs ({precision.describe_rates()})"
    yield Finding("precision", found, numbers={name: round(rate) for name, rate in precision.cpu_rates().items()})


# The checks that run on every node of a cluster.
NODE_CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "CPUs": check_processors, "memory": check_memory, "shared memory": check_shared_memory,
    "temporary files": partial(check_disk, "temporary files", tempfile.gettempdir()), "GPUs": check_gpus,
    "precision": check_precision,
}  # fmt: skip


def check_round_trip(path: str, megabytes: int) -> Iterator[Finding]:
    """Write, read and remove a file in the folder of runs, and measure the storage's speed in MB/s."""
    data, probe = os.urandom(megabytes * 1_000_000), filesystem.join(path, f".doctor-{uuid.uuid4().hex[:8]}")
    try:
        started = time.perf_counter()
        filesystem.publish(probe, data)
        written = time.perf_counter()
        is_same = filesystem.read_bytes(probe) == data
        read = time.perf_counter()
    finally:
        with contextlib.suppress(UserError, StorageError, OSError):  # storage that refuses is already reported
            filesystem.remove(probe)
    speeds = {"write_mb_per_s": megabytes / (written - started), "read_mb_per_s": megabytes / (read - written)}
    found = f"{path}, writes {speeds['write_mb_per_s']:.0f} MB/s, reads {speeds['read_mb_per_s']:.0f} MB/s"
    wrong, fix = f"{path} did not return the bytes that were written.", "Use different storage: this one corrupts data."
    yield Finding("runs storage", found, wrong, fix, speeds).unless(is_same)


def check_shards(path: str) -> Iterator[Finding]:
    """Whether the shards are complete, and the reading speed of their first part in MB/s. Nothing is written."""
    from heartseg.shards.reader import open_shards

    manifest, started = open_shards(path).manifest, time.perf_counter()
    data = filesystem.read_bytes(filesystem.join(path, manifest["parts"][0]["file"]))
    speed = len(data) / 1e6 / (time.perf_counter() - started)
    yield Finding("data", f"{path}, {manifest['rows']} images, reads {speed:.0f} MB/s", numbers={"read_mb_per_s": speed})


def check_wandb() -> Iterator[Finding]:
    """Whether W&B's server answers within 5 s and accepts the key, which is never shown."""
    server = (os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").rstrip("/")
    key = os.environ.get("WANDB_API_KEY", "").strip()
    if os.environ.get("WANDB_MODE", "") in ("offline", "dryrun", "disabled") or not key:
        yield Finding("wandb", "no WANDB_API_KEY, or WANDB_MODE is offline: runs are kept here, `wandb sync` sends them later")
        return
    answers = [f"cannot be reached: no answer within {WANDB_TIMEOUT_S:g} s"]
    # A thread, since no timeout applies to the DNS lookup.
    asking = threading.Thread(target=lambda: answers.append(ask_wandb(server, key)), daemon=True)
    asking.start()
    asking.join(WANDB_TIMEOUT_S)
    problem, fix = answers[-1], "Runs are logged offline until it answers; allow access to it, or set WANDB_MODE=offline."
    if problem == KEY_REFUSED:
        fix = "Set a valid WANDB_API_KEY where the cluster starts."
    found = f"{server} answers, and accepts the key" if not problem else server
    yield Finding("wandb", found, f"{server} {problem}.", fix).unless(not problem)


def ask_wandb(server: str, key: str) -> str:
    """The problem with a server or the key; empty if the server accepts the key."""
    login = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
    question = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    try:
        request = urllib.request.Request(f"{server}/graphql", question, headers)
        with urllib.request.urlopen(request, timeout=2 * WANDB_TIMEOUT_S) as answer:
            return "" if (json.load(answer).get("data") or {}).get("viewer") else KEY_REFUSED
    except urllib.error.HTTPError as error:
        return KEY_REFUSED if error.code in (401, 403) else f"cannot be reached: HTTP {error.code}"
    except (OSError, ValueError) as error:
        return f"cannot be reached: {getattr(error, 'reason', error)}"


def check_cluster(options: Options, runs: str) -> Iterator[Finding]:
    """The cluster as Ray sees it, its other nodes, and how fast workers exchange data; `runs` may be empty."""
    import ray

    from jobs.support import ray_runtime

    is_closed = ray_runtime.cluster_address() == "local" or os.environ.get("RAY_AUTH_MODE") == "token"
    ray_runtime.start_ray(options.workers)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    found, numbers = f"nodes {len(nodes)}, CPUs {cpus}, GPUs {gpus}", {"nodes": len(nodes), "cpus": cpus, "gpus": gpus}
    wrong = "Anyone who can reach the cluster can use it: RAY_AUTH_MODE is not token."
    fix = "Restart it with RAY_AUTH_MODE=token on every node (cluster/README.md)."
    yield Finding("Ray", found, wrong, fix, numbers).unless(is_closed)
    yield from check_other_nodes(nodes)
    number = options.workers or gpus or max(min(2, cpus), len(nodes))
    message = "Workers on several nodes need storage that all of them see: give --runs, or set HEARTSEG_RUNS."
    require(len(nodes) == 1 or bool(runs), message)
    folder = filesystem.join(runs or tempfile.gettempdir(), f".doctor-{uuid.uuid4().hex[:8]}")
    try:
        resources = ray_runtime.worker_resources(number)
        trainer = ray_runtime.build_trainer(all_reduce, {"seconds": options.seconds}, number, resources, folder, tries=0)
        yield bandwidth(number, trainer.fit().return_value)
    except Exception as error:
        network = "Where Ray starts, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that connects the nodes"
        fix = f"{network}, and open its ports; NCCL_DEBUG=INFO shows more. Every node must be able to reach --runs."
        fix += " If the cluster is full, use fewer --workers."
        yield Finding("workers", f"{number} requested", f"The workers could not exchange data: {first_line(error)}", fix)
    finally:
        with contextlib.suppress(UserError, StorageError, OSError):
            filesystem.remove(folder)


def check_other_nodes(nodes: list[dict]) -> Iterator[Finding]:
    """The cluster's other nodes, one row each, and any problems with them."""
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
            wrong = f"Node {address} did not answer ({type(error).__name__})."
            yield Finding(f"node {address}", "–", wrong, "Check its Ray logs, and restart Ray on it.")
        else:
            yield from describe_node(f"node {host} ({address})", found)


def check_node() -> tuple[str, list[Finding]]:
    checks = NODE_CHECKS | {"versions": check_versions}
    return platform.node(), [one for name, check in checks.items() for one in run_check(name, check)]


def describe_node(name: str, found: list[Finding]) -> Iterator[Finding]:
    """Another node's findings as one row, then its problems, including versions that differ from ours."""
    yield Finding(name, "; ".join(f"{one.name}: {one.found}" for one in found))
    here = {one.name: one.found for one in check_versions()}
    for one in found:
        if not one.wrong and one.found != (ours := here.get(one.name, one.found)):
            wrong = f"{one.name} is {one.found} there but {ours} here."
            one = replace(one, wrong=wrong, fix="Install the same versions on every node.")
        if one.wrong:
            yield replace(one, name=f"{one.name} of {name}", wrong=f"{name}: {one.wrong}")


def all_reduce(config: dict) -> dict:
    """Run by each worker: sum a tensor over all workers for some seconds; returns bytes, seconds, rounds and participants."""
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
    report = {"bytes": num_bytes, "seconds": time.perf_counter() - started, "rounds": rounds, "is_right": is_right}
    report |= {"backend": dist.get_backend(), "machines": [None] * number}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dist.all_gather_object(report["machines"], (platform.node(), name))
    return report


def bandwidth(number: int, report: dict) -> Finding:
    """The exchange in GB/s, as NCCL's tests define it: a worker sends and receives 2 (n - 1) / n of the tensor per round."""
    bus = report["bytes"] * report["rounds"] / report["seconds"] * 2 * (number - 1) / number / 1e9
    hosts, devices = (sorted(set(names)) for names in zip(*report["machines"], strict=True))
    found = f"{number} on {counted(len(hosts), 'host')} ({', '.join(devices)}), {report['backend']}, "
    found += f"{bus:.2f} GB/s for {report['seconds']:.0f} s" if number > 1 else "nothing to exchange"
    wrong, fix = "The sum over the workers was wrong.", "Find the faulty GPU or network link, then run the doctor again."
    numbers = {"workers": number, "gb_per_s": bus, "hosts": len(hosts)} | {name: report[name] for name in ("rounds", "backend")}
    return Finding("workers", found, wrong, fix, numbers).unless(report["is_right"])


def findings_text(found: list[Finding]) -> str:
    """The findings as a table and, below it, the problems and their fixes."""
    width = max(len(f.name) for f in found)
    lines = [f"{'!' if f.wrong else ' '} {f.name.ljust(width)}  {f.found}" for f in found]
    wrong = [f"! {f.wrong}\n  {f.fix}" for f in found if f.wrong]
    return "\n".join([*lines, "", *(wrong or ["Nothing is wrong."])])


def job(argv: list[str]) -> None:
    about = "Check this machine or cluster, and report what is wrong and how to fix it."
    options = command_line.parse_line(Options, argv, "python jobs/doctor.py", about)
    if options.launcher == "plain":
        no_workers = dict.fromkeys(("workers", "seconds"), "--launcher plain starts no workers")
        command_line.refuse_unused(Options(), options, no_workers)
    stdout = os.dup(1)
    os.dup2(2, 1)  # stdout is for the result only: anything else that is printed, even by Ray and C code, goes to stderr
    try:
        found = run(options)
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
    is_well = not any(finding.wrong for finding in found)
    text = json.dumps({"ok": is_well, "findings": [asdict(finding) for finding in found]}, indent=2)
    print(text if options.json else findings_text(found))
    if not is_well:
        sys.exit(1)


if __name__ == "__main__":
    command_line.main(job)
