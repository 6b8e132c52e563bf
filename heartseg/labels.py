"""The terms of apical echocardiography as CAMUS uses them: views, phases, the four classes and their colours."""

from enum import StrEnum

import numpy as np


class View(StrEnum):
    """Apical view of the heart."""

    TWO_CHAMBER = "2CH"
    FOUR_CHAMBER = "4CH"


class Phase(StrEnum):
    """Moment of the cardiac cycle: the ventricle at its largest (ED) or at its smallest (ES)."""

    ED = "ED"
    ES = "ES"


VIEWS = tuple(View)
PHASES = tuple(Phase)
# The label values of a CAMUS mask are the positions in this tuple.
CLASSES = ("background", "endo", "myo", "la")
CLASS_TITLES = ("Background", "Left-ventricular cavity", "Myocardium", "Left atrium")
NUM_CLASSES = len(CLASSES)
BACKGROUND, ENDO, MYO, LA = range(NUM_CLASSES)
# Okabe-Ito colours: distinct for colour-blind readers, and readable on a dark ultrasound image.
CLASS_COLOURS = ("#000000", "#56B4E9", "#F0E442", "#D55E00")
# The structures that are scored. `epi` is the CAMUS challenge's epicardium: LV cavity and myocardium together. It is kept
# apart from `myo`, the myocardium alone, and is not part of the means.
STRUCTURES = ("endo", "myo", "la")
STRUCTURE_LABELS = {"endo": (ENDO,), "myo": (MYO,), "la": (LA,), "epi": (ENDO, MYO)}
# Classes of ejection fraction in percent, from the definition of heart failure (McDonagh et al. 2021, Eur Heart J 42:3599):
# reduced, mildly reduced, preserved. Here, both 40 and 50 count as mildly reduced.
EF_CLASSES = ("<40", "40-50", ">50")
LOW_CAVITY_DICE, MAX_EF_ERROR = 0.85, 10  # outliers: cavities below this Dice, patients above this EF error in points
UNTRAINED_DICE = 0.05  # below this mean, a model segments nothing yet: its scores cannot pick a winner or show a difference


def frame_name(row: dict) -> str:
    """The name of a row of shards or results in messages and captions: patient, view, and phase or frame number, if known."""
    parts = [row["patient"], row.get("view"), row.get("phase")]
    if parts[2] is None and row.get("frame") is not None:
        parts[2] = f"frame {int(row['frame'])}"
    return " ".join(str(part) for part in parts if part is not None)


def bounding_box(region: np.ndarray, margins: tuple[int, int] = (0, 0)) -> tuple[slice, slice]:
    """Row and column slices of the smallest box around the nonzero pixels of [H,W], plus margins, clipped to the image."""
    lines = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    pairs = zip(lines, margins, strict=True)
    return tuple(slice(max(at[0] - margin, 0), at[-1] + margin + 1) if len(at) else slice(0) for at, margin in pairs)


def ef_class(ef: np.ndarray) -> np.ndarray:
    """Index into EF_CLASSES of each ejection fraction in percent: 0 below 40, 1 from 40 to 50, 2 above."""
    ef = np.asarray(ef, float)
    return (ef >= 40).astype(int) + (ef > 50)
