"""A plain folder of images and masks, for other people's data; returns upright `Recording`s.

    FOLDER/images/NAME.nii.gz     the picture, any size and spacing, values 0 to 255 (.nii works as well)
    FOLDER/masks/NAME.nii.gz      its labels 0 to 3, on the same grid, under the same name
    FOLDER/groups.csv             optional: a line `patient,group`, then one line a patient; groups train, val, test

NAME begins with the patient, up to the first `_`: `anna_2CH_ED`, `anna_2CH_ES`, `bert_visit2_4CH`. A part of it that is
2CH or 4CH gives the view, one that is ED or ES the phase; without them both are unknown. Files that are not NIfTI are
ignored.

In a file, axis 0 is lateral and axis 1 is depth (then time), as in CAMUS, unless its affine has them the other way round
(`nifti.decode_nifti` describes how axes are found).
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from heartseg.datasets import camus
from heartseg.datasets.camus import Readable, Recording
from heartseg.errors import UserError
from heartseg.labels import PHASES, VIEWS, Phase, View
from heartseg.storage import filesystem

IMAGES, MASKS, GROUPS = "images", "masks", "groups.csv"
LAYOUT = f"{IMAGES}/PATIENT_ANYTHING.nii.gz and {MASKS}/PATIENT_ANYTHING.nii.gz"
NAME = re.compile(r"(?P<patient>[^_.][^_]*?)(?P<rest>_.+?)?\.nii(\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class ImageFolder:
    """A plain folder as a source of shards; `camus.CamusTree` has the same methods and describes them."""

    path: str

    def is_there(self) -> bool:
        """True if this machine sees the folder of images/ and masks/."""
        return all(filesystem.exists(filesystem.join(self.path, name)) for name in (IMAGES, MASKS))

    def patients(self) -> list[str]:
        """Names of the patients, sorted; raises UserError if there are none."""
        return list(self._files())

    def groups(self) -> dict[str, list[str]]:
        """Group to patients, from groups.csv; empty if there is none. Raises UserError for whatever is wrong with it."""
        path = filesystem.join(self.path, GROUPS)
        if not filesystem.exists(path):
            return {}
        rows = csv.DictReader(filesystem.read_bytes(path).decode("utf-8-sig", errors="replace").splitlines())
        if set(rows.fieldnames or []) != {"patient", "group"}:
            raise UserError(f"{path} must begin with the line `patient,group`.")
        groups: dict[str, list[str]] = {}
        patients = set(self.patients())
        for row in rows:
            patient, group = (row["patient"] or "").strip(), (row["group"] or "").strip()
            if group not in camus.SPLIT_FILES:
                raise UserError(f"{path} puts {patient} into group {group!r}: use one of {', '.join(camus.SPLIT_FILES)}.")
            if patient not in patients:
                raise UserError(f"{path} names {patient!r}, who has no file: the patient is a name up to its first _.")
            groups.setdefault(group, []).append(patient)
        return {group: sorted(names) for group, names in groups.items()}

    def dataset_name(self, patients: list[str]) -> str:
        """`other`."""
        return "other"

    def list_files(self, patients: list[str]) -> dict[str, list[list]]:
        """Path below the folder, size and modification time (ns) of each file of some patients."""
        found = self._files()
        return {patient: found.get(patient, []) for patient in patients}

    def check_frames(self, patients: list[str], frames: str) -> None:
        """Any file may be a sequence."""

    def recordings(self, patient: str, files: list[str], frames: str, hashes: dict[str, str]) -> Iterator[Readable]:
        """Each picture of a patient, of its `files` below the folder.

        With `frames` "stills" a file is one picture; with "sequence" its third axis is time, in the file's own order, and
        the phase stays unknown. A mask without an image is as damaged as an image without a mask.
        """
        for name in sorted({re.sub(r"(?i)\.nii(\.gz)?$", "", file.partition("/")[2]) for file in files}):
            parts = name.upper().split("_")[1:]
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
        found: dict[str, list[list]] = {}
        for folder in (IMAGES, MASKS):
            for name, *rest in camus.list_folder(filesystem.join(self.path, folder)):
                if match := NAME.fullmatch(name):
                    found.setdefault(match["patient"], []).append([f"{folder}/{name}", *rest])
        if not found:
            raise UserError(f"{self.path} holds no NIfTI file: give a folder of {LAYOUT}.")
        return dict(sorted(found.items()))
