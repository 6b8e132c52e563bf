"""Reads and writes the official CAMUS folder tree; hands on upright `Recording`s."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from heartseg.datasets.nifti import DamagedRecording, as_intensity, as_labels, read_nifti, read_source
from heartseg.errors import UserError, require
from heartseg.labels import ENDO, PHASES, VIEWS, Phase, View
from heartseg.storage import filesystem

IMAGES_FOLDER = "database_nifti"
SPLIT_FOLDER = "database_split"
# A tree with this file beside database_nifti/ was made by phantom.py.
PHANTOM_NOTE = "phantom.json"
HALF_SEQUENCE = "half_sequence"  # stands in a phase's place in a file's name
SPLIT_FILES = {"train": "subgroup_training.txt", "val": "subgroup_validation.txt", "test": "subgroup_testing.txt"}
# The release's stills have under 2 million.
MAX_STILL_PIXELS = 2**25
MAX_FRAMES = 2**10  # half a beat of the release has up to 42
PATIENT_PATTERN = re.compile(r"patient\d+")
UNREADABLE = re.compile("[\ud800-\udfff]")  # how Python holds the bytes of a name that are no UTF-8


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
    (depth, lateral) for one pixel. `frame` counts from 1 and is None where nothing tells it. Where nothing tells them,
    `view` and `phase` are None too: a frame between ED and ES has no phase.
    """

    patient: str
    view: View | None
    phase: Phase | None
    frame: int | None
    image: np.ndarray
    mask: np.ndarray | None
    spacing_mm: tuple[float, float]
    info: Info | None = None


# Image, mask and spacing of a Recording whose files are still to be read.
NOTHING_YET = (np.empty((0, 0), np.uint8), None, (1.0, 1.0))


def find_patients(source: str) -> list[str]:
    """Names of the patients below `source`, sorted; raises UserError for a folder that holds none."""
    if not filesystem.exists(source):
        raise UserError(f"The source {source} does not exist: give the folder that holds {IMAGES_FOLDER}/.")
    images = filesystem.join(source, IMAGES_FOLDER)
    names = filesystem.list_names(images) if filesystem.exists(images) else []
    patients = [name for name in names if PATIENT_PATTERN.fullmatch(name)]
    if not patients:
        raise UserError(f"{source} holds no {IMAGES_FOLDER}/patient*/ folder: give the folder of the CAMUS release.")
    return patients


def read_groups(source: str) -> dict[str, list[str]]:
    """The release's own split: group (`train`, `val`, `test`) to patients; empty where there are no split files.

    Raises UserError for a split file that is no text.
    """
    groups = {}
    for group, name in SPLIT_FILES.items():
        path = filesystem.join(source, SPLIT_FOLDER, name)
        if filesystem.exists(path):
            try:
                groups[group] = sorted(filesystem.read_bytes(path).decode("utf-8-sig").split())  # Windows puts a mark before it
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read as UTF-8 text: save it as that, one patient a line.") from error
    return groups


def recording_path(source: str, patient: str, view: View, phase: Phase | str, suffix: str = "") -> str:
    """Path of the NIfTI file of a still, or of a sequence (HALF_SEQUENCE for `phase`); `suffix` is `_gt` for the mask."""
    return filesystem.join(source, IMAGES_FOLDER, patient, f"{patient}_{view}_{phase}{suffix}.nii.gz")


def read_still(source: str, patient: str, view: View, phase: Phase, hashes: dict[str, str] | None = None) -> Recording:
    """Read one ED or ES image with its mask and cfg; raises DamagedRecording with the reason and the file.

    The SHA-256 of each file read goes into `hashes`, by path.
    """
    paths = [recording_path(source, patient, view, phase, suffix) for suffix in ("", "_gt")]
    still = read_pair(*paths, Recording(patient, view, phase, None, *NOTHING_YET), hashes)
    info = read_info(source, patient, view, hashes)
    return replace(still, frame=getattr(info, phase.lower()) if info else None, info=info)


def read_pair(image_path: str, mask_path: str, about: Recording, hashes: dict[str, str] | None = None) -> Recording:
    """`about` with the pixels and the spacing of two-dimensional files; raises DamagedRecording."""
    image, spacing_mm = read_nifti(image_path, hashes)
    mask, _ = read_nifti(mask_path, hashes)
    if image.ndim != 2:
        raise DamagedRecording(f"a still has 2 axes, this has shape {image.shape}", image_path)
    check_shapes(image, mask, image_path, mask_path)
    return replace(about, image=as_intensity(image, image_path), mask=as_labels(mask, mask_path), spacing_mm=spacing_mm)


def check_shapes(image: np.ndarray, mask: np.ndarray, image_path: str, mask_path: str) -> None:
    """Raise DamagedRecording where a picture or sequence is too large, or its mask is not of its shape."""
    if math.prod(image.shape[:2]) > MAX_STILL_PIXELS or math.prod(image.shape[2:]) > MAX_FRAMES:
        raise DamagedRecording(f"no picture has shape {image.shape}", image_path)
    if mask.shape != image.shape:
        raise DamagedRecording(f"the mask's shape {mask.shape} is not the image's {image.shape}", mask_path)


