"""Annotated images to score, from shards or a CAMUS tree, and other programs' masks of them; both list what is missing."""

import contextlib
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from heartseg.datasets import camus, nifti
from heartseg.datasets.camus import Info
from heartseg.datasets.nifti import DamagedRecording
from heartseg.errors import UserError, require
from heartseg.inference.segmenter import Segmented
from heartseg.labels import Phase, View
from heartseg.shards.reader import FrameRows, Shards, load_groups, open_shards
from heartseg.storage import filesystem

NIFTI_NAME = re.compile(r"(?P<stem>.+?)(?P<suffix>_pred|_gt)?\.nii(?:\.gz)?", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Case:
    """An image to score: the expert's label map `truth`, uint8 [H,W] on the native grid with (depth, lateral) `spacing_mm`.

    `image` is uint8 and upright, on the native or the stored grid; None if not requested. View and phase are None if
    unknown; `frame` is its number in a sequence. `place` is the layout of its file, None for a case from shards.
    """

    patient: str
    view: View | None
    phase: Phase | None
    truth: np.ndarray
    spacing_mm: tuple[float, float]
    image: np.ndarray | None = None
    info: Info | None = None
    frame: int | None = None
    place: nifti.Place | None = None

    @property
    def name(self) -> str:
        """The case's name, such as `patient0001_2CH_ED`."""
        return f"{self.patient}_{self.view}_{self.phase}"


def _missing(patient: str, view: View, phase: Phase, error: DamagedRecording) -> dict[str, str]:
    """A still that cannot be scored, as a row of the summary's `missing`."""
    return {"patient": patient, "view": str(view), "phase": str(phase), "file": error.file, "reason": error.reason}


@dataclass(frozen=True, eq=False)
class ShardTruth:
    """The cases of a group in shards; their images are on the stored grid."""

    shards: Shards
    group: str

    @functools.cached_property
    def frames(self) -> FrameRows:
        """The group's rows, read once in each process."""
        return load_groups(self.shards, [self.group])[self.group]

    @functools.cached_property
    def rows(self) -> dict[str, list[int]]:
        """Row numbers by patient."""
        found = defaultdict(list)
        for row, patient in enumerate(self.frames.table["patient"].to_pylist()):
            found[patient].append(row)
        return found

    def picture(self, case: Case) -> np.ndarray | None:
        """A case's image, uint8 [h,w] on the stored grid."""
        return case.image

    def cases(self, patients: Sequence[str]) -> tuple[list[Case], list[dict]]:
        """The cases of some patients, and no missing ones: damaged files never become rows."""
        return [self._case(row) for patient in patients for row in self.rows.get(patient, [])], []

    def _case(self, row: int) -> Case:
        kept = {name: self.frames.table[name][row].as_py() for name in self.frames.table.column_names if name != "native_mask"}
        info = Info(**{name: kept[name] for name in ("quality", "ef", "sex", "age", "frame_rate", "ef_convention")})
        truth, spacing_mm = self.frames.native_mask(row), tuple(kept["native_spacing_mm"])
        view, phase = kept["view"] and View(kept["view"]), kept["phase"] and Phase(kept["phase"])
        return Case(kept["patient"], view, phase, truth, spacing_mm, self.frames.images[row, 0].numpy(), info, kept["frame"])

    def __reduce__(self):
        # A worker in another process reads the manifest and rows itself; neither is pickled.
        return _open_truth, (self.shards.path, self.group)


def _open_truth(path: str, group: str) -> ShardTruth:
    return ShardTruth(open_shards(path), group)


@dataclass(frozen=True, eq=False)
class TreeTruth:
    """The ED and ES stills of a CAMUS tree; images are on the native grid, or left out if `images` is False."""

    source: str
    images: bool = True

    def picture(self, case: Case) -> np.ndarray | None:
        """A case's image, uint8 [H,W]; None if it is unreadable or only the mask exists."""
        if case.image is not None:
            return case.image
        with contextlib.suppress(DamagedRecording):
            return camus.read_still(self.source, case.patient, case.view, case.phase).image

    def cases(self, patients: Sequence[str]) -> tuple[list[Case], list[dict]]:
        """The cases of some patients, and the stills that are damaged or missing."""
        found, missing = [], []
        for patient in patients:
            for view, phase in camus.stills_of():
                try:
                    found.append(self._case(patient, view, phase))
                except DamagedRecording as error:
                    missing.append(_missing(patient, view, phase, error))
        return found, missing

    def _case(self, patient: str, view: View, phase: Phase) -> Case:
        if self.images:
            still = camus.read_still(self.source, patient, view, phase)
            return Case(patient, view, phase, still.mask, still.spacing_mm, still.image, still.info, place=still.place)
        image, mask = (camus.recording_path(self.source, patient, view, phase, suffix) for suffix in ("", "_gt"))
        onto = nifti.read_place(image)  # a mask written without an affine is oriented like the image
        truth, spacing_mm, own = read_mask(mask, onto)
        info = camus.read_info(self.source, patient, view)
        return Case(patient, view, phase, truth, spacing_mm, info=info, place=onto or own)


def read_mask(path: str, onto: nifti.Place | None = None) -> tuple[np.ndarray, tuple[float, float], nifti.Place]:
    """A still's mask uint8 [H,W] oriented like `onto`, (depth, lateral) spacing in mm and place; raises DamagedRecording."""
    masks, spacing_mm, place = nifti.read_nifti(path, onto=onto)
    if len(masks) > 1:
        raise DamagedRecording(f"the mask of a still must have one frame, not {len(masks)}", path)
    return nifti.as_labels(masks[0], path), spacing_mm, place


def check_pattern(pattern: str) -> None:
    """Raise UserError if a pattern has an invalid field, leads outside its folder, or gives several stills the same file."""
    fields = "{patient}, {view} and {phase}"
    try:
        names = [pattern.format(patient=p, view=v, phase=f) for p, v, f in itertools.product("ab", "cd", "ef")]
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--pattern {pattern!r} has an invalid field: use only {fields}.") from error
    is_inside = ".." not in names[0].split("/") and not names[0].startswith("/")
    require(is_inside, f"--pattern {pattern!r} leads outside --predictions: use a path below it.")
    require(len(set(names)) == len(names), f"--pattern {pattern!r} gives several stills the same file: use all of {fields}.")


@dataclass(frozen=True, eq=False)
class FilePredictions:
    """NIfTI masks below a folder, found as `patient0001_2CH_ED_pred`, `…_gt` or without a suffix, or by the `pattern`."""

    folder: str
    pattern: str = ""
    files: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str, pattern: str = "") -> "FilePredictions":
        """List the masks of a folder; raises UserError if it has none or the pattern cannot name a file."""
        require(filesystem.exists(folder), f"--predictions {folder} does not exist: give the folder that holds the masks.")
        if pattern:
            check_pattern(pattern)
        files = defaultdict(list)
        for path in filesystem.walk(folder):
            if match := NIFTI_NAME.fullmatch(filesystem.last_part(path)):
                files[match["stem"] + (match["suffix"] or "").lower()].append(path)
        require(bool(files), f"{folder} holds no NIfTI files: give the folder that holds the masks.")
        return cls(folder, pattern, dict(files))

    def has_any(self, patient: str) -> bool:
        """True if a patient has a mask of at least one view and phase."""
        return any(self.path(patient, view, phase) for view, phase in camus.stills_of())

    def path(self, patient: str, view: View | None, phase: Phase | None) -> str | None:
        """The file of a still's mask, or None; raises UserError if two files match."""
        if self.pattern:
            path = filesystem.join(self.folder, self.pattern.format(patient=patient, view=view, phase=phase))
            return path if filesystem.exists(path) else None
        name = f"{patient}_{view}_{phase}"
        for stem in (f"{name}_pred", f"{name}_gt", name):
            found = self.files.get(stem, [])
            if len(found) > 1:
                raise UserError(f"{found[0]} and {found[1]} could both be the mask of {name}: use --pattern to choose.")
            if found:
                return found[0]
        return None

    def masks(self, cases: Sequence[Case]) -> tuple[list[Segmented | None], list[dict]]:
        """A mask or None for each case, and a row of the summary's `missing` for each None."""
        found, missing = [], []
        for case in cases:
            path = self.path(case.patient, case.view, case.phase)
            try:
                if path is None:
                    raise DamagedRecording("the prediction is missing", case.name)
                mask, *_ = read_mask(path, case.place)
                if mask.shape != case.truth.shape:
                    raise DamagedRecording(f"the prediction has shape {mask.shape}, the expert's mask {case.truth.shape}", path)
            except DamagedRecording as error:
                missing.append(_missing(case.patient, case.view, case.phase, error))
                found.append(None)
            else:
                found.append(Segmented(mask, confidence=float("nan")))
        return found, missing
