"""Evaluations of folds pooled into one: every patient is scored by a model that has not seen them.

Nothing is scored again; images and patients of the evaluations are put together and summarised as one evaluation's are.
"""

import numpy as np
import pandas

from heartseg.errors import UserError
from heartseg.evaluation import scoring
from heartseg.evaluation.scoring import IMAGES, PATIENTS, SUMMARY
from heartseg.storage import filesystem


def pool(evaluations: list[str], out: str) -> dict:
    """Write the pooled evaluation into `out`, and return its summary.

    Raises UserError for a folder without evaluation, for training patients, and if two evaluations share a patient or differ
    in their dataset or in the postprocessing.
    """
    if len({*evaluations, out}) <= len(evaluations):
        raise UserError("Each evaluation is pooled once, and none is written over: give different folders.")
    summaries = [_summary(path) for path in evaluations]
    images, patients = ([_table(path, name) for path in evaluations] for name in (IMAGES, PATIENTS))
    check(evaluations, summaries, patients)
    image_rows, patient_rows = pandas.concat(images, ignore_index=True), pandas.concat(patients, ignore_index=True)
    missing = [entry for summary in summaries for entry in summary["missing"]]
    summary = scoring.summarise(image_rows, patient_rows, missing)
    summary |= {
        "group": "out-of-fold", "dataset": summaries[0]["dataset"], "evaluations": evaluations,
        "predictions": who_predicted(summaries), "truth": "the evaluations' own",
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
    if not filesystem.exists(filesystem.join(path, SUMMARY)):
        raise UserError(f"{path} is not an evaluation (no {SUMMARY}): give folders that jobs/evaluate.py wrote.")
    return filesystem.read_json(filesystem.join(path, SUMMARY))


def _table(path: str, name: str) -> pandas.DataFrame:
    table = scoring.read_rows(path, name)
    if table is None or (name == IMAGES and "confusion" not in table):
        raise UserError(f"{path} lacks what pooling needs (an earlier version wrote it): evaluate again.")
    return table


def who_predicted(summaries: list[dict]) -> str:
    """How many models made the predictions, for a reader."""
    weights = {tuple(summary.get("weights_sha256", ())) for summary in summaries}
    if () in weights:
        return f"masks of {len(summaries)} folders"
    return f"{len(weights)} models, each on patients that it has not seen" if len(weights) > 1 else "one model"


def check(evaluations: list[str], summaries: list[dict], patients: list[pandas.DataFrame]) -> None:
    """Raise UserError for evaluations that cannot be pooled."""
    seen: dict[str, str] = {}
    for path, summary, rows in zip(evaluations, summaries, patients, strict=True):
        if summary["group"] == "train":
            raise UserError(f"{path} scores the patients that its model was trained on: pool evaluations of unseen patients.")
        if summary.get("post") != summaries[0].get("post"):
            raise UserError(f"{path} and {evaluations[0]} differ in their postprocessing: use the same options.")
        if summary["dataset"] != summaries[0]["dataset"]:
            raise UserError(f"{path} is of {summary['dataset']}, {evaluations[0]} of {summaries[0]['dataset']}.")
        for patient in rows["patient"]:
            if seen.setdefault(patient, path) != path:
                raise UserError(
                    f"{patient} is scored in {seen[patient]} and in {path}: pool evaluations of different patients."
                )
