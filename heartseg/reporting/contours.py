"""Outlines on images, as pixels and PNG bytes: contours of label maps, one-class channels."""

import io

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.colors import to_rgb

from heartseg.labels import BACKGROUND, CLASS_COLOURS, NUM_CLASSES

PALETTE = (np.array([to_rgb(colour) for colour in CLASS_COLOURS]) * 255).round().astype(np.uint8)
# The background's own colour is black, which would hide it where it is what is shown.
CHANNEL_OFF, CHANNEL_BACKGROUND = (22, 25, 30), (214, 219, 226)


def contours(mask: np.ndarray) -> np.ndarray:
    """Label map [h,w] with 0 everywhere but on the rim of each structure; the image's own edge is no rim.

    A rim pixel has one of its four neighbours in the background or in a structure of higher label: so the border of two
    structures is drawn once, in the first one's colour, and their colours do not blend into a third.
    """
    padded = np.pad(mask, 1, mode="edge")
    neighbours = np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
    on_rim = ((neighbours == BACKGROUND) | (neighbours > mask)).any(axis=0)
    return np.where(on_rim, mask, BACKGROUND)


def thicken(rims: np.ndarray) -> np.ndarray:
    """Rims [h,w] grown by a pixel to each side; where two meet, the lower label stays on top."""
    padded = np.pad(rims, 1)
    around = np.stack([rims, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
    lowest = np.where(around == BACKGROUND, NUM_CLASSES, around).min(axis=0)
    return np.where(lowest == NUM_CLASSES, BACKGROUND, lowest)


def overlay(image: np.ndarray, mask: np.ndarray, thick: bool = False) -> np.ndarray:
    """The grey image uint8 [h,w] with the contours of a label map [h,w] in the classes' colours, uint8 [h,w,3].

    A contour is one pixel wide, or three where `thick`.
    """
    rims = thicken(contours(mask)) if thick else contours(mask)
    grey = np.repeat(image[:, :, None], 3, axis=2)
    return np.where((rims != BACKGROUND)[:, :, None], PALETTE[rims], grey).astype(np.uint8)


def compare(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The grey image uint8 [h,w] with predicted contours in the classes' colours and the truth's in white, uint8 [h,w,3].

    The truth's are one pixel wide and lie on top, so that both are seen where they agree.
    """
    drawn = overlay(image, prediction, thick=True)
    return np.where((contours(truth) != BACKGROUND)[:, :, None], np.uint8(255), drawn)


def channels(mask: np.ndarray) -> list[np.ndarray]:
    """One picture uint8 [h,w,3] per class of a label map [h,w]: the class in its colour, all else nearly black."""
    colours = [CHANNEL_BACKGROUND, *PALETTE[1:]]
    return [np.where((mask == c)[:, :, None], colours[c], CHANNEL_OFF).astype(np.uint8) for c in range(NUM_CLASSES)]


def enlarge(array: np.ndarray, rows: int = 512) -> np.ndarray:
    """Repeat pixels until there are about `rows`; a contour drawn afterwards is thin beside the structure."""
    factor = max(1, round(rows / array.shape[0]))
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG of a picture uint8, [h,w] grey or [h,w,3]."""
    buffer = io.BytesIO()
    if pixels.ndim == 2:
        matplotlib.image.imsave(buffer, pixels, format="png", cmap="gray", vmin=0, vmax=255)
    else:
        matplotlib.image.imsave(buffer, pixels, format="png")
    return buffer.getvalue()
