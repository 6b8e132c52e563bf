"""Reads DICOM files as upright grey frames with a pixel spacing, and identifies studies by keyed digests.

The only file that imports pydicom (`pip install heartseg[formats]`). No message quotes text from a file.
"""

import contextlib
import hmac
import io
import logging
import re
import warnings
from collections.abc import Callable

import numpy as np
import pydicom

from heartseg.datasets.grey import Unreadable, as_grey
from heartseg.datasets.readers import NO_PICTURE, Frames

# pydicom's warnings quote the values that they complain about, which may be a patient's name.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module=r"pydicom|heartseg\.datasets\.dicom")

# SOP classes (DICOM PS3.6): ultrasound images and loops, including retired classes; screenshots; volumes.
STORAGE = "1.2.840.10008.5.1.4.1.1."
ULTRASOUND = tuple(STORAGE + kind for kind in ("3", "3.1", "6", "6.1"))
SCREENSHOT, VOLUME = STORAGE + "7", STORAGE + "6.2"
# DICOM PS3.3 C.8.5.5.1: spatial formats of a region (M-mode and Doppler are curves over time), its type, its unit.
TWO_DIMENSIONAL, CURVES, TISSUE, CENTIMETRES = 1, {2, 3}, 1, 3
CORNERS = ("MinY0", "MinX0"), ("MaxY1", "MaxX1")
BEYOND_EDGE = 0.02  # how far a region may exceed the image, as a share of its side: writers count from 0 or 1, and round
# The tags that must agree in all files of a study that have them.
IDENTIFIERS = ("PatientID", "StudyInstanceUID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate")
SHORTEST_UID = 20  # generated UIDs are longer; an anonymiser's placeholder, such as 1.2.3, is shorter


