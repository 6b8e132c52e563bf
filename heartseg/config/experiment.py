"""The experiment as frozen dataclasses, strictly converted to and from JSON. A field's docstring is its `--help` text."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import cattrs
import numpy as np

from heartseg.config.training import AugmentConfig, LossConfig, OptimConfig, ScheduleConfig, TrainConfig
from heartseg.errors import UserError, require


@dataclass(frozen=True)
class ImageConfig:
    """The grid that shards store images on."""

    height: int
    """Rows (depth) of a stored image, in pixels."""
    width: int
    """Columns (lateral) of a stored image, in pixels."""

    def __post_init__(self):
        fits = min(self.height, self.width) >= 32 and max(self.height, self.width) <= 2048
        require(fits, f"image.height ({self.height}) and image.width ({self.width}) must be 32 to 2048 pixels.")


@dataclass(frozen=True)
class SplitConfig:
    """How patients are divided into groups; all images of a patient are in the same group."""

    kind: Literal["official", "ratio", "kfold"]
    """`official`: the source's own groups. `ratio`: a seeded draw by patient. `kfold`: cross-validation, one fold per run."""
    test_share: float = 0.2
    """Size of the test group, as a share of all patients (ratio only)."""
    val_share: float = 0.0
    """Size of the validation group, as a share of all patients (ratio) or of those outside the test group (kfold)."""
    seed: int = 0
    """Seed of the draw (ratio and kfold)."""
    folds: int = 5
    """Number of folds; each patient is in the test group of exactly one (kfold only)."""
    fold: int = 0
    """Index of the fold that is this run's test group, from 0 to folds - 1 (kfold only)."""
    stratify: bool = True
    """Give every group its share of each ejection-fraction class and image quality, where known (ratio and kfold)."""

    def __post_init__(self):
        test, val = self.test_share, self.val_share
        message = f"split.test_share ({test}) and split.val_share ({val}) must be at least 0, and their sum between 0 and 1."
        require(min(test, val) >= 0 and 0 < test + val < 1, message)
        require(self.folds >= 2, f"split.folds must be at least 2, not {self.folds}.")
        fits = 0 <= self.fold < self.folds
        require(fits, f"split.fold must be from 0 to {self.folds - 1} (split.folds - 1), not {self.fold}.")


@dataclass(frozen=True)
class ModelConfig:
    """DeepLabv3 with one input channel and four outputs."""

    backbone: Literal["resnet101", "resnet50", "mobilenet_v3_large"]
    """Backbone, as in torchvision."""
    pretrained: bool = False
    """Start from ImageNet weights, which torchvision downloads."""
    decoder: bool = False
    """Add the decoder of DeepLabv3+, which refines outlines with features at a quarter of the image's resolution."""
    aux_head: bool = False
    """Train a second head on an earlier layer."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation layers; `group` uses no batch statistics, for workers with very few images each."""
    sync_bn: Literal["auto", "on", "off"] = "auto"
    """Compute batch statistics over all workers' images (GPUs only); `auto`: if each has fewer than 8 at a time."""
    bn_momentum: float = 0.1
    """Momentum of the running statistics of batch normalisation."""
    dropout: float = 0.5
    """Dropout before the head's last convolution."""

    def __post_init__(self):
        require(0 <= self.dropout < 1, f"model.dropout must be at least 0 and below 1, not {self.dropout}.")
        require(0 < self.bn_momentum <= 1, f"model.bn_momentum must be above 0 and at most 1, not {self.bn_momentum}.")

    @property
    def title(self) -> str:
        """The network's name in a report: DeepLabv3+ is DeepLabv3 with the decoder."""
        return f"DeepLabv3{'+' * self.decoder} ({self.backbone})"


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """`auto`: online if WANDB_API_KEY is set or after `wandb login`, otherwise offline."""
    project: str = "heartseg"
    """Project on the dashboard."""
    group: str = ""
    """Group on the dashboard, for runs that belong together; a sweep's trials are grouped by its name."""
    job_type: str = "train"
    """Job type on the dashboard; `trial` in a sweep."""
    images: Literal["auto", "on", "off"] = "auto"
    """Send overlays; `auto`: for CAMUS and the phantom only. Other patients' images stay local unless you set `on`."""


@dataclass(frozen=True)
class PredictConfig:
    """Test-time augmentation and postprocessing; off by default, so that scores are the network's own."""

    tta: bool = False
    """Test-time augmentation: average over five slightly shifted copies of the image, at five times the cost."""
    largest_component: bool = False
    """Keep only the largest connected component of each structure: LV cavity, myocardium and left atrium."""
    fill_holes: bool = False
    """Fill small holes in LV cavity and left atrium, and small gaps enclosed by the structures."""


