"""`jobs/predict.py` as a user runs it: files in, masks and tables out, and nothing that identifies a patient."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

import heartseg
from heartseg.config.experiment import to_json
from heartseg.datasets import readers
from heartseg.errors import UserError
from heartseg.inference import study_files
from heartseg.inference.batch_inference import outline
from heartseg.inference.segmenter import NO_POSTPROCESSING, to_mask
from heartseg.models import checkpoint
from heartseg.models.deeplabv3 import build_model
from heartseg.storage import filesystem
from helpers.echo_files import LOOP, dicom, movie
from helpers.experiments import ROOT, spread, tiny_experiment
from jobs import predict


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """A checkpoint whose untrained network predicts all four classes."""
    run, experiment = str(tmp_path_factory.mktemp("run")), tiny_experiment()
    torch.manual_seed(1)
    model = build_model(experiment.model)
    spread(model, model.network.classifier[-1], torch.rand(4, 1, 64, 64))
    card = {"epoch": 1, "experiment": to_json(experiment), "metrics": {}, "intensity": [0.0, 1.0]}
    checkpoint.save(run, model.state_dict(), {}, card)
    return run


@pytest.fixture
def tree(phantom, tmp_path) -> str:
    for patient in ("patient0001", "patient0002"):
        shutil.copytree(f"{phantom}/database_nifti/{patient}", tmp_path / "in" / patient)
    return str(tmp_path / "in")


def run(trained: str, source, out, **changes) -> str:
    return predict.run(predict.Options(checkpoint=trained, input=str(source), out=str(out), **changes))


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_names_that_are_not_utf_8_have_masks_and_rows_and_so_has_their_folder(trained, tree, tmp_path, capsys):
    source, out = os.path.join(os.fsencode(tree), b"r\xe9sum\xe9"), os.fsdecode(bytes(tmp_path) + b"/\xe9")
    os.mkdir(source)
    for phase in (b"ED", b"ES"):
        still = os.path.join(os.fsencode(tree), b"patient0001", b"patient0001_4CH_%b.nii.gz" % phase)
        os.rename(still, os.path.join(source, b"jos\xe9_4CH_%b.nii.gz" % phase))
    run(trained, tree, out, key=os.path.join(out, "key.csv"))
    assert "jos%E9" in capsys.readouterr().out
    table = filesystem.read_bytes(os.path.join(out, "ef.csv")).decode()
    assert [line.split(",")[0] for line in table.splitlines()[1:]] == ["jos%E9", "patient0001", "patient0002"]
    assert os.path.exists(os.path.join(out, "jos%E9", "jos%E9_4CH_ED_pred.nii.gz"))
    assert "r%E9sum%E9/jos%E9_4CH_ED.nii.gz" in filesystem.read_bytes(os.path.join(out, "key.csv")).decode()


def test_each_still_has_its_mask_on_its_own_grid_and_the_same_command_writes_the_same_bytes(trained, tree, tmp_path):
    first = files_of(run(trained, f"{tree}/patient0001", tmp_path / "out"))
    model, seen = heartseg.load(trained), set()
    for clip in study_files.find_clips(f"{tree}/patient0001"):
        image = nibabel.load(clip.path)
        mask = nibabel.load(tmp_path / "out" / clip.patient / f"{clip.stem}_pred.nii.gz")
        expected = model.predict(readers.read(clip.path, "nifti").pixels[0])
        # In a batch sums are made in another order, which decides a pixel between two equal scores.
        different = expected != np.asarray(mask.dataobj).T
        assert different.mean() < 1e-3
        assert mask.shape == image.shape and (mask.affine == image.affine).all()
        assert (tmp_path / "out" / clip.patient / f"{clip.stem}_overlay.png").stat().st_size > 1000
        seen |= set(np.unique(expected))
    assert seen == {0, 1, 2, 3}
    assert files_of(run(trained, f"{tree}/patient0001", tmp_path / "out")) == first
    assert len([name for name in first if name.endswith("_pred.nii.gz")]) == 4
    assert not [name for name in first if ".part" in name]


def test_masks_do_not_depend_on_the_batch_which_may_hold_several_clips_or_a_part_of_one(trained, tmp_path):
    rng = np.random.default_rng(0)
    clips = [readers.Frames(rng.integers(0, 255, (length, 40, 30)).astype(np.uint8), None) for length in (1, 6, 1, 2)]
    segmenter = heartseg.load(trained)
    found = list(outline(segmenter, clips, lambda clip, _: clip, lambda clip, frames, masks, sure: masks, batch_size=4))
    assert [clip for clip, _ in found] == clips
    for clip, masks in found:
        expected = np.stack([segmenter.predict(frame) for frame in clip.pixels])
        assert masks.shape == clip.pixels.shape and (masks != expected).mean() < 1e-3


def test_a_second_call_leaves_no_mask_beside_the_table_of_another_person(trained, tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()

    def put(name: str, seed: int, **tags) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, LOOP.shape).astype(np.uint8)
        if name.endswith("dcm"):
            (source / name).write_bytes(dicom(pixels, region={"RegionLocationMinX0": 5}, **tags))
        else:
            Image.fromarray(pixels[0]).save(source / name)

    def listed() -> dict[str, str]:
        whole = json.loads((out / "studies.json").read_text())
        assert {row["patient"] for row in whole["patients"]} == {clip["patient"] for clip in whole["clips"]}
        masks = {str(path.relative_to(out)) for path in out.rglob("*_pred.nii.gz")}
        assert masks == {clip["mask"] for clip in whole["clips"]}
        pictures = {path.name.rpartition("_")[0] for path in [*out.rglob("*.gif"), *out.rglob("*.png")]}
        assert pictures <= {mask.split("/")[1].removesuffix("_pred.nii.gz") for mask in masks}
        return {clip["mask"]: nibabel.load(out / clip["mask"]).get_fdata().tobytes() for clip in whole["clips"]}

    uid, foreign = "1.2.826.0.1.3680043.8.498.10020030", out / "notes" / "mine_pred.nii.gz"
    for number, name in enumerate(("b.dcm", "c.dcm", "ann.png", "bob.png")):
        put(name, number, StudyInstanceUID=f"{uid}{number}")
    run(trained, source, out)
    first = listed()
    foreign.parent.mkdir()
    foreign.write_bytes(b"not ours")
    # One study is added before the others, one removed; one picture is replaced, and one is gone.
    put("a.dcm", 3, StudyInstanceUID=f"{uid}9")
    put("ann.png", 7)
    for name in ("c.dcm", "bob.png"):
        (source / name).unlink()
    capsys.readouterr()
    run(trained, source, out, overlays="off")
    assert "earlier results of 2 files that are not in --input" in capsys.readouterr().out
    assert foreign.exists()
    foreign.unlink()
    second = listed()
    kept = first.keys() & second.keys()
    assert len(kept) == 2 and len(second) == 3 and not list(out.rglob("*.gif")) and not list(out.rglob("*overlay.png"))
    assert [first[name] == second[name] for name in sorted(kept)] == [False, True]  # ann is another, the study is the same
    # Cut off in the middle, a call leaves no table; the next one clears what it left.
    put("ann.png", 8)
    monkeypatch.setattr(predict.study_results, "write_tables", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(trained, source, out)
    assert not (out / "ef.csv").exists() and "patients" not in json.loads((out / "studies.json").read_text())
    monkeypatch.undo()
    (source / "b.dcm").unlink()
    run(trained, source, out)
    assert len(listed()) == 2


def test_videos_and_pictures_are_outlined_reports_are_listed_apart_and_damage_is_named(trained, tmp_path, capsys):
    report = pydicom.dcmread(io.BytesIO(dicom(LOOP[:1], SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33")))
    del report.PixelData, report.Rows
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    report.save_as(source / "report.dcm")
    with pytest.raises(UserError, match="No file could be read \\(1 file\\); first: it holds no image"):
        run(trained, source, out)
    (source / "volume.dcm").write_bytes(dicom(LOOP, SOPClassUID="1.2.840.10008.5.1.4.1.1.6.2"))
    (source / "ann_4CH.avi").write_bytes(movie(".avi", "mjpeg", LOOP[:, :96, :80]))
    Image.fromarray(LOOP[0]).save(source / "bob.png")
    run(trained, source, out, spacing_mm=(0.9, 0.8))
    shown = capsys.readouterr().out
    assert "1 DICOM file without a picture" in shown and shown.count("left out:") == 1 and "slices of a 3-D volume" in shown
    mask = nibabel.load(out / "ann" / "ann_4CH_pred.nii.gz")
    assert mask.shape == (80, 96, 3) and mask.header.get_zooms()[:2] == pytest.approx((0.8, 0.9))
    assert all((out / name).exists() for name in ("ann/ann_4CH_overlay.gif", "bob/bob_overlay.png"))
    whole = json.loads((out / "studies.json").read_text())
    assert [len(whole[name]) for name in ("without_picture", "damaged", "clips")] == [1, 1, 2]
    assert whole["clips"][0]["spacing_mm"] == [0.9, 0.8]


@pytest.mark.parametrize("shape", [(64, 64), (397, 250), (1, 1)])
@pytest.mark.parametrize("background", [1.5, -9.0])
def test_masks_are_the_largest_scores_after_resampling(shape, background):
    logits = torch.nn.functional.avg_pool2d(torch.randn(3, 4, 36, 36, generator=torch.Generator().manual_seed(0)), 5, 1)
    logits = logits / logits.std()
    logits[:, 0] += background
    expected = torch.nn.functional.interpolate(logits, shape, mode="bilinear").argmax(dim=1).numpy()
    # Sums in another order decide a pixel between two equal scores.
    masks = np.stack([to_mask(scores, shape, NO_POSTPROCESSING) for scores in logits])
    assert (masks != expected).sum() <= 1e-4 * expected.size


GIVEN = {"checkpoint": "{run}", "input": "{tree}", "out": "{out}"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint": None}, "--checkpoint is missing"),
        ({"out": None}, "--out is missing"),
        ({"checkpoint": "/nowhere"}, "/nowhere does not exist"),
        ({"input": "/nowhere"}, "/nowhere does not exist: give a file"),
        ({"input": "{empty}"}, "holds no NIfTI"),
        ({"input": "{damaged}"}, "No file could be read (1 file)"),
        ({"out": "{tree}/out"}, "outside it"),
        ({"spacing-mm": "0 1"}, "--spacing-mm"),
        ({"device": "cuda"}, "found no GPU"),
    ],
)
def test_a_mistake_is_a_one_line_error(changed, message, trained, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    places = {"run": trained, "tree": tree, "out": tmp_path / "out", "empty": tmp_path / "empty"}
    places["empty"].mkdir()
    places["damaged"] = tmp_path / "damaged.nii"
    places["damaged"].write_bytes(b"no heart")
    words = [word for flag, value in (GIVEN | changed).items() if value for word in (f"--{flag}", *value.split())]
    with pytest.raises(UserError) as caught:
        predict.job([word.format(**places) for word in words])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_intervals_need_an_evaluation_of_this_model_with_the_same_postprocessing_on_unseen_patients(trained, phantom, tmp_path):
    weights = [checkpoint.last(trained).card["weights_sha256"]]
    known = {"ef_ase": {"base": 1.0, "slope": 0.0, "factor": 5.0}, "ef_camus": None}
    summary = {"group": "val", "weights_sha256": weights, "post": to_json(NO_POSTPROCESSING)}
    summary |= {"clinical": {"ef_intervals": known}}

    def predict_with(**changes) -> str:
        filesystem.publish_json(str(tmp_path / "scores" / "summary.json"), summary | changes)
        return run(trained, f"{phantom}/database_nifti/patient0008", tmp_path / "out", calibration=str(tmp_path / "scores"))

    for changes, message in (
        ({"group": "train"}, "that the model was trained on: evaluate this model"),
        ({"weights_sha256": ["0" * 64]}, "scores another model"),
        ({"post": summary["post"] | {"tta": True}}, "was postprocessed differently"),
        ({"clinical": {}}, "has no EF intervals: evaluate again"),
    ):
        with pytest.raises(UserError, match=message):
            predict_with(**changes)
    for changes in ({}, {"group": "out-of-fold", "weights_sha256": []}):
        (row,) = json.loads(Path(predict_with(**changes), "studies.json").read_bytes())["patients"]
        assert [row["ef_ase_low"], row["ef_ase_high"]] == pytest.approx([row["ef_ase"] - 5, row["ef_ase"] + 5])
        assert row["ef_camus"] and row["ef_camus_low"] is None


def test_no_identifier_of_a_dicom_reaches_a_name_a_file_or_the_terminal(trained, tmp_path):
    secrets = {
        "PatientName": "DOE^JANE", "PatientID": "MRN778899", "PatientBirthDate": "19510203", "InstitutionName": "Stmarys",
        "StudyInstanceUID": "1.2.826.7.7.1", "SeriesInstanceUID": "1.2.826.7.7.2", "ReferringPhysicianName": "HOUSE^GREG",
        "StudyDate": "20200304", "AccessionNumber": "ACC4711", "StationName": "ROOMNINE", "PatientAddress": "Elmstreet",
        "PatientComments": "MRN778899 " * 3, "PatientSex": "JANE?", "SpecificCharacterSet": "JANE_8859",
    }  # fmt: skip
    folder = tmp_path / "DOE_JANE" / "1.2.826.7.7"
    folder.mkdir(parents=True)
    corners = {"RegionLocationMinX0": 5, "RegionLocationMinY0": 10}
    (folder / "1.2.826.7.7.3.dcm").write_bytes(dicom(LOOP, region=corners, **secrets))
    (folder / "DOE_A4C").write_bytes(dicom(LOOP[:1], **secrets))  # no region: no picture of what may be burned in
    (folder / "broken.dcm").write_bytes(dicom(LOOP, **secrets)[:4000])
    out = tmp_path / "out"
    command = [sys.executable, "-W", "always", str(ROOT / "jobs" / "predict.py"), "--checkpoint", trained, "--out", str(out)]
    command += ["--input", str(tmp_path / "DOE_JANE"), "--key", str(tmp_path / "key.csv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    (study,) = (path for path in out.iterdir() if path.is_dir())
    names = sorted(re.sub(r"clip\w{6}", "clip", path.name.replace(study.name, "study")) for path in study.iterdir())
    names = [name for name in names if not name.endswith(("_curve.png", "_film.jpg", "_phases.png"))]
    assert names == ["study_4CH_clip_pred.nii.gz", "study_clip_overlay.gif", "study_clip_pred.nii.gz"]
    shown = {"terminal": (done.stdout + done.stderr).replace(str(tmp_path), "").encode()}
    hidden = [part for value in secrets.values() for part in value.strip("?").split("^")] + ["1.2.826", "DOE", "JANE"]
    for name, data in (shown | files_of(out)).items():
        plain = nibabel.load(out / name).to_bytes() if name.endswith(".nii.gz") else data
        plain = re.sub(rb"base64,[\w+/=]+", b"", plain)  # three letters are there by chance
        assert not [secret for secret in hidden if secret.encode() in plain or secret in name], name
    assert f"left out: {study.name}_clip" in done.stdout  # the broken one
    key = dict(line.split(",")[::-1] for line in (tmp_path / "key.csv").read_text().splitlines())
    assert (study / f"{key[f'{folder}/1.2.826.7.7.3.dcm']}_pred.nii.gz").exists()  # a name is resolved by the key alone
    assert nibabel.load(next(study.glob(f"{study.name}_clip*_pred.nii.gz"))).shape == (80, 100, 3)
