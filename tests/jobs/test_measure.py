"""Measuring masks without a network: the numbers of evaluate and predict, other labels and writers, and two readings."""

import csv
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from heartseg.datasets import nifti
from heartseg.datasets.camus import find_patients
from heartseg.errors import UserError
from heartseg.evaluation.ground_truth import TreeTruth
from heartseg.evaluation.scoring import patient_row
from heartseg.metrics.cardiac_indices import INDICES
from heartseg.storage import filesystem
from jobs import measure


def measured(out: Path, masks, **options) -> dict[str, dict]:
    """The row of each patient, unabridged."""
    measure.run(measure.Options(masks=str(masks), out=str(out), **options))
    return {row["patient"]: row for row in filesystem.read_json(str(out / "studies.json"))["patients"]}


def masks_of(tree) -> list[Path]:
    return sorted(Path(tree).rglob("*_?CH_E?_gt.nii.gz"))


@pytest.fixture
def masks(phantom, tmp_path) -> Path:
    """The masks of the phantom's stills alone, in one folder."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in masks_of(phantom):
        shutil.copy(path, folder)
    return folder


def assert_equal(rows: dict[str, dict], others: dict[str, dict]) -> None:
    assert rows.keys() == others.keys()
    for patient, row in rows.items():
        assert {name: row[name] for name in INDICES} == {name: others[patient][name] for name in INDICES}


def test_a_tree_and_its_masks_alone_have_the_truth_columns_of_an_evaluation_to_the_last_digit(phantom, masks, tmp_path, capsys):
    rows = measured(tmp_path / "out", phantom)
    truth = TreeTruth(phantom, images=False)
    for patient in find_patients(phantom):
        cases, _ = truth.cases([patient])
        expected = patient_row(patient, cases, [None] * len(cases))
        assert {name: rows[patient][name] for name in INDICES} == {name: expected[f"{name}_truth"] for name in INDICES}
    assert "EF" in capsys.readouterr().out
    assert_equal(measured(tmp_path / "alone", masks), rows)


def test_masks_with_other_labels_and_structures_have_the_same_numbers(masks, tmp_path):
    rows = measured(tmp_path / "out", masks)
    for path in masks.iterdir():
        image = nibabel.load(path)
        values = np.asarray(image.dataobj).astype(int)
        other = np.choose(values, [0, 7, 5, 9]).astype(np.int16)
        other[values == 0] = 3  # of no structure
        nibabel.Nifti1Image(other, image.affine).to_filename(path)
    found = measured(tmp_path / "other", masks, labels="7=cavity,5=wall,9=atrium")
    assert_equal(found, rows)
    with pytest.raises(
        UserError, match="No mask of --masks could be read .* has labels other than .*: 5, 7, 9: name the values with --labels"
    ):
        measured(tmp_path / "wrong", masks)
    for labels in ("7=heart", "x=wall", "1=wall"):
        with pytest.raises(UserError, match="--labels .*must"):
            measured(tmp_path / "wrong", masks, labels=labels)


def test_a_corrected_mask_changes_its_own_study_alone_and_the_comparison_names_it(masks, tmp_path, capsys):
    corrected = tmp_path / "corrected"
    shutil.copytree(masks, corrected)
    path = next(path for path in sorted(corrected.iterdir()) if "0003_4CH_ES" in path.name)
    values, spacing_mm, _ = nifti.read_nifti(str(path))
    values = values[0].copy()
    values[: int(np.argwhere(values == 1)[:, 0].mean())] = 0  # the apex is cut off
    nifti.write_nifti(str(path), values[None], spacing_mm)
    rows = measured(tmp_path / "out", corrected, compare=str(masks))
    before = measured(tmp_path / "before", masks)
    assert rows["patient0003"]["ef_ase"] != before["patient0003"]["ef_ase"]
    assert_equal({n: r for n, r in rows.items() if n != "patient0003"}, {n: r for n, r in before.items() if n != "patient0003"})
    now, then = (found["patient0003"]["ef_ase"] for found in (rows, before))
    change = f"EF {now:.0f} %, --compare {then:.0f} %"
    assert f"1 patient changed: patient0003 (patient0003_4CH_ES: {change})\n" in capsys.readouterr().out
    with open(tmp_path / "out" / measure.COMPARISON) as stream:
        table = {row["patient"]: row for row in csv.DictReader(stream)}
    changed = table.pop("patient0003")
    assert float(changed["dice_endo"]) < 1 and int(changed["pixels_changed"]) > 0
    assert changed["masks_changed"] == "patient0003_4CH_ES" and not any(row["masks_changed"] for row in table.values())
    assert float(changed["ef_ase_compare"]) == pytest.approx(before["patient0003"]["ef_ase"], abs=0.005)
    assert all(float(row["dice_endo"]) == 1 and row["ef_ase_masks"] == row["ef_ase_compare"] for row in table.values())


def test_what_cannot_be_measured_is_named_and_the_rest_is_done(masks, tmp_path, capsys):
    one, *_ = sorted(masks.iterdir())
    one.write_bytes(one.read_bytes()[:100])
    assert len(measured(tmp_path / "out", masks)) == 8
    assert f"left out: {one.name}"[: -len("_gt.nii.gz")] in capsys.readouterr().out
    copy = masks / one.name.replace("_gt", "_pred")
    shutil.copy(one, copy)
    with pytest.raises(UserError, match="are masks of the same image"):
        measured(tmp_path / "out", masks)
    with pytest.raises(UserError, match="holds no NIfTI files"):
        measured(tmp_path / "again", tmp_path / "out")
    with pytest.raises(UserError, match="is a folder of masks"):
        measured(masks, masks)


def test_a_mask_that_one_reading_lacks_or_has_in_another_size_is_named_and_not_called_equal(masks, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(masks, other)
    gone, cut, small, *_ = sorted(other.iterdir())
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    values, spacing_mm, _ = nifti.read_nifti(str(small))
    nifti.write_nifti(str(small), values[:, ::2, ::2].copy(), (spacing_mm[0] * 2, spacing_mm[1] * 2))
    measured(tmp_path / "out", masks, compare=str(other))
    shown = capsys.readouterr().out
    names = [path.name.removesuffix("_gt.nii.gz") for path in (gone, cut, small)]
    assert f"2 masks only in --masks, not compared: {names[0]}, {names[1]}" in shown
    assert f"1 mask of a different size in --compare, not compared: {names[2]}" in shown
    assert f"left out of --compare: {names[1]}" in shown
    assert "changed: patient0001" in shown  # an EF that is missing in one reading differs


def test_a_mask_of_another_size_than_its_image_and_an_image_without_a_mask_are_named(phantom, tmp_path, capsys):
    tree = tmp_path / "tree"
    shutil.copytree(phantom, tree)
    one, other, *_ = masks_of(tree)
    values, spacing_mm, _ = nifti.read_nifti(str(one))
    nifti.write_nifti(str(one), values[:, ::2, ::2].copy(), spacing_mm)
    other.unlink()
    measured(tmp_path / "out", tree)
    shown = capsys.readouterr().out
    assert re.search(r"left out: .*the mask is \d+ x \d+, but its image is \d+ x \d+", shown)
    assert f"1 file without a mask (images, or masks not named _gt or _pred): {other.name.replace('_gt', '')}" in shown
