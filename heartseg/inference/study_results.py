"""What comes of clips: their files, the ED and ES of a sequence, each patient's ejection fraction, and the tables of all."""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from heartseg.datasets.readers import Frames
from heartseg.inference import study_files
from heartseg.inference.segmenter import LOOK_BELOW
from heartseg.inference.study_files import Clip
from heartseg.labels import VIEWS, Phase, View
from heartseg.metrics import ed_es_detection
from heartseg.metrics.anatomy_checks import implausibilities
from heartseg.metrics.cardiac_indices import INDICES, ejection_fraction, frame_volume_ml, patient_indices
from heartseg.storage import filesystem

# Where a file has no scale, the anatomical checks take it to be as deep as apical views usually are.
USUAL_DEPTH_MM = 145.0
INTENDED_USE = "research use only, not a medical device"
# How ef.csv begins; the other indices follow.
FIRST = ("patient", "ef_ase", "edv_ml_ase", "esv_ml_ase", "ef_camus", "edv_ml_camus", "esv_ml_camus")
FIRST += ("ef_4ch_ase", "ef_2ch_ase", "from_4CH", "from_2CH", "doubts", "confidence", "reason")
# Two views of one heart whose EFs are further apart than this, in points, do not describe one heart.
MOST_APART = 20.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What is kept of a clip once its files are written; small, so that thousands can be.

    `doubts` says what is implausible in the masks that were measured and whether the network is unsure of them, `confidence`
    is the lowest of theirs.
    `phases` holds (frame from 0, mask uint8 [H,W]) of ED and ES: both of a sequence where its curve shows them, the one
    of a still whose phase is known. `volumes_ml` [T] is a sequence's single-plane curve, in no unit without `spacing_mm`.
    """

    clip: Clip
    frames: int
    spacing_mm: tuple[float, float] | None
    phases: dict[Phase, tuple[int, np.ndarray]]
    volumes_ml: np.ndarray | None
    notes: tuple[str, ...]
    doubts: tuple[str, ...]
    confidence: float

    @property
    def ef_single_plane(self) -> float:
        """EF in percent of a sequence, from the masks of its ED and ES in this one view; NaN where they are not found."""
        if self.volumes_ml is None or len(self.phases) < 2:
            return float("nan")
        edv, esv = (self.volumes_ml[self.phases[phase][0]] for phase in (Phase.ED, Phase.ES))
        return ejection_fraction(edv, esv)


def finish(out: str, clip: Clip, frames: Frames, masks: np.ndarray, confidences: Sequence[float]) -> Outcome:
    """Write a clip's masks, a sequence's ED and ES are found on the way."""
    study_files.write_masks(study_files.output(out, clip, "_pred.nii.gz"), masks, frames)
    phases, volumes_ml = {}, None
    if len(masks) > 1:
        volumes_ml = np.array([frame_volume_ml(mask, frames.spacing_mm or (1.0, 1.0))[0] for mask in masks])
        found = ed_es_detection.find_ed_es(volumes_ml) or ()
        phases = {phase: (at, masks[at]) for phase, at in zip((Phase.ED, Phase.ES), found, strict=False)}
    elif clip.phase:
        phases = {clip.phase: (0, masks[0])}
    spacing_mm = frames.spacing_mm or (USUAL_DEPTH_MM / masks.shape[1],) * 2
    # Of a sequence, the frames that its EF comes from count.
    measured = [at for at, _ in phases.values()] or range(len(masks))
    doubts = {f"frame {at + 1}: {doubt}" for at in measured for doubt in implausibilities(masks[at], spacing_mm)}
    confidence = min(confidences[at] for at in measured)
    if confidence < LOOK_BELOW:
        doubts.add(f"the network is unsure of it (confidence {confidence:.2f})")
    return Outcome(clip, len(masks), frames.spacing_mm, phases, volumes_ml, frames.notes, tuple(sorted(doubts)), confidence)


def study_row(patient: str, outcomes: Sequence[Outcome]) -> dict:
    """A patient's indices: in each view from its two stills, else from its first sequence that shows ED and ES."""
    by_view = {view: [o for o in outcomes if o.clip.view == view] for view in VIEWS}
    twice = _shown_twice(outcomes)
    chosen = {view: _phases_of(found, [phase for seen, phase in twice if seen == view]) for view, found in by_view.items()}
    masks = {(view, phase): entry for view, (_, phases) in chosen.items() for phase, entry in phases.items()}
    spacing_known = all(spacing_mm for _, spacing_mm in masks.values())
    row = patient_indices(masks, spacing_known)
    for (view, phase), stems in twice.items():
        row["reason"] += f"; {' and '.join(stems)} all show {view} {phase}, and nobody says which one counts: give one"
    for o in outcomes:
        if o.frames > 1 and not o.phases and len(chosen.get(o.clip.view, ("", ()))[1]) < 2:
            row["reason"] += f"; {o.clip.stem} shows no beat (its plausible frames have one volume): give a whole one"
    nameless = [o.clip.stem for o in outcomes if o.clip.view is None]
    if nameless:
        row["reason"] += f"; the view of {', '.join(nameless)} is not known, --view says it"
    phaseless = [o.clip.stem for o in outcomes if o.frames == 1 and o.clip.phase is None]
    if phaseless:
        row["reason"] += f"; the phase of {', '.join(phaseless)} is not known: --phase says it, or names as PATIENT_4CH_ED do"
    row["reason"] = row["reason"].removeprefix("; ")
    row["doubts"] = "; ".join([*_views_apart(row), *(f"{o.clip.stem}: {doubt}" for o in outcomes for doubt in o.doubts)])
    row["confidence"] = min((o.confidence for o in outcomes), default=float("nan"))
    return {"patient": patient} | {f"from_{view}": where for view, (where, _) in chosen.items()} | row


