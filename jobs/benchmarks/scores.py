"""Surface distances against MONAI's metric classes: `python jobs/benchmark.py scores --source CAMUS`.

Both sides are measured in the same run, on one core, image by image in turn, on the same masks and the same spacings.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from heartseg.datasets import camus
from heartseg.datasets.nifti import DamagedRecording
from heartseg.errors import UserError
from heartseg.labels import BACKGROUND, STRUCTURE_LABELS
from heartseg.metrics.segmentation import surface_distances
from jobs.support import command_line

# How the truth is bent into a prediction: displacements of this size in pixels, alike over this many pixels.
BEND_PIXELS, BEND_LENGTH_PIXELS = 2.0, 12.0


@dataclass(frozen=True)
class Options:
    """What to measure on."""

    source: str = ""
    """Folder of the CAMUS release, or of a phantom."""
    images: int = 20
    """Masks to measure on, drawn from all patients, views and phases."""
    repeats: int = 5
    """Times that each image is measured; the median counts."""
    seed: int = 0
    """Of the draw of images, and of the bending that makes a prediction of a truth."""


@dataclass(frozen=True)
class Pair:
    """Two label maps uint8 [H,W] and their (depth, lateral) spacing."""

    prediction: np.ndarray
    truth: np.ndarray
    spacing_mm: tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One line of the table: means in ms per item, and the largest difference between the two sides' values."""

    name: str
    against: str
    items: int
    our_ms: float
    their_ms: float
    difference: float
    unit: str


def run(options: Options) -> list[Row]:
    """Measure every row and print the table."""
    source = command_line.absolute(
        command_line.require_flag(options.source, "--source", "the folder of the CAMUS release"), "source"
    )
    for flag, value in (("images", options.images), ("repeats", options.repeats)):
        if value < 1:
            raise UserError(f"--{flag} must be at least 1, not {value}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [distance_row(make_pairs(source, options.images, options.seed), options.repeats)]
    finally:
        torch.set_num_threads(threads)
    print(table_text(rows))
    return rows


def make_pairs(source: str, images: int, seed: int) -> list[Pair]:
    """Truths drawn from the whole source, each with a prediction made of it by bending."""
    stills = [(patient, *still) for patient in camus.find_patients(source) for still in camus.stills_of()]
    generator = np.random.default_rng(seed)
    pairs = []
    for index in generator.permutation(len(stills))[:images]:
        try:
            recording = camus.read_still(source, *stills[index])
        except DamagedRecording as error:
            raise UserError(f"{error.file} is damaged ({error.reason}): mend it, or take another --seed.") from error
        pairs.append(Pair(bend(recording.mask, generator), recording.mask, recording.spacing_mm))
    return pairs


def bend(mask: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mask pulled about by smooth random displacements: contours off by what a fair segmentation's are."""
    places = []
    for axis, rows_or_columns in enumerate(np.indices(mask.shape)):
        noise = gaussian_filter(generator.standard_normal(mask.shape), BEND_LENGTH_PIXELS)
        moved = rows_or_columns + BEND_PIXELS * noise / noise.std()
        places.append(np.clip(np.rint(moved).astype(int), 0, mask.shape[axis] - 1))
    return mask[tuple(places)]


def distance_row(pairs: Sequence[Pair], repeats: int) -> Row:
    """All of DISTANCES against HausdorffDistanceMetric at 100 and at 95 and SurfaceDistanceMetric.

    MONAI's one-hot tensors are made before the clock starts; ours starts from the label maps.
    """
    against, compute = monai_distances()
    ours = [partial(surface_distances, pair.prediction, pair.truth, pair.spacing_mm) for pair in pairs]
    theirs = [partial(compute, one_hot(pair.prediction), one_hot(pair.truth), pair.spacing_mm) for pair in pairs]
    our_ms, their_ms, values = measure(ours, theirs, repeats)
    difference = max(largest_difference(list(found.values()), expected) for found, expected in values)
    return Row("surface distances", against, len(pairs), our_ms, their_ms, difference, "mm")


def monai_distances() -> tuple[str, Callable]:
    """MONAI's name with its version, and its three classes as one function; raises UserError where it is missing."""
    try:
        import monai
        from monai.metrics import HausdorffDistanceMetric, SurfaceDistanceMetric
    except ImportError as error:
        raise UserError("MONAI, which this table compares with, is not installed: pip install 'heartseg[dev]'.") from error
    metrics = [HausdorffDistanceMetric(include_background=False, percentile=percentile) for percentile in (100, 95)]
    metrics.append(SurfaceDistanceMetric(include_background=False, symmetric=True))

    def compute(prediction: torch.Tensor, truth: torch.Tensor, spacing_mm: tuple[float, float]) -> list[float]:
        values = torch.stack([metric(prediction, truth, spacing=spacing_mm)[0] for metric in metrics], dim=1)
        return values.flatten().tolist()

    return f"MONAI {monai.__version__}", compute


def one_hot(labels: np.ndarray) -> torch.Tensor:
    """Background and every structure, float32 [1,5,H,W], as MONAI takes them; endo and myo are in epi too."""
    masks = [np.isin(labels, chosen) for chosen in ((BACKGROUND,), *STRUCTURE_LABELS.values())]
    return torch.from_numpy(np.stack(masks)[None]).float()


def measure(ours: Sequence[Callable], theirs: Sequence[Callable], repeats: int) -> tuple[float, float, list[tuple]]:
    """Mean over items of each side's median ms, and both sides' values by item.

    The two sides take turns, item by item, so that whatever else slows the machine slows both.
    """
    times, values = ([], []), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's own deprecations, and structures that an image does not have
        for calls in zip(ours, theirs, strict=True):
            values.append(tuple(call() for call in calls))
            taken = [[timed_ms(call) for call in calls] for _ in range(repeats)]
            for side, samples in zip(times, zip(*taken, strict=True), strict=True):
                side.append(statistics.median(samples))
    return statistics.mean(times[0]), statistics.mean(times[1]), values


def timed_ms(call: Callable) -> float:
    """Milliseconds that a call takes."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Over values that both have: for a structure in one of two masks, MONAI says infinity and we the diagonal."""
    pairs = np.array([ours, theirs])
    known = pairs[:, np.isfinite(pairs).all(axis=0)]
    return float(np.abs(known[0] - known[1]).max(initial=0.0))


def table_text(rows: Sequence[Row]) -> str:
    """The rows as a table for a terminal."""
    lines = [
        f"{'per item, one core':<20}{'against':<16}{'items':>6}{'ours':>12}{'theirs':>12}{'ratio':>9}   largest difference"
    ]
    for row in rows:
        times = f"{row.our_ms:>9.3f} ms{row.their_ms:>9.2f} ms{row.their_ms / row.our_ms:>8.1f}x"
        lines.append(f"{row.name:<20}{row.against:<16}{row.items:>6}{times}   {row.difference:.1e} {row.unit}")
    return "\n".join(lines)


def job(argv: Sequence[str]) -> None:
    """The command line."""
    run(command_line.parse_line(Options, argv, "python jobs/benchmark.py scores", "Time the scores against MONAI's."))
