"""Files that hold echocardiograms to upright grey frames: NIfTI, and with `pip install heartseg[formats]` DICOM and video.

The only file that imports pydicom and PyAV. Nothing that a DICOM file holds about its patient leaves it: frames, spacing
and an opaque key of the study are all that it returns, and no message quotes a value.
"""

import hashlib
import importlib
import io
import logging
import os
import re
import warnings
from dataclasses import dataclass, replace

import numpy as np

from heartseg.datasets import nifti
from heartseg.datasets.nifti import DamagedRecording
from heartseg.errors import StorageError, UserError
from heartseg.storage import filesystem

KINDS = {
    **{".nii": "nifti", ".nii.gz": "nifti", ".dcm": "dicom", ".dicom": "dicom", ".png": "picture"},
    **{".avi": "video", ".mp4": "video", ".mov": "video", ".m4v": "video"},
}
PACKAGES = {"dicom": "pydicom", "video": "av"}
# Grey pixels of one file: two minutes of a large video. More is a whole examination, or a damaged header.
MAX_PIXELS = 2**31
# The depth that a scanner shows; a spacing that gives another was not measured (1 mm is what headers hold by default).
PLAUSIBLE_DEPTH_MM = (30, 400)
CENTIMETRES, TWO_DIMENSIONAL, TISSUE = 3, 1, 1  # DICOM PS3.3 C.8.5.5.1: units, spatial format and type of a region


@dataclass(frozen=True, eq=False)
class Frames:
    """What a file holds: uint8 [T,H,W], upright (row = depth), and (depth, lateral) `spacing_mm` or None.

    `place` is where a NIfTI file has them. `box` is (top, left, height, width): where in the file's whole pictures, of
    that height and width, the frames were cut out; None if they are whole. `flips` are the axes of [T,H,W] that were
    reversed to bring them upright. `notes` are remarks for the user. `may_show_text`: a name may be burned in.
    """

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None
    place: nifti.Place | None = None
    box: tuple[int, int, int, int] | None = None
    flips: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    may_show_text: bool = False


def kind_of(path: str) -> str | None:
    """`nifti`, `dicom`, `video` or `picture`; None for what is not an input. DICOM files may have any name.

    A file without a telling suffix is DICOM if it has DICOM's mark, or may not be read, so that it is reported.
    """
    name = filesystem.last_part(path).lower()
    for suffix, kind in KINDS.items():
        if name.endswith(suffix):
            return kind
    has_free_name = re.fullmatch(r"\.?\d*", os.path.splitext(name)[1]) and name != "dicomdir"  # im_0001, 1.2.840.113619.2
    if not has_free_name or filesystem.size_or_none(path) is None:  # a dead link is not a file
        return None
    try:
        return "dicom" if filesystem.read_bytes(path, 132)[128:] == b"DICM" else None
    except PermissionError:
        return "dicom"


def check_package_installed(kind: str) -> None:
    """Raise UserError if the package that reads this kind of file is not installed."""
    if kind in PACKAGES:
        _package(PACKAGES[kind])


def _package(name: str):
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed: run `pip install 'heartseg[formats]'` for DICOM and video.") from error
    if name == "pydicom":
        # Its warnings quote the values that they complain of, a patient's name among them.
        package.config.settings.reading_validation_mode = package.config.IGNORE
        logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
        warnings.filterwarnings("ignore", module=r"pydicom|heartseg\.datasets\.readers")
    return package


