"""An evaluation: the plan of what to score and where to write, and the scoring, in this process or on Ray.

Ray sends these functions to workers by name, so they are in a module that every node can import.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import pandas
import torch
from tqdm import tqdm

from heartseg.config.experiment import PredictConfig, canonical, to_json
from heartseg.datasets import camus
from heartseg.errors import StorageError, UserError, require
from heartseg.evaluation import scoring
from heartseg.evaluation.ground_truth import FilePredictions, ShardTruth, TreeTruth
from heartseg.inference.segmenter import Ensemble, Segmenter, clean, load_all
from heartseg.models.checkpoint import find
from heartseg.reporting.report import write_report
from heartseg.shards.reader import Shards, open_shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from jobs.support import command_line

# Patients per task of a worker: 16 images, one or a few batches.
PATIENTS_PER_TASK = 4
# Tasks in progress per actor, being predicted or scored: a GPU is faster than many scoring cores.
TASKS_AHEAD = 16
HOLDOUT = "holdout"  # the patients that --train.holdout took from the training group


@dataclass(frozen=True)
class ScoringOptions:
    """The images to score, and where to compute: options that evaluate and compare share."""

    data: str = ""
    """Folder or URI of the shards; each run's own if neither this nor --truth is given."""
    truth: str = ""
    """Folder of a CAMUS tree to score on, instead of shards."""
    dataset: Literal["", "camus"] = ""
    """`camus`: declare that --truth is CAMUS, for copies that jobs/download.py did not fetch."""
    group: Literal["auto", "train", "val", "test", "all", "holdout"] = "auto"
    """Group of patients; `auto`: test if there is one, otherwise val. `holdout`: those that --train.holdout held out."""
    which: Literal["auto", "last", "best"] = "auto"
    """`best`: highest Dice on val. `auto`: `best` on a test group, `last` on all others, since `best` was chosen on val."""
    workers: int = 1
    """Number of processes that predict."""
    launcher: Literal["ray", "plain"] = "ray"
    """`plain` needs no Ray and uses one process."""

    def __post_init__(self):
        require(self.workers >= 1, f"--workers must be at least 1, not {self.workers}.")
        require(self.workers == 1 or self.launcher == "ray", "--launcher plain runs one process: leave --workers out.")
        require(not (self.data and self.truth), "--data and --truth both name the images to score: give one of them.")


@dataclass(frozen=True)
class Options(ScoringOptions):
    """The model or masks to evaluate, and the folder of the results."""

    checkpoint: str = ""
    """Folder of a run, or of one of its checkpoints."""
    predictions: str = ""
    """Folder of NIfTI masks (nnU-Net's, say) to score against --truth; with --group auto, all patients that have a mask."""
    pattern: str = ""
    """Path of a mask below --predictions, such as {patient}/{patient}_{view}_{phase}.nii.gz (default: found by name)."""
    ensemble: tuple[str, ...] = ()
    """Further runs on the same grid, whose class probabilities are averaged with the checkpoint's."""
    post: Annotated[PredictConfig, command_line.FLAT] = field(default_factory=PredictConfig)
    pool: tuple[str, ...] = ()
    """Instead of a checkpoint: folders of evaluations that share no patient, such as folds, to combine; needs --out."""
    overwrite: bool = False
    """Score again even if the same evaluation is complete."""
    out: str = ""
    """Folder of the results (default: in the run's folder; for --predictions NAME, `evaluation-NAME` in the current one)."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What to score on which patients, and where the results go."""

    truth: ShardTruth | TreeTruth
    predictor: tuple[str, ...] | FilePredictions
    """Paths of checkpoints, an ensemble if several, or the masks."""
    patients: list[str]
    out: str
    run: str | None
    post: PredictConfig
    described: dict
    """The facts that distinguish these results from others, for `summary.json`."""


@dataclass(frozen=True)
class ScoredImages:
    """Images with reference masks, by group of patients, from shards or a CAMUS tree."""

    path: str
    groups: dict[str, list[str]]
    dataset: str
    shards: Shards | None = None

    @property
    def fingerprint(self) -> str:
        """The shards' fingerprint; for a tree, a hash of the names and sizes of its files."""
        if self.shards:
            return self.shards.fingerprint
        listing = camus.CamusTree(self.path).list_files(self.groups["all"])
        return filesystem.sha256(canonical(camus.names_and_sizes(listing)))


def open_images(options: ScoringOptions, trained_on: str = "") -> ScoredImages:
    """The tree of --truth, or the shards of --data, or those that the run was trained on."""
    problem = "--dataset describes --truth, but shards record their own dataset"
    require(bool(options.truth) or not options.dataset, f"{problem}: leave --dataset out.")
    if not options.truth:
        shards = open_shards(command_line.absolute(options.data or trained_on, "data"))
        return ScoredImages(shards.path, shards.groups, shards.manifest["dataset"], shards)
    path = command_line.absolute(options.truth, "truth")
    tree = camus.CamusTree(path, options.dataset)
    names = tree.patients()
    return ScoredImages(path, tree.groups() | {"all": names}, tree.dataset_name())


