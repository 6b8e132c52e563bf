"""The experiment as typed, frozen values; strict to and from JSON.

Every default is stated once: here where it is the neutral choice, in recipes.py where it makes a recipe. The text under
a field is its `--help`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

from heartseg.errors import UserError
from heartseg.strict import structure


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


@dataclass(frozen=True)
class ImageConfig:
    """The grid that shards store images on."""

    height: int
    """Rows (depth) of a stored image, in pixels."""
    width: int
    """Columns (lateral) of a stored image, in pixels."""

    def __post_init__(self):
        _require(min(self.height, self.width) >= 32, "image.height and image.width must be at least 32 pixels.")
        _require(max(self.height, self.width) <= 2048, "image.height and image.width must be at most 2048 pixels.")


@dataclass(frozen=True)
class SplitConfig:
    """How patients are divided; always whole patients."""

    kind: Literal["official", "ratio", "kfold"]
    """`official`: the source's own groups. `ratio`: a seeded draw by patient. `kfold`: one of `folds` test groups in turn."""
    test_share: float = 0.2
    """Share of the patients in the test group (ratio only)."""
    val_share: float = 0.0
    """Share in a validation group: of all patients (ratio), of those outside the test group (kfold)."""
    seed: int = 0
    """Seed of the draw (ratio and kfold)."""
    folds: int = 5
    """Number of test groups, which share no patient and hold everybody between them (kfold only)."""
    fold: int = 0
    """Which of them is the test group, from 0 (kfold only)."""
    stratify: bool = True
    """Give every group its share of each class of ejection fraction and image quality, where they are known."""

    def __post_init__(self):
        shares_fit = min(self.test_share, self.val_share) >= 0 and 0 < self.test_share + self.val_share < 1
        _require(shares_fit, "split.test_share and split.val_share must be shares whose sum lies between 0 and 1.")
        _require(self.folds >= 2, "split.folds must be at least 2.")
        _require(0 <= self.fold < self.folds, f"split.fold must be from 0 to {self.folds - 1}, one less than split.folds.")


@dataclass(frozen=True)
class ModelConfig:
    """DeepLabv3 with one input channel and four outputs."""

    backbone: Literal["resnet101", "resnet50", "mobilenet_v3_large"]
    """torchvision's backbone."""
    pretrained: bool = False
    """Start from ImageNet weights, which torchvision downloads."""
    aux_head: bool = False
    """Train a second head on an earlier layer."""
    norm: Literal["batch", "group"] = "batch"
    """`group` has no batch statistics: for very small shares of a batch per worker."""
    sync_bn: Literal["auto", "on", "off"] = "auto"
    """Batch statistics over all workers' images (GPUs only): `auto` wherever several workers have GPUs."""
    bn_momentum: float = 0.1
    """Momentum of the running statistics of batch normalisation."""
    dropout: float = 0.5
    """Dropout before the head's last convolution."""

    def __post_init__(self):
        _require(0 <= self.dropout < 1, "model.dropout must be at least 0 and below 1.")
        _require(0 < self.bn_momentum <= 1, "model.bn_momentum must lie between 0 and 1.")


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    kind: Literal["cross_entropy", "dice_cross_entropy"]
    """`dice_cross_entropy` adds one minus the mean soft Dice of the three structures."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss, where there is such a head."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, clipping and weight averaging."""

    kind: Literal["sgd", "adamw"]
    """Optimizer."""
    lr: float
    """Base learning rate; the schedule multiplies it."""
    momentum: float = 0.9
    """Momentum of SGD, first beta of AdamW."""
    weight_decay: float = 0.0
    """Decoupled for AdamW, L2 for SGD."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay of the exponential average of the weights, which is then what is evaluated; 0 keeps none."""

    def __post_init__(self):
        _require(0 < self.lr < 1e6, "optim.lr must be above 0, and finite.")
        _require(0 <= self.momentum < 1, "optim.momentum must be at least 0 and below 1.")
        _require(min(self.weight_decay, self.clip_norm) >= 0, "optim.weight_decay and optim.clip_norm must be at least 0.")
        _require(0 <= self.ema_decay < 1, "optim.ema_decay must be at least 0 and below 1.")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as a multiplier of the base rate."""

    kind: Literal["constant", "polynomial", "cosine"]
    """Shape after the warm-up."""
    warmup_epochs: float = 0.0
    """Epochs of linear rise at the start."""
    power: float = 0.9
    """Exponent of `polynomial`."""

    def __post_init__(self):
        _require(self.warmup_epochs >= 0 and self.power > 0, "schedule.warmup_epochs must be at least 0, schedule.power above.")


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images, each sample with its own draw; 0 switches a kind off. No flips: hearts have sides."""

    rotate_deg: float = 0.0
    """Largest rotation to either side, in degrees."""
    scale: float = 0.0
    """Largest relative change of size: 0.1 draws from 0.9 to 1.1."""
    translate: float = 0.0
    """Largest shift, as a share of the image's side."""
    gain: float = 0.0
    """Largest relative change of brightness."""
    gamma: float = 0.0
    """Largest change of the exponent: 0.3 draws from 1/1.3 to 1.3."""
    noise: float = 0.0
    """Largest standard deviation of multiplicative speckle."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels of the stored image."""
    sector_dropout: float = 0.0
    """Largest width of a wedge that is darkened as by a rib's shadow, as a share of the sector's opening."""

    def __post_init__(self):
        values = dataclasses.astuple(self)
        _require(all(0 <= value < 360 for value in values), "Every augment setting must be at least 0, and finite.")
        _require(self.scale < 1, "augment.scale must be below 1.")
        _require(self.blur <= 10, "augment.blur must be at most 10 pixels.")
        _require(self.sector_dropout <= 1, "augment.sector_dropout must be at most 1, the whole sector.")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batches and arithmetic of a run."""

    epochs: int
    """Passes over the training group."""
    batch_size: int
    """Images in a training batch, over all workers together."""
    accumulate: int = 1
    """Parts in which a worker computes its share of a batch, one after the other: less memory, the same update."""
    eval_batch_size: int = 4
    """Images in a batch of an evaluation; scores do not depend on it."""
    intensity: Literal["unit", "standard"] = "unit"
    """`unit`: images / 255. `standard`: also minus the training group's mean, over its standard deviation."""
    seed: int = 0
    """Seed of weights, order, dropout and augmentation."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes bf16 autocast where the hardware has it; GPUs compute fp32 in TF32."""
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    """torch.compile for training steps; `reduce-overhead` replays CUDA graphs, for batches too small to fill a GPU."""
    compress_gradients: bool = False
    """Workers exchange gradients in bf16: half the bytes, for slow networks."""
    deterministic: bool = False
    """Two runs on one machine give the same bits; slower on GPUs."""

    def __post_init__(self):
        _require(self.epochs >= 1, "train.epochs must be at least 1.")
        _require(self.batch_size >= 2, "train.batch_size must be at least 2: DeepLab cannot normalise one image.")
        _require(self.eval_batch_size >= 1, "train.eval_batch_size must be at least 1.")
        _require(
            1 <= self.accumulate <= self.batch_size // 2,
            "train.accumulate must be at least 1 and leave 2 images of train.batch_size in each part.",
        )
        # A replayed graph writes its gradients where the last ones lie, which accumulation still needs.
        _require(
            self.accumulate == 1 or self.compile != "reduce-overhead",
            "train.accumulate needs train.compile off or default: reduce-overhead keeps one part's gradients only.",
        )


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """`auto`: online where WANDB_API_KEY is set, offline else."""
    project: str = "heartseg"
    """Project of the dashboard."""
    group: str = ""
    """Group of the dashboard, for runs that belong together."""
    images: Literal["auto", "on", "off"] = "auto"
    """Send overlays: `auto` for CAMUS and the phantom only, since other people's patients stay here unless asked."""


