"""Studies (a patient's clips) on disk: finds the input files, names their outputs, and writes masks.

Names come from file names, except for DICOM, whose file names often identify a patient.
"""

import contextlib
import os
import re
import secrets
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from heartseg.datasets import nifti, readers
from heartseg.datasets.readers import Frames
from heartseg.errors import UserError, require
from heartseg.labels import Phase, View
from heartseg.storage import filesystem

# `jane_A4C_ED` names the 4-chamber view; 2CH, AP2 and A2C name the 2-chamber view.
VIEW_IN_NAME = re.compile(r"(?:^|[_\-. ])(?:(?:A(?:P|PICAL)?)?([24])CH?|AP([24]))(?=[_\-. ]|$)", re.IGNORECASE)
PHASE_IN_NAME = re.compile(r"(?:^|[_\-. ])(ED|ES)(?=[_\-. ]|$)", re.IGNORECASE)
MARK = re.compile(r"_(gt|pred)(?=\.nii(\.gz)?$)", re.IGNORECASE)  # of a mask
# Masks and pictures made from an input, by CAMUS or by heartseg: not inputs themselves.
NO_INPUT = re.compile(r"_(gt|pred)(\.nii(\.gz)?|\.png)$|_(overlay|curve|phases)\.(png|gif)$", re.IGNORECASE)
ENDINGS = ("_pred.nii.gz", "_overlay.png", "_overlay.gif", "_curve.png", "_phases.png", "_film.jpg")


@dataclass(frozen=True)
class Clip:
    """An input, a still or a sequence; `shown` is its name in messages, `remark` a doubt about its study."""

    path: str
    kind: str
    patient: str
    stem: str
    view: View | None
    phase: Phase | None
    shown: str
    remark: str = ""


def find_clips(source: str, view: View | None = None, phase: Phase | None = None) -> list[Clip]:
    """The inputs in a file or a tree, by patient; `view` and `phase` apply if a name shows none. Raises UserError if empty."""
    require(filesystem.exists(source), f"{source} does not exist: give a file, or a folder of patients or of files.")
    paths = filesystem.walk(source) if filesystem.size_or_none(source) is None else [source]
    visible = (path for path in paths if not (os.path.basename(path).startswith(".") or NO_INPUT.search(path)))
    kinds = {path: readers.kind_of(path) for path in visible}
    for kind in set(kinds.values()):
        readers.import_package(kind)
    found = [name_clip(path, source, kind) for path, kind in kinds.items() if kind not in (None, "dicom")]
    found = separate_folders(found) + name_dicoms([path for path, kind in kinds.items() if kind == "dicom"], view)
    require(len(found) > 0, f"{source} holds no NIfTI, DICOM, video or PNG other than masks: give another path.")
    return complete_names(found, view, phase)


def find_masks(source: str, view: View | None = None, phase: Phase | None = None) -> tuple[list[Clip], list[str]]:
    """The label maps (NIfTI) in a file or a tree: those named `_gt` or `_pred` if there are any, otherwise all.

    A mask gets the names that `find_clips` gives its image; the second list has the paths of images without a mask. Raises
    UserError if there are no masks, or two masks of one image.
    """
    require(filesystem.exists(source), f"{source} does not exist: give the folder that holds the masks.")
    paths = filesystem.walk(source) if filesystem.size_or_none(source) is None else [source]
    paths = [path for path in paths if re.search(r"/[^/.][^/]*\.nii(\.gz)?$", path, re.IGNORECASE)]
    marked = [path for path in paths if MARK.search(path)]
    require(len(paths) > 0, f"{source} holds no NIfTI files: give the folder that holds the masks.")
    found = {}
    for path in marked or paths:
        image = MARK.sub("", path)
        if image in found:
            raise UserError(f"{path} and {found[image].path} are masks of the same image: give a folder with only one.")
        found[image] = replace(name_clip(image, source, "nifti"), path=path)
    without = [path for path in paths if marked and path not in found and not MARK.search(path)]
    return complete_names(separate_folders([*found.values()]), view, phase), without


def complete_names(found: list[Clip], view: View | None, phase: Phase | None) -> list[Clip]:
    """The clips sorted by patient, with printable and distinct names; `view` and `phase` apply if a name shows none."""
    clips = separate_stems(found)
    names = [{name: filesystem.printable(getattr(clip, name)) for name in ("patient", "stem", "shown")} for clip in clips]
    found = [replace(c, view=c.view or view, phase=c.phase or phase, **named) for c, named in zip(clips, names, strict=True)]
    # A study's clips are in the order of their files, not of their digests.
    return sorted(found, key=lambda clip: (clip.patient, clip.path if clip.kind == "dicom" else clip.stem))