def read_frames(image_path: str, mask_path: str, about: Recording, hashes: dict[str, str] | None = None) -> list[Recording]:
    """`about` for each frame of a three-dimensional pair, in the file's order, `frame` from 1; raises DamagedRecording."""
    images, spacing_mm = read_nifti(image_path, hashes)
    masks, _ = read_nifti(mask_path, hashes)
    if images.ndim not in (2, 3):
        raise DamagedRecording(f"a sequence has 3 axes, this has shape {images.shape}", image_path)
    check_shapes(images, masks, image_path, mask_path)
    images, masks = np.atleast_3d(images), np.atleast_3d(masks)  # a sequence of one frame comes without its last axis
    return [
        replace(
            about,
            frame=number + 1,
            image=as_intensity(images[..., number], image_path),
            mask=as_labels(masks[..., number], mask_path),
            spacing_mm=spacing_mm,
        )
        for number in range(images.shape[-1])
    ]


def read_half_sequence(source: str, patient: str, view: View, hashes: dict[str, str] | None = None) -> list[Recording]:
    """All frames of half a beat, from end-diastole to end-systole; raises DamagedRecording with the reason and the file.

    A file that runs from ES to ED is turned round, so that `frame`, from 1, always counts towards end-systole. The phase
    stands where the cfg says that a frame is ED or ES, and is None in between. Without a cfg, or with one that names frames
    that are not there, the ends of the file are ED and ES, ED the one with the larger cavity; where both are equally
    large, nothing tells them apart and no frame has a phase.
    """
    paths = [recording_path(source, patient, view, HALF_SEQUENCE, suffix) for suffix in ("", "_gt")]
    frames = read_frames(*paths, Recording(patient, view, None, None, *NOTHING_YET), hashes)
    info = read_info(source, patient, view, hashes)
    ed, es = phase_frames(frames, info)
    if ed is not None and ed > es:
        ed, es = len(frames) + 1 - ed, len(frames) + 1 - es
        frames.reverse()
    phases = {ed: Phase.ED, es: Phase.ES}
    return [replace(frame, frame=i, phase=phases.get(i), info=info) for i, frame in enumerate(frames, start=1)]


def phase_frames(frames: list[Recording], info: Info | None) -> tuple[int | None, int | None]:
    """Which frames of a file, from 1, are ED and ES; (None, None) where nothing tells it."""
    last = len(frames)
    said = (info.ed, info.es) if info else (None, None)
    if None not in said and said[0] != said[1] and all(1 <= frame <= last for frame in said):
        return said
    areas = [int((frame.mask == ENDO).sum()) for frame in (frames[0], frames[-1])]
    if areas[0] == areas[1]:
        return None, None
    return (1, last) if areas[0] > areas[1] else (last, 1)


def read_info(source: str, patient: str, view: View, hashes: dict[str, str] | None = None) -> Info | None:
    """Read `Info_2CH.cfg` or `Info_4CH.cfg`; None where there is none. Unknown lines are passed over."""
    path = filesystem.join(source, IMAGES_FOLDER, patient, f"Info_{view}.cfg")
    if not filesystem.exists(path):
        return None
    raw = read_source(path)
    if hashes is not None:
        hashes[path] = filesystem.sha256(raw)
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
    filesystem.publish(filesystem.join(source, IMAGES_FOLDER, patient, f"Info_{view}.cfg"), text.encode())


def write_groups(source: str, groups: dict[str, list[str]]) -> None:
    """Write the split files of the release: one patient a line."""
    for group, patients in groups.items():
        path = filesystem.join(source, SPLIT_FOLDER, SPLIT_FILES[group])
        filesystem.publish(path, "".join(f"{patient}\n" for patient in patients).encode())


def dataset_name(source: str, patients: list[str]) -> str:
    """`phantom` where the tree says so, `CAMUS` for the release's own patient names, `other` for anybody else's."""
    if filesystem.exists(filesystem.join(source, PHANTOM_NOTE)):
        return "phantom"
    is_camus = all(re.fullmatch(r"patient0\d{3}", name) and name <= "patient0500" for name in patients)
    return "CAMUS" if is_camus else "other"


def list_files(source: str, patient: str) -> list[list]:
    """Names and sizes of a patient's files: what tells a changed source without reading it."""
    return list_folder(filesystem.join(source, IMAGES_FOLDER, patient))


def list_folder(path: str) -> list[list]:
    """Names of a folder's entries and sizes of those that are files; raises UserError for a name that is no UTF-8."""
    found = filesystem.sizes(path)
    for name in found:
        require(not UNREADABLE.search(name), f"{path} holds {ascii(name)}, a name that is no UTF-8: rename it.")
    return [list(entry) for entry in found.items()]
