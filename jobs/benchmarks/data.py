"""The way from NIfTI files to batches in tables of two sides: `python jobs/benchmark.py data --source CAMUS`.

The baseline is one process: nibabel's get_fdata, scikit-image's resize of image and label, np.save. Sides are compared on one
thread, mostly by the CPU time that they use, which other programs on the machine disturb least.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat

import numpy as np
import torch

from heartseg.config.recipes import quick, seed
from heartseg.datasets import camus, phantom
from heartseg.datasets.camus import CamusTree
from heartseg.errors import UserError, require
from heartseg.shards import writer
from heartseg.shards.loader import Batches
from heartseg.shards.reader import open_shards
from heartseg.training import data_loading
from heartseg.training.distributed import Ranks
from jobs.benchmarks.train_sides import endless, link_patients, new_model, our_steps, write_shards
from jobs.benchmarks.two_sides import CPU, Row, Table, choose, in_turn, peak_memory_gb
from jobs.support import ray_runtime
from jobs.support.ray_preprocessing import write_parts_with_ray

# The seed's grid, 256 x 256, and its batch.
GRID, BATCH = seed().image, seed().train.batch_size
# Patients of the phantom whose stills are float32, as the release's are: 389 x 549 pixels and more.
FLOAT_PATIENTS = (1, 4, 5, 8, 9, 12, 13, 16)
# The model step beside which a stream is measured; the process waits for it, as for a GPU.
STEP_S = 0.05
# How much larger the larger folder is, whose stream must need no more memory.
TIMES = 10


@dataclass(frozen=True)
class Options:
    """What to measure."""

    source: str = ""
    """Folder of the CAMUS release, or of a phantom."""
    sections: tuple[str, ...] = ("plain", "workers", "memory", "loader")
    """Which tables: plain (against the baseline), workers (two against one under Ray), memory (by patients), loader (batches
    from memory and streamed, of synthetic patients)."""
    patients: int = 48
    """Patients of the source in section plain, which takes eight synthetic ones of the release's size as well."""
    repeats: int = 3
    """Times that each side does the same; the median counts."""
    frames: int = 20000
    """Images of a run of one worker or of two: the source's, repeated if there are too few."""
    few: int = 50
    """Patients of the smaller run whose memory is measured."""
    many: int = 450
    """Patients of the larger run whose memory is measured."""
    rows: int = 1800
    """Images of section loader, which also streams ten times as many."""
    pairs: int = 6
    """Training steps on each side in section loader."""


def run(options: Options) -> list[Table]:
    """Measure the sections asked for and print their tables."""
    choose(options.sections, SECTIONS)
    needs_source = set(options.sections) != {"loader"}
    require(bool(options.source) or not needs_source, "--source is missing: give the folder of the CAMUS release.")
    torch.set_num_threads(1)
    tables = []
    for name in options.sections:
        with tempfile.TemporaryDirectory() as folder:
            tables.append(SECTIONS[name](options, folder))
        tables[-1].show()
    return tables


def measure_plain(options: Options, folder: str) -> Table:
    """Images per second of one core, ours and the baseline's."""
    large, rows = os.path.join(folder, "phantom"), []
    for number in FLOAT_PATIENTS:
        phantom.write_patient(large, 0, False, 1.0, number)
    for name, source in (("the source", options.source), ("float32 as in the release", large)):
        patients = camus.find_patients(source)[: options.patients]
        sides = {way: lambda w=way, s=source, p=patients: w(s, p, tempfile.mkdtemp(dir=folder)) for way in (baseline, ours)}
        base, our = in_turn(sides, options.repeats)
        images, note = 4 * len(patients), f"{base.wall_s / our.wall_s:.1f} times as fast by the clock"
        rows.append(Row(f"{name}, {images} images", images / our.cpu_s, "images/s of a core", images / base.cpu_s, note))
    return Table(f"plain: NIfTI to {GRID.height} x {GRID.width}", ("baseline", "ours"), rows)


def baseline(source: str, patients: list[str], out: str) -> None:
    """One file after the other by the tools that everyone knows."""
    try:
        import nibabel
        from skimage.transform import resize
    except ImportError as error:
        raise UserError("scikit-image, which this table compares with, is missing: pip install 'heartseg[dev]'.") from error
    size = (GRID.width, GRID.height)
    for patient in patients:
        for view, phase in camus.stills_of():
            paths = [camus.recording_path(source, patient, view, phase, suffix) for suffix in ("", "_gt")]
            image, mask = (nibabel.load(path).get_fdata() for path in paths)
            image = resize(image, size, preserve_range=True)  # bilinear, antialiased if it shrinks
            mask = resize(mask, size, order=0, anti_aliasing=False, preserve_range=True)
            for path, pixels in zip(paths, (image, mask), strict=True):
                np.save(os.path.join(out, os.path.basename(path).replace(".nii.gz", ".npy")), pixels.astype(np.uint8))


def ours(source: str, patients: list[str], out: str) -> None:
    """Shards with native masks, checked labels and hashes."""
    for name, chunk in writer.part_names(patients):
        writer.write_part(CamusTree(source), out, name, chunk, GRID)


def measure_workers(options: Options, folder: str) -> Table:
    """Images per second under Ray with one worker and with two, in turn."""
    ray_runtime.start_ray(2)
    steady_rate(options.source, 4000, 2, os.path.join(folder, "warm-up"))
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(options.repeats):
        for workers, found in rates.items():
            found.append(steady_rate(options.source, options.frames, workers, os.path.join(folder, f"{turn}-{workers}")))
    one, two = map(statistics.median, rates.values())
    return Table("workers: under Ray", ("1 worker", "2 workers"), [Row("NIfTI to shards, steady state", two, "images/s", one)])


