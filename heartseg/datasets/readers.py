"""Files of any kind to upright grey frames: NIfTI, PNG, and with `pip install heartseg[formats]` DICOM (dicom.py) and video.

The only file that imports PyAV. No message quotes what a tag holds.
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
MAX_PIXELS = 2**31  # of one file: two minutes of a large video; more is a whole examination, or a damaged header
MAX_FILE_BYTES = 2**33
PLAUSIBLE_DEPTH_MM = (30, 400)  # a spacing that gives another was not measured (1 mm is what headers hold by default)
NO_PICTURE = "it holds no picture: reports and measurements have none"
# The first element of a DICOM without preamble is of group 2 or 8, with its type or the length of its value behind it.
BARE_DICOM = re.compile(rb"[\x02\x08]\0[\0-\x7f]\0(?:[A-Z]{2}|[\0-\x80]\0\0\0)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Frames:
    """What a file holds: uint8 [T,H,W], upright (row = depth), and (depth, lateral) `spacing_mm` or None.

    `box` is (top, left, height, width): where in the file's whole pictures, of that height and width, the frames were cut out.
    `flips` are the axes that were reversed, `grey` is the range of values that became 0 to 255, `may_show_text`: a name, say.
    """

    pixels: np.ndarray
    spacing_mm: Spacing | None
    place: nifti.Place | None = None
    box: tuple[int, int, int, int] | None = None
    flips: tuple[int, ...] = ()
    grey: tuple[int, int] = BYTE
    notes: tuple[str, ...] = ()
    may_show_text: bool = False


def kind_of(path: str) -> str | None:
    """`nifti`, `dicom`, `video` or `picture`; None for what is not an input. DICOM files may have any name."""
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
    """The package that reads this kind of file, if one does; raises UserError if it is not installed."""
    try:
        return importlib.import_module(PACKAGES[kind]) if kind in PACKAGES else None
    except ImportError as error:
        raise UserError(f"{PACKAGES[kind]} is not installed: run `pip install 'heartseg[formats]'`.") from error


def read(
    path: str, kind: str, spacing_mm: Spacing | None = None, flips: tuple[int, ...] = (), admit: Admit = lambda _: None
) -> Frames:
    """Read one file; `spacing_mm` is used if the file has none, `flips` are the axes to reverse (1 depth, 2 lateral).

    `admit` gets the bytes that the frames and as many masks will take, before they are decoded; it may wait, or raise
    DamagedRecording. Raises DamagedRecording with the reason, and UserError if a package is missing.
    """
    raw = nifti.read_source(path, most=MAX_FILE_BYTES)
    try:
        found = decode(raw, kind, admit)
    except (UserError, MemoryError, DamagedRecording):
        raise
    except Exception as error:  # the readers raise dozens of kinds for damaged bytes
        if getattr(error, "errno", None) in (errno.EAGAIN, errno.ENOMEM):  # no thread, no buffer: FFmpeg's want of memory
            raise MemoryError from error
        # Others' messages may quote what a tag holds, or name nothing that a user knows.
        message = str(error) if kind == "nifti" or isinstance(error, Unreadable) else ""
        raise DamagedRecording(f"is not a readable {kind}: {message or 'it is damaged'}", path) from error
    if found.pixels.size and found.pixels.min() == found.pixels.max():
        raise DamagedRecording("is empty: all its pixels have one value", path)
    notes, own_mm = [*found.notes], found.spacing_mm
    if found.grey != BYTE:
        notes.append("grey levels {} to {} were scaled to 0 to 255".format(*found.grey))
    depth_mm = own_mm and own_mm[0] * found.pixels.shape[1]
    if own_mm and not PLAUSIBLE_DEPTH_MM[0] <= depth_mm <= PLAUSIBLE_DEPTH_MM[1]:
        notes.append(f"the file's spacing would make it {depth_mm:.0f} mm deep, so it is not used")
        own_mm = None
    upright = np.require(np.flip(found.pixels, flips), requirements="CW")
    return replace(found, pixels=upright, flips=flips, spacing_mm=own_mm or spacing_mm, notes=tuple(notes))


def decode(raw: bytes, kind: str, admit: Admit = lambda _: None) -> Frames:
    """The frames in a file's bytes; raises Unreadable, UserError and what the libraries raise."""

    def admit_pixels(count: int) -> None:
        if count > MAX_PIXELS:
            raise Unreadable("it claims more pixels than two minutes of large pictures have: trim it to the beats of interest")
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
    return Frames(pixels, spacing_mm, place, grey=grey)


def decode_png(raw: bytes) -> np.ndarray:
    """Values [1,H,W] of a PNG of any depth; colours become grey."""
    from PIL import Image

    with Image.open(io.BytesIO(raw), formats=["PNG"]) as picture:
        is_deep = picture.mode.startswith("I") or picture.mode == "F"
        values = np.asarray(picture if is_deep else picture.convert("L"))[None]
    if raw[24] == 16 and not is_deep and values.max() < 16:  # Pillow keeps the upper 8 bits of colours alone
        raise Unreadable("its 16-bit colours hold 12 bits or fewer, of which 4 would be left: save it as 16-bit grey")
    return values


def read_video(raw: bytes, admit: Admit = lambda _: None) -> Frames:
    """Every frame of the first video stream, in grey, turned as its display matrix asks; `admit` gets numbers of pixels."""
    av = import_package("video")
    reformatter = av.video.reformatter.VideoReformatter()  # a frame's own would be made again for each
    pixels, count = np.empty((0, 0, 0), np.uint8), 0
    with av.open(io.BytesIO(raw)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            grey = reformatter.reformat(frame, format="gray").to_ndarray()
            picture = upright(grey, frame.side_data.get("DISPLAYMATRIX"))
            if count == len(pixels):  # twice as long, without a copy; the first time as long as the file claims
                more = max(count, stream.frames - count, 1)
                admit(more * picture.size)
                pixels.resize((count + more, *picture.shape), refcheck=False)
            if picture.shape != pixels.shape[1:]:
                raise Unreadable("its frames have several sizes")
            pixels[count] = picture
            count += 1
        ratio = stream.sample_aspect_ratio
    if not count:
        raise Unreadable("it has no frames")
    pixels.resize((count, *pixels.shape[1:]), refcheck=False)
    return Frames(pixels, None, notes=("its pixels are not square: give --spacing-mm",) if ratio and ratio != 1 else ())


def upright(picture: np.ndarray, matrix) -> np.ndarray:
    """A picture [H,W] turned and mirrored as a player does it by the file's display matrix (36 bytes, or None)."""
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # ISO 14496-12: x' = a x + c y, y' = b x + d y
    if b == c == 0:
        return picture[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]
    if a == d == 0:
        return picture.T[:: 1 if b > 0 else -1, :: 1 if c > 0 else -1]
    raise Unreadable("it asks to be rotated by an angle that is not a multiple of 90 degrees")
