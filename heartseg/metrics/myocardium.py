"""Measures the myocardium of a label map: the endocardium's length, the wall's thickness and the epicardium's disks.

Contours run between pixels, at half the maximum of a slightly smoothed mask: the staircase of a mask's own pixel edges is up
to 1.4 times too long, depending on its direction.
"""

from dataclasses import dataclass

import numpy as np
from contourpy import contour_generator
from scipy import ndimage
from scipy.spatial import cKDTree

from heartseg.labels import ENDO, MYO, bounding_box
from heartseg.metrics.regions import largest_component
from heartseg.metrics.simpson import MIN_WALL_SHARE, Chamber, origin_mm, slice_chamber

# Standard deviation of the smoothing, as a share of the square root of the cavity's area: 1.1 mm for 30 cm2.
SMOOTHING = 0.02
MIN_SIGMA = 1.0  # pixels: less leaves the staircase
WALL_RUN = 0.03  # share of the contour: less wall is a speck on the mitral plane
COARSE_SIGMA, MARGIN = 1.2, 8  # pixels of the coarser grid on which a large mask is smoothed


@dataclass(frozen=True, eq=False)
class Myocardium:
    """The myocardium in one view; thickness NaN and epicardium None without a wall."""

    endo_length_mm: float
    thickness_mm: float
    epicardium: Chamber | None


@dataclass(frozen=True, eq=False)
class Grid:
    """A coarser grid for smoothing masks: blocks of `step` [2] pixels; `sigma` [2] is in pixels of the mask."""

    spacing_mm: np.ndarray
    sigma: np.ndarray
    step: np.ndarray

    @classmethod
    def of(cls, spacing_mm: tuple[float, float], sigma_mm: float) -> "Grid":
        """The grid for smoothing with a standard deviation in mm."""
        sigma = np.maximum(sigma_mm / np.asarray(spacing_mm), MIN_SIGMA)
        return cls(np.asarray(spacing_mm), sigma, np.maximum(np.round(sigma / COARSE_SIGMA, 6), 1).astype(int))

    def smooth(self, region: np.ndarray) -> np.ndarray:
        """A region, bool [h,w], smoothed to shares from 0 to 1, with a margin; block means, which are faster, do part of it."""
        height, width = cells = -(-np.array(region.shape) // self.step)
        fine = np.zeros(cells * self.step, np.float32)
        fine[: region.shape[0], : region.shape[1]] = region
        coarse = fine.reshape(height, self.step[0], width, self.step[1]).mean(axis=(1, 3))
        return ndimage.gaussian_filter(np.pad(coarse, MARGIN), self.sigma / self.step, truncate=3.0)

    def to_mm(self, points: np.ndarray) -> np.ndarray:
        """Positions in a smoothed array as positions in mm from the region's first pixel."""
        return ((points - MARGIN + 0.5) * self.step - 0.5) * self.spacing_mm


def contour(shares: np.ndarray) -> np.ndarray:
    """The longest contour [N,2] of a smoothed mask, at half its maximum value; closed: its first and last points are equal."""
    return max(contour_generator(z=shares).lines(shares.max() / 2), key=len)[:, ::-1]


def without_mitral_plane(ring: np.ndarray, at_wall: np.ndarray, hinges: np.ndarray) -> np.ndarray:
    """The part [M,2] of a closed contour [N,2] that runs along the wall, from hinge to hinge by way of the apex.

    It begins and ends at the first long run of wall (`at_wall` [N]) on either side of the mitral plane. A cavity without such
    a wall is cut at its `hinges` [2,2].
    """
    ring, at_wall, middle = ring[:-1], at_wall[:-1], hinges.mean(axis=0)
    start = int(np.hypot(*(ring - middle).T).argmin())
    ring, at_wall = np.roll(ring, -start, axis=0), np.roll(at_wall, -start)
    run = max(2, int(WALL_RUN * len(ring)))
    first, last = (_first_run(walked, run) for walked in (at_wall, at_wall[::-1]))
    if at_wall.mean() >= MIN_WALL_SHARE and first is not None and last is not None:
        return ring[first : len(ring) - last]
    first, last = sorted(int(np.hypot(*(ring - hinge).T).argmin()) for hinge in hinges)
    arcs = ring[first : last + 1], np.concatenate([ring[last:], ring[: first + 1]])
    return max(arcs, key=lambda arc: np.hypot(*(arc - middle).T).max())


def _first_run(values: np.ndarray, run: int) -> int | None:
    """The index of the first `run` true values in a row, or None."""
    counts = np.convolve(values, np.ones(run, int), mode="valid")
    return int(counts.argmax()) if len(counts) and counts.max() == run else None


def length(line: np.ndarray) -> float:
    """Length of a line through points [N,2]."""
    return float(np.hypot(*np.diff(line, axis=0).T).sum())


def endocardium(mask: np.ndarray, spacing_mm: tuple[float, float], ventricle: Chamber) -> np.ndarray:
    """The endocardial contour [N,2] in mm from hinge to hinge, of the ventricle that `simpson.measure` found in a label map."""
    grid = Grid.of(spacing_mm, SMOOTHING * ventricle.area_mm2**0.5)
    box = bounding_box(mask == ENDO, tuple(int(3 * sigma) + 2 for sigma in grid.sigma))  # and the wall that smoothing reaches
    ring = contour(grid.smooth(largest_component(mask[box] == ENDO)))
    at, known = np.arange(0, len(ring) - 1 + 1e-9, 1 / grid.step.max()), np.arange(len(ring))
    ring = np.stack([np.interp(at, known, ring[:, axis]) for axis in (0, 1)], axis=1)  # a point per pixel again
    # On the contour, half of the neighbourhood is cavity: above a quarter, wall is most of the other half.
    at_wall = ndimage.map_coordinates(grid.smooth(mask[box] == MYO), ring.T, order=1) > 0.25
    return without_mitral_plane(grid.to_mm(ring) + origin_mm(box, spacing_mm), at_wall, ventricle.hinges_mm)


def measure_myocardium(mask: np.ndarray, spacing_mm: tuple[float, float], ventricle: Chamber) -> Myocardium:
    """Measure the myocardium around the ventricle that `simpson.measure` found in a label map [H,W].

    The thickness is the median distance from the endocardium to the epicardium. The epicardium's disks, of cavity and wall
    together, begin at the same mitral plane.
    """
    inner, is_wall = endocardium(mask, spacing_mm, ventricle), mask == MYO
    if not is_wall.any():
        return Myocardium(length(inner), float("nan"), None)
    box = bounding_box((mask == ENDO) | is_wall)
    whole, origin = largest_component((mask[box] == ENDO) | is_wall[box]), origin_mm(box, spacing_mm)
    grid = Grid.of(spacing_mm, SMOOTHING * ventricle.area_mm2**0.5)
    outer = grid.to_mm(contour(grid.smooth(whole)))
    epicardium = slice_chamber(whole, outer, ventricle.hinges_mm - origin, spacing_mm).moved(origin)
    thickness_mm = float(np.median(cKDTree(outer + origin).query(inner)[0]))
    return Myocardium(length(inner), thickness_mm, epicardium)
