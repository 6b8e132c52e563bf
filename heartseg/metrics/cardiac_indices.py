"""Clinical indices from a patient's label maps, in one flat row: volumes, ejection fraction, wall and atrium.

Lang et al. 2015 below is the recommendation of the American Society of Echocardiography and the European Association of
Cardiovascular Imaging, J Am Soc Echocardiogr 28:1-39. For research only: none of this is a medical device.

The biplane ejection fraction has two conventions, never mixed; they use the same disks and differ only in a disk's height:

- `ase`: each phase's disks are L / 20 high, L the longer of that phase's two lengths, in 2CH and in 4CH (Lang et al.).
- `camus`: all disks of both phases are L / 20 high, L the longest of the four lengths, as in the dataset authors' script
  that computed the EF of the cfg files. The ventricle's shortening is then not part of the EF, which is about 8 points lower.
  The script also takes the first contour instead of the largest, looks for the base within 8 pixels and measures no disk
  narrower than 16 pixels, whatever a pixel's size in mm, and rounds to whole ml; none of this is done here.
"""

from collections.abc import Mapping
from itertools import product

import numpy as np

from heartseg.labels import PHASES, VIEWS, Phase, View
from heartseg.metrics.myocardium import Myocardium, endocardium, length, measure_myocardium
from heartseg.metrics.simpson import DISKS, Chamber, Frame, measure

VOLUMES = {Phase.ED: "edv_ml", Phase.ES: "esv_ml"}
METHODS = ("camus", "ase", "4ch_ase", "2ch_ase", "area_length")
STILLS = tuple(product(VIEWS, PHASES))
# The numeric columns of a row of `patient_indices`.
INDICES = (
    *(f"{name}_{method}" for method in METHODS for name in (*VOLUMES.values(), "ef")),
    *(f"lv_length_mm_{view}_{phase}" for view, phase in STILLS),
    *(f"wall_area_cm2_{view}_{phase}" for view, phase in STILLS),
    *(f"la_area_cm2_{view}_{phase}" for view, phase in STILLS),
    *(f"la_volume_ml_{phase}" for phase in PHASES),
    "la_emptying_fraction",
    *(f"fac_{view}" for view in VIEWS),
    *(f"endo_strain_{view}" for view in VIEWS),
    "endo_strain",
    *(f"mapse_mm_{view}" for view in VIEWS),
    *(f"sphericity_{phase}" for phase in PHASES),
    *(f"wall_thickness_mm_{view}_{phase}" for view, phase in STILLS),
    "lv_mass_g",
)
MUSCLE_G_PER_ML = 1.05  # Lang et al. 2015
Still = tuple[View, Phase]
Masks = Mapping[Still, tuple[np.ndarray, tuple[float, float] | None]]


def disks_ml(one: Chamber, other: Chamber, length_mm: float) -> float:
    """Method of disks in ml: pi / 4 times the sum of the products of widths, times L / 20 (Lang et al. 2015)."""
    return float(np.pi / 4 * (one.widths_mm @ other.widths_mm) * length_mm / DISKS / 1000)


def ejection_fraction(edv: float, esv: float) -> float:
    """EF in percent, 100 (EDV - ESV) / EDV (Lang et al. 2015); NaN if EDV is 0 or below ESV, or one is NaN."""
    return 100 * (edv - esv) / edv if edv > 0 and 0 <= esv <= edv else float("nan")


def frame_measures(mask: np.ndarray, spacing_mm: tuple[float, float]) -> tuple[float, float, float]:
    """The ventricle's single-plane volume in ml, area in cm2 and endocardial contour length in mm, from a label map [H,W].

    NaN without a ventricle; for a spacing of (1, aspect), the values have no unit.
    """
    ventricle = measure(mask, spacing_mm).ventricle
    if isinstance(ventricle, str):
        return (float("nan"),) * 3
    endo_length_mm = length(endocardium(mask, spacing_mm, ventricle))
    return disks_ml(ventricle, ventricle, ventricle.length_mm), ventricle.area_mm2 / 100, endo_length_mm


