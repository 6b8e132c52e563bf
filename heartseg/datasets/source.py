"""Whatever shards are made from, the CAMUS tree or a plain folder of pairs, behind one door."""

import re

from heartseg.datasets.camus import IMAGES_FOLDER, CamusTree
from heartseg.datasets.image_folder import LAYOUT, ImageFolder
from heartseg.errors import UserError, require
from heartseg.storage import filesystem


def open_source(path: str, patient_pattern: str = "", dataset: str = "") -> CamusTree | ImageFolder:
    """The source at a path; raises UserError if none is there, or for a pattern that is wrong or of no use."""
    try:
        re.compile(patient_pattern)
    except re.error as error:
        raise UserError(f"--patient-pattern {patient_pattern!r} is not a regular expression: {error}.") from error
    if (tree := CamusTree(path, dataset)).is_there():
        require(not patient_pattern, f"--patient-pattern is for a folder of {LAYOUT}; {path} has a folder for each patient.")
        return tree
    if (folder := ImageFolder(path, patient_pattern, dataset)).is_there():
        return folder
    if not filesystem.exists(path):
        raise UserError(f"The source {path} does not exist: give the folder that holds {IMAGES_FOLDER}/ or {LAYOUT}.")
    raise UserError(f"{path} holds no {IMAGES_FOLDER}/ (the CAMUS release), and no {LAYOUT} either.")
