"""Measures the chambers of a label map: area, long axis and 20 disks, in mm, of the left ventricle and the left atrium.

Everything is scale-free: no threshold is in mm, and only the smallest measurable size is in pixels. So the same
shape on another grid has the same result (up to a pixel's edge), and all lengths scale with the spacing.
"""

from dataclasses import dataclass, replace

import numpy as np

from heartseg.labels import ENDO, LA, MYO, bounding_box
from heartseg.metrics.regions import largest_component

DISKS = 20  # Lang et al. 2015, figure of the biplane method of disks
MIN_PIXELS = 30  # a smaller chamber has no shape
# Share of the square root of the cavity's area: the mitral plane is 0.37 to 0.96 of it in 40 CAMUS patients.
MIN_MITRAL_SHARE = 0.3
MIN_WALL_SHARE = 0.5  # of the cavity's rim: below it, the gap in the wall is not a mitral plane
BASAL_SHARE = 0.1  # of the cavity's extent: its lowest part


@dataclass(frozen=True, eq=False)
class Chamber:
    """A chamber in one view: area, length from mitral plane to far end, and widths [20] of its disks, from the mitral plane.

    Points are (depth, lateral) in mm, a pixel's centre being its row and column times the spacing: `hinges_mm` [2,2] are the
    ends of the mitral plane, `far_mm` [2] is the apex, or the atrium's roof, and `centres_mm` [20,2] are the disks' centres.
    """

    area_mm2: float
    length_mm: float
    widths_mm: np.ndarray
    hinges_mm: np.ndarray
    far_mm: np.ndarray
    centres_mm: np.ndarray

    def scaled(self, factor: float) -> "Chamber":
        """The same shape, `factor` times as long and as wide."""
        lengths = {name: value * factor for name, value in vars(self).items()}
        return Chamber(**lengths | {"area_mm2": self.area_mm2 * factor**2})

    def moved(self, by_mm: np.ndarray) -> "Chamber":
        """The same shape in another place."""
        points = ("hinges_mm", "far_mm", "centres_mm")
        return replace(self, **{name: getattr(self, name) + by_mm for name in points})


