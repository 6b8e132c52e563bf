"""Reads NIfTI files as upright arrays (rows are depth) and writes them; any fault in a file becomes a one-line reason.

The only file that imports nibabel. On disk, axis 0 of an array is lateral and axis 1 is depth.
"""

import gzip
import math
import os
from collections.abc import Collection
from dataclasses import dataclass

import nibabel
import numpy as np
from isal import isal_zlib
from nibabel.volumeutils import apply_read_scaling

from heartseg.errors import StorageError
from heartseg.labels import NUM_CLASSES
from heartseg.storage import filesystem

MAX_VALUES = 2**27  # a header that claims more is damaged; a sequence of the release has under 80 million
MAX_FILE_BYTES = 2**30
MAX_EXTRA_BYTES = 2**20  # allowed before the pixels, and after them
MAX_DEFLATE_RATIO = 1032  # no deflate stream inflates to more than this times its own size
GZIP = b"\x1f\x8b"
HEADER_BYTES = 540  # of a NIfTI-2; a NIfTI-1 has 348
START_BYTES = 2048  # of a gzip file; they contain the header
MAX_FORM_CODE = 5  # the largest code of an affine that NIfTI defines
UNITS_MS = {8: 1000.0, 16: 1.0, 24: 0.001}
UNITS_MM = {1: 1000.0, 3: 0.001}  # metres, micrometres; every other code means millimetres or no unit


class DamagedRecording(Exception):
    """A recording that cannot be used; the message is the reason recorded in quarantine."""

    def __init__(self, reason: str, file: str):
        super().__init__(reason)
        self.reason, self.file = reason, file


@dataclass(frozen=True, eq=False)
class Place:
    """A file's header and layout: `order` lists its axes as (time, depth, lateral, others), `axes` as (depth, lateral)."""

    header: nibabel.Nifti1Header
    affine: np.ndarray
    order: tuple[int, ...]
    axes: tuple[int, int]

    def plane(self) -> tuple[np.ndarray, np.ndarray]:
        """The affine [4,3] from (depth, lateral, 1) to mm, and the bounding box [2,3] of the pixel centres in mm."""
        affine = self.affine[:, [*self.axes, 3]]
        height, width = (self.header.get_data_shape()[axis] - 1 for axis in self.axes)
        corners = np.array([affine @ corner for corner in ((0, 0, 1), (0, width, 1), (height, 0, 1), (height, width, 1))])
        return affine, np.array([corners.min(axis=0), corners.max(axis=0)])[:, :3]

    def has_affine(self) -> bool:
        """True if the header defines an affine for the image plane."""
        is_named = max(self.header["sform_code"], self.header["qform_code"]) > 0
        return is_named and max(self.axes) < 3 and self.affine[:3, self.axes].any(axis=0).all()

    def is_plain(self) -> bool:
        """True for the placeholder that tools write without a real affine: spacings alone, in NIfTI's or ITK's directions."""
        spacings = np.diag(self.affine)
        return np.array_equal(self.affine, np.diag(spacings)) and spacings[0] * spacings[1] > 0


def read_nifti(
    path: str, hashes: dict[str, str] | None = None, onto: Place | None = None, names: Collection[str] | None = None
) -> tuple[np.ndarray, tuple[float, float], Place]:
    """Decode the file that `find_file` finds and add its SHA-256 to `hashes`; raises DamagedRecording."""
    path = find_file(path, names)
    raw = read_source(path, hashes)
    try:
        return decode_nifti(raw, onto)
    except Exception as error:  # nibabel raises a dozen exception types for a damaged header
        raise DamagedRecording(f"is not a readable NIfTI: {str(error) or type(error).__name__}", path) from error


