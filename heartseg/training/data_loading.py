"""A run's batches, from memory or a stream. These differ in order, and so in trained weights: a run resumes as it began."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch.distributed import ReduceOp

from heartseg.config.experiment import Experiment
from heartseg.shards.loader import Batches, Loader, Stream
from heartseg.shards.reader import FrameRows, Shards, check_sizes, index_groups, load_groups, read_rows
from heartseg.training.distributed import Ranks, from_main, reduce_over_ranks

log = logging.getLogger(__name__)
# Of a worker's free memory, on its machine and GPU, for pixels: reading briefly holds them twice; the model needs the rest.
MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class TrainingData:
    """The opened groups: `loaders` feed the engine; `rows(group, numbers)` returns some rows' images, masks and columns."""

    loaders: dict[str, Batches]
    rows: Callable[[str, Sequence[int]], FrameRows]


def open_groups(shards: Shards, ingest: str, ranks: Ranks) -> TrainingData:
    """Open all groups of the shards; `ingest` is `memory` or `stream`. Raises UserError for damaged shards."""
    at = (ranks.rank, ranks.world_size, ranks.device)
    if ingest == "stream":
        check_sizes(shards)
        index = index_groups(shards)
        loaders = {group: Stream(shards, held, *at) for group, held in index.items()}
        return TrainingData(loaders, lambda group, rows: read_rows(shards, index[group], rows))
    frames = load_groups(shards, shards.groups)

    def take_rows(group: str, rows: Sequence[int]) -> FrameRows:
        held, numbers = frames[group], list(rows)
        return FrameRows(held.images[numbers], held.masks[numbers], held.table.take(pa.array(numbers, pa.int64())))

    return TrainingData({group: Loader.of(one, *at) for group, one in frames.items()}, take_rows)


def choose(experiment: Experiment, shards: Shards, begun: str | None, ranks: Ranks) -> str:
    """`memory` or `stream`, the same on every rank: as the run began (`begun`), otherwise as configured, otherwise by size."""
    # torchrun and Ray Train set LOCAL_WORLD_SIZE; otherwise, all workers may be on this machine.
    on_machine = free_on_machine() / int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    on_gpu = torch.cuda.mem_get_info(ranks.device)[0] if ranks.device.type == "cuda" else float("inf")
    # Machines may differ: all hold their data in memory, or none does.
    here = torch.tensor(MEMORY_SHARE * min(on_machine, on_gpu), dtype=torch.float64, device=ranks.device)
    needed, room = pixel_bytes(shards), float(reduce_over_ranks(here, ranks, ReduceOp.MIN))
    chosen, why = from_main(begun, ranks), "as when the run began"
    if not chosen and experiment.ingest != "auto":
        chosen, why = experiment.ingest, f"--ingest {experiment.ingest}"
    elif not chosen:
        chosen = "memory" if needed <= room else "stream"
        why = f"{needed / 1e9:.1f} GB of pixels; a worker may use {room / 1e9:.1f} GB, a quarter of its free memory"
    if ranks.is_main and chosen == "stream":
        log.info("Batches stream from %s (%s).", shards.path, why)
    elif ranks.is_main and needed > room:
        fix = "if a worker runs out of it, start a new run with --ingest stream."
        log.warning("%.1f GB of pixels go into memory (%s), which leaves little room: %s", needed / 1e9, why, fix)
    return chosen


def pixel_bytes(shards: Shards) -> int:
    """Bytes of the images and masks of all groups."""
    return sum(map(shards.num_rows, shards.groups)) * 2 * shards.image.height * shards.image.width


def free_on_machine(root: str = "/") -> float:
    """Bytes that this process can still use without swapping, within its container's limit; infinite if unknown."""
    try:
        lines = Path(root, "proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:  # not Linux: count all memory as free
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min(_free_in_container(Path(root)), *found)


def _free_in_container(root: Path) -> float:
    """Free bytes within the tightest of this process's control groups; file caches can be freed and do not count as used."""
    free, own = float("inf"), "/"
    with contextlib.suppress(OSError, ValueError):
        (own,) = [line.split(":")[2] for line in Path(root, "proc/self/cgroup").read_text().splitlines() if line[0] == "0"]
    version_2 = Path(root, "sys/fs/cgroup" + own)
    groups = [(folder, "max", "current", "inactive_file") for folder in (version_2, *version_2.parents)]
    groups.append((Path(root, "sys/fs/cgroup/memory"), "limit_in_bytes", "usage_in_bytes", "total_inactive_file"))
    for folder, limit, usage, cache in groups:
        with contextlib.suppress(OSError, ValueError):  # not a control group, or no limit ("max")
            most, taken = (int((folder / f"memory.{name}").read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, most - taken + int(stat.get(cache, 0)))
    return free
