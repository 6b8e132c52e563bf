"""Compares runs on one page, without a wandb account, scoring them if needed: `python jobs/compare.py RUN RUN …`."""

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from heartseg.config.experiment import PredictConfig, canonical, to_json
from heartseg.errors import UserError, require
from heartseg.evaluation import run_comparison, scoring
from heartseg.evaluation.run_comparison import Entry, Scored
from heartseg.evaluation.scoring import IMAGES, PATIENTS, SUMMARY
from heartseg.inference.segmenter import load_all
from heartseg.metrics.segmentation import DISTANCES, SCORES
from heartseg.models import checkpoint
from heartseg.reporting import comparison_page, pages
from heartseg.shards.writer import resize_image
from heartseg.storage import filesystem
from heartseg.training import run_directory
from jobs.support import command_line, evaluation
from jobs.support.command_line import counted
from jobs.support.evaluation import HOLDOUT, EvaluationPlan, ScoringOptions

TRIALS = "trials"  # the folder of a sweep that holds its runs
MOST_DRAWN = 6  # at most this many entries have their outlines drawn on the images that entries disagree on
ABOUT = (
    "Show training runs side by side: which settings differ, scores with intervals and paired tests on the same patients, "
    "learning curves, and the images that the runs disagree on most. Runs that differ only in their seed are pooled."
)


@dataclass(frozen=True)
class Options(ScoringOptions):
    """The runs to compare, on which patients, and the folder of the page."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    """Folders of runs; a folder of runs, or of a sweep, stands for all its runs."""
    reference: str = ""
    """Folder or name of the run to test the others against (default: the first one)."""
    group: Literal["auto", "train", "val", "test", "all", "holdout"] = "auto"
    """Group of patients; `auto`: the patients held out by --train.holdout (in a sweep) if all runs have them, otherwise test,
    otherwise val."""
    out: str = ""
    """Folder of the results (default: `comparison` in the folder of runs, or `comparison-HASH` beside the first run)."""


def run(options: Options) -> str:
    """Compare the runs; returns the path of the page. Raises UserError for fewer than two."""
    found = find_runs(options.runs)
    out = command_line.absolute(options.out, "out") if options.out else default_out(options.runs, found.values())
    if options.data or options.truth:  # a wrong path is refused here, not reported as a problem of each run
        images = evaluation.open_images(options)
        if options.group != HOLDOUT:
            evaluation.choose_group(options.group, images)
    if options.group == "auto" and all(evaluation.held_out(one) for one in found.values()):
        options = replace(options, group=HOLDOUT)
    reference = find_reference(options.reference, found)
    assessed = {label: assess(one, label, options, out) for label, one in found.items()}
    entries = run_comparison.group_by_settings([scored for scored, _ in assessed.values()])
    chosen = next(entry for entry in entries if any(one.run is reference for one in entry.runs))
    compared = run_comparison.compare_entries(entries, chosen)
    plans = {label: plan for label, (_, plan) in assessed.items()}
    page = comparison_page.write_page(out, entries, compared, draw_disagreements(entries, compared["disagreements"], plans))
    print(comparison_page.text(entries, compared))
    return page


def find_runs(paths: Sequence[str]) -> dict[str, run_directory.Run]:
    """Find the runs that `paths` are or contain; returns them by name or, if names repeat, by path below their common folder.

    Raises UserError for a path without runs, and for fewer than two runs.
    """
    found: dict[str, run_directory.Run] = {}
    for path in paths:
        path = command_line.absolute(path, "runs").rstrip("/")
        below = [filesystem.join(f, n) for f in (path, filesystem.join(path, TRIALS)) for n in filesystem.list_names(f)]
        folders = [path] if is_run(path) else [folder for folder in below if is_run(folder)]
        fix = f"is not a run and contains none ({run_directory.DESCRIPTION} not found): give folders that jobs/train.py wrote."
        require(bool(folders), f"{path} {fix}")
        found |= {folder: run_directory.find_run(folder) for folder in folders}
    fix = "name more runs, or a folder of runs."
    require(len(found) >= 2, f"A comparison needs at least two runs, not {len(found)}: {fix}")
    shared, names = len(os.path.commonprefix([path.split("/") for path in found])), [one.name for one in found.values()]
    return {one.name if names.count(one.name) == 1 else "/".join(path.split("/")[shared:]): one for path, one in found.items()}


def is_run(folder: str) -> bool:
    """True if the folder holds a run."""
    return filesystem.exists(filesystem.join(folder, run_directory.DESCRIPTION))


def default_out(paths: Sequence[str], found: Iterable[run_directory.Run]) -> str:
    """The default folder of the results: `comparison` in a folder of runs, otherwise `comparison-HASH` beside the first run."""
    if len(paths) == 1:
        return filesystem.join(command_line.absolute(paths[0], "runs"), "comparison")
    folders = [one.path for one in found]
    return filesystem.join(os.path.dirname(folders[0]), f"comparison-{filesystem.sha256(canonical(sorted(folders)))[:8]}")


def assess(one: run_directory.Run, label: str, options: Options, out: str) -> tuple[Scored, EvaluationPlan | None]:
    """Score a run if needed; returns its record and scores, and the plan, or None if images or weights cannot be read."""
    record, plan, problem = run_directory.read_record(one.path), None, ""
    shared = {each.name: getattr(options, each.name) for each in fields(ScoringOptions)}
    out = filesystem.join(out, "evaluations", label.replace("/", "-"))
    asked = evaluation.Options(**shared, checkpoint=one.path, out=out)
    try:
        plan = evaluation.plan_checkpoint(asked)
        folder = find_evaluation(one, plan.described, plan.out)
        if not folder:
            print(f"scoring {label}: {counted(len(plan.patients), 'patient')} ({plan.described['group']})", flush=True)
            evaluation.score(plan, asked)
            folder = plan.out
    except UserError as error:
        problem = str(error)
        folder = "" if plan or options.data or options.truth else find_old_evaluation(one, options)
    if not folder:
        return Scored(one, label, record, problem=problem), None
    images, patients = (scoring.read_rows(folder, name) for name in (IMAGES, PATIENTS))
    return Scored(one, label, record, images, patients, filesystem.read_json(filesystem.join(folder, SUMMARY))), plan


def find_evaluation(one: run_directory.Run, described: dict, own: str = "") -> str:
    """The first complete evaluation that matches `described`, in the run's folder or in `own`; empty if none does."""
    # Equal weights mean the same checkpoint, whether it was called last or best.
    asked = {name: described[name] for name in ("weights_sha256", "group", "post", "data_fingerprint") if name in described}
    names = [name for name in filesystem.list_names(one.path) if name.startswith("evaluation")]
    for folder in [*(filesystem.join(one.path, name) for name in names), *filter(None, [own])]:
        summary = evaluation.read_complete(folder, asked) or {}
        # Evaluations by older versions lack scores.
        if "clinical" in summary and {*SCORES, *DISTANCES} <= summary["scores"].keys():
            return folder
    return ""


