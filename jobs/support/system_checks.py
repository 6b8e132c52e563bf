"""What one machine is and has, one check at a time; each hands on findings, and what is wrong comes with its mend.

Nothing here starts a cluster, keeps a file or tells a secret. What needs torch is imported where it is used: that torch is
missing is one of the findings.
"""

import base64
import errno
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heartseg.errors import UserError
from heartseg.storage import filesystem

PACKAGES = ("torch", "torchvision", "ray", "wandb", "pyarrow")
GIB = 1 << 30
# Below these a training is likely to fail: a worker's memory, checkpoints of a run, Ray's object store.
LEAST_MEMORY, LEAST_DISK, LEAST_SHARED = 2 * GIB, 5 * GIB, 1 * GIB
WANDB_S = 5.0


@dataclass(frozen=True)
class Finding:
    """A line of the table: what was found and, where something is `wrong`, a sentence for it and one for its `mend`."""

    name: str
    found: str
    wrong: str = ""
    mend: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


def versions() -> list[Finding]:
    """Python and the packages that decide; a package that is not there, or torch and torchvision that do not fit."""
    found = [Finding("python", platform.python_version())]
    try:
        from heartseg.training import run_directory

        found.append(Finding("heartseg", run_directory.code_revision()))
    except ImportError as error:
        found.append(Finding("heartseg", "–", f"heartseg does not load: {error}.", "Install the project: pip install -e ."))
    for package in PACKAGES:
        try:
            found.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(package, "–", f"{package} is not installed.", "Install the project: pip install -e ."))
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        wrong = f"torchvision does not load beside this torch ({str(error).splitlines()[0]})."
        found.append(Finding("torchvision loads", "no", wrong, "Install both together, from one index."))
    return found


def processors(group: str = "/sys/fs/cgroup") -> Finding:
    """CPUs of the machine, and how many of them this process may use."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = _cpu_quota(group)
    found = f"{cores}" + (f", {usable} for this process" if usable < cores else "")
    if quota and quota < usable:
        wrong = f"The container may use {quota:g} of {usable} CPUs, and programs start a thread for each that they see."
        mend = f"Set OMP_NUM_THREADS={max(1, int(quota))}, and --num-cpus {max(1, int(quota))} where Ray starts."
        told = os.environ.get("OMP_NUM_THREADS")
        return Finding("CPUs", f"{found}, {quota:g} by the container's limit", "" if told else wrong, "" if told else mend)
    return Finding("CPUs", found, numbers={"cpus": usable})


def _cpu_quota(group: str) -> float | None:
    words = _read(f"{group}/cpu.max").split()
    if not words:
        words = [_read(f"{group}/cpu/cpu.cfs_quota_us").strip(), _read(f"{group}/cpu/cpu.cfs_period_us").strip()]
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() and words[1].isdigit() else None


def memory(root: str = "/") -> Finding:
    """Memory that is free, within the container's limit where there is one, as training itself counts it."""
    from heartseg.training.data_loading import free_on_machine

    lines = dict(line.split(":", 1) for line in _read(f"{root}/proc/meminfo").splitlines() if ":" in line)
    if not lines:
        return Finding("memory", "unknown on this system")
    total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    free = free_on_machine(root)
    limited = " within the container's limit" if free < 0.9 * available else ""
    found = f"{total / GIB:.1f} GiB, {free / GIB:.1f} free{limited}"
    if free < LEAST_MEMORY:
        wrong = f"Only {free / GIB:.1f} GiB of memory are free; a worker with the seed's network needs more."
        return Finding("memory", found, wrong, "End what else runs here, raise the container's limit, or take fewer --workers.")
    return Finding("memory", found, numbers={"free_bytes": free})


def gpus() -> list[Finding]:
    """The GPUs that torch sees, with CUDA and NCCL; a GPU that the driver sees and torch does not."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        kinds = [torch.cuda.get_device_properties(number) for number in range(count)]
        found = [Finding(f"GPU {n}", f"{kind.name}, {kind.total_memory / GIB:.0f} GiB") for n, kind in enumerate(kinds)]
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
        missing = "" if nccl else "This torch has no NCCL, which workers on GPUs need."
        mend = "" if nccl else "Install torch's CUDA build for Linux."
        return [*found, Finding("CUDA", str(torch.version.cuda)), Finding("NCCL", nccl or "–", missing, mend)]
    if not (shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version")):
        return [Finding("GPUs", "none", numbers={"gpus": 0})]
    if not torch.version.cuda:
        wrong, mend = "There is an NVIDIA driver, and this torch was built without CUDA.", "Install torch's CUDA build."
    else:
        wrong = f"There is an NVIDIA driver, and torch, built for CUDA {torch.version.cuda}, cannot use a GPU."
        mend = "Compare with nvidia-smi's CUDA version and CUDA_VISIBLE_DEVICES; a container needs --gpus all."
    return [Finding("GPUs", "none that torch can use", wrong, mend)]


def shared_memory(path: str = "/dev/shm") -> Finding:
    """Room for Ray's object store, through which workers hand each other data."""
    try:
        room = shutil.disk_usage(path)
    except OSError:
        return Finding("shared memory", "none", f"There is no {path}.", "Ray will use the disk instead, slowly: mount one.")
    found = f"{room.total / GIB:.1f} GiB, {room.free / GIB:.1f} free"
    if room.free < LEAST_SHARED:
        wrong = f"{path} has {room.free / GIB:.2f} GiB free: Ray's object store goes to the disk, slowly."
        return Finding("shared memory", found, wrong, "Docker: --shm-size 8g; Kubernetes: an emptyDir of medium Memory on it.")
    return Finding("shared memory", found, numbers={"free_bytes": room.free})


