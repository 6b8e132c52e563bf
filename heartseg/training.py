"""One rank of a training run, from shards to finished checkpoints; the same under Ray, under torchrun and alone.

The engine trains; here its epochs become checkpoints, the run's record, pictures and tracked metrics.
"""

import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from heartseg import checkpoint, engine, runs, storage
from heartseg.batches import Intensity, Loader, check_shares, steps_per_epoch
from heartseg.config import Experiment, to_json
from heartseg.distributed import Ranks
from heartseg.errors import UserError
from heartseg.model import build_model
from heartseg.runs import Run
from heartseg.shards import Frames, Shards, load_groups, open_shards
from heartseg.tracking import Tracker, build_tracker

log = logging.getLogger(__name__)
NUM_SAMPLES = 4
EPOCHS_PER_OVERLAY = 10
SECONDS_PER_LINE = 10.0


def check_plan(experiment: Experiment, shards: Shards) -> None:
    """Raise UserError for what would fail later: a grid that is not the recipe's, too small shares, too few images."""
    if shards.image != experiment.image:
        there, asked = shards.image, experiment.image
        raise UserError(
            f"{shards.path} holds images of {there.height} x {there.width} and {experiment.name} wants {asked.height} x "
            f"{asked.width}: preprocess for it, or give --image.height {there.height} --image.width {there.width}."
        )
    check_shares(experiment.train.batch_size, experiment.workers)
    steps_per_epoch(shards.num_rows("train"), experiment.train.batch_size)


def intensity_of(experiment: Experiment, shards: Shards) -> Intensity:
    """The normalisation of a run: none beyond / 255, or the training group's mean and deviation."""
    return Intensity(*shards.intensity) if experiment.train.intensity == "standard" else Intensity()


