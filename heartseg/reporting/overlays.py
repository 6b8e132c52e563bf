"""The overlays of predict: a PNG of a still or an animated GIF of a sequence, with a strip below that names the colours."""

import functools
import io
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from heartseg.datasets.readers import Frames
from heartseg.inference.study_files import Clip, output
from heartseg.reporting.contours import GREYS, ROWS, as_image, encode_png, grey_positions, overlay
from heartseg.storage import filesystem

GIF_ROWS, STRIP_ROWS = 400, 30
GIF_GREY_STEP = 6  # 42 greys are enough for a moving picture, and halve its size
STRIP_NAMES = ((1, "cavity"), (2, "wall"), (3, "atrium"))
# At 12 frames a second a beat is slowed about fourfold, which the eye can follow; longer loops leave out frames.
FRAME_MS, MAX_GIF_FRAMES = 80, 60


def outlined(
    image: np.ndarray, mask: np.ndarray, spacing_mm: tuple[float, float] | None, caption: str, moving: bool = False
) -> np.ndarray:
    """The `overlay` of an image [H,W] above its strip; a `moving` picture has fewer rows and greys."""
    rows, grey_step = (GIF_ROWS, GIF_GREY_STEP) if moving else (ROWS, 1)
    picture = overlay(image, mask, spacing_mm, rows, grey_step=grey_step)
    return np.vstack([picture, strip(picture.shape[1], caption)])


@functools.lru_cache(maxsize=256)
def strip(width: int, caption: str) -> np.ndarray:
    """Palette positions uint8 [STRIP_ROWS,width]: the classes' names beside their colours, and the caption at the right."""
    ink, middle = Image.new("L", (width, STRIP_ROWS)), STRIP_ROWS // 2
    draw, font = ImageDraw.Draw(ink), ImageFont.load_default(size=14)
    needed = sum(30 + draw.textlength(name, font=font) for _, name in STRIP_NAMES) + draw.textlength(caption, font=font)
    squares, left = {}, 8
    for label, name in STRIP_NAMES if needed + 8 <= width else ():
        squares[label] = left
        draw.text((left + 16, middle), name, fill=215, font=font, anchor="lm")
        left += 30 + int(draw.textlength(name, font=font))
    draw.text((width - 8, middle), caption, fill=255, font=font, anchor="rm")
    positions = grey_positions(np.asarray(ink))
    for label, left in squares.items():
        positions[middle - 5 : middle + 6, left : left + 11] = GREYS + label
    return positions


def encode_gif(pictures: list[np.ndarray]) -> bytes:
    """A looping GIF of pictures of palette positions, all of the same size."""
    buffer = io.BytesIO()
    first, *others = [as_image(positions) for positions in pictures]
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=FRAME_MS, loop=0, optimize=False, disposal=1)
    return buffer.getvalue()


def shown_frames(count: int, always: Iterable[int] = ()) -> list[int]:
    """A sequence's frames in its GIF: all, or every second, third … one if over MAX_GIF_FRAMES, and those of `always`."""
    return sorted({*range(0, count, -(-count // MAX_GIF_FRAMES)), *always})


def write_overlays(out: str, clip: Clip, frames: Frames, masks: np.ndarray, marked: Mapping[int, str]) -> None:
    """Write a still's PNG or a sequence's animated GIF; `marked` maps frames (from 0) to captions, such as ED and ES."""
    count, view = len(masks), f"{clip.view} " if clip.view else ""
    if count == 1:
        picture = outlined(frames.pixels[0], masks[0], frames.spacing_mm, f"{view}{clip.phase or ''}".strip())
        filesystem.publish(output(out, clip, "_overlay.png"), encode_png(picture))
        return
    pictures = {}
    for index in shown_frames(count, always=marked):
        caption = f"{marked.get(index, '')}  {view}{index + 1:>{len(str(count))}}/{count}".strip()
        pictures[index] = outlined(frames.pixels[index], masks[index], frames.spacing_mm, caption, moving=True)
    filesystem.publish(output(out, clip, "_overlay.gif"), encode_gif([*pictures.values()]))
    if marked:  # for the page of studies, which shows ED and ES side by side, and a film that can be paused
        filesystem.publish(output(out, clip, "_phases.png"), encode_png(np.hstack([pictures[index] for index in marked])))
        film = [pictures[index] for index in film_frames(count, always=marked)]
        filesystem.publish(output(out, clip, "_film.jpg"), encode_film(film))


def film_frames(count: int, always: Iterable[int] = ()) -> list[int]:
    """The frames of a sequence in its film, half of what a GIF shows."""
    shown = shown_frames(count, always)
    return sorted({*shown[::2], *always})


def encode_film(pictures: list[np.ndarray]) -> bytes:
    """Pictures of palette positions side by side, at half their size, as a JPEG."""
    buffer = io.BytesIO()
    height, width = pictures[0].shape
    halves = [np.asarray(as_image(one).convert("RGB").resize((width // 2, height // 2))) for one in pictures]
    Image.fromarray(np.hstack(halves)).save(buffer, format="JPEG", quality=80, subsampling=0)
    return buffer.getvalue()


def rows_of(num_frames: int) -> int:
    """Rows of an overlay's picture above its strip."""
    return ROWS if num_frames == 1 else GIF_ROWS
