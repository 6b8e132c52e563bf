"""Training and evaluation in plain PyTorch: knows nothing of who launched it, and writes no file.

`fit` is the story of a run; what happens with an epoch's results (checkpoints, trackers, Ray) is the caller's, in
`on_epoch_end`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from heartseg.augment import augment
from heartseg.batches import Intensity, Loader, check_shares, share, steps_per_epoch
from heartseg.config import Experiment, TrainConfig
from heartseg.distributed import Ranks, min_over_ranks, sum_over_ranks
from heartseg.losses import segmentation_loss, training_loss
from heartseg.metrics import ScoreSums
from heartseg.optim import AveragedWeights, build_optimizer, set_lr
from heartseg.schedules import lr_multiplier

# Steps between two looks at the device: each look waits for it.
STEPS_PER_CHECK = 20


class NonFiniteLoss(Exception):
    """The loss was NaN or infinite at a step; `rows` are the training rows of its global batch."""

    def __init__(self, epoch: int, step: int, rows: list[int]):
        super().__init__(f"the loss of epoch {epoch}, step {step} is not finite")
        self.epoch, self.step, self.rows = epoch, step, rows


@dataclass
class TrainState:
    """Everything that training changes: the model, what optimizes it, and how far it is."""

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedWeights | None
    epoch: int = 0
    val_dice: list[float] = field(default_factory=list)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is scored and kept: the averaged one where there is one."""
        return self.average.model if self.average else self.model

    def state_dict(self) -> dict:
        """The states that a resumed run needs; random generators start anew each epoch from (seed, epoch, rank)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "average_updates": self.average.updates if self.average else 0,
            "epoch": self.epoch,
            "val_dice": self.val_dice,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go back to where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
            self.average.updates = state["average_updates"]
        self.epoch, self.val_dice = state["epoch"], list(state["val_dice"])


def wants_bf16(config: TrainConfig, device: torch.device) -> bool:
    """True where bf16 autocast is asked for, or is `auto` and the hardware computes in it."""
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def start(experiment: Experiment, model: nn.Module, ranks: Ranks, wrap: Callable[[nn.Module], nn.Module]) -> TrainState:
    """Put the model on the device in its fastest layout, wrap it, and build what trains it."""
    torch.use_deterministic_algorithms(experiment.train.deterministic)
    torch.backends.cudnn.benchmark = not experiment.train.deterministic
    torch.set_float32_matmul_precision("high")
    model = model.to(ranks.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(experiment.optim, model)
    decay = experiment.optim.ema_decay
    average = AveragedWeights(model, decay) if decay else None
    return TrainState(model, wrap(model), optimizer, average)


def fit(
    experiment: Experiment,
    state: TrainState,
    loaders: dict[str, Loader],
    intensity: Intensity,
    ranks: Ranks,
    on_epoch_end: Callable[[TrainState, dict[str, float]], None],
    on_progress: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
) -> None:
    """Train from `state.epoch` to the last epoch.

    `loaders` holds `train` and the groups to evaluate. After each epoch, `on_epoch_end(state, metrics)` is called on every
    rank with `epoch`, `lr`, `images_per_s`, `seconds` and `{group}/{score}`. Raises NonFiniteLoss.
    """
    check_shares(experiment.train.batch_size, ranks.world_size)
    others = {group: loader for group, loader in loaders.items() if group != "train"}
    while state.epoch < experiment.train.epochs:
        metrics = train_one_epoch(experiment, state, loaders["train"], intensity, ranks, on_progress)
        for group, loader in others.items():
            scores = evaluate(experiment, state.evaluated, loader, intensity, ranks)
            metrics |= {f"{group}/{name}": value for name, value in scores.items()}
        if "val/dice" in metrics:
            state.val_dice.append(metrics["val/dice"])
        on_epoch_end(state, metrics)


def train_one_epoch(
    experiment: Experiment,
    state: TrainState,
    loader: Loader,
    intensity: Intensity,
    ranks: Ranks,
    on_progress: Callable[[int, int, int], None],
) -> dict[str, float]:
    """One pass over the training group; counts the epoch in `state` and returns its metrics."""
    train, epoch, started = experiment.train, state.epoch, time.perf_counter()
    steps = steps_per_epoch(len(loader), train.batch_size)
    mine = share(train.batch_size, ranks.rank, ranks.world_size)
    # DDP takes the mean over ranks: with this weight it becomes the mean over the images of the global batch.
    weight = (mine.stop - mine.start) * ranks.world_size / train.batch_size
    sums = ScoreSums(ranks.device)
    first_bad_step = torch.full((), steps, device=ranks.device)
    torch.manual_seed((train.seed * 1_000_003 + epoch) * 1_003 + ranks.rank)
    state.wrapped.train()
    for step, (images, masks) in enumerate(loader.training_batches(train.batch_size, train.seed, epoch)):
        lr = experiment.optim.lr * lr_multiplier(
            experiment.schedule, epoch * steps + step, train.epochs * steps, steps, state.val_dice
        )
        set_lr(state.optimizer, lr)
        draw_seed = (train.seed * 1_000_003 + epoch) * 100_003 + step
        images, masks = augment(experiment.augment, images, masks, train.batch_size, mine.start, draw_seed)
        loss, prediction = train_step(experiment, state, intensity.apply(images), masks, weight, ranks)
        sums.add(loss, prediction, masks)
        first_bad_step = torch.where(loss.isfinite(), first_bad_step, first_bad_step.clamp(max=step))
        if (step + 1) % STEPS_PER_CHECK == 0 or step + 1 == steps:
            _raise_if_not_finite(first_bad_step, steps, loader, train, epoch, ranks)
            on_progress(epoch + 1, step + 1, steps)
    state.epoch = epoch + 1
    sum_over_ranks(sums.sums, ranks)
    seconds = time.perf_counter() - started
    metrics = {"epoch": state.epoch, "lr": lr, "seconds": seconds, "images_per_s": steps * train.batch_size / seconds}
    metrics["workers"] = ranks.world_size
    return metrics | {f"train/{name}": value for name, value in sums.means().items()}


def train_step(
    experiment: Experiment, state: TrainState, images: torch.Tensor, masks: torch.Tensor, weight: float, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update from this rank's share; returns its mean loss and its predicted labels [b,H,W], on the device."""
    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=wants_bf16(experiment.train, ranks.device)):
        outputs = state.wrapped(images.contiguous(memory_format=torch.channels_last))
    loss = training_loss(experiment.loss, outputs, masks)
    state.optimizer.zero_grad(set_to_none=True)
    (loss * weight).backward()
    if experiment.optim.clip_norm:
        nn.utils.clip_grad_norm_(state.model.parameters(), experiment.optim.clip_norm)
    state.optimizer.step()
    if state.average:
        state.average.update(state.model)
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return loss.detach(), logits.detach().argmax(dim=1)


def _raise_if_not_finite(
    first_bad_step: torch.Tensor, steps: int, loader: Loader, train: TrainConfig, epoch: int, ranks: Ranks
) -> None:
    step = int(min_over_ranks(first_bad_step.clone(), ranks))
    if step < steps:
        raise NonFiniteLoss(epoch + 1, step + 1, loader.batch_rows(train.batch_size, train.seed, epoch, step))


@torch.inference_mode()
def evaluate(experiment: Experiment, model: nn.Module, loader: Loader, intensity: Intensity, ranks: Ranks) -> dict[str, float]:
    """Loss and scores of a group on the stored grid; every image counts once, whatever the number of ranks."""
    model.eval()
    sums = ScoreSums(ranks.device)
    for images, masks in loader.evaluation_batches(experiment.train.eval_batch_size):
        logits = forward(experiment.train, model, intensity.apply(images))
        sums.add(segmentation_loss(experiment.loss, logits, masks), logits.argmax(dim=1), masks)
    sum_over_ranks(sums.sums, ranks)
    return sums.means()


def forward(train: TrainConfig, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits [B,4,H,W] in float32 of normalised images, in the configured precision."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=wants_bf16(train, images.device)):
        return model(images.contiguous(memory_format=torch.channels_last)).float()
