"""Files that hold echocardiograms to upright grey frames: NIfTI, and with `pip install heartseg[formats]` DICOM and video.

The only file that imports PyAV; dicom.py reads DICOM, and no message quotes what a tag holds.
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

KINDS = {
    **{".nii": "nifti", ".nii.gz": "nifti", ".dcm": "dicom", ".dicom": "dicom", ".png": "picture"},
    **{".avi": "video", ".mp4": "video", ".mov": "video", ".m4v": "video"},
}
PACKAGES = {"dicom": "pydicom", "video": "av"}
# Grey pixels of one file: two minutes of a large video. More is a whole examination, or a damaged header.
MAX_PIXELS = 2**31
MAX_FILE_BYTES = 2**33
# The depth that a scanner shows; a spacing that gives another was not measured (1 mm is what headers hold by default).
PLAUSIBLE_DEPTH_MM = (30, 400)
NO_PICTURE = "it holds no picture, as reports and measurements do"
# The first element of a DICOM without preamble is of group 2 or 8, with its type or the length of its value behind it.
BARE_DICOM = re.compile(rb"[\x02\x08]\0[\0-\x7f]\0(?:[A-Z]{2}|[\0-\x80]\0\0\0)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Frames:
    """What a file holds: uint8 [T,H,W], upright (row = depth), and (depth, lateral) `spacing_mm` or None.

    `place` is where a NIfTI file has them. `box` is (top, left, height, width): where in the file's whole pictures, of
    that height and width, the frames were cut out; None if they are whole. `flips` are the axes of [T,H,W] that were
    reversed to bring them upright. `grey` is the range of the file's values that became 0 to 255. `notes` are remarks for the
    user. `may_show_text`: a name may be burned in.
    """

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None
    place: nifti.Place | None = None
    box: tuple[int, int, int, int] | None = None
    flips: tuple[int, ...] = ()
    grey: tuple[int, int] = BYTE
    notes: tuple[str, ...] = ()
    may_show_text: bool = False


def kind_of(path: str) -> str | None:
    """`nifti`, `dicom`, `video` or `picture`; None for what is not an input. DICOM files may have any name.

    A file without a telling suffix is DICOM if it begins as one, or may not be read, so that it is reported.
    """
    name = filesystem.last_part(path).lower()
    for suffix, kind in KINDS.items():
        if name.endswith(suffix):
            return kind
    has_free_name = re.fullmatch(r"\.?\d*", os.path.splitext(name)[1]) and name != "dicomdir"  # im_0001, 1.2.840.113619.2
    if not has_free_name or filesystem.size_or_none(path) is None:  # a dead link is not a file
        return None
    try:
        head = filesystem.read_bytes(path, 132)
        return "dicom" if head[128:] == b"DICM" or BARE_DICOM.match(head) else None
    except PermissionError:
        return "dicom"


def check_package_installed(kind: str) -> None:
    """Raise UserError if the package that reads this kind of file is not installed."""
    if kind in PACKAGES:
        _package(PACKAGES[kind])


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed: run `pip install 'heartseg[formats]'` for DICOM and video.") from error


def read(
    path: str,
    kind: str,
    spacing_mm: tuple[float, float] | None = None,
    flips: tuple[int, ...] = (),
    admit: Callable[[int], None] = lambda num_bytes: None,
) -> Frames:
    """Read one file; `spacing_mm` is used if the file has none, `flips` are the axes to reverse (1 depth, 2 lateral).

    `admit` gets the bytes that the frames and as many masks will take, before they are decoded; it may wait, or raise
    DamagedRecording. Raises DamagedRecording with the reason, and UserError if a package is missing.
    """
    raw = nifti.read_source(path, MAX_FILE_BYTES)
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
    if found.grey != BYTE:
        note = "grey levels {} to {} were scaled to 0 to 255".format(*found.grey)
        found = replace(found, notes=(*found.notes, note))
    if found.spacing_mm is not None:
        depth_mm = found.spacing_mm[0] * found.pixels.shape[1]
        if not PLAUSIBLE_DEPTH_MM[0] <= depth_mm <= PLAUSIBLE_DEPTH_MM[1]:
            note = f"the file's spacing would make it {depth_mm:.0f} mm deep, so it is not used"
            found = replace(found, spacing_mm=None, notes=(*found.notes, note))
    upright = np.require(np.flip(found.pixels, flips), requirements="CW")
    return replace(found, pixels=upright, flips=flips, spacing_mm=found.spacing_mm or spacing_mm)


def decode(raw: bytes, kind: str, admit: Callable[[int], None]) -> Frames:
    """The frames in a file's bytes; raises Unreadable, UserError and what the libraries raise."""

    def admit_pixels(count: int) -> None:
        if count > MAX_PIXELS:
            raise Unreadable("it claims more pixels than two minutes of large pictures have: cut it to the beats that count")
        admit(2 * count + len(raw))

    if kind == "dicom":
        _package("pydicom")
        from heartseg.datasets.dicom import read_dicom

        return read_dicom(raw, admit_pixels)
    if kind == "video":
        return read_video(raw, admit_pixels)
    found = read_nifti(raw) if kind == "nifti" else read_picture(raw)
    admit_pixels(found.pixels.size)
    return found


def read_nifti(raw: bytes) -> Frames:
    """An image or a sequence, with where it lies in its file (`nifti.decode_nifti` describes how axes are found)."""
    values, spacing_mm, place = nifti.decode_nifti(raw)
    pixels, grey = as_grey(values)
    return Frames(pixels, spacing_mm, place, grey=grey)


def read_picture(raw: bytes) -> Frames:
    """A PNG of any depth; colours become grey. It has no spacing."""
    from PIL import Image

    with Image.open(io.BytesIO(raw), formats=["PNG"]) as picture:
        is_deep = picture.mode.startswith("I") or picture.mode == "F"
        values = np.asarray(picture if is_deep else picture.convert("L"))
    pixels, grey = as_grey(values[None])
    return Frames(pixels, None, grey=grey)


def read_video(raw: bytes, admit: Callable[[int], None] = lambda pixels: None) -> Frames:
    """Every frame of the first video stream, in grey, turned as its display matrix asks. It has no spacing.

    `admit` gets the number of pixels before they are decoded.
    """
    av = _package("av")
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
    odd = ratio and ratio != 1
    return Frames(pixels, None, notes=("its pixels are not square: give --spacing-mm",) if odd else ())


def upright(picture: np.ndarray, matrix) -> np.ndarray:
    """A picture [H,W] as a player shows it: turned and mirrored as the file's display matrix, 36 bytes or None, asks."""
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # ISO 14496-12: x' = a x + c y, y' = b x + d y
    if b == c == 0:
        return picture[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]
    if a == d == 0:
        return picture.T[:: 1 if b > 0 else -1, :: 1 if c > 0 else -1]
    raise Unreadable("it is to be shown turned by an angle that is not a multiple of 90 degrees")