def steady_rate(source: str, images: int, workers: int, folder: str) -> float:
    """Images per second from the first finished part of each worker to the last part of all."""
    parts = writer.part_names(camus.find_patients(source))
    rounds = max(1, round(images / (4 * sum(len(patients) for _, patients in parts))))
    tree = CamusTree(source)
    tasks = [(tree, os.path.join(folder, str(number)), *part, GRID) for number in range(rounds) for part in parts]
    rows, finished = [], []
    for record in write_parts_with_ray(tasks, workers):
        rows.append(record["rows"])
        finished.append(time.perf_counter())
    return sum(rows[workers:]) / (finished[-1] - finished[workers - 1])


def measure_memory(options: Options, folder: str) -> Table:
    """The peak memory of a process of its own that writes the shards of few patients, and of many."""
    patients, numbers = camus.find_patients(options.source), (options.few, options.many)
    require(max(numbers) <= len(patients), f"{options.source} has {len(patients)} patients: lower --few and --many.")
    few, many = (peak_mb_of(ours, options.source, patients[:number], tempfile.mkdtemp(dir=folder)) for number in numbers)
    sides, note = (f"{options.few} patients", f"{options.many} patients"), f"imports alone {peak_mb_of(len, ()):.0f}"
    return Table("memory: NIfTI to shards", sides, [Row("peak memory of a worker", many, "MB", few, note)])


def peak_mb_of(work: Callable, *arguments: object) -> float:
    """The peak memory of a new process that imports this file and does some work in one thread."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        pool.apply(work, arguments)
        return 1000 * pool.apply(peak_memory_gb)


def measure_loader(options: Options, folder: str) -> Table:
    """How fast the shards' images come from memory and from a stream, and at what memory."""
    source, one, ten = (os.path.join(folder, name) for name in ("phantom", "one", "ten"))
    phantom.write_phantom(source, 16, scale=0.5)
    for data, images in ((one, options.rows), (ten, TIMES * options.rows)):
        write_shards(seed(), link_patients(source, f"{data}-source", -(-images // 4)), data)
    loaders = {kind: open_loader(one, kind) for kind in ("memory", "stream")}
    images, rows = len(loaders["memory"]) // BATCH * BATCH, []
    for name, work in {
        "an epoch's batches": lambda kind: take_epoch(loaders[kind]),
        f"an epoch beside a step of {1000 * STEP_S:.0f} ms": lambda kind: take_epoch(loaders[kind], STEP_S),
        "from opening to the first batch": lambda kind: take_first(one, kind),
    }.items():
        memory, stream = in_turn({kind: partial(work, kind) for kind in loaders}, options.repeats)
        rates = f"{images / memory.cpu_s:.0f} and {images / stream.cpu_s:.0f} images/s of a core"
        rows.append(Row(name, stream.wall_s, "s", memory.wall_s, "" if rows else rates))
    resident, memory, stream = (1000 * seconds for seconds in step_seconds(loaders, options.pairs))
    note = f"{memory / resident:.3f} and {stream / resident:.3f} times one on a resident batch"
    rows.append(Row(f"a training step of {quick().model.backbone}", stream, "ms of a core", memory, note))
    memory, stream, larger = (peak_mb_of(open_and_take, *of) for of in ((one, "memory"), (one, "stream"), (ten, "stream")))
    rows.append(Row("peak memory of a worker", stream, "MB", memory, f"imports alone {peak_mb_of(len, ()):.0f}"))
    rows.append(Row(f"the same with {TIMES} times the images", larger, "MB", note=f"{larger / stream:.2f} times"))
    return Table(
        f"loader: {images} images of {GRID.height} x {GRID.width}, batches of {BATCH}", ("from memory", "streamed"), rows
    )


def open_loader(data: str, kind: str) -> Batches:
    """The training group from memory, or from a `stream`."""
    return data_loading.open_groups(open_shards(data), kind, Ranks(0, 1, CPU)).loaders["train"]


def take_epoch(loader: Batches, step_s: float = 0.0) -> None:
    """Take an epoch's batches, and wait after each of them."""
    for _ in loader.training_batches(BATCH, 0, 0):
        time.sleep(step_s)


def open_and_take(data: str, kind: str) -> None:
    """Open a folder, and take an epoch's batches."""
    take_epoch(open_loader(data, kind))


def take_first(data: str, kind: str) -> None:
    """Open a folder, and take the first batch."""
    with closing(open_loader(data, kind).training_batches(BATCH, 0, 0)) as batches:
        next(batches)


def step_seconds(loaders: dict[str, Batches], steps: int) -> list[float]:
    """Seconds of the cores for a training step on one batch that stays where it is, and on those of each loader, in turn."""
    recipe = quick()
    experiment = replace(recipe, image=GRID, train=replace(recipe.train, batch_size=BATCH, precision="fp32"))
    batches = {name: endless(loader, experiment) for name, loader in loaders.items()}
    batches = {"resident": repeat(next(batches["memory"]))} | batches
    sides = {name: our_steps(experiment, new_model(experiment), fed, Ranks(0, 1, CPU)) for name, fed in batches.items()}
    return [cost.cpu_s for cost in in_turn({name: partial(next, side) for name, side in sides.items()}, steps)]


SECTIONS: dict[str, Callable[[Options, str], Table]] = {
    "plain": measure_plain,
    "workers": measure_workers,
    "memory": measure_memory,
    "loader": measure_loader,
}
