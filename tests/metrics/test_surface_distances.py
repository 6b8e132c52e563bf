"""Surface distances equal the definitions pixel by pixel, and MONAI's."""

import math
import warnings

import numpy as np
import pytest

from heartseg.labels import STRUCTURE_LABELS
from heartseg.metrics.segmentation import DISTANCES, surface_distances
from jobs.benchmarks import scores

KINDS = ("hd", "hd95", "masd")


def random_pair(generator: np.random.Generator, longest: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Two label maps of up to `longest` squared, alike but for a few rectangles, noise and a shift; and a spacing in mm."""
    height, width = generator.integers(2, longest + 1, size=2)
    truth = np.zeros((height, width), np.uint8)
    scatter(truth, generator, generator.integers(1, 8))
    prediction = np.roll(truth, generator.integers(-3, 4, size=2), axis=(0, 1))
    scatter(prediction, generator, generator.integers(0, 3))
    if generator.random() < 0.3:
        noisy = generator.random(truth.shape) < 0.05
        prediction[noisy] = generator.integers(0, 4, noisy.sum())
    return prediction, truth, tuple(generator.uniform(0.1, 2.0, size=2))


def scatter(labels: np.ndarray, generator: np.random.Generator, count: int) -> None:
    for _ in range(count):
        (top, bottom), (left, right) = (np.sort(generator.integers(0, side + 1, size=2)) for side in labels.shape)
        labels[top:bottom, left:right] = generator.integers(0, 4)


def surface_pixels(labels: np.ndarray, chosen: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pixels of a structure with one of their four neighbours outside it or outside the image."""
    inside = {(int(row), int(column)) for row, column in np.argwhere(np.isin(labels, chosen))}
    around = ((-1, 0), (1, 0), (0, -1), (0, 1))
    return sorted((r, c) for r, c in inside if any((r + dr, c + dc) not in inside for dr, dc in around))


def by_hand(prediction, truth, spacing_mm) -> dict[str, float]:
    """The definitions, every pixel of a surface against every pixel of the other."""
    found = {}
    for name, chosen in STRUCTURE_LABELS.items():
        ours, true = surface_pixels(prediction, chosen), surface_pixels(truth, chosen)
        if ours and true:
            table = [[math.dist(np.multiply(a, spacing_mm), np.multiply(b, spacing_mm)) for b in true] for a in ours]
            ways = [[min(row) for row in table], [min(column) for column in zip(*table, strict=True)]]
            hd, hd95 = max(map(max, ways)), max(np.quantile(way, 0.95) for way in ways)
            values = (hd, hd95, sum(map(sum, ways)) / (len(ours) + len(true)))
        else:
            values = (math.nan if not ours + true else math.hypot(*np.multiply(truth.shape, spacing_mm)),) * 3
        found |= {f"{kind}_{name}_mm": value for kind, value in zip(KINDS, values, strict=True)}
    return found


def assert_equals_monai(prediction, truth, spacing_mm) -> int:
    """Compare all distances; returns how many structures were in both maps. MONAI has no rule for one-sided absence."""
    _, by_monai = scores.monai_side()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # absent structures
        theirs = by_monai(scores.one_hot(prediction), scores.one_hot(truth), spacing_mm)
    ours, theirs, both = surface_distances(prediction, truth, spacing_mm), dict(zip(DISTANCES, theirs, strict=True)), 0
    for name, chosen in STRUCTURE_LABELS.items():
        present = [bool(np.isin(m, chosen).any()) for m in (prediction, truth)]
        if present[0] == present[1]:
            both += present[0]
            keys = [f"{kind}_{name}_mm" for kind in KINDS]
            assert [ours[key] for key in keys] == pytest.approx([theirs[key] for key in keys], abs=1e-4, rel=0, nan_ok=True)
    return both


def test_distances_are_the_definitions_pixel_by_pixel():
    absent = set()
    for seed in range(100):
        prediction, truth, spacing_mm = random_pair(np.random.default_rng(seed), longest=9)
        found = surface_distances(prediction, truth, spacing_mm)
        assert tuple(found) == DISTANCES and all(type(value) is float for value in found.values())
        assert found == pytest.approx(by_hand(prediction, truth, spacing_mm), abs=1e-9, nan_ok=True)
        absent |= {((prediction == label).any(), (truth == label).any()) for label in (1, 2, 3)}
        absent |= {"both maps"} if not (prediction.any() or truth.any()) else set()
    # Every case occurred: structures in both maps, in either one and in none, and empty maps.
    assert absent == {(True, True), (True, False), (False, True), (False, False), "both maps"}


@pytest.mark.parametrize(
    ("seeds", "longest"),
    [(range(25), 32), pytest.param(range(1000), 48, marks=pytest.mark.slow)],
    ids=["25", "1000"],
)
def test_distances_are_monais(seeds, longest):
    compared = sum(assert_equals_monai(*random_pair(np.random.default_rng(seed), longest)) for seed in seeds)
    assert compared > len(seeds)


def test_maps_of_other_shapes_and_impossible_spacings_are_refused():
    for one, other in (((4, 4), (4, 5)), ((2, 4, 4), (2, 4, 4))):
        with pytest.raises(ValueError, match="shapes"):
            surface_distances(np.ones(one, np.uint8), np.ones(other, np.uint8), (1, 1))
    for spacing_mm in ((1, 0), (math.nan, 1)):
        with pytest.raises(ValueError, match="not positive"):
            surface_distances(np.ones((4, 4), np.uint8), np.ones((4, 4), np.uint8), spacing_mm)
