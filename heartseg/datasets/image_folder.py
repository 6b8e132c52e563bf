"""A plain folder of images and masks, for other people's data; hands on upright `Recording`s.

    FOLDER/images/NAME.nii.gz     the picture, any size and spacing, values 0 to 255 (.nii will do as well)
    FOLDER/masks/NAME.nii.gz      its labels 0 to 3, on the same grid, under the same name
    FOLDER/groups.csv             optional: a line `patient,group`, then one line a patient; groups train, val, test

NAME begins with the patient, up to the first `_`: `anna_2CH_ED`, `anna_2CH_ES`, `bert_visit2_4CH`. A part of it that is
2CH or 4CH gives the view, one that is ED or ES the phase; without them both are unknown. Files that are no NIfTI are
passed over.

In a file, axis 0 is lateral and axis 1 is depth (then time), as in CAMUS. An image whose affine says the reverse, the
second axis along the world's x and the first not, goes to quarantine; the signs of an affine say nothing.
"""

import csv
import re
from collections.abc import Callable, Iterator

from heartseg.datasets import camus, nifti
from heartseg.datasets.camus import Recording
from heartseg.errors import UserError
from heartseg.labels import PHASES, VIEWS, Phase, View
from heartseg.storage import filesystem

IMAGES, MASKS, GROUPS = "images", "masks", "groups.csv"
LAYOUT = f"{IMAGES}/PATIENT_ANYTHING.nii.gz and {MASKS}/PATIENT_ANYTHING.nii.gz"
NAME = re.compile(r"(?P<patient>[^_.][^_]*?)(?P<rest>_.+?)?\.nii(\.gz)?")


def is_plain_folder(source: str) -> bool:
    """True for a folder of images/ and masks/ that is no CAMUS tree."""
    if filesystem.exists(filesystem.join(source, camus.IMAGES_FOLDER)):
        return False
    return all(filesystem.exists(filesystem.join(source, name)) for name in (IMAGES, MASKS))


def list_files(source: str) -> dict[str, list[list]]:
    """Paths below `source` and sizes of all images and masks, by patient; both sorted. Raises UserError for none."""
    found: dict[str, list[list]] = {}
    for folder in (IMAGES, MASKS):
        for name, size in camus.list_folder(filesystem.join(source, folder)):
            if match := NAME.fullmatch(name):
                found.setdefault(match["patient"], []).append([f"{folder}/{name}", size])
    if not found:
        raise UserError(f"{source} holds no NIfTI file: give a folder of {LAYOUT}.")
    return dict(sorted(found.items()))


def read_groups(source: str, patients: list[str]) -> dict[str, list[str]]:
    """Group to patients, from groups.csv; empty where there is none. Raises UserError for whatever is wrong with it."""
    path = filesystem.join(source, GROUPS)
    if not filesystem.exists(path):
        return {}
    rows = csv.DictReader(filesystem.read_bytes(path).decode("utf-8-sig", errors="replace").splitlines())
    if set(rows.fieldnames or []) != {"patient", "group"}:
        raise UserError(f"{path} must begin with the line `patient,group`.")
    groups: dict[str, list[str]] = {}
    for row in rows:
        patient, group = (row["patient"] or "").strip(), (row["group"] or "").strip()
        if group not in camus.SPLIT_FILES:
            raise UserError(f"{path} puts {patient} into group {group!r}: take one of {', '.join(camus.SPLIT_FILES)}.")
        if patient not in patients:
            raise UserError(f"{path} names {patient!r}, of whom there is no file: the patient is a name up to its first _.")
        groups.setdefault(group, []).append(patient)
    return {group: sorted(names) for group, names in groups.items()}


def recordings(source: str, patient: str, files: list[str], frames: str, hashes: dict | None = None) -> Iterator[tuple]:
    """(view, phase, a function that reads the frames) for each picture of a patient, of its `files` below `source`.

    With `frames` "stills" a file is one picture; with "sequence" its third axis is time, in the file's own order, and the
    phase stays unknown. A mask without an image is damaged as an image without a mask is.
    """
    names = sorted({re.sub(r"\.nii(\.gz)?$", "", path.partition("/")[2]) for path in files})
    for name in names:
        parts = name.upper().split("_")[1:]
        view = next((View(part) for part in parts if part in VIEWS), None)
        phase = next((Phase(part) for part in parts if part in PHASES), None) if frames == "stills" else None
        about = Recording(patient, view, phase, None, *camus.NOTHING_YET)
        pair = [filesystem.join(source, folder, f"{name}.nii.gz") for folder in (IMAGES, MASKS)]
        yield view, phase, reader(pair, about, frames, hashes)


def reader(pair: list[str], about: Recording, frames: str, hashes: dict | None) -> Callable[[], list[Recording]]:
    """A function that reads a pair as a list of Recordings; raises DamagedRecording when it is called."""

    def read() -> list[Recording]:
        decode = camus.read_frames if frames == "sequence" else lambda *args: [camus.read_pair(*args)]
        found = decode(*pair, about, hashes)
        nifti.check_axes(pair[0])
        return found

    return read
