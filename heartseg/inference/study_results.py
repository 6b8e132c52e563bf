"""Results of clips: their files, a sequence's ED and ES, each patient's ejection fraction, and the tables of them all."""

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from heartseg.config.experiment import none_if_nan
from heartseg.datasets.readers import Frames
from heartseg.inference import study_files
from heartseg.inference.segmenter import REVIEW_THRESHOLD
from heartseg.inference.study_files import Clip
from heartseg.labels import BACKGROUND, CLASS_COLOURS, CLASS_TITLES, LA, PHASES, VIEWS, Phase
from heartseg.metrics import ed_es_detection, ef_intervals
from heartseg.metrics.anatomy_checks import implausibilities
from heartseg.metrics.cardiac_indices import INDICES, ejection_fraction, frame_measures, patient_indices
from heartseg.storage import filesystem

USUAL_DEPTH_MM = 145.0  # of apical views: assumed by the anatomical checks for a file without a scale
INTENDED_USE = "research use only, not a medical device"
# The first columns of ef.csv; the other indices follow.
FIRST = ("patient", "ef_ase", "edv_ml_ase", "esv_ml_ase", "ef_camus", "edv_ml_camus", "esv_ml_camus")
FIRST += tuple(f"{ef}_{end}" for ef in ef_intervals.EFS for end in ("low", "high"))
FIRST += ("ef_4ch_ase", "ef_2ch_ase", "from_4CH", "from_2CH", "doubts", "la_cut_off", "confidence", "reason")
# Characters in a cell of ef.csv, and in a terminal line besides the name; studies.json has the full text.
MAX_TEXT, MORE = 200, " … (more in studies.json)"
UNSURE = "the network is unsure of it"
MOST_APART = 20.0  # points of EF between two views of one heart
MOST_LENGTHS_APART = 0.15  # of the longer long axis: 12 % of CAMUS's patients are above it in experts' outlines


@dataclass(frozen=True, eq=False)
class ClipResult:
    """A clip's results after its files are written; `doubts` and `confidence` (the lowest) refer to the measured masks.

    `phases` maps ED and ES, if known, to (frame from 0, mask uint8 [H,W], None once dropped). A sequence has curves [T]:
    `volumes_ml` (single-plane) and `areas_cm2` of the cavity, without units if `spacing_mm` is None; with a beat, `strain` in
    percent.
    """

    clip: Clip
    frames: int
    spacing_mm: tuple[float, float] | None
    phases: dict[Phase, tuple[int, np.ndarray | None]]
    volumes_ml: np.ndarray | None
    notes: tuple[str, ...]
    doubts: tuple[str, ...]
    confidence: float
    areas_cm2: np.ndarray | None = None
    strain: np.ndarray | None = None
    frame_ms: float | None = None

    def without_masks(self) -> "ClipResult":
        """The same result without its masks, for which thousands of clips would have no memory."""
        return replace(self, phases={phase: (at, None) for phase, (at, _) in self.phases.items()})

    @property
    def marked(self) -> dict[int, str]:
        """`ED` and `ES` by frame (from 0)."""
        return {at: str(phase) for phase, (at, _) in self.phases.items()}

    @property
    def ef_single_plane(self) -> float:
        """EF in percent of a sequence, from the masks of its ED and ES in this one view; NaN if they are not found."""
        if self.volumes_ml is None or len(self.phases) < 2:
            return float("nan")
        edv, esv = (self.volumes_ml[self.phases[phase][0]] for phase in (Phase.ED, Phase.ES))
        return ejection_fraction(edv, esv)

    @property
    def peak_strain(self) -> dict[str, float | int]:
        """The strongest shortening of a sequence, its frame (from 1) and, if frames have a duration, its time after ED."""
        if self.strain is None or np.isnan(self.strain).all():
            return {}
        at = int(np.nanargmin(self.strain))
        found = {"peak_strain": float(self.strain[at]), "peak_strain_frame": at + 1}
        after_ed = at - self.phases[Phase.ED][0]
        return found | ({"peak_strain_ms": after_ed * self.frame_ms} if self.frame_ms and after_ed > 0 else {})


