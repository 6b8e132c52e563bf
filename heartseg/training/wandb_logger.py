"""Logs metrics to Weights & Biases; the only file that imports wandb.

A training run is one wandb run with one row per epoch, despite kills, resumes and unreachable servers; only a run
that was online or synced before and is resumed offline sends its earlier rows again.
"""

import functools
import logging
import netrc
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch
from urllib.parse import urlsplit

import numpy as np
import pandas

from heartseg.config.experiment import Experiment, flatten, from_json
from heartseg.errors import StorageError
from heartseg.labels import CLASSES
from heartseg.storage import filesystem
from heartseg.training.run_directory import Run

log = logging.getLogger(__name__)
SHAREABLE = ("CAMUS", "phantom")  # datasets whose images may be sent by default: public, or synthetic
CLOSED = "wandb_closed"  # marks a wandb run that was ended on behalf of a process that could not
# wandb's settings, each unless the environment sets it (such as WANDB_FINISH_TIMEOUT=600 for a slow connection).
SETTINGS = {
    **{"silent": True, "console": "off"},
    # Seconds to wait for a server at the start, and for unsent data at the end.
    **{"init_timeout": 10.0, "finish_timeout": 60.0, "finish_timeout_raises": True},
    "x_transaction_log_flush_interval": 1.0,  # rows are on disk every second, so that a kill loses one and not fifteen
    "x_file_stream_retry_max": 100_000,  # by default it gives up after 40 minutes, but a server may be down for a night
}


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """Make a method do nothing without a wandb run, and log wandb's first exception instead of stopping the training."""

    @functools.wraps(method)
    def call(self: "Tracker", *arguments) -> None:
        if self.run is None:
            return
        try:
            method(self, *arguments)
        except Exception as error:
            if not self.has_warned:
                rest = f"the rest is kept; upload it later with `wandb sync --include-online {self.run_path}/wandb`."
                log.warning("wandb did not accept all of this run (%s: %s): %s", method.__name__, _first_line(error), rest)
            self.has_warned = True

    return call