def _views_apart(row: dict) -> list[str]:
    """A doubt where each view alone says another EF."""
    apart = abs(row["ef_4ch_ase"] - row["ef_2ch_ase"])
    said = f"EF is {row['ef_4ch_ase']:.0f} % in 4CH alone and {row['ef_2ch_ase']:.0f} % in 2CH alone"
    return [f"the views disagree by {apart:.0f} points: {said}"] if apart > MOST_APART else []


def _shown_twice(outcomes: Iterable[Outcome]) -> dict[tuple[View, Phase], list[str]]:
    """Names of a patient's stills of one view and phase, where there are several."""
    stems = defaultdict(list)
    for o in outcomes:
        for phase in o.phases if o.frames == 1 and o.clip.view else ():
            stems[o.clip.view, phase].append(o.clip.stem)
    return {still: names for still, names in stems.items() if len(names) > 1}


def _phases_of(outcomes: list[Outcome], twice: Container[Phase]) -> tuple[str, dict]:
    """Where one view's phases come from, and phase -> (mask, spacing_mm); stills of phases shown `twice` do not count."""
    single = [(phase, o) for o in outcomes if o.frames == 1 for phase in o.phases if phase not in twice]
    stills = {phase: (o.phases[phase][1], o.spacing_mm) for phase, o in single}
    if len(stills) < 2:
        for o in outcomes:
            if o.frames > 1 and len(o.phases) == 2:
                return o.clip.stem, {phase: (mask, o.spacing_mm) for phase, (_, mask) in o.phases.items()}
    return ("stills" if stills else ""), stills


def shown_curve(outcome: Outcome) -> tuple[np.ndarray, str]:
    """A sequence's volumes [T] for a plot, NaN where implausible, and their unit: ml, or % of ED without a scale."""
    values = ed_es_detection.plausible(outcome.volumes_ml)
    return (values, "ml") if outcome.spacing_mm else (100 * values / values[outcome.phases[Phase.ED][0]], "%")


def clip_record(outcome: Outcome) -> dict:
    """What studies.json says of a clip; frames count from 1."""
    clip, sequence = outcome.clip, outcome.volumes_ml is not None
    record = {
        "patient": clip.patient, "mask": f"{clip.patient}/{clip.stem}_pred.nii.gz", "input": clip.shown,
        "view": clip.view and str(clip.view), "phase": clip.phase and str(clip.phase), "frames": outcome.frames,
        "spacing_mm": outcome.spacing_mm and list(outcome.spacing_mm), "notes": list(outcome.notes),
        "doubts": list(outcome.doubts), "confidence": _plain(outcome.confidence),
    }  # fmt: skip
    if sequence:
        record |= {f"{phase.lower()}_frame": at + 1 for phase, (at, _) in outcome.phases.items()}
        record["implausible_frames"] = (np.flatnonzero(ed_es_detection.implausible(outcome.volumes_ml)) + 1).tolist()
        record["ef_single_plane"] = _plain(outcome.ef_single_plane)
        if outcome.spacing_mm:
            record["volumes_ml"] = [_plain(value) for value in outcome.volumes_ml]
    return record


def write_tables(out: str, rows: list[dict], records: list[dict], damaged: list[dict], made_with: dict) -> None:
    """Write `ef.csv`, a line a patient, and `studies.json` with everything; each whole or not at all."""
    columns = [*FIRST, *(name for name in INDICES if name not in FIRST), "intended_use"]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({name: _cell(value) for name, value in row.items()} | {"intended_use": INTENDED_USE})
    filesystem.publish(filesystem.join(out, "ef.csv"), text.getvalue().encode())
    patients = [{name: _plain(value) for name, value in row.items()} for row in rows]
    whole = {"intended_use": INTENDED_USE, "made_with": made_with, "patients": patients, "clips": records, "damaged": damaged}
    filesystem.publish_json(filesystem.join(out, "studies.json"), whole)


def by_patient(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by patient, in their order."""
    found = defaultdict(list)
    for outcome in outcomes:
        found[outcome.clip.patient].append(outcome)
    return dict(found)


def doubtful(outcome: Outcome) -> str:
    """A line that names a clip whose mask can be no heart, or of which the network is unsure; empty for all others."""
    return f"look at {outcome.clip.stem}: {'; '.join(outcome.doubts)}" if outcome.doubts else ""


def headline(row: dict) -> str:
    """One line of a patient for a terminal: EF by the ase convention, of both views where there are, else of one."""
    for method, said in (("ase", "biplane, ase"), ("4ch_ase", "4CH alone, ase"), ("2ch_ase", "2CH alone, ase")):
        if math.isfinite(row[f"ef_{method}"]):
            volumes = [row[f"{name}_ml_{method}"] for name in ("edv", "esv")]
            known = f"   EDV {volumes[0]:.0f} ml, ESV {volumes[1]:.0f} ml" if all(map(math.isfinite, volumes)) else ""
            doubt = "".join(f"   {doubt}" for doubt in _views_apart(row))
            return f"{row['patient']}   EF {row[f'ef_{method}']:.0f} % ({said}){known}{doubt}"
    return f"{row['patient']}   no EF: {row['reason']}"


def _plain(value):
    """JSON has no NaN: what has no value is null."""
    return (float(value) if math.isfinite(value) else None) if isinstance(value, (float, np.floating)) else value


def _cell(value):
    """Nothing for NaN; numbers to a tenth of a unit's tenth, which is more than a mask can tell."""
    return ("" if not math.isfinite(value) else f"{value:.2f}") if isinstance(value, (float, np.floating)) else value
