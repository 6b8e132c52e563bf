"""Scores on the native grid, clinical indices, and their summary: one row per image and one per patient."""

import io
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas
import pyarrow as pa
import torch

from heartseg.config.experiment import PredictConfig, none_if_nan
from heartseg.evaluation.ground_truth import Case, ShardTruth, TreeTruth
from heartseg.inference.segmenter import REVIEW_THRESHOLD, Ensemble, Segmented, Segmenter, segment_images
from heartseg.labels import EF_CLASSES, LOW_CAVITY_DICE, MAX_EF_ERROR
from heartseg.metrics.agreement import agree, auc, ef_confusion, mean_interval
from heartseg.metrics.anatomy_checks import implausibilities
from heartseg.metrics.cardiac_indices import INDICES, patient_indices
from heartseg.metrics.ef_intervals import COVERAGE, EFS, calibrate, views_difference
from heartseg.metrics.segmentation import DISTANCES, SCORES, confusion, image_scores, surface_distances
from heartseg.shards.writer import resize_image
from heartseg.storage import filesystem

PAGE, SUMMARY, IMAGES, PATIENTS = "report.html", "summary.json", "images.parquet", "patients.parquet"
KEYS = ("patient", "view", "phase", "frame", "number", "quality")
BY = ("phase", "view", "quality", "size")
EXAMPLES, NUM_EXAMPLES, KINDS = "examples.npz", 10, ("image", "truth", "prediction")
LOW_DICE = 0.80
# Indices whose agreement with the experts' masks is reported, in the order of the tables.
AGREEMENTS = tuple(name for name in INDICES if "_area_" not in name or name.endswith("area_length"))


def segment_cases(segmenter: Segmenter | Ensemble, cases: Sequence[Case], options: PredictConfig) -> list[Segmented]:
    """Predict a mask on the native grid from each case's image."""
    return segment_images(segmenter, [case.image for case in cases], options, [case.truth.shape for case in cases])


def score_image(case: Case, predicted: Segmented) -> dict:
    """One image's row: KEYS except `number`, SCORES, DISTANCES, confidence, implausibilities, confusion, compressed mask."""
    prediction = predicted.mask
    counts = confusion(torch.tensor(prediction)[None], torch.tensor(case.truth)[None])  # arrays from Ray are read-only
    row = {"patient": case.patient, "view": case.view and str(case.view), "phase": case.phase and str(case.phase)}
    row |= {"frame": case.frame, "quality": getattr(case.info, "quality", None)}
    row |= {name: value.item() for name, value in image_scores(counts).items()}
    row |= surface_distances(prediction, case.truth, case.spacing_mm)
    row |= {"confidence": predicted.confidence, "implausible": "; ".join(implausibilities(prediction, case.spacing_mm))}
    return row | {"confusion": counts.flatten().tolist(), "mask": zlib.compress(prediction.tobytes(), level=1)}


def patient_row(patient: str, cases: Sequence[Case], predictions: Sequence[Segmented | None]) -> dict:
    """One patient's row: indices of predicted and experts' masks, each kind with its `reason_…`, and the cfg file's EF."""
    # A volume needs a known view and phase; if two images share both, neither is used.
    seen = Counter((c.view, c.phase) for c in cases)
    pairs = [(c, p) for c, p in zip(cases, predictions, strict=True) if c.view and c.phase and seen[c.view, c.phase] == 1]
    predicted = {(c.view, c.phase): (found.mask, c.spacing_mm) for c, found in pairs if found is not None}
    true = {(c.view, c.phase): (c.truth, c.spacing_mm) for c, _ in pairs}
    info = next((c.info for c in cases if c.info and c.info.ef is not None), None)
    row: dict = {"patient": patient, "images": sum(mask is not None for mask in predictions)}
    row |= {"ef_reference": info.ef if info else None, "ef_convention": info.ef_convention if info else None}
    for kind, masks in (("prediction", predicted), ("truth", true)):
        row |= {f"{name}_{kind}": value for name, value in patient_indices(masks).items()}
    return row


def score_patients(cases: Sequence[Case], predictions: Sequence[Segmented | None]) -> tuple[list[dict], list[dict]]:
    """Rows of images and rows of patients; a case whose prediction is None has no image row."""
    images, patients = [], []
    for patient in dict.fromkeys(case.patient for case in cases):
        mine = [pair for pair in zip(cases, predictions, strict=True) if pair[0].patient == patient]
        # `number` identifies the case among its patient's, since view and phase may be unknown.
        images += [score_image(case, found) | {"number": i} for i, (case, found) in enumerate(mine) if found is not None]
        patients.append(patient_row(patient, [case for case, _ in mine], [found for _, found in mine]))
    return images, patients


