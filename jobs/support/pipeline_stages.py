"""The stages of a pipeline: their commands, what their results depend on, and whether these are complete.

A stage is one job's command line, whether it runs in this process or is submitted to a cluster. Its inputs are the
configuration that decides its result and the fingerprints of the results that it needs: equal inputs mean an equal result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple, get_args

import tyro

from heartseg.config.experiment import Experiment, from_json, identity, to_json
from heartseg.datasets.image_folder import open_source
from heartseg.errors import UserError, require
from heartseg.inference import study_files
from heartseg.models import checkpoint
from heartseg.shards.preprocessing import MAX_QUARANTINED, check_same
from heartseg.shards.reader import check_sizes, open_shards
from heartseg.shards.writer import MANIFEST, SPLITS, listing_hash, part_names
from heartseg.storage import filesystem
from heartseg.training import run_directory
from heartseg.training.worker import open_data
from heartseg.tuning.sweep import SweepPlan, experiments_to_check, find_sweep, read_trials
from jobs.support import command_line, evaluation

Kind = Literal["preprocess", "tune", "train", "evaluate", "pool", "predict"]
KINDS = get_args(Kind)
SCORES = ("summary.json", "report.html")


@dataclass(frozen=True)
class PipelineOptions:
    """The stages of the pipeline, which of them run, and where."""

    frames: Literal["stills", "sequence"] = "stills"
    """Train on the ED and ES images, or on every frame of the half sequences."""
    folds: int = 0
    """Cross-validation: train one model per fold, and pool their scores on the patients they have not seen; 0: no folds."""
    tune: int = 0
    """Trials of a sweep whose winner is then trained; 0: train the recipe itself."""
    plan: Annotated[SweepPlan, command_line.FLAT] = field(default_factory=SweepPlan)
    retry_failed: bool = False
    """Resume the sweep's failed trials."""
    max_quarantined: float = MAX_QUARANTINED
    """Largest fraction of damaged recordings to tolerate, 0 to 1; damaged recordings are quarantined (left out)."""
    patient_pattern: str = ""
    """For images/ and masks/ folders: a regular expression that matches the patient at the start of a file name; if it has a
    group, the first group is the patient."""
    dataset: Literal["", "camus"] = ""
    """`camus`: declare that --source is CAMUS, for copies that jobs/download.py did not fetch; other sources are private."""
    predict: str = ""
    """New studies, a file or a folder, to outline with the trained model, or with the ensemble of all folds' models."""
    submit: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Submit each stage as a Ray job to the cluster at RAY_API_SERVER_ADDRESS."""
    local: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the stages in this process (the default)."""
    begin: Annotated[Kind | None, tyro.conf.arg(name="from")] = None
    """First stage to run; the results of earlier stages are used as they are, even if inputs have changed."""
    until: Kind | None = None
    """Last stage to run."""
    force: tuple[str, ...] = ()
    """Stages to rerun from scratch (`train`, or a fold's `train-2of5`), changed or not; to resume a stage, leave this out."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show what would run, and why; write nothing."""
    retries: int = 1
    """Retries of a stage that fails for a reason other than a user error; each resumes from completed work."""

    def __post_init__(self):
        require(self.folds == 0 or self.folds >= 2, f"--folds must be at least 2, or 0 for none, not {self.folds}.")
        require(min(self.tune, self.retries) >= 0, f"--tune ({self.tune}) and --retries ({self.retries}) must be at least 0.")
        has_sweep_flags = self.plan != SweepPlan() or self.retry_failed
        require(self.tune > 0 or not has_sweep_flags, "Sweep options are given without a sweep: add --tune TRIALS.")
        require(not (self.submit and self.local), "--submit and --local cannot be combined: leave one of them out.")

    @property
    def unused(self) -> dict[str, str]:
        """The experiment's fields that have no effect here, and why."""
        below_out = dict.fromkeys(("data", "runs"), "the pipeline keeps its shards and runs below --out")
        of_split = ("split.kind", "split.folds", "split.fold", "split.test_share") if self.folds else ()
        return below_out | dict.fromkeys(of_split, "--folds divides the patients")

    def trained(self, experiment: Experiment) -> list[Experiment]:
        """The experiments that are trained, in all folds and trials."""
        if self.folds:
            experiment = replace(experiment, split=replace(experiment.split, kind="kfold"))
        return experiments_to_check(self.plan, experiment) if self.tune else [experiment]


class Result(NamedTuple):
    """The result of a finished stage."""

    path: str
    fingerprint: str


