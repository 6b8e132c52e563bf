"""Truth and other programs' masks are found by name and checked, and missing ones have a reason."""

import os
import pickle
import shutil

import numpy as np
import pytest

from heartseg.datasets import camus, nifti
from heartseg.errors import UserError
from heartseg.evaluation.ground_truth import FilePredictions, ShardTruth, TreeTruth
from heartseg.labels import Phase, View
from heartseg.shards.reader import open_shards

PATIENT = "patient0001"


@pytest.fixture()
def cases(phantom):
    return TreeTruth(phantom, images=False).cases([PATIENT])[0]


def put(folder, name: str, mask: np.ndarray) -> str:
    path = os.path.join(str(folder), name)
    nifti.write_nifti(path, mask, (0.5, 0.5))
    return path


def test_shards_and_the_tree_they_were_made_from_hold_the_same_truth(phantom, shards):
    opened = open_shards(shards)
    truth = pickle.loads(pickle.dumps(ShardTruth(opened, "test")))  # as a worker of another process gets it
    from_shards, missing = truth.cases(opened.groups["test"])
    from_tree, missing_too = TreeTruth(phantom).cases(opened.groups["test"])
    assert len(from_shards) == 8 and not missing and not missing_too
    for one, other in zip(from_shards, from_tree, strict=True):
        assert one.name == other.name and one.info.ef == other.info.ef and one.info.ef_convention == "ase"
        assert (one.truth == other.truth).all() and one.spacing_mm == pytest.approx(other.spacing_mm)
        assert one.image.shape == (64, 64) and other.image.shape == other.truth.shape


def test_a_damaged_truth_is_missing_with_its_reason_and_the_others_are_there(phantom, tmp_path):
    source = str(shutil.copytree(phantom, tmp_path / "tree"))
    path = camus.recording_path(source, PATIENT, View.TWO_CHAMBER, Phase.ED, "_gt")
    os.truncate(path, 40)
    found, missing = TreeTruth(source, images=False).cases([PATIENT])
    assert [case.name for case in found] == [f"{PATIENT}_2CH_ES", f"{PATIENT}_4CH_ED", f"{PATIENT}_4CH_ES"]
    assert missing[0]["file"] == path and "cut off" in missing[0]["reason"]


@pytest.mark.parametrize("place", ["{}_pred.NII.GZ", "{}_gt.nii", "deep/er/{}.nii.gz"])
def test_a_mask_is_found_by_its_name_wherever_it_lies(cases, tmp_path, place):
    path = put(tmp_path, "a.nii" if place.endswith("nii") else "a.nii.gz", cases[0].truth)
    os.renames(path, tmp_path / "masks" / place.format(cases[0].name))
    predictions = FilePredictions.open(str(tmp_path / "masks"))
    (mask,), missing = predictions.masks(cases[:1])
    assert (mask.mask == cases[0].truth).all() and not missing
    assert predictions.has_any(PATIENT) and not predictions.has_any("patient0002")


def test_a_prediction_precedes_a_truth_and_that_a_bare_name_and_a_pattern_decides_between_two(cases, tmp_path):
    bare, gt, pred = (put(tmp_path, f"{cases[0].name}{s}.nii.gz", cases[0].truth) for s in ("", "_gt", "_pred"))
    for path in (pred, gt, bare):
        assert FilePredictions.open(str(tmp_path)).path(PATIENT, View.TWO_CHAMBER, Phase.ED) == path
        os.remove(path)
    put(tmp_path, f"a/{cases[0].name}.nii.gz", cases[0].truth)
    wanted = put(tmp_path, f"b/{cases[0].name}.nii", cases[0].truth)
    with pytest.raises(UserError, match=f"could both be the mask of {cases[0].name}: use --pattern"):
        FilePredictions.open(str(tmp_path)).masks(cases[:1])
    predictions = FilePredictions.open(str(tmp_path), "b/{patient}_{view}_{phase}.nii")
    assert predictions.path(PATIENT, View.TWO_CHAMBER, Phase.ED) == wanted


OUTSIDE = ["../{patient}{view}{phase}.nii", "/{patient}{view}{phase}.nii"]


@pytest.mark.parametrize("pattern", [*OUTSIDE, "{phase", "{study}", "{patient.x}", "{patient[x]}", "{view}.nii"])
def test_a_pattern_that_leads_outside_the_folder_or_has_other_fields_is_refused(tmp_path, cases, pattern):
    put(tmp_path, "x.nii.gz", cases[0].truth)
    with pytest.raises(UserError, match="--pattern"):
        FilePredictions.open(str(tmp_path), pattern)


def test_images_wrong_shapes_and_absent_masks_are_missing_with_a_reason(phantom, cases, tmp_path):
    image = camus.recording_path(phantom, PATIENT, View.TWO_CHAMBER, Phase.ED)
    shutil.copy(image, tmp_path / f"{cases[0].name}.nii.gz")  # a bare name that holds an image, not labels
    put(tmp_path, f"{cases[1].name}.nii.gz", cases[1].truth[:-1])
    masks, missing = FilePredictions.open(str(tmp_path)).masks(cases[:3])
    assert masks == [None, None, None]
    reasons = [row["reason"] for row in missing]
    assert "label" in reasons[0] and "the expert's mask (" in reasons[1] and reasons[2] == "the prediction is missing"


@pytest.mark.parametrize(("folder", "said"), [("", "holds no NIfTI file"), ("gone", "does not exist")])
def test_a_folder_without_masks_is_refused(tmp_path, folder, said):
    with pytest.raises(UserError, match=said):
        FilePredictions.open(str(tmp_path / folder))