@dataclass(frozen=True, eq=False)
class Example:
    """An image with its two masks, all uint8 [H,W] on the native grid with (depth, lateral) `spacing_mm`."""

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    spacing_mm: tuple[float, float]


def write_examples(out: str, images: pandas.DataFrame, truth: ShardTruth | TreeTruth) -> None:
    """Write the examples of `extreme_rows`, which the report shows."""
    examples = {}
    for row in extreme_rows(images):
        case = truth.cases([images.loc[row, "patient"]])[0][images.loc[row, "number"]]
        picture = truth.picture(case)
        picture = np.zeros(case.truth.shape, np.uint8) if picture is None else picture  # outlines on black
        prediction = np.frombuffer(zlib.decompress(images.loc[row, "mask"]), np.uint8).reshape(case.truth.shape)
        examples[row] = Example(resize_image(picture, *case.truth.shape), case.truth, prediction, case.spacing_mm)
    publish_examples(out, examples)


def extreme_rows(images: pandas.DataFrame) -> list[int]:
    """Indices of the images with the lowest and highest Dice, at most NUM_EXAMPLES of each, in ascending order of Dice."""
    ordered = images[images["dice"].notna()].sort_values(["dice", "patient", "number"]).index
    return list(dict.fromkeys([*ordered[:NUM_EXAMPLES], *ordered[-NUM_EXAMPLES:]]))


def publish_examples(out: str, examples: Mapping[int, Example]) -> None:
    """Write `examples.npz`: `image_I`, `truth_I`, `prediction_I`, `spacing_mm` [N,2], and `rows` [N] of the images' table."""
    arrays = {f"{kind}_{place}": getattr(example, kind) for place, example in enumerate(examples.values()) for kind in KINDS}
    spacings_mm = np.array([example.spacing_mm for example in examples.values()]).reshape(-1, 2)
    rows = np.array(list(examples), dtype=np.int64)
    np.savez_compressed(buffer := io.BytesIO(), **arrays, spacing_mm=spacings_mm, rows=rows)
    filesystem.publish(filesystem.join(out, EXAMPLES), buffer.getvalue())


def read_examples(evaluation: str) -> dict[int, Example]:
    """The examples that an evaluation kept, by row of the images' table, lowest Dice first; empty if it kept none."""
    path = filesystem.join(evaluation, EXAMPLES)
    if not filesystem.exists(path):
        return {}
    with np.load(io.BytesIO(filesystem.read_bytes(path)), allow_pickle=False) as arrays:
        return {
            int(row): Example(*(arrays[f"{kind}_{place}"] for kind in KINDS), tuple(arrays["spacing_mm"][place]))
            for place, row in enumerate(arrays["rows"])
        }


def summarise(images: pandas.DataFrame, patients: pandas.DataFrame, missing: Sequence[dict] = ()) -> dict:
    """The summary: means over images with 95 % bootstrap intervals over patients, pooled scores, breakdowns, agreement."""
    images, scores = images.assign(size=size_thirds(images)), {}
    for name in (*SCORES, *DISTANCES):
        median = none_if_nan(images[name].astype(float).median())
        scores[name] = mean_interval(images[name], images["patient"].to_numpy()) | {"median": median}
    pooled = torch.tensor(np.stack(images["confusion"].to_list()).sum(axis=0)).view(1, 4, 4)
    return {
        "images": len(images),
        "patients": int(images["patient"].nunique()),
        "grid": "native",
        "scores": scores,
        "pooled": {name: none_if_nan(value.item()) for name, value in image_scores(pooled).items()},
        "by": {key: _means_by(images, key) for key in BY if images[key].notna().any()},
        "clinical": clinical_agreement(patients),
        "outliers": outliers(images, patients),
        "flags": flags(images),
        "missing": list(missing),
    }


def size_thirds(images: pandas.DataFrame) -> list[str | None]:
    """Each image's tercile by the share of it that the expert's heart fills; None if images or distinct sizes are too few."""
    counts = np.stack(images["confusion"].to_list()).reshape(-1, 4, 4).sum(axis=2)  # rows are the truth's classes
    shares = counts[:, 1:].sum(axis=1) / counts.sum(axis=1)
    low, high = np.quantile(shares, [1 / 3, 2 / 3])
    if len(shares) < 9 or not shares.min() < low < high <= shares.max():
        return [None] * len(shares)
    names = (f"1: up to {low:.0%} of the image", f"2: {low:.0%} to {high:.0%}", f"3: over {high:.0%}")
    return [names[int(share > low) + int(share > high)] for share in shares]


