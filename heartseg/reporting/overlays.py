"""Outlines drawn on echocardiograms for people to look at: a PNG of a still, an animated GIF of a sequence.

Pictures are palettes of greys and the classes' colours, a byte a pixel: small files, exact colours, quick to write.
"""

import functools
import io
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from heartseg.datasets.readers import Frames
from heartseg.inference.study_files import Clip, output
from heartseg.labels import BACKGROUND, NUM_CLASSES
from heartseg.reporting.contours import PALETTE, contours, thicken
from heartseg.storage import filesystem

GREYS = 256 - NUM_CLASSES  # the palette's last positions are the classes' colours
ROWS, GIF_ROWS, STRIP_ROWS = 512, 400, 30
GIF_GREY_STEP = 6  # 42 greys are enough for a moving picture, and halve its size
STRIP_NAMES = ((1, "cavity"), (2, "wall"), (3, "atrium"))
# At 12 frames a second a beat is slowed about fourfold, which the eye can follow; longer loops leave out frames.
FRAME_MS, MAX_GIF_FRAMES = 80, 60


def outlined(
    image: np.ndarray, mask: np.ndarray, spacing_mm: tuple[float, float] | None, caption: str, moving: bool = False
) -> np.ndarray:
    """Palette positions uint8 of the image [H,W] with its mask's contours, pixels made square, over a strip that names them.

    The picture has ROWS rows and the strip's, fewer and fewer greys where it is one of a `moving` one's; without
    `spacing_mm` (depth, lateral), pixels are taken as square.
    """
    height = GIF_ROWS if moving else ROWS
    grey = squared(image, spacing_mm, height)
    width = grey.shape[1]
    rims = rims_of(enlarge_mask(mask, height, width))
    if moving:
        grey = grey // GIF_GREY_STEP * GIF_GREY_STEP
    picture = np.where(rims == BACKGROUND, darken(grey), rims + np.uint8(GREYS)).astype(np.uint8)
    return np.vstack([picture, strip(width, caption)])


def compared(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, spacing_mm: tuple[float, float] | None, height: int = ROWS
) -> np.ndarray:
    """Palette positions uint8 [height,w] of an image [H,W], pixels made square, with a prediction's and the truth's contours.

    The prediction's are in the classes' colours; the truth's are white, thinner and on top, so that both are seen.
    """
    grey = squared(image, spacing_mm, height)
    found, true = (enlarge_mask(mask, *grey.shape) for mask in (prediction, truth))
    rims = rims_of(found)
    picture = np.where(rims == BACKGROUND, darken(grey), rims + np.uint8(GREYS))
    return np.where(contours(true) != BACKGROUND, GREYS - 1, picture).astype(np.uint8)


def squared(image: np.ndarray, spacing_mm: tuple[float, float] | None, height: int) -> np.ndarray:
    """The image uint8 [H,W] on `height` rows of square pixels; pixels are square where `spacing_mm` is not known."""
    depth_mm, lateral_mm = spacing_mm or (1.0, 1.0)
    rows, columns = image.shape
    width = max(64, round(height * columns * lateral_mm / (rows * depth_mm)))
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def rims_of(mask: np.ndarray) -> np.ndarray:
    """Contours three pixels wide [h,w], looked for only around the structures."""
    rims = np.zeros_like(mask)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if len(rows):
        near = tuple(slice(max(0, at[0] - 2), at[-1] + 3) for at in (rows, columns))
        rims[near] = thicken(contours(mask[near]))
    return rims


def darken(grey: np.ndarray) -> np.ndarray:
    """Grey of 0 to 255 as one of the palette's greys."""
    return (grey.astype(np.uint16) * (GREYS - 1) // 255).astype(np.uint8)


def enlarge_mask(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Labels on another grid, each class resampled as a share of 0 to 1 and the largest taken: no staircase along the rims."""
    best, labels = np.full((rows, columns), 126, np.uint8), np.zeros((rows, columns), np.uint8)
    for label in np.unique(mask):
        if label != BACKGROUND:
            share = Image.fromarray((mask == label).astype(np.uint8) * 255).resize((columns, rows), Image.Resampling.BILINEAR)
            share = np.asarray(share)
            labels, best = np.where(share > best, label, labels), np.maximum(share, best)
    return labels


@functools.lru_cache(maxsize=256)
def strip(width: int, caption: str) -> np.ndarray:
    """Palette positions uint8 [STRIP_ROWS,width]: the classes' names beside their colours, and the caption at the right."""
    ink, middle = Image.new("L", (width, STRIP_ROWS)), STRIP_ROWS // 2
    draw, font = ImageDraw.Draw(ink), ImageFont.load_default(size=14)
    needed = sum(30 + draw.textlength(name, font=font) for _, name in STRIP_NAMES) + draw.textlength(caption, font=font)
    squares, left = [], 8
    for label, name in STRIP_NAMES if needed + 8 <= width else ():
        squares.append((label, left))
        draw.text((left + 16, middle), name, fill=215, font=font, anchor="lm")
        left += 30 + int(draw.textlength(name, font=font))
    draw.text((width - 8, middle), caption, fill=255, font=font, anchor="rm")
    positions = darken(np.asarray(ink)).copy()
    for label, left in squares:
        positions[middle - 5 : middle + 6, left : left + 11] = GREYS + label
    return positions


def _as_image(positions: np.ndarray) -> Image.Image:
    image = Image.frombytes("P", positions.shape[::-1], positions.tobytes())
    greys = np.repeat(np.linspace(0, 255, GREYS).round().astype(np.uint8)[:, None], 3, axis=1)
    image.putpalette(np.vstack([greys, PALETTE]).tobytes())
    return image


def encode_png(positions: np.ndarray) -> bytes:
    """PNG of palette positions; lightly packed, for the time it takes counts more than its size."""
    buffer = io.BytesIO()
    _as_image(positions).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def encode_gif(pictures: list[np.ndarray]) -> bytes:
    """Endless GIF of pictures of palette positions, all of one size."""
    buffer = io.BytesIO()
    first, *others = [_as_image(positions) for positions in pictures]
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=FRAME_MS, loop=0, optimize=False, disposal=1)
    return buffer.getvalue()


def shown_frames(count: int, always: Iterable[int] = ()) -> list[int]:
    """The frames of a sequence that a GIF shows: every second, third … where they are over MAX_GIF_FRAMES, and `always`."""
    return sorted({*range(0, count, -(-count // MAX_GIF_FRAMES)), *always})


def write_overlays(out: str, clip: Clip, frames: Frames, masks: np.ndarray, marked: Mapping[int, str]) -> None:
    """A PNG of a still, an animated GIF of a sequence; `marked` names frames (from 0), as ED and ES are."""
    count = len(masks)
    view = f"{clip.view} " if clip.view else ""
    if count == 1:
        picture = outlined(frames.pixels[0], masks[0], frames.spacing_mm, f"{view}{clip.phase or ''}".strip())
        filesystem.publish(output(out, clip, "_overlay.png"), encode_png(picture))
        return
    pictures = []
    for index in shown_frames(count, always=marked):
        caption = f"{marked.get(index, '')}  {view}{index + 1:>{len(str(count))}}/{count}".strip()
        pictures.append(outlined(frames.pixels[index], masks[index], frames.spacing_mm, caption, moving=True))
    filesystem.publish(output(out, clip, "_overlay.gif"), encode_gif(pictures))
