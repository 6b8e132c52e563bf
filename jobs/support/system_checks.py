"""What one machine is and has: each check yields findings, and a finding of something wrong says how to fix it.

Nothing here starts a cluster, keeps a file or shows a secret. What needs torch is imported where it is used: a missing torch is
one of the findings.
"""

import base64
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from heartseg.errors import StorageError, UserError, io_errors_as_user_errors
from heartseg.storage import filesystem

GIB = 1 << 30
# Below these a training is likely to fail: a worker's memory, checkpoints of a run, Ray's object store.
LEAST_MEMORY, LEAST_DISK, LEAST_SHARED = 2 * GIB, 5 * GIB, 1 * GIB
WANDB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Finding:
    """A row of the table: what was found and, if something is `wrong`, a sentence about it and one on how to `fix` it."""

    name: str
    found: str
    wrong: str = ""
    fix: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


def run_check(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A check's findings; a check that fails adds one."""
    found: list[Finding] = []
    try:
        with io_errors_as_user_errors():
            found.extend(check())
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        wrong = (
            reason if isinstance(error, (UserError, StorageError)) else f"This check failed ({type(error).__name__}: {reason})."
        )
        found.append(Finding(name, "–", wrong, "Fix this, then run the doctor again."))
    return found


def versions() -> Iterator[Finding]:
    """Python and the packages that matter: whether one is missing, and whether torch and torchvision fit together."""
    yield Finding("python", platform.python_version())
    is_complete = True
    for package in ("torch", "torchvision", "ray", "wandb", "pyarrow"):
        try:
            yield Finding(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            is_complete = False
            yield Finding(package, "–", f"{package} is not installed.", "Install the project: pip install -e .")
    try:
        from heartseg.models.deeplabv3 import check_installation
        from heartseg.training import run_directory

        yield Finding("heartseg", run_directory.code_revision())
        check_installation()
    except ModuleNotFoundError as error:
        if is_complete:  # otherwise it is reported above
            yield Finding("heartseg", "–", f"heartseg does not load: {error}.", "Install the project: pip install -e .")


def processors(group: str = "/sys/fs/cgroup") -> Iterator[Finding]:
    """CPUs of the machine, and how many of them this process may use."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    found, wrong, fix = f"{cores}" + (f", {usable} for this process" if usable < cores else ""), "", ""
    quota = _cpu_quota(group)
    if quota and quota < usable:
        found += f", {quota:g} by the container's limit"
        if not os.environ.get("OMP_NUM_THREADS"):
            wrong = f"The container may use {quota:g} of {usable} CPUs, but programs start a thread for each CPU that they see."
            fix = f"Set OMP_NUM_THREADS={max(1, int(quota))}, and --num-cpus {max(1, int(quota))} when you start Ray."
    yield Finding("CPUs", found, wrong, fix)


def _cpu_quota(group: str) -> float | None:
    """CPUs that a control group grants, version 2 or 1; None without a limit."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # it is not there, or `max`
            quota, period = map(int, " ".join(Path(group, file).read_text() for file in files).split())
            return quota / period if quota > 0 else None
    return None


def _room(name: str, found: str, free: float, least: int, fix: str) -> Finding:
    """A finding of free bytes, with something wrong if they are fewer than `least`."""
    wrong = f"{found}: at least {least / GIB:g} GiB should be."
    return Finding(name, found, *((wrong, fix) if free < least else ()), numbers={"free_bytes": free})


def memory(root: str = "/") -> Iterator[Finding]:
    """Free memory, within the container's limit if there is one, as training itself counts it."""
    from heartseg.training.data_loading import free_on_machine

    free = free_on_machine(root)
    fix = "Stop other programs, raise the container's limit, or use fewer --workers."
    yield _room("memory", f"{free / GIB:.1f} GiB of memory are free", free, LEAST_MEMORY, fix)


def shared_memory(path: str = "/dev/shm") -> Iterator[Finding]:
    """Room for Ray's object store, through which workers exchange data; without it, the store is on the disk and slow."""
    free = shutil.disk_usage(path).free if os.path.exists(path) else 0
    fix = "Ray's object store goes to the disk, slowly. Docker: --shm-size 8g; Kubernetes: an emptyDir of medium Memory on it."
    yield _room("shared memory", f"{free / GIB:.1f} GiB of {path} are free", free, LEAST_SHARED, fix)


def disk(name: str, folder: str) -> Iterator[Finding]:
    """Free room where a local folder is, or will be."""
    there = next(place for place in (Path(folder), *Path(folder).absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    fix = "Make room, or give another folder (TMPDIR for temporary files, --runs for runs)."
    yield _room(name, f"{free / GIB:.1f} GiB of the disk of {folder} are free", free, LEAST_DISK, fix)


def gpus() -> Iterator[Finding]:
    """The GPUs that torch sees, with CUDA and NCCL; a GPU that only the driver sees."""
    import torch

    cuda = torch.version.cuda
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            kind = torch.cuda.get_device_properties(number)
            yield Finding(f"GPU {number}", f"{kind.name}, {kind.total_memory / GIB:.0f} GiB")
        has_nccl = torch.distributed.is_nccl_available()
        found = f"{cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version())) if has_nccl else '–'}"
        wrong = ("This torch has no NCCL, which workers on GPUs need.", "Install torch's CUDA build for Linux.")
        yield Finding("CUDA", found, *(() if has_nccl else wrong))
    elif shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version"):
        built = f"built for CUDA {cuda}" if cuda else "built without CUDA"
        fix = "Install torch's CUDA build for nvidia-smi's CUDA version; see CUDA_VISIBLE_DEVICES; containers need --gpus all."
        yield Finding("GPUs", "none", f"There is an NVIDIA driver, but torch, {built}, cannot use a GPU.", fix)
    else:
        yield Finding("GPUs", "none")


def round_trip(path: str, megabytes: int) -> Iterator[Finding]:
    """Write, read and remove a file where runs go; the storage's speed in MB/s."""
    data = os.urandom(megabytes * 1_000_000)
    probe = filesystem.join(path, f".doctor-{uuid.uuid4().hex[:8]}")
    try:
        started = time.perf_counter()
        filesystem.publish(probe, data)
        written = time.perf_counter()
        is_same = filesystem.read_bytes(probe) == data
        speeds = {"write_mb_per_s": megabytes / (written - started)}
        speeds["read_mb_per_s"] = megabytes / (time.perf_counter() - written)
    finally:
        with contextlib.suppress(UserError, StorageError, OSError):  # a storage that refuses is reported already
            filesystem.remove(probe)
    found = f"{path}, writes {speeds['write_mb_per_s']:.0f} MB/s, reads {speeds['read_mb_per_s']:.0f} MB/s"
    wrong = (f"{path} returned other bytes than were written.", "Use another storage: this one loses data.")
    yield Finding("runs storage", found, *(() if is_same else wrong), numbers=speeds)


def readable(path: str) -> Iterator[Finding]:
    """The shards: complete, and the speed of their first part in MB/s. Nothing is written."""
    from heartseg.shards.reader import open_shards

    manifest = open_shards(path).manifest
    started = time.perf_counter()
    data = filesystem.read_bytes(filesystem.join(path, manifest["parts"][0]["file"]))
    speed = len(data) / 1e6 / (time.perf_counter() - started)
    yield Finding("data", f"{path}, {manifest['rows']} images, reads {speed:.0f} MB/s", numbers={"read_mb_per_s": speed})


def wandb() -> Iterator[Finding]:
    """Whether W&B's server answers within 5 s and accepts the key, which is never shown."""
    key, server = os.environ.get("WANDB_API_KEY", ""), os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    if os.environ.get("WANDB_MODE", "") in ("offline", "dryrun", "disabled") or not key:
        yield Finding("wandb", "no WANDB_API_KEY, or WANDB_MODE is offline: runs are kept here, `wandb sync` sends them later")
        return
    login = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
    question = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    is_accepted, problem = False, ""
    try:
        request = urllib.request.Request(f"{server}/graphql", question, headers)
        with urllib.request.urlopen(request, timeout=WANDB_TIMEOUT_S) as answer:
            is_accepted = bool((json.load(answer).get("data") or {}).get("viewer"))
    except urllib.error.HTTPError as error:
        problem = "" if error.code in (401, 403) else f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        problem = f"no answer within {WANDB_TIMEOUT_S:g} s" if isinstance(reason, TimeoutError) else str(reason)
    if problem:
        fix = "Trainings run and are kept offline; open the way to it, or set WANDB_MODE=offline to save the wait."
        yield Finding("wandb", server, f"{server} cannot be reached: {problem}.", fix)
    elif is_accepted:
        yield Finding("wandb", f"{server} answers, and accepts the key")
    else:
        yield Finding("wandb", server, f"{server} refuses the key.", "Set a valid WANDB_API_KEY where the cluster starts.")


# What every node of a cluster is asked.
NODE_CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "CPUs": processors,
    "memory": memory,
    "shared memory": shared_memory,
    "temporary files": partial(disk, "temporary files", tempfile.gettempdir()),
    "GPUs": gpus,
}