def find_file(path: str, names: Collection[str] | None = None) -> str:
    """The path itself if the file exists, otherwise that of a file whose name differs in case (`.NII.GZ`) or lacks `.gz`.

    `names` are the folder's entries, if known: asking storage for each file would take a tenth of the time to read a still.
    """
    folder, _, name = path.rpartition("/")
    if not (filesystem.exists(path) if names is None else name in names):
        others = [other for other in names or filesystem.list_names(folder) if other != name]  # not a dead link
        for wanted in (name.lower(), name.lower().removesuffix(".gz")):
            for found in (other for other in others if other.lower() == wanted):
                return filesystem.join(folder, found)
    return path


def read_source(path: str, hashes: dict[str, str] | None = None, most: int = MAX_FILE_BYTES) -> bytes:
    """A file's bytes; adds their SHA-256 to `hashes`. Raises DamagedRecording, also if there are more than `most`."""
    size = filesystem.size_or_none(path)
    # Reading a pipe instead of a file would block forever.
    if size is None and not filesystem.is_uri(path) and os.path.exists(path) and not os.path.isdir(path):
        raise DamagedRecording("cannot be read: not a file", path)
    if (size or 0) > most:
        raise DamagedRecording(f"has more than {most} bytes", path)
    try:
        raw = filesystem.read_bytes(path)
    except FileNotFoundError as error:
        raise DamagedRecording("is missing", path) from error
    except OSError as error:
        raise DamagedRecording(f"cannot be read: {error.strerror or 'not a file'}", path) from error
    if hashes is not None:
        hashes[path] = filesystem.sha256(raw)
    return raw


def decode_nifti(raw: bytes, onto: Place | None = None) -> tuple[np.ndarray, tuple[float, float], Place]:
    """Upright scaled values [T,H,W], (depth, lateral) spacing in mm, and Place of a `.nii` or `.nii.gz`.

    Axes of length one are skipped; of the others, the first is lateral, the second depth, the third time, as in CAMUS. The
    first two are swapped if, by the affine, only the second runs along the world's x. Writers disagree on the signs, so
    signs are ignored. With `onto`, its image's Place, a mask is reoriented to the image. Raises ValueError and others.
    """
    header, values = open_nifti(raw)
    place = find_place(header, onto)
    upright = values.transpose(place.order).reshape(-1, *(values.shape[axis] for axis in place.axes))
    return register(upright, place, onto) if onto else upright, read_spacing(header, place.axes), place


def find_place(header: nibabel.Nifti1Header, onto: Place | None = None) -> Place:
    """A file's Place, from its header and, for a mask, its image's Place; raises ValueError unless the shape is 2-D or 3-D."""
    shape = header.get_data_shape()
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    if len(wide) not in (2, 3):
        raise ValueError(f"shape {shape} is neither an image nor a sequence of images")
    lateral, depth = wide[:2]
    if not 0 < header["sform_code"] <= MAX_FORM_CODE:  # slow, so only if needed
        header.check_fix()
    affine = header.get_best_affine()
    is_swapped = depth < 3 and _runs_along_x(affine, depth) and not _runs_along_x(affine, lateral)
    if onto.axes[0] < onto.axes[1] if onto else is_swapped:
        lateral, depth = depth, lateral
    used = (*wide[2:], depth, lateral)
    return Place(header, affine, used + tuple(axis for axis in range(len(shape)) if axis not in used), (depth, lateral))


def _runs_along_x(affine: np.ndarray, axis: int) -> bool:
    """True if an axis of the array runs along the world's x more than along the others."""
    return np.abs(affine[:3, axis]).argmax() == 0


def read_place(path: str) -> Place | None:
    """The Place of the file that `find_file` finds, from its first bytes; None if they are missing or damaged."""
    try:
        return find_place(read_header(filesystem.read_bytes(find_file(path), START_BYTES)))
    except StorageError:
        raise
    except Exception:  # nibabel raises a dozen types
        return None


