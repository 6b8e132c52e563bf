"""What an evaluation scores: whose images, which checkpoint or masks, and where the results go."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from heartseg.config.experiment import PredictConfig, canonical, to_json
from heartseg.datasets import camus
from heartseg.errors import UserError, require
from heartseg.evaluation.ground_truth import FilePredictions, ShardTruth, TreeTruth
from heartseg.models.checkpoint import find
from heartseg.shards.reader import Shards, open_shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from jobs.support import command_line

HOLDOUT = "holdout"  # the group of patients that --train.holdout took from the training group


@dataclass(frozen=True)
class ScoringOptions:
    """Which images to score, and where: what an evaluation and a comparison of runs have in common."""

    data: str = ""
    """Folder or URI of the shards; each run's own if neither this nor --truth is given."""
    truth: str = ""
    """Folder of a CAMUS tree to score on, instead of shards."""
    dataset: Literal["", "camus"] = ""
    """`camus`: the tree of --truth is the CAMUS release, fetched by other means than jobs/download.py."""
    group: Literal["auto", "train", "val", "test", "all", "holdout"] = "auto"
    """Group of patients; `auto` is test if there is one, otherwise val. `holdout`: the patients that --train.holdout took from
    the training group."""
    which: Literal["auto", "last", "best"] = "auto"
    """`best` is chosen on val; `auto` takes it only to report on test, and otherwise the last one."""
    workers: int = 1
    """Processes that predict."""
    launcher: Literal["ray", "plain"] = "ray"
    """`plain` needs no Ray and uses one process."""

    def __post_init__(self):
        require(self.workers >= 1, "--workers must be at least 1.")
        require(self.workers == 1 or self.launcher == "ray", "--launcher plain is one process: leave --workers out.")
        require(not (self.data and self.truth), "--data and --truth are two sets of images to score on: give one of them.")


@dataclass(frozen=True)
class Options(ScoringOptions):
    """What to evaluate, and where."""

    checkpoint: str = ""
    """Folder of a run, or of one of its checkpoints."""
    predictions: str = ""
    """Folder of NIfTI masks to score against --truth, instead of a checkpoint's; nnU-Net's do as well. With --group auto,
    everyone who has a mask is scored."""
    pattern: str = ""
    """File of a mask below --predictions, as {patient}/{patient}_{view}_{phase}.nii.gz; found by its name if not given."""
    ensemble: tuple[str, ...] = ()
    """Further runs on the same grid, whose class probabilities are averaged with the checkpoint's."""
    post: Annotated[PredictConfig, command_line.FLAT] = field(default_factory=PredictConfig)
    pool: tuple[str, ...] = ()
    """Instead of a checkpoint: folders of evaluations that share no patient (of folds, say), to combine; needs --out."""
    overwrite: bool = False
    """Score again although the same evaluation is complete."""
    out: str = ""
    """Folder of the results; by default in the run's, or `evaluation-NAME` here for --predictions NAME."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What is scored on which patients, and where the results go."""

    truth: ShardTruth | TreeTruth
    predictor: tuple[str, ...] | FilePredictions
    """Paths of checkpoints, an ensemble if several, or the masks."""
    patients: list[str]
    out: str
    run: str | None
    post: PredictConfig
    described: dict
    """What distinguishes these results from others; goes into `summary.json`."""


@dataclass(frozen=True)
class ScoredImages:
    """Images with a truth, by group of patients: shards or a CAMUS tree."""

    path: str
    groups: dict[str, list[str]]
    dataset: str
    shards: Shards | None = None

    @property
    def fingerprint(self) -> str:
        """What distinguishes these images from others; for a tree, the names and sizes of its files."""
        if self.shards:
            return self.shards.fingerprint
        listing = camus.CamusTree(self.path).list_files(self.groups["all"])
        return filesystem.sha256(canonical(camus.names_and_sizes(listing)))

    def truth(self, group: str) -> ShardTruth | TreeTruth:
        """The group's cases; those held out are rows of the training group."""
        group = "train" if group == HOLDOUT else group
        return ShardTruth(self.shards, group) if self.shards else TreeTruth(self.path)


def open_images(options: ScoringOptions, trained_on: str = "") -> ScoredImages:
    """The tree of --truth, or the shards of --data, or those that the run was trained on."""
    require(bool(options.truth) or not options.dataset, "--dataset is of the tree of --truth; shards know theirs.")
    if not options.truth:
        shards = open_shards(command_line.absolute(options.data or trained_on, "data"))
        return ScoredImages(shards.path, shards.groups, shards.manifest["dataset"], shards)
    path = command_line.absolute(options.truth, "truth")
    tree = camus.CamusTree(path, options.dataset)
    names = tree.patients()
    return ScoredImages(path, tree.groups() | {"all": names}, tree.dataset_name())


