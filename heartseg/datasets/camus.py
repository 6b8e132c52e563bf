"""Reads and writes the official CAMUS folder tree; returns upright `Recording`s."""

import codecs
import contextlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from heartseg.datasets.grey import BYTE, Unreadable, as_grey
from heartseg.datasets.nifti import DamagedRecording, Place, as_labels, find_file, read_nifti, read_source
from heartseg.errors import UserError, require
from heartseg.labels import ENDO, PHASES, VIEWS, Phase, View
from heartseg.storage import filesystem

IMAGES_FOLDER = "database_nifti"
SPLIT_FOLDER = "database_split"
# Either file beside database_nifti/ marks a tree written by phantom.py or by jobs/download.py.
PHANTOM_NOTE, DOWNLOAD_NOTE = "phantom.json", "camus.json"
HALF_SEQUENCE = "half_sequence"  # takes the place of the phase in a file's name
SPLIT_FILES = {"train": "subgroup_training.txt", "val": "subgroup_validation.txt", "test": "subgroup_testing.txt"}
PATIENT_PATTERN = re.compile(r"patient\d+")
UNREADABLE = re.compile("[\ud800-\udfff]")  # how Python represents the bytes of a name that are not UTF-8


@dataclass(frozen=True)
class Info:
    """The contents of a view's `Info_*.cfg`, None for missing values; `ed` and `es` count from 1, `ef` is in percent."""

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

    `image` is uint8 [H,W], `mask` uint8 [H,W] with labels 0-3 (None if there is no mask), `spacing_mm` is (depth, lateral).
    `frame` counts from 1; a frame between ED and ES has no phase. `grey` is the range of values scaled to 0 to 255.
    """

    patient: str
    view: View | None
    phase: Phase | None
    frame: int | None
    image: np.ndarray
    mask: np.ndarray | None
    spacing_mm: tuple[float, float]
    info: Info | None = None
    grey: tuple[int, int] = BYTE
    place: Place | None = None


CFG_FIELDS = {  # the lines of a cfg: key, field, type
    "ED": ("ed", int), "ES": ("es", int), "NbFrame": ("num_frames", int), "Sex": ("sex", str), "Age": ("age", int),
    "ImageQuality": ("quality", str), "EF": ("ef", float), "FrameRate": ("frame_rate", float),
    "EFConvention": ("ef_convention", str),
}  # fmt: skip
CFG_NOISE = " \t,;\"'"  # characters that spreadsheets put around a value
# A view, a phase, and a function that reads the frames of that recording; it raises DamagedRecording.
Readable = tuple[View | None, Phase | None, Callable[[], list[Recording]]]


@dataclass(frozen=True)
class CamusTree:
    """The official folder tree as a source of shards; `image_folder.ImageFolder` has the same methods."""

    path: str
    dataset: str = ""  # `camus` if the user declares that the tree is the release

    def is_there(self) -> bool:
        """True if this machine can see the tree; the mount point of an unmounted disk is an empty folder."""
        return filesystem.exists(filesystem.join(self.path, IMAGES_FOLDER))

    def patients(self) -> list[str]:
        """Sorted names of the patients; raises UserError if there are none."""
        return find_patients(self.path)

    def groups(self) -> dict[str, list[str]]:
        """The source's own split: patients by group (`train`, `val`, `test`); raises UserError for a file that is not text."""
        groups = {}
        for group, name in SPLIT_FILES.items():
            path = filesystem.join(self.path, SPLIT_FOLDER, name)
            if filesystem.exists(path):
                names = re.split(r"[\s,;\"']+", read_text(path))
                groups[group] = sorted(name for name in names if name)
        return groups

    def dataset_name(self) -> str:
        """`phantom` or `CAMUS`, by the note in the tree or the user's declaration; otherwise `other`, treated as private."""
        for note, name in ((PHANTOM_NOTE, "phantom"), (DOWNLOAD_NOTE, "CAMUS")):
            if filesystem.exists(filesystem.join(self.path, note)):
                return name
        return self.dataset.upper() or "other"

    def list_files(self, patients: list[str]) -> dict[str, list[list]]:
        """By patient, each file's name, size and modification time (ns), to detect changes without reading the files."""
        return {patient: list_folder(filesystem.join(self.path, IMAGES_FOLDER, patient)) for patient in patients}

    def unnamed(self) -> list[str]:
        """Names in database_nifti/ that are neither patients' folders nor hidden."""
        names = filesystem.list_names(filesystem.join(self.path, IMAGES_FOLDER))
        return [name for name in names if not (name.startswith(".") or PATIENT_PATTERN.fullmatch(name))]

    def check_frames(self, patients: list[str], frames: str) -> None:
        """Raise UserError if sequences are requested and no patient has one."""
        names = (name for p in patients for name in filesystem.list_names(filesystem.join(self.path, IMAGES_FOLDER, p)))
        if frames == "sequence" and not any(HALF_SEQUENCE in name.lower() for name in names):
            raise UserError(f"{self.path} holds no *_{HALF_SEQUENCE}.nii.gz: use --frames stills.")

    def recordings(self, patient: str, files: list[str], frames: str, hashes: dict[str, str]) -> Iterator[Readable]:
        """Each still or sequence that a patient should have; reading it adds each file's SHA-256 to `hashes`, by path."""
        if frames == "sequence":
            for view in VIEWS:
                yield view, None, partial(read_half_sequence, self.path, patient, view, hashes, files)
        else:
            for still in stills_of():
                yield *still, lambda still=still: [read_still(self.path, patient, *still, hashes, files)]


