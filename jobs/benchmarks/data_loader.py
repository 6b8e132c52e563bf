"""Section `loader` of the data table: how fast the shards' images come from memory and from a stream, and at what memory.

The images are a phantom's, repeated under other patients' names until there are enough; they are written once into a folder
for the while. What computes is one thread; a stream's readers are threads beside it.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, count, repeat

import pyarrow as pa
import torch

from heartseg.config.experiment import ImageConfig
from heartseg.config.recipes import quick
from heartseg.datasets import phantom
from heartseg.datasets.camus import CamusTree
from heartseg.models.deeplabv3 import build_model
from heartseg.shards import reader, writer
from heartseg.shards.loader import Batch
from heartseg.storage import filesystem
from heartseg.training import data_loading
from heartseg.training.distributed import Ranks
from jobs.benchmarks.train_bench import our_steps, peak_memory_gb

GRID = ImageConfig(256, 256)
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
BATCH = 12
# The model step beside which a stream is measured; the process waits for it, as for a GPU.
STEP_S = 0.05
# How much larger the larger folder is, whose stream must need no more memory.
TIMES = 10


def loader_lines(images: int, repeats: int, pairs: int) -> list[str]:
    """The table for a training group of `images` and one of ten times as many; `pairs` are training steps each way."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(folder, -(-images // 4))
        data, large = (grow(base, os.path.join(folder, name), images * n) for name, n in (("one", 1), ("ten", TIMES)))
        number = reader.open_shards(data).num_rows("train")
        lines = [f"{f'{number} images of {GRID.height} x {GRID.width}, batches of {BATCH}':<62}{'measured':>10}"]
        memory, stream = (data_loading.open_groups(reader.open_shards(data), kind, ALONE).loaders["train"] for kind in KINDS)
        epochs = [[cpu_and_wall(loader.training_batches(BATCH, 0, e)) for e in range(repeats)] for loader in (memory, stream)]
        lines.append(line("from memory into batches, images/s of a core", number / min(cpu for cpu, _ in epochs[0])))
        lines.append(line("streamed into batches, images/s of a core", number / min(cpu for cpu, _ in epochs[1])))
        lines.append(line("streamed into batches, images/s", number / min(wall for _, wall in epochs[1])))
        for kind in KINDS:
            firsts = [first_batch_s(data, kind) for _ in range(repeats)]
            lines.append(line(f"from opening to the first batch, {named(kind)}, s", min(firsts)))
        lines += step_lines(chain.from_iterable(memory.training_batches(BATCH, 0, e) for e in count()), pairs)
        walls = [[paced(loader.training_batches(BATCH, 0, e)) for loader in (memory, stream)] for e in range(repeats)]
        from_memory, streamed = (min(found) for found in zip(*walls, strict=True))
        lines.append(line(f"epoch beside a step of {1000 * STEP_S:.0f} ms, from memory, s", from_memory))
        lines.append(line(f"epoch beside a step of {1000 * STEP_S:.0f} ms, streamed, s", streamed))
        lines.append(line("streamed epoch / epoch from memory", streamed / from_memory))
        return lines + memory_lines(data, large)


KINDS = ("memory", "stream")


def named(kind: str) -> str:
    """An ingest in a line of the table."""
    return "streamed" if kind == "stream" else "from memory"


def line(what: str, value: float, note: str = "") -> str:
    """A row of the table."""
    return f"{what:<62}{value:>10.{0 if value >= 100 else 3}f}{note and f'   {note}'}"


# the data


def write_base(folder: str, patients: int) -> dict:
    """One part of phantoms, or of fewer `patients` than fill one, and its record with its path as `path`."""
    source, out = os.path.join(folder, "phantom"), os.path.join(folder, "base")
    patients = min(patients, writer.PATIENTS_PER_PART["stills"])
    phantom.write_phantom(source, patients)
    names = sorted(os.listdir(os.path.join(source, "database_nifti")))
    return writer.write_part(CamusTree(source), out, "part-00000.parquet", names, GRID) | {"path": out}