# The results of earlier stages, by name.
Results = Mapping[str, Result]


@dataclass(frozen=True)
class Stage:
    """One stage: a node of the pipeline's graph."""

    name: str
    job: str
    needs: tuple[str, ...]
    inputs: Callable[[Results], dict]
    """The inputs that decide the result, as plain JSON values."""
    command: Callable[[Results, bool], tuple[str, dict]]
    """Returns the result's path and the job's flags by field (`config` as an Experiment); given True, to start from scratch."""
    read_fingerprint: Callable[[str], str | None]
    """The fingerprint of the result at a path; None if it is not complete."""

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


def build_graph(experiment: Experiment, out: str, options: PipelineOptions) -> list[Stage]:
    """The stages, each after those that it needs."""
    stages: list[Stage] = []
    base = replace(experiment, out="", runs=filesystem.join(out, "runs"))
    for fold in range(options.folds or 1):
        ending, of_fold = "", base
        if options.folds:
            ending = f"-{fold + 1}of{options.folds}"
            of_fold = replace(base, split=replace(base.split, kind="kfold", folds=options.folds, fold=fold))
        of_fold = replace(of_fold, data=filesystem.join(out, shards_name(of_fold, options.frames)))
        data, sweep, run = f"preprocess{ending}", f"tune{ending}" if options.tune else "", f"train{ending}"
        stages.append(preprocess_stage(data, of_fold, options))
        if sweep:
            stages.append(tune_stage(sweep, data, of_fold, options))
        stages += [train_stage(run, data, sweep, of_fold), evaluate_stage(f"evaluate{ending}", data, run, experiment.workers)]
    if options.folds:
        stages.append(pool_stage(out, tuple(stage.name for stage in stages if stage.kind == "evaluate")))
    if options.predict:
        stages.append(predict_stage(out, tuple(stage.name for stage in stages if stage.kind == "train"), options.predict))
    return stages


def shards_name(experiment: Experiment, frames: str) -> str:
    """A folder for each grid, kind of frames and split, such as `shards-128x128-official`."""
    image, split = experiment.image, experiment.split
    fold = f"-{split.fold + 1}of{split.folds}" if split.kind == "kfold" else ""
    sequence = "-sequence" if frames == "sequence" else ""
    return f"shards-{image.height}x{image.width}{sequence}-{split.kind}{fold}"


def hash_complete(path: str, *names: str) -> str | None:
    """The hash of the first of these files, which a job writes last; None if any is missing."""
    paths = [filesystem.join(path, name) for name in names]
    return filesystem.sha256(filesystem.read_bytes(paths[0])) if all(map(filesystem.exists, paths)) else None


def preprocess_stage(name: str, experiment: Experiment, options: PipelineOptions) -> Stage:
    """The stage that writes shards; overwrites those of another source or grid, and splits again for another split."""
    path, frames, kind = experiment.data, options.frames, (options.patient_pattern, options.dataset)

    def inputs(results: Results) -> dict:
        source = open_source(experiment.source, *kind)
        listing = source.list_files(source.patients())
        files = listing_hash([patients for _, patients in part_names(list(listing), frames)], listing)
        described = {"source files": files, "groups": source.groups(), "dataset": source.dataset_name(), "frames": frames}
        return described | {"image": to_json(experiment.image), "split": to_json(experiment.split)}

    def is_outdated() -> bool:
        try:
            if filesystem.exists(filesystem.join(path, MANIFEST)):
                check_same(open_source(experiment.source, *kind), path, experiment.image, frames)
                open_shards(path)
        except UserError:
            return True
        return False

    def command(results: Results, from_scratch: bool) -> tuple[str, dict]:
        flags = {"config": replace(experiment, out=path, data=""), "frames": frames, "resplit": True}
        flags |= {"patient_pattern": options.patient_pattern, "dataset": options.dataset}
        return path, flags | {"max_quarantined": options.max_quarantined, "overwrite": from_scratch or is_outdated()}

    def read_fingerprint(path: str) -> str | None:
        if hash_complete(path, MANIFEST, SPLITS):
            check_sizes(shards := open_shards(path))
            return shards.fingerprint

    return Stage(name, "preprocess", (), inputs, command, read_fingerprint)


