"""Every anatomical check by itself: on hearts of rectangles whose contours, areas and distances are known by hand."""

import numpy as np
import pytest

from heartseg.labels import BACKGROUND, ENDO, LA, MYO
from heartseg.metrics.anatomy_checks import STRUCTURE_NAMES, implausibilities

HOLES = {
    ENDO: "the cavity has a hole", LA: "the atrium has a hole",
    MYO: "there is a hole in the myocardium, or between the structures",
}  # fmt: skip
OPEN = "of the cavity's contour has neither myocardium nor atrium beside it"


def missing_but(label: int) -> list[str]:
    return [f"the {name} is missing" for other, name in STRUCTURE_NAMES.items() if other != label]


def of_blocks(spacing_mm, wall=(8, 80, 28, 92), atrium=(80, 104, 36, 84), cavity=(20, 80, 40, 80)) -> np.ndarray:
    """A heart of rectangles (top, bottom, left, right) in mm in an image of 120 x 160 mm; later ones lie over earlier ones.

    The cavity has 24 cm2, the wall 22.08; the cavity's contour is 200 mm long, of which the atrium faces 40.
    """
    mask = np.zeros([round(side / mm) for side, mm in zip((120, 160), spacing_mm, strict=True)], np.uint8)
    for label, box in ((MYO, wall), (LA, atrium), (ENDO, cavity)):
        top, bottom, left, right = (round(at / spacing_mm[side // 2]) for side, at in enumerate(box))
        mask[top:bottom, left:right] = label
    return mask


@pytest.mark.parametrize("pixels", [9, 10])
@pytest.mark.parametrize("label", STRUCTURE_NAMES)
def test_a_piece_or_a_hole_counts_from_5_square_millimetres(label, pixels):
    torn, holed = np.zeros((2, 30, 30), np.uint8)
    torn[5:20, 5:25] = holed[5:20, 5:25] = label
    torn[25, 5 : 5 + pixels] = label
    holed[10, 10 : 10 + pixels] = BACKGROUND
    counts = pixels == 10  # of half a square millimetre each
    pieces = [f"the {STRUCTURE_NAMES[label]} is in 2 pieces"]
    assert implausibilities(torn, (0.25, 2.0)) == missing_but(label) + pieces * counts
    assert implausibilities(holed, (0.25, 2.0)) == missing_but(label) + [HOLES[label]] * counts


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("label", STRUCTURE_NAMES)
def test_cavity_and_wall_are_cut_off_by_any_edge_the_atrium_only_by_the_probes_and_none_a_pixel_away(label, turns):
    mask = np.zeros((30, 30), np.uint8)
    mask[:10, 10:20] = label
    cut = "the atrium reaches the probe" if label == LA else f"the {STRUCTURE_NAMES[label]} is cut off at the image's edge"
    expected = [cut] * (label != LA or turns == 0)
    assert implausibilities(np.rot90(mask, turns), (1.0, 1.0)) == missing_but(label) + expected
    assert implausibilities(np.rot90(np.roll(mask, 1, axis=0), turns), (1.0, 1.0)) == missing_but(label)


# The wall ends above the base: of the rows in the gap, those farther than 12 mm from the atrium are open on both sides.
@pytest.mark.parametrize(
    ("mm", "gap_mm", "found"), [(4.0, 12, []), (0.5, 12, []), (4.0, 16, [f"4% {OPEN}"]), (0.5, 15, [f"3% {OPEN}"])]
)
def test_the_cavity_may_be_open_within_12_mm_of_its_atrium_and_not_farther_whatever_a_pixels_size(mm, gap_mm, found):
    assert implausibilities(of_blocks((mm, mm), wall=(8, 80 - gap_mm, 28, 92)), (mm, mm)) == found


SMALL = {"cavity": (50, 80, 50, 70)}  # 6 cm2
LIMITS = [
    ({}, 2.0, []), ({}, 2.1, ["the area of the ventricle is 203.2 cm2"]),
    ({}, 2.2, ["the area of the cavity is 116.2 cm2", "the area of the ventricle is 223.0 cm2"]),
    ({}, 0.42, []), ({}, 0.41, ["the area of the ventricle is 7.7 cm2"]), ({}, 0.29, ["the area of the ventricle is 3.9 cm2"]),
    ({}, 0.28, ["the area of the cavity is 1.9 cm2", "the area of the ventricle is 3.6 cm2"]),
    ({"wall": (15, 80, 35, 85)}, 1.0, []),
    ({"wall": (16, 80, 36, 84)}, 1.0, ["the cavity takes up 78% of the ventricle"]),
    (SMALL | {"wall": (10, 80, 24, 96)}, 1.0, []),
    (SMALL | {"wall": (5, 80, 22, 98)}, 1.0, ["the cavity takes up 11% of the ventricle"]),
    (SMALL | {"wall": (30, 80, 30, 90), "atrium": (80, 118, 21, 99)}, 1.0, []),
    (SMALL | {"wall": (30, 80, 30, 90), "atrium": (80, 118, 15, 105)}, 1.0, ["the atrium is 5.7 times as large as the cavity"]),
    ({"wall": (8, 92, 28, 92), "atrium": (80, 104, 57, 64)}, 1.0, []),
    ({"wall": (8, 92, 28, 92), "atrium": (80, 104, 57, 62)}, 1.0, ["the atrium does not lie at the cavity's base"]),
    ({"atrium": (66, 104, 36, 84)}, 1.0, []),
    ({"atrium": (64, 104, 36, 84)}, 1.0, ["the atrium takes up 36% of the cavity's contour"]),
]  # fmt: skip


@pytest.mark.parametrize(("boxes", "factor", "found"), LIMITS)
def test_a_heart_within_every_limit_passes_and_one_a_little_beyond_is_named_with_its_number(boxes, factor, found):
    assert implausibilities(of_blocks((1.0, 1.0), **boxes), (factor, factor)) == found


def test_an_atrium_farther_aside_than_below_in_millimetres_lies_beside_also_where_pixels_are_oblong():
    mask = of_blocks((0.5, 1.0), wall=(8, 92, 28, 92), atrium=(80, 104, 70, 150))  # 42 mm below, 50 mm aside
    beside = "the atrium lies beside the cavity, not below it: the mask may be transposed"
    assert implausibilities(mask, (0.5, 1.0)) == [beside]
