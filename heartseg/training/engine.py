"""Training and evaluation in plain PyTorch, independent of the launcher; it writes no files. `fit` trains a whole run."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.distributed import ReduceOp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from heartseg.config.experiment import Experiment
from heartseg.config.training import TrainConfig
from heartseg.metrics.segmentation import ScoreSums, predicted_labels
from heartseg.models.deeplabv3 import forward, wants_bf16
from heartseg.shards.loader import Batches, Intensity, check_shares, epoch_seed, share, steps_per_epoch
from heartseg.training.augmentation import augment
from heartseg.training.distributed import Ranks, reduce_over_ranks, share_batch_statistics, share_buffers
from heartseg.training.losses import segmentation_loss, training_loss
from heartseg.training.lr_schedules import lr_multiplier
from heartseg.training.optimizers import AveragedWeights, build_optimizer

OnStep = Callable[[int, int, int], None]
STEPS_PER_CHECK = 20  # each check waits for the device
GPU_EVAL_BATCH = 32  # the minimum on a GPU: for a few images, launching kernels takes longer than running them
# Up to this step, running batch statistics lag so far behind the weights that whole scores are zero; later, on CAMUS, they
# are better than an estimate from so few images. Small training groups give an eighth (at least 8), which costs 1 %.
YOUNG_STEPS, STATISTICS_IMAGES = 200, 64


class NonFiniteLoss(Exception):
    """The loss of a step, or the weights after its update, were NaN or infinite; `rows` are those of its global batch."""

    def __init__(self, epoch: int, step: int, rows: list[int]):
        super().__init__(f"the loss of epoch {epoch}, step {step} is not finite")
        self.epoch, self.step, self.rows = epoch, step, rows


@dataclass
class TrainState:
    """Everything that training changes: the model, the optimizer and the progress."""

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedWeights | None
    epoch: int = 0
    val_dice: list[float] = field(default_factory=list)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is scored and saved: the averaged one, if any."""
        return self.average.model if self.average else self.model

    def state_dict(self) -> dict:
        """The state to resume a run from, without random generators: every epoch seeds them from (seed, epoch, rank)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "average_updates": self.average.updates if self.average else 0,
            "epoch": self.epoch,
            "val_dice": self.val_dice,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the state that `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
            self.average.updates = state["average_updates"]
        self.epoch, self.val_dice = state["epoch"], list(state["val_dice"])


def start(experiment: Experiment, model: nn.Module, ranks: Ranks, wrap: Callable[[nn.Module], nn.Module]) -> TrainState:
    """Move the model to the device in its fastest layout, wrap it, and build its optimizer."""
    set_arithmetic(experiment.train)
    model = model.to(ranks.device, memory_format=torch.channels_last)
    images = experiment.train.batch_size // (ranks.world_size * experiment.train.accumulate)
    model = share_batch_statistics(model, experiment.model, ranks, images)
    optimizer = build_optimizer(experiment.optim, model)
    average = AveragedWeights(model, experiment.optim.ema_decay) if experiment.optim.ema_decay else None
    wrapped = wrap(model)
    if experiment.train.compress_gradients and ranks.world_size > 1:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    if experiment.train.compile != "off":
        # Around the wrapped model, so that gradients are still exchanged in buckets; `model` itself, evaluation and
        # the names in checkpoints stay as they are.
        mode = None if experiment.train.compile == "default" else experiment.train.compile
        wrapped = torch.compile(wrapped, mode=mode)
    return TrainState(model, wrapped, optimizer, average)


def set_arithmetic(train: TrainConfig) -> None:
    """Choose between speed and bitwise reproducibility for this process; call before its first matrix product on a GPU."""
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(train.deterministic)
    torch.backends.cudnn.benchmark = not train.deterministic
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")


def fit(
    experiment: Experiment, state: TrainState, loaders: dict[str, Batches], intensity: Intensity, ranks: Ranks,
    on_epoch_end: Callable[[TrainState, dict[str, float]], None], on_step: OnStep = lambda epoch, step, steps: None,
) -> None:  # fmt: skip
    """Train from `state.epoch` to the last epoch; raises NonFiniteLoss.

    `loaders` holds `train` and the groups to evaluate. After each epoch, every rank calls `on_epoch_end(state, metrics)`;
    the metrics are `epoch`, `lr`, `images_per_s`, `seconds`, `workers` and `{group}/{score}`. After each step, it calls
    `on_step(epoch, step, steps)`, with epoch and step counted from 1, perhaps before the device has finished the step.
    """
    check_shares(experiment.train.batch_size, ranks.world_size, experiment.train.accumulate)
    others = {group: loader for group, loader in loaders.items() if group != "train"}
    while state.epoch < experiment.train.epochs:
        metrics = train_one_epoch(experiment, state, loaders["train"], intensity, ranks, on_step)
        if state.epoch * steps_per_epoch(len(loaders["train"]), experiment.train.batch_size) <= YOUNG_STEPS:
            estimate_batch_statistics(experiment, state.evaluated, loaders["train"], intensity)
        share_buffers(state.evaluated, ranks)
        for group, loader in others.items():
            scores = evaluate(experiment, state.evaluated, loader, intensity, ranks)
            metrics |= {f"{group}/{name}": value for name, value in scores.items()}
        _raise_if_weights_not_finite(state, metrics, loaders, experiment.train, ranks)
        if "val/dice" in metrics:
            state.val_dice.append(metrics["val/dice"])
        on_epoch_end(state, metrics)


def train_one_epoch(
    experiment: Experiment, state: TrainState, loader: Batches, intensity: Intensity, ranks: Ranks, on_step: OnStep
) -> dict[str, float]:
    """Train for one pass over the training group; counts the epoch in `state` and returns its metrics."""
    train, epoch, started = experiment.train, state.epoch, time.perf_counter()
    steps, sums = steps_per_epoch(len(loader), train.batch_size), ScoreSums(ranks.device)
    mine = share(train.batch_size, ranks.rank, ranks.world_size)
    first_bad_step = torch.full((), steps, device=ranks.device)
    torch.manual_seed(epoch_seed(train.seed, epoch, 1_003, ranks.rank))
    state.wrapped.train()
    for step, (images, masks) in enumerate(loader.training_batches(train.batch_size, train.seed, epoch)):
        at = (epoch * steps + step, train.epochs * steps, steps)
        lr = experiment.optim.lr * lr_multiplier(experiment.schedule, *at, state.val_dice)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        draw_seed = epoch_seed(train.seed, epoch, 100_003, step)
        images, masks = augment(experiment.augment, images, masks, train.batch_size, mine.start, draw_seed)
        loss, prediction = train_step(experiment, state, intensity.apply(images), masks, ranks)
        sums.add(loss, prediction, masks)
        first_bad_step = torch.where(loss.isfinite(), first_bad_step, first_bad_step.clamp(max=step))
        if (step + 1) % STEPS_PER_CHECK == 0 or step + 1 == steps:
            _raise_if_not_finite(first_bad_step, steps, loader, train, epoch, ranks)
        on_step(epoch + 1, step + 1, steps)
    state.epoch = epoch + 1
    reduce_over_ranks(sums.sums, ranks)
    seconds = time.perf_counter() - started
    metrics = {"epoch": state.epoch, "lr": lr, "seconds": seconds, "images_per_s": steps * train.batch_size / seconds}
    return metrics | {"workers": ranks.world_size} | {f"train/{name}": value for name, value in sums.means().items()}


def train_step(
    experiment: Experiment, state: TrainState, images: torch.Tensor, masks: torch.Tensor, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update from this rank's share, in `train.accumulate` parts; returns the mean loss and predicted labels [b,H,W]."""
    train, num_images, losses, predictions = experiment.train, len(images), [], []
    state.optimizer.zero_grad(set_to_none=True)
    for part in range(train.accumulate):
        rows, is_last = share(num_images, part, train.accumulate), part + 1 == train.accumulate
        # Gradients are exchanged once per update, with the last part.
        with contextlib.nullcontext() if is_last or ranks.world_size == 1 else state.wrapped.no_sync():
            loss, prediction = _add_gradients(experiment, state, images[rows], masks[rows], ranks)
        losses.append(loss * ((rows.stop - rows.start) / num_images))
        predictions.append(prediction)
    if experiment.optim.clip_norm:
        nn.utils.clip_grad_norm_(state.model.parameters(), experiment.optim.clip_norm)
    state.optimizer.step()
    if state.average:
        state.average.update()
    return torch.stack(losses).sum(), torch.cat(predictions)


