"""Reads files as upright grey frames: NIfTI, PNG and, with `pip install heartseg[formats]`, DICOM (dicom.py) and video.

The only file that imports PyAV. No message quotes the text of a tag.
"""

import errno
import importlib
import io
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from heartseg.datasets import nifti
from heartseg.datasets.grey import BYTE, Unreadable, as_grey
from heartseg.datasets.nifti import DamagedRecording
from heartseg.errors import UserError
from heartseg.storage import filesystem

Admit = Callable[[int], None]
Spacing = tuple[float, float]  # depth and lateral size of a pixel in mm
KINDS = {".nii": "nifti", ".nii.gz": "nifti", ".dcm": "dicom", ".dicom": "dicom", ".png": "picture"}
KINDS |= dict.fromkeys((".avi", ".mp4", ".mov", ".m4v"), "video")
PACKAGES = {"dicom": "pydicom", "video": "av"}
MAX_PIXELS = 2**31  # per file: two minutes of a large video; more is a whole examination, or a damaged header
MAX_FILE_BYTES = 2**33
PLAUSIBLE_DEPTH_MM = (30, 400)  # a spacing that implies another was not measured (headers default to 1 mm)
FRAME_MS = (1, 200)  # of an echocardiogram; many headers claim a second per frame
NO_PICTURE = "it holds no image: reports and measurements have none"
# A DICOM file without a preamble starts with an element of group 2 or 8, then its type or the length of its value.
BARE_DICOM = re.compile(rb"[\x02\x08]\0[\0-\x7f]\0(?:[A-Z]{2}|[\0-\x80]\0\0\0)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of a file: uint8 [T,H,W], upright (row = depth), and (depth, lateral) `spacing_mm` or None.

    `box` is (top, left, height, width): the frames were cropped at (top, left) from whole images of that height and width.
    `flips` are the axes that were reversed, `grey` is the range scaled to 0 to 255, `may_show_text` warns of burned-in names,
    `frame_ms` is the time between frames, if the file records it; a video records only how fast it plays.
    """

    pixels: np.ndarray
    spacing_mm: Spacing | None
    place: nifti.Place | None = None
    box: tuple[int, int, int, int] | None = None
    flips: tuple[int, ...] = ()
    grey: tuple[int, int] = BYTE
    notes: tuple[str, ...] = ()
    may_show_text: bool = False
    frame_ms: float | None = None


def kind_of(path: str) -> str | None:
    """`nifti`, `dicom`, `video` or `picture`; None if the file is none of these. DICOM files may have any name."""
    name = filesystem.last_part(path).lower()
    if known := [kind for suffix, kind in KINDS.items() if name.endswith(suffix)]:
        return known[0]
    has_free_name = re.fullmatch(r"\.?\d*", os.path.splitext(name)[1]) and name != "dicomdir"  # im_0001, 1.2.840.113619.2
    if not has_free_name or filesystem.size_or_none(path) is None:  # a dead link is not a file
        return None
    try:
        head = filesystem.read_bytes(path, 132)
        return "dicom" if head[128:] == b"DICM" or BARE_DICOM.match(head) else None
    except PermissionError:
        return "dicom"


def import_package(kind: str):
    """The package that reads this kind of file, if it needs one; raises UserError if that is not installed."""
    try:
        return importlib.import_module(PACKAGES[kind]) if kind in PACKAGES else None
    except ImportError as error:
        raise UserError(f"{PACKAGES[kind]} is not installed: run `pip install 'heartseg[formats]'`.") from error


def read(
    path: str, kind: str, spacing_mm: Spacing | None = None, flips: tuple[int, ...] = (), admit: Admit = lambda _: None
) -> Frames:
    """Read one file; `spacing_mm` is a fallback if the file has none, `flips` are the axes to reverse (1 depth, 2 lateral).

    `admit` is called with the number of bytes that the file, its frames and their masks need, and again if a video turns out
    to be longer than it claims; it may wait, or raise DamagedRecording. Raises DamagedRecording if the file cannot be used,
    and UserError if a package is missing.
    """
    raw = nifti.read_source(path, most=MAX_FILE_BYTES)
    try:
        found = decode(raw, kind, admit)
    except (UserError, MemoryError, DamagedRecording):
        raise
    except Exception as error:  # the readers raise dozens of exception types for damaged bytes
        if getattr(error, "errno", None) in (errno.EAGAIN, errno.ENOMEM):  # no thread, no buffer: FFmpeg is out of memory
            raise MemoryError from error
        # The libraries' messages may quote a tag's value, or name nothing that a user knows.
        message = str(error) if kind == "nifti" or isinstance(error, Unreadable) else ""
        raise DamagedRecording(f"is not a readable {kind}: {message or 'it is damaged'}", path) from error
    if found.pixels.size and found.pixels.min() == found.pixels.max():
        raise DamagedRecording("is empty: all its pixels have the same value", path)
    notes, scaled = found.notes, "grey levels {} to {} were scaled to 0 to 255".format(*found.grey)
    notes += (scaled,) if found.grey != BYTE else ()
    lasts = found.frame_ms if found.frame_ms and FRAME_MS[0] <= found.frame_ms <= FRAME_MS[1] else None
    own_mm, doubt = plausible_spacing(found.spacing_mm, found.pixels.shape[1])
    upright = np.require(np.flip(found.pixels, flips), requirements="CW")
    return replace(found, pixels=upright, flips=flips, spacing_mm=own_mm or spacing_mm, notes=notes + doubt, frame_ms=lasts)


def plausible_spacing(spacing_mm: Spacing | None, rows: int) -> tuple[Spacing | None, tuple[str, ...]]:
    """The spacing, or None with a note if it would make an image of so many rows impossibly shallow or deep."""
    depth_mm = spacing_mm[0] * rows if spacing_mm else 0.0
    if not spacing_mm or PLAUSIBLE_DEPTH_MM[0] <= depth_mm <= PLAUSIBLE_DEPTH_MM[1]:
        return spacing_mm, ()
    return None, (f"the file's spacing is ignored: it would make the image {depth_mm:.0f} mm deep",)


def decode(raw: bytes, kind: str, admit: Admit = lambda _: None) -> Frames:
    """The frames in a file's bytes; raises Unreadable, UserError and the libraries' errors."""

    def admit_pixels(count: int) -> None:
        if count > MAX_PIXELS:
            size = f"it needs memory for {count:,} pixels, over the limit of {MAX_PIXELS:,}"
            raise Unreadable(f"{size}: trim it to the beats of interest")
        admit(2 * count + len(raw))

    import_package(kind)
    if kind == "dicom":
        from heartseg.datasets.dicom import read_dicom

        return read_dicom(raw, admit_pixels)
    if kind == "video":
        return read_video(raw, admit_pixels)
    values, spacing_mm, place = nifti.decode_nifti(raw) if kind == "nifti" else (decode_png(raw), None, None)
    pixels, grey = as_grey(values)
    admit_pixels(pixels.size)
    return Frames(pixels, spacing_mm, place, grey=grey, frame_ms=place and nifti.read_frame_ms(place))


def decode_png(raw: bytes) -> np.ndarray:
    """Values [1,H,W] of a PNG of any bit depth; colours become grey."""
    from PIL import Image

    with Image.open(io.BytesIO(raw), formats=["PNG"]) as picture:
        is_deep = picture.mode.startswith("I") or picture.mode == "F"
        values = np.asarray(picture if is_deep else picture.convert("L"))[None]
    if raw[24] == 16 and not is_deep and values.max() < 16:  # Pillow keeps only the upper 8 bits of colours
        raise Unreadable("its 16-bit colours use 12 bits or fewer, of which only 4 would be kept: save it as 16-bit greyscale")
    return values


def read_video(raw: bytes, admit: Admit = lambda _: None) -> Frames:
    """All frames of the first video stream, in grey, rotated by its display matrix; `admit` is called with pixel counts."""
    av = import_package("video")
    reformatter = av.video.reformatter.VideoReformatter()  # one for all frames: otherwise each frame makes its own
    pixels, count = np.empty((0, 0, 0), np.uint8), 0
    with av.open(io.BytesIO(raw)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            grey = reformatter.reformat(frame, format="gray").to_ndarray()
            picture = upright(grey, frame.side_data.get("DISPLAYMATRIX"))
            if count == len(pixels):  # grow to twice the length, in place; at first to the length that the file claims
                more = max(count, stream.frames - count, 1)
                admit(more * picture.size)
                pixels.resize((count + more, *picture.shape), refcheck=False)
            if picture.shape != pixels.shape[1:]:
                raise Unreadable("its frames differ in size")
            pixels[count] = picture
            count += 1
        ratio = stream.sample_aspect_ratio
    if not count:
        raise Unreadable("it has no frames")
    pixels.resize((count, *pixels.shape[1:]), refcheck=False)
    return Frames(pixels, None, notes=("its pixels are not square: give --spacing-mm",) if ratio and ratio != 1 else ())


def upright(picture: np.ndarray, matrix) -> np.ndarray:
    """An image [H,W] rotated and mirrored by the file's display matrix (36 bytes, or None), as players do."""
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # ISO 14496-12: x' = a x + c y, y' = b x + d y
    if b == c == 0:
        return picture[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]
    if a == d == 0:
        return picture.T[:: 1 if b > 0 else -1, :: 1 if c > 0 else -1]
    raise Unreadable("its display matrix asks for a rotation that is not a multiple of 90 degrees: export it upright")
