"""Anatomical checks: the reasons, in words, why a mask cannot be a whole left heart.

They follow the idea of Painchaud et al. 2020, "Cardiac Segmentation With Strong Anatomical Guarantees", IEEE Trans.
Med. Imaging 39(11). Their limits were set on 1,800 expert masks of CAMUS, with some margin.
"""

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from heartseg.errors import require
from heartseg.labels import BACKGROUND, ENDO, LA, MYO, bounding_box
from heartseg.metrics.regions import connected_components, enclosed_holes

STRUCTURE_NAMES = {ENDO: "cavity", MYO: "myocardium", LA: "atrium"}
# Pieces and holes smaller than this change no measurement.
SPECK_MM2 = 5.0
# Shares of the cavity's contour: in experts' masks, up to 1 % is open and 7 to 24 % faces the atrium. Within BASE_MM of the
# atrium it may be open, since wall, valve and atrium do not always meet there.
BASE_MM = 12.0
MOST_OPEN, LEAST_BASE, MOST_BASE = 0.025, 0.03, 0.35
# Areas in cm2; experts' masks have 3.4 to 75 and 9.7 to 132, measured on a copy whose spacing is nominal.
CAVITY_CM2, VENTRICLE_CM2 = (2.0, 110.0), (8.0, 190.0)
# The cavity's share of the ventricle (experts: 0.13 to 0.68) and the atrium's size in cavities (experts: up to 3.8).
CAVITY_SHARE, MOST_ATRIUM = (0.11, 0.75), 5.0


def implausibilities(mask: np.ndarray, spacing_mm: tuple[float, float]) -> list[str]:
    """Why an upright mask uint8 [H,W] with (depth, lateral) spacing cannot be a left heart; raises UserError if that is bad."""
    is_valid = all(0 < mm < np.inf for mm in spacing_mm)
    require(is_valid, f"The pixel spacing {spacing_mm} mm is not valid: give (depth, lateral), both above 0.")
    missing = [f"the {name} is missing" for label, name in STRUCTURE_NAMES.items() if not (mask == label).any()]
    if not mask.any():
        return missing
    cut = [*_cut(mask)]
    mask = mask[bounding_box(mask, (1, 1))]  # every structure and, where the image has one, a line of background around them
    found = missing + [*_torn(mask, SPECK_MM2 / (spacing_mm[0] * spacing_mm[1])), *cut]
    # The other checks compare the positions and sizes of the three structures.
    return found if missing else found + [*_misplaced(mask, spacing_mm), *_out_of_proportion(mask, spacing_mm)]


def _torn(mask: np.ndarray, speck: float) -> Iterator[str]:
    """Pieces and holes of at least `speck` pixels, each structure checked in its own box."""
    found = zip(STRUCTURE_NAMES, ndimage.find_objects(mask, max(STRUCTURE_NAMES)), strict=True)
    boxes = {label: box for label, box in found if box}
    for label, box in boxes.items():
        pieces = np.count_nonzero(connected_components(mask[box] == label)[1] >= speck)
        if pieces > 1:
            yield f"the {STRUCTURE_NAMES[label]} is in {pieces} pieces"
    gaps = enclosed_holes(mask != BACKGROUND)
    for label in (ENDO, LA):
        if label in boxes:
            holes = enclosed_holes(mask[boxes[label]] == label)
            gaps[boxes[label]] &= ~holes
            if np.count_nonzero(holes) >= speck:
                yield f"the {STRUCTURE_NAMES[label]} has a hole"
    if np.count_nonzero(gaps) >= speck:
        yield "there is a hole in the myocardium, or between the structures"


def _cut(mask: np.ndarray) -> Iterator[str]:
    """Structures that continue outside the image; an atrium at its lower edge is common and harmless."""
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    for label in (ENDO, MYO):
        if (edge == label).any():
            yield f"the {STRUCTURE_NAMES[label]} is cut off at the image's edge"
    if (mask[0] == LA).any():
        yield "the atrium reaches the probe"


def contact_mm(mask: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """Length in mm, symmetric float64 [4,4], of the pixel edges that two labels share."""
    row_mm, column_mm = spacing_mm
    contact = np.zeros((4, 4))
    for one, other, edge_mm in ((mask[1:], mask[:-1], column_mm), (mask[:, 1:], mask[:, :-1], row_mm)):
        pairs = np.bincount(one.ravel().astype(np.intp) * 4 + other.ravel(), minlength=16).reshape(4, 4)
        contact += edge_mm * (pairs + pairs.T)
    return contact


def _contour_share(mask: np.ndarray, label: int, spacing_mm: tuple[float, float]) -> float:
    """The share of the cavity's contour, excluding the image's edge, that faces a label."""
    contour = contact_mm(mask, spacing_mm)[ENDO]
    return contour[label] / max(contour[[BACKGROUND, MYO, LA]].sum(), 1e-9)


def _misplaced(mask: np.ndarray, spacing_mm: tuple[float, float]) -> Iterator[str]:
    """Misplacements: the wall should surround the cavity except at its base, the atrium lie below, and the apex point up."""
    cavity = bounding_box(mask == ENDO, (1, 1))  # with its neighbours: a contour lies between two pixels
    closed, atrium = mask.copy(), bounding_box(mask == LA, tuple(int(BASE_MM / mm) + 1 for mm in spacing_mm))
    at_base = ndimage.distance_transform_edt(mask[atrium] != LA, sampling=spacing_mm) <= BASE_MM
    closed[atrium][at_base & (mask[atrium] == BACKGROUND)] = LA
    mask, closed, whole = mask[cavity], closed[cavity], mask
    opened, base = _contour_share(closed, BACKGROUND, spacing_mm), _contour_share(mask, LA, spacing_mm)
    if opened > MOST_OPEN:
        yield f"{opened:.0%} of the cavity's contour has neither myocardium nor atrium beside it"
    if base < LEAST_BASE:
        yield "the atrium does not lie at the cavity's base"
    elif base > MOST_BASE:
        yield f"the atrium takes up {base:.0%} of the cavity's contour"
    # In experts' masks, the line between the two centres is at most 44 degrees off the vertical.
    down_mm, aside_mm = (_centre(whole == LA) - _centre(whole == ENDO)) * spacing_mm
    if abs(aside_mm) > abs(down_mm):
        yield "the atrium lies beside the cavity, not below it: the mask may be transposed"
    elif down_mm < 0:
        yield "the atrium lies above the cavity"


def _centre(region: np.ndarray) -> np.ndarray:
    """Mean row and column of a region, from counts per line, which is faster than from pixel positions."""
    counts = (np.count_nonzero(region, axis=axis) for axis in (1, 0))
    return np.array([np.average(np.arange(len(count)), weights=count) for count in counts])


def _out_of_proportion(mask: np.ndarray, spacing_mm: tuple[float, float]) -> Iterator[str]:
    """Areas and proportions that no heart has."""
    _, cavity, wall, atrium = np.bincount(mask.ravel(), minlength=4) * spacing_mm[0] * spacing_mm[1] / 100
    for name, area, (low, high) in (("cavity", cavity, CAVITY_CM2), ("ventricle", cavity + wall, VENTRICLE_CM2)):
        if not low <= area <= high:
            yield f"the area of the {name} is {area:.1f} cm2"
    share = cavity / (cavity + wall)
    if not CAVITY_SHARE[0] <= share <= CAVITY_SHARE[1]:
        yield f"the cavity takes up {share:.0%} of the ventricle"
    if atrium > MOST_ATRIUM * cavity:
        yield f"the atrium is {atrium / cavity:.1f} times as large as the cavity"
