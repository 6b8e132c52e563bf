"""The stages of a pipeline: what each runs, what its result depends on, and how it is seen whether that is there.

A stage is one job's command line, the same whether it runs in this process or is submitted to a cluster. Its inputs are the
configuration that decides its result and the fingerprints of what the stages before it left; equal inputs, equal result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

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
from heartseg.tuning.sweep import Plan, find_sweep, read_trials
from jobs.support import command_line, evaluation_plan

KINDS = ("preprocess", "tune", "train", "evaluate", "pool", "predict")


@dataclass(frozen=True)
class Work:
    """Which stages there are."""

    frames: Literal["stills", "sequence"] = "stills"
    """Train on the ED and ES images, or on every frame of the half sequences."""
    folds: int = 0
    """Train on each of so many folds, and pool the scores of every patient by the model that has not seen them; 0: no folds."""
    tune: int = 0
    """Trials of a sweep whose winner is trained; 0 trains the recipe itself."""
    plan: Annotated[Plan, command_line.FLAT] = field(default_factory=Plan)
    retry_failed: bool = False
    """Train the sweep's failed trials on."""
    max_quarantined: float = MAX_QUARANTINED
    """Largest share of the recordings that may be damaged."""
    predict: str = ""
    """New studies to outline with the trained model (with all folds' together): a file or a folder."""

    def __post_init__(self):
        require(self.folds == 0 or self.folds >= 2, "--folds must be at least 2, or 0 for none.")
        require(self.tune >= 0, "--tune must be at least 0.")
        require(self.tune > 0 or self.plan == Plan(), "A sweep is described and there is none: give --tune TRIALS.")


@dataclass(frozen=True)
class Result:
    """What a finished stage left: where, and a fingerprint of it."""

    path: str
    fingerprint: str


# What the stages before have left, by their names.
Results = Mapping[str, Result]


@dataclass(frozen=True)
class Command:
    """A job's arguments, where its result will be, and the complete experiment that `--config` reads, where it takes one."""

    arguments: list[str]
    path: str
    experiment: Experiment | None = None


@dataclass(frozen=True)
class Stage:
    """One node of the graph.

    `inputs` says what decides the result, as plain JSON values; `command` makes the job's arguments (the second argument:
    make it anew); `look` gives the fingerprint of what lies at a path, None where nothing complete does.
    """

    name: str
    job: str
    needs: tuple[str, ...]
    inputs: Callable[[Results], dict]
    command: Callable[[Results, bool], Command]
    look: Callable[[str], str | None]

    @property
    def kind(self) -> str:
        """Its name without the fold."""
        return self.name.partition("-")[0]

    def seen(self, path: str) -> str | None:
        """`look`, where what is broken is not complete."""
        try:
            return self.look(path)
        except UserError:
            return None


def build_graph(experiment: Experiment, out: str, work: Work) -> list[Stage]:
    """The stages in an order in which each comes after what it needs."""
    stages: list[Stage] = []
    for fold in range(work.folds) if work.folds else [None]:
        stages += model_stages(experiment, out, work, fold)
    models = [stage.name for stage in stages if stage.kind == "train"]
    if work.folds:
        stages.append(pool_stage(out, tuple(stage.name for stage in stages if stage.kind == "evaluate")))
    if work.predict:
        stages.append(predict_stage(out, tuple(models), work.predict))
    return stages


def model_stages(experiment: Experiment, out: str, work: Work, fold: int | None) -> list[Stage]:
    """From files to the scores of one model; `fold` is its number from 0 where there are any."""
    ending = "" if fold is None else f"-{fold + 1}of{work.folds}"
    if fold is not None:
        split = replace(experiment.split, kind="kfold", folds=work.folds, fold=fold)
        experiment = replace(experiment, split=split)
    experiment = replace(experiment, data=filesystem.join(out, shards_name(experiment, work.frames)), out="")
    first = preprocess_stage(f"preprocess{ending}", experiment, work)
    swept = [tune_stage(f"tune{ending}", first.name, experiment, out, work)] if work.tune else []
    trained = train_stage(f"train{ending}", first.name, swept[0].name if swept else "", experiment, out)
    return [first, *swept, trained, evaluate_stage(f"evaluate{ending}", first.name, trained.name, experiment.workers)]