def find_old_evaluation(one: run_directory.Run, options: Options) -> str:
    """The folder of an earlier evaluation on the run's own data, for when the data cannot be read; empty if none fits."""
    for group in ("test", "val", "all") if options.group == "auto" else (options.group,):
        which = options.which if options.which != "auto" else "best" if group == "test" else "last"
        described = {"group": group, "post": to_json(PredictConfig()), "data_fingerprint": one.description["data_fingerprint"]}
        with contextlib.suppress(UserError):
            weights = {"weights_sha256": [checkpoint.find(one.path, which).card["weights_sha256"]]}
            if folder := find_evaluation(one, described | weights):
                return folder
    return ""


def find_reference(asked: str, found: dict[str, run_directory.Run]) -> run_directory.Run:
    """The run with this name or folder (empty: the first run); raises UserError unless exactly one matches."""
    if not asked:
        return next(iter(found.values()))
    named = [one for one in found.values() if one.path == filesystem.absolute(asked).rstrip("/")]
    named = named or [one for label, one in found.items() if asked in (label, one.name)]
    fix = "give the folder of one of them."
    require(len(named) == 1, f"--reference {asked} matches {len(named) or 'none'} of the runs: {fix}")
    return named[0]


def draw_disagreements(
    entries: Sequence[Entry], found: Sequence[dict], plans: dict[str, EvaluationPlan | None]
) -> dict[str, list[dict]]:
    """Draw the images that entries disagree on; returns, by image name, a picture per entry (of several seeds, the first)."""
    patients = list(dict.fromkeys(item["patient"] for item in found))
    pictures: dict[str, list[dict]] = {item["image"]: [] for item in found}
    known = [entry for entry in entries if found and entry.letter in found[0]["dice"] and plans[entry.scored[0].label]]
    for entry in known[:MOST_DRAWN]:
        one = entry.scored[0]
        dice, plan = run_comparison.score_table(one)["dice"], plans[one.label]
        cases, _ = plan.truth.cases(patients)
        masks = scoring.segment_cases(load_all(plan.predictor), cases, plan.post)
        whose = entry.letter + (f", {one.label}" if len(entry.runs) > 1 else "")
        for name, case, predicted in zip(run_comparison.image_names(map(vars, cases)), cases, masks, strict=True):
            if name in pictures:
                pixels = resize_image(plan.truth.picture(case), *case.truth.shape)
                caption = f"{whose}: Dice {pages.show_number(dice[name], 3)}"
                outlined = comparison_page.draw_outlines(name, entry.letter, case, pixels, predicted.mask, caption)
                pictures[name].append(outlined)
    return {name: drawn for name, drawn in pictures.items() if drawn}


def job(argv: list[str]) -> None:
    print(run(command_line.parse_line(Options, argv, "python jobs/compare.py", ABOUT)))


if __name__ == "__main__":
    command_line.main(job)