def read(path: str, kind: str, spacing_mm: tuple[float, float] | None = None, flips: tuple[int, ...] = ()) -> Frames:
    """Read one file; `spacing_mm` is used if the file has none, `flips` are the axes to reverse (1 depth, 2 lateral).

    Raises DamagedRecording with the reason, and UserError if a package is missing.
    """
    try:
        raw = filesystem.read_bytes(path)
    except OSError as error:
        raise DamagedRecording(f"cannot be read: {error.strerror or 'missing or not a file'}", path) from error
    try:
        found = {"nifti": read_nifti, "dicom": read_dicom, "video": read_video, "picture": read_picture}[kind](raw)
    except UserError:
        raise
    except Exception as error:  # the readers raise dozens of kinds for damaged bytes
        # For DICOM only our own messages are passed on: others may quote what a tag holds.
        message = str(error) if kind != "dicom" or type(error) is Unreadable else ""
        raise DamagedRecording(f"is no readable {kind}: {message or type(error).__name__}", path) from error
    if found.pixels.size and found.pixels.min() == found.pixels.max():
        raise DamagedRecording("is empty: all its pixels have one value", path)
    if found.spacing_mm is not None:
        depth_mm = found.spacing_mm[0] * found.pixels.shape[1]
        if not PLAUSIBLE_DEPTH_MM[0] <= depth_mm <= PLAUSIBLE_DEPTH_MM[1]:
            note = f"the file's spacing would make it {depth_mm:.0f} mm deep, so it is not used"
            found = replace(found, spacing_mm=None, notes=(*found.notes, note))
    upright = np.require(np.flip(found.pixels, flips), requirements="CW")
    return replace(found, pixels=upright, flips=flips, spacing_mm=found.spacing_mm or spacing_mm)


class Unreadable(ValueError):
    """A reason in our own words, which quotes nothing."""


