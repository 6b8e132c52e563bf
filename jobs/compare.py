"""Runs side by side on one page, without any account: `python jobs/compare.py RUN RUN …`, or a folder of runs, or a sweep's.

Uses the evaluations that the runs have, if they fit; scores whatever is missing, as jobs/evaluate.py does.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from heartseg.config.experiment import PredictConfig, canonical, to_json
from heartseg.errors import UserError, require
from heartseg.evaluation import run_comparison
from heartseg.evaluation.run_comparison import Comparison, Scored
from heartseg.evaluation.scoring import IMAGES, PATIENTS, SUMMARY
from heartseg.metrics.segmentation import DISTANCES, SCORES
from heartseg.models import checkpoint
from heartseg.reporting import comparison_page
from heartseg.shards.writer import resize_image
from heartseg.storage import filesystem
from heartseg.training import run_directory
from heartseg.training.run_directory import Run
from jobs.support import command_line, evaluation_plan, evaluation_run
from jobs.support.evaluation_plan import HOLDOUT, EvaluationPlan, ScoringOptions

TRIALS = "trials"  # the folder of a sweep that holds its runs
# Pictures on a page: many entries get fewer images, and of very many only the first are drawn.
MOST_IMAGES, MOST_PICTURES, MOST_DRAWN = 6, 36, 9
ABOUT = (
    "Show training runs side by side: which settings differ, scores with intervals and paired tests on the same patients, "
    "learning curves, and the images that the runs disagree on most. Runs that differ only in their seed are pooled."
)


@dataclass(frozen=True)
class Options(ScoringOptions):
    """What to compare, on which patients, and where the page goes."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    """Folders of runs; a folder of runs, or of a sweep, stands for all its runs."""
    reference: str = ""
    """Folder or name of the run that the others are tested against; the first one if not given."""
    group: Literal["auto", "train", "val", "test", "all", "holdout"] = "auto"
    """Group of patients; `auto` is test if there is one, otherwise val. If all runs were validated on patients held out of
    the training group (--train.holdout, as in a sweep), it is these: runs to choose from must not see the test group."""
    out: str = ""
    """Folder of the results; by default `comparison` in the folder of runs, or `comparison-HASH` beside the first run."""

    def __post_init__(self):
        require(self.workers >= 1, "--workers must be at least 1.")
        require(self.workers == 1 or self.launcher == "ray", "--launcher plain is one process: leave --workers out.")
        require(not (self.data and self.truth), "--data and --truth are two sets of images to score on: give one of them.")


def run(options: Options) -> str:
    """Compare; returns the path of the page. Raises UserError for fewer than two runs."""
    found = find_runs(options.runs)
    out = command_line.absolute(options.out, "out") if options.out else default_out(options.runs, found)
    if options.data or options.truth:  # a wrong one is refused here, and not reported as a problem of each run
        images = evaluation_plan.open_images(options)
        if options.group != HOLDOUT:
            evaluation_plan.choose_group(options.group, images)
    if options.group == "auto" and all(evaluation_plan.held_out(one) for one in found):
        options = replace(options, group=HOLDOUT)
    reference = find_reference(options.reference, found)
    scored, plans = [], {}
    for label, one in labelled(found).items():
        seen, plans[label] = assess(one, label, options, out)
        scored.append(seen)
    entries = run_comparison.group_by_settings(scored)
    chosen = next(entry for entry in entries if any(one.run is reference for one in entry.runs))
    compared = run_comparison.compare_entries(entries, chosen, images_to_draw(len(entries)))
    page = comparison_page.write_page(out, compared, picture_items(compared, plans))
    print(comparison_page.text(compared))
    return page


def find_runs(paths: Sequence[str]) -> list[Run]:
    """The runs that some folders are or hold, each once; raises UserError for a folder without one, and for fewer than two."""
    found: dict[str, Run] = {}
    for path in paths:
        path = command_line.absolute(path, "runs").rstrip("/")
        inside = runs_in(path)
        if not inside:
            raise UserError(
                f"{path} is not a run and holds none (no {run_directory.DESCRIPTION}): give folders of jobs/train.py."
            )
        found |= {one.path: one for one in inside}
    if len(found) < 2:
        raise UserError(f"A comparison needs at least two runs, not {len(found)}: give another one, or a folder of runs.")
    return list(found.values())


def runs_in(path: str) -> list[Run]:
    """The run that a folder is, or the runs in it and in its `trials`, by name."""
    below = [filesystem.join(f, name) for f in (path, filesystem.join(path, TRIALS)) for name in filesystem.list_names(f)]
    return [run_directory.find_run(folder) for folder in ([path] if is_run(path) else below) if is_run(folder)]


def is_run(folder: str) -> bool:
    """True for the folder of a run."""
    return filesystem.exists(filesystem.join(folder, run_directory.DESCRIPTION))


def default_out(paths: Sequence[str], found: Sequence[Run]) -> str:
    """`comparison` in a folder of runs; for runs that were named, a folder beside the first that only these runs share."""
    if len(paths) == 1:
        return filesystem.join(command_line.absolute(paths[0], "runs"), "comparison")
    digest = filesystem.sha256(canonical(sorted(one.path for one in found)))[:8]
    return filesystem.join(found[0].path.rpartition("/")[0], f"comparison-{digest}")


def labelled(found: Sequence[Run]) -> dict[str, Run]:
    """Runs by their name, with as much of the path before it as distinguishes them."""
    paths = [one.path.split("/") for one in found]
    labels = {}
    for one, parts in zip(found, paths, strict=True):
        depth = 1
        while sum(other[-depth:] == parts[-depth:] for other in paths) > 1:
            depth += 1
        labels["/".join(parts[-depth:])] = one
    return labels


def assess(one: Run, label: str, options: Options, out: str) -> tuple[Scored, EvaluationPlan | None]:
    """A run's record and scores, and the plan of its evaluation, None if its images or weights cannot be read."""
    record, plan, problem = run_directory.read_record(one.path), None, ""
    shared = {each.name: getattr(options, each.name) for each in fields(ScoringOptions)}
    out = filesystem.join(out, "evaluations", label.replace("/", "-"))
    asked = evaluation_plan.Options(**shared, checkpoint=one.path, out=out)
    try:
        plan = evaluation_plan.plan_checkpoint(asked)
        folder = find_evaluation([*evaluations_of(one), plan.out], plan.described)
        if not folder:
            print(f"scoring {label}: {len(plan.patients)} patients ({plan.described['group']})", flush=True)
            evaluation_run.score(plan, asked)
            folder = plan.out
    except UserError as error:
        problem = str(error)
        folder = "" if plan else find_old_evaluation(one, options)
    if not folder:
        return Scored(one, label, record, problem=problem), None
    images, patients = (
        filesystem.read_table(filesystem.read_bytes(filesystem.join(folder, name))).to_pandas(use_threads=False)
        for name in (IMAGES, PATIENTS)
    )
    return Scored(one, label, record, images, patients, filesystem.read_json(filesystem.join(folder, SUMMARY))), plan


