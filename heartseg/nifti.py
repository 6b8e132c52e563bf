"""NIfTI files to upright arrays and back; whatever is wrong with a file becomes a reason.

The only file that knows nibabel. On disk, axis 0 of an array is lateral and axis 1 is depth; here rows are depth and
columns are lateral, and the NIfTI order comes back only on writing.
"""

import hashlib
import math
import os
import zlib
from dataclasses import dataclass

import nibabel
import numpy as np

from heartseg import storage
from heartseg.labels import NUM_CLASSES

# A sequence of the release has under 80 million values; a header that claims more than this is damaged, not a picture.
MAX_VALUES = 2**27
MAX_FILE_BYTES = 2**30
HEADER_BYTES = 540  # of a NIfTI-2; a NIfTI-1 has 348
MAX_EXTRA_BYTES = 2**20  # what may stand before the pixels, and what may follow them


class DamagedRecording(Exception):
    """A recording that cannot be used; the message is the reason that goes to quarantine."""

    def __init__(self, reason: str, file: str):
        super().__init__(reason)
        self.reason, self.file = reason, file


def read_nifti(path: str, digest=None) -> tuple[np.ndarray, tuple[float, float]]:
    """Read a NIfTI file; returns the upright array ([H,W] or [H,W,T]) and (depth, lateral) spacing in mm.

    `scl_slope` and `scl_inter` are applied. Raises DamagedRecording for whatever cannot be read.
    """
    raw = read_source(path)
    if digest is not None:
        digest.update(hashlib.sha256(raw).digest())
    try:
        return decode_nifti(raw)
    except DamagedRecording:
        raise
    except Exception as error:  # nibabel raises a dozen kinds for a damaged header
        raise DamagedRecording(f"is no readable NIfTI: {str(error) or type(error).__name__}", path) from error


def read_source(path: str) -> bytes:
    """The bytes of a file of the source; raises DamagedRecording for what is no file, or larger than any may be."""
    # A pipe in a file's place would keep the reader waiting for ever.
    if not storage.is_uri(path) and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise DamagedRecording("cannot be read: not a file", path)
    if (storage.size_or_none(path) or 0) > MAX_FILE_BYTES:
        raise DamagedRecording(f"has more than {MAX_FILE_BYTES} bytes", path)
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise DamagedRecording(f"cannot be read: {error.strerror or 'missing or not a file'}", path) from error


def decode_nifti(raw: bytes) -> tuple[np.ndarray, tuple[float, float]]:
    """Decode the bytes of a `.nii` or `.nii.gz`: the upright array and (depth, lateral) spacing in mm."""
    picture = open_nifti(raw)
    array = np.asanyarray(picture.dataobj)
    spacing = check_spacing(picture.header.get_zooms()[:2])
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    return array.swapaxes(0, 1), (spacing[1], spacing[0])


def open_nifti(raw: bytes):
    """The nibabel image in the bytes of a `.nii` or `.nii.gz`. Raises ValueError and whatever nibabel does.

    What the header claims is checked before anything is allocated, and little more than that is inflated.
    """
    packed = raw[:2] == b"\x1f\x8b"
    block = inflate(raw, HEADER_BYTES) if packed else raw[:HEADER_BYTES]
    is_second = 540 in (int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big"))
    kind = nibabel.Nifti2Image if is_second else nibabel.Nifti1Image
    end = claimed_end(kind.header_class, block)
    content = inflate(raw, end + MAX_EXTRA_BYTES) if packed else raw
    if not end <= len(content) < end + MAX_EXTRA_BYTES:
        there = "many more" if len(content) > end else len(content)
        raise ValueError(f"the header claims {end} bytes, and {there} are there")
    return kind.from_bytes(content)


def inflate(packed: bytes, at_most: int) -> bytes:
    """The first `at_most` bytes in a gzip file, of several members too; raises ValueError where it is cut off."""
    content = b""
    while packed and len(content) < at_most:
        inflater = zlib.decompressobj(wbits=31)
        content += inflater.decompress(packed, at_most - len(content))
        if not inflater.eof and len(content) < at_most:
            raise ValueError("the gzip stream is cut off")
        packed = inflater.unused_data.lstrip(b"\0")  # some writers pad the end with zeros
    return content


def claimed_end(kind: type, block: bytes) -> int:
    """Where the pixels end by the header in a file's first bytes; raises ValueError for what no picture claims."""
    block = block[: kind.template_dtype.itemsize]
    header = kind(block)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"the pixels are {dtype}, not plain numbers")
    num_values = math.prod(int(size) for size in shape)
    if min(shape, default=0) < 1 or num_values > MAX_VALUES:
        raise ValueError(f"the header claims shape {shape}")
    if not kind(block, check=False)["pixdim"][1:3].all():  # nibabel's check makes 1 mm of a missing spacing
        raise ValueError("the pixel spacing is missing (0)")
    offset = int(header.get_data_offset())
    if not 0 <= offset <= MAX_EXTRA_BYTES:
        raise ValueError(f"the header claims that pixels begin at byte {offset}")
    return max(offset, len(block)) + num_values * dtype.itemsize


def check_spacing(zooms) -> list[float]:
    """Two pixel sizes as floats; raises ValueError where they are no sizes."""
    spacing = [float(value) for value in zooms]
    if len(spacing) < 2 or not all(np.isfinite(spacing)) or min(spacing) <= 0:
        raise ValueError(f"the pixel spacing {spacing} is not positive")
    return spacing


