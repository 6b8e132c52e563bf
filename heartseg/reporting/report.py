"""Result tables to one self-contained HTML page, for a cardiologist and for an engineer.

It reads what a training run and an evaluation left behind, lays it out, and recomputes no metric.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas

from heartseg.config import recipes
from heartseg.config.experiment import flatten
from heartseg.evaluation.scoring import IMAGES, PAGE, PATIENTS, SUMMARY, read_rows
from heartseg.labels import CLASS_COLOURS, CLASS_TITLES, CLASSES
from heartseg.reporting import contours, pages, plots, report_sections
from heartseg.reporting.report_sections import STRUCTURE_TITLES
from heartseg.storage import filesystem
from heartseg.training import run_directory

GROUP_TITLES = {"train": "training", "val": "validation", "test": "test", "all": "whole"}
SCORE_TITLES = {
    "dice": "Mean Dice of the three structures",
    "dice_endo": "Dice, left-ventricular cavity (endo)",
    "dice_myo": "Dice, left-ventricular wall (myo)",
    "dice_la": "Dice, left atrium (la)",
    "dice_epi": "Dice, epicardium: cavity and wall together (epi)",
    "dice4": "Dice, mean of four areas, background included (dice4)",
    "iou": "Mean IoU (Jaccard) of the three structures",
    "iou_endo": "IoU, left-ventricular cavity",
    "iou_myo": "IoU, left-ventricular wall",
    "iou_la": "IoU, left atrium",
    "accuracy": "Pixel accuracy: correct pixels / all pixels",
}
# Cards beside the headline: the shortest wording, and the colour of the structure.
CARDS = {
    **{f"dice_{name}": (title, plots.STRUCTURE_COLOURS[name]) for name, title in STRUCTURE_TITLES.items()},
    "iou": ("IoU, three structures", ""),
    "dice4": ("Dice, four areas", ""),
    "accuracy": ("Pixel accuracy", ""),
}
# Columns of the narrower tables, with their headings.
COLUMNS = {"dice": "Mean Dice", "dice_endo": "endo", "dice_myo": "myo", "dice_la": "la", "dice_epi": "epi"}
BREAKDOWN_COLUMNS = COLUMNS | {"dice4": "dice4", "iou": "IoU", "accuracy": "Accuracy"}
# Distances in mm of the same tables.
BREAKDOWN_DISTANCES = {"masd_endo_mm": "endo, mean mm", "hd95_endo_mm": "endo, HD95 mm", "masd_la_mm": "la, mean mm"}
CURVES = {
    "loss": "Loss",
    "accuracy": "Pixel accuracy",
    "dice4": "Dice of four areas (dice4)",
    "iou": "IoU of three structures",
    "dice": "Mean Dice of three structures",
}
BREAKDOWNS = {"phase": "phase", "view": "view", "quality": "image quality", "size": "size of the heart in the image"}
# A run's origins, by their keys in its description.
ORIGINS = {
    "Code revision": "code",
    "Dataset": "dataset",
    "Data fingerprint": "data_fingerprint",
    "Source SHA-256": "source_sha256",
}
WORST_ROWS, CHANNEL_SAMPLES = 10, 2


def write_report(evaluation: str, run: str | None = None) -> str:
    """Write `report.html` into an evaluation's folder and return its path; both folders are paths or URIs.

    `run` is the training run that was evaluated, None for masks from files. Raises UserError if the run's `experiment.json` or
    the evaluation's `summary.json` is missing. Other missing files leave their sections out.
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
        group_title=GROUP_TITLES.get(summary["group"], summary["group"]),
        **score_tables(summary),
        **image_tables(images),
        flags=summary.get("flags"),
        distances=report_sections.distance_table(summary),
        distance_columns=list(report_sections.DISTANCE_COLUMNS.values()),
        clinical=report_sections.clinical_section(summary, patients),
        published=report_sections.published_section(summary, dataset),
        **report_sections.example_pictures(evaluation, images),
        curves=curve_figures(run_directory.read_record(run), summary) if run else [],
        **sample_pictures(read_samples(run) if run else []),
        legend=list(zip(CLASSES, CLASS_TITLES, CLASS_COLOURS, strict=True))[1:],
        configuration=list(flatten(description.get("identity", {})).items()),
        lineage=lineage(run, description, summary) if run else file_lineage(summary),
        choices=recipes.SEED_CHOICES if run and description["experiment"]["name"] == "seed" else (),
    )