@dataclass(frozen=True)
class PredictConfig:
    """What is done to a prediction beyond the network's own labels; off unless asked for, so that scores are the network's."""

    tta: bool = False
    """Average over five slightly shifted copies of the image, at five times the cost."""
    largest_component: bool = False
    """Keep the largest connected piece of cavity, wall and atrium."""
    fill_holes: bool = False
    """Close holes inside and between cavity, wall and atrium."""


@dataclass(frozen=True)
class Experiment:
    """Everything that makes a run: a recipe with its changes."""

    name: str
    """Name of the recipe; a run is called after it."""
    image: ImageConfig
    split: SplitConfig
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    train: TrainConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    source: str = ""
    """Folder or URI of the CAMUS tree, or of a plain images/ and masks/ (HEARTSEG_SOURCE where not given)."""
    data: str = ""
    """Folder or URI of the shards (HEARTSEG_DATA where not given)."""
    out: str = ""
    """Where preprocess and pipeline write."""
    runs: str = ""
    """Folder or URI of the training runs (HEARTSEG_RUNS where not given, else `runs`)."""
    workers: int = 1
    """Processes: parallel tasks in preprocess, DistributedDataParallel ranks in training. `1:4` sets --min-workers as well."""
    min_workers: int = 0
    """Fewest workers to train on with when nodes are lost, until new ones come; 0 wants all of them."""

    def __post_init__(self):
        _require(self.workers >= 1, "--workers must be at least 1.")
        _require(0 <= self.min_workers <= self.workers, "--min-workers must be at least 0 and no more than --workers.")


# What decides a run's result; the rest is where it runs and who is told.
IDENTITY = ("image", "model", "loss", "optim", "schedule", "augment", "train")


def to_json(value: object) -> dict:
    """A dataclass as plain JSON values."""
    return dataclasses.asdict(value)


def identity(experiment: Experiment) -> dict:
    """The part of an experiment that decides its result, as plain JSON values."""
    return {part: to_json(getattr(experiment, part)) for part in IDENTITY}


def canonical(value: object) -> bytes:
    """JSON whose bytes depend on the value alone, for hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def from_json(value: dict, kind: type = Experiment, origin: str = "the configuration"):
    """Build a dataclass from JSON values; raises UserError that names an unknown or missing key or a wrong value."""
    return structure(value, kind, origin)


def first_difference(old: dict, new: dict, prefix: str = "") -> str | None:
    """The first field in which two configurations differ, as `train.epochs: 10 there, 20 asked`; None if there is none."""
    for key in sorted(old.keys() | new.keys()):
        there, asked = old.get(key), new.get(key)
        if isinstance(there, dict) and isinstance(asked, dict):
            inner = first_difference(there, asked, f"{prefix}{key}.")
            if inner:
                return inner
        elif there != asked:
            return f"{prefix}{key}: {there} there, {asked} asked"
    return None
