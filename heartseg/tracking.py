"""Metrics to Weights & Biases, or to nobody; the only file that knows wandb."""

import contextlib
import logging
import os
import tempfile

import numpy as np

from heartseg import storage
from heartseg.config import Experiment
from heartseg.labels import CLASSES
from heartseg.runs import Run

log = logging.getLogger(__name__)
# Datasets whose images may leave the machine unasked: one is public, the other is nobody's heart.
SHAREABLE = ("CAMUS", "phantom")


class Tracker:
    """Tracks nothing: what every rank but the first has, and every run that asked for none."""

    def log(self, metrics: dict[str, float]) -> None:
        """Record an epoch's metrics; `metrics["epoch"]` is the step."""

    def overlays(self, epoch: int, images: np.ndarray, masks: np.ndarray, predictions: np.ndarray, names: list[str]) -> None:
        """Record images uint8 [k,H,W] with true and predicted labels [k,H,W]."""

    def artifact(self, checkpoint_path: str, fingerprint: str) -> None:
        """Record a checkpoint with its lineage to the data."""

    def finish(self, exit_code: int = 0) -> None:
        """Send what is left."""


class WandbTracker(Tracker):
    """One wandb run per training run; a resumed training goes on with the same run id."""

    def __init__(self, experiment: Experiment, run: Run):
        import wandb

        self.wandb, self.run_path = wandb, run.path
        self.send_images = _sends_images(experiment, run)
        # wandb writes to local files only; for a run on an object store they are copied there at the end.
        self.folder = tempfile.mkdtemp(prefix="heartseg-wandb-") if storage.is_uri(run.path) else run.path
        _keep_files_in(os.path.join(self.folder, "wandb"))
        mode = _mode(experiment)
        arguments = {
            "project": experiment.tracking.project,
            "group": experiment.tracking.group or None,
            "name": run.name,
            "id": run.description["wandb_id"],
            "dir": self.folder,
            "resume": "allow",
            "job_type": "train",
            "tags": [experiment.name, run.description["dataset"]],
            "config": _flat(run.description["identity"]) | {"data_fingerprint": run.description["data_fingerprint"]},
            # Rows reach the disk each second, so that a kill costs one and not fifteen.
            "settings": wandb.Settings(silent=True, console="off", init_timeout=10, x_transaction_log_flush_interval=1.0),
        }
        try:
            self.run = wandb.init(mode=mode, **arguments)
        except wandb.errors.Error as error:
            reason = str(error).partition("\n")[0]
            log.warning("wandb cannot be reached (%s): this run is kept offline, `wandb sync` sends it later.", reason)
            wandb.teardown()  # its service still holds the run's id for the attempt that failed
            self.run = wandb.init(mode="offline", **arguments)
        self.run.define_metric("*", step_metric="epoch")
        self.run.define_metric("val/dice", step_metric="epoch", summary="max")

    def log(self, metrics: dict[str, float]) -> None:
        self.run.log(metrics)

    def overlays(self, epoch: int, images: np.ndarray, masks: np.ndarray, predictions: np.ndarray, names: list[str]) -> None:
        if not self.send_images:
            return
        labels = dict(enumerate(CLASSES))
        pictures = [
            self.wandb.Image(
                image,
                caption=name,
                masks={
                    "prediction": {"mask_data": prediction, "class_labels": labels},
                    "truth": {"mask_data": mask, "class_labels": labels},
                },
            )
            for image, mask, prediction, name in zip(images, masks, predictions, names, strict=True)
        ]
        self.run.log({"epoch": epoch, "overlays": pictures})

    def artifact(self, checkpoint_path: str, fingerprint: str) -> None:
        if storage.is_uri(checkpoint_path):
            return
        item = self.wandb.Artifact(f"{self.run.id}-model", type="model", metadata={"data_fingerprint": fingerprint})
        for name in ("model.safetensors", "checkpoint.json"):
            item.add_file(os.path.join(checkpoint_path, name))
        self.run.log_artifact(item)

    def finish(self, exit_code: int = 0) -> None:
        self.run.finish(exit_code=exit_code)
        if self.folder != self.run_path:
            for folder, _, names in os.walk(os.path.join(self.folder, "wandb")):
                for name in names:
                    local = os.path.join(folder, name)
                    target = storage.join(self.run_path, os.path.relpath(local, self.folder))
                    with contextlib.suppress(OSError), open(local, "rb") as stream:
                        storage.publish(target, stream.read())


def build_tracker(experiment: Experiment, run: Run, is_main: bool) -> Tracker:
    """The tracker of this rank."""
    if not is_main or experiment.tracking.wandb == "off":
        return Tracker()
    return WandbTracker(experiment, run)


def _mode(experiment: Experiment) -> str:
    """`online` or `offline`; WANDB_MODE, where it is set, decides for `auto`."""
    if experiment.tracking.wandb != "auto":
        return experiment.tracking.wandb
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def _sends_images(experiment: Experiment, run: Run) -> bool:
    choice = experiment.tracking.images
    return choice == "on" or (choice == "auto" and run.description["dataset"] in SHAREABLE)


def _keep_files_in(folder: str) -> None:
    """Cache, artifact staging and settings stay with the run; wandb would use the home directory."""
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_CONFIG_DIR"):
        os.environ[variable] = os.path.join(folder, variable.removeprefix("WANDB_").removesuffix("_DIR").lower())
        os.makedirs(os.environ[variable], exist_ok=True)


def _flat(value: dict, prefix: str = "") -> dict:
    """Nested configuration as `train.epochs`, so that the dashboard can filter on it."""
    flat = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat
