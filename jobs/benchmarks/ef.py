"""Our ejection fraction of the expert's outlines against the dataset's own, and pictures of those that differ.

`python jobs/benchmark.py ef --source CAMUS --out FOLDER`
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heartseg.datasets import camus
from heartseg.datasets.nifti import DamagedRecording
from heartseg.errors import UserError, require
from heartseg.labels import VIEWS
from heartseg.metrics import cardiac_indices, simpson
from heartseg.metrics.agreement import agree
from heartseg.reporting import contours, plots
from heartseg.storage import filesystem
from jobs.support import command_line

REFERENCE = "ef_reference.json"
CONVENTIONS = ("camus", "ase")
ROWS = 448  # of a picture of one still


@dataclass(frozen=True)
class Options:
    """What to measure on."""

    source: str = ""
    """Folder of the CAMUS release, whose cfg files say each patient's EF; or one with an ef_reference.json, from patient to
    [EDV ml, ESV ml, EF %]."""
    out: str = ""
    """Folder for a picture of every patient whose EF differs by more than --points; none are drawn where not given."""
    points: float = 5.0
    """Difference in EF points, by the reference's own convention, beyond which a patient is shown."""
    limit: int = 0
    """Only the first so many patients that have a reference; 0 takes all."""


@dataclass(frozen=True)
class Compared:
    """A patient's reference EF in percent, the convention that it is of, our `patient_indices` row, seconds."""

    patient: str
    reference: float
    convention: str
    row: dict
    seconds: float

    @property
    def difference(self) -> float:
        """Points by which our EF of the reference's own convention is above it."""
        return self.row[f"ef_{self.convention}"] - self.reference


def run(options: Options) -> list[Compared]:
    """Measure every patient with a reference, print the table, and draw those that differ."""
    source = command_line.absolute(
        command_line.require_flag(options.source, "--source", "the folder of the CAMUS release"), "source"
    )
    require(options.limit >= 0 and options.points >= 0, "--limit and --points must be at least 0.")
    reference = references(source)
    chosen = list(reference)[: options.limit or None]
    found = [compare(source, patient, *reference[patient]) for patient in chosen]
    print("\n".join(table(found, options.points)))
    if options.out:
        folder = command_line.absolute(options.out, "out")
        for one in shown(found, options.points):
            path = filesystem.join(folder, f"{one.patient}.png")
            filesystem.publish(path, plots.save_png(picture(source, one)))
            print(path)
    return found


def references(source: str) -> dict[str, tuple[float, str]]:
    """EF in percent and its convention by patient; raises UserError where the source says none."""
    path = filesystem.join(source, REFERENCE)
    if filesystem.exists(path):
        said = {patient: (float(values[-1]), "camus") for patient, values in filesystem.read_json(path).items()}
        require(bool(said), f"{path} names no patient: remove it, or fill it.")
        return said
    found = {}
    for patient in camus.find_patients(source):
        for view in VIEWS:
            info = camus.read_info(source, patient, view)
            if info and info.ef is not None:
                found.setdefault(patient, (info.ef, info.ef_convention))
    if not found:
        raise UserError(f"{source} says nobody's EF: it has neither cfg files with an EF nor {REFERENCE}.")
    conventions = {convention for _, convention in found.values()}
    if len(conventions) > 1 or not conventions <= set(CONVENTIONS):
        raise UserError(
            f"The cfg files of {source} say EFConvention {', '.join(sorted(conventions))}: give all of them one of "
            f"{', '.join(CONVENTIONS)}."
        )
    return found


def compare(source: str, patient: str, reference: float, convention: str) -> Compared:
    """Measure the expert's outlines of a patient; a damaged file leaves its still out, and the row says so."""
    masks = {}
    for still in cardiac_indices.STILLS:
        recording = _read(source, patient, still)
        if recording:
            masks[still] = (recording.mask, recording.spacing_mm)
    started = time.process_time()
    row = cardiac_indices.patient_indices(masks)
    return Compared(patient, reference, convention, row, time.process_time() - started)


