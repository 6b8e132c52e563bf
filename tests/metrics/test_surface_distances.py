"""Surface distances equal MONAI's."""

import math
import warnings

import numpy as np
import pytest

from heartseg.labels import STRUCTURE_LABELS
from heartseg.metrics.segmentation import DISTANCES, surface_distances
from jobs.benchmarks import scores


def random_pair(generator: np.random.Generator, longest: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Two label maps of up to `longest` squared, alike except for a few rectangles, noise and a shift; and a spacing in mm."""
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


SIZES = [pytest.param([9] * 100 + [32] * 25, id="125"), pytest.param([48] * 1000, id="1000", marks=pytest.mark.slow)]


@pytest.mark.parametrize("sizes", SIZES)
def test_distances_are_monais_and_the_diagonal_for_a_structure_that_one_map_lacks(sizes):
    (_, by_monai), occurred = scores.monai_side(), set()
    for seed, longest in enumerate(sizes):
        prediction, truth, spacing_mm = random_pair(np.random.default_rng(seed), longest)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # absent structures
            values = by_monai(scores.one_hot(prediction), scores.one_hot(truth), spacing_mm)
        expected = dict(zip(DISTANCES, values, strict=True))
        occurred |= set() if prediction.any() or truth.any() else {"empty maps"}
        for name, labels in STRUCTURE_LABELS.items():
            present = tuple(bool(np.isin(labels_of, labels).any()) for labels_of in (prediction, truth))
            occurred.add(present)
            if present[0] != present[1]:  # MONAI has no rule for it
                keys = (f"{kind}_{name}_mm" for kind in ("hd", "hd95", "masd"))
                expected |= dict.fromkeys(keys, math.hypot(*np.multiply(truth.shape, spacing_mm)))
        found = surface_distances(prediction, truth, spacing_mm)
        assert tuple(found) == DISTANCES and all(type(value) is float for value in found.values())
        assert found == pytest.approx(expected, abs=1e-4, rel=0, nan_ok=True)
    assert len(occurred) == 5  # also structures in both maps, in either one and in neither


def test_maps_of_other_shapes_and_impossible_spacings_are_refused():
    for one, other in (((4, 4), (4, 5)), ((2, 4, 4), (2, 4, 4))):
        with pytest.raises(ValueError, match="shapes"):
            surface_distances(np.ones(one, np.uint8), np.ones(other, np.uint8), (1, 1))
    for spacing_mm in ((1, 0), (1, math.inf), (math.nan, 1)):
        with pytest.raises(ValueError, match="not positive"):
            surface_distances(np.ones((4, 4), np.uint8), np.ones((4, 4), np.uint8), spacing_mm)
