"""From NIfTI files to shards, in tables of two sides: `python jobs/benchmark.py data --source CAMUS`.

The baseline is one process: nibabel's get_fdata, scikit-image's resize of image and label, np.save. Sides are compared on one
thread, mostly by the CPU time that they use, which other programs on the machine disturb least.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from heartseg.config.recipes import seed
from heartseg.datasets import camus, phantom
from heartseg.datasets.camus import CamusTree
from heartseg.errors import require
from heartseg.shards import writer
from jobs.benchmarks.two_sides import Row, Table, in_turn, run_sections
from jobs.support import ray_runtime
from jobs.support.ray_preprocessing import write_parts_with_ray

GRID = seed().image  # 256 x 256
# Patients of the phantom whose stills are float32, as the release's are: 389 x 549 pixels and more.
FLOAT_PATIENTS = (1, 4, 5, 8, 9, 12, 13, 16)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    source: str = ""
    """Folder of the CAMUS release, or of a phantom."""
    sections: str = "all"
    """Sections by name, with a comma between them: plain (against the baseline), workers (two against one under Ray)."""
    patients: int = 48
    """Patients of the source in section plain, which takes eight synthetic ones of the release's size as well."""
    repeats: int = 3
    """Times that each side does the same; the median counts."""
    frames: int = 20000
    """Images of a run of one worker or of two: the source's, repeated if there are too few."""


def run(options: Options) -> list[Table]:
    """Measure the sections asked for and print their tables."""
    require(bool(options.source), "--source is missing: give the folder of the CAMUS release.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return run_sections(options.sections, SECTIONS, options, folder)


def measure_plain(options: Options, folder: str) -> list[Table]:
    """Images per second of one core, ours and the baseline's."""
    large, rows = os.path.join(folder, "large"), []
    for number in FLOAT_PATIENTS:
        phantom.write_patient(large, 0, False, 1.0, number)
    for name, source in (("the source", options.source), ("float32 as in the release", large)):
        patients = camus.find_patients(source)[: options.patients]
        sides = {way: lambda w=way, s=source, p=patients: w(s, p, tempfile.mkdtemp(dir=folder)) for way in (baseline, ours)}
        base, our = in_turn(sides, options.repeats)
        images, note = 4 * len(patients), f"{base.wall_s / our.wall_s:.1f} times as fast by the clock"
        rows.append(Row(f"{name}, {images} images", images / our.cpu_s, "images/s of a core", images / base.cpu_s, note))
    return [Table(f"plain: NIfTI to {GRID.height} x {GRID.width}", ("baseline", "ours"), rows)]


def baseline(source: str, patients: list[str], out: str) -> None:
    """One file after the other by the tools that everyone knows."""
    import nibabel
    from skimage.transform import resize

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
    for part in writer.part_names(patients):
        writer.write_part(CamusTree(source), out, *part, GRID)


def measure_workers(options: Options, folder: str) -> list[Table]:
    """Images per second under Ray with one worker and with two, in turn."""
    ray_runtime.start_ray(2)
    steady_rate(options.source, 4000, 2, os.path.join(folder, "warm-up"))
    rates = [
        [steady_rate(options.source, options.frames, workers, tempfile.mkdtemp(dir=folder)) for workers in (1, 2)]
        for _ in range(options.repeats)
    ]
    one, two = map(statistics.median, zip(*rates, strict=True))
    row = Row("NIfTI to shards, steady state", two, "images/s", one)
    return [Table("workers: under Ray", ("1 worker", "2 workers"), [row])]


def steady_rate(source: str, images: int, workers: int, folder: str) -> float:
    """Images per second from the first finished part of each worker to the last part of all."""
    parts = writer.part_names(camus.find_patients(source))
    rounds = max(1, round(images / (4 * sum(len(patients) for _, patients in parts))))
    tree = CamusTree(source)
    tasks = [(tree, os.path.join(folder, str(number)), *part, GRID) for number in range(rounds) for part in parts]
    finished = [(time.perf_counter(), record["rows"]) for record in write_parts_with_ray(tasks, workers)]
    return sum(rows for _, rows in finished[workers:]) / (finished[-1][0] - finished[workers - 1][0])


SECTIONS: dict[str, Callable[[Options, str], list[Table]]] = {"plain": measure_plain, "workers": measure_workers}