def score_tables(summary: dict) -> dict:
    """The headline's cards, the table of all scores, and one table for each breakdown that is known."""
    scores, pooled = summary["scores"], summary.get("pooled") or {}
    breakdowns = [(title, summary.get("by", {}).get(key) or {}) for key, title in BREAKDOWNS.items()]
    return {
        "headline": scores.get("dice"),
        "cards": [(title, colour, scores.get(name)) for name, (title, colour) in CARDS.items()],
        "scores": [(SCORE_TITLES[n], scores[n] or {}, pooled.get(n)) for n in SCORE_TITLES if n in scores],
        "breakdowns": [(title, parts) for title, parts in breakdowns if parts],
        "breakdown_columns": BREAKDOWN_COLUMNS,
        "breakdown_distances": BREAKDOWN_DISTANCES,
    }


def image_tables(images: pandas.DataFrame | None) -> dict:
    """The figure of the images' Dice by structure, and the rows of the lowest ones."""
    if images is None:
        return {"spread": None, "worst": [], "worst_columns": COLUMNS}
    values = {name: images[f"dice_{name}"].to_numpy(float) for name in STRUCTURE_TITLES if f"dice_{name}" in images}
    drawn = plots.spread(values, STRUCTURE_TITLES, "Dice of an image (1 is perfect overlap)")
    alt = f"Box plot and points of the Dice of {len(images)} images, by structure; the score tables hold the means."
    scored = images[images["dice"].notna()]
    lowest = scored.drop(columns="confusion", errors="ignore").sort_values(["dice", "patient", "view", "phase"])
    rows = lowest.head(WORST_ROWS).to_dict("records")
    return {
        "spread": pages.figure(drawn, "spread", alt) if len(scored) else None,
        "worst": [{name: "–" if pandas.isna(value) else value for name, value in row.items()} for row in rows],
        "worst_columns": COLUMNS,
    }


def curve_figures(record: list[dict], summary: dict) -> list[dict]:
    """The curves by epoch as inline figures; none before the first epoch."""
    found = dict.fromkeys(key.split("/")[0] for epoch in record for key in epoch if key.endswith("/loss"))
    groups = sorted(found, key=lambda group: [*GROUP_TITLES, group].index(group))
    panels = {name: {group: (record, f"{group}/{name}") for group in groups} for name in CURVES}
    panels["lr"] = {"": (record, "lr")}
    return [
        curve_figure(f"curve-{name}", CURVES.get(name, "Learning rate"), lines, marked=summary.get("epoch"))
        for name, lines in panels.items()
        if record
    ]


def curve_figure(
    name: str, title: str, lines: Mapping[str, tuple[list[dict], str]], marked: int | None = None,
    styles: Mapping[str, tuple[str, str]] | None = None,
) -> dict:  # fmt: skip
    """An inline figure of metrics by epoch: `lines` are (record, key) by group or run; an epoch without a value is a gap."""
    epochs = sorted({int(epoch["epoch"]) for record, _ in lines.values() for epoch in record})
    series = {label: by_epoch(record, key, epochs) for label, (record, key) in lines.items()}
    known = {GROUP_TITLES.get(label, label): values[np.isfinite(values)] for label, values in series.items()}
    last = ", ".join(f"{label} {values[-1]:.4g}".strip() for label, values in known.items() if len(values))
    drawn = plots.curve(epochs, series, title, marked, styles)
    return pages.figure(drawn, name, f"{title} by epoch, to epoch {epochs[-1]}: {last}.")


