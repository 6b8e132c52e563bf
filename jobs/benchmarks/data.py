"""Benchmark of converting NIfTI files to shards: `python jobs/benchmark.py data --source CAMUS`.

The baseline is nibabel's get_fdata, scikit-image's resize and np.save. Both use one thread; the table compares CPU times.
"""

import os
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

from heartseg.config.recipes import seed
from heartseg.datasets import camus, phantom
from heartseg.errors import require
from heartseg.shards import writer
from jobs.benchmarks.two_sides import Row, Table, in_turn

GRID = seed().image  # 256 x 256
# Phantom patients whose stills are float32, like the release's: 389 x 549 pixels and more.
FLOAT_PATIENTS = (1, 4, 5, 8, 9, 12, 13, 16)


@dataclass(frozen=True)
class Options:
    source: str = ""
    """Folder of the CAMUS release, or of a phantom."""
    patients: int = 48
    """Patients of the source; eight synthetic ones of the release's size are added."""
    repeats: int = 3
    """Repetitions of each of the two implementations; the median is reported."""


def run(options: Options) -> Table:
    """Measure images per second on one core, ours and the baseline's, and print the table."""
    require(bool(options.source), "--source is missing: give the folder of the CAMUS release.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        large, rows = os.path.join(folder, "large"), []
        for number in FLOAT_PATIENTS:
            phantom.write_patient(large, 0, False, 1.0, number)
        for name, source in (("the source", options.source), ("float32 as in the release", large)):
            patients = camus.find_patients(source)[: options.patients]
            sides = {way: lambda w=way, s=source, p=patients: w(s, p, tempfile.mkdtemp(dir=folder)) for way in (baseline, ours)}
            base, our = in_turn(sides, options.repeats)
            images, note = 4 * len(patients), f"{base.wall_s / our.wall_s:.1f} times as fast by the clock"
            rows.append(Row(f"{name}, {images} images", images / our.cpu_s, "images per CPU second", images / base.cpu_s, note))
    table = Table(f"data: NIfTI to {GRID.height} x {GRID.width}", ("baseline", "ours"), rows)
    table.show()
    return table


def baseline(source: str, patients: list[str], out: str) -> None:
    """Convert one file after another with standard tools."""
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
    """Write shards with native masks, checked labels and hashes."""
    for part in writer.part_names(patients):
        writer.write_part(camus.CamusTree(source), out, *part, GRID)
