"""Runs side by side on one page, without any account: `python jobs/compare.py RUN RUN …`, or a folder of runs, or a sweep's.

What an evaluation of a run has left is used where it fits; whatever is missing is scored here, as evaluate does.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from jobs import evaluate
from jobs.support import command_line
from jobs.support.evaluation_plan import HOLDOUT, Plan, choose_group, held_out, open_source, plan_checkpoint

TRIALS = "trials"  # the folder of a sweep that holds its runs
# Pictures on a page: of many entries there are fewer images, and of very many only the first entries are drawn.
MOST_IMAGES, MOST_PICTURES, MOST_DRAWN = 6, 36, 9
ABOUT = (
    "Show training runs side by side: which settings differ, scores with intervals and paired tests on the same patients, "
    "learning curves, and the images that the runs disagree on most. Runs that differ only in their seed are pooled."
)


@dataclass(frozen=True)
class Options:
    """What to compare, on whom, and where the page goes."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    """Folders of runs; a folder that holds runs, or a sweep's, stands for all its runs."""
    reference: str = ""
    """Folder or name of the run that the others are tested against; the first one where not given."""
    data: str = ""
    """Folder or URI of the shards to score on; each run's own where neither this nor --truth is given."""
    truth: str = ""
    """Folder of a CAMUS tree to score on, instead of shards."""
    group: Literal["auto", "train", "val", "test", "all", "holdout"] = "auto"
    """Group of patients; `auto` is test where there is one, else val. Where all runs were validated on patients held out of
    the training group (--train.holdout, as in a sweep), it is these: what is chosen among must not see the test group."""
    which: Literal["auto", "last", "best"] = "auto"
    """`best` is chosen on val; `auto` takes it only to report on test, and the last one else."""
    out: str = ""
    """Folder of the results; by default `comparison` in the folder of runs, or `comparison-HASH` beside the first run."""
    workers: int = 1
    """Processes that predict, where something is left to score."""
    launcher: Literal["ray", "plain"] = "ray"
    """`plain` needs no Ray and uses one process; Ray starts only where something is left to score."""

    def __post_init__(self):
        require(self.workers >= 1, "--workers must be at least 1.")
        require(self.workers == 1 or self.launcher == "ray", "--launcher plain is one process: leave --workers out.")
        require(not (self.data and self.truth), "--data and --truth are two sources to score on: give one of them.")


def run(options: Options) -> str:
    """Compare; returns the path of the page. Raises UserError for fewer than two runs."""
    found = find_runs(options.runs)
    out = command_line.absolute(options.out, "out") if options.out else default_out(options.runs, found)
    if options.data or options.truth:  # one that is wrong is no run's fault
        source = open_source(as_evaluation(options), "")
        if options.group != HOLDOUT:
            choose_group(options.group, source)
    if options.group == "auto" and all(held_out(one) for one in found):
        options = replace(options, group=HOLDOUT)
    reference = find_reference(options.reference, found)
    scored, plans = [], {}
    for label, one in labelled(found).items():
        seen, plan = assess(one, label, options, out)
        scored.append(seen)
        plans[label] = plan
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
                f"{path} is no run and holds none (no {run_directory.DESCRIPTION}): give folders that jobs/train.py wrote."
            )
        found |= {one.path: one for one in inside}
    if len(found) < 2:
        counted = "1 run is" if found else "0 runs are"
        raise UserError(f"{counted} nothing to compare: give two runs at least, or a folder that holds them.")
    return list(found.values())


def runs_in(path: str) -> list[Run]:
    """The run that a folder is; else those in it, and in its `trials`, by name."""
    if filesystem.exists(filesystem.join(path, run_directory.DESCRIPTION)):
        return [run_directory.find_run(path)]
    below = [
        filesystem.join(folder, name)
        for folder in (path, filesystem.join(path, TRIALS))
        for name in filesystem.list_names(folder)
    ]
    return [
        run_directory.find_run(inner) for inner in below if filesystem.exists(filesystem.join(inner, run_directory.DESCRIPTION))
    ]


def default_out(paths: Sequence[str], found: Sequence[Run]) -> str:
    """`comparison` in a folder of runs; of runs that were named, one beside the first that only these runs share."""
    only = command_line.absolute(paths[0], "runs").rstrip("/")
    if len(paths) == 1:
        return filesystem.join(only, "comparison")
    digest = filesystem.sha256(canonical(sorted(one.path for one in found)))[:8]
    return filesystem.join(found[0].path.rstrip("/").rpartition("/")[0], f"comparison-{digest}")


def labelled(found: Sequence[Run]) -> dict[str, Run]:
    """Runs by their name, with the folder before it, and more of it, where two have the same."""
    labels = {}
    for one in found:
        parts = one.path.rstrip("/").split("/")
        depth = 1
        while sum(other.path.rstrip("/").split("/")[-depth:] == parts[-depth:] for other in found) > 1:
            depth += 1
        labels["/".join(parts[-depth:])] = one
    return labels


def as_evaluation(options: Options, run: str = "", out: str = "") -> evaluate.Options:
    """What evaluate is asked for a run."""
    return evaluate.Options(
        checkpoint=run, data=options.data, truth=options.truth, group=options.group, which=options.which,
        workers=options.workers, launcher=options.launcher, out=out,
    )  # fmt: skip


