"""Effect of test-time augmentation and mask cleaning on a model's scores, and how well its confidence ranks images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pandas import DataFrame
from scipy.stats import spearmanr

from heartseg.config.experiment import PredictConfig
from heartseg.errors import require
from heartseg.evaluation.ground_truth import Case, ShardTruth
from heartseg.evaluation.scoring import score_image, segment_cases
from heartseg.inference.segmenter import Ensemble, Segmenter, load_all
from heartseg.metrics.agreement import auc, bootstrap_interval
from heartseg.shards.reader import open_shards
from jobs.benchmarks.two_sides import print_table

OWN = "the network's own"
VARIANTS = {
    OWN: PredictConfig(),
    "largest component": PredictConfig(largest_component=True),
    "fill holes": PredictConfig(fill_holes=True),
    "components + holes": PredictConfig(largest_component=True, fill_holes=True),
    "TTA": PredictConfig(tta=True),
}
COLUMNS = ("dice", "dice_endo", "dice_myo", "dice_la")
# An image whose mean Dice is below one of these needs a check by eye.
POOR_DICE = (0.80, 0.85)


@dataclass(frozen=True)
class Options:
    checkpoint: str = ""
    """Folder of a run, or of a checkpoint; several, separated by commas, are measured alone and as an ensemble."""
    data: str = ""
    """Folder or URI of the shards (default: the run's own)."""
    group: Literal["train", "val", "test"] = "val"
    """Group of patients; choices are made on val, never on test."""


def run(options: Options) -> None:
    """Measure each member, every variant, and the confidence on the images and on degraded copies; print both tables."""
    require(bool(options.checkpoint), "--checkpoint is missing: give the folder of a run.")
    segmenter = load_all(options.checkpoint.split(","))
    shards = open_shards(options.data or segmenter.experiment.data)
    message = f"The shards have no group {options.group}: use one of {', '.join(shards.groups)}."
    require(options.group in shards.groups, message)
    cases, _ = ShardTruth(shards, options.group).cases(shards.groups[options.group])
    segment_cases(segmenter, cases[:4], PredictConfig())  # the first call warms up
    members = segmenter.members if isinstance(segmenter, Ensemble) else ()
    alone = {f"checkpoint {place} alone": measure(one, cases) for place, one in enumerate(members, 1)}
    variants = {name: measure(segmenter, cases, variant) for name, variant in VARIANTS.items()}
    before = np.mean([found["dice"] for found, _ in (alone or {OWN: variants[OWN]}).values()], axis=0)
    patients = len({case.patient for case in cases})
    title = f"postprocess: {len(cases)} images of {patients} patients ({options.group}), native grid, {segmenter.device}"
    heading = ("", *COLUMNS, "change of dice", "95 % interval", "implausible", "seconds")
    rows = [score_row(name, *found, before) for name, found in (alone | variants).items()]
    print_table(title, heading, rows, segmenter.device)
    sure = {name: variants[name][0] for name in (OWN, "TTA")}
    for name, copies in weakened(np.stack([case.image for case in cases])).items():
        worse = [replace(case, image=copy) for case, copy in zip(cases, copies, strict=True)]
        sure[f"{name} images"] = measure(segmenter, worse)[0]
    heading = ("", "Spearman", "95 % interval", "mean confidence", "dice", *(f"AUC for dice < {limit}" for limit in POOR_DICE))
    rows = [confidence_row(name, images) for name, images in sure.items()]
    print_table("postprocess: confidence", heading, rows, segmenter.device)


def measure(
    segmenter: Segmenter | Ensemble, cases: Sequence[Case], options: PredictConfig = VARIANTS[OWN]
) -> tuple[DataFrame, float]:
    """One row of `score_image` per image, and the seconds that predicting the masks took, without scoring."""
    started = time.perf_counter()
    found = segment_cases(segmenter, cases, options)
    seconds = time.perf_counter() - started
    return DataFrame([score_image(case, one) for case, one in zip(cases, found, strict=True)]), seconds


def score_row(name: str, images: DataFrame, seconds: float, before: np.ndarray) -> tuple[str | float, ...]:
    """A row of the table of scores, with its change from each image's Dice `before`."""
    change = (images["dice"] - before).to_numpy()
    interval = "{:+.4f} to {:+.4f}".format(*bootstrap_interval(change, images["patient"].to_numpy()))
    implausible = f"{(images['implausible'] != '').mean():.1%}"
    return (name, *images[list(COLUMNS)].mean(), f"{change.mean():+.4f}", interval, implausible, seconds)


def confidence_row(name: str, images: DataFrame) -> tuple[str | float, ...]:
    """A row on how well confidence ranks images by Dice; the interval resamples whole patients."""
    dice, sure, generator = images["dice"].to_numpy(), images["confidence"].to_numpy(), np.random.default_rng(0)
    rows = list(images.groupby("patient").indices.values())
    draws = [np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))]) for _ in range(300)]
    interval = np.quantile([spearmanr(sure[drawn], dice[drawn]).statistic for drawn in draws], [0.025, 0.975])
    aucs = [f"{auc(sure, dice >= limit):.2f} ({(dice < limit).sum()} images)" for limit in POOR_DICE]
    return (name, spearmanr(sure, dice).statistic, "{:.2f} to {:.2f}".format(*interval), sure.mean(), dice.mean(), *aucs)


def weakened(images: np.ndarray) -> dict[str, np.ndarray]:
    """Degraded copies of uint8 images [N,H,W]: a trained model fails on too few good ones to measure its confidence."""
    generator = np.random.default_rng(0)
    depth, lateral = np.meshgrid(*map(np.linspace, (0, -0.75), (1, 0.75), images.shape[1:]), indexing="ij")
    centre, spread = generator.random((2, len(images), 1, 1))
    from_shadow = (np.arctan2(lateral, depth + 0.02) - (centre - 0.5)) / (0.08 + 0.2 * spread)
    worse = {
        "dark": images * 0.3,
        "hazy": images * 0.5 + 0.35 * 255,
        "noisy": images * (1 + 0.5 * generator.standard_normal(images.shape)),
        "shadowed": images * (1 - 0.95 * np.exp(-(from_shadow**2))),
    }
    return {name: values.clip(0, 255).round().astype(np.uint8) for name, values in worse.items()}
