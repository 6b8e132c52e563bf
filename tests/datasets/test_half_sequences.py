"""Every frame of a half sequence becomes a row, from ED to ES, and later steps handle frames without a phase."""

import os
import re
import shutil
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from heartseg.datasets import camus, nifti
from heartseg.datasets.camus import HALF_SEQUENCE, recording_path
from heartseg.datasets.nifti import DamagedRecording
from heartseg.datasets.phantom import write_phantom
from heartseg.errors import UserError
from heartseg.labels import ENDO, Phase, View
from heartseg.shards.reader import load_groups, open_shards
from heartseg.storage import filesystem
from helpers.experiments import tiny_experiment
from jobs import evaluate, preprocess, train

SEQUENCE = preprocess.Options(frames="sequence", launcher="plain")
VIEW = View.FOUR_CHAMBER


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("beats"))
    write_phantom(folder, patients=4, seed=1, sequences=True, scale=0.1)
    return folder


@pytest.fixture
def copied(tree, tmp_path) -> str:
    return shutil.copytree(tree, str(tmp_path / "tree"))


FORWARDS, BACKWARDS = "patient0001", "patient0002"  # from ED to ES, from ES to ED


def read(tree: str, patient: str) -> list[camus.Recording]:
    return camus.read_half_sequence(tree, patient, VIEW)


def phases(frames: list[camus.Recording]) -> dict[int, Phase]:
    return {frame.frame: frame.phase for frame in frames if frame.phase}


def test_every_frame_comes_once_from_ed_to_es_whichever_way_the_file_runs(tree):
    for patient in (FORWARDS, BACKWARDS):
        frames, info = read(tree, patient), camus.read_info(tree, patient, VIEW)
        assert (info.ed < info.es) == (patient == FORWARDS) and 10 <= info.num_frames <= 40
        assert [frame.frame for frame in frames] == list(range(1, info.num_frames + 1))
        assert phases(frames) == {1: Phase.ED, info.num_frames: Phase.ES}
        for frame in (frames[0], frames[-1]):
            still = camus.read_still(tree, patient, VIEW, frame.phase)
            np.testing.assert_array_equal(frame.image, still.image)
            np.testing.assert_array_equal(frame.mask, still.mask)
            assert (frame.spacing_mm, frame.info) == (still.spacing_mm, info)
        areas = [(frame.mask == ENDO).sum() for frame in frames]
        assert areas[0] > areas[-1] and max(np.diff(areas)) <= 2


@pytest.mark.parametrize("text", [None, "Sex: F\n", "ED: 1\nES: 999\n", "ED: 1\nES: 1\n", "ED: 0\nES: 5\n"])
def test_without_a_cfg_that_names_the_frames_the_larger_cavity_is_ed(text, copied):
    for patient in (FORWARDS, BACKWARDS):
        before, cfg = read(copied, patient), os.path.join(copied, camus.IMAGES_FOLDER, patient, f"Info_{VIEW}.cfg")
        os.remove(cfg)
        if text:
            filesystem.publish(cfg, text.encode())
        after = read(copied, patient)
        assert phases(after) == phases(before)
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one.mask, other.mask)


def test_phases_inside_the_file_are_the_cfgs_in_either_direction(copied):
    for patient, ed, es in ((FORWARDS, 3, 7), (BACKWARDS, 7, 3)):
        last = camus.read_info(copied, patient, VIEW).num_frames
        camus.write_info(copied, patient, VIEW, camus.Info(ed=ed, es=es))
        shift = 0 if ed < es else last - 9  # turned round, frame 7 of the file is the one that 7 - 1 others follow
        assert phases(read(copied, patient)) == {3 + shift: Phase.ED, 7 + shift: Phase.ES}


def test_frames_whose_ends_are_equally_large_have_no_phase(copied):
    os.remove(os.path.join(copied, camus.IMAGES_FOLDER, FORWARDS, f"Info_{VIEW}.cfg"))
    path = recording_path(copied, FORWARDS, VIEW, HALF_SEQUENCE, "_gt")
    masks, spacing_mm, _ = nifti.read_nifti(path)
    nifti.write_nifti(path, np.zeros_like(masks), spacing_mm)
    assert phases(read(copied, FORWARDS)) == {}


def test_a_sequence_of_one_frame_or_with_a_fourth_axis_is_read(copied):
    frames = read(copied, FORWARDS)
    paths = [recording_path(copied, FORWARDS, VIEW, HALF_SEQUENCE, suffix) for suffix in ("", "_gt")]
    for path in paths:  # [lateral, depth, 1, time], as some writers have it
        values, spacing_mm, _ = nifti.read_nifti(path)
        nibabel.save(nibabel.Nifti1Image(values.T[:, :, None], np.diag([*spacing_mm[::-1], 1, 1])), path)
    for one, other in zip(frames, read(copied, FORWARDS), strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    for path in paths:
        values, spacing_mm, _ = nifti.read_nifti(path)
        nifti.write_nifti(path, values[:1], spacing_mm)
    (single,) = read(copied, FORWARDS)
    np.testing.assert_array_equal(single.image, frames[0].image)


def spoil_a_label(mask: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(mask))[:, None, None] == 4, 7, mask)