def finish(out: str, clip: Clip, frames: Frames, masks: np.ndarray, confidences: Sequence[float]) -> ClipResult:
    """Write a clip's masks, and measure them."""
    study_files.write_masks(study_files.output(out, clip, "_pred.nii.gz"), masks, frames)
    return measure_clip(clip, masks, frames.spacing_mm, frames.notes, confidences, frames.frame_ms)


def measure_clip(
    clip: Clip, masks: np.ndarray, known_mm: tuple[float, float] | None, notes: tuple[str, ...],
    confidences: Sequence[float], frame_ms: float | None = None,
) -> ClipResult:  # fmt: skip
    """Measure masks uint8 [T,H,W] with spacing `known_mm`: ED, ES and curves of a sequence, and doubts about the masks used."""
    phases, volumes_ml, areas_cm2, strain = {}, None, None, None
    if len(masks) > 1:
        measures = np.array([frame_measures(mask, known_mm or (1.0, 1.0)) for mask in masks])
        volumes_ml, areas_cm2, lengths_mm = measures.T
        found = ed_es_detection.find_ed_es(volumes_ml) or ()
        # Copies: a part of the clip's masks would keep all of them in memory.
        phases = {phase: (at, masks[at].copy()) for phase, at in zip((Phase.ED, Phase.ES), found, strict=False)}
        strain = ed_es_detection.strain_curve(lengths_mm, volumes_ml, found[0]) if found else None
    elif clip.phase:
        phases = {clip.phase: (0, masks[0])}
    spacing_mm = known_mm or (USUAL_DEPTH_MM / masks.shape[1],) * 2
    # Only the frames used for a sequence's EF are checked; without them, all frames.
    measured = sorted(at for at, _ in phases.values()) or range(len(masks))
    found, doubts = defaultdict(list), []
    for at in measured:
        for doubt in implausibilities(masks[at], spacing_mm):
            found[re.sub(r"\d[\d.]*", "0", doubt)].append((at + 1, doubt))  # grouped if only their numbers differ
    for same in found.values():
        numbers, texts = zip(*same, strict=True)
        where = f"{ranges(numbers)}: " if len(masks) > 1 else ""
        doubts.append(f"{where}{texts[0]}{' (or similar)' if len(set(texts)) > 1 else ''}")
    confidence = min(confidences[at] for at in measured)
    if confidence < REVIEW_THRESHOLD:
        doubts.append(f"{UNSURE} (confidence {confidence:.2f})")
    curves = (areas_cm2, strain, frame_ms)
    return ClipResult(clip, len(masks), known_mm, phases, volumes_ml, notes, tuple(doubts), confidence, *curves)


def ranges(frames: Sequence[int]) -> str:
    """Ascending frame numbers as text: `frame 7`, `frames 3-41, 50`."""
    runs = np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1)
    words = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"frame{'s' if len(frames) > 1 else ''} {words}"