def as_grey(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values of any number type as uint8 of the same shape, and a note if they had to be scaled.

    Whole numbers of 0 to 255 stay; fractions of 0 to 1 are multiplied by 255; anything else is stretched from its
    smallest to its largest value. Raises ValueError if values are not finite.
    """
    if values.dtype == np.uint8:
        return values, ()
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Unreadable("it has pixels that are not finite")
    if low >= 0 and high <= 255 and not (values.dtype.kind == "f" and 0 < high <= 1):
        return np.rint(values).astype(np.uint8), ()
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (float(low), float(high))
    stretched = (values.astype(np.float32) - low) * (255 / (high - low or 1))
    return np.rint(stretched).astype(np.uint8), (f"intensities {low:g} to {high:g} were stretched to 0 to 255",)


def read_nifti(raw: bytes) -> Frames:
    """An image or a sequence, with where it lies in its file (`nifti.read_frames` says how axes are found)."""
    values, spacing_mm, place = nifti.read_frames(raw)
    pixels, notes = as_grey(values)
    return Frames(pixels, spacing_mm, place, notes=notes)


def read_picture(raw: bytes) -> Frames:
    """A PNG of any depth; colours become grey. It has no spacing."""
    from PIL import Image

    with Image.open(io.BytesIO(raw), formats=["PNG"]) as picture:
        is_deep = picture.mode.startswith("I") or picture.mode == "F"
        values = np.asarray(picture if is_deep else picture.convert("L"))
    pixels, notes = as_grey(values[None])
    return Frames(pixels, None, notes=notes)


def read_video(raw: bytes) -> Frames:
    """Every frame of the first video stream, in grey. It has no spacing."""
    av = _package("av")
    frames, pixels = [], 0
    with av.open(io.BytesIO(raw)) as container:
        for frame in container.decode(video=0):
            pixels += frame.width * frame.height
            if pixels > MAX_PIXELS:
                raise Unreadable("it is longer than two minutes of large pictures: cut it to the beats that count")
            frames.append(frame.to_ndarray(format="gray"))
    if not frames:
        raise Unreadable("it has no frames")
    return Frames(np.stack(frames), None)


def study_key(path: str) -> str:
    """A key that differs between DICOM studies: a digest of the identifiers, or of the file's folder if it has none."""
    pydicom = _package("pydicom")
    try:
        dataset = pydicom.dcmread(io.BytesIO(filesystem.read_bytes(path)), stop_before_pixels=True)
        identifiers = [str(dataset.get(tag, "")) for tag in ("PatientID", "StudyInstanceUID")]
    except StorageError:
        raise
    except Exception:  # damage is reported when the pixels are read
        identifiers = []
    key = "|".join(identifiers) if any(identifiers) else os.path.dirname(path)
    return hashlib.sha256(key.encode()).hexdigest()


def read_dicom(raw: bytes) -> Frames:
    """A DICOM image or loop in grey, cut to its 2-D tissue region if the file names one.

    The spacing is that of the region (0018,6011: PhysicalDeltaX and PhysicalDeltaY, in cm if the unit's code is 3),
    otherwise PixelSpacing, otherwise None.
    """
    pydicom = _package("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(raw))
    pixels, notes = as_grey(_dicom_values(pydicom, dataset))
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = 255 - pixels
    region, box, spacing_mm = _tissue_region(dataset), None, None
    if region is not None:
        height, width = pixels.shape[1:]
        left, top, right, bottom = _corners(region)
        left, top, right, bottom = max(0, left), max(0, top), min(width, right + 1), min(height, bottom + 1)
        if right - left < 2 or bottom - top < 2:
            raise Unreadable("its ultrasound region lies outside its picture")
        box, pixels = (top, left, height, width), pixels[:, top:bottom, left:right]
        if region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == CENTIMETRES:
            spacing_mm = tuple(abs(float(region.get(tag, 0))) * 10 for tag in ("PhysicalDeltaY", "PhysicalDeltaX"))
    elif "PixelSpacing" in dataset:
        spacing_mm = tuple(float(value) for value in dataset.PixelSpacing)
    if spacing_mm is not None and not (len(spacing_mm) == 2 and all(np.isfinite(spacing_mm)) and min(spacing_mm) > 0):
        spacing_mm = None
    # Scanners write names beside the tissue: what was cut to it shows none, unless the file itself reports it.
    is_whole = box is None or pixels.shape[1:] == box[2:]
    may_show_text = is_whole or str(dataset.get("BurnedInAnnotation", "")).upper() == "YES"
    return Frames(pixels, spacing_mm, box=box, notes=notes, may_show_text=may_show_text)


def _dicom_values(pydicom, dataset) -> np.ndarray:
    """Pixel values [T,H,W]; colours become luminance."""
    syntax = dataset.file_meta.TransferSyntaxUID
    decoder = pydicom.pixels.get_decoder(syntax)
    if not decoder.is_available:
        raise Unreadable(f"it is compressed as {syntax.name}, which no installed package decodes")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if rows * columns * frames > MAX_PIXELS:
        raise Unreadable("it claims more pixels than two minutes of large pictures have")
    values, meta = decoder.as_array(dataset, raw=False)
    colours = meta["photometric_interpretation"]
    if colours == "PALETTE COLOR":
        values = pydicom.pixels.apply_color_lut(values, dataset)
        values = (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
    if colours == "PALETTE COLOR" or meta["samples_per_pixel"] == 3:
        values = _luminance(values)
    return values.reshape(frames, rows, columns)


def _luminance(colours: np.ndarray) -> np.ndarray:
    """[...,3] to [...] by the weights of ITU-R BT.601; grey stays the grey it was."""
    red, green, blue = (colours[..., channel].astype(np.uint32) for channel in range(3))
    return ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(colours.dtype)


def _tissue_region(dataset):
    """The largest 2-D tissue region that the file names; None if it names none."""

    def area(region) -> int:
        left, top, right, bottom = _corners(region)
        return (right - left) * (bottom - top)

    regions = [
        region
        for region in dataset.get("SequenceOfUltrasoundRegions") or []
        if region.get("RegionSpatialFormat") == TWO_DIMENSIONAL and region.get("RegionDataType", TISSUE) == TISSUE
    ]
    return max(regions, key=area, default=None)


def _corners(region) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a region, in pixels; the last two belong to it."""
    return tuple(int(region.get(f"RegionLocation{end}", 0)) for end in ("MinX0", "MinY0", "MaxX1", "MaxY1"))