def patient_indices(masks: Masks, spacing_known: bool = True) -> dict[str, float | str]:
    """All indices of one patient in a flat row: INDICES, NaN if unknown, and `reason`, '' if all are known.

    `masks` are label maps [H,W] with their (depth, lateral) spacing in mm. Unless `spacing_known`, the spacing gives only a
    pixel's shape (None: square), and volumes and areas are missing. EF needs no scale: each view is measured in units of its
    end-diastolic long axis, which is the same axis in both views. A view's two phases must have the same scale: if their shapes
    differ and they have no spacing, or only one has a spacing, the view is left out.

    The atrium's volume is by disks too, which Lang et al. 2015 prefer to area-length, along the line from the mitral
    plane's midpoint to the most distant point, with the longer of the two lengths. If ESV is above EDV,
    the row has both volumes, but no EF. No error is raised: a missing index has a reason.
    """
    frames, walls, reasons = _measured(masks, spacing_known)
    if not spacing_known:
        # Without a spacing, only a picture's shape indicates its scale; with one, the scale is millimetres.
        scales = {(view, np.shape(mask) if spacing is None else "mm") for (view, _), (mask, spacing) in masks.items()}
        for view in VIEWS:
            if sum(found == view for found, _ in scales) > 1:
                frames, walls = ({still: one for still, one in found.items() if still[0] != view} for found in (frames, walls))
                reasons.append(f"{view} ED and ES have different scales, so the view is not measured")
    row = dict.fromkeys(INDICES, float("nan")) | _function(frames, walls)
    ventricles = {still: frame.ventricle for still, frame in frames.items() if not isinstance(frame.ventricle, str)}
    if not spacing_known:
        reasons.append("no pixel spacing, so no volumes or areas")
        # In units of each view's long axis at end-diastole; a view without ED is left out.
        lengths = {view: chamber.length_mm for (view, phase), chamber in ventricles.items() if phase == Phase.ED}
        ventricles = {still: c.scaled(1 / lengths[still[0]]) for still, c in ventricles.items() if still[0] in lengths}
    for method, (edv, esv) in _volumes(ventricles).items():
        row[f"ef_{method}"] = ejection_fraction(edv, esv)
        if esv > edv:
            reasons.append(f"ES volume above ED volume ({method})")
        if spacing_known:
            row[f"edv_ml_{method}"], row[f"esv_ml_{method}"] = edv, esv
    if spacing_known:
        row |= _areas_and_atrium(frames) | _wall_and_shape(ventricles, walls, row)
        for view, moved_mm in _excursions(ventricles, masks).items():
            row[f"mapse_mm_{view}"] = moved_mm
            reasons += [f"{view} ED and ES are on different grids, so no MAPSE"] * bool(np.isnan(moved_mm))
        row["la_emptying_fraction"] = percent_less(row["la_volume_ml_ES"], row["la_volume_ml_ED"])
    return row | {"reason": "; ".join(reasons)}


def percent_less(before: float, after: float) -> float:
    """How much smaller the second is, in percent of the first; NaN if the first is 0 or one is NaN."""
    return 100 * (before - after) / before if before else float("nan")


def _measured(masks: Masks, spacing_known: bool) -> tuple[dict[Still, Frame], dict[Still, Myocardium], list[str]]:
    """Frames and their myocardium by (view, phase), and text naming what is missing."""
    frames, walls, reasons = {}, {}, []
    for view, phase in STILLS:
        mask, spacing_mm = masks.get((view, phase)) or (None, None)
        if spacing_mm is None and not spacing_known:
            spacing_mm = (1.0, 1.0)
        if mask is None:
            reasons.append(f"no {view} {phase} mask")
        elif np.ndim(mask) != 2:
            reasons.append(f"{view} {phase} mask is not two-dimensional")
        elif spacing_mm is None or not all(0 < value < np.inf for value in spacing_mm):
            reasons.append(f"no pixel spacing in {view} {phase}")
        else:
            frame = frames[view, phase] = measure(np.asarray(mask), spacing_mm)
            if not isinstance(frame.ventricle, str):
                walls[view, phase] = measure_myocardium(np.asarray(mask), spacing_mm, frame.ventricle)
            reasons += [f"{what} in {view} {phase}" for what in _missing(frame, spacing_known)]
    return frames, walls, reasons


def _missing(frame: Frame, spacing_known: bool) -> list[str]:
    """Texts that name what a frame lacks: only the ventricle if that is missing; without a scale, nothing else."""
    if isinstance(frame.ventricle, str):
        return [frame.ventricle]
    lacks = {frame.atrium: isinstance(frame.atrium, str), "no myocardium": not frame.wall_area_mm2}
    return [what for what, is_missing in lacks.items() if is_missing and spacing_known]


def _volumes(ventricles: dict[Still, Chamber]) -> dict[str, tuple[float, float]]:
    """EDV and ESV by method, NaN if a mask that the method needs is missing."""
    found = {method: {phase: float("nan") for phase in PHASES} for method in METHODS}
    longest_mm = max((chamber.length_mm for chamber in ventricles.values()), default=0.0)
    for phase in PHASES:
        two, four = (ventricles.get((view, phase)) for view in VIEWS)
        for chamber, method in ((two, "2ch_ase"), (four, "4ch_ase")):
            if chamber:
                found[method][phase] = disks_ml(chamber, chamber, chamber.length_mm)
        if two and four:
            found["ase"][phase] = disks_ml(two, four, max(two.length_mm, four.length_mm))
            # Dodge et al. 1960, Am Heart J 60:762-776: 8 A1 A2 / (3 pi L), L the shorter of two lengths.
            length_mm = min(two.length_mm, four.length_mm)
            found["area_length"][phase] = 8 * two.area_mm2 * four.area_mm2 / (3 * np.pi * length_mm) / 1000
            if len(ventricles) == len(STILLS):
                found["camus"][phase] = disks_ml(two, four, longest_mm)
    return {method: tuple(by_phase.values()) for method, by_phase in found.items()}


