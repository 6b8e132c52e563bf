"""Reads and writes the official CAMUS folder tree; hands on upright `Recording`s.

The only file that knows nibabel. On disk, axis 0 of an array is lateral and axis 1 is depth; here rows are depth and
columns are lateral, and the NIfTI order comes back only on writing.
"""

import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import nibabel
import numpy as np

from heartseg import storage
from heartseg.errors import UserError
from heartseg.labels import NUM_CLASSES, PHASES, VIEWS, Phase, View

IMAGES_FOLDER = "database_nifti"
SPLIT_FOLDER = "database_split"
# A tree with this file beside database_nifti/ was made by phantom.py.
PHANTOM_NOTE = "phantom.json"
SPLIT_FILES = {"train": "subgroup_training.txt", "val": "subgroup_validation.txt", "test": "subgroup_testing.txt"}
PATIENT_PATTERN = re.compile(r"patient\d+")
# A still of the release has under 10 MB; a header that claims more than this is damaged, not a picture.
MAX_FILE_BYTES = 2**30


class DamagedRecording(Exception):
    """A recording that cannot be used; the message is the reason that goes to quarantine."""

    def __init__(self, reason: str, file: str):
        super().__init__(reason)
        self.reason, self.file = reason, file


@dataclass(frozen=True)
class Info:
    """What an `Info_*.cfg` says of one view; a field is None where the file does not say it.

    `ed` and `es` count frames from 1; `ef` is in percent, by the `camus` convention unless `ef_convention` says other.
    """

    ed: int | None = None
    es: int | None = None
    num_frames: int | None = None
    sex: str | None = None
    age: int | None = None
    quality: str | None = None
    ef: float | None = None
    frame_rate: float | None = None
    ef_convention: str = "camus"


@dataclass(frozen=True, eq=False)
class Recording:
    """One annotated frame, upright.

    `image` is uint8 [H,W], `mask` uint8 [H,W] with labels 0-3 (None where nobody has drawn one), `spacing_mm` is
    (depth, lateral) for one pixel. `frame` counts from 1 and is None where nothing tells it.
    """

    patient: str
    view: View
    phase: Phase | None
    frame: int | None
    image: np.ndarray
    mask: np.ndarray | None
    spacing_mm: tuple[float, float]
    info: Info | None = None


def find_patients(source: str) -> list[str]:
    """Names of the patients below `source`, sorted; raises UserError for a folder that holds none."""
    if not storage.exists(source):
        raise UserError(f"The source {source} does not exist: give the folder that holds {IMAGES_FOLDER}/.")
    images = storage.join(source, IMAGES_FOLDER)
    names = storage.list_names(images) if storage.exists(images) else []
    patients = [name for name in names if PATIENT_PATTERN.fullmatch(name)]
    if not patients:
        raise UserError(f"{source} holds no {IMAGES_FOLDER}/patient*/ folder: give the folder of the CAMUS release.")
    return patients


def read_groups(source: str) -> dict[str, list[str]]:
    """The release's own split: group (`train`, `val`, `test`) to patients; empty where there are no split files."""
    groups = {}
    for group, name in SPLIT_FILES.items():
        path = storage.join(source, SPLIT_FOLDER, name)
        if storage.exists(path):
            groups[group] = sorted(storage.read_bytes(path).decode().split())
    return groups


def recording_path(source: str, patient: str, view: View, phase: Phase, suffix: str = "") -> str:
    """Path of a still's NIfTI file; `suffix` is `_gt` for its mask."""
    return storage.join(source, IMAGES_FOLDER, patient, f"{patient}_{view}_{phase}{suffix}.nii.gz")