def grow(base: dict, out: str, images: int) -> str:
    """Shards of `images` or a few more: the base's part again and again, each time with patients of other names."""
    table = filesystem.read_table(filesystem.read_bytes(filesystem.join(base["path"], base["file"])))
    records = []
    for number in range(-(-images // base["rows"])):
        names = pa.array([f"{name}-{number}" for name in table["patient"].to_pylist()])
        part, file = table.set_column(0, "patient", names), f"part-{number:05d}.parquet"
        num_bytes, digest = filesystem.write_table(filesystem.join(out, file), part, **writer.PARQUET)
        patients = {f"{name}-{number}": record for name, record in base["patients"].items()}
        records.append(base | {"file": file, "bytes": num_bytes, "sha256": digest, "patients": patients})
    manifest = writer.write_manifest(out, "phantom", GRID, records, {})
    groups = {"train": sorted(manifest["patients"]), "test": []}
    filesystem.publish(filesystem.join(out, writer.SPLITS), json.dumps({"config": {}, "groups": groups}).encode())
    return out


# the measurements


def cpu_and_wall(batches: Iterable[Batch]) -> tuple[float, float]:
    """Seconds of this process's cores, all threads together, and of the clock until the batches end."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in batches:
        pass
    return time.process_time() - cpu, time.perf_counter() - wall


def paced(batches: Iterable[Batch]) -> float:
    """Seconds of an epoch whose steps take STEP_S each, beside what the batches take."""
    began = time.perf_counter()
    for _ in batches:
        time.sleep(STEP_S)
    return time.perf_counter() - began


def first_batch_s(data: str, kind: str) -> float:
    """Seconds from a folder's name to its first batch."""
    began = time.perf_counter()
    batches = data_loading.open_groups(reader.open_shards(data), kind, ALONE).loaders["train"].training_batches(BATCH, 0, 0)
    next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return seconds


def step_lines(fed: Iterator[Batch], pairs: int) -> list[str]:
    """Training steps fed from memory against steps on one batch that stays where it is, in turn, by their core's time."""
    recipe = quick()
    experiment = replace(recipe, image=GRID, train=replace(recipe.train, batch_size=BATCH, precision="fp32"))
    torch.manual_seed(0)
    ways = [our_steps(experiment, build_model(experiment.model), b, ALONE) for b in (fed, repeat(next(fed)))]
    ratios, seconds = [], []
    for pair in range(1 + pairs):
        costs = [0.0, 0.0]
        for way in (0, 1) if pair % 2 else (1, 0):
            began = time.process_time()
            next(ways[way])
            costs[way] = time.process_time() - began
        seconds.append(costs[1])
        ratios.append(costs[0] / costs[1])
    note = f"{pairs} pairs of {statistics.median(seconds[1:]):.2f} s, {experiment.model.backbone}"
    return [line("training step fed from memory / on one resident batch", statistics.median(ratios[1:]), note)]


def memory_lines(data: str, large: str) -> list[str]:
    """The largest resident memory of a process of its own that goes through an epoch, streamed from both folders."""
    peaks = {}
    for name, folder, kind in (("one", data, "memory"), ("one", data, "stream"), ("ten", large, "stream")):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[name, kind] = pool.apply(peak_of_epoch, (folder, kind))
    return [
        line("peak memory of a worker, from memory, MB", peaks["one", "memory"][1]),
        line(
            "peak memory of a worker, streamed, MB", peaks["one", "stream"][1], f"{peaks['one', 'stream'][0]:.0f} are imports"
        ),
        line(f"peak memory of a worker, streamed from {TIMES} times the data, MB", peaks["ten", "stream"][1]),
        line(f"{TIMES} times the data / the data", peaks["ten", "stream"][1] / peaks["one", "stream"][1]),
    ]


def peak_of_epoch(data: str, kind: str) -> tuple[float, float]:
    """Largest resident memory in MB before and after this process takes an epoch's batches."""
    torch.set_num_threads(1)
    before = 1000 * peak_memory_gb(CPU)
    cpu_and_wall(data_loading.open_groups(reader.open_shards(data), kind, ALONE).loaders["train"].training_batches(BATCH, 0, 0))
    return before, 1000 * peak_memory_gb(CPU)