def train_rank(
    experiment: Experiment,
    run: Run,
    ranks: Ranks,
    wrap: Callable[[nn.Module], nn.Module],
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> None:
    """Train this rank's share of a run, from its last checkpoint where there is one.

    `wrap` gives the model its gradient averaging; `report` is called on every rank after an epoch is safe.
    """
    shards = open_shards(experiment.data)
    frames = load_groups(shards, shards.groups)
    loaders = {group: Loader.of(f, ranks.rank, ranks.world_size, ranks.device) for group, f in frames.items()}
    intensity = intensity_of(experiment, shards)
    torch.manual_seed(experiment.train.seed)
    state = engine.start(experiment, build_model(experiment.model), ranks, wrap)
    record = resume(state, run)
    if state.epoch >= experiment.train.epochs and storage.exists(storage.join(run.path, runs.MODEL_CARD)):
        return
    tracker = build_tracker(experiment, run, ranks.is_main, record)
    keeper = Keeper(experiment, run, intensity, frames["val" if "val" in frames else "test"], tracker, record, report)
    exit_code = 1
    try:
        progress = keeper.print_progress if ranks.is_main else lambda *_: None
        after_epoch = keeper.keep_epoch if ranks.is_main else lambda _, metrics: report(metrics)
        engine.fit(experiment, state, loaders, intensity, ranks, after_epoch, progress)
        if ranks.is_main:
            keeper.finish(state, shards)
        exit_code = 0
    except engine.NonFiniteLoss as error:
        raise UserError(_say_non_finite(error, frames["train"])) from error
    finally:
        tracker.finish(exit_code)


def resume(state: engine.TrainState, run: Run) -> list[dict]:
    """Go on from the run's last checkpoint, if there is one; returns the record up to it."""
    found = checkpoint.last(run.path)
    if found is None:
        return []
    state.load_state_dict(found.training_state())
    record = [epoch for epoch in runs.read_record(run.path) if epoch["epoch"] <= state.epoch]
    if not record or record[-1]["epoch"] < state.epoch:
        # A kill between the checkpoint and the record's line: the checkpoint's card has the same metrics.
        record.append({name: np.nan if value is None else value for name, value in found.card["metrics"].items()})
    return record


def _say_non_finite(error: engine.NonFiniteLoss, frames: Frames) -> str:
    names = sorted({frames.table["patient"][row].as_py() for row in error.rows})
    return (
        f"The loss of epoch {error.epoch}, step {error.step} is not finite (batch of {', '.join(names)}): lower --optim.lr "
        "or set --optim.clip-norm 1; the checkpoint of the epoch before is kept."
    )


@dataclass
class Keeper:
    """What rank 0 does with an epoch's results: checkpoint first, then record, pictures, tracker and a line."""

    experiment: Experiment
    run: Run
    intensity: Intensity
    shown: Frames
    tracker: Tracker
    record: list[dict]
    report: Callable[[dict[str, float]], None]
    last_line: float = field(default_factory=time.monotonic)

    def keep_epoch(self, state: engine.TrainState, metrics: dict[str, float]) -> None:
        """Make an epoch safe, then tell of it."""
        self.record.append(metrics)
        card = {
            "epoch": state.epoch,
            "experiment": to_json(self.experiment),
            "intensity": [self.intensity.mean, self.intensity.std],
            "metrics": {name: value if np.isfinite(value) else None for name, value in metrics.items()},
            "run": self.run.name,
            "data_fingerprint": self.run.description["data_fingerprint"],
            "code": runs.code_revision(),
        }
        checkpoint.save(self.run.path, state.evaluated.state_dict(), state.state_dict(), card)
        runs.write_record(self.run.path, self.record)
        checkpoint.keep_last_and_best(self.run.path)
        self.keep_samples(state)
        self.tracker.log(metrics)
        self.print_epoch(metrics)
        self.report(metrics)

    def keep_samples(self, state: engine.TrainState) -> None:
        """Keep what the model makes of a fixed handful of images, after the first and the last epoch; track some more."""
        is_first, is_last = state.epoch == 1, state.epoch == self.experiment.train.epochs
        if not (is_first or is_last or state.epoch % EPOCHS_PER_OVERLAY == 0):
            return
        rows = np.linspace(0, len(self.shown) - 1, min(NUM_SAMPLES, len(self.shown))).astype(int)
        images, masks = self.shown.images[rows], self.shown.masks[rows]
        device = next(state.evaluated.parameters()).device
        unit = images.to(device).float().div_(255)
        with torch.inference_mode():
            state.evaluated.eval()
            logits = engine.forward(self.experiment.train, state.evaluated, self.intensity.apply(unit))
        predictions = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
        table = self.shown.table.take(rows)
        names = [f"{r['patient']} {r['view']} {r['phase']}" for r in table.select(["patient", "view", "phase"]).to_pylist()]
        arrays = {"images": images[:, 0].numpy(), "masks": masks.numpy(), "predictions": predictions}
        self.tracker.overlays(state.epoch, *arrays.values(), names)
        for name in ["first"] * is_first + ["last"] * is_last:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays, names=np.array(names), epoch=state.epoch)
            storage.publish(storage.join(self.run.path, "samples", f"{name}.npz"), buffer.getvalue())

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
        """A line within long epochs, every ten seconds at the most."""
        if step < steps and time.monotonic() - self.last_line >= SECONDS_PER_LINE:
            self.last_line = time.monotonic()
            log.info("epoch %d/%d  step %d/%d", epoch, self.experiment.train.epochs, step, steps)

    def finish(self, state: engine.TrainState, shards: Shards) -> None:
        """Write the model card, which says that a run is finished, and hand the checkpoint that counts to the tracker."""
        if not storage.exists(storage.join(self.run.path, "samples", "last.npz")):
            self.keep_samples(state)
        runs.write_record(self.run.path, self.record)
        storage.publish(storage.join(self.run.path, runs.MODEL_CARD), runs.model_card(self.run, self.record[-1]).encode())
        kept = checkpoint.find(self.run.path, "best")
        self.tracker.artifact(kept.path, shards.fingerprint)