def read_still(source: str, patient: str, view: View, phase: Phase, digest=None) -> Recording:
    """Read one ED or ES image with its mask and cfg; raises DamagedRecording with the reason and the file.

    Every byte read is fed to `digest` (a hashlib object) where one is given.
    """
    image_path = recording_path(source, patient, view, phase)
    mask_path = recording_path(source, patient, view, phase, "_gt")
    image, spacing_mm = read_nifti(image_path, digest)
    mask, _ = read_nifti(mask_path, digest)
    if image.ndim != 2:
        raise DamagedRecording(f"a still has 2 axes, this has shape {image.shape}", image_path)
    if mask.shape != image.shape:
        raise DamagedRecording(f"the mask's shape {mask.shape} is not the image's {image.shape}", mask_path)
    info = read_info(source, patient, view, digest)
    frame = getattr(info, phase.lower()) if info else None
    return Recording(patient, view, phase, frame, as_intensity(image, image_path), as_labels(mask, mask_path), spacing_mm, info)


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


def read_info(source: str, patient: str, view: View, digest=None) -> Info | None:
    """Read `Info_2CH.cfg` or `Info_4CH.cfg`; None where there is none. Unknown lines are passed over."""
    path = storage.join(source, IMAGES_FOLDER, patient, f"Info_{view}.cfg")
    if not storage.exists(path):
        return None
    try:
        raw = storage.read_bytes(path)
    except OSError as error:
        raise DamagedRecording(f"cannot be read: {error.strerror or 'not a file'}", path) from error
    if digest is not None:
        digest.update(hashlib.sha256(raw).digest())
    said = dict(line.split(":", 1) for line in raw.decode(errors="replace").splitlines() if ":" in line)
    said = {key.strip(): value.strip() for key, value in said.items()}

    def number(key: str, kind: type):
        try:
            value = float(said[key])
        except (KeyError, ValueError):
            return None
        # What no frame, age or percentage can be is a slip of the pen, and no column holds it.
        return kind(value) if abs(value) < 2**31 else None

    return Info(
        ed=number("ED", int),
        es=number("ES", int),
        num_frames=number("NbFrame", int),
        sex=said.get("Sex"),
        age=number("Age", int),
        quality=said.get("ImageQuality"),
        ef=number("EF", float),
        frame_rate=number("FrameRate", float),
        ef_convention=said.get("EFConvention", "camus"),
    )


def stills_of(patient_views=VIEWS) -> Iterator[tuple[View, Phase]]:
    """The four stills that a patient has, in the order in which shards hold them."""
    return ((view, phase) for view in patient_views for phase in PHASES)


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


def write_info(source: str, patient: str, view: View, info: Info) -> None:
    """Write a cfg as the release does, with one more line where the EF is not by its convention."""
    lines = {
        "ED": info.ed, "ES": info.es, "NbFrame": info.num_frames, "Sex": info.sex, "Age": info.age,
        "ImageQuality": info.quality, "EF": info.ef, "FrameRate": info.frame_rate,
    }  # fmt: skip
    if info.ef_convention != "camus":
        lines["EFConvention"] = info.ef_convention
    text = "".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None)
    storage.publish(storage.join(source, IMAGES_FOLDER, patient, f"Info_{view}.cfg"), text.encode())


def write_groups(source: str, groups: dict[str, list[str]]) -> None:
    """Write the split files of the release: one patient a line."""
    for group, patients in groups.items():
        path = storage.join(source, SPLIT_FOLDER, SPLIT_FILES[group])
        storage.publish(path, "".join(f"{patient}\n" for patient in patients).encode())


def dataset_name(source: str, patients: list[str]) -> str:
    """`phantom` where the tree says so, `CAMUS` for the release's own patient names, `other` for anybody else's."""
    if storage.exists(storage.join(source, PHANTOM_NOTE)):
        return "phantom"
    is_camus = all(re.fullmatch(r"patient0\d{3}", name) and name <= "patient0500" for name in patients)
    return "CAMUS" if is_camus else "other"


def list_files(source: str, patient: str) -> list[list]:
    """Names and sizes of a patient's files: what tells a changed source without reading it."""
    folder = storage.join(source, IMAGES_FOLDER, patient)
    return [[name, storage.size_or_none(storage.join(folder, name))] for name in storage.list_names(folder)]