@dataclass(frozen=True, eq=False)
class Place:
    """How a file's array holds upright frames, so that masks go back onto the very grid they came from.

    `order` is the array's axes as (time where there is one, depth, lateral, axes of one element).
    """

    header: nibabel.Nifti1Header
    affine: np.ndarray
    shape: tuple[int, ...]
    order: tuple[int, ...]


def read_frames(raw: bytes) -> tuple[np.ndarray, tuple[float, float], Place]:
    """Decode any 2-D image or sequence: values [T,H,W] upright, (depth, lateral) spacing in mm, and their place.

    Axes of one element are passed over; of the others the first is lateral, the second depth, the third time, as CAMUS
    has it. Where the affine says that the second runs along the world's x and the first does not, the two change places.
    The signs of an affine say nothing: writers differ in which way the world's axes point. Raises ValueError and whatever
    nibabel does.
    """
    picture = open_nifti(raw)
    wide = [axis for axis, size in enumerate(picture.shape) if size > 1]
    if len(wide) not in (2, 3):
        raise ValueError(f"shape {picture.shape} is neither an image nor a sequence of images")
    lateral, depth = wide[:2]
    if depth < 3:
        along = np.abs(picture.affine[:3, :3]).argmax(axis=0)  # the world's axis that each array axis runs along
        if along[depth] == 0 and along[lateral] != 0:
            lateral, depth = depth, lateral
    used = (*wide[2:], depth, lateral)
    order = used + tuple(axis for axis in range(len(picture.shape)) if axis not in used)
    zooms = picture.header.get_zooms()
    spacing_mm = tuple(check_spacing([zooms[depth], zooms[lateral]]))
    values = np.asanyarray(picture.dataobj).transpose(order)
    values = values.reshape(-1, *values.shape[len(wide) - 2 : len(wide)])
    header = picture.header.copy()
    header.extensions.clear()  # some converters keep a whole DICOM header there, the patient's name included
    return values, spacing_mm, Place(header, picture.affine, picture.shape, order)


def write_frames(path: str, masks: np.ndarray, place: Place) -> None:
    """Write masks uint8 [T,H,W] where their images were: the same shape, affine and header; gzipped, whole or not at all."""
    disk = masks.reshape([place.shape[axis] for axis in place.order])
    disk = np.ascontiguousarray(disk.transpose(np.argsort(place.order)))
    kind = nibabel.Nifti2Image if place.header["sizeof_hdr"] == 540 else nibabel.Nifti1Image
    picture = kind(disk, place.affine, place.header)
    picture.set_data_dtype(np.uint8)
    picture.header.set_slope_inter(1, 0)
    # The display range was the picture's: a viewer would show labels 0-3 as black.
    picture.header["cal_min"], picture.header["cal_max"] = 0, 0
    storage.publish(path, compress(picture.to_bytes(), level=1))  # a mask is small anyway


def as_intensity(image: np.ndarray, path: str) -> np.ndarray:
    """An image as uint8; raises DamagedRecording where values are not finite or outside 0-255."""
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if not np.isfinite(image).all():
        raise DamagedRecording("has pixels that are not finite", path)
    if image.min() < 0 or image.max() > 255:
        raise DamagedRecording(f"has intensities {image.min():g} to {image.max():g}, outside 0 to 255", path)
    return np.ascontiguousarray(np.rint(image).astype(np.uint8))


def as_labels(mask: np.ndarray, path: str) -> np.ndarray:
    """A mask as uint8; raises DamagedRecording where a label is not one of 0-3."""
    if mask.dtype != np.uint8:
        if not np.isfinite(mask).all():
            raise DamagedRecording("has labels that are not finite", path)
        labels = np.clip(mask, 0, 255).astype(np.uint8)
        if (labels != mask).any():
            raise DamagedRecording(f"has labels that are not 0 to {NUM_CLASSES - 1}", path)
        mask = labels
    if mask.max() >= NUM_CLASSES:
        raise DamagedRecording(f"has label {mask.max()}, and only 0 to {NUM_CLASSES - 1} have a meaning", path)
    return np.ascontiguousarray(mask)


def write_nifti(path: str, array: np.ndarray, spacing_mm: tuple[float, float], like=None) -> None:
    """Write an upright array ([H,W] or [H,W,T]) in CAMUS's axis order, gzipped, whole or not at all.

    `like` is a nibabel image whose affine and header are kept (the input that a mask belongs to).
    """
    disk = np.ascontiguousarray(array.swapaxes(0, 1))
    if like is None:
        affine = np.diag([spacing_mm[1], spacing_mm[0], 1.0, 1.0])
        picture = nibabel.Nifti1Image(disk, affine)
        picture.header.set_zooms((spacing_mm[1], spacing_mm[0]) + (1.0,) * (disk.ndim - 2))
    else:
        picture = nibabel.Nifti1Image(disk.reshape(like.shape), like.affine, like.header)
        picture.set_data_dtype(disk.dtype)
        picture.header.set_slope_inter(1, 0)
    storage.publish(path, compress(picture.to_bytes()))


def compress(raw: bytes, level: int = 6) -> bytes:
    """Gzip without a time stamp, so that equal pixels make equal files."""
    packer = zlib.compressobj(level=level, wbits=31)
    return packer.compress(raw) + packer.flush()
