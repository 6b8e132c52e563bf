"""Metrics to Weights & Biases, or to nobody; the only file that knows wandb.

A tracked run is one wandb run with one row an epoch, whatever happened on the way: a kill, a resume, a server that is silent.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas

from heartseg.config.experiment import Experiment, flatten, from_json
from heartseg.errors import StorageError
from heartseg.labels import CLASSES
from heartseg.storage import filesystem
from heartseg.training.run_directory import Run

log = logging.getLogger(__name__)
# Datasets whose images may leave the machine unasked: one is public, the other is nobody's heart.
SHAREABLE = ("CAMUS", "phantom")
# Marks a run that was ended for a process that could not.
CLOSED = "wandb_closed"
# wandb's settings, each unless the environment has its own (WANDB_FINISH_TIMEOUT=600 for a slow line, say).
SETTINGS = {
    "silent": True,
    "console": "off",
    # Seconds to wait for a server at the start, and for what is not sent yet at the end.
    "init_timeout": 10.0,
    "finish_timeout": 60.0,
    "finish_timeout_raises": True,
    # Rows reach the disk each second, so that a kill costs one and not fifteen.
    "x_transaction_log_flush_interval": 1.0,
    # wandb gives up sending for good after 40 minutes else: a server may be away for a night.
    "x_file_stream_retry_max": 100_000,
}


class Tracker:
    """Tracks nothing: what every rank but the first has, and every run that asked for none."""

    def log(self, metrics: dict[str, float]) -> None:
        """Record an epoch's metrics; `metrics["epoch"]` is the step."""

    def overlays(self, epoch: int, images: np.ndarray, masks: np.ndarray, predictions: np.ndarray, names: list[str]) -> None:
        """Record images uint8 [k,H,W] with true and predicted labels [k,H,W]."""

    def artifact(self, checkpoint_path: str, fingerprint: str) -> None:
        """Record a checkpoint with its lineage to the data."""

    def summarize(self, values: dict[str, object]) -> None:
        """Record what is true of the whole run."""

    def pages(self, table: pandas.DataFrame, html: str) -> None:
        """Record a table and a page."""

    def finish(self, exit_code: int = 0) -> None:
        """Send what is left."""


class WandbTracker(Tracker):
    """One wandb run per training run, one row an epoch; a resumed training goes on with the same run id.

    `record` is what a resumed training did before. Of it, the rows that a kill left out are logged first.
    """

    def __init__(self, experiment: Experiment, run: Run, record: list[dict]):
        # wandb writes to local files only; for a run on an object store they are copied there at the end.
        self.run_path = run.path
        self.folder = tempfile.mkdtemp(prefix="heartseg-wandb-") if filesystem.is_uri(run.path) else run.path
        _prepare(os.path.join(self.folder, "wandb"))
        import wandb

        self.wandb, self.lost = wandb, False
        self.send_images = _sends_images(experiment, run)
        earlier = self._fragments() if record else []
        self.run, is_online = self._start(experiment, run)
        with self._harmless("resume"):
            if is_online:
                # The server counts what it has and gets what it lacks: of the earlier fragments nothing is left to send.
                missing, spent = record[self.run.starting_step :], earlier
            else:
                last_epochs = {fragment: _last_epoch(fragment) for fragment in earlier}
                missing = [row for row in record if row["epoch"] > max(last_epochs.values(), default=0)]
                # A fragment without a whole record, which an early kill leaves, would stop `wandb sync` for all of them.
                spent = [fragment for fragment, epoch in last_epochs.items() if not epoch]
            for row in missing:
                self.run.log(row)
            for fragment in spent:
                fragment.with_suffix(".wandb.synced").touch()

    def _start(self, experiment: Experiment, run: Run):
        """Begin or go on; offline where the server does not answer in time. Returns wandb's run, and whether it is online."""
        settings = {name: value for name, value in SETTINGS.items() if f"WANDB_{name.upper()}" not in os.environ}
        arguments = {
            "project": experiment.tracking.project,
            "group": experiment.tracking.group or None,
            "name": run.name,
            "id": run.description["wandb_id"],
            "dir": self.folder,
            "resume": "allow",
            "job_type": experiment.tracking.job_type,
            "tags": [experiment.name, run.description["dataset"], experiment.schedule.kind],
            "config": flatten(run.description["identity"])
            | {name: run.description.get(name) for name in ("data_fingerprint", "ingest")},
            "settings": self.wandb.Settings(**settings),
        }
        mode = _mode(experiment)
        try:
            started = self.wandb.init(mode=mode, **arguments)
        except self.wandb.errors.Error as error:
            reason = str(error).partition("\n")[0]
            log.warning(
                "wandb cannot be reached (%s): this run is kept offline, `wandb sync %s/wandb/offline-run-*` sends it later.",
                reason,
                self.run_path,
            )
            mode = "offline"
            self.wandb.teardown()  # its service holds the run's id for the attempt that failed
            started = self.wandb.init(mode=mode, **arguments)
        started.define_metric("*", step_metric="epoch")
        started.define_metric("val/dice", step_metric="epoch", summary="max")
        return started, mode not in ("offline", "dryrun", "disabled")

    def _fragments(self) -> list[Path]:
        """The files of this run's earlier processes, oldest first."""
        if self.folder != self.run_path:
            _fetch(filesystem.join(self.run_path, "wandb"), os.path.join(self.folder, "wandb"))
        return sorted(Path(self.folder).glob("wandb/*run-*/run-*.wandb"))

    @contextlib.contextmanager
    def _harmless(self, what: str) -> Iterator[None]:
        """Whatever wandb raises after the start is said once and never stops a training."""
        try:
            yield
        except Exception as error:
            if not self.lost:
                reason = str(error).partition("\n")[0] or type(error).__name__
                log.warning(
                    "wandb did not take all of this run (%s: %s): the rest is kept, `wandb sync --include-online %s/wandb` "
                    "sends it later.",
                    what,
                    reason,
                    self.run_path,
                )
            self.lost = True

    def log(self, metrics: dict[str, float]) -> None:
        with self._harmless("log"):
            self.run.log(metrics)

    def overlays(self, epoch: int, images: np.ndarray, masks: np.ndarray, predictions: np.ndarray, names: list[str]) -> None:
        if not self.send_images:
            return
        with self._harmless("overlays"):
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
            # They wait for the epoch's metrics, so that an epoch is one row.
            self.run.log({"epoch": epoch, "overlays": pictures}, commit=False)

    def summarize(self, values: dict[str, object]) -> None:
        with self._harmless("summary"):
            self.run.summary.update(values)

    def pages(self, table: pandas.DataFrame, html: str) -> None:
        with self._harmless("pages"):
            self.run.log({"trials": self.wandb.Table(dataframe=table), "page": self.wandb.Html(html, inject=False)})

    def artifact(self, checkpoint_path: str, fingerprint: str) -> None:
        if filesystem.is_uri(checkpoint_path):
            return
        with self._harmless("artifact"):
            item = self.wandb.Artifact(f"{self.run.id}-model", type="model", metadata={"data_fingerprint": fingerprint})
            for name in ("model.safetensors", "checkpoint.json"):
                item.add_file(os.path.join(checkpoint_path, name))
            self.run.log_artifact(item)

    def finish(self, exit_code: int = 0) -> None:
        with self._harmless("finish"):
            self.run.finish(exit_code=exit_code)
        if self.folder != self.run_path:
            try:
                _copy_to_store(self.folder, self.run_path)
                shutil.rmtree(self.folder, ignore_errors=True)
            except (OSError, StorageError) as error:
                log.warning("wandb's files stay in %s: %s", self.folder, error)


