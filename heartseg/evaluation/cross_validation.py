"""Evaluations of folds pooled into one: every patient is scored by the model that has not seen them.

Nothing is scored again; images and patients of the evaluations are put together and summarised as one evaluation's are.
"""

import io

import numpy as np
import pandas

from heartseg.errors import UserError
from heartseg.evaluation import scoring
from heartseg.evaluation.scoring import IMAGES, PATIENTS, SUMMARY
from heartseg.storage import filesystem


def pool(evaluations: list[str], out: str) -> dict:
    """Write the pooled evaluation into `out`, and return its summary.

    Raises UserError for an evaluation that is none or of training patients, and where two of them share a patient or differ
    in their dataset or in what was done to the predictions.
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
    filesystem.publish(filesystem.join(out, scoring.EXAMPLES), merge_examples(evaluations, starts, image_rows))
    scoring.write_results(out, image_rows, patient_rows, summary)
    return summary


def _summary(path: str) -> dict:
    if not filesystem.exists(filesystem.join(path, SUMMARY)):
        raise UserError(f"{path} is no evaluation (no {SUMMARY}): give folders that jobs/evaluate.py wrote.")
    return filesystem.read_json(filesystem.join(path, SUMMARY))


def _table(path: str, name: str) -> pandas.DataFrame:
    table = filesystem.read_table(filesystem.read_bytes(filesystem.join(path, name))).to_pandas()
    if name == IMAGES and "confusion" not in table:
        raise UserError(f"{path} was written by an earlier version, which did not keep what pooling needs: evaluate again.")
    return table


def who_predicted(summaries: list[dict]) -> str:
    """How many models made the predictions, for a reader."""
    weights = {tuple(summary.get("weights_sha256", ())) for summary in summaries}
    if () in weights:
        return f"masks of {len(summaries)} folders"
    return f"{len(weights)} models, each on patients that it has not seen" if len(weights) > 1 else "one model"


def check(evaluations: list[str], summaries: list[dict], patients: list[pandas.DataFrame]) -> None:
    """Raise UserError for evaluations that cannot be one."""
    seen: dict[str, str] = {}
    for path, summary, rows in zip(evaluations, summaries, patients, strict=True):
        if summary["group"] == "train":
            raise UserError(f"{path} scores the patients that its model was trained on: pool what it has not seen.")
        if summary.get("post") != summaries[0].get("post"):
            raise UserError(f"{path} and {evaluations[0]} differ in what was done to the predictions (tta and the like).")
        if summary["dataset"] != summaries[0]["dataset"]:
            raise UserError(f"{path} is of {summary['dataset']}, {evaluations[0]} of {summaries[0]['dataset']}.")
        for patient in rows["patient"]:
            if seen.setdefault(patient, path) != path:
                raise UserError(f"{patient} is scored in {seen[patient]} and in {path}: pool evaluations that share nobody.")


def merge_examples(evaluations: list[str], starts: np.ndarray, images: pandas.DataFrame) -> bytes:
    """The pictures of lowest and highest Dice among those that each evaluation kept, as `write_examples` has them."""
    found = {}
    for path, start in zip(evaluations, starts, strict=False):
        with np.load(io.BytesIO(filesystem.read_bytes(filesystem.join(path, scoring.EXAMPLES)))) as arrays:
            for number, row in enumerate(arrays["rows"]):
                kinds = {kind: arrays[f"{kind}_{number}"] for kind in ("image", "truth", "prediction")}
                found[int(start + row)] = kinds, arrays["spacing_mm"][number]
    ordered = images.loc[sorted(found)].sort_values(["dice", "patient", "number"]).index.tolist()
    most = scoring.NUM_EXAMPLES
    rows = list(dict.fromkeys([*ordered[:most], *ordered[-most:]]))
    named = {f"{kind}_{place}": found[row][0][kind] for place, row in enumerate(rows) for kind in found[row][0]}
    spacings_mm = np.array([found[row][1] for row in rows]).reshape(-1, 2)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **named, spacing_mm=spacings_mm, rows=np.array(rows, dtype=np.int64))
    return buffer.getvalue()
