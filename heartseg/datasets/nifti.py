"""NIfTI files to upright arrays and back; whatever is wrong with a file becomes a reason.

The only file that imports nibabel. On disk, axis 0 of an array is lateral and axis 1 is depth; here rows are depth and
columns are lateral, and the NIfTI order comes back only on writing.
"""

import io
import math
import os
import zlib
from dataclasses import dataclass

import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.volumeutils import apply_read_scaling

from heartseg.labels import NUM_CLASSES
from heartseg.storage import filesystem

# A sequence of the release has under 80 million values; a header that claims more than this is damaged.
MAX_VALUES = 2**27
MAX_FILE_BYTES = 2**30
MAX_EXTRA_BYTES = 2**20  # what may stand before the pixels, and what may follow them
MAX_DEFLATE_RATIO = 1032  # no deflate stream inflates to more than this times its own size
GZIP = b"\x1f\x8b"
HEADER_BYTES = 540  # of a NIfTI-2; a NIfTI-1 has 348
PACKED_HEADER_BYTES = 2**12  # of a gzip file: its header lies in the first few of them
CUT_OFF = "the gzip stream is cut off"
UNITS_MM = {1: 1000.0, 3: 0.001}  # metres, micrometres; every other code is millimetres, or no unit named


class DamagedRecording(Exception):
    """A recording that cannot be used; the message is the reason that goes to quarantine."""

    def __init__(self, reason: str, file: str):
        super().__init__(reason)
        self.reason, self.file = reason, file


def read_nifti(path: str, hashes: dict[str, str] | None = None) -> tuple[np.ndarray, tuple[float, float]]:
    """Read a NIfTI file; returns the upright array ([H,W] or [H,W,T]) and (depth, lateral) spacing in mm.

    If there is no `NAME.nii.gz`, `NAME.nii` beside it is read. `scl_slope` and `scl_inter` are applied. The SHA-256 of
    the file goes into `hashes`, by path. Raises DamagedRecording for whatever cannot be read.
    """
    beside = path.removesuffix(".gz")
    if path.endswith(".nii.gz") and not filesystem.exists(path) and filesystem.exists(beside):
        path = beside
    raw = read_source(path)
    if hashes is not None:
        hashes[path] = filesystem.sha256(raw)
    try:
        return decode_nifti(raw)
    except Exception as error:  # nibabel raises a dozen kinds for a damaged header
        raise DamagedRecording(f"is no readable NIfTI: {str(error) or type(error).__name__}", path) from error


def read_source(path: str) -> bytes:
    """The bytes of a file of the source; raises DamagedRecording for what is not a file, or larger than any may be."""
    # A pipe in a file's place would keep the reader waiting for ever.
    if not filesystem.is_uri(path) and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise DamagedRecording("cannot be read: not a file", path)
    if (filesystem.size_or_none(path) or 0) > MAX_FILE_BYTES:
        raise DamagedRecording(f"has more than {MAX_FILE_BYTES} bytes", path)
    try:
        return filesystem.read_bytes(path)
    except OSError as error:
        raise DamagedRecording(f"cannot be read: {error.strerror or 'missing or not a file'}", path) from error


def decode_nifti(raw: bytes) -> tuple[np.ndarray, tuple[float, float]]:
    """Decode the bytes of a `.nii` or `.nii.gz`: the upright array and (depth, lateral) spacing in mm.

    Axes of one element after the first two are left out. Raises ValueError and whatever nibabel does.
    """
    header, values = open_nifti(raw)
    lateral_mm, depth_mm = read_spacing(header, (0, 1))
    values = values.reshape([*values.shape[:2], *(size for size in values.shape[2:] if size > 1)], order="F")
    return values.swapaxes(0, 1), (depth_mm, lateral_mm)


def open_nifti(raw: bytes) -> tuple[nibabel.Nifti1Header, np.ndarray]:
    """Header and scaled values, axes as on disk, of a `.nii` or `.nii.gz`. Raises ValueError and whatever nibabel does.

    What the header claims is checked before anything is allocated, and little more than that is inflated.
    """
    header = read_header(raw)
    end = claimed_end(header)
    content = inflate(raw, end + MAX_EXTRA_BYTES) if raw[:2] == GZIP else raw
    if not end <= len(content) < end + MAX_EXTRA_BYTES:
        found = "many more" if len(content) > end else len(content)
        raise ValueError(f"the header claims {end} bytes, and {found} are there")
    # An image of nibabel's would do the same, copy the pixels, and keep extensions, which may be a patient's DICOM text.
    shape = header.get_data_shape()
    values = np.frombuffer(content, header.get_data_dtype(), math.prod(shape), header.get_data_offset())
    return header, apply_read_scaling(values.reshape(shape, order="F"), *header.get_slope_inter())


