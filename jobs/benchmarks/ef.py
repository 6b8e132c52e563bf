"""Our ejection fraction of the expert's outlines against the dataset's own, and pictures of those that differ.

`python jobs/benchmark.py ef --source CAMUS --out FOLDER`
"""

import time
from dataclasses import dataclass

import numpy as np

from heartseg.datasets import camus
from heartseg.errors import require
from heartseg.evaluation.ground_truth import Case, TreeTruth
from heartseg.labels import VIEWS
from heartseg.metrics import cardiac_indices, simpson
from heartseg.metrics.agreement import agree
from heartseg.reporting import contours, plots
from heartseg.storage import filesystem
from jobs.benchmarks.two_sides import print_table

REFERENCE = "ef_reference.json"
CONVENTIONS = ("camus", "ase")
ROWS = 448  # of a picture of one still


@dataclass(frozen=True)
class Options:
    """What to measure on."""

    source: str = ""
    """Folder of the CAMUS release, whose cfg files hold each patient's EF; or one with an ef_reference.json, from patient to
    [EDV ml, ESV ml, EF %]."""
    out: str = ""
    """Folder for a picture of every patient whose EF differs by more than --points; none are drawn if not given."""
    points: float = 5.0
    """Difference in EF points, by the reference's own convention, beyond which a patient is shown."""
    limit: int = 0
    """Only the first so many patients that have a reference; 0 takes all."""


@dataclass(frozen=True)
class Compared:
    """A patient, the reference EF in percent and its convention, our `patient_indices` row, and its seconds."""

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
    require(bool(options.source), "--source is missing: give the folder of the CAMUS release.")
    require(options.limit >= 0 and options.points >= 0, "--limit and --points must be at least 0.")
    found = compare_all(options.source, options.limit)
    own, far = found[0].convention, shown(found, options.points)
    chosen = {name: (name, found) for name in CONVENTIONS}
    chosen[f"{own}, those within {options.points:g} points"] = (own, [one for one in found if one not in far])
    ms = 1000 * np.mean([one.seconds for one in found])
    title = (
        f"ef: the reference's convention is {own}; {ms:.1f} ms a patient from label maps to all volumes, areas and fractions"
    )
    rows = [(name, *agreement(convention, some)) for name, (convention, some) in chosen.items()]
    print_table(title, ("", "n", "r", "bias", "MAE", "median difference"), rows)
    for one in far:
        print(f"{one.patient}: {one.row[f'ef_{own}']:.1f} %, reference {one.reference:.1f} %")
        if options.out:
            filesystem.publish(filesystem.join(options.out, f"{one.patient}.png"), plots.save_png(picture(options.source, one)))
    for one in (one for one in found if np.isnan(one.difference)):
        print(f"{one.patient}: no EF: {one.row['reason']}")
    return found


def compare_all(source: str, limit: int) -> list[Compared]:
    """The first `limit` patients that have a reference, or all; raises UserError if there is no usable reference."""
    path, found = filesystem.join(source, REFERENCE), []
    reference = filesystem.read_json(path) if filesystem.exists(path) else None
    for patient in camus.find_patients(source):
        if 0 < limit <= len(found):
            break
        infos = (camus.read_info(source, patient, view) for view in VIEWS)
        info = next((info for info in infos if info and info.ef is not None), None)
        if reference is not None:
            info = camus.Info(ef=reference[patient][-1]) if patient in reference else None
        if info:
            cases, _ = TreeTruth(source).cases([patient])  # a damaged still is left out, and the row has the reason
            started = time.process_time()
            row = cardiac_indices.patient_indices({(case.view, case.phase): (case.truth, case.spacing_mm) for case in cases})
            seconds = time.process_time() - started
            found.append(Compared(patient, info.ef, info.ef_convention, row, seconds))
    require(bool(found), f"{source} has no reference EF: neither cfg files with an EF nor a filled {REFERENCE}.")
    conventions = sorted({one.convention for one in found})
    fit = len(conventions) == 1 and conventions[0] in CONVENTIONS
    expected = f"give all of them one of {', '.join(CONVENTIONS)}."
    require(fit, f"The cfg files of {source} have EFConvention {', '.join(conventions)}: {expected}")
    return found


def shown(found: list[Compared], points: float) -> list[Compared]:
    """Patients whose EF differs by more than some points, the furthest first."""
    return sorted((one for one in found if abs(one.difference) > points), key=lambda one: -abs(one.difference))


def agreement(convention: str, found: list[Compared]) -> list[float | None]:
    """Number of patients, correlation, bias, mean and median difference of one convention's EF and the reference."""
    ef, reference = np.array([(one.row[f"ef_{convention}"], one.reference) for one in found], float).reshape(-1, 2).T
    both, differences = agree(ef, reference), np.abs(ef - reference)[np.isfinite(ef)]
    return [*(both[key] for key in ("n", "r", "bias", "mae")), np.median(differences) if len(differences) else None]


def picture(source: str, one: Compared) -> plots.Figure:
    """The four stills with the outlines and the long axis that we measure."""
    cells = []
    for case in TreeTruth(source).cases([one.patient])[0]:
        length_mm = cardiac_indices.lv_length(case.truth, case.spacing_mm)
        cells.append((drawn(case), f"{case.view} {case.phase}, {length_mm:.1f} mm long"))
    sheet = plots.contact_sheet(cells)
    ours = f"EF {one.row['ef_camus']:.1f} % (camus), {one.row['ef_ase']:.1f} % (ase)"
    sheet.supxlabel(f"{one.patient}: {ours}, reference {one.reference:.1f} %", color=plots.INK, fontsize=10)
    return sheet


def drawn(case: Case) -> np.ndarray:
    """The image uint8 [h,w,3] with its outlines and the long axis, enlarged."""
    canvas = contours.as_rgb(contours.overlay(case.image, case.truth, case.spacing_mm, ROWS))
    axis = simpson.long_axis(case.truth, case.spacing_mm)
    if axis is not None:
        factor = np.array(canvas.shape[:2]) / case.image.shape
        along = np.linspace(*(axis + 0.5) * factor, num=2 * len(canvas)).astype(int)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            places = np.clip(along + (row, column), 0, np.array(canvas.shape[:2]) - 1)
            canvas[tuple(places.T)] = 255
    return canvas