def temporary_disk() -> Finding:
    """Room for Ray's and Python's temporary files."""
    return disk("temporary files", tempfile.gettempdir())


def disk(name: str, folder: str) -> Finding:
    """Free room where a local folder is, or will be."""
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{folder}, {free / GIB:.1f} GiB free"
    if free < LEAST_DISK:
        wrong = f"The disk of {folder} has {free / GIB:.2f} GiB free."
        return Finding(name, found, wrong, "Make room, or give another folder (TMPDIR for temporary files, --runs for runs).")
    return Finding(name, found, numbers={"free_bytes": free})


def round_trip(path: str, megabytes: int) -> list[Finding]:
    """Write, read and remove a file where runs go: the storage's word, and its bandwidth in MB/s."""
    found = [] if filesystem.is_uri(path) else [disk("runs", path)]
    data = os.urandom(megabytes * 1_000_000)
    probe = filesystem.join(path, f".doctor-{uuid.uuid4().hex[:8]}")
    made = [] if filesystem.is_uri(path) else [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    try:
        written, write_s = _timed(lambda: filesystem.publish(probe, data))
        read, read_s = _timed(lambda: filesystem.read_bytes(probe))
        if read != data:
            wrong = f"{path} gave back other bytes than were written."
            return [*found, Finding("runs storage", path, wrong, "Use another storage: this one loses data.")]
    except (UserError, OSError) as error:
        return [*found, _refused("runs storage", path, error)]
    finally:
        _forget(probe, made)
    speeds = {"write_mb_per_s": megabytes / write_s, "read_mb_per_s": megabytes / read_s}
    text = f"{path}, writes {speeds['write_mb_per_s']:.0f} MB/s, reads {speeds['read_mb_per_s']:.0f} MB/s"
    return [*found, Finding("runs storage", text, numbers=speeds)]


def _forget(probe: str, made: list[Path]) -> None:
    """Remove the file, and the folders that were not there before it, the innermost first."""
    try:
        filesystem.remove(probe)
        for folder in made:
            folder.rmdir()
    except (UserError, OSError):
        pass  # that it refuses has been said


def readable(path: str) -> Finding:
    """The shards: complete, and the bandwidth of their first part in MB/s. Nothing is written."""
    from heartseg.shards.reader import open_shards

    try:
        opened = open_shards(path)
        part = opened.manifest["parts"][0]["file"]
        data, seconds = _timed(lambda: filesystem.read_bytes(filesystem.join(path, part)))
    except (UserError, OSError) as error:
        return _refused("data", path, error)
    speed = len(data) / 1e6 / seconds
    return Finding(
        "data", f"{path}, {opened.manifest['rows']} images, reads {speed:.0f} MB/s", numbers={"read_mb_per_s": speed}
    )


def _refused(name: str, path: str, error: Exception) -> Finding:
    """The storage's refusal as a finding: a UserError holds its own mend."""
    if isinstance(error, UserError):
        return Finding(name, path, str(error), "As said; then run this again.")
    reason = os.strerror(error.errno) if getattr(error, "errno", None) else str(error)
    mends = {errno.ENOSPC: "Make room there, or give another folder.", errno.EDQUOT: "Your quota is used up: make room."}
    mend = mends.get(getattr(error, "errno", 0), "Give a folder that you may write to, or ask for the right to.")
    return Finding(name, path, f"{path} cannot be used ({reason}).", mend)


def _timed(act: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    value = act()
    return value, max(time.perf_counter() - started, 1e-9)


def wandb() -> Finding:
    """Whether W&B's server answers within 5 s and takes the key, which is never shown."""
    key, server = os.environ.get("WANDB_API_KEY", ""), os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "dryrun", "disabled"):
        return Finding("wandb", f"WANDB_MODE={mode}: nothing is sent")
    if not key:
        return Finding("wandb", "no WANDB_API_KEY here: runs are kept offline, `wandb sync` sends them later")
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(_ask_wandb(server, key)), daemon=True)
    asking.start()
    asking.join(WANDB_S)
    problem = answers[0] if answers else f"no answer within {WANDB_S:g} s"
    if not problem:
        return Finding("wandb", f"{server} answers, and takes the key")
    if problem == "refused":
        return Finding("wandb", server, f"{server} refuses the key.", "Set WANDB_API_KEY anew, where the cluster starts.")
    mend = "Trainings go on and are kept offline; open the way to it, or set WANDB_MODE=offline to save the wait."
    return Finding("wandb", server, f"{server} cannot be reached: {problem}.", mend)


def _ask_wandb(server: str, key: str) -> str:
    """Empty where the server knows who the key's owner is; `refused`, or what went wrong."""
    request = urllib.request.Request(
        f"{server}/graphql",
        data=json.dumps({"operationName": "Viewer", "query": "query Viewer { viewer { id } }", "variables": {}}).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode(),
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=WANDB_S) as answer:
            viewer = (json.loads(answer.read(1 << 20)).get("data") or {}).get("viewer")
            return "" if viewer else "refused"
    except urllib.error.HTTPError as error:
        return "refused" if error.code in (401, 403) else f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