def shorten(text: str) -> str:
    """The text, cut to MAX_TEXT characters for a cell or a line."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - len(MORE)].rsplit(" ", 1)[0].rstrip(" ;,") + MORE


def study_row(patient: str, results: Sequence[ClipResult], calibrations: Mapping[str, dict | None] | None = None) -> dict:
    """A patient's indices: for each view from its two stills, otherwise from the first sequence that shows ED and ES.

    With `calibrations` (by EF, from `ef_intervals.calibrate`), the biplane EFs have an interval.
    """
    stills, masks, sources, reasons = defaultdict(list), {}, {}, []
    for r in results:
        for phase in r.phases if r.frames == 1 else ():
            stills[r.clip.view, phase].append(r)
    beats = [r for r in results if r.frames > 1 and len(r.phases) == 2]
    for view in VIEWS:
        chosen = {phase: stills[view, phase][0] for phase in PHASES if len(stills[view, phase]) == 1}
        sources[f"from_{view}"] = "stills" if chosen else ""
        beat = next((r for r in beats if r.clip.view == view), None)
        if beat and len(chosen) < 2:
            chosen, sources[f"from_{view}"] = dict.fromkeys(PHASES, beat), beat.clip.stem
        masks |= {(view, phase): (r.phases[phase][1], r.spacing_mm) for phase, r in chosen.items()}
    row = patient_indices(masks, spacing_known=all(spacing_mm for _, spacing_mm in masks.values()))
    for (view, phase), found in stills.items():
        if view and len(found) > 1:
            stems = " and ".join(r.clip.stem for r in found)
            reasons.append(f"{stems} show the same view and phase ({view} {phase}): keep one of them")
    for r in results:
        if r.frames > 1 and not r.phases and not {(r.clip.view, phase) for phase in PHASES} <= masks.keys():
            why = "its volume never changes, or too few of its frames are plausible"
            reasons.append(f"{r.clip.stem} shows no beat ({why}): give a whole beat")
    if nameless := [r.clip.stem for r in results if r.clip.view is None]:
        reasons.append(f"the view of {', '.join(nameless)} is unknown: add 2CH or 4CH to the file's name, or give --view")
    if phaseless := [r.clip.stem for r in results if r.frames == 1 and r.clip.phase is None]:
        reasons.append(f"the phase of {', '.join(phaseless)} is unknown: add ED or ES to the file's name, or give --phase")
    reasons += [row["reason"]] if row["reason"] else []  # last: the causes come first
    doubts = [*_views_apart(row), *_lengths_apart(row), *(f"{r.clip.stem}: {doubt}" for r in results for doubt in r.doubts)]
    (doubts if math.isfinite(row["ef_ase"]) else reasons).extend({r.clip.remark for r in results} - {""})
    row["reason"], row["doubts"] = "; ".join(reasons), "; ".join(doubts)
    row["la_cut_off"] = ", ".join(f"{view} {phase}" for (view, phase), (mask, _) in masks.items() if _cuts_atrium(mask))
    row["confidence"] = min((r.confidence for r in results), default=float("nan"))
    return {"patient": patient} | sources | row | ef_intervals.intervals(row, calibrations or {})


def _views_apart(row: dict) -> list[str]:
    """A doubt, if the single-plane EFs of the two views disagree."""
    four, two = row["ef_4ch_ase"], row["ef_2ch_ase"]
    doubt = f"the views disagree by {abs(four - two):.0f} points: EF is {four:.0f} % in 4CH alone and {two:.0f} % in 2CH alone"
    return [doubt] if abs(four - two) > MOST_APART else []


def _lengths_apart(row: dict) -> list[str]:
    """A doubt, if the two views' long axes differ: in a foreshortened view, the beam misses the apex."""
    for phase in PHASES:
        four, two = (row[f"lv_length_mm_{view}_{phase}"] for view in reversed(VIEWS))
        if abs(four - two) > MOST_LENGTHS_APART * max(four, two):
            shorter = "2CH" if two < four else "4CH"
            axes = f"the long axes at {phase} differ ({four:.0f} mm in 4CH, {two:.0f} mm in 2CH)"
            return [f"{axes}: {shorter} may be foreshortened"]
    return []


def _cuts_atrium(mask: np.ndarray) -> bool:
    """Whether the left atrium continues beyond the image's sides or lower edge, as in nearly half of CAMUS's patients."""
    return bool((mask[-1] == LA).any() or (mask[:, [0, -1]] == LA).any())