def tune_stage(name: str, data: str, experiment: Experiment, options: PipelineOptions) -> Stage:
    """The stage that runs a sweep; its result is `best.json`."""
    plan = to_json(options.plan)

    def inputs(results: Results, **others: int) -> dict:
        return {"configuration": identity(experiment), "plan": plan, "data": results[data].fingerprint, **others}

    def command(results: Results, from_scratch: bool) -> tuple[str, dict]:
        digest = filesystem.sha256(filesystem.json_bytes(inputs(results)))[:8]  # a larger --trials resumes the same sweep
        sweep = run_directory.generation_name(experiment.runs, f"{name}-{digest}", fresh=from_scratch)
        flags = {"config": replace(experiment, data=results[data].path), "trials": options.tune, "sweep_name": sweep}
        return filesystem.join(experiment.runs, sweep), flags | {"retry_failed": options.retry_failed} | plan

    def read_fingerprint(path: str) -> str | None:
        done = hash_complete(path, "best.json", "sweep.parquet")
        return done if done and all(trial.state for trial in read_trials(find_sweep(path))) else None

    return Stage(name, "tune", (data,), partial(inputs, trials=options.tune), command, read_fingerprint)


def train_stage(name: str, data: str, sweep: str, experiment: Experiment) -> Stage:
    """The stage that trains the recipe, or a sweep's winner on the whole training group."""

    def planned(results: Results) -> Experiment:
        base = replace(experiment, data=results[data].path)
        if not sweep:
            return base
        best = from_json(filesystem.read_json(filesystem.join(results[sweep].path, "best.json")))
        parts = {part: getattr(best, part) for part in ("model", "loss", "optim", "schedule", "augment")}
        return replace(base, **parts, train=replace(best.train, holdout=base.train.holdout))

    def inputs(results: Results) -> dict:
        return {"configuration": identity(planned(results)), "data": results[data].fingerprint}

    def command(results: Results, from_scratch: bool) -> tuple[str, dict]:
        asked = planned(results)
        name = run_directory.run_name(asked, open_data(asked))
        run = run_directory.generation_name(asked.runs, name, fresh=from_scratch)
        return filesystem.join(asked.runs, run), {"config": asked, "run_name": run}

    def read_fingerprint(path: str) -> str | None:
        finished = hash_complete(path, run_directory.MODEL_CARD, run_directory.DESCRIPTION)
        return checkpoint.find(path, "last").card["weights_sha256"] if finished else None

    return Stage(name, "train", (data, sweep) if sweep else (data,), inputs, command, read_fingerprint)


def evaluate_stage(name: str, data: str, run: str, workers: int) -> Stage:
    """The stage that scores a trained model, on the test group if there is one, otherwise on val, and writes a report."""

    def inputs(results: Results) -> dict:
        return {"run": results[run].path, "weights": results[run].fingerprint, "data": results[data].fingerprint}

    def command(results: Results, from_scratch: bool) -> tuple[str, dict]:
        asked = {"checkpoint": results[run].path, "data": results[data].path}
        out = evaluation.plan_checkpoint(evaluation.Options(**asked)).out
        return out, asked | {"workers": workers, "overwrite": from_scratch}

    return Stage(name, "evaluate", (data, run), inputs, command, lambda path: hash_complete(path, *SCORES))


def pool_stage(out: str, evaluations: tuple[str, ...]) -> Stage:
    """The stage that pools the evaluations of all folds: each patient is scored by the model that has not seen them."""
    path = filesystem.join(out, f"evaluation-{len(evaluations)}folds")
    return Stage(
        "pool", "evaluate", evaluations,
        lambda results: {"evaluations": [results[name].fingerprint for name in evaluations]},
        lambda results, _: (path, {"pool": [results[name].path for name in evaluations], "out": path}),
        lambda path: hash_complete(path, *SCORES),
    )  # fmt: skip


def predictions_path(out: str, source: str) -> str:
    """A folder for each input, so that a folder's tables list all masks in it."""
    return filesystem.join(out, f"predictions-{filesystem.last_part(source)}-{filesystem.sha256(source.encode())[:4]}")


def predict_stage(out: str, models: tuple[str, ...], source: str) -> Stage:
    """The stage that outlines new studies, with the model or with the ensemble of all folds' models."""
    path = predictions_path(out, source)

    def inputs(results: Results) -> dict:
        files = [[clip.path, filesystem.size_or_none(clip.path)] for clip in study_files.find_clips(source)]
        return {"weights": [results[name].fingerprint for name in models], "files": files}

    def command(results: Results, from_scratch: bool) -> tuple[str, dict]:
        first, *others = (results[name].path for name in models)
        return path, {"checkpoint": first, "ensemble": others, "input": source, "out": path}

    return Stage("predict", "predict", models, inputs, command, lambda path: hash_complete(path, "studies.json", "ef.csv"))
