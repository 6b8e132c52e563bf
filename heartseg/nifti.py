"""NIfTI files to upright arrays and back; whatever is wrong with a file becomes a reason.

The only file that knows nibabel. On disk, axis 0 of an array is lateral and axis 1 is depth; here rows are depth and
columns are lateral, and the NIfTI order comes back only on writing.
"""

import hashlib
import zlib

import nibabel
import numpy as np

from heartseg import storage
from heartseg.labels import NUM_CLASSES

# A still of the release has under 10 MB; a header that claims more than this is damaged, not a picture.
MAX_FILE_BYTES = 2**30


class DamagedRecording(Exception):
    """A recording that cannot be used; the message is the reason that goes to quarantine."""

    def __init__(self, reason: str, file: str):
        super().__init__(reason)
        self.reason, self.file = reason, file


def read_nifti(path: str, digest=None) -> tuple[np.ndarray, tuple[float, float]]:
    """Read a NIfTI file; returns the upright array ([H,W] or [H,W,T]) and (depth, lateral) spacing in mm.

    `scl_slope` and `scl_inter` are applied. Raises DamagedRecording for whatever cannot be read.
    """
    try:
        raw = storage.read_bytes(path)
    except OSError as error:
        raise DamagedRecording(f"cannot be read: {error.strerror or 'missing or not a file'}", path) from error
    if digest is not None:
        digest.update(hashlib.sha256(raw).digest())
    try:
        return decode_nifti(raw)
    except DamagedRecording:
        raise
    except Exception as error:  # nibabel raises a dozen kinds for a damaged header
        raise DamagedRecording(f"is no readable NIfTI: {str(error) or type(error).__name__}", path) from error


def decode_nifti(raw: bytes) -> tuple[np.ndarray, tuple[float, float]]:
    """Decode the bytes of a `.nii` or `.nii.gz`: the upright array and (depth, lateral) spacing in mm."""
    if raw[:2] == b"\x1f\x8b":
        raw = inflate(raw)
    picture = nibabel.Nifti1Image.from_bytes(raw)
    if picture.get_data_dtype().kind not in "iuf":
        raise ValueError(f"the pixels are {picture.get_data_dtype()}, not plain numbers")
    # Sizes from the header are checked against the bytes that are there before anything is allocated.
    needed = int(np.prod(picture.shape, dtype=np.float64)) * picture.get_data_dtype().itemsize
    if needed == 0 or needed > len(raw):
        raise ValueError(f"the header claims shape {picture.shape}, {needed} bytes, and {len(raw)} are there")
    array = np.asanyarray(picture.dataobj)
    spacing = [float(value) for value in picture.header.get_zooms()[:2]]
    if len(spacing) < 2 or not all(np.isfinite(spacing)) or min(spacing) <= 0:
        raise ValueError(f"the pixel spacing {spacing} is not positive")
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    return array.swapaxes(0, 1), (spacing[1], spacing[0])


def inflate(packed: bytes) -> bytes:
    """The content of a gzip file, of several members too; never more than MAX_FILE_BYTES. Raises ValueError."""
    content = b""
    while packed:
        inflater = zlib.decompressobj(wbits=31)
        content += inflater.decompress(packed, max(1, MAX_FILE_BYTES - len(content)))
        if not inflater.eof:
            raise ValueError("the gzip stream is cut off or too large")
        packed = inflater.unused_data.lstrip(b"\0")  # some writers pad the end with zeros
    return content


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


def compress(raw: bytes) -> bytes:
    """Gzip without a time stamp, so that equal pixels make equal files."""
    packer = zlib.compressobj(level=6, wbits=31)
    return packer.compress(raw) + packer.flush()