def _areas_and_atrium(frames: dict[Still, Frame]) -> dict[str, float]:
    """Areas in cm2 from every mask that shows the structure, and the atrium's biplane volume in ml."""
    row = {
        f"{name}_area_cm2_{view}_{phase}": area_mm2 / 100 or float("nan")
        for (view, phase), frame in frames.items()
        for name, area_mm2 in (("wall", frame.wall_area_mm2), ("la", frame.atrium_area_mm2))
    }
    for phase in PHASES:
        atria = [frames[view, phase].atrium for view in VIEWS if (view, phase) in frames]
        if len(atria) == len(VIEWS) and not any(isinstance(atrium, str) for atrium in atria):
            row[f"la_volume_ml_{phase}"] = disks_ml(*atria, max(atrium.length_mm for atrium in atria))
    return row


def _function(frames: dict[Still, Frame], walls: dict[Still, Myocardium]) -> dict[str, float]:
    """Fractional area change and endocardial longitudinal strain in percent; both need no scale.

    Strain is the relative change of the endocardial contour's length from ED to ES, negative where it shortens (Voigt et al.
    2015, J Am Soc Echocardiogr 28:183-193, "endocardial"), from two outlines, not by speckle tracking.
    """
    row = {}
    for view in VIEWS:
        ed, es = ((view, phase) for phase in PHASES)
        if ed in walls and es in walls:
            row[f"fac_{view}"] = percent_less(frames[ed].ventricle.area_mm2, frames[es].ventricle.area_mm2)
            row[f"endo_strain_{view}"] = -percent_less(walls[ed].endo_length_mm, walls[es].endo_length_mm)
    strains = [row[f"endo_strain_{view}"] for view in VIEWS if f"endo_strain_{view}" in row]
    return row | ({"endo_strain": float(np.mean(strains))} if len(strains) == len(VIEWS) else {})


def _wall_and_shape(ventricles: dict[Still, Chamber], walls: dict[Still, Myocardium], volumes: dict) -> dict[str, float]:
    """Long axes and wall thickness in mm, mass in g at ED, and sphericity; `volumes` has the `ase` volumes by column.

    Mass is the volume between epicardium and endocardium times 1.05 g/ml, as in Lang et al. 2015 for volumes; their
    area-length formula needs a short-axis view. Sphericity is the cavity's volume divided by that of a sphere as wide as the
    cavity is long (Mannaerts et al. 2004, Eur Heart J 25:680-687).
    """
    row = {f"lv_length_mm_{view}_{phase}": chamber.length_mm for (view, phase), chamber in ventricles.items()}
    row |= {f"wall_thickness_mm_{view}_{phase}": wall.thickness_mm for (view, phase), wall in walls.items()}
    for phase in PHASES:
        found = [ventricles[view, phase] for view in VIEWS if (view, phase) in walls]
        if len(found) < len(VIEWS):
            continue
        length_mm, cavity_ml = max(chamber.length_mm for chamber in found), volumes[f"{VOLUMES[phase]}_ase"]
        row[f"sphericity_{phase}"] = cavity_ml / (np.pi / 6 * length_mm**3 / 1000)
        outer = [walls[view, phase].epicardium for view in VIEWS]
        if phase == Phase.ED and all(outer):
            row["lv_mass_g"] = MUSCLE_G_PER_ML * (disks_ml(*outer, max(one.length_mm for one in outer)) - cavity_ml)
    return row


def _excursions(ventricles: dict[Still, Chamber], masks: Masks) -> dict[View, float]:
    """MAPSE in mm by view: how far the mitral hinges (their mean) move towards the ED apex; NaN if the phases' grids differ."""
    found = {}
    for view in VIEWS:
        ed, es = ((view, phase) for phase in PHASES)
        if ed in ventricles and es in ventricles:
            (one, one_mm), (other, other_mm) = masks[ed], masks[es]
            is_same = np.shape(one) == np.shape(other) and tuple(one_mm) == tuple(other_mm)
            before, start = ventricles[ed], ventricles[ed].hinges_mm.mean(axis=0)
            up = (before.far_mm - start) / before.length_mm
            moved_mm = float((ventricles[es].hinges_mm.mean(axis=0) - start) @ up)
            found[view] = moved_mm if is_same else float("nan")
    return found
