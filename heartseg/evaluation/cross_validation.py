"""Pools the evaluations of folds into one without rescoring: each patient was scored by a model that had not seen them."""

import numpy as np
import pandas

from heartseg.errors import UserError, require
from heartseg.evaluation import scoring
from heartseg.evaluation.scoring import IMAGES, PATIENTS, SUMMARY
from heartseg.storage import filesystem


def pool(evaluations: list[str], out: str) -> dict:
    """Write the pooled evaluation to `out` and return its summary; raises UserError if the evaluations cannot be pooled."""
    is_new = len({*evaluations, out}) > len(evaluations)
    fix = "list each evaluation once, and give --out another folder"
    require(is_new, f"--pool lists a folder twice, or --out {out} is one of its folders: {fix}.")
    summaries = [_summary(path) for path in evaluations]
    images, patients = ([_table(path, name) for path in evaluations] for name in (IMAGES, PATIENTS))
    _check(evaluations, summaries, patients)
    image_rows, patient_rows = pandas.concat(images, ignore_index=True), pandas.concat(patients, ignore_index=True)
    missing = [entry for summary in summaries for entry in summary["missing"]]
    summary = scoring.summarise(image_rows, patient_rows, missing)
    summary |= {
        "group": "out-of-fold", "dataset": summaries[0]["dataset"], "evaluations": evaluations,
        "predictions": _who_predicted(summaries), "post": summaries[0].get("post"), "truth": "the evaluations' own",
        "seconds": sum(each["seconds"] for each in summaries),
    }  # fmt: skip
    starts = np.cumsum([0, *(len(rows) for rows in images)])
    kept = {start + row: found for path, start in zip(evaluations, starts, strict=False)
            for row, found in scoring.read_examples(path).items()}  # fmt: skip
    rows = scoring.extreme_rows(image_rows.loc[sorted(kept)])
    scoring.publish_examples(out, {row: kept[row] for row in rows})
    scoring.write_results(out, image_rows, patient_rows, summary)
    return summary


def _summary(path: str) -> dict:
    there = filesystem.join(path, SUMMARY)
    require(filesystem.exists(there), f"{path} is not an evaluation (no {SUMMARY}): give folders that jobs/evaluate.py wrote.")
    return filesystem.read_json(there)


def _table(path: str, name: str) -> pandas.DataFrame:
    table = scoring.read_rows(path, name)
    is_whole = table is not None and (name != IMAGES or "confusion" in table)
    fix = "evaluate it again (checkpoints: with --overwrite)"
    require(is_whole, f"{path} was written by an earlier version and cannot be pooled: {fix}.")
    return table


def _who_predicted(summaries: list[dict]) -> str:
    weights = {tuple(summary.get("weights_sha256", ())) for summary in summaries}
    if () in weights:
        return f"masks of {len(summaries)} folders"
    return f"{len(weights)} models, each on patients that it has not seen" if len(weights) > 1 else "one model"


def _check(evaluations: list[str], summaries: list[dict], patients: list[pandas.DataFrame]) -> None:
    seen: dict[str, str] = {}
    for path, summary, rows in zip(evaluations, summaries, patients, strict=True):
        (one, same), first = (summary, summaries[0]), evaluations[0]
        is_unseen = summary["group"] != "train"
        require(is_unseen, f"{path} scores the patients that its model was trained on: pool evaluations of unseen patients.")
        is_alike = one.get("post") == same.get("post")
        require(is_alike, f"{path} and {first} were postprocessed differently: evaluate them with the same options.")
        is_one_dataset = one["dataset"] == same["dataset"]
        require(is_one_dataset, f"{path} is on {one['dataset']}, but {first} on {same['dataset']}: pool one dataset.")
        for patient in rows["patient"]:
            if seen.setdefault(patient, path) != path:
                both = f"{seen[patient]} and in {path}"
                raise UserError(f"{patient} is scored in {both}: pool evaluations that share no patient.")