def _copy_to_store(folder: str, run_path: str) -> None:
    for path, _, names in os.walk(os.path.join(folder, "wandb")):
        for name in names:
            local = os.path.join(path, name)
            if os.path.isfile(local):  # and no link to a log that wandb has removed
                with open(local, "rb") as stream:
                    filesystem.publish(filesystem.join(run_path, os.path.relpath(local, folder)), stream.read())


def build_tracker(experiment: Experiment, run: Run, is_main: bool, record: list[dict]) -> Tracker:
    """The tracker of this rank; `record` is what the run did before, epoch by epoch."""
    if not is_main or experiment.tracking.wandb == "off":
        return Tracker()
    try:
        return WandbTracker(experiment, run, record)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        log.warning("wandb cannot be started (%s): this run is not tracked, metrics.jsonl and metrics.csv hold it all.", reason)
        return Tracker()


def close_trial(run: Run, record: list[dict], reason: str) -> None:
    """End a run of the dashboard whose process was ended from outside; its summary says why, and what it lacked is sent."""
    experiment = from_json(run.description["experiment"])
    if experiment.tracking.wandb == "off" or filesystem.exists(filesystem.join(run.path, CLOSED)):
        return
    tracker = build_tracker(experiment, run, True, record)
    tracker.summarize({"stopped": reason})
    tracker.finish()
    filesystem.publish(filesystem.join(run.path, CLOSED), b"")


def track_sweep(experiment: Experiment, run: Run, table: pandas.DataFrame, page: str) -> None:
    """A sweep's own run of the dashboard, beside its trials in their group: the table and the page."""
    alone = replace(experiment, tracking=replace(experiment.tracking, job_type="sweep"))
    tracker = build_tracker(alone, run, True, [])
    tracker.pages(table, filesystem.read_bytes(page).decode())
    tracker.finish()


def _mode(experiment: Experiment) -> str:
    """`online` or `offline`; WANDB_MODE, where it is set, decides for `auto`."""
    if experiment.tracking.wandb != "auto":
        return experiment.tracking.wandb
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def _sends_images(experiment: Experiment, run: Run) -> bool:
    choice = experiment.tracking.images
    return choice == "on" or (choice == "auto" and run.description["dataset"] in SHAREABLE)


def _prepare(folder: str) -> None:
    """Cache, artifact staging and settings stay with the run; wandb would use the home directory.

    Its own error reports are off: they leave the machine unasked, and hold a process for 10 s where the server is silent.
    A parent process's service is not shared: it would end with the parent, and keep the id of an attempt that failed.
    """
    os.environ.pop("WANDB_SERVICE", None)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_CONFIG_DIR"):
        os.environ[variable] = os.path.join(folder, variable.removeprefix("WANDB_").removesuffix("_DIR").lower())
        os.makedirs(os.environ[variable], exist_ok=True)


def _last_epoch(fragment: Path) -> int:
    """The last epoch whose row is in a `.wandb` file; 0 where there is none, or where a kill left no whole record."""
    asked = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(fragment)]
    shown = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout
    rows = [json.loads(line)["history"]["item"] for line in shown.splitlines() if '"type":"history"' in line]
    return max((int(row.get("epoch", 0)) for row in rows), default=0)


def _fetch(source: str, target: str) -> None:
    """Copy the `.wandb` files of earlier processes, which alone tell what was logged, from an object store."""
    for name in filesystem.list_names(source):
        if "run-" not in name:
            continue
        for inner in filesystem.list_names(filesystem.join(source, name)):
            if ".wandb" in inner:
                os.makedirs(os.path.join(target, name), exist_ok=True)
                Path(target, name, inner).write_bytes(filesystem.read_bytes(filesystem.join(source, name, inner)))
