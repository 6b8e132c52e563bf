"""Surface distances are what the definitions give pixel by pixel, what MONAI gives, and keep to the geometry's laws."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from heartseg.labels import STRUCTURE_LABELS
from heartseg.metrics.segmentation import DISTANCES, surface_distances

KINDS = ("hd", "hd95", "masd")
SPACINGS = st.tuples(*[st.floats(0.1, 3.0, allow_subnormal=False)] * 2)


@st.composite
def map_pairs(draw, longest=9):
    """Two label maps uint8 [H,W]: noise of few labels (absent structures, single pixels, holes) or rectangles."""
    shape = draw(st.tuples(st.integers(1, longest), st.integers(1, longest)))
    labels = st.sampled_from(sorted(draw(st.sets(st.integers(0, 3), min_size=1))))
    if draw(st.booleans()):
        return tuple(draw(arrays("uint8", shape, elements=labels)) for _ in range(2))
    return tuple(draw(rectangles(shape, labels)) for _ in range(2))


@st.composite
def rectangles(draw, shape, labels):
    """Up to four rectangles, the later over the earlier: full shapes, some at the border."""
    found = np.zeros(shape, np.uint8)
    for _ in range(draw(st.integers(0, 4))):
        (top, bottom), (left, right) = (sorted(draw(st.tuples(*[st.integers(0, side)] * 2))) for side in shape)
        found[top:bottom, left:right] = draw(labels)
    return found


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


def by_monai(prediction, truth, spacing_mm) -> dict[str, float]:
    """MONAI's three metric classes, a channel for each structure after the background's."""
    from monai.metrics import HausdorffDistanceMetric, SurfaceDistanceMetric

    one_hot = [
        torch.from_numpy(np.stack([m == 0, *(np.isin(m, chosen) for chosen in STRUCTURE_LABELS.values())])[None]).float()
        for m in (prediction, truth)
    ]
    metrics = [HausdorffDistanceMetric(percentile=100), HausdorffDistanceMetric(percentile=95)]
    metrics.append(SurfaceDistanceMetric(symmetric=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # absent structures
        values = torch.stack([metric(*one_hot, spacing=spacing_mm)[0] for metric in metrics], dim=1)
    return dict(zip(DISTANCES, values.flatten().tolist(), strict=True))


def assert_equals_monai(prediction, truth, spacing_mm) -> int:
    """Compare all distances; returns how many structures were in both maps. MONAI has no rule for one-sided absence."""
    ours, theirs, both = surface_distances(prediction, truth, spacing_mm), by_monai(prediction, truth, spacing_mm), 0
    for name, chosen in STRUCTURE_LABELS.items():
        present = [bool(np.isin(m, chosen).any()) for m in (prediction, truth)]
        if present[0] == present[1]:
            both += present[0]
            keys = [f"{kind}_{name}_mm" for kind in KINDS]
            assert [ours[key] for key in keys] == pytest.approx([theirs[key] for key in keys], abs=1e-4, rel=0, nan_ok=True)
    return both


@given(map_pairs(), SPACINGS)
def test_distances_are_the_definitions_pixel_by_pixel(pair, spacing_mm):
    found = surface_distances(*pair, spacing_mm)
    assert tuple(found) == DISTANCES and all(type(value) is float for value in found.values())
    assert found == pytest.approx(by_hand(*pair, spacing_mm), abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("seeds", "longest"),
    [(range(60), 32), pytest.param(range(1000), 48, marks=pytest.mark.slow)],
    ids=["60", "1000"],
)
def test_distances_are_monais(seeds, longest):
    compared = sum(assert_equals_monai(*random_pair(np.random.default_rng(seed), longest)) for seed in seeds)
    assert compared > len(seeds)


@given(map_pairs(), SPACINGS)
def test_swapping_prediction_and_truth_changes_nothing(pair, spacing_mm):
    swapped = surface_distances(*pair[::-1], spacing_mm)
    assert surface_distances(*pair, spacing_mm) == pytest.approx(swapped, nan_ok=True)


@given(map_pairs(longest=5), SPACINGS)
def test_distances_are_zero_exactly_where_the_surfaces_are_the_same(pair, spacing_mm):
    found = surface_distances(*pair, spacing_mm)
    for name, chosen in STRUCTURE_LABELS.items():
        surfaces = [surface_pixels(m, chosen) for m in pair]
        if surfaces[0] + surfaces[1]:
            same = surfaces[0] == surfaces[1]
            assert (found[f"hd_{name}_mm"] == 0) == (found[f"masd_{name}_mm"] == 0) == same
    assert all(value == 0 or math.isnan(value) for value in surface_distances(pair[0], pair[0], spacing_mm).values())


@given(map_pairs(), SPACINGS, st.floats(0.25, 4))
def test_distances_grow_with_the_spacing(pair, spacing_mm, factor):
    scaled = surface_distances(*pair, tuple(factor * side for side in spacing_mm))
    expected = {name: factor * value for name, value in surface_distances(*pair, spacing_mm).items()}
    assert scaled == pytest.approx(expected, nan_ok=True)


@given(map_pairs(), SPACINGS, st.tuples(*[st.integers(0, 6)] * 2))
def test_moving_both_masks_inside_the_frame_changes_nothing(pair, spacing_mm, offset):
    height, width = pair[0].shape
    found = []
    for row, column in ((0, 0), offset):
        frames = np.zeros((2, height + 6, width + 6), np.uint8)
        frames[:, row : row + height, column : column + width] = pair
        found.append(surface_distances(*frames, spacing_mm))
    assert found[0] == pytest.approx(found[1], nan_ok=True)


@given(map_pairs(), SPACINGS)
def test_transposing_the_maps_and_the_spacing_changes_nothing(pair, spacing_mm):
    turned = surface_distances(pair[0].T, pair[1].T, spacing_mm[::-1])
    assert surface_distances(*pair, spacing_mm) == pytest.approx(turned, nan_ok=True)


@given(map_pairs(), SPACINGS)
def test_the_percentile_and_the_mean_never_exceed_the_hausdorff_distance_nor_that_the_diagonal(pair, spacing_mm):
    found = surface_distances(*pair, spacing_mm)
    for name in STRUCTURE_LABELS:
        hd, hd95, masd = (found[f"{kind}_{name}_mm"] for kind in KINDS)
        if not math.isnan(hd):
            diagonal_mm = math.hypot(*np.multiply(pair[0].shape, spacing_mm))
            assert 0 <= hd95 <= hd + 1e-12 and 0 <= masd <= hd + 1e-12 and hd <= diagonal_mm + 1e-12


@given(map_pairs(), SPACINGS)
def test_a_structure_in_neither_map_has_no_distance_and_in_one_of_them_the_diagonal(pair, spacing_mm):
    without = [np.where(m == 3, 0, m).astype(np.uint8) for m in pair]
    found = surface_distances(*without, spacing_mm)
    assert all(math.isnan(found[f"{kind}_la_mm"]) for kind in KINDS)
    assume((pair[0] == 3).any())
    diagonal_mm = math.hypot(pair[0].shape[0] * spacing_mm[0], pair[0].shape[1] * spacing_mm[1])
    for maps in ((pair[0], without[1]), (without[1], pair[0])):
        found = surface_distances(*maps, spacing_mm)
        assert [found[f"{kind}_la_mm"] for kind in KINDS] == pytest.approx([diagonal_mm] * 3)


def test_empty_maps_have_no_distances():
    empty = np.zeros((4, 6), np.uint8)
    assert all(math.isnan(value) for value in surface_distances(empty, empty, (1, 1)).values())


def test_one_pixel_structures_are_as_far_apart_as_their_centres():
    prediction, truth = np.zeros((2, 8, 9), np.uint8)
    prediction[1, 2] = truth[5, 8] = 1
    found = surface_distances(prediction, truth, (0.75, 2 / 3))
    assert [found[f"{kind}_endo_mm"] for kind in KINDS] == pytest.approx([5.0] * 3)
    assert found["hd_epi_mm"] == found["hd_endo_mm"] and math.isnan(found["hd_myo_mm"])


def test_a_structure_that_fills_the_image_has_its_surface_at_the_border():
    full, block = np.full((5, 7), 3, np.uint8), np.zeros((5, 7), np.uint8)
    block[1:4, 1:6] = 3
    found = surface_distances(full, block, (1.0, 1.0))
    assert found["hd_la_mm"] == pytest.approx(math.sqrt(2))
    # 20 border pixels, of which 4 corners at the diagonal; 12 of the block's, all at 1.
    assert found["masd_la_mm"] == pytest.approx((16 + 4 * math.sqrt(2) + 12) / 32)


def test_the_percentile_forgives_a_few_stray_pixels():
    truth = np.zeros((60, 60), np.uint8)
    truth[10:30, 10:30] = 1
    prediction = truth.copy()
    prediction[55, 20] = 1
    found = surface_distances(prediction, truth, (0.5, 0.5))
    assert found["hd_endo_mm"] == 13.0 and found["hd95_endo_mm"] == 0.0
    assert found["masd_endo_mm"] == pytest.approx(13 / (76 + 77))


@pytest.mark.parametrize(
    ("shapes", "spacing_mm", "said"),
    [
        (((4, 4), (4, 5)), (1, 1), "shapes"),
        (((2, 4, 4), (2, 4, 4)), (1, 1), "shapes"),
        (((4, 4), (4, 4)), (1, 0), "not positive"),
        (((4, 4), (4, 4)), (math.nan, 1), "not positive"),
    ],
)
def test_maps_of_other_shapes_and_impossible_spacings_are_refused(shapes, spacing_mm, said):
    with pytest.raises(ValueError, match=said):
        surface_distances(*(np.ones(shape, np.uint8) for shape in shapes), spacing_mm)
