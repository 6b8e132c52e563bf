"""The heart's cycle in a sequence: from the cavity's volume in each frame, which frames are end-diastole and end-systole."""

import numpy as np

# A cavity's volume changes by a few percent from one frame to the next; one that is off by more from the median of
# its neighbours is an outline that failed.
MAX_JUMP, NEIGHBOURS, SMOOTHED_OVER = 0.25, 5, 3


def implausible(volumes: np.ndarray) -> np.ndarray:
    """True for the frames [T] whose volume is missing, not positive, or far from the median of the frames around it."""
    values = np.where(np.asarray(volumes, float) > 0, volumes, np.nan)
    around = _over_windows(values, NEIGHBOURS, np.median)
    with np.errstate(invalid="ignore"):
        return ~(np.abs(values - around) <= MAX_JUMP * around)


def plausible(volumes: np.ndarray) -> np.ndarray:
    """The curve [T] without its implausible frames: NaN there."""
    return np.where(implausible(volumes), np.nan, volumes)


def smooth(volumes: np.ndarray) -> np.ndarray:
    """The curve [T] without its implausible frames (NaN there), each other one the mean over its neighbours and itself.

    Windows shrink at the ends, where a half sequence has its extremes, so that the ends stay the ends.
    """
    values = plausible(volumes)
    return np.where(np.isnan(values), np.nan, _over_windows(values, SMOOTHED_OVER, np.mean))


def find_ed_es(volumes: np.ndarray) -> tuple[int, int] | None:
    """Frames (from 0) of the largest and of the smallest volume of the smoothed curve.

    None if no two frames are plausible, or if the volume does not change: such a clip shows no beat.
    """
    curve = smooth(volumes)
    num_plausible = np.isfinite(curve).sum()
    if num_plausible < 2:
        return None
    if num_plausible == 2:
        curve = plausible(volumes)  # the mean of two frames would make them alike
    ed, es = int(np.nanargmax(curve)), int(np.nanargmin(curve))
    return (ed, es) if volumes[ed] != volumes[es] else None


def _over_windows(values: np.ndarray, width: int, take) -> np.ndarray:
    """`take` of the finite values in a window around each of [T]; NaN if there are none."""
    taken = []
    for centre in range(len(values)):
        window = values[max(0, centre - width // 2) : centre + width // 2 + 1]
        window = window[np.isfinite(window)]
        taken.append(take(window) if len(window) else np.nan)
    return np.array(taken)