def stem_of(path: str) -> str:
    """A file's name without the suffixes that mark its kind."""
    name = os.path.basename(path)
    return name[: len(name) - max(len(suffix) for suffix in ("", *readers.KINDS) if name.lower().endswith(suffix))]


def view_and_phase(stem: str) -> tuple[View | None, Phase | None]:
    """View and phase in a file's name, each None if not shown."""
    view, phase = VIEW_IN_NAME.search(stem), PHASE_IN_NAME.search(stem)
    return view and View(f"{view[1] or view[2]}CH"), phase and Phase(phase[1].upper())


def name_clip(path: str, source: str, kind: str) -> Clip:
    """A clip named after its file: the patient is the text before the view, or the folder, or the whole name."""
    stem, match = stem_of(path), VIEW_IN_NAME.search(stem_of(path))
    folder = os.path.basename(os.path.dirname(path))
    patient = (stem[: match.start()] or folder) if match else (PHASE_IN_NAME.sub("", stem) or folder)
    shown = path[len(source) :].lstrip("/") or os.path.basename(path)
    return Clip(path, kind, patient.strip("_-. ") or stem, stem, *view_and_phase(stem), shown)


def separate_folders(clips: list[Clip]) -> list[Clip]:
    """If folders share a patient's name, rename it after each: `ann` and `bob`, or `ann_visit1` if one level is not enough."""
    folders = defaultdict(set)
    for clip in clips:
        folders[clip.patient].add(os.path.dirname(clip.path))
    shared = set().union(*(found for found in folders.values() if len(found) > 1))
    parts, names = {folder: [part for part in folder.split("/") if part] for folder in shared}, {}
    for depth in range(1, 1 + max(map(len, parts.values()), default=0)):
        names = {folder: "_".join(found[-depth:]) for folder, found in parts.items()}
        if len(set(names.values())) == len(names):
            break

    def renamed(clip: Clip) -> Clip:
        folder = names.get(os.path.dirname(clip.path))
        return replace(clip, patient=folder, stem=f"{folder}_{clip.stem}") if len(folders[clip.patient]) > 1 else clip

    return [renamed(clip) for clip in clips]


def name_dicoms(paths: list[str], view: View | None) -> list[Clip]:
    """Name DICOM clips by study, as study3f9a2c71d04e_4CH_clip0b61e7: only view and phase come from the path.

    The names are keyed digests of a study's identifiers and of a file's bytes. Files belong to one study if their identifiers
    agree and they share a folder or a trustworthy StudyInstanceUID: a long one, whose series do not span several folders.
    """
    if not paths:
        return []
    from heartseg.datasets import dicom

    secret, found, folders = name_secret(), [], defaultdict(set)
    for path in paths:
        try:
            raw = filesystem.read_bytes(path)
        except OSError:  # reported when the pixels are read
            raw = path.encode()
        tags = dicom.identify(raw, secret)
        found.append((path, dicom.digest(secret, raw)[:6], tags))
        folders[tags.get("SeriesInstanceUID")].add(os.path.dirname(path))
    clips, studies, related, places = [], {}, defaultdict(set), defaultdict(set)
    for path, number, tags in found:
        series = tags.pop("SeriesInstanceUID", None)
        if not series or len(folders[series]) > 1:
            tags["folder"] = os.path.dirname(path)
        patient = "study" + dicom.digest(secret, repr(sorted(tags.items())).encode())[:12]
        studies[patient] = tags
        places[patient].add(os.path.dirname(path))
        related[tags.get("StudyInstanceUID") or tags.get("PatientID")].add(patient)
        shown_view, phase = view_and_phase(os.path.splitext(os.path.basename(path))[0])
        named = shown_view or view, phase
        stem = "_".join(filter(None, [patient, *named, f"clip{number}"]))
        clips.append(Clip(path, "dicom", patient, stem, *named, stem))
    remarks = {}
    for known, group in related.items():
        for patient in group if known else ():
            others = [(other, studies[other]) for other in sorted(group)]
            remarks[patient] = remark(studies[patient], others, len(places[patient]))
    return [replace(clip, remark=remarks.get(clip.patient, "")) for clip in clips]


def remark(tags: dict[str, str], group: list[tuple[str, dict[str, str]]], num_folders: int) -> str:
    """Why a study was kept apart from another of its `group`, or how weak the evidence is that its files belong together."""
    shared = "StudyInstanceUID" if "StudyInstanceUID" in tags else "PatientID"
    for other, others in group:
        differ = [tag for tag in tags | others if tags.get(tag) != others.get(tag)]
        if differ:
            return f"{other} has the same {shared} but a different {' and '.join(differ)}: they were kept apart"
    if shared == "PatientID":
        return "its files have no StudyInstanceUID: only their folder shows that they are one study"
    if num_folders > 1 and "PatientBirthDate" not in tags:
        return "its files lie in several folders: only their StudyInstanceUID shows that they are one study"
    return ""


