"""Finds end-diastole and end-systole in a sequence from the cavity's volume in each frame."""

from collections.abc import Callable

import numpy as np

# A volume changes by a few percent from frame to frame; one farther from its neighbours' median has a failed outline.
MAX_JUMP, NEIGHBOURS, SMOOTHED_OVER = 0.25, 5, 3


def plausible(volumes: np.ndarray) -> np.ndarray:
    """The curve [T]; NaN where a volume is missing, not positive, or far from the median of the frames around it."""
    values = np.where(np.asarray(volumes, float) > 0, volumes, np.nan)
    around = _over_windows(np.median, values, NEIGHBOURS)
    return np.where(np.abs(values - around) <= MAX_JUMP * around, values, np.nan)


def find_ed_es(volumes: np.ndarray) -> tuple[int, int] | None:
    """ED and ES: the frames (from 0) of largest and smallest smoothed volume; None without two plausible, different volumes."""
    curve = plausible(volumes)
    num_plausible = np.isfinite(curve).sum()
    if num_plausible < 2:
        return None
    if num_plausible > 2:  # the mean of two frames would make them alike
        curve = smooth(curve)
    ed, es = int(np.nanargmax(curve)), int(np.nanargmin(curve))
    return (ed, es) if volumes[ed] != volumes[es] else None


def smooth(curve: np.ndarray) -> np.ndarray:
    """The mean of each frame and its two neighbours [T], without NaN; frames that are NaN stay so."""
    return np.where(np.isnan(curve), np.nan, _over_windows(np.mean, curve, SMOOTHED_OVER))


def strain_curve(lengths: np.ndarray, volumes: np.ndarray, ed: int) -> np.ndarray:
    """Longitudinal strain in percent [T]: the change of the endocardial contour's smoothed length since frame `ed` (from 0).

    The strain of `endo_strain` (Voigt et al. 2015); NaN where the volume is not plausible.
    """
    smoothed = smooth(np.where(np.isnan(plausible(volumes)), np.nan, lengths))
    return 100 * (smoothed / smoothed[ed] - 1)


def _over_windows(take: Callable, values: np.ndarray, width: int) -> np.ndarray:
    """Apply `take` to a window around each value [T], without NaN; windows shrink at the ends, which keeps extremes there."""
    around = (values[max(0, at - width // 2) : at + width // 2 + 1] for at in range(len(values)))
    windows = (window[np.isfinite(window)] for window in around)
    return np.array([take(window) if len(window) else np.nan for window in windows])
