"""The exported files agree with the checkpoint, on single images and batches, and their note explains how to use them."""

import os
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from heartseg.config.experiment import to_json
from heartseg.errors import UserError
from heartseg.inference.segmenter import Segmenter, load
from heartseg.models import checkpoint
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.reader import load_groups, open_shards
from heartseg.storage import filesystem
from helpers.experiments import ROOT, spread, tiny_experiment
from jobs import export


@pytest.fixture(scope="module")
def images(shards) -> torch.Tensor:
    return load_groups(open_shards(shards), ["test"])["test"].images


@pytest.fixture(scope="module")
def path(shards, images, tmp_path_factory) -> str:
    """A checkpoint of random weights outside a run's folder."""
    folder = str(tmp_path_factory.mktemp("run"))
    experiment = tiny_experiment(data=shards)
    experiment = replace(experiment, model=replace(experiment.model, norm="batch", bn_momentum=1.0))
    torch.manual_seed(0)
    model = build_model(experiment.model)
    spread(model, model.network.classifier[-1], images.float().div(255).sub(0.2).div(0.25))
    card = {"epoch": 1, "experiment": to_json(experiment), "intensity": [0.2, 0.25], "metrics": {}, "run": "tiny-1"}
    checkpoint.save(folder, model.state_dict(), {}, card)
    return folder


@pytest.fixture(scope="module")
def segmenter(path, images) -> Segmenter:
    """The checkpoint with a two-layer network instead of its own, whose export takes half a minute."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 8, 5, padding=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)
    small = torch.nn.Sequential(*layers)
    spread(small, small[-1], images.float().div(255).sub(0.2).div(0.25))
    return replace(load(path, device="cpu"), model=small)


@pytest.fixture(scope="module")
def out(path, segmenter, tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "load", lambda *_, **__: segmenter)
        return export.run(export.Options(checkpoint=path, out=str(tmp_path_factory.mktemp("out"))))


def session_of(out: str):
    return onnxruntime.InferenceSession(os.path.join(out, "model.onnx"), providers=["CPUExecutionProvider"])


def check_answers(out: str, segmenter: Segmenter, images: torch.Tensor) -> None:
    session, reloaded = session_of(out), torch.export.load(os.path.join(out, "model.pt2")).module()
    for rows in (slice(0, 1), slice(1, 3), slice(0, 7)):
        pixels, expected = images[rows].float(), segmenter.logits(images[rows])
        # The answers have several labels and depend on the image: 5 % less light changes them more than the tolerance.
        assert len(expected.argmax(dim=1).unique()) > 1
        assert (segmenter.logits((pixels * 0.95).to(torch.uint8)) - expected).abs().max() > 0.05
        (answer,) = session.run([export.OUTPUT], {export.INPUT: pixels.numpy()})
        assert np.abs(answer - expected.numpy()).max() < 1e-3 and answer.shape == (len(pixels), 4, 64, 64)
        assert (reloaded(pixels) - expected).abs().max() < 1e-3


def test_both_files_agree_with_the_checkpoint_in_batches_of_any_size(out, segmenter, images):
    check_answers(out, segmenter, images)


@pytest.mark.slow
def test_the_files_of_a_real_network_agree_with_the_checkpoint(path, images, tmp_path):
    check_answers(export.run(export.Options(checkpoint=path, out=str(tmp_path / "out"))), load(path, device="cpu"), images)


def test_the_note_describes_the_files_which_name_no_folder_of_this_machine(out, path):
    session, note = session_of(out), filesystem.read_json(os.path.join(out, export.NOTE))
    assert note["use"] == "Research use only, not a medical device."
    assert note["labels"] == {"0": "background", "1": "endo", "2": "myo", "3": "la"}
    assert note["weights_sha256"] == checkpoint.find(path).card["weights_sha256"]
    for described, seen in ((note["input"], session.get_inputs()[0]), (note["output"], session.get_outputs()[0])):
        assert (described["name"], described["shape"]) == (seen.name, seen.shape)
        assert seen.type == f"tensor({described['dtype'][:5]})"
    for entry in note["files"].values():
        data = filesystem.read_bytes(os.path.join(out, entry["file"]))
        assert filesystem.sha256(data) == entry["sha256"]
        assert str(ROOT).encode() not in data and b"site-packages" not in data
    checked = note["checked"]
    assert checked["images"] == "synthetic images" and checked["number"] == 16
    assert checked["onnx"]["largest_logit_difference"] < 1e-3 and checked["onnx"]["labels_that_differ"] <= 1e-3


def test_without_shards_the_files_are_checked_on_synthetic_images(segmenter):
    lost = replace(segmenter, experiment=replace(segmenter.experiment, data="/nowhere"))
    images, kind = export.check_images(lost, "")
    assert kind == "synthetic images" and images.shape == (16, 1, 64, 64) and images.dtype == torch.uint8
    assert images.float().std() > 10
    with pytest.raises(UserError, match="/nowhere holds no finished shards"):
        export.check_images(segmenter, "/nowhere")


def test_only_files_that_label_like_the_checkpoint_are_written(path, tmp_path, monkeypatch):
    calls = {"onnx": lambda images: -images.expand(-1, 4, -1, -1)}
    monkeypatch.setattr(export, "convert", lambda segmenter: ({"onnx": b"x"}, calls))
    with pytest.raises(UserError, match="nothing was written"):
        export.run(export.Options(checkpoint=path, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(path, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed: run `pip install 'heartseg\[export\]'`"):
        export.job(["--checkpoint", path, "--out", "/nowhere/out"])