def register(masks: np.ndarray, place: Place, onto: Place) -> np.ndarray:
    """Masks [T,H,W] reoriented to their image's axes by the two affines; returned as they are if an affine is a placeholder.

    Raises ValueError if both affines are real and place the masks elsewhere than the image.
    """
    is_same = place.axes == onto.axes and (place.affine == onto.affine).all()
    if is_same or not (place.has_affine() and onto.has_affine()):
        return masks
    (ours, our_ends), (theirs, their_ends) = place.plane(), onto.plane()
    start, end = nibabel.io_orientation(ours), nibabel.io_orientation(theirs)
    if np.array_equal(start, end):
        return masks
    if np.allclose(our_ends, their_ends, rtol=0, atol=0.5 * np.abs(theirs[:3, :2]).max()):
        turn = nibabel.orientations.ornt_transform(start, end)
        return np.moveaxis(nibabel.apply_orientation(np.moveaxis(masks, 0, -1), turn), -1, 0)
    if place.is_plain() or onto.is_plain():
        return masks
    raise ValueError("its affine and its image's affine disagree in direction and position")


def open_nifti(raw: bytes) -> tuple[nibabel.Nifti1Header, np.ndarray]:
    """Header and scaled values, axes as on disk; the header's claims are checked before anything is allocated or inflated."""
    header, is_packed = read_header(raw), raw[:2] == GZIP
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    if dtype.kind not in "iuf":
        raise ValueError(f"the pixels are {dtype}, not plain numbers")
    num_values = math.prod(int(size) for size in shape)
    if min(shape, default=0) < 1 or num_values > MAX_VALUES:
        raise ValueError(f"the header claims shape {shape}, which is empty or too large")
    if not header.single_vox_offset <= offset <= MAX_EXTRA_BYTES:
        raise ValueError(f"the header claims that pixels begin at byte {offset}, which is out of range")
    end = offset + num_values * dtype.itemsize
    content = unpack(raw, min(end + MAX_EXTRA_BYTES, MAX_DEFLATE_RATIO * len(raw))) if is_packed else raw
    if not end <= len(content) < end + MAX_EXTRA_BYTES:
        raise ValueError(f"the header claims {end} bytes, but {'many more' if len(content) > end else len(content)} were found")
    # A nibabel image would also copy the pixels and keep header extensions, which may hold a patient's DICOM text.
    values = np.frombuffer(content, dtype, num_values, offset)
    return header, apply_read_scaling(values.reshape(shape, order="F"), *header.get_slope_inter())


def unpack(packed: bytes, most: int) -> bytes:
    """The first `most` bytes in a gzip file; like nibabel, ignores anything after the last member.

    ISA-L inflates float pixels three times as fast as zlib, which took up half the time to read an image of the release.
    """
    parts, missing = [], most
    while missing and packed and GZIP.startswith(packed[:2]):
        member = isal_zlib.decompressobj(wbits=31)
        parts.append(member.decompress(packed, missing))
        missing -= len(parts[-1])
        if missing and not member.eof:
            raise ValueError("the gzip stream is cut off")
        packed = member.unused_data.lstrip(b"\0")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_header(block: bytes) -> nibabel.Nifti1Header:
    """The header at the start of a file, NIfTI-1 or -2 in either byte order; raises ValueError and nibabel's errors."""
    if block[:2] == GZIP:  # opening the whole stream for its header alone took a tenth of an image's time
        start = isal_zlib.decompressobj(wbits=31).decompress(block[:START_BYTES], HEADER_BYTES)
        block = start if len(start) == HEADER_BYTES else unpack(block, HEADER_BYTES)
    is_second = HEADER_BYTES in (int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big"))
    kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
    size = kind.template_dtype.itemsize
    if len(block) < size:
        raise ValueError(f"{len(block)} bytes are too few for a header")
    header = kind(block[:size], check=False)  # nibabel's checks would replace a missing spacing with 1 mm
    if header["sizeof_hdr"] != size or not bytes(header["magic"]).startswith(b"n+"):
        raise ValueError("it does not start with a NIfTI header")
    return header


def read_spacing(header: nibabel.Nifti1Header, axes: tuple[int, int]) -> tuple[float, float]:
    """Pixel sizes along two axes in mm, converted from the header's unit of length; raises ValueError if it has none."""
    unit_mm, zooms = UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0), header.get_zooms()
    sizes = [abs(float(zooms[axis])) * unit_mm for axis in axes]  # some writers encode directions as signs
    if not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"the pixel spacing {sizes} is not positive")
    return tuple(sizes)


