"""Parts of the report that come from an evaluation: distances, clinical agreement, published rows, worst and best images.

Each takes result tables and returns the values of the template; no metric is recomputed.
"""

import math

import pandas

from heartseg.evaluation.scoring import Example, read_examples
from heartseg.labels import PHASES, STRUCTURES, frame_name
from heartseg.metrics.agreement import MIN_PAIRS
from heartseg.reporting import contours, pages, plots, published_results

STRUCTURE_TITLES = {
    "endo": "Cavity (endo)",
    "myo": "Wall (myo)",
    "la": "Left atrium (la)",
    "epi": "Epicardium (epi = endo + myo)",
}
DISTANCE_COLUMNS = {"masd": "Mean surface distance", "hd95": "95 % Hausdorff", "hd": "Hausdorff"}
AGREEMENT_TITLES = {
    "ef_camus": "EF, one disk height (camus), %",
    "ef_ase": "EF, each phase its own (ase), %",
    "ef_4ch_ase": "EF, 4-chamber alone, %",
    "ef_2ch_ase": "EF, 2-chamber alone, %",
    "ef_area_length": "EF, area-length, %",
    "edv_ml_camus": "End-diastolic volume (camus), ml",
    "esv_ml_camus": "End-systolic volume (camus), ml",
    "edv_ml_ase": "End-diastolic volume (ase), ml",
    "esv_ml_ase": "End-systolic volume (ase), ml",
    "la_volume_ml_ES": "Left-atrial volume at ES, ml",
}
EXAMPLE_ROWS = 400  # of pixels of a drawn example


def distance_table(summary: dict) -> list[tuple[str, list[dict]]]:
    """Structure, then its distances in mm; empty where the evaluation has none."""
    scores = summary["scores"]
    rows = [(title, [scores.get(f"{kind}_{name}_mm") for kind in DISTANCE_COLUMNS]) for name, title in STRUCTURE_TITLES.items()]
    return [(title, cells) for title, cells in rows if all(cell is not None for cell in cells)]


def clinical_section(summary: dict, patients: pandas.DataFrame | None) -> dict | None:
    """Tables and figures of volumes and EF, and the reasons why a patient has none.

    The reasons alone if fewer than three patients have both EFs; None if there are no reasons either.
    """
    clinical = summary.get("clinical")
    if not clinical or patients is None:
        return None
    agreement = clinical["agreement"]
    rows = [
        (title, agreement[name]) for name, title in AGREEMENT_TITLES.items() if agreement.get(name, {}).get("r") is not None
    ]
    for convention, kinds in clinical["reference"].items():
        for kind, title in (("prediction", "predicted EF"), ("truth", "EF from the expert's masks")):
            if kinds[kind]["r"] is not None:
                rows.append((f"{title} against the EF of the recording's file ({convention}), %", kinds[kind]))
    ef = agreement["ef_camus"]
    if not rows or ef["n"] < MIN_PAIRS:
        return {"ef": None, "incomplete": clinical["incomplete"]} if clinical["incomplete"] else None
    pair = patients[["ef_camus_prediction", "ef_camus_truth"]].to_numpy(float)
    limits = f"limits of agreement {ef['loa_low']:.1f} to {ef['loa_high']:.1f}"
    correlation = "no correlation (all the same)" if ef["r"] is None else f"r {ef['r']:.2f}"
    numbers = f"{ef['n']} patients, bias {ef['bias']:.1f} points, {limits}, {correlation}."
    scatter = plots.agreement_scatter(*pair.T, ef, "EF (camus), predicted and expert", "%")
    differences = plots.bland_altman(*pair.T, ef, "Bland-Altman, EF (camus)", "points")
    figures = [
        pages.figure(scatter, "ef-scatter", f"Scatter of EF: {numbers}"),
        pages.figure(differences, "ef-bland-altman", f"Bland-Altman plot of EF: {numbers}"),
    ]
    return {"ef": ef, "rows": rows, "plots": figures, "classes": clinical["ef_classes"], "incomplete": clinical["incomplete"]}


def published_section(summary: dict, dataset: str) -> dict | None:
    """Ours first, then the published rows in the same convention; None for anything but CAMUS."""
    phases = summary["by"].get("phase", {})
    if dataset != "CAMUS" or any(phase not in phases for phase in PHASES):
        return None
    whose = "These masks" if "predictions" in summary else "This model"
    kinds, ours = ("endo", "epi", "la"), {"name": f"{whose}, {summary['group']} group"}
    challenge = [ours | {
        "dice": {s: tuple(phases[p][f"dice_{s}"] for p in PHASES) for s in kinds},
        "hd_mm": {s: tuple(phases[p][f"hd_{s}_mm"] for p in PHASES) for s in kinds},
    }]  # fmt: skip
    split = [ours | {name: summary["scores"][name]["mean"] for name in ("dice_endo", "dice_myo", "dice_la", "dice", "iou")}]
    agreement = summary["clinical"]["agreement"]
    mine = {k: tuple(agreement[f"{k}_camus"][v] for v in ("r", "bias", "sd")) for k in ("ef", "edv_ml", "esv_ml")}
    return {
        "challenge": [*challenge, *published_results.CHALLENGE],
        "split": [*split, *published_results.OFFICIAL_SPLIT],
        "clinical": [ours | mine, *published_results.CLINICAL] if mine["ef"][0] is not None else [],
    }


def example_pictures(evaluation: str, images: pandas.DataFrame | None) -> dict[str, list[dict]]:
    """The images of lowest and of highest Dice with both outlines, in proportions of millimetres."""
    examples = {} if images is None else read_examples(evaluation)
    drawn = [_example(example, images.loc[row]) for row, example in examples.items()]
    half = (len(drawn) + 1) // 2
    return {"worst_pictures": drawn[:half], "best_pictures": drawn[half:][::-1]}


def _example(example: Example, row: pandas.Series) -> dict:
    name = frame_name(row.astype(object).where(row.notna(), None))
    dice = {structure: row[f"dice_{structure}"] for structure in STRUCTURES if not math.isnan(row[f"dice_{structure}"])}
    worst = min(dice, key=dice.get)
    caption = f"{name}: Dice {row['dice']:.3f}, lowest {worst} {dice[worst]:.3f}"
    drawn = contours.overlay(example.image, example.prediction, example.spacing_mm, EXAMPLE_ROWS, example.truth)
    return pages.picture(drawn, caption, f"{name} with the model's and the expert's outlines")