def _add_gradients(
    experiment: Experiment, state: TrainState, images: torch.Tensor, masks: torch.Tensor, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward pass for some images; returns their mean loss and predicted labels."""
    train = experiment.train
    if train.compile == "reduce-overhead":
        torch.compiler.cudagraph_mark_step_begin()
    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=wants_bf16(train, ranks.device)):
        outputs = state.wrapped(images.contiguous(memory_format=torch.channels_last))
    loss = training_loss(experiment.loss, outputs, masks)
    # DDP averages over ranks; with this weight, that is the mean over the images of the global batch.
    (loss * (len(images) * ranks.world_size / train.batch_size)).backward()
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return loss.detach(), predicted_labels(logits.detach())


def _raise_if_not_finite(
    first_bad_step: torch.Tensor, steps: int, loader: Batches, train: TrainConfig, epoch: int, ranks: Ranks
) -> None:
    step = int(reduce_over_ranks(first_bad_step.clone(), ranks, ReduceOp.MIN))
    if step < steps:
        raise NonFiniteLoss(epoch + 1, step + 1, loader.batch_rows(train.batch_size, train.seed, epoch, step))


def _raise_if_weights_not_finite(
    state: TrainState, metrics: dict[str, float], loaders: dict[str, Batches], train: TrainConfig, ranks: Ranks
) -> None:
    """Raise NonFiniteLoss if an epoch's last update left non-finite weights, which no later loss would show."""
    # Weights that are finite but too large to compute with show up only in the losses of the evaluated groups.
    modules = {state.model, state.evaluated}
    tensors = [tensor for module in modules for tensor in module.state_dict().values() if tensor.is_floating_point()]
    largest = nn.utils.get_total_norm(tensors, math.inf)  # a few kernels on a GPU for all tensors; keeps NaN and infinity
    fine = largest.isfinite() & all(math.isfinite(metrics[f"{group}/loss"]) for group, loader in loaders.items() if len(loader))
    steps = steps_per_epoch(len(loaders["train"]), train.batch_size)
    _raise_if_not_finite(steps - 1 + fine.int(), steps, loaders["train"], train, state.epoch - 1, ranks)


@torch.no_grad()
def estimate_batch_statistics(experiment: Experiment, model: nn.Module, loader: Batches, intensity: Intensity) -> None:
    """Replace running batch statistics, still close to their initial values, with those of a few training images."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the mean over batches
    for images in _statistics_batches(experiment.train, loader) if norms else ():
        forward(experiment.train, model, intensity.apply(images))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _statistics_batches(train: TrainConfig, loader: Batches) -> Iterator[torch.Tensor]:
    """Images [b,1,H,W], at least two per batch, from the first global batches of a run."""
    whole = replace(loader, rank=0, world_size=1)
    left = min(STATISTICS_IMAGES, max(8, len(loader) // 8))
    for images, _ in whole.training_batches(train.batch_size, train.seed, epoch=0):
        for part in images[:left].split(max(2, train.eval_batch_size)):
            if len(part) > 1:  # one image has no statistics
                yield part
        left = max(0, left - len(images))
        if not left:
            return


@torch.inference_mode()
def evaluate(experiment: Experiment, model: nn.Module, loader: Batches, intensity: Intensity, ranks: Ranks) -> dict[str, float]:
    """Loss and scores of a group on the stored grid; every image counts once, whatever the number of ranks."""
    model.eval()
    sums = ScoreSums(ranks.device)
    size = max(experiment.train.eval_batch_size, GPU_EVAL_BATCH if ranks.device.type == "cuda" else 1)
    for images, masks in loader.evaluation_batches(size):
        logits = forward(experiment.train, model, intensity.apply(images))
        sums.add(segmentation_loss(experiment.loss, logits, masks), predicted_labels(logits), masks)
    reduce_over_ranks(sums.sums, ranks)
    return sums.means()