def choose_group(asked: str, images: ScoredImages) -> str:
    """The requested group; `auto` is the first of test, val and all that has patients."""
    known = [name for name, patients in images.groups.items() if patients]
    group = asked if asked != "auto" else next((name for name in ("test", "val", "all") if name in known), "test")
    require(group in known, f"{images.path} has no patients in group {group}: use one of {', '.join(known)}.")
    return group


def refuse_trained(run: run_directory.Run, group: str, images: ScoredImages) -> None:
    """Raise UserError if the run was trained on patients of the group, unless the group is `train`."""
    seen = set(run.description["train_patients"]) & set(images.groups[group])
    # The phantom's patients and CAMUS's have the same names; an unmarked dataset may be either.
    known = {run.description["dataset"], images.dataset} - {"other"}
    fix = "give another --group, or the shards it was trained on as --data."
    message = f"{run.path} was trained on {len(seen)} patients of this {group} group: {fix}"
    require(not seen or len(known) == 2 or group == "train", message)


def held_out(run: run_directory.Run) -> list[str]:
    """The training group's patients that a run validated on; none if it used the split's validation group."""
    return run.description["val_patients"] if run.description["identity"]["train"].get("holdout") else []


def choose_checkpoint(asked: str, group: str, images: ScoredImages, owners: Sequence[run_directory.Run]) -> str:
    """`best` or `last`; `auto`: `best` on a test group, unless `best` was chosen on some of its patients; otherwise `last`."""
    chosen_on = {name for owner in owners for name in owner.description.get("val_patients", ())}
    is_fair = group == "test" and not chosen_on & set(images.groups[group])
    return asked if asked != "auto" else "best" if is_fair else "last"


def plan_checkpoint(options: Options) -> EvaluationPlan:
    """The plan for a checkpoint, or for an ensemble of several."""
    paths = [command_line.required_path(options.checkpoint, "checkpoint", "the folder of a run")]
    paths += [command_line.absolute(path, "checkpoint") for path in options.ensemble]
    images = open_images(options, find(paths[0]).card["experiment"]["data"])
    owners = [run_directory.find_run(path) for path in paths]
    images = replace(images, groups=images.groups | {HOLDOUT: held_out(owners[0])})
    group = choose_group(options.group, images)
    for owner in owners:
        refuse_trained(owner, group, images)
    which = choose_checkpoint(options.which, group, images, owners)
    found, post = [find(path, which) for path in paths], to_json(options.post)
    described = {
        "checkpoint": ", ".join(each.path for each in found), "weights_sha256": [each.card["weights_sha256"] for each in found],
        "epoch": found[0].epoch, "which": which, "group": group, "post": post, "data_fingerprint": images.fingerprint,
        "dataset": images.dataset,
    }  # fmt: skip
    done = [f"ensemble{len(found)}"] * (len(found) > 1) + [name for name, on in post.items() if on]
    name = "-".join(["evaluation", group, *([] if images.shards else [filesystem.last_part(images.path)]), *done])
    out = command_line.absolute(options.out, "out") if options.out else filesystem.join(owners[0].path, name)
    # Held-out patients are rows of the training group.
    truth = ShardTruth(images.shards, "train" if group == HOLDOUT else group) if images.shards else TreeTruth(images.path)
    checkpoints, patients = tuple(each.path for each in found), sorted(images.groups[group])
    return EvaluationPlan(truth, checkpoints, patients, out, owners[0].path, options.post, described)


def plan_files(options: Options) -> EvaluationPlan:
    """The plan for masks from files."""
    is_alone = not (options.checkpoint or options.data or options.ensemble)
    require(is_alone, "--predictions are scored against --truth: leave --checkpoint, --ensemble and --data out.")
    require(not options.post.tta, "--tta runs a network, but --predictions are finished masks: leave one of them out.")
    command_line.required_path(options.truth, "truth", "the folder of the CAMUS tree")
    images = open_images(options)
    masks = FilePredictions.open(command_line.absolute(options.predictions, "predictions"), options.pattern)
    group = "all" if options.group == "auto" else choose_group(options.group, images)
    names = images.groups[group]
    chosen = sorted(name for name in names if options.group != "auto" or masks.has_any(name))
    message = f"{masks.folder} holds no mask of the {len(names)} patients of {images.path}: give --pattern to match its files."
    require(bool(chosen), message)
    out = command_line.absolute(options.out or f"evaluation-{filesystem.last_part(masks.folder)}", "out")
    described = {"predictions": masks.folder, "truth": images.path, "group": group, "dataset": images.dataset}
    described["post"] = to_json(options.post)
    return EvaluationPlan(TreeTruth(images.path, images=False), masks, chosen, out, None, options.post, described)


