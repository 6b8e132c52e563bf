"""Scores on the native grid, clinical indices, and the summary that reports and tables use.

One row an image, one row a patient; whatever was missing is a row of its own, with the reason.
"""

import io
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pandas
import pyarrow as pa
import torch

from heartseg.config.experiment import PredictConfig
from heartseg.evaluation.ground_truth import Case, ShardTruth, TreeTruth
from heartseg.inference.segmenter import LOOK_BELOW, Ensemble, Segmented, Segmenter, segment_images
from heartseg.labels import EF_CLASSES
from heartseg.metrics.agreement import agree, bootstrap_interval, ef_confusion
from heartseg.metrics.anatomy_checks import implausibilities
from heartseg.metrics.cardiac_indices import INDICES, patient_indices
from heartseg.metrics.segmentation import DISTANCES, SCORES, confusion, image_scores, surface_distances
from heartseg.shards.writer import resize_image
from heartseg.storage import filesystem

KEYS = ("patient", "view", "phase", "frame", "number", "quality")
BY = ("phase", "view", "quality", "size")
EXAMPLES, NUM_EXAMPLES = "examples.npz", 10
LOW_DICE = 0.80
# Indices whose agreement with the experts' masks is told, in the order of the tables.
AGREEMENTS = tuple(name for name in INDICES if name.startswith(("ef_", "edv_ml_", "esv_ml_", "la_volume_ml")))


def segment_cases(segmenter: Segmenter | Ensemble, cases: Sequence[Case], options: PredictConfig) -> list[Segmented]:
    """A predicted mask on the native grid for each case, from its image."""
    return segment_images(segmenter, [case.image for case in cases], options, [case.truth.shape for case in cases])


def score_image(case: Case, predicted: Segmented) -> dict:
    """One image's row: KEYS but `number`, SCORES, DISTANCES, confusion counts (16 integers) and the packed prediction.

    `confidence` is the network's own (predict.quality), `implausible` says why the mask is no heart; empty where it is.
    """
    prediction = predicted.mask
    counts = confusion(torch.from_numpy(prediction)[None], torch.from_numpy(case.truth.copy())[None])
    row = {"patient": case.patient, "view": case.view and str(case.view), "phase": case.phase and str(case.phase)}
    row |= {"frame": case.frame}
    row |= {"quality": getattr(case.info, "quality", None)}
    row |= {name: value.item() for name, value in image_scores(counts).items()}
    row |= surface_distances(prediction, case.truth, case.spacing_mm)
    row |= {"confidence": predicted.quality, "implausible": "; ".join(implausibilities(prediction, case.spacing_mm))}
    return row | {"confusion": counts.flatten().tolist(), "mask": zlib.compress(prediction.tobytes(), level=1)}


def patient_row(patient: str, cases: Sequence[Case], predictions: Sequence[Segmented | None]) -> dict:
    """One patient's row: clinical indices from predicted and from true masks, and what the cfg says of the EF.

    Columns end in `_prediction` and `_truth`; `reason_…` says why an index is missing.
    """
    # A volume needs to know what it sees; of two pictures of one view and phase nobody says which one counts.
    seen = Counter((c.view, c.phase) for c in cases)
    usable = [c.view is not None and c.phase is not None and seen[c.view, c.phase] == 1 for c in cases]
    pairs = [pair for pair, use in zip(zip(cases, predictions, strict=True), usable, strict=True) if use]
    predicted = {(c.view, c.phase): (found.mask, c.spacing_mm) for c, found in pairs if found is not None}
    true = {(c.view, c.phase): (c.truth, c.spacing_mm) for c, _ in pairs}
    info = next((c.info for c in cases if c.info and c.info.ef is not None), None)
    row: dict = {"patient": patient, "images": sum(mask is not None for mask in predictions)}
    row |= {"ef_reference": info.ef if info else None, "ef_convention": info.ef_convention if info else None}
    for kind, masks in (("prediction", predicted), ("truth", true)):
        row |= {f"{name}_{kind}": value for name, value in patient_indices(masks).items()}
    return row


def score_patients(cases: Sequence[Case], predictions: Sequence[Segmented | None]) -> tuple[list[dict], list[dict]]:
    """Rows of images and rows of patients; a case whose prediction is None gives no image row."""
    images, patients = [], []
    for patient in dict.fromkeys(case.patient for case in cases):
        mine = [pair for pair in zip(cases, predictions, strict=True) if pair[0].patient == patient]
        # `number` finds the case again among its patient's; view and phase may be unknown.
        images += [score_image(case, found) | {"number": i} for i, (case, found) in enumerate(mine) if found is not None]
        patients.append(patient_row(patient, [case for case, _ in mine], [found for _, found in mine]))
    return images, patients