def assess(one: Run, label: str, options: Options, out: str) -> tuple[Scored, Plan | None]:
    """A run's record and scores, and the plan that they come from, None where its images or weights cannot be had."""
    record, plan, problem = run_directory.read_record(one.path), None, ""
    asked = as_evaluation(options, one.path, filesystem.join(out, "evaluations", label.replace("/", "-")))
    try:
        plan = plan_checkpoint(asked)
        folder = find_evaluation([*evaluations_of(one), plan.out], plan.described)
        if not folder:
            print(f"scoring {label}: {len(plan.patients)} patients ({plan.described['group']})", flush=True)
            evaluate.score(plan, asked)
            folder = plan.out
    except UserError as error:
        problem = str(error)
        folder = "" if plan else find_old_evaluation(one, options)
    if not folder:
        return Scored(one, label, record, problem=problem), None
    images, patients = (
        filesystem.read_table(filesystem.read_bytes(filesystem.join(folder, name))) for name in (IMAGES, PATIENTS)
    )
    summary = filesystem.read_json(filesystem.join(folder, SUMMARY))
    return Scored(one, label, record, images.to_pandas(), patients.to_pandas(), summary), plan


def evaluations_of(one: Run) -> list[str]:
    """Folders in a run that may hold an evaluation."""
    return [filesystem.join(one.path, name) for name in filesystem.list_names(one.path) if name.startswith("evaluation")]


def find_evaluation(folders: Sequence[str], described: dict) -> str:
    """The first whole evaluation that is what `described` says, wherever its checkpoint lay then; empty where there is none."""
    # The same weights are the same checkpoint, whether they were called last or best.
    said = {name: described[name] for name in ("weights_sha256", "group", "post", "data_fingerprint") if name in described}
    for folder in folders:
        if all(filesystem.exists(filesystem.join(folder, name)) for name in (SUMMARY, IMAGES, PATIENTS)):
            summary = filesystem.read_json(filesystem.join(folder, SUMMARY))
            # An older program's evaluation lacks scores.
            known = "clinical" in summary and {*SCORES, *DISTANCES} <= summary["scores"].keys()
            if known and said == {name: summary.get(name) for name in said}:
                return folder
    return ""


def find_old_evaluation(one: Run, options: Options) -> str:
    """An evaluation of the run's own data where they can be read no more; empty where none fits."""
    if options.data or options.truth:
        return ""
    groups = ("test", "val", "all") if options.group == "auto" else (options.group,)
    for group in groups:
        which = options.which if options.which != "auto" else "best" if group == "test" else "last"
        try:
            weights = checkpoint.find(one.path, which).card["weights_sha256"]
        except UserError:
            return ""
        said = {"weights_sha256": [weights], "group": group, "post": to_json(PredictConfig())}
        said["data_fingerprint"] = one.description["data_fingerprint"]
        if folder := find_evaluation(evaluations_of(one), said):
            return folder
    return ""


def find_reference(asked: str, found: Sequence[Run]) -> Run:
    """The run asked for by name or folder, the first where none is; raises UserError where it is none, or could be two."""
    path = filesystem.absolute(asked).rstrip("/")
    named = [one for one in found if not asked or path == one.path.rstrip("/")]
    named = named or [one for label, one in labelled(found).items() if asked in (label, one.name)]
    if not named or (asked and len(named) > 1):
        raise UserError(f"--reference {asked} is {len(named) or 'none'} of the runs: give the folder of one that is compared.")
    return named[0]


def images_to_draw(entries: int) -> int:
    """How many images are drawn, each once an entry."""
    return max(2, min(MOST_IMAGES, MOST_PICTURES // min(entries, MOST_DRAWN)))


def picture_items(compared: Comparison, plans: dict[str, Plan | None]) -> list[dict]:
    """What comparison_page draws of the images that entries disagree on; of several seeds the first one's masks."""
    wanted = compared.disagreements
    patients = list(dict.fromkeys(item["patient"] for item in wanted))
    drawn = [e for e in compared.entries if wanted and e.letter in wanted[0]["dice"] and plans[e.scored[0].label]]
    if not drawn:
        return []
    items = {item["image"]: item | {"masks": {}, "scores": {}, "names": {}} for item in wanted}
    first = plans[drawn[0].scored[0].label]
    cases, _ = first.truth.cases(patients)
    for name, case in zip(names_of(cases), cases, strict=True):
        if name in items:
            pixels = resize_image(first.truth.picture(case), *case.truth.shape)
            items[name] |= {"pixels": pixels, "truth": case.truth, "spacing_mm": case.spacing_mm}
    for entry in drawn[:MOST_DRAWN]:
        one = entry.scored[0]
        dice = run_comparison.score_table(one)["dice"]
        cases, masks, _ = evaluate.Predict(plans[one.label])(patients)
        for name, found in zip(names_of(cases), masks, strict=True):
            if name in items:
                items[name]["masks"][entry.letter] = found.mask
                items[name]["scores"][entry.letter] = float(dice[name])
                items[name]["names"][entry.letter] = entry.letter + (f", {one.label}" if len(entry.runs) > 1 else "")
    return [item for item in items.values() if "pixels" in item]


def names_of(cases: Sequence) -> list[str]:
    """`run_comparison.image_names` of cases, a patient's in their order."""
    return run_comparison.image_names(
        {"patient": c.patient, "view": c.view and str(c.view), "phase": c.phase and str(c.phase), "frame": c.frame}
        for c in cases
    )


def job(argv: Sequence[str]) -> None:
    """The command line."""
    print(run(command_line.parse_line(Options, argv, "python jobs/compare.py", ABOUT)))


if __name__ == "__main__":
    command_line.main(job)
