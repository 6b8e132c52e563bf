"""Connected pieces and enclosed holes of a region, under one definition for cleaning, checking and measuring.

Pixels of a region are neighbours across edges and corners, pixels outside it across edges only, so that a diagonal line
either connects or separates, never both.
"""

import numpy as np
from scipy import ndimage

CORNERS_TOO = np.ones((3, 3), bool)


def connected_components(region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected pieces of a region, int [H,W] numbered from 1, and each piece's number of pixels."""
    pieces, _ = ndimage.label(region, CORNERS_TOO)
    return pieces, np.bincount(pieces.ravel())[1:]


def largest_component(region: np.ndarray) -> np.ndarray:
    """The largest connected piece of a region, bool [H,W] (the first of ties); an empty region is returned unchanged."""
    pieces, sizes = connected_components(region)
    return pieces == 1 + sizes.argmax() if len(sizes) > 1 else region


def enclosed_holes(region: np.ndarray, largest: float = np.inf) -> np.ndarray:
    """The pixels, bool [H,W], of holes of at most `largest` pixels that a region encloses."""
    pieces, _ = ndimage.label(~region)
    sizes = np.bincount(pieces.ravel())
    enclosed = sizes <= largest
    enclosed[0] = False
    enclosed[np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])] = False
    return enclosed[pieces]
