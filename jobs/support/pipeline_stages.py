"""The stages of a pipeline: the command of each, what its result depends on, and how to see that the result is complete.

A stage is one job's command line, the same whether it runs in this process or is submitted to a cluster. Its inputs are the
configuration that decides its result and the fingerprints of what the stages before it left; equal inputs, equal result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from heartseg.config.experiment import Experiment, from_json, identity, to_json
from heartseg.datasets.source import open_source
from heartseg.errors import StorageError, UserError, require
from heartseg.inference import study_files
from heartseg.models import checkpoint
from heartseg.shards.preprocessing import MAX_QUARANTINED, check_same, check_split
from heartseg.shards.reader import check_sizes, open_shards
from heartseg.shards.writer import MANIFEST, SPLITS, listing_hash, part_names
from heartseg.storage import filesystem
from heartseg.training import run_directory
from heartseg.training.worker import open_data
from heartseg.tuning.sweep import SweepPlan, find_sweep, read_trials
from jobs.support import command_line, evaluation_plan

Kind = Literal["preprocess", "tune", "train", "evaluate", "pool", "predict"]
KINDS = get_args(Kind)


@dataclass(frozen=True)
class Work:
    """What the pipeline does."""

    frames: Literal["stills", "sequence"] = "stills"
    """Train on the ED and ES images, or on every frame of the half sequences."""
    folds: int = 0
    """Train on each of this many folds and pool the scores, each patient's by the model that has not seen it; 0: no folds."""
    tune: int = 0
    """Trials of a sweep whose winner is trained; 0 trains the recipe itself."""
    plan: Annotated[SweepPlan, command_line.FLAT] = field(default_factory=SweepPlan)
    retry_failed: bool = False
    """Resume the sweep's failed trials."""
    max_quarantined: float = MAX_QUARANTINED
    """Largest share of the recordings that may be damaged."""
    patient_pattern: str = ""
    """Where a plain folder's file names hold the patient: a regular expression for their beginning, or its first group."""
    dataset: Literal["", "camus"] = ""
    """`camus`: the source is the CAMUS release, fetched by other means than jobs/download.py; all others are private."""
    predict: str = ""
    """New studies to outline with the trained model (with those of all folds together): a file or a folder."""

    def __post_init__(self):
        require(self.folds == 0 or self.folds >= 2, "--folds must be at least 2, or 0 for none.")
        require(self.tune >= 0, "--tune must be at least 0.")
        require(self.tune > 0 or self.plan == SweepPlan(), "Options of a sweep are given, but no sweep: add --tune TRIALS.")


@dataclass(frozen=True)
class Result:
    """The result of a finished stage."""

    path: str
    fingerprint: str


# The results of the stages before, by their names.
Results = Mapping[str, Result]


@dataclass(frozen=True)
class Command:
    """A job's flags by field, the path of its result, and the experiment for its `--config`, if it takes one."""

    flags: dict
    path: str
    experiment: Experiment | None = None


@dataclass(frozen=True)
class Stage:
    """One node of the graph.

    `inputs` returns what decides the result, as plain JSON values; `command` the job's command (second argument: whether to
    start from scratch); `read_fingerprint` the fingerprint of the result at a path, None if it is not complete.
    """

    name: str
    job: str
    needs: tuple[str, ...]
    inputs: Callable[[Results], dict]
    command: Callable[[Results, bool], Command]
    read_fingerprint: Callable[[str], str | None]

    @property
    def kind(self) -> str:
        """Its name without the fold."""
        return self.name.partition("-")[0]

    def fingerprint(self, path: str) -> str | None:
        """The fingerprint of the result at a path; None if it is not complete or is damaged."""
        try:
            return self.read_fingerprint(path)
        except UserError:
            return None


def build_graph(experiment: Experiment, out: str, work: Work) -> list[Stage]:
    """The stages, each after those that it needs."""
    stages: list[Stage] = []
    for fold in range(work.folds) if work.folds else [None]:
        stages += model_stages(experiment, out, work, fold)
    if work.folds:
        stages.append(pool_stage(out, tuple(stage.name for stage in stages if stage.kind == "evaluate")))
    if work.predict:
        stages.append(predict_stage(out, tuple(stage.name for stage in stages if stage.kind == "train"), work.predict))
    return stages


