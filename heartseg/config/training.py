"""What decides how a model is trained, as typed, frozen values; the text under a field is its `--help`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from heartseg.errors import require

LossKind = Literal["cross_entropy", "dice_cross_entropy"]
ScheduleKind = Literal[
    "constant", "step", "multistep", "exponential", "polynomial", "cosine", "restarts", "one_cycle", "plateau"
]


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    kind: LossKind
    """`dice_cross_entropy` adds one minus the mean soft Dice of the three structures."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss, if there is such a head."""

    def __post_init__(self):
        require(0 <= self.aux_weight < math.inf, "loss.aux_weight must be at least 0, and finite.")


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
        require(0 < self.lr < 1e6, "optim.lr must be above 0, and under a million.")
        require(0 <= self.momentum < 1, "optim.momentum must be at least 0 and below 1.")
        is_finite = 0 <= self.weight_decay < math.inf and 0 <= self.clip_norm < math.inf
        require(is_finite, "optim.weight_decay and optim.clip_norm must be at least 0, and finite.")
        require(0 <= self.ema_decay < 1, "optim.ema_decay must be at least 0 and below 1.")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as a multiplier of the base rate."""

    kind: ScheduleKind
    """Shape after the warm-up; docs/explanation/sweeps.md draws them."""
    warmup_epochs: float = 0.0
    """Epochs of linear rise at the start."""
    power: float = 0.9
    """Exponent of `polynomial`."""
    factor: float = 0.1
    """What each drop of `step`, `multistep` and `plateau` multiplies by."""
    step_share: float = 0.3
    """Share of the run between two drops of `step`."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the run after which `multistep` drops."""
    final: float = 0.01
    """Where `exponential` ends."""
    cycles: int = 3
    """Falls of `restarts`, a cosine that starts again."""
    cycle_growth: float = 1.0
    """How many times longer each cycle of `restarts` is than the one before."""
    rise: float = 0.3
    """Share of the run in which `one_cycle` rises."""
    patience: int = 5
    """Epochs without a gain of the validation Dice after which `plateau` drops at the next."""

    def __post_init__(self):
        is_finite = 0 <= self.warmup_epochs < math.inf and 0 < self.power < math.inf
        require(is_finite, "schedule.warmup_epochs must be at least 0, schedule.power above, and both finite.")
        are_shares = all(0 < x < 1 for x in (self.factor, self.step_share, self.final, self.rise, *self.milestones))
        require(are_shares, "schedule.factor, .step_share, .final, .rise and .milestones must lie between 0 and 1.")
        repeats = self.cycles >= 1 and 0 < self.cycle_growth < math.inf
        require(repeats, "schedule.cycles must be at least 1, schedule.cycle_growth above 0, and finite.")
        require(self.patience >= 0, "schedule.patience must be at least 0.")


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
    contrast: float = 0.0
    """Largest change of the greys' distance from their mean: 0.3 draws from 1/1.3 to 1.3."""

    def __post_init__(self):
        are_finite = all(0 <= value < 360 for value in dataclasses.astuple(self))
        require(are_finite, "Every augment setting must be at least 0, and below 360.")
        require(self.scale < 1, "augment.scale must be below 1.")
        require(self.blur <= 10, "augment.blur must be at most 10 pixels.")
        require(self.sector_dropout <= 1, "augment.sector_dropout must be at most 1, the whole sector.")


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
    holdout: float = 0.0
    """Share of the training patients that this run validates on instead; the other groups are then not used."""
    seed: int = 0
    """Seed of weights, order, dropout and augmentation."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast if the GPU has it, and on CPUs if it was measured to be faster; GPUs compute fp32 in TF32."""
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    """torch.compile for training steps; `reduce-overhead` replays CUDA graphs, for batches too small to fill a GPU."""
    compress_gradients: bool = False
    """Workers exchange gradients in bf16: half the bytes, for slow networks."""
    deterministic: bool = False
    """Two runs on one machine give the same bits: tested on CPUs. On GPUs, where it is slower, PyTorch refuses what has
    no deterministic kernel; this has not been tried."""

    def __post_init__(self):
        require(self.epochs >= 1, "train.epochs must be at least 1.")
        require(self.batch_size >= 2, "train.batch_size must be at least 2: DeepLab cannot normalise one image.")
        require(0 <= self.seed < 2**63, "train.seed must be from 0 to 2^63 - 1.")
        require(self.eval_batch_size >= 1, "train.eval_batch_size must be at least 1.")
        require(0 <= self.holdout < 1, "train.holdout must be at least 0 and below 1.")
        leaves_two = 1 <= self.accumulate <= self.batch_size // 2
        require(leaves_two, "train.accumulate must be at least 1 and leave 2 images of train.batch_size in each part.")
        # A replayed graph writes its gradients where the last ones lie, which accumulation still needs.
        keeps_gradients = self.accumulate == 1 or self.compile != "reduce-overhead"
        require(keeps_gradients, "train.accumulate needs train.compile off or default: reduce-overhead keeps one part's only.")
