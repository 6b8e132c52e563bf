"""The results of a training run and an evaluation as one self-contained HTML page; no metric is recomputed."""

import pandas

from heartseg.config import recipes
from heartseg.config.experiment import ModelConfig, flatten
from heartseg.evaluation.scoring import IMAGES, PAGE, PATIENTS, SUMMARY, Example, read_examples, read_rows
from heartseg.labels import CLASS_COLOURS, CLASS_TITLES, CLASSES, PHASES, STRUCTURES, frame_name
from heartseg.metrics.agreement import MIN_PAIRS
from heartseg.reporting import contours, pages, plots, published_results, text_tables, training_figures
from heartseg.storage import filesystem
from heartseg.training import run_directory

STRUCTURE_TITLES = {
    "endo": "LV cavity (endo)", "myo": "Myocardium (myo)", "la": "Left atrium (la)", "epi": "Epicardium (epi = endo + myo)",
}  # fmt: skip
SCORE_TITLES = {
    "dice": "Mean Dice of the three structures",
    **{f"dice_{name}": f"{title}: Dice" for name, title in STRUCTURE_TITLES.items()},
    "dice4": "Dice, mean of four areas, background included (dice4)",
    "iou": "Mean IoU (Jaccard) of the three structures",
    **{f"iou_{name}": f"{STRUCTURE_TITLES[name]}: IoU" for name in STRUCTURES},
    "accuracy": "Pixel accuracy: correct pixels / all pixels",
}
# Cards beside the headline: the score's shortest title, and the colour of the structure.
CARDS = {
    **{f"dice_{name}": (title, plots.STRUCTURE_COLOURS[name]) for name, title in STRUCTURE_TITLES.items()},
    **{"iou": ("IoU, three structures", ""), "dice4": ("Dice, four areas", ""), "accuracy": ("Pixel accuracy", "")},
}
# Columns of the narrower tables, with their headings; distances are in mm.
COLUMNS = {"dice": "Mean Dice", "dice_endo": "endo", "dice_myo": "myo", "dice_la": "la", "dice_epi": "epi"}
BREAKDOWN_COLUMNS = COLUMNS | {"dice4": "dice4", "iou": "IoU", "accuracy": "Accuracy"}
BREAKDOWN_DISTANCES = {"masd_endo_mm": "endo, mean mm", "hd95_endo_mm": "endo, HD95 mm", "masd_la_mm": "la, mean mm"}
BREAKDOWNS = {"phase": "phase", "view": "view", "quality": "image quality", "size": "size of the heart in the image"}
DISTANCE_COLUMNS = {"masd": "Mean surface distance", "hd95": "95 % Hausdorff", "hd": "Hausdorff"}
AGREEMENT_TITLES = {
    "ef_camus": "EF, one disk height for both phases (camus), %",
    "ef_ase": "EF, one disk height per phase (ase), %",
    "ef_4ch_ase": "EF, 4-chamber alone, %",
    "ef_2ch_ase": "EF, 2-chamber alone, %",
    "ef_area_length": "EF, area-length, %",
    "edv_ml_camus": "End-diastolic volume (camus), ml",
    "esv_ml_camus": "End-systolic volume (camus), ml",
    "edv_ml_ase": "End-diastolic volume (ase), ml",
    "esv_ml_ase": "End-systolic volume (ase), ml",
    "la_volume_ml_ES": "Left-atrial volume at ES, ml",
}
# A run's origins, by their keys in its description.
ORIGINS = {
    "Code revision": "code", "Dataset": "dataset", "Data fingerprint": "data_fingerprint", "Source SHA-256": "source_sha256",
}  # fmt: skip
WORST_ROWS, EXAMPLE_PIXEL_ROWS = 10, 400


