"""What test-time augmentation, largest pieces and closed holes do to a trained model's scores, and what its confidence tells.

`python jobs/benchmark.py postprocess --checkpoint RUN --data SHARDS`
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from scipy.stats import spearmanr

from heartseg.config.experiment import PredictConfig
from heartseg.errors import UserError
from heartseg.inference.segmenter import Ensemble, Segmenter, load_all, segment
from heartseg.metrics.agreement import auc, bootstrap_interval
from heartseg.metrics.anatomy_checks import implausibilities
from heartseg.metrics.segmentation import confusion, image_scores
from heartseg.shards.reader import FrameRows, load_groups, open_shards
from jobs.support import command_line

OWN = "the network's own"
VARIANTS = {
    OWN: PredictConfig(),
    "largest component": PredictConfig(largest_component=True),
    "fill holes": PredictConfig(fill_holes=True),
    "components + holes": PredictConfig(largest_component=True, fill_holes=True),
    "TTA": PredictConfig(tta=True),
    "TTA + both": PredictConfig(tta=True, largest_component=True, fill_holes=True),
}
COLUMNS = ("dice", "dice_endo", "dice_myo", "dice_la")
# Below these, a mean Dice is a segmentation to look at again.
POOR_DICE = (0.80, 0.85)


@dataclass(frozen=True)
class Options:
    """What to measure on."""

    checkpoint: str = ""
    """Folder of a run, or of one of its checkpoints; several, with commas between, are asked each alone and as an ensemble,
    whose change is then from the mean of those alone."""
    data: str = ""
    """Folder or URI of the shards; the run's own where not given."""
    group: Literal["train", "val", "test"] = "val"
    """Group of patients; choices are made on val, never on test."""


def measure(segmenter: Segmenter | Ensemble, frames: FrameRows, options: PredictConfig) -> dict[str, np.ndarray]:
    """Per image on the native grid: COLUMNS, `quality` and `implausible`; and the `seconds` of all, without scoring."""
    shapes = [tuple(shape) for shape in frames.table["native_shape"].to_pylist()]
    spacings_mm = frames.table["native_spacing_mm"].to_pylist()
    size, found, started = segmenter.experiment.train.eval_batch_size, [], time.perf_counter()
    for start in range(0, len(frames), size):
        chosen = slice(start, start + size)
        found += segment(segmenter, frames.images[chosen], shapes[chosen], options)
    seconds = time.perf_counter() - started
    rows = []
    for index, one in enumerate(found):
        truth = torch.from_numpy(frames.native_mask(index).copy())
        scores = image_scores(confusion(torch.from_numpy(one.mask)[None], truth[None]))
        reasons = implausibilities(one.mask, spacings_mm[index])
        rows.append([*(scores[name].item() for name in COLUMNS), one.quality, bool(reasons)])
    columns = dict(zip((*COLUMNS, "quality", "implausible"), np.array(rows, dtype=float).T, strict=True))
    return columns | {"seconds": np.array(seconds)}


