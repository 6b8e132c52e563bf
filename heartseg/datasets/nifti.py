"""NIfTI files to upright arrays and back; whatever is wrong with a file becomes a reason.

The only file that imports nibabel. On disk, axis 0 of an array is lateral and axis 1 is depth; here rows are depth and
columns are lateral, and the NIfTI order comes back only on writing.
"""

import io
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
MAX_FORM_CODE = 5  # of the kinds of affine that NIfTI names
UNITS_MM = {1: 1000.0, 3: 0.001}  # metres, micrometres; every other code is millimetres, or no unit named


class DamagedRecording(Exception):
    """A recording that cannot be used; the message is the reason that goes to quarantine."""

    def __init__(self, reason: str, file: str):
        super().__init__(reason)
        self.reason, self.file = reason, file


@dataclass(frozen=True, eq=False)
class Place:
    """How a file's array holds upright frames, so that masks go back onto the same grid.

    `order` is the array's axes as (time if there is one, depth, lateral, axes of one element); `axes` are depth and lateral.
    """

    header: nibabel.Nifti1Header
    affine: np.ndarray
    order: tuple[int, ...]
    axes: tuple[int, int]

    def plane(self) -> tuple[np.ndarray, np.ndarray]:
        """The affine [4,3] of (depth, lateral), and the two ends [2,3] of the rectangle of pixel centres in the world."""
        affine = self.affine[:, [*self.axes, 3]]
        height, width = (self.header.get_data_shape()[axis] - 1 for axis in self.axes)
        corners = np.array([affine @ corner for corner in ((0, 0, 1), (0, width, 1), (height, 0, 1), (height, width, 1))])
        return affine, np.array([corners.min(axis=0), corners.max(axis=0)])[:, :3]

    def has_affine(self) -> bool:
        """True if the header names an affine of its plane."""
        is_named = max(self.header["sform_code"], self.header["qform_code"]) > 0
        return is_named and max(self.axes) < 3 and self.affine[:3, self.axes].any(axis=0).all()

    def is_plain(self) -> bool:
        """True for what tools write for want of a real affine: spacings from the origin, in NIfTI's directions or in ITK's."""
        spacings = np.diag(self.affine)
        return np.array_equal(self.affine, np.diag(spacings)) and spacings[0] * spacings[1] > 0


def read_nifti(
    path: str, hashes: dict[str, str] | None = None, onto: Place | None = None
) -> tuple[np.ndarray, tuple[float, float], Place]:
    """Read and decode a NIfTI file as `decode_nifti` does, under this name or as `find_file` finds it.

    The SHA-256 of the file goes into `hashes`, by path. Raises DamagedRecording for whatever cannot be read.
    """
    path = find_file(path)
    raw = read_source(path)
    if hashes is not None:
        hashes[path] = filesystem.sha256(raw)
    try:
        return decode_nifti(raw, onto)
    except Exception as error:  # nibabel raises a dozen kinds for a damaged header
        raise DamagedRecording(f"is no readable NIfTI: {str(error) or type(error).__name__}", path) from error


def find_file(path: str) -> str:
    """A file of this name; if there is none, of this name in other letters (`.NII.GZ`), or without `.gz`."""
    if not filesystem.exists(path):
        name, folder = filesystem.last_part(path), path.rpartition("/")[0]
        names = filesystem.list_names(folder)
        for wanted in (name.lower(), name.lower().removesuffix(".gz")):
            for found in (found for found in names if found.lower() == wanted and found != name):  # not a dead link
                return filesystem.join(folder, found)
    return path


