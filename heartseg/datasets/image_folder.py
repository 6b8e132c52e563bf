"""A plain folder of images and masks, for other people's data; returns upright `Recording`s.

    FOLDER/images/NAME.nii.gz     the picture, any size and spacing, values 0 to 255 (.nii works as well)
    FOLDER/masks/NAME.nii.gz      its labels 0 to 3, on the same grid, under the same name
    FOLDER/groups.csv             optional: a line `patient,group`, then one line per patient; groups train, val, test

NAME begins with the patient, up to the first `_` (or as `patient_pattern` matches): `anna_2CH_ED`, `anna_2CH_ES`,
`bert_visit2_4CH`. A part that is 2CH or 4CH is the view, one that is ED or ES the phase. Files that are not NIfTI are
ignored, and counted. `nifti.decode_nifti` describes which axis of a file is which.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from heartseg.datasets import camus
from heartseg.datasets.camus import IMAGES_FOLDER, CamusTree, Readable, Recording
from heartseg.errors import UserError, require
from heartseg.labels import PHASES, VIEWS, Phase, View
from heartseg.storage import filesystem

IMAGES, MASKS, GROUPS = "images", "masks", "groups.csv"
LAYOUT = f"{IMAGES}/PATIENT_ANYTHING.nii.gz and {MASKS}/PATIENT_ANYTHING.nii.gz"
NAME = re.compile(r"(?P<stem>[^_.].*?)\.nii(\.gz)?", re.IGNORECASE)
BEFORE_UNDERSCORE = "[^_]+"
SEPARATOR = re.compile(r"[-_. ]")


@dataclass(frozen=True)
class ImageFolder:
    """A plain folder as a source of shards; `camus.CamusTree` has the same methods and documents them."""

    path: str
    patient_pattern: str = ""  # matched at the start of a name: its first group, or the whole match, is the patient
    dataset: str = ""

    def is_there(self) -> bool:
        """True if this machine can see both images/ and masks/."""
        return all(filesystem.exists(filesystem.join(self.path, name)) for name in (IMAGES, MASKS))

    def patients(self) -> list[str]:
        """Sorted names; raises UserError if there are none, or if one person may be counted as several patients."""
        files = self._files()
        if not self.patient_pattern:
            parts = {name: SEPARATOR.split(name) for name in files}
            odd = [name for name in files if not {part.upper() for part in parts[name]}.isdisjoint([*VIEWS, *PHASES])]
            people = {found[0] for found in parts.values()}
            has_one_each = all(len(found) <= 2 for found in files.values())  # an image and its mask
            if odd or has_one_each and 1 < len(people) < len(files):
                names = f"{len(files)} patients (such as {(odd or list(files))[0]!r}) if names end at the first _"
                fix = "give --patient-pattern '[^-.]+', or '[^_]+' if they are all different people"
                raise UserError(f"{self.path} has {names}, but {len(people)} if names end at the first - or dot: {fix}.")
        return list(files)

    def groups(self) -> dict[str, list[str]]:
        """Patients by group, from groups.csv if there is one; raises UserError for any mistake in it."""
        path = filesystem.join(self.path, GROUPS)
        if not filesystem.exists(path):
            return {}
        lines = camus.read_text(path).splitlines()
        delimiter = next((mark for mark in ";\t" if mark in "".join(lines[:1])), ",")  # depends on the spreadsheet's language
        rows = [[cell.strip() for cell in row if cell.strip()] for row in csv.reader(lines, delimiter=delimiter)]
        if not rows or [cell.lower() for cell in rows[0]] != ["patient", "group"]:
            raise UserError(f"{path} must begin with the line `patient,group`.")
        groups = defaultdict(list)
        for row in filter(None, rows[1:]):
            patient, group = (*row, "")[:2]
            if group not in camus.SPLIT_FILES or len(row) > 2:
                raise UserError(f"{path} puts {patient} into group {group!r}: use one of {', '.join(camus.SPLIT_FILES)}.")
            groups[group].append(patient)
        return {group: sorted(names) for group, names in groups.items()}

    def dataset_name(self) -> str:
        """`other`, or `CAMUS` if the user declares it."""
        return self.dataset.upper() or "other"

    def list_files(self, patients: list[str]) -> dict[str, list[list]]:
        """By patient, each file's path below the folder, size and modification time (ns)."""
        found = self._files()
        return {patient: found.get(patient, []) for patient in patients}

    def unnamed(self) -> list[str]:
        """Visible files in the folders of images and masks that are not NIfTI."""
        names = (name for folder in (IMAGES, MASKS) for name in filesystem.list_names(filesystem.join(self.path, folder)))
        return [name for name in names if not (name.startswith(".") or NAME.fullmatch(name))]

    def check_frames(self, patients: list[str], frames: str) -> None:
        """Does nothing: any file may be a sequence."""

    def recordings(self, patient: str, files: list[str], frames: str, hashes: dict[str, str]) -> Iterator[Readable]:
        """Each recording of a patient, from its `files`; in a `sequence`, the third axis is time, and the phase is unknown."""
        for name in sorted({re.sub(r"(?i)\.nii(\.gz)?$", "", file.partition("/")[2]) for file in files}):
            parts = SEPARATOR.split(name.upper())[1:]
            view = next((View(part) for part in parts if part in VIEWS), None)
            phase = next((Phase(part) for part in parts if part in PHASES), None) if frames == "stills" else None
            yield view, phase, partial(self._read, name, patient, view, phase, frames, hashes)

    def _read(self, name: str, patient: str, view: View | None, phase: Phase | None, frames: str, hashes: dict):
        image, mask = (filesystem.join(self.path, folder, f"{name}.nii.gz") for folder in (IMAGES, MASKS))
        found = camus.read_pair(image, mask, frames, hashes)
        numbers = [None] if frames == "stills" else range(1, len(found) + 1)
        return [Recording(patient, view, phase, number, **frame) for number, frame in zip(numbers, found, strict=True)]

    def _files(self) -> dict[str, list[list]]:
        """All images and masks, by patient; both sorted. Raises UserError if there are none."""
        found = defaultdict(list)
        for folder in (IMAGES, MASKS):
            for name, *rest in camus.list_folder(filesystem.join(self.path, folder)):
                if match := NAME.fullmatch(name):
                    found[self._patient(match["stem"])].append([f"{folder}/{name}", *rest])
        if not found:
            raise UserError(f"{self.path} holds no NIfTI files: give a folder of {LAYOUT}.")
        return dict(sorted(found.items()))

    def _patient(self, stem: str) -> str:
        match = re.match(self.patient_pattern or BEFORE_UNDERSCORE, stem)
        patient = match and match[1 if match.re.groups else 0]
        if not patient:
            raise UserError(f"--patient-pattern {self.patient_pattern!r} does not match {stem!r}: correct the pattern.")
        return patient


def open_source(path: str, patient_pattern: str = "", dataset: str = "") -> CamusTree | ImageFolder:
    """The source at a path; raises UserError if there is none, or if the pattern is invalid or unused."""
    try:
        re.compile(patient_pattern)
    except re.error as error:
        raise UserError(f"--patient-pattern {patient_pattern!r} is not a valid regular expression: {error}.") from error
    if (tree := CamusTree(path, dataset)).is_there():
        require(not patient_pattern, f"--patient-pattern is for a folder of {LAYOUT}; {path} is a CAMUS tree: omit the flag.")
        return tree
    if (folder := ImageFolder(path, patient_pattern, dataset)).is_there():
        return folder
    if not filesystem.exists(path):
        raise UserError(f"The source {path} does not exist: give the folder of the CAMUS release, or one with {LAYOUT}.")
    raise UserError(f"{path} holds neither {IMAGES_FOLDER}/ (the CAMUS release) nor {LAYOUT}: check the path.")