def evaluations_of(one: Run) -> list[str]:
    """Folders in a run that may hold an evaluation."""
    return [filesystem.join(one.path, name) for name in filesystem.list_names(one.path) if name.startswith("evaluation")]


def find_evaluation(folders: Sequence[str], described: dict) -> str:
    """The first complete evaluation that fits `described`, wherever its checkpoint was then; empty if there is none."""
    # The same weights are the same checkpoint, whether it was called last or best.
    asked = {name: described[name] for name in ("weights_sha256", "group", "post", "data_fingerprint") if name in described}
    for folder in folders:
        if all(filesystem.exists(filesystem.join(folder, name)) for name in (SUMMARY, IMAGES, PATIENTS)):
            summary = filesystem.read_json(filesystem.join(folder, SUMMARY))
            # An evaluation by an older version lacks scores.
            is_whole = "clinical" in summary and {*SCORES, *DISTANCES} <= summary["scores"].keys()
            if is_whole and asked == {name: summary.get(name) for name in asked}:
                return folder
    return ""


def find_old_evaluation(one: Run, options: Options) -> str:
    """An evaluation on the run's own data, for when they can no longer be read; empty if none fits."""
    if options.data or options.truth:
        return ""
    for group in ("test", "val", "all") if options.group == "auto" else (options.group,):
        which = options.which if options.which != "auto" else "best" if group == "test" else "last"
        try:
            weights = checkpoint.find(one.path, which).card["weights_sha256"]
        except UserError:
            return ""
        described = {"weights_sha256": [weights], "group": group, "post": to_json(PredictConfig())}
        described["data_fingerprint"] = one.description["data_fingerprint"]
        if folder := find_evaluation(evaluations_of(one), described):
            return folder
    return ""


def find_reference(asked: str, found: Sequence[Run]) -> Run:
    """The run of a name or a folder, the first run if empty; raises UserError if none is meant, or several may be."""
    if not asked:
        return found[0]
    named = [one for one in found if one.path == filesystem.absolute(asked).rstrip("/")]
    named = named or [one for label, one in labelled(found).items() if asked in (label, one.name)]
    if len(named) != 1:
        raise UserError(f"--reference {asked} is {len(named) or 'none'} of the runs: give the folder of one that is compared.")
    return named[0]


def images_to_draw(entries: int) -> int:
    """How many images are drawn, each once for each entry."""
    return max(2, min(MOST_IMAGES, MOST_PICTURES // min(entries, MOST_DRAWN)))


def picture_items(compared: Comparison, plans: dict[str, EvaluationPlan | None]) -> list[dict]:
    """The images that entries disagree on, as comparison_page draws them; of several seeds, with the first one's masks."""
    wanted = compared.disagreements
    patients = list(dict.fromkeys(item["patient"] for item in wanted))
    drawn = [e for e in compared.entries if wanted and e.letter in wanted[0]["dice"] and plans[e.scored[0].label]]
    if not drawn:
        return []
    items = {item["image"]: item | {"masks": {}, "scores": {}, "names": {}} for item in wanted}
    truth = plans[drawn[0].scored[0].label].truth
    cases, _ = truth.cases(patients)
    for name, case in zip(run_comparison.image_names(map(vars, cases)), cases, strict=True):
        if name in items:
            pixels = resize_image(truth.picture(case), *case.truth.shape)
            items[name] |= {"pixels": pixels, "truth": case.truth, "spacing_mm": case.spacing_mm}
    for entry in drawn[:MOST_DRAWN]:
        one = entry.scored[0]
        dice = run_comparison.score_table(one)["dice"]
        cases, masks, _ = evaluation_run.Predictor(plans[one.label]).predict(patients)
        for name, found in zip(run_comparison.image_names(map(vars, cases)), masks, strict=True):
            if name in items:
                items[name]["masks"][entry.letter] = found.mask
                items[name]["scores"][entry.letter] = float(dice[name])
                items[name]["names"][entry.letter] = entry.letter + (f", {one.label}" if len(entry.runs) > 1 else "")
    return [item for item in items.values() if "pixels" in item]


def job(argv: Sequence[str]) -> None:
    """The command line."""
    print(run(command_line.parse_line(Options, argv, "python jobs/compare.py", ABOUT)))


if __name__ == "__main__":
    command_line.main(job)
