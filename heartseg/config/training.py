"""How a model is trained, as frozen dataclasses; a field's docstring is its `--help` text."""

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
    """The loss that training minimises."""

    kind: LossKind
    """`dice_cross_entropy` adds one minus the mean soft Dice of the three structures to the cross-entropy."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss, if the model has one."""

    def __post_init__(self):
        require(0 <= self.aux_weight < math.inf, f"loss.aux_weight must be finite and at least 0, not {self.aux_weight}.")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, clipping and weight averaging."""

    kind: Literal["sgd", "adamw"]
    """Optimizer."""
    lr: float
    """Base learning rate; the schedule multiplies it."""
    momentum: float = 0.9
    """Momentum of SGD, or first beta of AdamW."""
    weight_decay: float = 0.0
    """Weight decay: decoupled for AdamW, L2 for SGD."""
    clip_norm: float = 0.0
    """Clip gradients to this norm; 0 turns clipping off."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, which is evaluated instead of them; 0 turns averaging off."""

    def __post_init__(self):
        require(0 < self.lr < 1e6, f"optim.lr must be above 0 and below 1,000,000, not {self.lr}.")
        require(0 <= self.momentum < 1, f"optim.momentum must be at least 0 and below 1, not {self.momentum}.")
        decay = self.weight_decay
        require(0 <= decay < math.inf, f"optim.weight_decay must be finite and at least 0, not {decay}.")
        require(0 <= self.clip_norm < math.inf, f"optim.clip_norm must be finite and at least 0, not {self.clip_norm}.")
        require(0 <= self.ema_decay < 1, f"optim.ema_decay must be at least 0 and below 1, not {self.ema_decay}.")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as a multiplier of the base rate."""

    kind: ScheduleKind
    """Shape after the warm-up; docs/explanation/sweeps.md plots all nine."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up at the start."""
    power: float = 0.9
    """Exponent of `polynomial`."""
    factor: float = 0.1
    """Factor of each drop of `step`, `multistep` and `plateau`."""
    step_share: float = 0.3
    """Share of the run between two drops of `step`."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the run after which `multistep` drops."""
    final: float = 0.01
    """Multiplier at the end of `exponential`."""
    cycles: int = 3
    """Number of cycles of `restarts`: cosine decay that restarts."""
    cycle_growth: float = 1.0
    """Length of each cycle of `restarts` relative to the one before."""
    rise: float = 0.3
    """Share of the run during which `one_cycle` rises."""
    patience: int = 5
    """Epochs without a gain in validation Dice that `plateau` tolerates before it drops."""

    def __post_init__(self):
        warm_up = self.warmup_epochs
        require(0 <= warm_up < math.inf, f"schedule.warmup_epochs must be finite and at least 0, not {warm_up}.")
        require(0 < self.power < math.inf, f"schedule.power must be finite and above 0, not {self.power}.")
        bad = [x for x in (self.factor, self.step_share, self.final, self.rise, *self.milestones) if not 0 < x < 1]
        require(not bad, f"schedule.factor, .step_share, .final, .rise and .milestones must be between 0 and 1, not {bad}.")
        require(self.cycles >= 1, f"schedule.cycles must be at least 1, not {self.cycles}.")
        require(0 < self.cycle_growth < math.inf, f"schedule.cycle_growth must be finite and above 0, not {self.cycle_growth}.")
        require(self.patience >= 0, f"schedule.patience must be at least 0, not {self.patience}.")


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images, drawn for each sample; 0 turns a change off. No flips: left and right differ."""

    rotate_deg: float = 0.0
    """Largest rotation in either direction, in degrees."""
    scale: float = 0.0
    """Largest relative change of size: 0.1 draws from 0.9 to 1.1."""
    translate: float = 0.0
    """Largest shift, as a share of the image's side."""
    gain: float = 0.0
    """Largest relative change of brightness."""
    gamma: float = 0.0
    """Largest change of the gamma exponent: 0.3 draws from 1/1.3 to 1.3."""
    noise: float = 0.0
    """Largest standard deviation of multiplicative speckle."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels of the stored image."""
    sector_dropout: float = 0.0
    """Largest width of a darkened wedge, like a rib's shadow, as a share of the sector's width."""
    contrast: float = 0.0
    """Largest change of contrast, the grey levels' distance from their mean: 0.3 draws factors from 1/1.3 to 1.3."""

    def __post_init__(self):
        bad = [f"augment.{name} {value}" for name, value in vars(self).items() if not 0 <= value < 360]
        require(not bad, f"Every augment setting must be at least 0 and below 360, not {', '.join(bad)}.")
        require(self.scale < 1, f"augment.scale must be below 1, not {self.scale}.")
        require(self.blur <= 10, f"augment.blur must be at most 10 pixels, not {self.blur}.")
        require(self.sector_dropout <= 1, f"augment.sector_dropout must be at most 1, not {self.sector_dropout}.")


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch sizes and arithmetic of a run."""

    epochs: int
    """Passes over the training group."""
    batch_size: int
    """Images in a training batch, over all workers together."""
    accumulate: int = 1
    """Gradient accumulation: number of micro-batches that a worker splits its images of a batch into, to save memory."""
    eval_batch_size: int = 4
    """Images in an evaluation batch, on a GPU at least 32; scores do not depend on it."""
    intensity: Literal["unit", "standard"] = "unit"
    """`unit`: pixels / 255. `standard`: also standardised by the training group's mean and standard deviation."""
    holdout: float = 0.0
    """Share of the training patients held out for validation; the split's other groups are then not used."""
    seed: int = 0
    """Seed of initial weights, image order, dropout and augmentation."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast if the GPU supports it, and on CPUs if measured to be faster; GPUs compute fp32 in TF32."""
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    """torch.compile for training steps; `reduce-overhead` replays CUDA graphs, for batches too small to fill a GPU."""
    compress_gradients: bool = False
    """Workers exchange gradients in bf16: half the bytes, for slow networks."""
    deterministic: bool = False
    """Make two runs on one machine agree bit for bit. Tested on CPUs only; on GPUs it is slower, and PyTorch refuses operations
    without a deterministic kernel."""

    def __post_init__(self):
        require(self.epochs >= 1, f"train.epochs must be at least 1, not {self.epochs}.")
        size, parts = self.batch_size, self.accumulate
        require(size >= 2, f"train.batch_size must be at least 2, not {size}: batch normalisation needs 2 images.")
        require(0 <= self.seed < 2**63, f"train.seed must be from 0 to 2^63 - 1, not {self.seed}.")
        require(self.eval_batch_size >= 1, f"train.eval_batch_size must be at least 1, not {self.eval_batch_size}.")
        require(0 <= self.holdout < 1, f"train.holdout must be at least 0 and below 1, not {self.holdout}.")
        fix = f"use 1 to {size // 2}, so that each micro-batch of train.batch_size {size} has at least 2 images"
        require(1 <= parts <= size // 2, f"train.accumulate {parts} is out of range: {fix}.")
        # A replayed graph overwrites the previous micro-batch's gradients, which accumulation still needs.
        keeps_gradients = parts == 1 or self.compile != "reduce-overhead"
        require(keeps_gradients, f"train.accumulate {parts} rules out train.compile reduce-overhead: use default or off.")