def shards_name(experiment: Experiment, frames: str) -> str:
    """A folder for each grid, kind of frames and division, as `shards-128x128-official`."""
    image, split = experiment.image, experiment.split
    fold = f"-{split.fold + 1}of{split.folds}" if split.kind == "kfold" else ""
    sequence = "-sequence" if frames == "sequence" else ""
    return f"shards-{image.height}x{image.width}{sequence}-{split.kind}{fold}"


def complete(path: str, *names: str) -> str | None:
    """The hash of the first of some files, which a job writes last; None where one of them is missing."""
    paths = [filesystem.join(path, name) for name in names]
    return filesystem.sha256(filesystem.read_bytes(paths[0])) if all(map(filesystem.exists, paths)) else None


def preprocess_stage(name: str, experiment: Experiment, work: Work) -> Stage:
    """NIfTI to shards; those of another source or split that lie in their place are written or divided anew."""
    frames = work.frames
    written = replace(experiment, out=experiment.data, data="")

    def inputs(results: Results) -> dict:
        source = open_source(experiment.source)
        listing = source.list_files(source.patients())
        return {
            "source files": listing_hash([patients for _, patients in part_names(list(listing), frames)], listing),
            "groups": source.groups(),
            "image": to_json(experiment.image),
            "split": to_json(experiment.split),
            "frames": frames,
        }

    def outdated() -> list[str]:
        if not filesystem.exists(filesystem.join(experiment.data, MANIFEST)):
            return []
        try:
            source = open_source(experiment.source)
            manifest = check_same(source, experiment.data, experiment.image, frames)
            open_shards(experiment.data)
        except StorageError:
            raise  # a store that cannot be reached says nothing about the shards
        except UserError:
            return ["--overwrite"]
        try:
            check_split(experiment.data, experiment.split, manifest, source.groups())
        except UserError:
            return ["--resplit"]
        return []

    def command(results: Results, anew: bool) -> Command:
        changed = ["--overwrite"] if anew else outdated()
        arguments = ["--frames", frames, "--max-quarantined", str(work.max_quarantined), *changed]
        return Command(arguments, experiment.data, written)

    def look(path: str) -> str | None:
        if not complete(path, MANIFEST, SPLITS):
            return None
        shards = open_shards(path)
        check_sizes(shards)
        return shards.fingerprint

    return Stage(name, "preprocess", (), inputs, command, look)


def tune_stage(name: str, data: str, experiment: Experiment, out: str, work: Work) -> Stage:
    """A sweep; its result is `best.json`."""
    folder = filesystem.join(out, "runs")

    def inputs(results: Results) -> dict:
        told = {"configuration": identity(experiment), "plan": to_json(work.plan), "trials": work.tune}
        return told | {"data": results[data].fingerprint}

    def command(results: Results, anew: bool) -> Command:
        # With more trials, the same sweep goes on.
        same = {key: value for key, value in inputs(results).items() if key != "trials"}
        sweep = run_directory.generation_name(
            folder, f"{name}-{filesystem.sha256(filesystem.json_bytes(same))[:8]}", fresh=anew
        )
        retried = ["--retry-failed"] if work.retry_failed else []
        return Command(
            ["--trials", str(work.tune), "--sweep-name", sweep, *retried, *plan_arguments(work.plan)],
            filesystem.join(folder, sweep), replace(experiment, data=results[data].path, runs=folder),
        )  # fmt: skip

    def look(path: str) -> str | None:
        done = complete(path, "best.json", "sweep.parquet")
        return done if done and all(trial.state for trial in read_trials(find_sweep(path))) else None

    return Stage(name, "tune", (data,), inputs, command, look)


def plan_arguments(plan: Plan) -> list[str]:
    """A sweep's plan as the flags of jobs/tune.py; what is as usual is left out."""
    usual, told, words = to_json(Plan()), to_json(plan), []
    flat = {f"space.{name}": value for name, value in told.pop("space").items() if value != usual["space"][name]}
    flat |= {name: value for name, value in told.items() if name != "space" and value != usual[name]}
    for name, value in flat.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


