"""Result tables to one self-contained HTML page, for a cardiologist and for an engineer.

It reads what a training run and an evaluation left behind, lays it out, and recomputes no metric.
"""

import io
import math

import jinja2
import numpy as np
import pandas

from heartseg.config import recipes
from heartseg.config.experiment import flatten
from heartseg.evaluation.scoring import IMAGES, PAGE, PATIENTS, SUMMARY
from heartseg.labels import CLASS_COLOURS, CLASS_TITLES, CLASSES
from heartseg.reporting import contours, plots, report_sections
from heartseg.reporting.report_sections import inline, picture
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
# What the cards beside the headline show, shortest wording, with the colour of the structure.
CARDS = {
    "dice_endo": ("Cavity (endo)", CLASS_COLOURS[1]),
    "dice_myo": ("Wall (myo)", CLASS_COLOURS[2]),
    "dice_la": ("Left atrium (la)", CLASS_COLOURS[3]),
    "dice_epi": ("Epicardium (epi = endo + myo)", plots.STRUCTURE_COLOURS["epi"]),
    "iou": ("IoU, three structures", ""),
    "dice4": ("Dice, four areas", ""),
    "accuracy": ("Pixel accuracy", ""),
}
SPREAD_TITLES = {"endo": "cavity (endo)", "myo": "wall (myo)", "la": "left atrium (la)", "epi": "epicardium (epi)"}
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
WORST_ROWS, CHANNEL_SAMPLES = 10, 2


def write_report(evaluation: str, run: str | None = None) -> str:
    """Write `report.html` into an evaluation's folder and return its path; both folders are paths or URIs.

    `run` is the training run that was evaluated, None for masks of anyone's. Raises UserError where the run's
    `experiment.json` or the evaluation's `summary.json` is missing. Whatever else is not there leaves its section out.
    """
    summary = filesystem.read_json(filesystem.join(evaluation, SUMMARY))
    description = filesystem.read_json(filesystem.join(run, run_directory.DESCRIPTION)) if run else {}
    dataset = summary.get("dataset") or description.get("dataset", "other")
    images, patients = (_table(evaluation, name) for name in (IMAGES, PATIENTS))
    page = (
        environment()
        .get_template(PAGE)
        .render(
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
            **pictures(read_samples(run) if run else []),
            legend=list(zip(CLASSES, CLASS_TITLES, CLASS_COLOURS, strict=True))[1:],
            configuration=list(flatten(description.get("identity", {})).items()),
            lineage=lineage(run, description, summary) if run else file_lineage(summary),
            choices=recipes.SEED_CHOICES if run and description["experiment"]["name"] == "seed" else (),
        )
    )
    path = filesystem.join(evaluation, PAGE)
    filesystem.publish(path, page.encode())
    return path


def environment() -> jinja2.Environment:
    """The templates of pages, with the filters `score`, `interval` and `number`; whatever is not handed in is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("heartseg.reporting"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"score": show_score, "interval": show_interval, "number": show_number}
    return made


def _table(evaluation: str, name: str) -> pandas.DataFrame | None:
    path = filesystem.join(evaluation, name)
    return filesystem.read_table(filesystem.read_bytes(path)).to_pandas() if filesystem.exists(path) else None


def show_score(value: float | None) -> str:
    """Three decimals, or a dash where there is no value."""
    return show_number(value, 3)


def show_number(value: float | None, digits: int = 1) -> str:
    """Some decimals, or a dash where there is no value."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def show_interval(score: dict | None, digits: int = 3) -> str:
    """The 95 % interval of a score's mean, or a dash where there is none."""
    ends = [show_number((score or {}).get(end), digits) for end in ("low", "high")]
    return "–" if "–" in ends else " to ".join(ends)


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
    values = {name: images[f"dice_{name}"].to_numpy(float) for name in SPREAD_TITLES if f"dice_{name}" in images}
    figure = plots.spread(values, SPREAD_TITLES, "Dice of an image (1 is perfect overlap)")
    alt = f"Box plot and points of the Dice of {len(images)} images, by structure; the score tables hold the means."
    scored = images[images["dice"].notna()]
    shown = scored.drop(columns="confusion", errors="ignore")
    shown = shown.sort_values(["dice", "patient", "view", "phase"]).head(WORST_ROWS)
    return {
        "spread": inline(figure, "spread", alt) if len(scored) else None,
        "worst": [{k: "–" if pandas.isna(v) else v for k, v in row.items()} for row in shown.to_dict("records")],
        "worst_columns": COLUMNS,
    }


def column(record: list[dict], key: str) -> list[float]:
    """A metric by epoch, NaN where it is missing."""
    return [math.nan if epoch.get(key) is None else float(epoch[key]) for epoch in record]


