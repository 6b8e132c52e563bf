"""What rank 0 does after each epoch: it writes the checkpoint, record and samples, tracks the metrics and prints a line.

A thread writes checkpoints while the next epoch trains; an epoch enters the record once its checkpoint is complete.
"""

import io
import logging
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


@dataclass
class EpochCallbacks:
    """Writes and reports an epoch's results on rank 0; `samples` are the images whose predictions are kept."""

    experiment: Experiment
    run: run_directory.Run
    intensity: Intensity
    samples: FrameRows
    tracker: Tracker
    record: list[dict]
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="checkpoints"))
    pending: Future | None = None
    last_line: float = -SECONDS_PER_LINE

    def end_epoch(self, state: engine.TrainState, metrics: dict[str, float]) -> None:
        """Copy the epoch's states and start writing them; raises any error from writing the previous epoch."""
        self.wait()  # so that memory holds only one copy of the states
        self.write_samples(state)
        copied = checkpoint.snapshot(state.state_dict())
        card = {
            "epoch": state.epoch,
            "experiment": to_json(self.experiment),
            "intensity": [self.intensity.mean, self.intensity.std],
            "metrics": {name: none_if_nan(value) for name, value in metrics.items()},
            "run": self.run.name,
            "data_fingerprint": self.run.description["data_fingerprint"],
            "code": run_directory.code_revision(),
        }
        self.pending, self.last_line = self.thread.submit(self.write_epoch, copied, card, metrics), time.monotonic()

    def wait(self) -> None:
        """Wait until the last epoch is written; raises any error from writing it."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def write_epoch(self, states: dict, card: dict, metrics: dict[str, float]) -> None:
        """Write the checkpoint and the record, then track and print the epoch; raises UserError if a file cannot be written."""
        try:
            checkpoint.save(self.run.path, states["average"] or states["model"], states, card)
            self.record.append(metrics)
            run_directory.write_record(self.run.path, self.record)
            checkpoint.keep_last_and_best(self.run.path)
        except OSError as error:
            raise UserError(format_write_error(error, self.run.path)) from error
        self.tracker.log(metrics)
        self.print_epoch(metrics)

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