def find_patients(source: str) -> list[str]:
    """Sorted names of a tree's patients; raises UserError if it has none."""
    require(filesystem.exists(source), f"The source {source} does not exist: give the folder that holds {IMAGES_FOLDER}/.")
    names = filesystem.list_names(filesystem.join(source, IMAGES_FOLDER))
    patients = [name for name in names if PATIENT_PATTERN.fullmatch(name)]
    require(bool(patients), f"{source} holds no {IMAGES_FOLDER}/patient*/ folder: give the folder of the CAMUS release.")
    return patients


def recording_path(source: str, patient: str, view: View, phase: Phase | str, suffix: str = "") -> str:
    """Path of the NIfTI file of a still, or of a sequence (HALF_SEQUENCE for `phase`); `suffix` is `_gt` for the mask."""
    return filesystem.join(source, IMAGES_FOLDER, patient, f"{patient}_{view}_{phase}{suffix}.nii.gz")


def read_still(
    source: str, patient: str, view: View, phase: Phase,
    hashes: dict[str, str] | None = None, names: Collection[str] | None = None,
) -> Recording:  # fmt: skip
    """One ED or ES image with its mask and cfg; raises DamagedRecording. Adds each file's SHA-256 to `hashes`, by path.

    `names` are the names of the patient's files, if known.
    """
    paths = [recording_path(source, patient, view, phase, suffix) for suffix in ("", "_gt")]
    (pixels,) = read_pair(*paths, "stills", hashes, names)
    info = read_info(source, patient, view, hashes, names)
    frame = getattr(info, phase.lower()) if info else None
    return Recording(patient, view, phase, frame, **pixels, info=info)


def read_pair(
    image_path: str, mask_path: str, frames: str,
    hashes: dict[str, str] | None = None, names: Collection[str] | None = None,
) -> list[dict]:  # fmt: skip
    """Read an image file and its mask file: a dict of `Recording` fields for each frame; raises DamagedRecording."""
    values, spacing_mm, place = read_nifti(image_path, hashes, None, names)
    masks, *_ = read_nifti(mask_path, hashes, place, names)
    if frames == "stills" and len(values) > 1:
        raise DamagedRecording(f"has {len(values)} frames, but a still must be one frame", image_path)
    if masks.shape != values.shape:
        raise DamagedRecording(f"has shape {masks.shape}, but the image has {values.shape}", mask_path)
    try:
        images, grey = as_grey(values)
    except Unreadable as error:
        raise DamagedRecording(f"is not a readable NIfTI: {error}", image_path) from error
    shared = {"spacing_mm": spacing_mm, "grey": grey, "place": place}
    return [{"image": image, "mask": mask} | shared for image, mask in zip(images, as_labels(masks, mask_path), strict=True)]


def read_half_sequence(
    source: str, patient: str, view: View, hashes: dict[str, str] | None = None, names: Collection[str] | None = None
) -> list[Recording]:
    """All frames of half a beat, numbered from 1 at ED even if the file starts at ES; raises DamagedRecording."""
    paths = [recording_path(source, patient, view, HALF_SEQUENCE, suffix) for suffix in ("", "_gt")]
    frames = read_pair(*paths, "sequence", hashes, names)
    info = read_info(source, patient, view, hashes, names)
    ed, es = phase_frames([frame["mask"] for frame in frames], info)
    if ed is not None and ed > es:
        ed, es = len(frames) + 1 - ed, len(frames) + 1 - es
        frames.reverse()
    phases = {ed: Phase.ED, es: Phase.ES}
    numbered = enumerate(frames, start=1)
    return [Recording(patient, view, phases.get(number), number, **frame, info=info) for number, frame in numbered]


