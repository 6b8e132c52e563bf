"""Reads and writes the official CAMUS folder tree; hands on upright `Recording`s."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from heartseg import storage
from heartseg.errors import UserError
from heartseg.labels import PHASES, VIEWS, Phase, View
from heartseg.nifti import DamagedRecording, as_intensity, as_labels, read_nifti, read_source

IMAGES_FOLDER = "database_nifti"
SPLIT_FOLDER = "database_split"
# A tree with this file beside database_nifti/ was made by phantom.py.
PHANTOM_NOTE = "phantom.json"
SPLIT_FILES = {"train": "subgroup_training.txt", "val": "subgroup_validation.txt", "test": "subgroup_testing.txt"}
# The release's stills have under 2 million.
MAX_STILL_PIXELS = 2**25
PATIENT_PATTERN = re.compile(r"patient\d+")


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
    if image.size > MAX_STILL_PIXELS:
        raise DamagedRecording(f"a still of shape {image.shape} is none", image_path)
    if mask.shape != image.shape:
        raise DamagedRecording(f"the mask's shape {mask.shape} is not the image's {image.shape}", mask_path)
    info = read_info(source, patient, view, digest)
    frame = getattr(info, phase.lower()) if info else None
    return Recording(patient, view, phase, frame, as_intensity(image, image_path), as_labels(mask, mask_path), spacing_mm, info)


def read_info(source: str, patient: str, view: View, digest=None) -> Info | None:
    """Read `Info_2CH.cfg` or `Info_4CH.cfg`; None where there is none. Unknown lines are passed over."""
    path = storage.join(source, IMAGES_FOLDER, patient, f"Info_{view}.cfg")
    if not storage.exists(path):
        return None
    raw = read_source(path)
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
