"""What rank 0 does after each epoch: it writes the checkpoint, record and samples, tracks the metrics and prints a line.

A thread writes while the next epoch trains: the record after each epoch, checkpoints only every so many seconds, since those of
a large network would take longer than a short epoch. Until then, memory holds the newest epoch and the best one.
"""

import io
import logging
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from heartseg.config.experiment import Experiment, none_if_nan, to_json
from heartseg.errors import UserError, format_write_error
from heartseg.labels import frame_name
from heartseg.metrics.segmentation import predicted_labels
from heartseg.models import checkpoint, deeplabv3
from heartseg.shards.loader import Intensity
from heartseg.shards.reader import FrameRows
from heartseg.storage import filesystem
from heartseg.training import engine, run_directory
from heartseg.training.wandb_logger import Tracker

log = logging.getLogger(__name__)
EPOCHS_PER_OVERLAY = 10
SECONDS_PER_LINE = 10.0


@dataclass(frozen=True, eq=False)
class Copied:
    """The states after an epoch, and the card of their checkpoint."""

    states: dict
    card: dict

    @property
    def val_dice(self) -> float:
        """The score that chooses the best checkpoint; -inf without one."""
        score = self.card["metrics"].get("val/dice")
        return -math.inf if score is None else score


@dataclass
class EpochCallbacks:
    """Writes and reports an epoch's results on rank 0; `samples` are the images whose predictions are kept.

    Checkpoints are at least `seconds` apart, except for that of the last epoch and the one that `stop` writes.
    """

    experiment: Experiment
    run: run_directory.Run
    intensity: Intensity
    samples: FrameRows
    tracker: Tracker
    record: list[dict]
    seconds: float
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="checkpoints"))
    pending: Future | None = None
    last_line: float = -SECONDS_PER_LINE
    newest: Copied | None = None  # these two are not written yet
    best: Copied | None = None
    best_dice: float = -math.inf
    untracked: list[dict] = field(default_factory=list)
    last_checkpoint: float = -math.inf

    def __post_init__(self):
        if kept := checkpoint.best(self.run.path):
            self.best_dice = kept.card["metrics"]["val/dice"]

    def end_epoch(self, state: engine.TrainState, metrics: dict[str, float]) -> None:
        """Copy the epoch's states and start writing; raises any error from writing the previous epoch."""
        self.wait()
        self.write_samples(state)
        card = {
            "epoch": state.epoch,
            "experiment": to_json(self.experiment),
            "intensity": [self.intensity.mean, self.intensity.std],
            "metrics": {name: none_if_nan(value) for name, value in metrics.items()},
            "run": self.run.name,
            "data_fingerprint": self.run.description["data_fingerprint"],
            "code": run_directory.code_revision(),
        }
        self.newest = Copied(checkpoint.snapshot(state.state_dict()), card)
        if self.newest.val_dice > self.best_dice:
            self.best, self.best_dice = self.newest, self.newest.val_dice
        is_last = state.epoch == self.experiment.train.epochs
        is_due = is_last or time.monotonic() - self.last_checkpoint >= self.seconds
        self.pending, self.last_line = self.thread.submit(self.write_epoch, metrics, is_due), time.monotonic()

    def wait(self) -> None:
        """Wait until the last epoch is written; raises any error from writing it."""
        pending, self.pending = self.pending, None
        try:
            if pending:
                pending.result()
        except Exception:
            self.newest = None  # `stop` must not try again what has just failed
            raise

    def write_epoch(self, metrics: dict[str, float], with_checkpoint: bool) -> None:
        """Write the record and, first, a checkpoint if it is due; raises UserError if the storage refuses."""
        self.untracked.append(metrics)
        try:
            if with_checkpoint:
                self.write_checkpoints()
            self.record.append(metrics)
            run_directory.write_record(self.run.path, self.record)
        except OSError as error:
            raise UserError(format_write_error(error, self.run.path)) from error
        self.print_epoch(metrics)

    def write_checkpoints(self) -> None:
        """Write the newest epoch and the best one, and track the epochs up to here, which will not be trained again."""
        for copied in dict.fromkeys(filter(None, (self.best, self.newest))):
            weights = copied.states["average"] or copied.states["model"]
            checkpoint.save(self.run.path, weights, copied.states, copied.card)
        checkpoint.keep_last_and_best(self.run.path)
        self.newest, self.best, self.last_checkpoint = None, None, time.monotonic()
        for metrics in self.untracked:
            self.tracker.log(metrics)
        self.untracked.clear()

    def stop(self) -> None:
        """Write the last whole epoch when a run ends early."""
        self.wait()
        if self.newest:
            self.write_checkpoints()

    def write_samples(self, state: engine.TrainState) -> None:
        """Write the predictions of the samples after the first and the last epoch, and track them every few epochs."""
        is_first, is_last = state.epoch == 1, state.epoch == self.experiment.train.epochs
        if not (is_first or is_last or state.epoch % EPOCHS_PER_OVERLAY == 0):
            return
        images, model = self.samples.images, state.evaluated.eval()
        unit = images.to(next(model.parameters()).device).float().div_(255)
        with torch.inference_mode():
            logits = deeplabv3.forward(self.experiment.train, model, self.intensity.apply(unit))
        names = [frame_name(row) for row in self.samples.table.select(["patient", "view", "phase", "frame"]).to_pylist()]
        predictions = predicted_labels(logits).cpu().numpy()
        arrays = {"images": images[:, 0].numpy(), "masks": self.samples.masks.numpy(), "predictions": predictions}
        self.tracker.overlays(state.epoch, *arrays.values(), names)
        for name in ["first"] * is_first + ["last"] * is_last:
            np.savez_compressed(buffer := io.BytesIO(), **arrays, names=np.array(names), epoch=state.epoch)
            filesystem.publish(filesystem.join(self.run.path, "samples", f"{name}.npz"), buffer.getvalue())

    def print_epoch(self, metrics: dict[str, float]) -> None:
        """Print a line per epoch: scores, speed and the remaining time."""
        shown, epochs = ("train/loss", "train/dice", "val/dice", "test/dice"), self.experiment.train.epochs
        scores = "  ".join(f"{name} {metrics[name]:.4f}" for name in shown if name in metrics)
        seconds = (epochs - metrics["epoch"]) * float(np.mean([epoch["seconds"] for epoch in self.record[-5:]]))
        left = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
        speed = metrics["images_per_s"]
        rate = f"{speed:.1f}" if speed < 10 else f"{speed:.0f}"
        log.info("epoch %d/%d  %s  %s images/s  %s left", metrics["epoch"], epochs, scores, rate, left)

    def print_progress(self, epoch: int, step: int, steps: int) -> None:
        """Print a line at the first step, then at most one every ten seconds since the last line or the end of an epoch."""
        if step < steps and time.monotonic() - self.last_line >= SECONDS_PER_LINE:
            self.last_line = time.monotonic()
            log.info("epoch %d/%d  step %d/%d", epoch, self.experiment.train.epochs, step, steps)

    def finish(self, state: engine.TrainState) -> None:
        """Write the model card, which marks a run as finished, and track the best checkpoint."""
        self.wait()
        if not filesystem.exists(filesystem.join(self.run.path, "samples", "last.npz")):
            self.write_samples(state)
        run_directory.write_record(self.run.path, self.record)
        card = run_directory.model_card(self.run, self.record[-1]).encode()
        filesystem.publish(filesystem.join(self.run.path, run_directory.MODEL_CARD), card)
        best = checkpoint.find(self.run.path, "best").path
        self.tracker.artifact(best, self.run.description["data_fingerprint"])