def name_secret() -> bytes:
    """The secret that keys the names of DICOM studies: HEARTSEG_NAME_KEY, or a file in the user's home, created if missing."""
    if given := os.environ.get("HEARTSEG_NAME_KEY"):
        return given.encode()
    folder = os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "heartseg")
    path = os.path.join(folder, "name_key")
    try:
        if not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=folder)  # which only its owner can read
            with open(handle, "w") as stream:
                stream.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(temporary, path)
            os.unlink(temporary)
        return filesystem.read_bytes(path)
    except OSError as error:
        problem = f"The secret that keys the names of DICOM studies, {path}, cannot be read or created ({error.strerror})"
        raise UserError(f"{problem}: set HEARTSEG_NAME_KEY to a secret text of your own.") from error


def separate_stems(clips: list[Clip]) -> list[Clip]:
    """Rename a patient's clips whose outputs would have the same name: by their suffix (x_avi, x_mp4) or by a number."""
    counts, taken, named = Counter((clip.patient, clip.stem) for clip in clips), set(), []
    for clip in clips:
        stem, number = clip.stem, 1
        if counts[clip.patient, stem] > 1:
            suffix = os.path.basename(clip.path)[len(stem_of(clip.path)) :] if clip.kind != "dicom" else ""
            first = stem = stem + suffix.lower().replace(".", "_")
            while (clip.patient, stem) in taken or (stem != clip.stem and (clip.patient, stem) in counts):
                number += 1
                stem = f"{first}_{number}"
        taken.add((clip.patient, stem))
        named.append(replace(clip, stem=stem, shown=stem if clip.kind == "dicom" else clip.shown))
    return named


def check_out(out: str, source: str, clips: Iterable[Clip]) -> None:
    """Raise UserError if outputs would be inside the input folder, where the next run would treat them as inputs."""
    if filesystem.is_uri(source) or filesystem.is_uri(out) or os.path.isfile(source):
        return
    inside = os.path.realpath(source) + os.sep
    folders = {out} | {filesystem.join(out, clip.patient) for clip in clips}
    is_inside = any((os.path.realpath(folder) + os.sep).startswith(inside) for folder in folders)
    why = "where the next run would take them for inputs: give a folder outside it"
    require(not is_inside, f"--out {out} would put files inside --input {source}, {why}.")


def clear(out: str, clips: Iterable[Clip]) -> int:
    """Remove an earlier call's results; returns the number of its masks that `clips` will not replace."""
    tables, asked = filesystem.join(out, "studies.json"), {f"{clip.patient}/{clip.stem}_pred.nii.gz" for clip in clips}
    earlier = {clip["mask"] for clip in filesystem.read_json(tables).get("clips", [])} if filesystem.exists(tables) else set()
    filesystem.publish_json(tables, {"unfinished": True, "clips": [{"mask": mask} for mask in sorted(asked | earlier)]})
    filesystem.remove(filesystem.join(out, "ef.csv"))
    stems = defaultdict(set)
    for mask in earlier:
        patient, _, name = mask.rpartition("/")
        if patient and os.path.basename(patient) == patient and patient != "..":  # inside this folder, whatever a table lists
            stems[patient].add(name.removesuffix("_pred.nii.gz"))
    for patient, known in stems.items():
        folder = filesystem.join(out, patient)
        names = filesystem.list_names(folder)
        results = [name for name in names if name.endswith(ENDINGS) and name.rpartition("_")[0] in known]
        for name in results:
            filesystem.remove(filesystem.join(folder, name))
        if results and len(results) == len(names):
            filesystem.remove(folder)
    return len(earlier - asked)


def output(out: str, clip: Clip, ending: str) -> str:
    """Path of one of a clip's outputs, such as `_pred.nii.gz`."""
    return filesystem.join(out, clip.patient, clip.stem + ending)


def write_masks(path: str, masks: np.ndarray, frames: Frames) -> None:
    """Write masks uint8 [T,H,W] on the file's whole grid: in a NIfTI's own layout, otherwise in CAMUS's, at full size."""
    whole = np.flip(masks, frames.flips)
    if frames.box:
        top, left, height, width = frames.box
        cut, whole = whole, np.zeros((len(masks), height, width), np.uint8)
        whole[:, top : top + cut.shape[1], left : left + cut.shape[2]] = cut
    if frames.place:
        nifti.write_frames(path, whole, frames.place)
    else:
        nifti.write_nifti(path, whole, frames.spacing_mm)