def read_frame_ms(place: Place) -> float | None:
    """The time between a sequence's frames in ms; None if the header names no unit of time."""
    unit_ms = UNITS_MS.get(int(place.header["xyzt_units"]) & 56)
    return unit_ms and abs(float(place.header.get_zooms()[place.order[0]])) * unit_ms


def write_frames(path: str, masks: np.ndarray, place: Place) -> None:
    """Write masks uint8 [T,H,W] with the shape, affine and header of their images; gzipped, complete or not at all."""
    header = place.header.copy()
    header.check_fix()  # nibabel's repairs, which take as long as decoding, and which reading does not need
    shape = header.get_data_shape()
    disk = masks.reshape([shape[axis] for axis in place.order]).transpose(np.argsort(place.order))
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0  # the image's display range would show labels 0-3 as black
    filesystem.publish(path, pack(header, disk, level=1))  # small at any level


def as_labels(mask: np.ndarray, path: str) -> np.ndarray:
    """A copy of a mask as uint8, with values within 0.001 of a label rounded to it; raises DamagedRecording naming others."""
    with np.errstate(invalid="ignore"):  # the comparison finds values that uint8 cannot hold
        labels = (mask if mask.dtype == np.uint8 else np.rint(mask)).astype(np.uint8, order="C")
        wrong = [] if np.array_equal(labels, mask) else np.unique(mask[~(np.abs(mask - labels) <= 1e-3)])
    if not len(wrong) and labels.max() >= NUM_CLASSES:
        wrong = np.unique(labels[labels >= NUM_CLASSES])
    if len(wrong):
        named = ", ".join(f"{value:g}" for value in wrong[:5]) + (", …" if len(wrong) > 5 else "")
        raise DamagedRecording(f"has labels other than 0 to 3 (1 LV cavity, 2 myocardium, 3 left atrium): {named}", path)
    return labels


def write_nifti(path: str, array: np.ndarray, spacing_mm: tuple[float, float] | None) -> None:
    """Publish an upright image [H,W] or sequence [T,H,W] in CAMUS's axis order; without `spacing_mm` its unit is unknown."""
    depth, lateral = spacing_mm or (1.0, 1.0)
    disk = array[0] if len(array) == 1 else array  # a sequence of one frame is a still
    image = nibabel.Nifti1Image(disk.T, np.diag([lateral, depth, 1.0, 1.0]))
    image.header.set_zooms((lateral, depth) + (1.0,) * (disk.ndim - 2))
    image.header.set_xyzt_units("mm" if spacing_mm else "unknown")
    image.header["descrip"] = b"" if spacing_mm else b"pixel spacing unknown"
    filesystem.publish(path, pack(image.header, disk.T))


def pack(header: nibabel.Nifti1Header, disk: np.ndarray, level: int = 6) -> bytes:
    """The bytes of a NIfTI file with the values `disk`, gzipped without a time stamp, so that equal pixels yield equal files.

    nibabel's images would write the same bytes line by line, which takes three times as long.
    """
    header.set_slope_inter(1, 0)
    header["vox_offset"] = header.single_vox_offset  # directly after the header: there is no extension
    no_extension = bytes(header.single_vox_offset - header.template_dtype.itemsize)
    return gzip.compress(header.binaryblock + no_extension + disk.tobytes(order="F"), level, mtime=0)