def write_report(evaluation: str, run: str | None = None) -> str:
    """Write `report.html` into an evaluation's folder and return its path; `run` is the evaluated run, None for masks of files.

    Raises UserError if the run's `experiment.json` or `summary.json` is missing; if other files are, sections are left out.
    """
    summary = filesystem.read_json(filesystem.join(evaluation, SUMMARY))
    description = filesystem.read_json(filesystem.join(run, run_directory.DESCRIPTION)) if run else {}
    dataset = summary.get("dataset") or description.get("dataset", "other")
    images, patients = (read_rows(evaluation, name) for name in (IMAGES, PATIENTS))
    return pages.write(
        evaluation,
        PAGE,
        name=filesystem.last_part(run or summary.get("predictions", "masks")),
        dataset=dataset,
        trained=bool(run),
        summary=summary,
        group_title=training_figures.GROUP_TITLES.get(summary["group"], summary["group"]),
        **score_tables(summary) | image_tables(images) | example_pictures(evaluation, images),
        flags=summary.get("flags"),
        outliers=text_tables.outlier_rows(summary),
        clinical=clinical_section(summary, patients),
        published=published_section(summary, dataset),
        curves=training_figures.run_curves(run_directory.read_record(run), summary.get("epoch")) if run else [],
        **(training_figures.sample_pictures(run) if run else {"sample_rows": []}),
        legend=list(zip(CLASSES, CLASS_TITLES, CLASS_COLOURS, strict=True))[1:],
        configuration=list(flatten(description.get("identity", {})).items()),
        lineage=lineage(run, description, summary),
        choices=recipes.SEED_CHOICES if run and description["experiment"]["name"] == "seed" else (),
    )


def score_tables(summary: dict) -> dict:
    """The headline's cards, the tables of all scores and of distances in mm, and one table per known breakdown."""
    scores, pooled = summary["scores"], summary.get("pooled") or {}
    breakdowns = [(title, summary.get("by", {}).get(key) or {}) for key, title in BREAKDOWNS.items()]
    rows = [(title, [scores.get(f"{kind}_{name}_mm") for kind in DISTANCE_COLUMNS]) for name, title in STRUCTURE_TITLES.items()]
    return {
        "headline": scores.get("dice"),
        "cards": [(title, colour, scores.get(name)) for name, (title, colour) in CARDS.items()],
        "scores": [(SCORE_TITLES[n], scores[n] or {}, pooled.get(n)) for n in SCORE_TITLES if n in scores],
        "distances": [(title, cells) for title, cells in rows if all(cell is not None for cell in cells)],
        "distance_columns": [name for title in DISTANCE_COLUMNS.values() for name in (title, "95 % interval")],
        "breakdowns": [(title, parts) for title, parts in breakdowns if parts],
        "breakdown_columns": BREAKDOWN_COLUMNS,
        "breakdown_distances": BREAKDOWN_DISTANCES,
    }


def image_tables(images: pandas.DataFrame | None) -> dict:
    """The figure of the images' Dice by structure, and the rows of the images with the lowest Dice."""
    if images is None:
        return {"spread": None, "worst": [], "worst_columns": COLUMNS}
    values = {name: images[f"dice_{name}"].to_numpy(float) for name in STRUCTURE_TITLES if f"dice_{name}" in images}
    drawn = plots.spread(values, STRUCTURE_TITLES, "Dice of an image (1 is perfect overlap)")
    alt = f"Box plot and points of the Dice of {len(images)} images, by structure; the score tables hold the means."
    scored = images[images["dice"].notna()]
    lowest = scored.drop(columns="confusion", errors="ignore").sort_values(["dice", "patient", "view", "phase"])
    rows = lowest.head(WORST_ROWS).to_dict("records")
    worst = [{name: "–" if pandas.isna(value) else value for name, value in row.items()} for row in rows]
    figure = pages.figure(drawn, "spread", alt) if len(scored) else None
    return {"spread": figure, "worst": worst, "worst_columns": COLUMNS}


def clinical_section(summary: dict, patients: pandas.DataFrame | None) -> dict | None:
    """Tables and figures of volumes and EF, and why patients have none; with fewer than three EFs, only the reasons."""
    clinical = summary.get("clinical")
    if not clinical or patients is None:
        return None
    agreement = clinical["agreement"]
    known = {title: agreement.get(name) for name, title in AGREEMENT_TITLES.items()}
    for convention, kinds in clinical["reference"].items():
        for kind, title in (("prediction", "Predicted EF"), ("truth", "EF from the experts' masks")):
            known[f"{title} against the EF in the cfg file ({convention}), %"] = kinds[kind]
    rows = [(title, row) for title, row in known.items() if row and row["r"] is not None]
    ef = agreement["ef_camus"]
    if not rows or ef["n"] < MIN_PAIRS:
        return {"ef": None, "incomplete": clinical["incomplete"]} if clinical["incomplete"] else None
    pair = (patients["ef_camus_prediction"], patients["ef_camus_truth"])
    limits = f"limits of agreement {ef['loa_low']:.1f} to {ef['loa_high']:.1f}"
    correlation = "no correlation (all the same)" if ef["r"] is None else f"r {ef['r']:.2f}"
    numbers = f"{ef['n']} patients, bias {ef['bias']:.1f} points, {limits}, {correlation}."
    scatter = plots.agreement_scatter(*pair, ef, "EF (camus), predicted and expert", "%")
    differences = plots.bland_altman(*pair, ef, "Bland-Altman, EF (camus)", "points")
    figures = [pages.figure(scatter, "ef-scatter", f"Scatter of EF: {numbers}")]
    figures.append(pages.figure(differences, "ef-bland-altman", f"Bland-Altman plot of EF: {numbers}"))
    return {"ef": ef, "rows": rows, "plots": figures, "classes": clinical["ef_classes"], "incomplete": clinical["incomplete"]}