def model_stages(experiment: Experiment, out: str, work: Work, fold: int | None) -> list[Stage]:
    """From the files to the scores of one model; `fold` counts from 0."""
    ending = ""
    if fold is not None:
        ending = f"-{fold + 1}of{work.folds}"
        split = replace(experiment.split, kind="kfold", folds=work.folds, fold=fold)
        experiment = replace(experiment, split=split)
    experiment = replace(experiment, data=filesystem.join(out, shards_name(experiment, work.frames)), out="")
    data, sweep, run = f"preprocess{ending}", f"tune{ending}" if work.tune else "", f"train{ending}"
    return [
        preprocess_stage(data, experiment, work),
        *([tune_stage(sweep, data, experiment, out, work)] if sweep else []),
        train_stage(run, data, sweep, experiment, out),
        evaluate_stage(f"evaluate{ending}", data, run, experiment.workers),
    ]


def shards_name(experiment: Experiment, frames: str) -> str:
    """A folder for each grid, kind of frames and split, such as `shards-128x128-official`."""
    image, split = experiment.image, experiment.split
    fold = f"-{split.fold + 1}of{split.folds}" if split.kind == "kfold" else ""
    sequence = "-sequence" if frames == "sequence" else ""
    return f"shards-{image.height}x{image.width}{sequence}-{split.kind}{fold}"


def hash_complete(path: str, *names: str) -> str | None:
    """The hash of the first of the files that a job writes last; None if one of them is missing."""
    paths = [filesystem.join(path, name) for name in names]
    return filesystem.sha256(filesystem.read_bytes(paths[0])) if all(map(filesystem.exists, paths)) else None


def preprocess_stage(name: str, experiment: Experiment, work: Work) -> Stage:
    """NIfTI to shards; overwrites or divides again what is there of another source or split."""
    frames = work.frames
    written = replace(experiment, out=experiment.data, data="")

    def inputs(results: Results) -> dict:
        source = open_source(experiment.source, work.patient_pattern, work.dataset)
        listing = source.list_files(source.patients())
        return {
            "source files": listing_hash([patients for _, patients in part_names(list(listing), frames)], listing),
            "groups": source.groups(),
            "dataset": source.dataset_name(),
            "image": to_json(experiment.image),
            "split": to_json(experiment.split),
            "frames": frames,
        }

    def outdated() -> dict[str, bool]:
        if not filesystem.exists(filesystem.join(experiment.data, MANIFEST)):
            return {}
        try:
            source = open_source(experiment.source, work.patient_pattern, work.dataset)
            manifest = check_same(source, experiment.data, experiment.image, frames)
            open_shards(experiment.data)
        except StorageError:
            raise  # a store that cannot be reached says nothing about the shards
        except UserError:
            return {"overwrite": True}
        try:
            check_split(experiment.data, experiment.split, manifest, source.groups())
        except UserError:
            return {"resplit": True}
        return {}

    def command(results: Results, from_scratch: bool) -> Command:
        changed = {"overwrite": True} if from_scratch else outdated()
        flags = {"frames": frames, "max_quarantined": work.max_quarantined} | changed
        flags |= {"patient_pattern": work.patient_pattern, "dataset": work.dataset}
        return Command(flags, experiment.data, written)

    def read_fingerprint(path: str) -> str | None:
        if not hash_complete(path, MANIFEST, SPLITS):
            return None
        shards = open_shards(path)
        check_sizes(shards)
        return shards.fingerprint

    return Stage(name, "preprocess", (), inputs, command, read_fingerprint)


def tune_stage(name: str, data: str, experiment: Experiment, out: str, work: Work) -> Stage:
    """A sweep; its result is `best.json`."""
    folder, plan = filesystem.join(out, "runs"), to_json(work.plan)

    def inputs(results: Results) -> dict:
        return {"configuration": identity(experiment), "plan": plan, "trials": work.tune, "data": results[data].fingerprint}

    def command(results: Results, from_scratch: bool) -> Command:
        # More trials resume the same sweep.
        identifying = {key: value for key, value in inputs(results).items() if key != "trials"}
        digest = filesystem.sha256(filesystem.json_bytes(identifying))[:8]
        sweep = run_directory.generation_name(folder, f"{name}-{digest}", fresh=from_scratch)
        flags = {"trials": work.tune, "sweep_name": sweep, "retry_failed": work.retry_failed} | plan
        path = filesystem.join(folder, sweep)
        return Command(flags, path, replace(experiment, data=results[data].path, runs=folder))

    def read_fingerprint(path: str) -> str | None:
        done = hash_complete(path, "best.json", "sweep.parquet")
        return done if done and all(trial.state for trial in read_trials(find_sweep(path))) else None

    return Stage(name, "tune", (data,), inputs, command, read_fingerprint)