def clip_record(result: ClipResult) -> dict:
    """A clip's entry in studies.json; frames count from 1."""
    clip = result.clip
    record = {
        "patient": clip.patient, "mask": f"{clip.patient}/{clip.stem}_pred.nii.gz", "input": clip.shown,
        "view": clip.view and str(clip.view), "phase": clip.phase and str(clip.phase), "frames": result.frames,
        "spacing_mm": result.spacing_mm and list(result.spacing_mm), "notes": list(result.notes),
        "doubts": list(result.doubts), "confidence": none_if_nan(result.confidence),
    }  # fmt: skip
    if result.volumes_ml is not None:
        record |= {f"{phase.lower()}_frame": at + 1 for phase, (at, _) in result.phases.items()}
        record["implausible_frames"] = (np.flatnonzero(np.isnan(ed_es_detection.plausible(result.volumes_ml))) + 1).tolist()
        record["ef_single_plane"] = none_if_nan(result.ef_single_plane)
        curves = {"volumes_ml": result.volumes_ml, "areas_cm2": result.areas_cm2} if result.spacing_mm else {}
        curves |= {"strain": result.strain} if result.strain is not None else {}
        record |= {name: [none_if_nan(value) for value in curve] for name, curve in curves.items()} | result.peak_strain
    return record


def write_label_names(out: str) -> None:
    """Write the labels' names and colours for ITK-SNAP (`labels.txt`) and for 3D Slicer (`labels.ctbl`)."""
    snap, slicer = (
        ["# ITK-SnAP Label Description File: IDX R G B A VIS MSH LABEL"],
        ["# 3D Slicer colour table: IDX NAME R G B A"],
    )
    for label, (name, colour) in enumerate(zip(CLASS_TITLES, CLASS_COLOURS, strict=True)):
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        is_shown = int(label != BACKGROUND)
        snap.append(f'{label} {red} {green} {blue} {is_shown} {is_shown} {is_shown} "{name}"')
        slicer.append(f"{label} {name.replace(' ', '_')} {red} {green} {blue} {255 * is_shown}")
    for name, lines in (("labels.txt", snap), ("labels.ctbl", slicer)):
        filesystem.publish(filesystem.join(out, name), ("\n".join(lines) + "\n").encode())


def write_tables(out: str, rows: list[dict], everything: dict) -> None:
    """Write `ef.csv`, one line per patient, and `studies.json` with the same rows and `everything`."""
    columns = [*FIRST, *(name for name in INDICES if name not in FIRST), "intended_use"]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows({name: _cell(value) for name, value in row.items()} | {"intended_use": INTENDED_USE} for row in rows)
    filesystem.publish(filesystem.join(out, "ef.csv"), text.getvalue().encode())
    patients = [{name: none_if_nan(value) for name, value in row.items()} for row in rows]
    whole = {"intended_use": INTENDED_USE, "patients": patients} | everything
    filesystem.publish_json(filesystem.join(out, "studies.json"), whole)


def headline(row: dict) -> str:
    """One line about a patient for a terminal: EF by the ase convention, from both views if possible, otherwise from one."""
    for method, title in (("ase", "biplane, ase"), ("4ch_ase", "4CH alone, ase"), ("2ch_ase", "2CH alone, ase")):
        if math.isfinite(row[f"ef_{method}"]):
            volumes = [row[f"{name}_ml_{method}"] for name in ("edv", "esv")]
            known = f"   EDV {volumes[0]:.0f} ml, ESV {volumes[1]:.0f} ml" if all(map(math.isfinite, volumes)) else ""
            doubt = "".join(f"   {doubt}" for doubt in _views_apart(row))
            interval = show_interval(row, f"ef_{method}")
            about = f"80 % interval {interval}; {title}" if interval else title
            return f"{row['patient']}   EF {row[f'ef_{method}']:.0f} % ({about}){known}{doubt}"
    return f"{row['patient']}   no EF: {shorten(row['reason'])}"


def show_interval(row: Mapping, name: str) -> str:
    """The prediction interval of an EF, such as `47 to 61`; empty without one."""
    low, high = (row.get(f"{name}_{end}", math.nan) for end in ("low", "high"))
    return f"{low:.0f} to {high:.0f}" if math.isfinite(low) else ""


def _cell(value):
    """A cell of ef.csv: empty for NaN, two decimals (more than a mask can resolve), long texts shortened."""
    if isinstance(value, (float, np.floating)):
        return f"{value:.2f}" if math.isfinite(value) else ""
    return shorten(value) if isinstance(value, str) else value
