"""Studies on disk: which files are inputs and what their outputs are called, and the outputs themselves.

A study is a patient's clips. Names come from file names, except for DICOM, whose files are often named by what
identifies a patient: there they are study0001, study0002 …
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from heartseg.datasets import nifti, readers
from heartseg.datasets.readers import Frames
from heartseg.errors import UserError
from heartseg.labels import Phase, View
from heartseg.storage import filesystem

# `jane_A4C_ED` names the 4-chamber view; 2CH, AP2, A2C and the like the other.
VIEW_IN_NAME = re.compile(r"(?:^|[_\-. ])(?:(?:A(?:P|PICAL)?)?([24])CH?|AP([24]))(?=[_\-. ]|$)", re.IGNORECASE)
PHASE_IN_NAME = re.compile(r"(?:^|[_\-. ])(ED|ES)(?=[_\-. ]|$)", re.IGNORECASE)
# Endings of masks and pictures made from an input, by CAMUS and by this program.
NO_INPUT = re.compile(r"(_gt|_pred|_overlay|_curve)$", re.IGNORECASE)


@dataclass(frozen=True)
class Clip:
    """One input file, a still or a sequence: its outputs are `patient/stem_pred.nii.gz` and the like below the output.

    `shown` is its name in messages; for a DICOM it is the `stem`, which reveals nothing.
    """

    path: str
    kind: str
    patient: str
    stem: str
    view: View | None
    phase: Phase | None
    shown: str


def find_clips(source: str, view: View | None = None, phase: Phase | None = None) -> list[Clip]:
    """The inputs in a file, a folder or a tree, sorted, those of one patient together.

    `view` and `phase` are used if a file's name has none. Raises UserError if there is no input, if a package is missing, or if
    two files would have one output.
    """
    if not filesystem.exists(source):
        raise UserError(f"--input {source} does not exist: give a file, a patient's folder or a folder of folders.")
    is_file = filesystem.size_or_none(source) is not None
    paths = [source] if is_file else filesystem.walk(source)
    kinds = {path: readers.kind_of(path) for path in paths if is_input(path)}
    found = [name_clip(path, source, kind) for path, kind in kinds.items() if kind not in (None, "dicom")]
    found = tell_folders_apart(found) + name_dicoms([path for path, kind in kinds.items() if kind == "dicom"], view)
    if not found:
        raise UserError(f"--input {source} holds no NIfTI, DICOM, video or PNG that is not a mask: give another.")
    for kind in {clip.kind for clip in found}:
        readers.check_package_installed(kind)
    names = [{name: filesystem.printable(getattr(clip, name)) for name in ("patient", "stem", "shown")} for clip in found]
    seen = [{"view": clip.view or view, "phase": clip.phase or phase} for clip in found]
    found = [replace(clip, **name, **known) for clip, name, known in zip(found, names, seen, strict=True)]
    check_outputs_differ(found)
    return sorted(found, key=lambda clip: (clip.patient, clip.stem))


def is_input(path: str) -> bool:
    """False for masks, for pictures that were made from inputs, and for hidden files."""
    name = os.path.basename(path)
    return not name.startswith(".") and not NO_INPUT.search(stem_of(path))


def stem_of(path: str) -> str:
    """A file's name without the suffixes that its kind is known by."""
    name = os.path.basename(path)
    suffix = next((suffix for suffix in sorted(readers.KINDS, key=len, reverse=True) if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def view_of(stem: str) -> View | None:
    """The view in a name, or None."""
    match = VIEW_IN_NAME.search(stem)
    return View(f"{match[1] or match[2]}CH") if match else None


def phase_of(stem: str) -> Phase | None:
    """The phase in a name, or None."""
    match = PHASE_IN_NAME.search(stem)
    return Phase(match[1].upper()) if match else None


def name_clip(path: str, source: str, kind: str) -> Clip:
    """A clip named by its file: the patient is the text before the view, or the folder, or the whole name."""
    stem, match = stem_of(path), VIEW_IN_NAME.search(stem_of(path))
    folder = os.path.basename(os.path.dirname(path))
    patient = (stem[: match.start()] or folder) if match else (PHASE_IN_NAME.sub("", stem) or folder)
    shown = path[len(source) :].lstrip("/") or os.path.basename(path)
    return Clip(path, kind, patient.strip("_-. ") or stem, stem, view_of(stem), phase_of(stem), shown)


def tell_folders_apart(clips: list[Clip]) -> list[Clip]:
    """Clips whose patient's name occurs in several folders are named by folder and file: ann/rest_2CH, bob/rest_2CH.

    Folders of one name have those above them in their name, as many as it takes: ann_visit1, bob_visit1.
    """
    folders = defaultdict(set)
    for clip in clips:
        folders[clip.patient].add(os.path.dirname(clip.path))
    names = short_names(set().union(*(found for found in folders.values() if len(found) > 1)))

    def renamed(clip: Clip) -> Clip:
        folder = names[os.path.dirname(clip.path)]
        return replace(clip, patient=folder, stem=f"{folder}_{clip.stem}")

    return [renamed(clip) if len(folders[clip.patient]) > 1 else clip for clip in clips]


def short_names(folders: Iterable[str]) -> dict[str, str]:
    """A name for each folder: as many of its last parts as make all of them differ."""
    parts = {folder: [part for part in folder.split("/") if part] for folder in folders}
    names: dict[str, str] = {}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {folder: "_".join(found[-depth:]) for folder, found in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def name_dicoms(paths: list[str], view: View | None) -> list[Clip]:
    """DICOM clips by study in the order of their paths: study0001_4CH_clip01; nothing of a path but view and phase is kept."""
    if paths:
        readers.check_package_installed("dicom")
    numbers, clips = {}, Counter()
    found = []
    for path in paths:
        key = readers.study_key(path)
        patient = f"study{numbers.setdefault(key, len(numbers) + 1):04d}"
        clips[patient] += 1
        name = os.path.splitext(os.path.basename(path))[0]
        named = view_of(name) or view, phase_of(name)
        stem = "_".join(filter(None, [patient, *named, f"clip{clips[patient]:02d}"]))
        found.append(Clip(path, "dicom", patient, stem, *named, stem))
    return found


def check_outputs_differ(clips: list[Clip]) -> None:
    """Raise UserError if two inputs would write one file."""
    seen = {}
    for clip in clips:
        other = seen.setdefault((clip.patient, clip.stem), clip)
        if other is not clip:
            raise UserError(f"{other.shown} and {clip.shown} would both be written as {clip.stem}: give one of their folders.")


def check_out(out: str, source: str, clips: Iterable[Clip]) -> None:
    """Raise UserError if outputs would lie inside the input folder: the next run would find its own pictures there."""
    if filesystem.is_uri(source) or filesystem.is_uri(out) or os.path.isfile(source):
        return
    inside = os.path.realpath(source) + os.sep
    folders = {out} | {filesystem.join(out, clip.patient) for clip in clips}
    if any((os.path.realpath(folder) + os.sep).startswith(inside) for folder in folders):
        raise UserError(f"--out {out} would put files inside --input {source}: give a folder outside it.")


def output(out: str, clip: Clip, ending: str) -> str:
    """Path of one of a clip's outputs, `_pred.nii.gz` for example."""
    return filesystem.join(out, clip.patient, clip.stem + ending)


def write_masks(path: str, masks: np.ndarray, frames: Frames) -> None:
    """Masks uint8 [T,H,W] on the grid of the whole file: a NIfTI's own, otherwise CAMUS's order at the pictures' full size."""
    if frames.box:
        top, left, height, width = frames.box
        whole = np.zeros((len(masks), height, width), np.uint8)
        cut = whole[:, top : top + masks.shape[1], left : left + masks.shape[2]]
        cut[:] = np.flip(masks, frames.flips)
    else:
        whole = np.flip(masks, frames.flips)
    if frames.place:
        nifti.write_frames(path, whole, frames.place)
    else:
        upright = whole[0] if len(whole) == 1 else np.moveaxis(whole, 0, -1)
        nifti.write_nifti(path, upright, frames.spacing_mm)