def train_stage(name: str, data: str, sweep: str, experiment: Experiment, out: str) -> Stage:
    """One training: of the recipe, or of a sweep's winner on the whole training group."""
    folder = filesystem.join(out, "runs")

    def planned(results: Results) -> Experiment:
        base = replace(experiment, data=results[data].path, runs=folder)
        if not sweep:
            return base
        best = from_json(filesystem.read_json(filesystem.join(results[sweep].path, "best.json")))
        parts = {part: getattr(best, part) for part in ("model", "loss", "optim", "schedule", "augment")}
        return replace(base, **parts, train=replace(best.train, holdout=base.train.holdout))

    def inputs(results: Results) -> dict:
        return {"configuration": identity(planned(results)), "data": results[data].fingerprint}

    def command(results: Results, from_scratch: bool) -> Command:
        asked = planned(results)
        run = run_directory.generation_name(folder, run_directory.run_name(asked, open_data(asked)), fresh=from_scratch)
        return Command({"run_name": run}, filesystem.join(folder, run), asked)

    def read_fingerprint(path: str) -> str | None:
        finished = hash_complete(path, run_directory.MODEL_CARD, run_directory.DESCRIPTION)
        return checkpoint.find(path, "last").card["weights_sha256"] if finished else None

    return Stage(name, "train", (data, *([sweep] if sweep else [])), inputs, command, read_fingerprint)


def evaluate_stage(name: str, data: str, run: str, workers: int) -> Stage:
    """Scores and report of a trained model on its test group, otherwise on val."""

    def inputs(results: Results) -> dict:
        return {"run": results[run].path, "weights": results[run].fingerprint, "data": results[data].fingerprint}

    def command(results: Results, from_scratch: bool) -> Command:
        asked = {"checkpoint": results[run].path, "data": results[data].path}
        out = evaluation_plan.plan_checkpoint(evaluation_plan.Options(**asked)).out
        return Command(asked | {"workers": workers, "overwrite": from_scratch}, out)

    return Stage(
        name, "evaluate", (data, run), inputs, command, lambda path: hash_complete(path, "summary.json", "report.html")
    )


def pool_stage(out: str, evaluations: tuple[str, ...]) -> Stage:
    """The scores of all folds as one evaluation: each patient's by the model that has not seen it."""

    def inputs(results: Results) -> dict:
        return {"evaluations": [results[name].fingerprint for name in evaluations]}

    def command(results: Results, from_scratch: bool) -> Command:
        path = filesystem.join(out, f"evaluation-{len(evaluations)}folds")
        return Command({"pool": [results[name].path for name in evaluations], "out": path}, path)

    return Stage(
        "pool", "evaluate", evaluations, inputs, command, lambda path: hash_complete(path, "summary.json", "report.html")
    )


def predictions_path(out: str, source: str) -> str:
    """A folder for each input, so that its tables name all masks beside them."""
    return filesystem.join(out, f"predictions-{filesystem.last_part(source)}-{filesystem.sha256(source.encode())[:4]}")


def predict_stage(out: str, models: tuple[str, ...], source: str) -> Stage:
    """New studies outlined with the model, or with those of all folds together."""

    def inputs(results: Results) -> dict:
        files = [[clip.path, filesystem.size_or_none(clip.path)] for clip in study_files.find_clips(source)]
        return {"weights": [results[name].fingerprint for name in models], "files": files}

    def command(results: Results, from_scratch: bool) -> Command:
        first, *others = (results[name].path for name in models)
        path = predictions_path(out, source)
        return Command({"checkpoint": first, "ensemble": others, "input": source, "out": path}, path)

    return Stage("predict", "predict", models, inputs, command, lambda path: hash_complete(path, "studies.json", "ef.csv"))