@dataclass(frozen=True)
class Experiment:
    """Everything that defines a run: a recipe and any changes to it."""

    name: str
    """Name of the recipe; runs are named after it."""
    image: ImageConfig
    split: SplitConfig
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    train: TrainConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    source: str = ""
    """Folder or URI of the CAMUS tree, or of a folder with images/ and masks/ (default: HEARTSEG_SOURCE)."""
    data: str = ""
    """Folder or URI of the shards (default: HEARTSEG_DATA)."""
    out: str = ""
    """Where preprocess and pipeline write."""
    runs: str = ""
    """Folder or URI of the training runs (default: HEARTSEG_RUNS, otherwise `runs`)."""
    workers: int = 1
    """Processes: parallel tasks in preprocess, DistributedDataParallel ranks in training. `1:4` is 4 with --min-workers 1."""
    min_workers: int = 0
    """Fewest workers to continue with if nodes are lost, until new nodes join; 0 requires all workers."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints, in seconds: a killed run loses no more than that, and the epoch in progress. The last
    epoch and a run that is stopped always leave one; 0 writes one after every epoch."""
    ingest: Literal["auto", "memory", "stream"] = "auto"
    """How training reads shards: all into `memory`, or as a `stream`, shuffled part by part; `auto` chooses by free memory."""

    def __post_init__(self):
        require(self.workers >= 1, f"--workers must be at least 1, not {self.workers}.")
        seconds = self.checkpoint_seconds
        require(0 <= seconds < math.inf, f"--checkpoint-seconds must be finite and at least 0, not {seconds}.")
        fits = 0 <= self.min_workers <= self.workers
        require(fits, f"--min-workers must be at least 0 and no more than --workers ({self.workers}), not {self.min_workers}.")


# The fields that determine a run's result; the others are where it runs and what it reports.
IDENTITY = ("image", "model", "loss", "optim", "schedule", "augment", "train")

# Fields that have an effect only for some values of another field.
ACTS_WITH = {
    "schedule.kind": {
        "schedule.power": "polynomial", "schedule.factor": "step multistep plateau", "schedule.step_share": "step",
        "schedule.milestones": "multistep", "schedule.final": "exponential", "schedule.cycles": "restarts",
        "schedule.cycle_growth": "restarts", "schedule.rise": "one_cycle", "schedule.patience": "plateau",
    },
    "split.kind": {
        "split.test_share": "ratio", "split.val_share": "ratio kfold", "split.seed": "ratio kfold",
        "split.stratify": "ratio kfold", "split.folds": "kfold", "split.fold": "kfold",
    },
    "model.norm": dict.fromkeys(("model.sync_bn", "model.bn_momentum"), "batch"),
    "model.aux_head": {"loss.aux_weight": "True"},
    "tracking.wandb": {f"tracking.{name}": "auto online offline" for name in ("project", "group", "job_type", "images")},
}  # fmt: skip


def without_effect(experiments: Sequence[Experiment]) -> dict[str, str]:
    """The fields of ACTS_WITH that have no effect in any of the experiments, with the reason."""
    values = [flatten(to_json(one)) for one in experiments]
    return {
        name: f"it applies only with --{other.replace('_', '-')} {needed.replace(' ', ' or ')}"
        for other, fields in ACTS_WITH.items()
        for name, needed in fields.items()
        if not {str(one[other]) for one in values} & {*needed.split()}
    }


def to_json(value: object) -> dict:
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(value)))  # tuples become lists


def identity(experiment: Experiment) -> dict:
    """The fields of an experiment that determine its result, as plain JSON values."""
    # Memory and stream differ in image order. What `auto` chooses depends on the machine; the run's directory records it.
    asked = {"ingest": experiment.ingest} if experiment.ingest != "auto" else {}
    return {part: to_json(getattr(experiment, part)) for part in IDENTITY} | asked


def canonical(value: object) -> bytes:
    """JSON whose bytes depend on the value alone, for hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def none_if_nan(value: object) -> object:
    """The value in a form that JSON allows: NaN and infinity become None, NumPy floats Python's; others are unchanged."""
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def from_json(value: dict, kind: type = Experiment, origin: str = "the configuration"):
    """Build a dataclass from JSON values; raises UserError naming `origin` and the unknown or missing key or wrong value."""
    require(isinstance(value, dict), f"Bad configuration: {origin} is not a JSON object.")
    try:
        return _converter.structure(value, kind)
    except Exception as error:
        problems = cattrs.transform_error(error, path=origin, format_exception=_problem)
        raise UserError(f"Bad configuration: {problems[0].rstrip('.')}.") from error


def _problem(error: BaseException, kind: type | None) -> str:
    """The message of an error that heartseg raised, otherwise the converter's description of it."""
    if isinstance(error, UserError):
        return str(error).rstrip(".")
    return str(error) if isinstance(error, ValueError) else cattrs.v.format_exception(error, kind)


def _check_kind(value: object, kind: type):
    """Accept an int for a float, but not a bool for an int, although Python would; other types must match."""
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{value!r} is not of type {kind.__name__}")
    return value


_converter = cattrs.Converter(forbid_extra_keys=True)
for _kind in (int, float, str, bool):
    _converter.register_structure_hook(_kind, _check_kind)


def first_difference(old: dict, new: dict, prefix: str = "") -> str | None:
    """The first field in which two configurations differ, as `train.epochs: 10 there, 20 requested`; None if equal."""
    there, asked = flatten(old, prefix), flatten(new, prefix)
    differing = sorted(name for name in there.keys() | asked.keys() if there.get(name) != asked.get(name))
    return f"{differing[0]}: {there.get(differing[0])} there, {asked.get(differing[0])} requested" if differing else None


def flatten(value: dict, prefix: str = "") -> dict[str, object]:
    """Nested values by their dotted names, such as `train.epochs`; an empty dict is a value."""
    flat = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}{key}.") if isinstance(inner, dict) and inner else {f"{prefix}{key}": inner}
    return flat