def write_examples(out: str, images: pandas.DataFrame, truth: ShardTruth | TreeTruth) -> None:
    """Keep image, truth and prediction of the lowest and the highest Dice as `examples.npz`, for the report.

    Arrays are `image_I`, `truth_I`, `prediction_I` uint8 [H,W] on the native grid and `spacing_mm` [N,2]; `rows` are the
    positions in the images' table, from the lowest Dice to the highest.
    """
    ordered = images[images["dice"].notna()].sort_values(["dice", "patient", "number"]).index
    rows = list(dict.fromkeys([*ordered[:NUM_EXAMPLES], *ordered[-NUM_EXAMPLES:]]))
    arrays, spacings_mm = {}, []
    for number, row in enumerate(rows):
        case = truth.cases([images.loc[row, "patient"]])[0][images.loc[row, "number"]]
        picture = truth.picture(case)
        picture = np.zeros(case.truth.shape, np.uint8) if picture is None else picture  # outlines on black
        prediction = np.frombuffer(zlib.decompress(images.loc[row, "mask"]), np.uint8).reshape(case.truth.shape)
        arrays |= {f"image_{number}": resize_image(picture, *case.truth.shape)}
        arrays |= {f"truth_{number}": case.truth, f"prediction_{number}": prediction}
        spacings_mm.append(case.spacing_mm)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays, spacing_mm=np.array(spacings_mm).reshape(-1, 2), rows=np.array(rows, dtype=np.int64))
    filesystem.publish(filesystem.join(out, EXAMPLES), buffer.getvalue())


def summarise(images: pandas.DataFrame, patients: pandas.DataFrame, missing: Sequence[dict] = ()) -> dict:
    """Means over images with 95 % bootstrap intervals over patients, pooled scores, breakdowns, clinical agreement."""
    images = images.assign(size=size_thirds(images))
    owners = images["patient"].to_numpy()
    scores = {}
    for name in (*SCORES, *DISTANCES):
        values = images[name].to_numpy(dtype=float)
        low, high = bootstrap_interval(values, owners)
        known = values[~np.isnan(values)]
        mean, median = (known.mean(), np.median(known)) if len(known) else (np.nan, np.nan)
        scores[name] = {"mean": _number(mean), "low": _number(low), "high": _number(high), "median": _number(median)}
    pooled = torch.tensor(np.stack(images["confusion"].to_list()).sum(axis=0)).view(1, 4, 4)
    return {
        "images": len(images),
        "patients": int(images["patient"].nunique()),
        "grid": "native",
        "scores": scores,
        "pooled": {name: _number(value.item()) for name, value in image_scores(pooled).items()},
        "by": {key: _means_by(images, key) for key in BY if images[key].notna().any()},
        "clinical": clinical_agreement(patients),
        "flags": flags(images),
        "missing": list(missing),
    }


def size_thirds(images: pandas.DataFrame) -> list[str | None]:
    """For each image the third of them all that it belongs to by the share of it that the experts' heart fills.

    None for all where there are under nine images, or no three sizes.
    """
    counts = np.stack(images["confusion"].to_list()).reshape(-1, 4, 4).sum(axis=2)  # rows are the truth's classes
    shares = counts[:, 1:].sum(axis=1) / counts.sum(axis=1)
    low, high = np.quantile(shares, [1 / 3, 2 / 3])
    if len(shares) < 9 or not shares.min() < low < high <= shares.max():
        return [None] * len(shares)
    names = (f"1: up to {low:.0%} of the image", f"2: {low:.0%} to {high:.0%}", f"3: over {high:.0%}")
    return [names[int(share > low) + int(share > high)] for share in shares]


def write_results(out: str, images: pandas.DataFrame, patients: pandas.DataFrame, summary: dict) -> None:
    """Write `images.parquet`, `patients.parquet` and, last, `summary.json`."""
    for name, rows in (("images", images), ("patients", patients)):
        filesystem.write_table(filesystem.join(out, f"{name}.parquet"), pa.Table.from_pandas(rows, preserve_index=False))
    filesystem.publish_json(filesystem.join(out, "summary.json"), summary)


def flags(images: pandas.DataFrame) -> dict:
    """What would have warned a person: implausible masks, and how well the confidence tells the images of low Dice.

    `spearman` is the rank correlation of confidence and Dice; `auc` the chance that an image under LOW_DICE has the lower
    confidence of two, one under and one not (Hanley and McNeil 1982); both None where there is no such pair. `unsure` are the
    images under LOOK_BELOW, which prediction tells a person to look at, and how many of them are under LOW_DICE.
    """
    doubted = images["implausible"] != ""
    known = images[["confidence", "dice"]].dropna()
    low = known["dice"] < LOW_DICE
    ranks = known["confidence"].rank()
    pairs = int(low.sum()) * int((~low).sum())
    auc = 1 - (ranks[low].sum() - low.sum() * (low.sum() + 1) / 2) / pairs if pairs else np.nan
    spearman = ranks.corr(known["dice"].rank()) if len(known) > 2 else np.nan
    unsure = known["confidence"] < LOOK_BELOW
    told = {"below": LOOK_BELOW, "images": int(unsure.sum()), "low_images": int((unsure & low).sum())}
    return {
        "implausible": int(doubted.sum()),
        "dice_implausible": _number(images.loc[doubted, "dice"].mean()),
        "dice_others": _number(images.loc[~doubted, "dice"].mean()),
        "confidence": {"spearman": _number(spearman), "auc": _number(auc), "low_dice": LOW_DICE, "low_images": int(low.sum())},
        "unsure": told,
    }