def choose_group(asked: str, images: ScoredImages) -> str:
    """The group asked for; `auto` is the first of test, val and all that has patients."""
    known = [name for name, patients in images.groups.items() if patients]
    group = asked if asked != "auto" else next((name for name in ("test", "val", "all") if name in known), "test")
    if group not in known:
        raise UserError(f"{images.path} has no patients in a group {group}: take one of {', '.join(known)}.")
    return group


def refuse_trained(run: run_directory.Run, group: str, images: ScoredImages) -> None:
    """Raise UserError for a group other than train that has patients whom the run was trained on."""
    seen = set(run.description["train_patients"]) & set(images.groups[group])
    # The phantom's patients and CAMUS's have the same names; those of a data set without a mark may be either's.
    known = {run.description["dataset"], images.dataset} - {"other"}
    if seen and len(known) < 2 and group != "train":
        raise UserError(
            f"{run.path} was trained on {len(seen)} patients of this {group} group: give another --group, "
            "or as --data the shards it was trained on."
        )


def held_out(run: run_directory.Run) -> list[str]:
    """The patients of the training group that a run validated on; none if its validation group was the split's."""
    return run.description["val_patients"] if run.description["identity"]["train"].get("holdout") else []


def choose_checkpoint(asked: str, group: str, images: ScoredImages, owners: Sequence[run_directory.Run]) -> str:
    """`best` or `last`; `auto` is best to report on test, unless best was chosen on some of its patients."""
    if asked != "auto":
        return asked
    chosen_on = {name for owner in owners for name in owner.description.get("val_patients", ())}
    return "best" if group == "test" and not chosen_on & set(images.groups[group]) else "last"


def plan_checkpoint(options: Options) -> EvaluationPlan:
    """The plan for a checkpoint, or for an ensemble of several."""
    first = command_line.require_flag(options.checkpoint, "--checkpoint", "the folder of a run")
    paths = [command_line.absolute(path, "checkpoint") for path in (first, *options.ensemble)]
    images = open_images(options, find(paths[0]).card["experiment"]["data"])
    owners = [run_directory.find_run(path) for path in paths]
    images = replace(images, groups=images.groups | {HOLDOUT: held_out(owners[0])})
    group = choose_group(options.group, images)
    for owner in owners:
        refuse_trained(owner, group, images)
    which = choose_checkpoint(options.which, group, images, owners)
    found = [find(path, which) for path in paths]
    described = {
        "checkpoint": ", ".join(each.path for each in found),
        "weights_sha256": [each.card["weights_sha256"] for each in found],
        "epoch": found[0].epoch, "which": which, "group": group, "post": to_json(options.post),
        "data_fingerprint": images.fingerprint, "dataset": images.dataset,
    }  # fmt: skip
    done = [f"ensemble{len(found)}"] * (len(found) > 1) + [name for name, on in to_json(options.post).items() if on]
    name = "-".join(["evaluation", group, *([] if images.shards else [filesystem.last_part(images.path)]), *done])
    out = command_line.absolute(options.out, "out") if options.out else filesystem.join(owners[0].path, name)
    checkpoints = tuple(each.path for each in found)
    patients = sorted(images.groups[group])
    return EvaluationPlan(images.truth(group), checkpoints, patients, out, owners[0].path, options.post, described)


def plan_files(options: Options) -> EvaluationPlan:
    """The plan for masks of files."""
    if options.checkpoint or options.data or options.ensemble:
        raise UserError("--predictions are scored against --truth: leave --checkpoint, --ensemble and --data out.")
    if options.post.tta:
        raise UserError("--tta runs a network, and --predictions are finished masks: leave one of them out.")
    command_line.require_flag(options.truth, "--truth", "the folder of the CAMUS tree")
    images = open_images(options)
    masks = FilePredictions.open(command_line.absolute(options.predictions, "predictions"), options.pattern)
    group = "all" if options.group == "auto" else choose_group(options.group, images)
    chosen = [name for name in images.groups[group] if options.group != "auto" or masks.has_any(name)]
    if not chosen:
        names = len(images.groups[group])
        raise UserError(f"{masks.folder} holds a mask of none of the {names} patients of {images.path}: give --pattern.")
    out = command_line.absolute(options.out or f"evaluation-{filesystem.last_part(masks.folder)}", "out")
    described = {
        "predictions": masks.folder, "truth": images.path, "group": group, "dataset": images.dataset,
        "post": to_json(options.post),
    }  # fmt: skip
    truth = TreeTruth(images.path, images=False)
    return EvaluationPlan(truth, masks, sorted(chosen), out, None, options.post, described)