def weakened(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Worse copies of uint8 images [N,1,H,W]: a trained model fails on too few good ones to measure its confidence by."""
    generator = torch.Generator().manual_seed(0)
    unit = images.float().div(255)
    height, width = images.shape[-2:]
    depth, lateral = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(-0.75, 0.75, width), indexing="ij")
    centre, spread = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    from_shadow = (torch.atan2(lateral, depth + 0.02) - (centre - 0.5)) / (0.08 + 0.2 * spread)
    worse = {
        "dark": unit * 0.3,
        "hazy": unit * 0.5 + 0.35,
        "noisy": unit * (1 + 0.5 * torch.randn(unit.shape, generator=generator)),
        "shadowed": unit * (1 - 0.95 * torch.exp(-from_shadow.square())),
    }
    return {name: (values.clamp(0, 1) * 255).round().to(torch.uint8) for name, values in worse.items()}


def spearman_interval(one: np.ndarray, other: np.ndarray, patients: np.ndarray, draws: int = 300) -> tuple[float, float]:
    """95 % interval of a rank correlation, resampling whole patients."""
    rng, rows = np.random.default_rng(0), [np.flatnonzero(patients == name) for name in np.unique(patients)]
    drawn = (np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(draws))
    low, high = np.quantile([spearmanr(one[pick], other[pick]).statistic for pick in drawn], [0.025, 0.975])
    return float(low), float(high)


def line_of(name: str, found: dict[str, np.ndarray], before: np.ndarray, patients: np.ndarray) -> str:
    """A row of the table, its change from the Dice `before` per image."""
    change = found["dice"] - before
    low, high = bootstrap_interval(change, patients)
    scores = "".join(f"{np.nanmean(found[column]):>7.4f}" for column in COLUMNS)
    told = f"{change.mean():+.4f} ({low:+.4f} to {high:+.4f})"
    return f"{name:<20}{scores}  {told:<32}{found['implausible'].mean():>11.1%}{found['seconds']:>9.1f}"


def quality_lines(name: str, found: dict[str, np.ndarray], patients: np.ndarray) -> list[str]:
    """How well an image's confidence tells its Dice."""
    dice, sure = found["dice"], found["quality"]
    low, high = spearman_interval(sure, dice, patients)
    lines = [
        f"{name}: Spearman with true Dice {spearmanr(sure, dice).statistic:.2f} ({low:.2f} to {high:.2f}), "
        f"mean {sure.mean():.3f} for a Dice of {dice.mean():.3f}"
    ]
    for limit in POOR_DICE:
        lines.append(f"  AUC for Dice < {limit:.2f}: {auc(sure, dice >= limit):.2f}, of {(dice < limit).sum()} such images")
    return lines


def job(argv: Sequence[str]) -> None:
    """The command line."""
    shown = "python jobs/benchmark.py postprocess"
    options = command_line.parse_line(Options, argv, shown, "Measure what is done to a prediction beyond the network's labels.")
    command_line.require_flag(options.checkpoint, "--checkpoint", "the folder of a run")
    paths = [command_line.absolute(path, "checkpoint") for path in options.checkpoint.split(",")]
    segmenter = load_all(paths)
    shards = open_shards(command_line.absolute(options.data or segmenter.experiment.data, "data"))
    if options.group not in shards.groups:
        raise UserError(f"The shards have no group {options.group}: take one of {', '.join(shards.groups)}.")
    if shards.image != segmenter.experiment.image:
        raise UserError(f"{shards.path} has another grid than the checkpoint: give the shards that it was trained on.")
    frames = load_groups(shards, [options.group])[options.group]
    patients = np.array(frames.table["patient"].to_pylist())
    segment(segmenter, frames.images[:4], [(64, 64)] * 4)  # the first call warms up
    print(f"{len(frames)} images of {len(set(patients))} patients ({options.group}), native grid, on {segmenter.device}")
    print(f"{'':<20}{'dice':>7}{'endo':>7}{'myo':>7}{'la':>7}  change of dice, 95 % interval    implausible  seconds")
    members = segmenter.members if len(paths) > 1 else ()
    results, alone = {}, [measure(member, frames, PredictConfig()) for member in members]
    before = np.mean([found["dice"] for found in alone], axis=0) if alone else None
    for place, found in enumerate(alone, 1):
        print(line_of(f"checkpoint {place} alone", found, before, patients), flush=True)
    for name, variant in VARIANTS.items():
        found = results[name] = measure(segmenter, frames, variant)
        before = found["dice"] if before is None else before  # the first variant is the network's own
        print(line_of("ensemble" if alone and name == OWN else name, found, before, patients), flush=True)
    for name in (OWN, "TTA"):
        print("\n".join(quality_lines(f"confidence, {name}", results[name], patients)))
    for name, images in weakened(frames.images).items():
        found = measure(segmenter, replace(frames, images=images), PredictConfig())
        print("\n".join(quality_lines(f"confidence, {name} images", found, patients)))