def read_source(path: str, most: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file of the source; raises DamagedRecording for what is not a file, or has more than `most` bytes."""
    # A pipe in a file's place would keep the reader waiting for ever.
    if not filesystem.is_uri(path) and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise DamagedRecording("cannot be read: not a file", path)
    if (filesystem.size_or_none(path) or 0) > most:
        raise DamagedRecording(f"has more than {most} bytes", path)
    try:
        return filesystem.read_bytes(path)
    except OSError as error:
        raise DamagedRecording(f"cannot be read: {error.strerror or 'missing or not a file'}", path) from error


def decode_nifti(raw: bytes, onto: Place | None = None) -> tuple[np.ndarray, tuple[float, float], Place]:
    """Decode a `.nii` or `.nii.gz`: scaled values [T,H,W] upright, (depth, lateral) spacing in mm, and their place.

    Axes of one element are skipped; of the others the first is lateral, the second depth, the third time, as in CAMUS. If
    the affine shows that the second runs along the world's x and the first does not, the two change places. The signs of an
    affine mean nothing: writers differ in which way the world's axes point. With `onto`, the place of the image that a mask
    is of, the mask lies as that image does (see `register`). Raises ValueError and whatever nibabel does.
    """
    header, values = open_nifti(raw)
    wide = [axis for axis, size in enumerate(values.shape) if size > 1]
    if len(wide) not in (2, 3):
        raise ValueError(f"shape {values.shape} is neither an image nor a sequence of images")
    lateral, depth = wide[:2]
    affine = affine_of(header)
    along = np.abs(affine[:3, :3]).argmax(axis=0)  # the world's axis that each array axis runs along
    if onto.axes[0] < onto.axes[1] if onto else depth < 3 and along[depth] == 0 and along[lateral] != 0:
        lateral, depth = depth, lateral
    used = (*wide[2:], depth, lateral)
    place = Place(header, affine, used + tuple(axis for axis in range(values.ndim) if axis not in used), (depth, lateral))
    upright = values.transpose(place.order)
    upright = upright.reshape(-1, *upright.shape[len(wide) - 2 : len(wide)])
    return register(upright, place, onto) if onto else upright, read_spacing(header, (depth, lateral)), place


def register(masks: np.ndarray, place: Place, onto: Place) -> np.ndarray:
    """Masks [T,H,W] turned to lie on their image as the affines of both files show.

    Array lies on array as it is if the affines agree in direction, or if one of them is missing or plain. Raises ValueError if
    two real ones disagree and do not put mask and image on the same rectangle of the world.
    """
    is_same = place.axes == onto.axes and np.array_equal(place.affine, onto.affine)
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
    raise ValueError("its affine and that of its image differ in direction, and in the place that they give it")


def open_nifti(raw: bytes) -> tuple[nibabel.Nifti1Header, np.ndarray]:
    """Header and scaled values, axes as on disk, of a `.nii` or `.nii.gz`. Raises ValueError and whatever nibabel does.

    What the header claims is checked before anything is allocated, and little more than that is inflated.
    """
    if raw[:2] == GZIP:

        def read(stream: io.BufferedIOBase) -> tuple[nibabel.Nifti1Header, bytes]:
            header = read_header(block := stream.read(HEADER_BYTES))
            left = min(claimed_end(header) + MAX_EXTRA_BYTES, MAX_DEFLATE_RATIO * len(raw))
            return header, block + stream.read(left)

        header, content = unpack(raw, read)
    else:
        header, content = read_header(raw[:HEADER_BYTES]), raw
    end = claimed_end(header)
    if not end <= len(content) < end + MAX_EXTRA_BYTES:
        found = "many more" if len(content) > end else len(content)
        raise ValueError(f"the header claims {end} bytes, and {found} are there")
    # An image of nibabel's would do the same, copy the pixels, and keep extensions, which may be a patient's DICOM text.
    shape = header.get_data_shape()
    values = np.frombuffer(content, header.get_data_dtype(), math.prod(shape), header.get_data_offset())
    return header, apply_read_scaling(values.reshape(shape, order="F"), *header.get_slope_inter())


def unpack(packed: bytes, read: Callable[[io.BufferedIOBase], Any]) -> Any:
    """What `read` takes from the stream that a gzip file holds, of several members too; what follows the last is ignored.

    nibabel ignores it as well. ISA-L inflates float pixels three times as fast as zlib, and that was half of all the time of a
    picture of the release. A read allocates what it asks for. Raises ValueError for a file that is cut off, or zlib's errors.
    """
    try:
        with igzip.IGzipFile(fileobj=io.BytesIO(packed), mode="rb") as stream:
            return read(stream)
    except (EOFError, igzip.BadGzipFile) as error:  # damage, which raises here too, or something else behind the last member
        parts = []
        while packed and GZIP.startswith(packed[:2]):
            member = isal_zlib.decompressobj(wbits=31)
            parts.append(member.decompress(packed, MAX_FILE_BYTES))
            if not member.eof:
                raise ValueError("the gzip stream is cut off") from error
            packed = member.unused_data.lstrip(b"\0")
        return read(io.BytesIO(b"".join(parts)))


def read_header(block: bytes) -> nibabel.Nifti1Header:
    """The header in a file's first bytes, NIfTI-1 or -2 of either byte order; raises ValueError and what nibabel does."""
    is_second = 540 in (int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big"))
    kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
    size = kind.template_dtype.itemsize
    if len(block) < size:
        raise ValueError(f"{len(block)} bytes are no header")
    header = kind(block[:size], check=False)  # nibabel's checks would replace a missing spacing by 1 mm
    if header["sizeof_hdr"] != size or not bytes(header["magic"]).startswith(b"n+"):
        raise ValueError("it does not begin as one")
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
    """Pixel sizes along two axes in mm, whatever unit of length the header names; raises ValueError if it has none."""
    zooms = header.get_zooms()
    unit_mm = UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    first, second = (abs(float(zooms[axis])) * unit_mm for axis in axes)  # some writers give directions by signs
    if not (math.isfinite(first) and math.isfinite(second) and min(first, second) > 0):
        raise ValueError(f"the pixel spacing {[first, second]} is not positive")
    return first, second


def affine_of(header: nibabel.Nifti1Header) -> np.ndarray:
    """The affine [4,4] of a header as nibabel reads it; a header without an sform is repaired first, which is slow."""
    if 0 < header["sform_code"] <= MAX_FORM_CODE:
        return header.get_sform()
    header.check_fix()
    return header.get_best_affine()


def write_frames(path: str, masks: np.ndarray, place: Place) -> None:
    """Write masks uint8 [T,H,W] where their images were: the same shape, affine and header; gzipped, whole or not at all."""
    place.header.check_fix()  # as nibabel repairs it: reading does not need that, and it takes as long as decoding
    shape = place.header.get_data_shape()
    disk = masks.reshape([shape[axis] for axis in place.order]).transpose(np.argsort(place.order))
    kind = nibabel.Nifti2Image if isinstance(place.header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = kind(disk, None, place.header, dtype=np.uint8)
    image.header.set_slope_inter(1, 0)
    image.header["vox_offset"] = 0  # right behind the header, for no extension stands between
    image.header["cal_min"] = image.header["cal_max"] = 0  # the picture's display range would show labels 0-3 as black
    filesystem.publish(path, pack(image, level=1))  # small anyway


def as_labels(mask: np.ndarray, path: str) -> np.ndarray:
    """A mask as uint8 of its own, what is within 0.001 of a label rounded to it; raises DamagedRecording that names others."""
    if mask.dtype == np.uint8:
        labels = mask.astype(np.uint8, order="C")
    else:
        with np.errstate(invalid="ignore"):  # what no uint8 can hold is found by the comparison
            labels = np.rint(mask).astype(np.uint8, order="C")
            wrong = np.unique(mask[~(np.abs(mask - labels) <= 1e-3)])
        if len(wrong):
            named = ", ".join(f"{value:g}" for value in wrong[:5]) + (", …" if len(wrong) > 5 else "")
            raise DamagedRecording(f"has labels that are not 0 to {NUM_CLASSES - 1}: {named}", path)
    if labels.max() >= NUM_CLASSES:
        raise DamagedRecording(f"has label {labels.max()}, and only 0 to {NUM_CLASSES - 1} have a meaning", path)
    return labels


def write_nifti(path: str, array: np.ndarray, spacing_mm: tuple[float, float] | None) -> None:
    """Write an upright image [H,W] or sequence [T,H,W] in CAMUS's axis order, gzipped, whole or not at all.

    If `spacing_mm` is None the header says that the unit is unknown, and a pixel counts as one of it.
    """
    depth, lateral = spacing_mm or (1.0, 1.0)
    disk = array[0] if len(array) == 1 else array  # a sequence of one frame is a still
    image = nibabel.Nifti1Image(disk.T, np.diag([lateral, depth, 1.0, 1.0]))
    image.header.set_zooms((lateral, depth) + (1.0,) * (disk.ndim - 2))
    image.header.set_xyzt_units("mm" if spacing_mm else "unknown")
    image.header["descrip"] = b"" if spacing_mm else b"pixel spacing unknown"
    filesystem.publish(path, pack(image))


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
    """An image's bytes, gzipped without a time stamp, so that equal pixels make equal files."""
    stream = _GzipStream(level)
    image.to_stream(stream)
    return b"".join([*stream.parts, stream.packer.compress(stream.waiting), stream.packer.flush()])