def read_dicom(raw: bytes, admit: Callable[[int], None] = lambda pixels: None) -> Frames:
    """A DICOM image or loop in grey, cropped to its 2-D tissue region if the file names one that fits the image.

    The spacing is the region's (0018,6011), otherwise PixelSpacing. `admit` is called with the number of pixels before they are
    decoded. Raises Unreadable for anything but a 2-D image or loop, and whatever pydicom raises.
    """
    dataset = pydicom.dcmread(io.BytesIO(raw), force=True)
    check_is_loop(dataset)
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    (top, left, bottom, right), spacing_mm, notes = find_region(dataset, rows, columns)
    is_cropped = bottom > rows * (1 + BEYOND_EDGE) or right > columns * (1 + BEYOND_EDGE)
    bottom, right = min(bottom, rows), min(right, columns)
    frames = int(dataset.get("NumberOfFrames") or 1)
    is_whole = (bottom - top, right - left) == (rows, columns)
    admit(frames * rows * columns * (2 if is_whole else 3) // 2)  # a cropped image's masks are written at full size
    pixels, grey = as_grey(decode(dataset, frames, (slice(top, bottom), slice(left, right))))
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = np.invert(pixels)
    # Scanners write names beside the tissue, so an image cropped to it shows none, unless the file reports burned-in text, or
    # someone cropped the image later, which may have moved the tissue out of the region.
    may_show_text = is_whole or is_cropped or str(dataset.get("BurnedInAnnotation", "")).upper() == "YES"
    box = None if is_whole else (top, left, rows, columns)
    frame_ms = None
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # missing, empty or malformed: the image is still good
        frame_ms = float(dataset.FrameTime)
    return Frames(pixels, spacing_mm, box=box, notes=notes, grey=grey, may_show_text=may_show_text, frame_ms=frame_ms)


def check_is_loop(dataset) -> None:
    """Raise Unreadable unless a file holds an ultrasound image or loop of one plane."""
    kind = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    if "PixelData" not in dataset:
        if "Rows" in dataset or kind in ULTRASOUND:
            raise Unreadable("it is cut off before its pixels")
        raise Unreadable(NO_PICTURE if re.fullmatch(r"[\d.]+", kind) else "it is damaged or not a DICOM file")
    if kind == VOLUME or str(dataset.get("DimensionOrganizationType", "")).startswith("3D"):
        raise Unreadable("its frames are slices of a 3-D volume: export a 2-D image or loop instead")
    if kind.startswith(STORAGE) and not (kind in ULTRASOUND or kind.startswith(SCREENSHOT)):
        raise Unreadable("it is not an ultrasound image")


def find_region(dataset, rows: int, columns: int) -> tuple[tuple, tuple[float, float] | None, tuple[str, ...]]:
    """The largest 2-D tissue region (top, left, bottom, right; ends excluded), or the whole image; its spacing; notes."""
    whole, regions = (0, 0, rows, columns), list(dataset.get("SequenceOfUltrasoundRegions") or [])
    formats = {region.get("RegionSpatialFormat") for region in regions}
    if formats & CURVES and TWO_DIMENSIONAL not in formats:
        raise Unreadable("it shows a curve over time (M-mode or Doppler), not a 2-D image")
    tissue = []
    for region in regions:
        if region.get("RegionSpatialFormat") == TWO_DIMENSIONAL and region.get("RegionDataType", TISSUE) == TISSUE:
            first, last = ([int(region.get(f"RegionLocation{end}", 0)) for end in ends] for ends in CORNERS)
            tissue.append(((*first, last[0] + 1, last[1] + 1), region))
    if not tissue:
        spacing_mm = _positive(dataset.get("PixelSpacing") or ())
        ratio = [float(value) for value in dataset.get("PixelAspectRatio") or (1, 1)]
        odd = not spacing_mm and ratio[0] != ratio[1]
        return whole, spacing_mm, ("its pixels are not square, and it has no spacing in mm: give --spacing-mm",) if odd else ()
    corners, region = max(tissue, key=lambda found: _area(found[0]))
    top, left, bottom, right = corners
    if not fits(corners, rows, columns):
        note = f"its ultrasound region does not fit its {rows} x {columns} image"
        return whole, None, (f"{note}: it is not cropped, and its spacing is unknown",)
    apart = [other for other, _ in tissue if (other[1] >= right or other[3] <= left or other[0] >= bottom or other[2] <= top)]
    beside = sum(_area(other) > _area(corners) / 4 for other in apart)
    note = f"it shows {beside + 1} planes at once; only the one in columns {left} to {right - 1} is outlined"
    is_in_cm = region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == CENTIMETRES
    deltas = [abs(float(region.get(tag, 0))) * 10 for tag in ("PhysicalDeltaY", "PhysicalDeltaX")] if is_in_cm else ()
    return corners, _positive(deltas), (note,) if beside else ()


def fits(corners: tuple[int, int, int, int], rows: int, columns: int) -> bool:
    """True if a region (top, left, bottom, right) lies within an image, which may have been cropped along one side."""
    top, left, bottom, right = corners
    if not (0 <= top < bottom and 0 <= left < right and top + 1 < rows and left + 1 < columns):
        return False
    too_deep, too_wide = bottom > rows * (1 + BEYOND_EDGE), right > columns * (1 + BEYOND_EDGE)
    ends_below, ends_right = bottom >= rows * (1 - BEYOND_EDGE), right >= columns * (1 - BEYOND_EDGE)
    return not (too_deep or too_wide) or (too_deep != too_wide and ends_below and ends_right)


def _area(corners: tuple[int, int, int, int]) -> int:
    return (corners[2] - corners[0]) * (corners[3] - corners[1])


def _positive(spacing_mm) -> tuple[float, float] | None:
    """A spacing as two numbers; None unless both are positive."""
    values = tuple(float(value) for value in spacing_mm)
    return values if len(values) == 2 and all(np.isfinite(values)) and min(values) > 0 else None


def decode(dataset, frames: int, window: tuple[slice, slice]) -> np.ndarray:
    """Pixel values [T,h,w] in a window of every frame, decoded one by one; colours become luminance."""
    values, decoder = None, _decoder(dataset)
    found = decoder.iter_array(dataset, raw=False)
    if dataset.PhotometricInterpretation == "YBR_FULL_422" and not decoder.is_encapsulated:
        whole, meta = decoder.as_array(dataset, raw=False)  # iter_array counts its bytes wrongly (pydicom 3.0)
        found = ((frame, meta) for frame in whole.reshape(frames, *whole.shape[-3:]))
    for index, (frame, meta) in enumerate(found):
        frame = frame[window]
        if meta["photometric_interpretation"] == "PALETTE COLOR":
            frame = pydicom.pixels.apply_color_lut(frame, dataset)
            frame = (frame >> 8).astype(np.uint8) if frame.dtype == np.uint16 else frame
        if frame.ndim == 3:  # luminance by the weights of ITU-R BT.601; greys stay unchanged
            red, green, blue = (frame[..., channel].astype(np.uint32) for channel in range(3))
            frame = ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(frame.dtype)
        if values is None:
            values = np.empty((frames, *frame.shape), frame.dtype)
        values[index] = frame
    return values


def _decoder(dataset):
    """pydicom's decoder for a file's pixels; raises Unreadable, naming the package to install, if none is available."""
    if "TransferSyntaxUID" not in dataset.file_meta:  # a bare data set
        names = {(True, True): "ImplicitVRLittleEndian", (False, False): "ExplicitVRBigEndian"}
        syntax = getattr(pydicom.uid, names.get(dataset.original_encoding, "ExplicitVRLittleEndian"))
        dataset.file_meta.TransferSyntaxUID = syntax
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.name.startswith(("MPEG", "HEVC")):
        raise Unreadable("it holds a video (MPEG): export it as MP4 or AVI")
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError as error:
        raise Unreadable("its compression is not supported: export it uncompressed") from error
    is_deep = syntax == pydicom.uid.JPEGExtended12Bit and int(dataset.BitsStored) > 8
    if not decoder.is_available or (is_deep and decoder.available_plugins == ("pillow",)):
        packages = " ".join(re.findall(r"py\w+(?:-\w+)?(?=>=)", decoder.missing_dependencies[-1]))
        name = "12-bit JPEG" if is_deep else syntax.name
        raise Unreadable(f"it is compressed as {name}, which needs another package: run `pip install {packages}`")
    return decoder


def identify(raw: bytes, secret: bytes) -> dict[str, str]:
    """Digests, keyed by `secret`, of a file's IDENTIFIERS and SeriesInstanceUID, by tag; empty for a damaged file."""
    try:
        dataset = pydicom.dcmread(io.BytesIO(raw), force=True, stop_before_pixels=True)
        values = {tag: str(dataset.get(tag) or "").strip(" ^\0") for tag in (*IDENTIFIERS, "SeriesInstanceUID")}
    except Exception:  # damage is reported when the pixels are read
        return {}
    if len(values["StudyInstanceUID"]) < SHORTEST_UID:
        values["SeriesInstanceUID"] = ""
    return {tag: digest(secret, value.encode()) for tag, value in values.items() if value}


def digest(secret: bytes, value: bytes) -> str:
    """Hexadecimal HMAC-SHA-256 of a value."""
    return hmac.new(secret, value, "sha256").hexdigest()
