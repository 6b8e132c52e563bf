"""Cleans up a predicted mask: removes stray pieces and closes small holes."""

import numpy as np
from scipy import ndimage

from heartseg.config.experiment import PredictConfig
from heartseg.labels import BACKGROUND, ENDO, LA
from heartseg.metrics.anatomy_checks import STRUCTURE_NAMES
from heartseg.metrics.regions import enclosed_holes, largest_component

# A larger hole, as a share of the whole heart, is a missed structure, not a flaw to repair.
LARGEST_HOLE = 0.10


def clean(mask: np.ndarray, options: PredictConfig) -> np.ndarray:
    """The mask uint8 [H,W], postprocessed as `options` ask: stray pieces first, so that the holes they leave are closed too."""
    if options.largest_component:
        mask = largest_components(mask)
    return fill_holes(mask) if options.fill_holes else mask


def largest_components(mask: np.ndarray) -> np.ndarray:
    """The mask [H,W] with only the largest connected piece of cavity, wall and atrium; the others become background."""
    kept = np.full_like(mask, BACKGROUND)
    for label in STRUCTURE_NAMES:
        kept[largest_component(mask == label)] = label
    return kept


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask [H,W] without holes up to LARGEST_HOLE of the heart.

    Pixels that the cavity or the atrium encloses become theirs, whatever their label. Enclosed background, in the wall or
    between structures, takes the label of the nearest structure.
    """
    filled, largest = mask.copy(), LARGEST_HOLE * np.count_nonzero(mask)
    for label in (ENDO, LA):
        filled[enclosed_holes(filled == label, largest)] = label
    gaps = enclosed_holes(filled != BACKGROUND, largest)
    if gaps.any():
        empty = filled == BACKGROUND
        nearest = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
        filled[gaps] = filled[tuple(nearest[:, gaps])]
    return filled