def _where(region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same as `np.nonzero` for a boolean [h,w], but faster."""
    return np.divmod(np.flatnonzero(region), region.shape[1])


def origin_mm(box: tuple[slice, slice], spacing_mm: tuple[float, float]) -> np.ndarray:
    """The position in mm of a box's first pixel."""
    return np.array([line.start or 0 for line in box]) * spacing_mm


def rim(part: np.ndarray, labels: np.ndarray, spacing_mm: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints [N,2] in mm of the pixel edges around a region inside the array, and the label [N] across each edge."""
    points, across, most, later = [], [], slice(None, -1), slice(1, None)
    for axis, near, far in ((0, np.s_[most, :], np.s_[later, :]), (1, np.s_[:, most], np.s_[:, later])):
        at = _where(part[near] != part[far])
        middle = np.stack(at, axis=1) * 1.0
        middle[:, axis] += 0.5
        points.append(middle)
        across.append(np.where(part[near][at], labels[far][at], labels[near][at]))
    return np.concatenate(points) * spacing_mm, np.concatenate(across)


def ends(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two outermost of some points [N,2] along their main direction."""
    direction = np.linalg.eigh(np.cov(points.T))[1][:, 1]
    along = points @ direction
    return points[along.argmin()], points[along.argmax()]


def mitral_hinges(points: np.ndarray, across: np.ndarray, area_mm2: float) -> np.ndarray:
    """The two sections [2,2] of the mitral ring, in mm, from a cavity's rim.

    Lang et al. 2015 close the contour at the mitral valve with a straight line between the opposite sections of the
    mitral ring. They are the outermost points of the first of these that is wide enough: (1) the rim that faces the atrium;
    (2) for a cavity with a wall, the rim of the lower half that does not face it, the wall's basal gap; (3) the cavity's
    lowest part along its main direction (in an apical view the apex is next to the probe). The CAMUS authors' script instead
    takes the longest stretch of the contour that is flat within 8 pixels: the same place, but it depends on the grid.
    """
    direction = np.linalg.eigh(np.cov(points.T))[1][:, 1]
    if abs(direction[0]) < 0.7:  # wider than long: the main direction is not the long axis
        direction = np.array([1.0, 0.0])
    down = direction * np.sign(direction[0])
    along = (points - points.mean(axis=0)) @ down
    atrial = points[across == LA]
    gap = points[(across != MYO) & (along > 0)]
    candidates = [atrial, gap] if (across == MYO).mean() >= MIN_WALL_SHARE else [atrial]
    for base in candidates:
        if len(base) > 2:
            one, other = ends(base)
            if np.hypot(*(one - other)) >= MIN_MITRAL_SHARE * area_mm2**0.5:
                return np.stack([one, other])
    low, high = along.min(), along.max()
    base = along > high - BASAL_SHARE * (high - low)
    sideways = np.array([-down[1], down[0]])
    aside = (points[base] - points.mean(axis=0)) @ sideways
    ends_aside = np.array([[aside.min()], [aside.max()]])
    return points.mean(axis=0) + down * np.median(along[base]) + sideways * ends_aside


def slice_chamber(part: np.ndarray, points: np.ndarray, hinges: np.ndarray, spacing_mm: tuple[float, float]) -> Chamber:
    """Slice a region into disks from the mitral plane's midpoint to its rim's most distant point (Lang et al. 2015).

    A disk's width is its slice's area divided by its height, so the slices add up to the chamber's area. Pixels beyond the
    midpoint count at their mirror image: one half of an oblique plane dips below it by as much as the other falls short.
    """
    mitral = hinges.mean(axis=0)
    distances = np.hypot(*(points - mitral).T)
    far, length_mm = points[distances.argmax()], float(distances.max())
    step = (far - mitral) / length_mm**2 * DISKS * spacing_mm
    (row, column), start = _where(part), (mitral / spacing_mm) @ step
    along = np.abs(row * step[0] + column * step[1] - start).astype(np.intp)
    disk = np.minimum(along, DISKS - 1)
    counts = np.bincount(disk, minlength=DISKS)
    areas = counts * float(np.prod(spacing_mm))
    means = (np.bincount(disk, position, DISKS) / np.maximum(counts, 1) for position in (row, column))
    centres = np.stack([*means], axis=1) * spacing_mm
    return Chamber(float(areas.sum()), length_mm, areas / (length_mm / DISKS), hinges, far, centres)


@dataclass(frozen=True, eq=False)
class Frame:
    """The measurements of one label map; a chamber that cannot be measured is replaced by a short text with the reason."""

    ventricle: Chamber | str
    atrium: Chamber | str
    wall_area_mm2: float
    atrium_area_mm2: float


def measure(mask: np.ndarray, spacing_mm: tuple[float, float]) -> Frame:
    """Measure a label map [H,W] with (depth, lateral) spacing: the largest pieces of cavity and atrium, and all of the wall."""
    box = bounding_box(mask)
    labels, pixel_mm2 = np.pad(mask[box], 1), float(np.prod(spacing_mm))
    origin = origin_mm(box, spacing_mm) - spacing_mm  # of the padded box
    ventricle, atrium = (largest_component(labels == label) for label in (ENDO, LA))
    labels = np.where((labels == LA) & ~atrium, 0, labels)  # a stray speck of atrium makes no mitral plane
    atrium_pixels, pixels = np.count_nonzero(atrium), np.count_nonzero(ventricle)
    areas_mm2 = (np.count_nonzero(labels == MYO) * pixel_mm2, atrium_pixels * pixel_mm2)
    if pixels < MIN_PIXELS:
        return Frame(_too_small("ventricle", pixels), "no mitral plane", *areas_mm2)
    points, across = rim(ventricle, labels, spacing_mm)
    hinges = mitral_hinges(points, across, pixels * pixel_mm2)
    chamber = slice_chamber(ventricle, points, hinges, spacing_mm).moved(origin)
    if atrium_pixels < MIN_PIXELS:
        return Frame(chamber, _too_small("atrium", atrium_pixels), *areas_mm2)
    roof = slice_chamber(atrium, rim(atrium, labels, spacing_mm)[0], hinges, spacing_mm).moved(origin)
    return Frame(chamber, roof, *areas_mm2)


def _too_small(name: str, pixels: int) -> str:
    return f"a left {name} of only {pixels} px" if pixels else f"no left {name}"