@pytest.mark.parametrize(("change", "reason"), [(lambda mask: mask[1:], "but the image has"), (spoil_a_label, "atrium.: 7")])
def test_a_damaged_sequence_goes_to_quarantine_whole(change, reason, copied, tmp_path):
    path = recording_path(copied, FORWARDS, VIEW, HALF_SEQUENCE, "_gt")
    masks, spacing_mm, _ = nifti.read_nifti(path)
    nifti.write_nifti(path, change(masks).astype(np.uint8), spacing_mm)
    with pytest.raises(DamagedRecording, match=reason):
        read(copied, FORWARDS)
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="1 of 8 recordings cannot be used"):
        preprocess.run(tiny_experiment(source=copied, out=out), SEQUENCE)
    preprocess.run(tiny_experiment(source=copied, out=out), replace(SEQUENCE, max_quarantined=0.125))
    opened = open_shards(out)
    (entry,) = opened.manifest["quarantined"]
    assert (entry["patient"], entry["view"], entry["phase"]) == (FORWARDS, "4CH", None) and entry["file"] in path
    rows = [row for frames in load_groups(opened, opened.groups).values() for row in frames.table.to_pylist()]
    assert {(row["patient"], row["view"]) for row in rows if row["patient"] == FORWARDS} == {(FORWARDS, "2CH")}


def test_a_row_is_a_frame_and_other_frames_in_the_same_folder_are_refused_by_name(tree, phantom, tmp_path):
    written = str(tmp_path / "written")
    preprocess.run(tiny_experiment(source=tree, out=written), SEQUENCE)
    opened = open_shards(written)
    frames = load_groups(opened, ["train", "test"])
    rows = [(row, group.native_mask(i)) for group in frames.values() for i, row in enumerate(group.table.to_pylist())]
    expected = {p: [camus.read_half_sequence(tree, p, view) for view in View] for p in camus.find_patients(tree)}
    assert len(rows) == opened.manifest["rows"] == sum(len(beat) for beats in expected.values() for beat in beats)
    for row, mask in rows:
        frame = expected[row["patient"]][list(View).index(row["view"])][row["frame"] - 1]
        assert row["phase"] == frame.phase
        np.testing.assert_array_equal(mask, frame.mask)
    with pytest.raises(UserError, match="frames: sequence there, stills requested"):
        preprocess.run(tiny_experiment(source=tree, out=written), preprocess.Options(launcher="plain"))
    with pytest.raises(UserError, match=r"holds no \*_half_sequence\.nii\.gz: use --frames stills"):
        preprocess.run(tiny_experiment(source=phantom, out=str(tmp_path / "none")), SEQUENCE)


def test_a_model_trains_on_all_frames_and_every_frame_is_scored(copied, tmp_path):
    for patient in camus.find_patients(copied):  # three frames are as good as thirty
        for view in View:
            for path in (recording_path(copied, patient, view, HALF_SEQUENCE, suffix) for suffix in ("", "_gt")):
                values, spacing_mm, _ = nifti.read_nifti(path)
                nifti.write_nifti(path, values[[0, len(values) // 2, -1]], spacing_mm)
            camus.write_info(copied, patient, view, replace(camus.read_info(copied, patient, view), ed=1, es=3, num_frames=3))
    written = str(tmp_path / "written")
    preprocess.run(tiny_experiment(source=copied, out=written), SEQUENCE)
    recipe = tiny_experiment(data=written, runs=str(tmp_path))
    path = train.run(replace(recipe, train=replace(recipe.train, epochs=1)), train.Options(launcher="plain"))
    out = evaluate.run(evaluate.Options(checkpoint=path, launcher="plain"))
    summary = filesystem.read_json(os.path.join(out, "summary.json"))
    opened = open_shards(written)
    assert summary["images"] == opened.num_rows("test") and summary["by"]["phase"].keys() == {"ED", "ES"}
    assert summary["by"]["phase"]["ED"]["images"] == 2
    images = filesystem.read_table(filesystem.read_bytes(os.path.join(out, "images.parquet"))).to_pandas()
    assert set(images["phase"].dropna()) == {"ED", "ES"} and images["phase"].isna().any() and images["frame"].min() == 1
    samples = np.load(os.path.join(path, "samples", "last.npz"))
    assert not any("None" in name for name in samples["names"]) and any("frame" in name for name in samples["names"])
    with open(os.path.join(out, "report.html")) as stream:
        assert "None" not in re.sub(r"base64,[^\"]+", "", stream.read())  # pictures spell anything