def curve_figures(record: list[dict], summary: dict) -> list[dict]:
    """The curves by epoch as inline figures; none before the first epoch."""
    if not record:
        return []
    found = dict.fromkeys(key.split("/")[0] for epoch in record for key in epoch if key.endswith("/loss"))
    groups = sorted(found, key=lambda group: [*GROUP_TITLES, group].index(group))
    panels = {name: {group: column(record, f"{group}/{name}") for group in groups} for name in CURVES}
    panels["lr"] = {"": column(record, "lr")}
    epochs = [int(epoch["epoch"]) for epoch in record]
    drawn = []
    for name, series in panels.items():
        title = CURVES.get(name, "Learning rate")
        figure = plots.curve(epochs, series, title, summary.get("epoch"))
        last = ", ".join(f"{GROUP_TITLES.get(group, group)} {values[-1]:.4g}".strip() for group, values in series.items())
        drawn.append(inline(figure, f"curve-{name}", f"{title} by epoch, to epoch {epochs[-1]}: {last}."))
    return drawn


def read_samples(run: str) -> list[dict[str, np.ndarray]]:
    """The samples after the first and after the last epoch, in this order; one where they are the same, or none."""
    samples = {}
    for name in ("first", "last"):
        path = filesystem.join(run, "samples", f"{name}.npz")
        if filesystem.exists(path):
            with np.load(io.BytesIO(filesystem.read_bytes(path)), allow_pickle=False) as arrays:
                held = {key: arrays[key] for key in arrays.files}
            samples[int(held["epoch"])] = held
    return [samples[epoch] for epoch in sorted(samples)]


def pictures(samples: list[dict]) -> dict:
    """Rows of image, truth and predictions, one a sample; and the one-class channels of the first samples."""
    if not samples:
        return {"sample_rows": [], "channel_rows": [], "sample_grid": ""}
    newest = samples[-1]
    names = [str(name) for name in newest["names"]]
    height, width = newest["images"].shape[1:]
    return {
        "sample_rows": [(name, overlays(samples, row, name)) for row, name in enumerate(names)],
        "channel_rows": [(name, one_class(newest, row, name)) for row, name in enumerate(names[:CHANNEL_SAMPLES])],
        "sample_grid": f"{height} × {width}",
    }


def overlays(samples: list[dict], row: int, name: str) -> list[dict]:
    """A sample's image, its truth, and its prediction after each kept epoch."""
    image, truth = (contours.enlarge(samples[-1][key][row]) for key in ("images", "masks"))
    cells = [picture(image, "Image", f"Ultrasound image of {name}")]
    cells.append(picture(contours.overlay(image, truth, thick=True), "Truth", f"{name} with the contours of the truth"))
    for held in samples:
        where = np.flatnonzero(held["names"] == name)
        if len(where):
            drawn = contours.overlay(image, contours.enlarge(held["predictions"][where[0]]), thick=True)
            caption = f"Prediction after epoch {int(held['epoch'])}"
            cells.append(picture(drawn, caption, f"{name} with the contours of the {caption.lower()}"))
    return cells


def one_class(held: dict, row: int, name: str) -> list[tuple[str, list[dict]]]:
    """Truth and prediction of a sample as one picture per class."""
    kinds = {"Truth": "masks", f"Prediction after epoch {int(held['epoch'])}": "predictions"}
    rows = []
    for kind, key in kinds.items():
        drawn = zip(contours.channels(held[key][row]), CLASSES, CLASS_TITLES, strict=True)
        rows.append((kind, [picture(p, title, f"{kind} of {name}, channel {c}") for p, c, title in drawn]))
    return rows


def lineage(run: str, description: dict, summary: dict) -> list[tuple[str, str]]:
    """What the scores were made from, as rows of a name and a text."""
    groups = description.get("groups", {})
    sizes = [(f"Group {g}", f"{n['patients']} patients, {n['images']} images") for g, n in groups.items()]
    split = ", ".join(f"{key} {value}" for key, value in flatten(description.get("split") or {}).items())
    return [
        ("Run", run),
        ("Recipe", description["experiment"]["name"]),
        (
            "Checkpoint",
            f"{summary.get('checkpoint', '–')} ({summary.get('which', '–')}, epoch {summary.get('epoch', '–')})",
        ),
        ("Code revision", description.get("code", "–")),
        ("Dataset", description.get("dataset", "–")),
        ("Data fingerprint", description.get("data_fingerprint", "–")),
        ("Source SHA-256", description.get("source_sha256", "–")),
        ("Split", split or "–"),
        *sizes,
        ("Weights & Biases id", description.get("wandb_id", "–")),
    ]


def file_lineage(summary: dict) -> list[tuple[str, str]]:
    """Where masks that no run made, and their truth, were found."""
    parts = [(f"Part {number}", path) for number, path in enumerate(summary.get("evaluations", ()), 1)]
    return [("Predictions", summary["predictions"]), ("Truth", summary["truth"]), ("Dataset", summary["dataset"]), *parts]