def by_epoch(record: list[dict], key: str, epochs: Sequence[int]) -> np.ndarray:
    """A metric at each of some epochs, NaN if the record has none."""
    known = {int(epoch["epoch"]): epoch.get(key) for epoch in record}
    return np.array([known.get(epoch) for epoch in epochs], float)


def read_samples(run: str) -> list[dict[str, np.ndarray]]:
    """The samples after the first and after the last epoch, in this order; one if they are the same, or none."""
    samples = {}
    for name in ("first", "last"):
        path = filesystem.join(run, "samples", f"{name}.npz")
        if filesystem.exists(path):
            with np.load(io.BytesIO(filesystem.read_bytes(path)), allow_pickle=False) as arrays:
                held = {key: arrays[key] for key in arrays.files}
            samples[int(held["epoch"])] = held
    return [samples[epoch] for epoch in sorted(samples)]


def sample_pictures(samples: list[dict]) -> dict:
    """Rows of image, truth and predictions, one a sample; and the one-class channels of the first samples."""
    if not samples:
        return {"sample_rows": [], "channel_rows": [], "sample_grid": ""}
    newest = samples[-1]
    names = [str(name) for name in newest["names"]]
    height, width = newest["images"].shape[1:]
    return {
        "sample_rows": [(name, sample_overlays(samples, row, name)) for row, name in enumerate(names)],
        "channel_rows": [(name, one_class_channels(newest, row, name)) for row, name in enumerate(names[:CHANNEL_SAMPLES])],
        "sample_grid": f"{height} × {width}",
    }


def sample_overlays(samples: list[dict], row: int, name: str) -> list[dict]:
    """A sample's image, its truth, and its prediction after each epoch that was kept."""
    image, truth = (samples[-1][key][row] for key in ("images", "masks"))
    cells = [pages.picture(contours.overlay(image, np.zeros_like(truth)), "Image", f"Ultrasound image of {name}")]
    cells.append(pages.picture(contours.overlay(image, truth), "Truth", f"{name} with the contours of the truth"))
    for held in samples:
        for prediction in held["predictions"][held["names"] == name][:1]:
            caption = f"Prediction after epoch {int(held['epoch'])}"
            alt = f"{name} with the contours of the {caption.lower()}"
            cells.append(pages.picture(contours.overlay(image, prediction), caption, alt))
    return cells


def one_class_channels(held: dict, row: int, name: str) -> list[tuple[str, list[dict]]]:
    """Truth and prediction of a sample as one picture per class."""
    kinds = {"Truth": "masks", f"Prediction after epoch {int(held['epoch'])}": "predictions"}
    return [
        (kind, [
            pages.picture(drawn, title, f"{kind} of {name}, channel {label}")
            for drawn, label, title in zip(contours.channels(held[key][row]), CLASSES, CLASS_TITLES, strict=True)
        ])
        for kind, key in kinds.items()
    ]  # fmt: skip


def lineage(run: str, description: dict, summary: dict) -> list[tuple[str, str]]:
    """The origins of the scores, as rows of a name and a text."""
    groups = description.get("groups", {})
    sizes = [(f"Group {g}", f"{n['patients']} patients, {n['images']} images") for g, n in groups.items()]
    split = ", ".join(f"{key} {value}" for key, value in flatten(description.get("split") or {}).items())
    return [
        ("Run", run),
        ("Recipe", description["experiment"]["name"]),
        ("Checkpoint", "{} ({}, epoch {})".format(*(summary.get(key, "–") for key in ("checkpoint", "which", "epoch")))),
        *((title, description.get(key, "–")) for title, key in ORIGINS.items()),
        ("Split", split or "–"),
        *sizes,
        ("Weights & Biases id", description.get("wandb_id", "–")),
    ]


def file_lineage(summary: dict) -> list[tuple[str, str]]:
    """Where masks from files, and their truth, were found."""
    parts = [(f"Part {number}", path) for number, path in enumerate(summary.get("evaluations", ()), 1)]
    return [("Predictions", summary["predictions"]), ("Truth", summary["truth"]), ("Dataset", summary["dataset"]), *parts]