def published_section(summary: dict, dataset: str) -> dict | None:
    """Our scores first, then the published ones in the same convention; None for data other than CAMUS."""
    phases = summary["by"].get("phase", {})
    if dataset != "CAMUS" or any(phase not in phases for phase in PHASES):
        return None
    whose = "These masks" if "predictions" in summary else "This model"
    name, scores, agreement = f"{whose}, {summary['group']} group", summary["scores"], summary["clinical"]["agreement"]
    kinds = {"dice": "dice_{}", "hd_mm": "hd_{}_mm"}
    challenge = {
        kind: {s: tuple(phases[p][column.format(s)] for p in PHASES) for s in ("endo", "epi", "la")}
        for kind, column in kinds.items()
    }
    split = {score: scores[score]["mean"] for score in ("dice_endo", "dice_myo", "dice_la", "dice", "iou")}
    clinical = {k: tuple(agreement[f"{k}_camus"][v] for v in ("r", "bias", "sd")) for k in ("ef", "edv_ml", "esv_ml")}
    return {
        "challenge": [{"name": name} | challenge, *published_results.CHALLENGE],
        "split": [{"name": name} | split, *published_results.OFFICIAL_SPLIT],
        "clinical": [{"name": name} | clinical, *published_results.CLINICAL] if clinical["ef"][0] is not None else [],
    }


def example_pictures(evaluation: str, images: pandas.DataFrame | None) -> dict[str, list[dict]]:
    """The images of lowest and highest Dice with both outlines, in true proportions."""
    examples = {} if images is None else read_examples(evaluation)
    drawn, half = [_example(example, images.loc[row]) for row, example in examples.items()], (len(examples) + 1) // 2
    return {"worst_pictures": drawn[:half], "best_pictures": drawn[half:][::-1]}


def _example(example: Example, row: pandas.Series) -> dict:
    name = frame_name(row.astype(object).where(row.notna(), None))
    dice = row[[f"dice_{structure}" for structure in STRUCTURES]].dropna().astype(float)
    caption = f"{name}: Dice {row['dice']:.3f}, lowest {dice.idxmin().removeprefix('dice_')} {dice.min():.3f}"
    drawn = contours.overlay(example.image, example.prediction, example.spacing_mm, EXAMPLE_PIXEL_ROWS, example.truth)
    return pages.picture(drawn, caption, f"{name} with the model's and the expert's outlines")


def lineage(run: str, description: dict, summary: dict) -> list[tuple[str, str]]:
    """The origins of the scores, as rows of name and text."""
    if not run:  # masks from files
        parts = [(f"Evaluation {number}", path) for number, path in enumerate(summary.get("evaluations", ()), 1)]
        return [(name.title(), summary[name]) for name in ("predictions", "truth", "dataset")] + parts
    groups, split = description.get("groups", {}), flatten(description.get("split") or {})
    if split.get("kind") == "official":
        split = {"kind": "official"}  # the other settings are for draws
    return [
        ("Run", run),
        ("Recipe", description["experiment"]["name"]),
        ("Network", ModelConfig(**description["identity"]["model"]).title),
        ("Checkpoint", "{} ({}, epoch {})".format(*(summary.get(key, "–") for key in ("checkpoint", "which", "epoch")))),
        *((title, description.get(key, "–")) for title, key in ORIGINS.items()),
        ("Split", ", ".join(f"{key} {value}" for key, value in split.items()) or "–"),
        *((f"Group {g}", f"patients: {n['patients']}, images: {n['images']}") for g, n in groups.items()),
        ("Weights & Biases id", description.get("wandb_id", "–")),
    ]