def write_results(out: str, images: pandas.DataFrame, patients: pandas.DataFrame, summary: dict) -> None:
    """Write `images.parquet` and `patients.parquet`, both also as CSV, and finally `summary.json`."""
    for name, rows in ((IMAGES, images), (PATIENTS, patients)):
        filesystem.publish(filesystem.join(out, name.replace(".parquet", ".csv")), rows.to_csv(index=False).encode())
        filesystem.write_table(filesystem.join(out, name), pa.Table.from_pandas(rows, preserve_index=False))
    filesystem.publish_json(filesystem.join(out, SUMMARY), summary)


def read_rows(evaluation: str, name: str) -> pandas.DataFrame | None:
    """The table IMAGES or PATIENTS of an evaluation; None if it has none."""
    path = filesystem.join(evaluation, name)
    return filesystem.read_table(filesystem.read_bytes(path)).to_pandas(use_threads=False) if filesystem.exists(path) else None


def flags(images: pandas.DataFrame) -> dict:
    """The warnings that a user would see: implausible masks, and how well confidence separates images of low Dice.

    `spearman` is the rank correlation of confidence and Dice; `auc` is the chance that, of an image under LOW_DICE and one
    above, the former has the lower confidence; `unsure` counts images under REVIEW_THRESHOLD, which users should review.
    """
    doubted = images["implausible"] != ""
    reasons = images.loc[doubted, "implausible"].str.split("; ").explode().value_counts().head(3)
    known = images[["confidence", "dice"]].dropna()
    low, unsure = known["dice"] < LOW_DICE, known["confidence"] < REVIEW_THRESHOLD
    spearman = known["confidence"].rank().corr(known["dice"].rank()) if len(known) > 2 else np.nan
    order = {"spearman": none_if_nan(spearman), "auc": none_if_nan(auc(known["confidence"].to_numpy(), ~low.to_numpy()))}
    return {
        "implausible": int(doubted.sum()),
        "reasons": {str(reason): int(count) for reason, count in reasons.items()},
        "dice_implausible": none_if_nan(images.loc[doubted, "dice"].mean()),
        "dice_others": none_if_nan(images.loc[~doubted, "dice"].mean()),
        "confidence": order | {"low_dice": LOW_DICE, "low_images": int(low.sum())},
        "unsure": {"below": REVIEW_THRESHOLD, "images": int(unsure.sum()), "low_images": int((unsure & low).sum())},
    }


def outliers(images: pandas.DataFrame, patients: pandas.DataFrame) -> dict[str, dict]:
    """Shares, with intervals over patients, of cavities with a Dice under LOW_CAVITY_DICE and EFs off by over MAX_EF_ERROR."""
    shares = {"cavity": (images["dice_endo"] < LOW_CAVITY_DICE, images["dice_endo"], images["patient"])}
    for name in ("ef_camus", "ef_ase"):
        error = (patients[f"{name}_prediction"] - patients[f"{name}_truth"]).abs()
        shares[name] = (error > MAX_EF_ERROR, error, patients["patient"])
    return {name: mean_interval(bad.where(known.notna()), owner.to_numpy()) for name, (bad, known, owner) in shares.items()}


def clinical_agreement(patients: pandas.DataFrame) -> dict:
    """Agreement of predicted indices with those of the experts' masks, and of both with the cfg's EF in its convention."""
    owner = patients["patient"].to_numpy()
    known = [name for name in AGREEMENTS if f"{name}_truth" in patients]  # an older evaluation lacks newer indices
    found = {name: agree(patients[f"{name}_prediction"], patients[f"{name}_truth"], owner) for name in known}
    classes = ef_confusion(patients["ef_camus_prediction"], patients["ef_camus_truth"])
    reasons = patients["reason_prediction"].replace("", np.nan).dropna()
    return {
        "agreement": found,
        "ef_intervals": {"coverage": COVERAGE} | {name: _calibrate(patients, name) for name in EFS},
        "ef_classes": {"names": list(EF_CLASSES), "counts": classes.tolist(), "convention": "camus"},
        "reference": {name: _against_reference(mine, name) for name, mine in patients.groupby("ef_convention", sort=False)},
        "incomplete": dict(zip(patients.loc[reasons.index, "patient"], reasons, strict=True)),
    }


def _calibrate(patients: pandas.DataFrame, name: str) -> dict[str, float] | None:
    apart = views_difference(patients, "_prediction").abs()
    return calibrate(patients[f"{name}_prediction"], patients[f"{name}_truth"], apart)


def _against_reference(patients: pandas.DataFrame, convention: str) -> dict[str, dict]:
    found = {kind: patients[f"ef_{convention}_{kind}"] for kind in ("prediction", "truth")}
    return {kind: agree(ef, patients["ef_reference"], patients["patient"]) for kind, ef in found.items()}


def _means_by(images: pandas.DataFrame, key: str) -> dict[str, dict]:
    return {
        str(value): {"images": len(part)} | {name: none_if_nan(part[name].mean()) for name in (*SCORES, *DISTANCES)}
        for value, part in images.groupby(key)
    }
