"""Converts grey values of any type to 8 bits by one rule, so that training, evaluation and prediction see the same picture."""

import numpy as np

BYTE = (0, 255)
UNSIGNED = (BYTE, (0, 4095), (0, 65535))
SIGNED = ((-128, 127), (-2048, 2047), (-32768, 32767))


class Unreadable(ValueError):
    """The bytes are not a usable image; the message is our own and quotes no text from the file."""


def as_grey(values: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """A copy of a whole file's values as uint8, and the range that was scaled to 0 to 255.

    Bytes are unchanged; other values use the first range that holds them all: 8, 12 or 16 bits, unsigned or signed, and for
    fractions 0 to 1, -1 to 1, or percent. Raises Unreadable if no range fits, or if several might.
    """
    if values.dtype == np.uint8:
        return values.copy(order="C"), BYTE
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Unreadable("it has pixels that are not finite")
    if (found := find_range(values, low, high)) is None:
        raise Unreadable(f"its grey levels, {low:g} to {high:g}, fit no known range: store 0 to 255, or fractions from 0 to 1")
    if found == BYTE:
        return np.rint(values).astype(np.uint8, order="C"), BYTE
    first, last = found
    scaled = (values.astype(np.float32) - first) * (255 / (last - first))
    return np.rint(scaled).clip(0, 255).astype(np.uint8, order="C"), found


def describe(levels: tuple[int, int]) -> str:
    """A range of grey levels and the factor that scaled it to 0 to 255, as the manifest shows them."""
    return f"{levels[0]} to {levels[1]}, times {255 / (levels[1] - levels[0]):.4g}"


def find_range(values: np.ndarray, low: float, high: float) -> tuple[int, int] | None:
    """The range of grey levels that contains the values from `low` to `high`; None if it is unknown or ambiguous."""
    if low >= 0 and high > 100.5:
        return next((each for each in UNSIGNED if high < each[1] + 0.5), None)
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        if low > -1e-3 and (high < 1.001 or abs(high - 100) < 0.1):
            return (0, 1) if high < 1.001 else (0, 100)
        # Most of an echocardiogram is black, so a signed image reaches the lower end of its range.
        return (-1, 1) if -1.001 < low < -0.9 and high < 1.001 else None
    if low < 0:
        return next((each for each in SIGNED if each[0] <= low < 0.9 * each[0] and high <= each[1]), None)
    return BYTE if 1 < high < 100 else None  # 0 and 1 alone are not an image, and values up to 100 may be percent
