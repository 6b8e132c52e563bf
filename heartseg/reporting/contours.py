"""Outlines of label maps on echocardiograms, as arrays of palette positions (greys and class colours) and as PNGs."""

import io

import numpy as np
from PIL import Image, ImageColor

from heartseg.labels import BACKGROUND, CLASS_COLOURS, NUM_CLASSES, bounding_box

GREYS = 256 - NUM_CLASSES  # the palette's last positions are the classes' colours
PALETTE = np.vstack(
    [np.linspace(0, 255, GREYS).round().repeat(3).reshape(GREYS, 3), [ImageColor.getrgb(colour) for colour in CLASS_COLOURS]]
).astype(np.uint8)
ROWS = 512
# The background's own colour is black, which would hide it in its own channel.
CHANNEL_OFF, CHANNEL_BACKGROUND = 24, 215


def contours(mask: np.ndarray) -> np.ndarray:
    """Label map [h,w] with 0 everywhere except on the rim of each structure; the image's edge is not a rim."""
    # A neighbour in the background or with a higher label makes a rim, so the border of two structures is drawn once.
    padded = np.pad(mask, 1, mode="edge")
    neighbours = np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
    on_rim = ((neighbours == BACKGROUND) | (neighbours > mask)).any(axis=0)
    return np.where(on_rim, mask, BACKGROUND)


def thicken(rims: np.ndarray) -> np.ndarray:
    """Rims [h,w] grown by a pixel on each side; where two meet, the lower label is on top."""
    padded = np.pad(rims, 1)
    around = np.stack([rims, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
    lowest = np.where(around == BACKGROUND, NUM_CLASSES, around).min(axis=0)
    return np.where(lowest == NUM_CLASSES, BACKGROUND, lowest)


def overlay(
    image: np.ndarray, mask: np.ndarray, spacing_mm: tuple[float, float] | None = None, rows: int = ROWS,
    truth: np.ndarray | None = None, grey_step: int = 1,
) -> np.ndarray:  # fmt: skip
    """Palette positions uint8 [rows,w] of an image uint8 [H,W] with the contours of a label map [H,W] in the classes' colours.

    `spacing_mm` makes pixels square; contours of `truth` are white, thinner and on top; greys are multiples of `grey_step`.
    """
    width = overlay_width(image.shape, spacing_mm, rows)
    grey = np.asarray(Image.fromarray(image).resize((width, rows), Image.Resampling.BILINEAR))
    labels = resize_labels(mask, *grey.shape)
    rims, near = np.zeros_like(labels), bounding_box(labels, (2, 2))
    rims[near] = thicken(contours(labels[near])) if labels.any() else 0  # only near the structures, which is faster
    picture = np.where(rims == BACKGROUND, grey_positions(grey // grey_step * grey_step), rims + np.uint8(GREYS))
    if truth is not None:
        picture = np.where(contours(resize_labels(truth, *grey.shape)) != BACKGROUND, GREYS - 1, picture)
    return picture.astype(np.uint8)


def overlay_width(shape: tuple[int, int], spacing_mm: tuple[float, float] | None, rows: int) -> int:
    """Columns of an overlay with `rows` rows and square pixels, of an image of this shape."""
    depth_mm, lateral_mm = spacing_mm or (1.0, 1.0)
    return max(64, round(rows * shape[1] * lateral_mm / (shape[0] * depth_mm)))


def resize_labels(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Labels on another grid: each class is resampled as a share and the largest wins, so that rims are not jagged."""
    best, labels = np.full((rows, columns), 126, np.uint8), np.zeros((rows, columns), np.uint8)
    for label in np.unique(mask[mask != BACKGROUND]):
        share = Image.fromarray((mask == label).astype(np.uint8) * 255)
        share = np.asarray(share.resize((columns, rows), Image.Resampling.BILINEAR))
        labels, best = np.where(share > best, label, labels), np.maximum(share, best)
    return labels


def grey_positions(grey: np.ndarray) -> np.ndarray:
    """Greys of 0 to 255 as palette positions."""
    return (grey.astype(np.uint16) * (GREYS - 1) // 255).astype(np.uint8)


def channels(mask: np.ndarray) -> list[np.ndarray]:
    """One picture of palette positions [h,w] per class of a label map [h,w]: the class in its colour, the rest nearly black."""
    shades = [CHANNEL_BACKGROUND, *range(GREYS + 1, 256)]
    return [np.where(mask == label, shade, CHANNEL_OFF).astype(np.uint8) for label, shade in enumerate(shades)]


def as_image(positions: np.ndarray) -> Image.Image:
    """Palette positions [h,w] as a Pillow image."""
    image = Image.frombytes("P", positions.shape[::-1], positions.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


def encode_png(positions: np.ndarray) -> bytes:
    """PNG of palette positions; lightly compressed, since time matters more than size."""
    buffer = io.BytesIO()
    as_image(positions).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
