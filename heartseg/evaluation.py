"""A trained model's scores on the native grid: one row an image, and the summary that reports and tables use."""

from collections.abc import Iterable

import numpy as np
import pandas
import torch

from heartseg.agreement import bootstrap_interval
from heartseg.metrics import SCORES, confusion, image_scores
from heartseg.predict import Segmenter, to_native
from heartseg.shards import Frames

KEYS = ("patient", "view", "phase", "quality")
BY = ("phase", "view", "quality")


def score_images(segmenter: Segmenter, frames: Frames, rows: range) -> list[dict]:
    """Scores of some rows of a group: the prediction is resampled to each image's own grid, then scored.

    A row holds KEYS, SCORES and the confusion counts (`confusion`, 16 integers) that pooled scores are made of.
    """
    found, batch = [], segmenter.experiment.train.eval_batch_size
    for start in range(rows.start, rows.stop, batch):
        chosen = range(start, min(start + batch, rows.stop))
        logits = segmenter.logits(frames.images[chosen.start : chosen.stop])
        for index, scores in zip(chosen, logits.cpu(), strict=True):
            truth = frames.native_mask(index)
            prediction = torch.from_numpy(to_native(scores, truth.shape))
            counts = confusion(prediction[None], torch.from_numpy(truth.copy())[None])
            row = {key: frames.table[key][index].as_py() for key in KEYS}
            row |= {name: value.item() for name, value in image_scores(counts).items()}
            found.append(row | {"confusion": counts.flatten().tolist()})
    return found


def summarise(images: pandas.DataFrame) -> dict:
    """Means over images with 95 % bootstrap intervals over patients, pooled scores, and means by phase, view, quality."""
    patients = images["patient"].to_numpy()
    scores = {}
    for name in SCORES:
        values = images[name].to_numpy(dtype=float)
        low, high = bootstrap_interval(values, patients)
        scores[name] = {"mean": _number(np.nanmean(values)), "low": _number(low), "high": _number(high)}
    pooled = torch.tensor(np.stack(images["confusion"].to_list()).sum(axis=0)).view(1, 4, 4)
    return {
        "images": len(images),
        "patients": int(images["patient"].nunique()),
        "grid": "native",
        "scores": scores,
        "pooled": {name: _number(value.item()) for name, value in image_scores(pooled).items()},
        "by": {key: _means_by(images, key) for key in BY if images[key].notna().any()},
    }


def _means_by(images: pandas.DataFrame, key: str) -> dict[str, dict]:
    return {
        str(value): {"images": len(part)} | {name: _number(part[name].mean()) for name in SCORES}
        for value, part in images.groupby(key)
    }


def _number(value: float) -> float | None:
    """JSON has no NaN: what has no value is null."""
    return float(value) if np.isfinite(value) else None


def table_text(summary: dict, names: Iterable[str] = ("dice", "iou", "accuracy", "dice4")) -> str:
    """The summary as a text table for a terminal."""
    lines = [f"{'score':<12}{'mean':>8}   95 % interval    pooled"]
    for name in [*names, *(score for score in SCORES if score.startswith("dice_"))]:
        entry = summary["scores"][name]
        if entry["mean"] is not None:
            interval = f"{entry['low']:.4f} - {entry['high']:.4f}"
            pooled = float("nan") if summary["pooled"][name] is None else summary["pooled"][name]
            lines.append(f"{name:<12}{entry['mean']:>8.4f}   {interval}  {pooled:.4f}")
    return "\n".join(lines)