def inflate(packed: bytes, at_most: int = MAX_FILE_BYTES) -> bytes:
    """The first `at_most` bytes in a gzip file, of several members too; raises ValueError if it is cut off, and zlib's errors.

    What follows the last member is ignored, as nibabel does. ISA-L inflates float pixels three times as fast as zlib, and that
    was half of all the time of a picture of the release.
    """
    try:
        with igzip.IGzipFile(fileobj=io.BytesIO(packed), mode="rb") as stream:
            return stream.read(min(at_most, MAX_DEFLATE_RATIO * len(packed)))  # it allocates what it is asked for
    except (EOFError, igzip.BadGzipFile) as error:  # damage, which raises here too, or something else behind the last member
        parts = []
        while packed and GZIP.startswith(packed[:2]):
            member = isal_zlib.decompressobj(wbits=31)
            parts.append(member.decompress(packed, at_most))
            if not member.eof and len(parts[-1]) < at_most:
                raise ValueError(CUT_OFF) from error
            packed = member.unused_data.lstrip(b"\0")
        return b"".join(parts)[:at_most]


def read_header(raw: bytes) -> nibabel.Nifti1Header:
    """The header of a `.nii` or `.nii.gz`, or of its first PACKED_HEADER_BYTES; raises ValueError and what nibabel does.

    NIfTI-1 or -2, of either byte order.
    """
    block = raw[:HEADER_BYTES]
    if raw[:2] == GZIP:  # not by `inflate`, whose stream reads ahead and would meet the end of a part of a file
        block = isal_zlib.decompressobj(wbits=31).decompress(raw[:PACKED_HEADER_BYTES], HEADER_BYTES)
    is_second = 540 in (int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big"))
    kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
    size = kind.template_dtype.itemsize
    if len(block) < size:
        raise ValueError(CUT_OFF if raw[:2] == GZIP else f"{len(block)} bytes are no header")
    header = kind(block[:size], check=False)  # nibabel's checks would replace a missing spacing by 1 mm
    if header["sizeof_hdr"] != size or not bytes(header["magic"]).startswith(b"n+"):
        raise ValueError("it does not begin as one")
    if not header["pixdim"][1:3].all():
        raise ValueError("the pixel spacing is missing (0)")
    return header


def claimed_end(header: nibabel.Nifti1Header) -> int:
    """The byte after the pixels by the header's claim; raises ValueError for a claim that no echocardiogram makes."""
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    if dtype.kind not in "iuf":
        raise ValueError(f"the pixels are {dtype}, not plain numbers")
    num_values = math.prod(int(size) for size in shape)
    if min(shape, default=0) < 1 or num_values > MAX_VALUES:
        raise ValueError(f"the header claims shape {shape}")
    if not header.single_vox_offset <= offset <= MAX_EXTRA_BYTES:
        raise ValueError(f"the header claims that pixels begin at byte {offset}")
    return offset + num_values * dtype.itemsize


def read_spacing(header: nibabel.Nifti1Header, axes: tuple[int, int]) -> tuple[float, float]:
    """Pixel sizes along two axes in mm, whatever unit of length the header names; raises ValueError where they are none."""
    zooms = header.get_zooms()
    if max(axes) >= len(zooms):
        raise ValueError(f"shape {header.get_data_shape()} is no picture")
    unit_mm = UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    first, second = (abs(float(zooms[axis])) * unit_mm for axis in axes)  # some writers give directions by signs
    if not (math.isfinite(first) and math.isfinite(second) and min(first, second) > 0):
        raise ValueError(f"the pixel spacing {[first, second]} is not positive")
    return first, second


@dataclass(frozen=True, eq=False)
class Place:
    """How a file's array holds upright frames, so that masks go back onto the same grid.

    `order` is the array's axes as (time if there is one, depth, lateral, axes of one element).
    """

    header: nibabel.Nifti1Header
    order: tuple[int, ...]


def read_frames(raw: bytes) -> tuple[np.ndarray, tuple[float, float], Place]:
    """Decode any 2-D image or sequence: values [T,H,W] upright, (depth, lateral) spacing in mm, and their place.

    Axes of one element are passed over; of the others the first is lateral, the second depth, the third time, as in
    CAMUS. If the affine shows that the second runs along the world's x and the first does not, the two change places.
    The signs of an affine mean nothing: writers differ in which way the world's axes point. Raises ValueError and whatever
    nibabel does.
    """
    header, values = open_nifti(raw)
    wide = [axis for axis, size in enumerate(values.shape) if size > 1]
    if len(wide) not in (2, 3):
        raise ValueError(f"shape {values.shape} is neither an image nor a sequence of images")
    lateral, depth = wide[:2]
    if are_swapped(header, lateral, depth):
        lateral, depth = depth, lateral
    used = (*wide[2:], depth, lateral)
    order = used + tuple(axis for axis in range(values.ndim) if axis not in used)
    upright = values.transpose(order)
    upright = upright.reshape(-1, *upright.shape[len(wide) - 2 : len(wide)])
    return upright, read_spacing(header, (depth, lateral)), Place(header, order)


def are_swapped(header: nibabel.Nifti1Header, lateral: int, depth: int) -> bool:
    """True if the affine shows that the axis taken for depth runs along the world's x and the other one does not.

    `header` is repaired as nibabel does it: the affine and what is written need that, mere values do not.
    """
    header.check_fix()
    along = np.abs(header.get_best_affine()[:3, :3]).argmax(axis=0)  # the world's axis that each array axis runs along
    return depth < 3 and along[depth] == 0 and along[lateral] != 0


def check_axes(path: str) -> None:
    """Raise DamagedRecording if a file, known to be readable, has an affine by which its first axis is depth."""
    path = path if filesystem.exists(path) else path.removesuffix(".gz")
    if are_swapped(read_header(filesystem.read_bytes(path, PACKED_HEADER_BYTES)), 0, 1):
        raise DamagedRecording("has an affine by which its first axis is depth and its second lateral: swap the axes", path)


def write_frames(path: str, masks: np.ndarray, place: Place) -> None:
    """Write masks uint8 [T,H,W] where their images were: the same shape, affine and header; gzipped, whole or not at all."""
    shape = place.header.get_data_shape()
    disk = masks.reshape([shape[axis] for axis in place.order]).transpose(np.argsort(place.order))
    kind = nibabel.Nifti2Image if isinstance(place.header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = kind(disk, None, place.header, dtype=np.uint8)
    image.header.set_slope_inter(1, 0)
    image.header["vox_offset"] = 0  # right behind the header, for no extension stands between
    image.header["cal_min"] = image.header["cal_max"] = 0  # the picture's display range would show labels 0-3 as black
    filesystem.publish(path, pack(image, level=1))  # small anyway


def as_intensity(image: np.ndarray, path: str) -> np.ndarray:
    """An image as uint8 of its own; raises DamagedRecording where values are not finite or outside 0-255."""
    if image.dtype == np.uint8:
        return image.copy(order="C")
    low, high = image.min(), image.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DamagedRecording("has pixels that are not finite", path)
    if low < 0 or high > 255:
        raise DamagedRecording(f"has intensities {low:g} to {high:g}, outside 0 to 255", path)
    return np.rint(image).astype(np.uint8, order="C")


def as_labels(mask: np.ndarray, path: str) -> np.ndarray:
    """A mask as uint8 of its own; raises DamagedRecording where a label is not one of 0-3."""
    with np.errstate(invalid="ignore"):  # what no uint8 can hold is found by the comparison
        labels = mask.astype(np.uint8, order="C")
    if mask.dtype != np.uint8 and (labels != mask).any():
        known = np.isfinite(mask).all()
        raise DamagedRecording(f"has labels that are not {f'0 to {NUM_CLASSES - 1}' if known else 'finite'}", path)
    if labels.max() >= NUM_CLASSES:
        raise DamagedRecording(f"has label {labels.max()}, and only 0 to {NUM_CLASSES - 1} have a meaning", path)
    return labels


def write_nifti(path: str, array: np.ndarray, spacing_mm: tuple[float, float] | None) -> None:
    """Write an upright array ([H,W] or [H,W,T]) in CAMUS's axis order, gzipped, whole or not at all.

    If `spacing_mm` is None the header says that the unit is unknown, and a pixel counts as one of it.
    """
    depth, lateral = spacing_mm or (1.0, 1.0)
    image = nibabel.Nifti1Image(array.swapaxes(0, 1), np.diag([lateral, depth, 1.0, 1.0]))
    image.header.set_zooms((lateral, depth) + (1.0,) * (array.ndim - 2))
    image.header.set_xyzt_units("mm" if spacing_mm else "unknown")
    image.header["descrip"] = b"" if spacing_mm else b"pixel spacing unknown"
    filesystem.publish(path, pack(image))


def compress(raw: bytes, level: int = 6) -> bytes:
    """Gzip without a time stamp, so that equal pixels make equal files."""
    packer = zlib.compressobj(level=level, wbits=31)
    return packer.compress(raw) + packer.flush()


class _GzipStream(io.RawIOBase):
    """A file that nibabel writes an image to, gzipped as it comes: a long one is never in memory twice."""

    def __init__(self, level: int):
        self.packer, self.parts, self.waiting, self.place = zlib.compressobj(level=level, wbits=31), [], bytearray(), 0

    def write(self, data) -> None:
        self.waiting += data
        self.place += memoryview(data).nbytes
        if len(self.waiting) > MAX_EXTRA_BYTES:  # nibabel writes lines, and each call costs
            self.parts.append(self.packer.compress(self.waiting))
            self.waiting.clear()

    def tell(self) -> int:
        return self.place

    def seek(self, place: int, whence: int = 0) -> None:
        self.write(bytes(place - self.place))


def pack(image: nibabel.Nifti1Image, level: int = 6) -> bytes:
    """An image's bytes, gzipped as `compress` does."""
    stream = _GzipStream(level)
    image.to_stream(stream)
    return b"".join([*stream.parts, stream.packer.compress(stream.waiting), stream.packer.flush()])
