"""Evaluation's promises: truth against itself is perfect, and missing masks and images are reported."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pandas
import pytest

from heartseg.config.experiment import PredictConfig
from heartseg.datasets import camus, nifti
from heartseg.errors import UserError
from heartseg.evaluation.ground_truth import TreeTruth
from heartseg.evaluation.scoring import KEYS, outliers, patient_row
from heartseg.inference.segmenter import Segmented
from heartseg.labels import Phase, View
from heartseg.metrics.segmentation import DISTANCES, SCORES
from heartseg.storage import filesystem
from heartseg.training import run_directory
from jobs import evaluate
from jobs.support import evaluation


def table(out: str, name: str):
    return filesystem.read_table(filesystem.read_bytes(filesystem.join(out, f"{name}.parquet"))).to_pandas()


def summary_of(out: str) -> dict:
    return filesystem.read_json(filesystem.join(out, "summary.json"))


def score_files(predictions: str, truth: str, out: str, **options) -> str:
    return evaluate.run(evaluate.Options(predictions=predictions, truth=truth, out=out, launcher="plain", **options))


def test_truth_against_itself_is_perfect(phantom, tmp_path):
    out = score_files(os.path.join(phantom, camus.IMAGES_FOLDER), phantom, str(tmp_path / "out"))
    summary = summary_of(out)
    assert summary["images"] == 32 and summary["patients"] == 8 and summary["missing"] == []
    assert all(summary["scores"][name]["mean"] == 1 for name in SCORES)
    assert all(summary["scores"][name]["mean"] == 0 for name in DISTANCES)
    assert all(found["bias"] == found["mae"] == 0 for found in summary["clinical"]["agreement"].values())
    against_cfg = summary["clinical"]["reference"]["ase"]
    assert against_cfg["truth"] == against_cfg["prediction"] and against_cfg["truth"]["n"] == 8
    assert np.trace(summary["clinical"]["ef_classes"]["counts"]) == 8
    images = table(out, "images")
    assert len(images) == 32 and len(table(out, "patients")) == 8 and set(images["phase"]) == {"ED", "ES"}
    assert set(images.columns) == {*KEYS, "confidence", "implausible", "confusion", *SCORES, *DISTANCES}
    page = filesystem.read_bytes(filesystem.join(out, "report.html")).decode()
    assert "Ejection fraction and volumes" in page and "nothing about its accuracy on patients" in page


def test_a_missing_prediction_is_named_and_its_patient_has_no_biplane_ef(phantom, tmp_path, capsys):
    masks = str(shutil.copytree(os.path.join(phantom, camus.IMAGES_FOLDER), tmp_path / "masks"))
    for suffix in ("_gt", ""):
        os.remove(f"{masks}/patient0002/patient0002_4CH_ES{suffix}.nii.gz")
    out = score_files(masks, phantom, str(tmp_path / "out"))
    summary = summary_of(out)
    assert [(row["patient"], row["view"], row["phase"]) for row in summary["missing"]] == [("patient0002", "4CH", "ES")]
    assert "1 image not scored" in capsys.readouterr().out
    patients = table(out, "patients").set_index("patient")
    assert np.isnan(patients.loc["patient0002", "ef_camus_prediction"])
    assert np.isfinite(patients.loc["patient0002", ["ef_camus_truth", "ef_2ch_ase_prediction"]].astype(float)).all()
    assert patients.loc["patient0002", "reason_prediction"] and not patients.loc["patient0001", "reason_prediction"]
    assert list(summary["clinical"]["incomplete"]) == ["patient0002"]


def test_only_patients_with_a_mask_are_scored_unless_a_group_is_asked_for(phantom, tmp_path):
    masks = tmp_path / "masks"
    shutil.copytree(os.path.join(phantom, camus.IMAGES_FOLDER, "patient0003"), masks / "patient0003")
    assert summary_of(score_files(str(masks), phantom, str(tmp_path / "out")))["patients"] == 1
    summary = summary_of(score_files(str(masks), phantom, str(tmp_path / "all"), group="all"))
    assert summary["images"] == 4 and len(summary["missing"]) == 28


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"truth": ""}, "--truth is missing"),
        ({"checkpoint": "x"}, "leave --checkpoint"),
        ({"pattern": "no/{patient}{view}{phase}.nii"}, "holds no mask of the 8 patients"),
        ({"truth": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line_errors(phantom, options, said):
    given = {"predictions": os.path.join(phantom, camus.IMAGES_FOLDER), "truth": phantom, "launcher": "plain"}
    with pytest.raises(UserError, match=said):
        evaluate.run(evaluate.Options(**given | options))


def test_two_pictures_of_one_view_and_phase_make_no_volume(phantom):
    cases, _ = TreeTruth(phantom).cases(["patient0001"])
    twice = [*cases, replace(cases[0], frame=2), replace(cases[1], view=None), replace(cases[1], phase=None)]
    alone, doubled = (patient_row("p", given, [Segmented(case.truth, 1.0) for case in given]) for given in (cases, twice))
    assert alone["ef_ase_truth"] > 0 and alone["reason_truth"] == ""
    assert np.isnan(doubled["ef_ase_truth"]) and "no 2CH ED mask" in doubled["reason_prediction"]
    assert doubled["images"] == len(twice)


def test_an_empty_group_is_skipped_and_patients_that_chose_the_checkpoint_never_test_it(phantom, tmp_path):
    images = evaluation.ScoredImages(phantom, {"test": [], "val": ["patient0001"], "train": ["patient0002"]}, "phantom")
    assert evaluation.choose_group("auto", images) == "val"
    with pytest.raises(UserError, match="no patients in group test: use one of val, train"):
        evaluation.choose_group("test", images)
    run = run_directory.Run("r", {"train_patients": ["patient0001"], "val_patients": ["patient0003"], "dataset": "CAMUS"})
    evaluation.refuse_trained(run, "val", images)  # CAMUS's patient0001 is another one
    tested = replace(images, groups={"test": ["patient0003"]})
    assert evaluation.choose_checkpoint("auto", "test", tested, [run]) == "last"
    assert evaluation.choose_checkpoint("auto", "test", replace(tested, groups={"test": ["patient0004"]}), [run]) == "best"


def test_masks_of_files_are_cleaned_if_asked_and_never_predicted_again(phantom, tmp_path):
    masks = str(tmp_path / "masks")
    for case in TreeTruth(phantom, images=False).cases(["patient0001"])[0]:
        strayed = case.truth.copy()
        strayed[:2, :2] = 3  # a second piece of atrium, far from the first
        nifti.write_nifti(f"{masks}/{case.name}.nii.gz", strayed, case.spacing_mm)
    asked = PredictConfig(largest_component=True)
    for name, post, is_perfect in (("a", PredictConfig(), False), ("b", asked, True)):
        out = score_files(masks, phantom, str(tmp_path / name), post=post)
        assert (table(out, "images")["dice"].mean() == 1) == is_perfect
    with pytest.raises(UserError, match="--tta runs a network"):
        score_files(masks, phantom, str(tmp_path / "c"), post=PredictConfig(tta=True))


@pytest.mark.parametrize("is_left", [True, False])
def test_masks_are_scored_even_if_images_are_missing(is_left, phantom, tmp_path):
    tree = str(shutil.copytree(phantom, tmp_path / "tree"))
    for view, phase in camus.stills_of():
        path = camus.recording_path(tree, "patient0001", view, phase)
        if not is_left or (view, phase) == (View.TWO_CHAMBER, Phase.ED):
            os.remove(path)
    out = score_files(os.path.join(tree, camus.IMAGES_FOLDER), tree, str(tmp_path / "out"))
    assert summary_of(out)["images"] == 32
    examples = np.load(os.path.join(out, "examples.npz"))
    for number, (_, shown) in enumerate(table(out, "images").loc[examples["rows"]].iterrows()):
        had = shown["patient"] != "patient0001" or (is_left and (shown["view"], shown["phase"]) != ("2CH", "ED"))
        assert examples[f"image_{number}"].any() == had
        if had:
            still = camus.read_still(tree, shown["patient"], View(shown["view"]), Phase(shown["phase"]))
            np.testing.assert_array_equal(examples[f"image_{number}"], still.image)


def test_outliers_are_cavities_under_085_and_efs_more_than_10_points_off_and_what_is_unknown_is_not_counted():
    images = pandas.DataFrame({"patient": list("aabb"), "dice_endo": [0.9, 0.849, 0.85, np.nan]})
    columns = {"ef_camus_prediction": [50.0, 39.0, 60.0, np.nan], "ef_ase_prediction": [50.0, 55.0, 45.0, 40.0]}
    patients = pandas.DataFrame({"patient": list("abcd")} | columns).assign(ef_camus_truth=50.0, ef_ase_truth=50.0)
    found = outliers(images, patients)
    assert {name: round(share["mean"], 3) for name, share in found.items()} == {"cavity": 0.333, "ef_camus": 0.333, "ef_ase": 0}