def clinical_agreement(patients: pandas.DataFrame) -> dict:
    """Predicted against the experts' masks' indices, and both against the cfg's EF in the cfg's own convention."""
    owner = patients["patient"].to_numpy()
    found = {
        name: agree(patients[f"{name}_prediction"].to_numpy(float), patients[f"{name}_truth"].to_numpy(float), owner)
        for name in AGREEMENTS
    }
    classes = ef_confusion(patients["ef_camus_prediction"].to_numpy(float), patients["ef_camus_truth"].to_numpy(float))
    reasons = patients["reason_prediction"].replace("", np.nan).dropna()
    return {
        "agreement": found,
        "ef_classes": {"names": list(EF_CLASSES), "counts": np.asarray(classes).tolist(), "convention": "camus"},
        "reference": _against_reference(patients, owner),
        "incomplete": dict(zip(patients.loc[reasons.index, "patient"], reasons, strict=True)),
    }


def _against_reference(patients: pandas.DataFrame, owner: np.ndarray) -> dict[str, dict]:
    """EF from masks against the cfg's, for each convention that the cfg files name."""
    found = {}
    for convention in patients["ef_convention"].dropna().unique():
        chosen = (patients["ef_convention"] == convention).to_numpy()
        reference = patients["ef_reference"].to_numpy(float)[chosen]
        found[convention] = {
            kind: agree(patients[f"ef_{convention}_{kind}"].to_numpy(float)[chosen], reference, owner[chosen])
            for kind in ("prediction", "truth")
        }
    return found


def _means_by(images: pandas.DataFrame, key: str) -> dict[str, dict]:
    return {
        str(value): {"images": len(part)} | {name: _number(part[name].mean()) for name in (*SCORES, *DISTANCES)}
        for value, part in images.groupby(key)
    }


def _number(value: float) -> float | None:
    """JSON has no NaN: what has no value is null."""
    return float(value) if np.isfinite(value) else None


def table_text(summary: dict, names: Iterable[str] = ("dice", "iou", "accuracy", "dice4")) -> str:
    """The summary as text tables for a terminal."""
    lines = [f"{'score':<14}{'mean':>8}   95 % interval    pooled"]
    for name in [*names, *(score for score in SCORES if score.startswith("dice_"))]:
        lines += _score_line(name, summary["scores"][name], summary["pooled"][name], 4)
    lines.append(f"{'distance':<14}{'mean':>8}   95 % interval    median")
    for name in DISTANCES:
        lines += _score_line(name, summary["scores"][name], summary["scores"][name]["median"], 2)
    return "\n".join([*lines, *_agreement_lines(summary["clinical"])])


def _score_line(name: str, entry: dict, last: float | None, digits: int) -> list[str]:
    """One row of a table; none where there is no mean, and no interval where one patient gives none."""
    if entry["mean"] is None:
        return []
    ends = [entry[end] for end in ("low", "high")]
    interval = "" if None in ends else " - ".join(f"{value:.{digits}f}" for value in ends)
    shown = "" if last is None else f"{last:.{digits}f}"
    return [f"{name:<14}{entry['mean']:>8.{digits}f}   {interval:<15}  {shown:>6}"]


def _agreement_lines(clinical: dict) -> list[str]:
    rows = {
        f"{name}": found
        for name, found in clinical["agreement"].items()
        if name in ("ef_camus", "ef_ase", "edv_ml_camus", "esv_ml_camus")
    }
    for convention, kinds in clinical["reference"].items():
        rows |= {f"ef_{convention}, {kind} against cfg": found for kind, found in kinds.items()}
    lines = [f"{'against masks':<34}{'n':>4}{'r':>8}{'bias':>8}{'sd':>8}{'MAE':>8}"]
    for name, found in rows.items():
        if found["r"] is not None:
            lines.append(f"{name:<34}{found['n']:>4}" + "".join(f"{found[key]:>8.2f}" for key in ("r", "bias", "sd", "mae")))
    return lines if len(lines) > 1 else []


PAGE, SUMMARY, IMAGES, PATIENTS = "report.html", "summary.json", "images.parquet", "patients.parquet"