def _read(source: str, patient: str, still: tuple) -> camus.Recording | None:
    try:
        return camus.read_still(source, patient, *still)
    except DamagedRecording:
        return None


def shown(found: list[Compared], points: float) -> list[Compared]:
    """Patients whose EF differs by more than some points, the furthest first."""
    far = [one for one in found if abs(one.difference) > points]
    return sorted(far, key=lambda one: -abs(one.difference))


def table(found: list[Compared], points: float) -> list[str]:
    """Agreement of both conventions over all patients, the reference's own without those that are shown, and these by name."""
    own, far = found[0].convention, {one.patient for one in shown(found, points)}
    within = [one for one in found if one.patient not in far]
    lines = [f"{'':<34}{'n':>5}{'r':>7}{'bias':>7}{'MAE':>7}{'median difference':>19}"]
    for name, convention, chosen in (
        *((convention, convention, found) for convention in CONVENTIONS),
        (f"{own}, those within {points:g} points", own, within),
    ):
        ef = np.array([one.row[f"ef_{convention}"] for one in chosen], float)
        reference = np.array([one.reference for one in chosen], float)
        both, differences = agree(ef, reference), np.abs(ef - reference)
        median = np.nanmedian(differences) if np.isfinite(differences).any() else np.nan
        r, bias, mae = (np.nan if both[key] is None else both[key] for key in ("r", "bias", "mae"))
        lines.append(f"{name:<34}{both['n']:>5}{r:>7.3f}{bias:>+7.2f}{mae:>7.2f}{median:>19.2f}")
    lines.append(f"the reference's convention is {own}")
    ms = 1000 * np.mean([one.seconds for one in found])
    lines.append(f"{ms:.1f} ms a patient, one core, from label maps to all volumes, areas and fractions")
    lines += [f"{o.patient}: {o.row[f'ef_{own}']:.1f} %, reference {o.reference:.1f} %" for o in shown(found, points)]
    lines += [f"{o.patient}: no EF: {o.row['reason']}" for o in found if np.isnan(o.difference)]
    return lines


def picture(source: str, one: Compared) -> plots.Figure:
    """The four stills with the outlines and the long axis that we measure."""
    cells = []
    for view, phase in cardiac_indices.STILLS:
        recording = _read(source, one.patient, (view, phase))
        if recording:
            length_mm = cardiac_indices.lv_length(recording.mask, recording.spacing_mm)
            cells.append((drawn(recording), f"{view} {phase}, {length_mm:.1f} mm long"))
    sheet = plots.contact_sheet(cells)
    said = (
        f"{one.patient}: EF {one.row['ef_camus']:.1f} % (camus), reference {one.reference:.1f} %, ase {one.row['ef_ase']:.1f} %"
    )
    sheet.supxlabel(said, color=plots.INK, fontsize=10)
    return sheet


def drawn(recording: camus.Recording) -> np.ndarray:
    """The image uint8 [h,w,3] with its outlines and the long axis, enlarged."""
    canvas = contours.as_rgb(contours.overlay(recording.image, recording.mask, recording.spacing_mm, ROWS))
    axis = simpson.long_axis(recording.mask, recording.spacing_mm)
    if axis is not None:
        factor = np.array(canvas.shape[:2]) / recording.image.shape
        along = np.linspace(*(axis + 0.5) * factor, num=2 * len(canvas)).astype(int)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            places = np.clip(along + (row, column), 0, np.array(canvas.shape[:2]) - 1)
            canvas[tuple(places.T)] = 255
    return canvas


def job(argv: Sequence[str]) -> None:
    """The command line."""
    shown_name = "python jobs/benchmark.py ef"
    run(command_line.parse_line(Options, argv, shown_name, "Compare our EF of the expert's outlines with the dataset's own."))