def train_stage(name: str, data: str, swept: str, experiment: Experiment, out: str) -> Stage:
    """One training: of the recipe, or of the winner of a sweep on the whole training group."""
    folder = filesystem.join(out, "runs")

    def planned(results: Results) -> Experiment:
        base = replace(experiment, data=results[data].path, runs=folder)
        if not swept:
            return base
        best = from_json(filesystem.read_json(filesystem.join(results[swept].path, "best.json")))
        parts = {part: getattr(best, part) for part in ("model", "loss", "optim", "schedule", "augment")}
        return replace(base, **parts, train=replace(best.train, holdout=base.train.holdout))

    def inputs(results: Results) -> dict:
        return {"configuration": identity(planned(results)), "data": results[data].fingerprint}

    def command(results: Results, anew: bool) -> Command:
        asked = planned(results)
        named = run_directory.generation_name(folder, run_directory.run_name(asked, open_data(asked)), fresh=anew)
        return Command(["--run-name", named], filesystem.join(folder, named), asked)

    def look(path: str) -> str | None:
        finished = complete(path, run_directory.MODEL_CARD, run_directory.DESCRIPTION)
        return checkpoint.find(path, "last").card["weights_sha256"] if finished else None

    return Stage(name, "train", (data, *([swept] if swept else [])), inputs, command, look)


def evaluate_stage(name: str, data: str, trained: str, workers: int) -> Stage:
    """Scores and report of a trained model on its test group, else val."""

    def inputs(results: Results) -> dict:
        return {"run": results[trained].path, "weights": results[trained].fingerprint, "data": results[data].fingerprint}

    def command(results: Results, anew: bool) -> Command:
        asked = evaluation_plan.Options(checkpoint=results[trained].path, data=results[data].path)
        arguments = ["--checkpoint", asked.checkpoint, "--data", asked.data, "--workers", str(workers)]
        return Command([*arguments, *(["--overwrite"] if anew else [])], evaluation_plan.plan_checkpoint(asked).out)

    return Stage(name, "evaluate", (data, trained), inputs, command, lambda path: complete(path, "summary.json", "report.html"))


def pool_stage(out: str, evaluations: tuple[str, ...]) -> Stage:
    """Every patient's scores by the model that has not seen them, as one evaluation."""

    def inputs(results: Results) -> dict:
        return {"evaluations": [results[name].fingerprint for name in evaluations]}

    def command(results: Results, anew: bool) -> Command:
        path = filesystem.join(out, f"evaluation-{len(evaluations)}folds")
        return Command(["--pool", *(results[name].path for name in evaluations), "--out", path], path)

    return Stage("pool", "evaluate", evaluations, inputs, command, lambda path: complete(path, "summary.json", "report.html"))


def predictions_path(out: str, source: str) -> str:
    """A folder for each input: masks of other studies would lie beside tables that do not name them."""
    return filesystem.join(out, f"predictions-{filesystem.last_part(source)}-{filesystem.sha256(source.encode())[:4]}")


def predict_stage(out: str, models: tuple[str, ...], source: str) -> Stage:
    """New studies outlined with the model, or with those of all folds together."""

    def inputs(results: Results) -> dict:
        listing = [[clip.path, filesystem.size_or_none(clip.path)] for clip in study_files.find_clips(source)]
        return {"weights": [results[name].fingerprint for name in models], "files": listing}

    def command(results: Results, anew: bool) -> Command:
        first, *others = (results[name].path for name in models)
        path = predictions_path(out, source)
        together = ["--ensemble", *others] if others else []
        return Command(["--checkpoint", first, *together, "--input", source, "--out", path], path)

    return Stage("predict", "predict", models, inputs, command, lambda path: complete(path, "studies.json", "ef.csv"))


def find_stages(stages: list[Stage], word: str, flag: str) -> list[Stage]:
    """The stages of that name, or of that kind in all folds; raises UserError where there is none."""
    found = [stage for stage in stages if word in (stage.name, stage.kind)]
    if not found:
        known = ", ".join(dict.fromkeys(stage.kind for stage in stages))
        raise UserError(f"{flag} {word}: this pipeline has no such stage, only {known}.")
    return found