def read_complete(folder: str, described: dict) -> dict | None:
    """The summary of a complete evaluation in a folder; None without one, or if it does not match `described`."""
    files = [filesystem.join(folder, name) for name in (scoring.SUMMARY, scoring.IMAGES, scoring.PATIENTS, scoring.PAGE)]
    summary = filesystem.read_json(files[0]) if all(map(filesystem.exists, files)) else {}
    return summary if summary and {name: summary.get(name) for name in described} == described else None


def score(plan: EvaluationPlan, options: Options) -> dict:
    """Score the plan's patients, write the results and return their summary; raises UserError if nothing can be scored."""
    started = time.perf_counter()
    tasks = [plan.patients[i : i + PATIENTS_PER_TASK] for i in range(0, len(plan.patients), PATIENTS_PER_TASK)]
    if options.launcher == "plain":
        predictor = Predictor(plan)
        stream = (score_predicted(predictor.predict(patients)) for patients in tasks)
    else:
        stream = score_on_ray(plan, tasks, options.workers)
    rows = images, patients, missing = [], [], []
    with tqdm(total=len(plan.patients), unit=" patients", disable=None) as bar:
        for task, scored in zip(tasks, stream, strict=True):
            for found, more in zip(rows, scored, strict=True):
                found += more
            bar.update(len(task))
    if not images:
        first = f"{missing[0]['file']} {missing[0]['reason']}"
        raise UserError(
            f"No patient can be scored ({command_line.counted(len(plan.patients), 'patient')}); the first problem: {first}."
        )
    image_rows, patient_rows = pandas.DataFrame(images), pandas.DataFrame(patients)
    summary = scoring.summarise(image_rows, patient_rows, missing)
    summary |= plan.described | {"seconds": time.perf_counter() - started}
    scoring.write_examples(plan.out, image_rows, plan.truth)
    scoring.write_results(plan.out, image_rows.drop(columns="mask"), patient_rows, summary)
    write_report(plan.out, plan.run)
    return summary


class Predictor:
    """Turns patients into cases and masks; loads the model once per process."""

    def __init__(self, plan: EvaluationPlan, cores: int = 0):
        self.plan = plan
        if cores:  # a Ray actor, which would have one thread
            command_line.configure_logging()
            torch.set_num_threads(cores)

    @functools.cached_property
    def segmenter(self) -> Segmenter | Ensemble | None:
        """The model or models; None for masks from files."""
        return load_all(self.plan.predictor) if isinstance(self.plan.predictor, tuple) else None

    def predict(self, patients: list[str]) -> tuple[list, list, list[dict]]:
        """The patients' cases without images, a mask for each, and missing cases."""
        cases, missing = self.plan.truth.cases(patients)
        if self.segmenter:
            masks, unpredicted = scoring.segment_cases(self.segmenter, cases, self.plan.post), []
        else:
            masks, unpredicted = self.plan.predictor.masks(cases)
            masks = [one and replace(one, mask=clean(one.mask, self.plan.post)) for one in masks]
        return [replace(case, image=None) for case in cases], masks, missing + unpredicted


def score_predicted(predicted: tuple[list, list, list[dict]]) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of images, patients and missing cases, from the results of `Predictor.predict`."""
    cases, masks, missing = predicted
    return *scoring.score_patients(cases, masks), missing


def score_on_ray(plan: EvaluationPlan, tasks: list[list[str]], workers: int) -> Iterator[tuple]:
    """Predict on actors (with a GPU each, if any) and score on CPUs meanwhile; results are in the order of the tasks."""
    import ray
    from ray.util import ActorPool

    from jobs.support import ray_runtime

    ray_runtime.start_ray(workers)
    share = ray_runtime.worker_resources(workers)
    if "GPU" in share:
        workers = min(workers, ray_runtime.room_for(1))  # results come in order: an actor without a GPU would hold them up
    # Without GPUs, the actors' threads use every core: they reserve half of each, to leave room for scoring.
    resources = {"num_gpus": 1, "num_cpus": 1} if "GPU" in share else {"num_cpus": share["CPU"] / 2}
    tries = {"max_restarts": ray_runtime.MAX_TRIES, "max_task_retries": ray_runtime.MAX_TRIES}
    predictor, scorer = ray.remote(**resources, **tries)(Predictor), ray.remote(num_cpus=0.5)(score_predicted)
    actors = [predictor.remote(plan, int(share["CPU"])) for _ in range(workers)]
    pool = ActorPool(actors * TASKS_AHEAD)
    try:
        yield from pool.map(lambda actor, patients: scorer.remote(actor.predict.remote(patients)), tasks)
    except ray.exceptions.RayTaskError as error:
        cause = error
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        raise (cause if isinstance(cause, (UserError, StorageError)) else error) from None
