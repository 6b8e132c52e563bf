"""Figures of training runs for pages: scores by epoch, and the samples that a run keeps, with its predictions."""

import io
from collections.abc import Mapping

import numpy as np

from heartseg.labels import CLASS_TITLES, CLASSES
from heartseg.reporting import contours, pages, plots
from heartseg.storage import filesystem

GROUP_TITLES = {"train": "training", "val": "validation", "test": "test", "all": "whole"}
CURVES = {
    "loss": "Loss",
    "accuracy": "Pixel accuracy",
    "dice4": "Dice of four areas (dice4)",
    "iou": "IoU of three structures",
    "dice": "Mean Dice of three structures",
}
CHANNEL_SAMPLES = 2


def run_curves(record: list[dict], marked: int | None) -> list[dict]:
    """One run's scores and learning rate by epoch, one line per group, as inline figures; none before the first epoch."""
    found = dict.fromkeys(key.split("/")[0] for epoch in record for key in epoch if key.endswith("/loss"))
    groups = sorted(found, key=lambda group: [*GROUP_TITLES, group].index(group))
    panels = {name: {group: (record, f"{group}/{name}") for group in groups} for name in CURVES} | {"lr": {"": (record, "lr")}}
    titles = CURVES | {"lr": "Learning rate"}
    return [curve_figure(f"curve-{name}", titles[name], lines, marked) for name, lines in panels.items() if record]


def curve_figure(
    name: str, title: str, lines: Mapping[str, tuple[list[dict], str]], marked: int | None = None,
    styles: Mapping[str, tuple[str, str]] | None = None,
) -> dict:  # fmt: skip
    """An inline figure of metrics by epoch; `lines` are (record, key) by group or run; epochs without a value are gaps."""
    epochs = sorted({int(epoch["epoch"]) for record, _ in lines.values() for epoch in record})
    series, known = {}, []
    for label, (record, key) in lines.items():
        by_epoch = {int(epoch["epoch"]): epoch.get(key) for epoch in record}
        values = series[label] = np.array([by_epoch.get(epoch) for epoch in epochs], float)
        known += [f"{GROUP_TITLES.get(label, label)} {value:.4g}".strip() for value in values[np.isfinite(values)][-1:]]
    drawn = plots.curve(epochs, series, title, marked, styles)
    return pages.figure(drawn, name, f"{title} by epoch, to epoch {epochs[-1]}: {', '.join(known)}.")


def sample_pictures(run: str) -> dict:
    """One row per sample with image, truth and predictions, and the single-class channels of the first samples."""
    by_epoch = {}
    for name in ("first", "last"):
        path = filesystem.join(run, "samples", f"{name}.npz")
        if filesystem.exists(path):
            with np.load(io.BytesIO(filesystem.read_bytes(path)), allow_pickle=False) as arrays:
                by_epoch[int(arrays["epoch"])] = dict(arrays)
    if not by_epoch:
        return {"sample_rows": []}
    samples = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    names, (height, width) = [str(name) for name in samples[-1]["names"]], samples[-1]["images"].shape[1:]
    return {
        "sample_rows": [(name, _overlays(samples, row, name)) for row, name in enumerate(names)],
        "channel_rows": [(name, _channels(samples[-1], row, name)) for row, name in enumerate(names[:CHANNEL_SAMPLES])],
        "sample_grid": f"{height} × {width}",
    }


def _overlays(samples: list[dict], row: int, name: str) -> list[dict]:
    """A sample's image, its truth, and its kept predictions."""
    image, truth = (samples[-1][key][row] for key in ("images", "masks"))
    drawn = [("Image", np.zeros_like(truth), f"Ultrasound image of {name}")]
    drawn.append(("Truth", truth, f"{name} with the contours of the truth"))
    for held in samples:
        caption = f"Prediction after epoch {int(held['epoch'])}"
        alt = f"{name} with the contours of the {caption.lower()}"
        drawn += [(caption, prediction, alt) for prediction in held["predictions"][held["names"] == name][:1]]
    return [pages.picture(contours.overlay(image, mask), caption, alt) for caption, mask, alt in drawn]


def _channels(held: dict, row: int, name: str) -> list[tuple[str, list[dict]]]:
    """Truth and prediction of a sample as one picture per class."""
    rows = []
    for kind, key in {"Truth": "masks", f"Prediction after epoch {int(held['epoch'])}": "predictions"}.items():
        shown = zip(contours.channels(held[key][row]), CLASSES, CLASS_TITLES, strict=True)
        rows.append((kind, [pages.picture(one, title, f"{kind} of {name}, channel {label}") for one, label, title in shown]))
    return rows