class Tracker:
    """The wandb run of a training run, with one row per epoch; without `run`, it tracks nothing."""

    def __init__(self, experiment: Experiment | None = None, run: Run | None = None):
        self.run, self.has_warned, self.superseded = None, False, []
        self.run_path = self.folder = run.path if run else ""
        if run is None:
            return
        if filesystem.is_uri(run.path):  # wandb writes local files only: `finish` copies them to the object store
            self.folder = tempfile.mkdtemp(prefix="heartseg-wandb-")
        _keep_files_in(os.path.join(self.folder, "wandb"))
        import wandb

        self.wandb = wandb
        images = experiment.tracking.images
        self.sends_images = images == "on" or (images == "auto" and run.description["dataset"] in SHAREABLE)
        self.run = self._start(experiment, run)

    def _start(self, experiment: Experiment, run: Run):
        """Start or resume the wandb run; offline if the server does not answer in time."""
        settings = {name: value for name, value in SETTINGS.items() if f"WANDB_{name.upper()}" not in os.environ}
        lineage, tracking = {name: run.description.get(name) for name in ("data_fingerprint", "ingest")}, experiment.tracking
        init = functools.partial(
            self.wandb.init, project=tracking.project, group=tracking.group or None, job_type=tracking.job_type,
            name=run.name, id=run.description["wandb_id"], dir=self.folder, resume="allow",
            tags=[experiment.name, run.description["dataset"], experiment.schedule.kind],
            config=flatten(run.description["identity"]) | lineage, settings=self.wandb.Settings(**settings),
        )  # fmt: skip
        mode = _asked_mode(experiment)
        try:
            started = init(mode=mode if mode != "auto" else "online" if self.has_key() else "offline")
        except Exception as error:
            later = f"this run is logged offline; upload it with `wandb sync {self.run_path}/wandb/offline-run-*`."
            log.warning("wandb did not start (%s): %s", _first_line(error), later)
            self.wandb.teardown()  # its service still holds the run's id for the failed attempt
            with patch.dict(os.environ):  # wandb refuses an invalid key, address or number even offline
                for name in _variables():
                    if not name.endswith(("_DIR", "_REPORTING")):
                        del os.environ[name]
                started = init(mode="offline")
        started.define_metric("*", step_metric="epoch")
        started.define_metric("val/dice", step_metric="epoch", summary="max")
        return started

    def has_key(self) -> bool:
        """True if there is a key for wandb's server, in the environment or from `wandb login`."""
        if os.environ.keys() & {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"}:
            return True
        path = os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")
        server = urlsplit(self.wandb.setup().settings.base_url).netloc
        try:
            return netrc.netrc(path).authenticators(server) is not None
        except (OSError, netrc.NetrcParseError):
            return False

    @_harmless
    def resume(self, record: list[dict]) -> None:
        """Log the epochs of a resumed run that the server does not have (all of them if offline).

        This process's files then hold every row that the server lacks, so earlier files are marked as synced (on an object
        store, by `finish`).
        """
        for row in record[self.run.starting_step :]:
            self.run.log(row)
        files, current = filesystem.join(self.run_path, "wandb"), os.path.basename(os.path.dirname(self.run.dir))
        names = [name for name in filesystem.list_names(files) if "run-" in name and name != current]
        self.superseded = [filesystem.join(files, name, f"run-{self.run.id}.wandb.synced") for name in names]
        if self.folder == self.run_path:
            self.mark_superseded()

    def mark_superseded(self) -> None:
        """Mark the files of earlier processes as synced."""
        for path in self.superseded:
            filesystem.publish(path, b"")

    @_harmless
    def log(self, metrics: dict[str, float]) -> None:
        """Log an epoch's metrics; `metrics["epoch"]` is the step."""
        self.run.log(metrics)

    @_harmless
    def overlays(self, epoch: int, images: np.ndarray, masks: np.ndarray, predictions: np.ndarray, names: list[str]) -> None:
        """Log images uint8 [k,H,W] with true and predicted labels [k,H,W], in the row of the epoch's metrics."""
        if not self.sends_images:
            return
        labels, pictures = dict(enumerate(CLASSES)), []
        for image, mask, prediction, name in zip(images, masks, predictions, names, strict=True):
            layers = {"prediction": prediction, "truth": mask}
            layers = {layer: {"mask_data": data, "class_labels": labels} for layer, data in layers.items()}
            pictures.append(self.wandb.Image(image, caption=name, masks=layers))
        self.run.log({"epoch": epoch, "overlays": pictures}, commit=False)

    @_harmless
    def summarize(self, values: dict[str, object]) -> None:
        """Log values that describe the whole run."""
        self.run.summary.update(values)

    @_harmless
    def pages(self, table: pandas.DataFrame, html: str) -> None:
        """Log a sweep's table and page."""
        self.run.log({"trials": self.wandb.Table(dataframe=table), "page": self.wandb.Html(html, inject=False)})

    @_harmless
    def artifact(self, checkpoint_path: str, fingerprint: str) -> None:
        """Log a checkpoint with the fingerprint of its data, unless it is on an object store."""
        if filesystem.is_uri(checkpoint_path):
            return
        item = self.wandb.Artifact(f"{self.run.id}-model", type="model", metadata={"data_fingerprint": fingerprint})
        for name in ("model.safetensors", "checkpoint.json"):
            item.add_file(os.path.join(checkpoint_path, name))
        self.run.log_artifact(item)

    @_harmless
    def finish(self, exit_code: int = 0) -> None:
        """Send the remaining rows, within `finish_timeout`."""
        try:
            self.run.finish(exit_code=exit_code)
        finally:
            if self.folder != self.run_path:
                self.move_to_store()

    def move_to_store(self) -> None:
        """Move wandb's files to the run on an object store; if the store refuses, they stay where they are."""
        try:
            found = [os.path.join(at, name) for at, _, names in os.walk(os.path.join(self.folder, "wandb")) for name in names]
            for local in filter(os.path.isfile, found):  # neither the link to the latest run's folder nor dead ones
                target = filesystem.join(self.run_path, os.path.relpath(local, self.folder))
                filesystem.publish(target, filesystem.read_bytes(local))
            self.mark_superseded()
            shutil.rmtree(self.folder, ignore_errors=True)
        except (OSError, StorageError) as error:
            fix = "upload them from there with `wandb sync`, or copy them"
            log.warning("wandb's files cannot be moved to %s (%s) and stay in %s: %s.", self.run_path, error, self.folder, fix)


def build_tracker(experiment: Experiment, run: Run, is_main: bool, record: list[dict]) -> Tracker:
    """This rank's tracker; `record` holds the run's earlier epochs."""
    for name in _variables():  # a secret mounted as a file ends with a newline; an empty variable counts as unset
        if value := os.environ.pop(name).strip():
            os.environ[name] = value
    if not is_main or _asked_mode(experiment) in ("off", "disabled"):
        return Tracker()
    try:
        tracker = Tracker(experiment, run)
    except Exception as error:
        untracked = "this run is not tracked; metrics.jsonl and metrics.csv have all metrics."
        log.warning("wandb cannot be started (%s): %s", _first_line(error), untracked)
        return Tracker()
    tracker.resume(record)
    return tracker


def close_trial(run: Run, record: list[dict], reason: str) -> None:
    """End the wandb run of a trial that was stopped from outside: send missing rows, and the reason in its summary."""
    experiment = from_json(run.description["experiment"])
    if experiment.tracking.wandb == "off" or filesystem.exists(filesystem.join(run.path, CLOSED)):
        return
    tracker = build_tracker(experiment, run, True, record)
    tracker.summarize({"stopped": reason})
    tracker.finish()
    filesystem.publish(filesystem.join(run.path, CLOSED), b"")


def track_sweep(experiment: Experiment, run: Run, table: pandas.DataFrame, page: str) -> None:
    """Log a sweep's table and page to its own wandb run, in the group of its trials."""
    own = replace(experiment, tracking=replace(experiment.tracking, job_type="sweep"))
    tracker = build_tracker(own, run, True, [])
    tracker.pages(table, filesystem.read_bytes(page).decode())
    tracker.finish()


def _asked_mode(experiment: Experiment) -> str:
    """`online`, `offline`, `off` or `auto`; for `auto`, WANDB_MODE decides if it is set."""
    asked = experiment.tracking.wandb
    return os.environ.get("WANDB_MODE", asked) if asked == "auto" else asked


def _variables() -> list[str]:
    return [name for name in os.environ if name.startswith("WANDB_")]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _keep_files_in(folder: str) -> None:
    """Keep wandb's cache and artifact staging with the run rather than in the home directory."""
    # A parent process's service would end with the parent, and keeps the id of a failed attempt.
    os.environ.pop("WANDB_SERVICE", None)
    # Its telemetry leaves the machine unasked, and delays the exit by 10 s if the server is silent.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ[variable] = os.path.join(folder, variable.removeprefix("WANDB_").removesuffix("_DIR").lower())
        os.makedirs(os.environ[variable], exist_ok=True)
