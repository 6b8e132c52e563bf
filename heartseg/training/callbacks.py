"""What the first rank keeps of each epoch: checkpoint, record, pictures, tracked metrics and a line of text.

Checkpoints are written by a thread while the next epoch trains. An epoch stands in the record once its checkpoint is
complete, so a run that is cut off goes on from the last epoch of its record, without a gap and without a double.
"""

import contextlib
import io
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from heartseg.config.experiment import Experiment, to_json
from heartseg.errors import UserError, format_write_error
from heartseg.labels import frame_name
from heartseg.metrics.segmentation import predicted_labels
from heartseg.models import checkpoint, precision
from heartseg.shards.loader import Intensity
from heartseg.shards.reader import FrameRows, Shards
from heartseg.storage import filesystem
from heartseg.training import engine, run_directory
from heartseg.training.run_directory import Run
from heartseg.training.wandb_logger import Tracker

log = logging.getLogger(__name__)
NUM_SAMPLES = 4
EPOCHS_PER_OVERLAY = 10
SECONDS_PER_LINE = 10.0


def sample_rows(num_rows: int) -> list[int]:
    """The rows of a group that are shown, spread over it."""
    return np.linspace(0, num_rows - 1, min(NUM_SAMPLES, num_rows)).astype(int).tolist()


class Background:
    """One piece of work at a time on a thread; an error in it is raised by the next call."""

    def __init__(self):
        self.pool, self.pending = ThreadPoolExecutor(max_workers=1, thread_name_prefix="keeper"), None

    def submit(self, work: Callable[[], None]) -> None:
        """Wait for the work before, then begin this."""
        self.wait()
        self.pending: Future | None = self.pool.submit(work)

    def wait(self) -> None:
        """Return once nothing is under way; raises what the work raised."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


@dataclass
class Keeper:
    """What rank 0 does with an epoch's results."""

    experiment: Experiment
    run: Run
    intensity: Intensity
    shown: FrameRows
    tracker: Tracker
    record: list[dict]
    background: Background = field(default_factory=Background)
    last_line: float = -SECONDS_PER_LINE

    def keep_epoch(self, state: engine.TrainState, metrics: dict[str, float]) -> None:
        """Copy the epoch's states and hand them to the thread that makes them safe; raises what the last one met."""
        # The epoch before is made safe by now: memory holds one copy of the states, and its row was tracked.
        self.background.wait()
        self.keep_samples(state)
        copied = checkpoint.snapshot(state.state_dict())
        card = {
            "epoch": state.epoch,
            "experiment": to_json(self.experiment),
            "intensity": [self.intensity.mean, self.intensity.std],
            "metrics": {name: filesystem.none_if_nan(value) for name, value in metrics.items()},
            "run": self.run.name,
            "data_fingerprint": self.run.description["data_fingerprint"],
            "code": run_directory.code_revision(),
        }
        self.background.submit(lambda: self.make_safe(copied, card, metrics))

    def close(self) -> None:
        """Let what is under way become complete, also while an error passes through."""
        with contextlib.suppress(Exception):
            self.background.wait()

    def make_safe(self, states: dict, card: dict, metrics: dict[str, float]) -> None:
        """Checkpoint first, then everything that says the epoch is there. Raises UserError where the storage refuses."""
        try:
            checkpoint.save(self.run.path, states["average"] or states["model"], states, card)
            self.record.append(metrics)
            run_directory.write_record(self.run.path, self.record)
            checkpoint.keep_last_and_best(self.run.path)
        except OSError as error:
            raise UserError(format_write_error(error, self.run.path)) from error
        self.tracker.log(metrics)
        self.print_epoch(metrics)

    def keep_samples(self, state: engine.TrainState) -> None:
        """Keep what the model makes of a fixed handful of images, after the first and the last epoch; track some more."""
        is_first, is_last = state.epoch == 1, state.epoch == self.experiment.train.epochs
        if not (is_first or is_last or state.epoch % EPOCHS_PER_OVERLAY == 0):
            return
        images, masks = self.shown.images, self.shown.masks
        device = next(state.evaluated.parameters()).device
        unit = images.to(device).float().div_(255)
        with torch.inference_mode():
            state.evaluated.eval()
            logits = precision.forward(self.experiment.train, state.evaluated, self.intensity.apply(unit))
        predictions = predicted_labels(logits).cpu().numpy()
        names = [frame_name(row) for row in self.shown.table.select(["patient", "view", "phase", "frame"]).to_pylist()]
        arrays = {"images": images[:, 0].numpy(), "masks": masks.numpy(), "predictions": predictions}
        self.tracker.overlays(state.epoch, *arrays.values(), names)
        for name in ["first"] * is_first + ["last"] * is_last:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays, names=np.array(names), epoch=state.epoch)
            filesystem.publish(filesystem.join(self.run.path, "samples", f"{name}.npz"), buffer.getvalue())

    def print_epoch(self, metrics: dict[str, float]) -> None:
        """One line an epoch: what was reached, and how long the rest will take."""
        scores = [
            f"{name} {metrics[name]:.4f}" for name in ("train/loss", "train/dice", "val/dice", "test/dice") if name in metrics
        ]
        epochs = self.experiment.train.epochs
        left = (epochs - metrics["epoch"]) * float(np.mean([epoch["seconds"] for epoch in self.record[-5:]]))
        rate = f"{metrics['images_per_s']:.0f} images/s"
        log.info("epoch %d/%d  %s  %s  %.0f min left", metrics["epoch"], epochs, "  ".join(scores), rate, left / 60)

    def print_progress(self, epoch: int, step: int, steps: int) -> None:
        """A line at the first step, and every ten seconds at the most."""
        if step < steps and time.monotonic() - self.last_line >= SECONDS_PER_LINE:
            self.last_line = time.monotonic()
            log.info("epoch %d/%d  step %d/%d", epoch, self.experiment.train.epochs, step, steps)

    def finish(self, state: engine.TrainState) -> None:
        """Write the model card, which says that a run is finished."""
        self.background.wait()
        if not filesystem.exists(filesystem.join(self.run.path, "samples", "last.npz")):
            self.keep_samples(state)
        run_directory.write_record(self.run.path, self.record)
        filesystem.publish(
            filesystem.join(self.run.path, run_directory.MODEL_CARD),
            run_directory.model_card(self.run, self.record[-1]).encode(),
        )

    def hand_on(self, shards: Shards) -> None:
        """Hand the checkpoint that counts to the tracker."""
        kept = checkpoint.find(self.run.path, "best")
        self.tracker.artifact(kept.path, shards.fingerprint)
