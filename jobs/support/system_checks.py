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
import threading
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
from jobs.support.command_line import first_line

GIB = 1 << 30
# Below these a training is likely to fail: a worker's memory, checkpoints of a run, Ray's object store.
LEAST_MEMORY, LEAST_DISK, LEAST_SHARED = 2 * GIB, 5 * GIB, 1 * GIB
WANDB_TIMEOUT_S = 5.0
REINSTALL = "Install the project: pip install -e ."


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
        reason = first_line(error)
        is_known = isinstance(error, (UserError, StorageError))
        wrong = reason if is_known else f"This check failed ({type(error).__name__}: {reason})."
        found.append(Finding(name, "–", wrong, "Fix this, then run the doctor again."))
    return found


def versions() -> Iterator[Finding]:
    """Python and the packages that matter: whether one is missing, and whether torch and torchvision fit together."""
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
            yield Finding("heartseg", "–", f"heartseg does not load: {error}.", REINSTALL)


def processors(group: str = "/sys/fs/cgroup") -> Iterator[Finding]:
    """CPUs of the machine, and how many of them this process may use."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    found, quota = f"{cores}" + (f", {usable} for this process" if usable < cores else ""), None
    with contextlib.suppress(OSError, ValueError):  # not a control group of version 2, or its limit is `max`
        granted, period = map(int, Path(group, "cpu.max").read_text().split())
        quota = granted / period
    if not quota or quota >= usable:
        yield Finding("CPUs", found)
        return
    found += f", {quota:g} by the container's limit"
    threads = max(1, int(quota))
    wrong = f"The container may use {quota:g} of {usable} CPUs, but programs start a thread for each CPU that they see."
    fix = f"Set OMP_NUM_THREADS={threads}, and --num-cpus {threads} when you start Ray."
    yield Finding("CPUs", found, *(() if os.environ.get("OMP_NUM_THREADS") else (wrong, fix)))


def _free_space(name: str, where: str, free: float, least: int, fix: str) -> Finding:
    """A finding of free bytes, with something wrong if they are fewer than `least`."""
    found = f"{free / GIB:.1f} GiB of {where} are free"
    wrong = f"{found}: at least {least / GIB:g} GiB should be."
    return Finding(name, found, *((wrong, fix) if free < least else ()), numbers={"free_bytes": free})


def memory(root: str = "/") -> Iterator[Finding]:
    """Free memory, within the container's limit if there is one, as training itself counts it."""
    from heartseg.training.data_loading import free_on_machine

    fix = "Stop other programs, raise the container's limit, or use fewer --workers."
    yield _free_space("memory", "memory", free_on_machine(root), LEAST_MEMORY, fix)


def shared_memory(path: str = "/dev/shm") -> Iterator[Finding]:
    """Space for Ray's object store, through which workers exchange data; without it, the store is on the disk and slow."""
    free = shutil.disk_usage(path).free if os.path.exists(path) else 0
    fix = "Ray's object store goes to the disk, slowly. Docker: --shm-size 8g; Kubernetes: an emptyDir of medium Memory on it."
    yield _free_space("shared memory", path, free, LEAST_SHARED, fix)


def disk(name: str, folder: str) -> Iterator[Finding]:
    """Free space where a local folder is, or will be."""
    there = next(place for place in (Path(folder), *Path(folder).absolute().parents) if place.exists())
    fix = "Make room, or give another folder (TMPDIR for temporary files, --runs for runs)."
    yield _free_space(name, f"the disk of {folder}", shutil.disk_usage(there).free, LEAST_DISK, fix)


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
        read = time.perf_counter()
    finally:
        with contextlib.suppress(UserError, StorageError, OSError):  # a storage that refuses is reported already
            filesystem.remove(probe)
    speeds = {"write_mb_per_s": megabytes / (written - started), "read_mb_per_s": megabytes / (read - written)}
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
    server = (os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").rstrip("/")
    key = os.environ.get("WANDB_API_KEY", "").strip()
    if os.environ.get("WANDB_MODE", "") in ("offline", "dryrun", "disabled") or not key:
        yield Finding("wandb", "no WANDB_API_KEY, or WANDB_MODE is offline: runs are kept here, `wandb sync` sends them later")
        return
    answers: list[tuple[bool, str]] = []
    # A thread, since no timeout bounds the search for the server's address.
    asking = threading.Thread(target=lambda: answers.append(_ask_wandb(server, key)), daemon=True)
    asking.start()
    asking.join(WANDB_TIMEOUT_S)
    is_accepted, problem = answers[0] if answers else (False, f"no answer within {WANDB_TIMEOUT_S:g} s")
    if problem:
        fix = "Trainings run and are kept offline; open the way to it, or set WANDB_MODE=offline to save the wait."
        yield Finding("wandb", server, f"{server} cannot be reached: {problem}.", fix)
    elif is_accepted:
        yield Finding("wandb", f"{server} answers, and accepts the key")
    else:
        yield Finding("wandb", server, f"{server} refuses the key.", "Set a valid WANDB_API_KEY where the cluster starts.")


def _ask_wandb(server: str, key: str) -> tuple[bool, str]:
    """Whether a server accepts the key, and why it did not answer."""
    login = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
    question = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    try:
        request = urllib.request.Request(f"{server}/graphql", question, headers)
        with urllib.request.urlopen(request, timeout=2 * WANDB_TIMEOUT_S) as answer:
            return bool((json.load(answer).get("data") or {}).get("viewer")), ""
    except urllib.error.HTTPError as error:
        return False, "" if error.code in (401, 403) else f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return False, str(getattr(error, "reason", error))


# What every node of a cluster is asked.
NODE_CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "CPUs": processors,
    "memory": memory,
    "shared memory": shared_memory,
    "temporary files": partial(disk, "temporary files", tempfile.gettempdir()),
    "GPUs": gpus,
}
