"""Speed of surface distances against MONAI's, and of volumes, on one core: `python jobs/benchmark.py scores --source CAMUS`."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from heartseg.datasets import camus
from heartseg.errors import UserError, require
from heartseg.evaluation.ground_truth import TreeTruth
from heartseg.labels import BACKGROUND, STRUCTURE_LABELS
from heartseg.metrics.cardiac_indices import patient_indices
from heartseg.metrics.segmentation import surface_distances
from jobs.benchmarks.two_sides import Row, Table, in_turn

# Distortion of the truth into a prediction: displacements of this many pixels, smooth over this many pixels.
BEND_PIXELS, BEND_LENGTH_PIXELS = 2.0, 12.0


@dataclass(frozen=True)
class Options:
    source: str = ""
    """Folder of the CAMUS release, or of a phantom."""
    images: int = 20
    """Number of masks to measure, from as many patients as needed."""
    repeats: int = 5
    """Repetitions of each of the two implementations over all images; the median is reported."""
    seed: int = 0
    """Seed for drawing patients and for distorting truths into predictions."""


def run(options: Options) -> tuple[Table, float]:
    """Measure both implementations and print the table; returns it, and the largest difference between two distances in mm."""
    require(bool(options.source), "--source is missing: give the folder of the CAMUS release.")
    fit = min(options.images, options.repeats) >= 1
    require(fit, f"--images ({options.images}) and --repeats ({options.repeats}) must be at least 1.")
    torch.set_num_threads(1)
    name, monai_distances = monai_side()
    patients = np.random.default_rng(options.seed).permutation(camus.find_patients(options.source))
    cases = TreeTruth(options.source, images=False).cases(patients[: -(-options.images // 4)].tolist())[0][: options.images]
    generator = np.random.default_rng(options.seed)
    pairs = [(bend(case.truth, generator), case.truth, case.spacing_mm) for case in cases]
    # MONAI's one-hot tensors are made before the clock starts; ours starts from the label maps.
    tensors = [(one_hot(prediction), one_hot(truth), spacing_mm) for prediction, truth, spacing_mm in pairs]
    sides = {
        name: lambda: [monai_distances(*pair) for pair in tensors],
        "ours": lambda: [list(surface_distances(*pair).values()) for pair in pairs],
    }
    hearts: dict[str, dict] = {}
    for case in cases:
        hearts.setdefault(case.patient, {})[case.view, case.phase] = case.truth, case.spacing_mm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's deprecations, and structures missing from an image
        differences = np.abs(np.subtract(*(side() for side in sides.values())))
        theirs, ours = (1000 * cost.wall_s / len(pairs) for cost in in_turn(sides, options.repeats))
    # Only values that both have: for a structure in only one mask, MONAI has infinity and we have the diagonal.
    difference = float(differences[np.isfinite(differences)].max(initial=0.0))
    (cost,) = in_turn({"": lambda: [*map(patient_indices, hearts.values())]}, options.repeats)
    note = f"{theirs / ours:.1f} times as fast, largest difference {difference:.1e} mm"
    rows = [Row(f"distances of four structures, {len(pairs)} images", ours, "ms per image", theirs, note)]
    rows.append(Row(f"volumes, areas and EF, {len(hearts)} patients", 1000 * cost.cpu_s / len(hearts), "ms per patient"))
    table = Table("scores: label maps to numbers", tuple(sides), rows)
    table.show()
    return table, difference


def bend(mask: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mask distorted by smooth random displacements, with contours about as wrong as a fair segmentation's."""
    noise = [gaussian_filter(generator.standard_normal(mask.shape), BEND_LENGTH_PIXELS) for _ in range(2)]
    moved = np.indices(mask.shape) + [BEND_PIXELS * one / one.std() for one in noise]
    return map_coordinates(mask, moved, order=0, mode="nearest")


def monai_side() -> tuple[str, Callable]:
    """MONAI's name and version, and its HausdorffDistanceMetric (100 and 95) and SurfaceDistanceMetric as one function."""
    try:
        import monai
        from monai.metrics import HausdorffDistanceMetric, SurfaceDistanceMetric
    except ImportError as error:
        raise UserError("MONAI, the baseline here, is not installed: run `pip install 'heartseg[dev]'`.") from error
    metrics = [HausdorffDistanceMetric(include_background=False, percentile=percentile) for percentile in (100, 95)]
    metrics.append(SurfaceDistanceMetric(include_background=False, symmetric=True))

    def compute(prediction: torch.Tensor, truth: torch.Tensor, spacing_mm: tuple[float, float]) -> list[float]:
        values = [metric(prediction, truth, spacing=spacing_mm)[0] for metric in metrics]
        return torch.stack(values, dim=1).flatten().tolist()

    return f"MONAI {monai.__version__}", compute


def one_hot(labels: np.ndarray) -> torch.Tensor:
    """Background and every structure, float32 [1,5,H,W], as MONAI expects; endo and myo are also in epi."""
    masks = [np.isin(labels, chosen) for chosen in ((BACKGROUND,), *STRUCTURE_LABELS.values())]
    return torch.from_numpy(np.stack(masks)[None]).float()