def phase_frames(masks: list[np.ndarray], info: Info | None) -> tuple[int | None, int | None]:
    """Numbers (from 1) of ED and ES: the cfg's, otherwise the two ends, ED with the larger cavity; or (None, None)."""
    last = len(masks)
    named = (info.ed, info.es) if info else (None, None)
    if None not in named and named[0] != named[1] and all(1 <= frame <= last for frame in named):
        return named
    first_area, last_area = (int((mask == ENDO).sum()) for mask in (masks[0], masks[-1]))
    if first_area == last_area:
        return None, None
    return (1, last) if first_area > last_area else (last, 1)


def read_info(
    source: str, patient: str, view: View, hashes: dict[str, str] | None = None, names: Collection[str] | None = None
) -> Info | None:
    """Read `Info_2CH.cfg` or `Info_4CH.cfg`; None if the file does not exist. Unknown lines are ignored."""
    path = find_file(filesystem.join(source, IMAGES_FOLDER, patient, f"Info_{view}.cfg"), names)
    if (names is not None and filesystem.last_part(path) not in names) or not filesystem.exists(path):
        return None
    try:
        # Keys and numbers are ASCII, so a remark in another encoding is harmless.
        text = decode_text(read_source(path, hashes), "replace")
    except ValueError as error:
        raise DamagedRecording("is not text in UTF-8 or UTF-16", path) from error
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    texts = {key.strip(CFG_NOISE).lower(): value.strip(CFG_NOISE) for key, value in pairs}
    known = ((name, kind, texts.get(key.lower())) for key, (name, kind) in CFG_FIELDS.items())
    return Info(**{name: parse_value(value, kind) for name, kind, value in known if value})


def parse_value(text: str, kind: type) -> str | int | float | None:
    """A value of a cfg; None for a number that is malformed or too large for its column, presumably a typo."""
    if kind is str:
        return text
    with contextlib.suppress(ValueError):
        number = float(text.replace(",", "."))  # half of the world's spreadsheets write 48,4
        return kind(number) if abs(number) < 2**31 else None


def decode_text(raw: bytes, errors: str = "strict") -> str:
    """Decode text saved by Windows, spreadsheets or shells: UTF-8, or UTF-16 with a byte order mark; raises ValueError."""
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    text = raw.decode(encoding, errors)
    if "\0" in text:  # UTF-16 without a byte order mark, or not text
        raise ValueError("it contains null bytes")
    return text


def read_text(path: str) -> str:
    """The text of a small file that a user wrote; raises UserError naming the file."""
    try:
        return decode_text(filesystem.read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): check its permissions, and save it as UTF-8 text.") from error


def stills_of() -> Iterator[tuple[View, Phase]]:
    """The view and phase of a patient's four stills, in the order of the shards."""
    return ((view, phase) for view in VIEWS for phase in PHASES)


def write_info(source: str, patient: str, view: View, info: Info) -> None:
    """Write a cfg in the release's format, with an extra line if the EF follows another convention."""
    values = ((key, getattr(info, name)) for key, (name, _) in CFG_FIELDS.items())
    text = "".join(f"{key}: {value}\n" for key, value in values if value not in (None, Info.ef_convention))
    filesystem.publish(filesystem.join(source, IMAGES_FOLDER, patient, f"Info_{view}.cfg"), text.encode())


def write_groups(source: str, groups: dict[str, list[str]]) -> None:
    """Write the release's split files: one patient per line."""
    for group, patients in groups.items():
        path = filesystem.join(source, SPLIT_FOLDER, SPLIT_FILES[group])
        filesystem.publish(path, "".join(f"{patient}\n" for patient in patients).encode())


def list_folder(path: str) -> list[list]:
    """Name, size and modification time (ns) of a folder's entries; raises UserError for a name that is not UTF-8."""
    found = [list(entry) for entry in filesystem.list_files(path)]
    for name, *_ in found:
        require(not UNREADABLE.search(name), f"{path} holds {ascii(name)}, a name that is not UTF-8: rename it.")
    return found


def names_and_sizes(listing: dict[str, list[list]]) -> dict[str, list[list]]:
    """A listing of patients' files without the times, which change when the source is copied."""
    return {patient: [[name, size] for name, size, _ in files] for patient, files in listing.items()}
