"""Batches, shifted copies and ensembles return masks by their definitions, and the memory of clips in flight is bounded."""

import threading
import time
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from heartseg.config.experiment import ImageConfig, PredictConfig, to_json
from heartseg.datasets.nifti import DamagedRecording
from heartseg.datasets.readers import Frames
from heartseg.errors import UserError
from heartseg.inference import batch_inference, segmenter
from heartseg.inference.batch_inference import Room, outline
from heartseg.inference.segmenter import TTA_SHIFT, Ensemble, Segmenter, confidence, load_all, segment_images
from heartseg.models import checkpoint
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.loader import Intensity
from heartseg.shards.reader import load_groups, open_shards
from helpers.experiments import tiny_experiment
from jobs import benchmark
from jobs.benchmarks import postprocess

ALL = PredictConfig(tta=True, largest_component=True, fill_holes=True)


def save_run(folder: str, seed: int, experiment=None) -> str:
    """A run's folder with one checkpoint of random weights, loud enough to label everything."""
    experiment = experiment or tiny_experiment()
    torch.manual_seed(seed)
    model = build_model(experiment.model)
    model.network.classifier[-1].weight.data *= 40
    card = {"epoch": 1, "experiment": to_json(experiment), "intensity": [0.2, 0.2], "metrics": {}, "run": "tiny-1"}
    checkpoint.save(folder, model.state_dict(), {}, card)
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    return [save_run(str(tmp_path_factory.mktemp("run")), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def trained(paths) -> Segmenter:
    return segmenter.load(paths[0], device="cpu")


@pytest.fixture(scope="module")
def images(shards) -> torch.Tensor:
    return load_groups(open_shards(shards), ["test"])["test"].images[:5]


class Fixed:
    """A segmenter whose logits are a function of each pixel alone: 0 to 255 grey makes the four classes."""

    experiment, device = tiny_experiment(), torch.device("cpu")

    def logits(self, images):
        return -((images.float() - torch.tensor([30.0, 95.0, 160.0, 225.0]).view(1, 4, 1, 1)) / 40).square()


def test_predict_is_the_same_alone_and_in_a_batch_of_other_sizes(trained):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((90, 70), (120, 200))]
    together = segment_images(trained, pictures, ALL)
    for picture, one in zip(pictures, together, strict=True):
        alone = trained.predict(picture, ALL)
        assert alone.shape == picture.shape and alone.dtype == np.uint8 and (alone != one.mask).mean() < 1e-3
    assert len(np.unique(np.concatenate([one.mask.ravel() for one in together]))) > 1


def test_options_clean_the_mask_and_leave_the_confidence(trained, images):
    shapes = [(80, 60), (100, 70), (37, 150), (64, 65), (200, 200)]
    raw = segment_images(trained, images[:, 0].numpy(), shapes=shapes)
    options = PredictConfig(largest_component=True, fill_holes=True)
    cleaned = segment_images(trained, images[:, 0].numpy(), options, shapes)
    assert [one.mask.shape for one in cleaned] == shapes
    assert any((a.mask != b.mask).any() for a, b in zip(raw, cleaned, strict=True))
    assert [one.confidence for one in raw] == [one.confidence for one in cleaned]


def test_shifted_copies_come_back_to_their_place():
    # A model without context sees the same pixel in each copy: the average must be its own answer, at the edges too.
    images = torch.randint(0, 256, (3, 1, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alone = Fixed().logits(images).softmax(dim=1)
    assert torch.allclose(segmenter.shifted_logits(Fixed(), images).softmax(dim=1), alone, atol=1e-6)


def test_shifted_copies_are_the_mean_of_five_answers(images):
    def answer(images):  # a pixel's neighbours count
        return Fixed().logits(torch.nn.functional.avg_pool2d(images.float(), 5, 1, 2))

    spy = Mock(device=images.device, logits=Mock(side_effect=answer))
    found = segmenter.shifted_logits(spy, images[:2]).exp()
    seen = [call.args[0] for call in spy.logits.call_args_list]
    assert len(seen) == 5 and torch.equal(seen[0], images[:2])
    shift = round(TTA_SHIFT * 64)
    # The second copy's row r is the image's row r - shift.
    assert torch.equal(seen[1][:, :, shift:], images[:2, :, :-shift])
    answers = [answer(copy).softmax(dim=1) for copy in seen]
    inner = slice(2 * shift, -2 * shift)
    moves = ((0, 0), (-shift, 0), (shift, 0), (0, -shift), (0, shift))
    back = [answer.roll(move, (2, 3)) for answer, move in zip(answers, moves, strict=True)]
    assert torch.allclose(found[:, :, inner, inner], (sum(back) / 5)[:, :, inner, inner], atol=1e-5)


def test_an_ensemble_is_the_mean_of_its_members_probabilities_each_with_its_own_normalisation(paths, images):
    ensemble = load_all(paths, device="cpu")
    first, other = ensemble.members
    ensemble = Ensemble((first, replace(other, intensity=Intensity(0.5, 0.1))))
    members = [member.logits(images).softmax(dim=1) for member in ensemble.members]
    assert not torch.allclose(members[0], members[1], atol=0.01)
    assert not torch.allclose(members[1], other.logits(images).softmax(dim=1), atol=0.01)
    assert torch.allclose(ensemble.logits(images).softmax(dim=1), (members[0] + members[1]) / 2, atol=1e-5)
    (one,) = segment_images(ensemble, images[0].numpy(), ALL, [(50, 60)])
    assert one.mask.shape == (50, 60) and 0 <= one.confidence <= 1


def test_an_ensemble_of_nothing_or_of_two_grids_is_refused(paths, tmp_path):
    with pytest.raises(UserError, match="No checkpoint was given"):
        load_all([])
    wide = save_run(str(tmp_path / "wide"), 1, tiny_experiment(image=ImageConfig(64, 96)))
    with pytest.raises(UserError, match="takes 64 x 96 images"):
        load_all([paths[0], wide])


def test_confidence_is_the_expected_dice():
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, :2], labels[:, 2:4], labels[:, 4:6] = 1, 2, 3
    certain = torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float()
    unsure = 0.6 * certain + 0.1
    none = torch.zeros(1, 4, 8, 8)
    none[:, 0] = 1
    # Of 16 pixels with p = 0.7 and 48 with p = 0.1: 2 * 11.2 / (11.2 + 4.8 + 16).
    assert confidence(torch.cat([certain, unsure, none]).log()) == pytest.approx([1.0, 2 * 11.2 / 32, 0.0])


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_prints_every_variant_and_how_the_confidence_ranks(paths, shards, capsys):
    arguments = ["postprocess", "--checkpoint", paths[0], "--data", shards, "--group", "test"]
    benchmark.job(arguments)
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in (*postprocess.VARIANTS, "dark images", "shadowed images"))
    assert "Spearman" in printed and "8 images of 2 patients (test)" in printed
    with pytest.raises(UserError, match="no group val"):
        benchmark.job([*arguments[:-1], "val"])


SIDE = 40
ROOM = 60 * 2 * SIDE * SIDE  # bytes of 60 frames and their masks


def outlined(lengths: list[int], free: float, monkeypatch, finish=None, fails: tuple[int, ...] = ()) -> tuple[list, int]:
    """Results of clips with these numbers of frames in `free` bytes of memory, and the peak bytes of frames and masks."""
    monkeypatch.setattr(batch_inference, "free_bytes", lambda: free)
    held, most, lock = {}, [0], threading.Lock()

    def read(number, admit) -> Frames:
        pixels = lengths[number] * SIDE * SIDE
        admit(2 * pixels)
        if number in fails:
            raise MemoryError
        with lock:
            held[number] = 2 * pixels
            most[0] = max(most[0], sum(held.values()))
        return Frames(np.random.default_rng(number).integers(0, 256, (lengths[number], SIDE, SIDE), dtype=np.uint8), None)

    def done(number, frames, masks, confidences):
        time.sleep(0.002)
        with lock:
            held.pop(number)
        return (finish or (lambda masks: masks.shape))(masks)

    return list(outline(Fixed(), range(len(lengths)), read, done, batch_size=4)), most[0]


def test_long_clips_take_turns_within_the_bytes_that_are_there(monkeypatch):
    lengths = [1, 30, 2, 50, 50, 1, 1, 40, 3, 1]
    found, most = outlined(lengths, ROOM / batch_inference.SHARE, monkeypatch)
    assert found == [(number, (length, SIDE, SIDE)) for number, length in enumerate(lengths)]
    assert most <= ROOM < outlined(lengths, 1e9, monkeypatch)[1]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_clip_that_does_not_fit_into_memory_is_left_out_with_a_reason_and_the_rest_is_finished(error, monkeypatch):
    def finish(masks):
        if len(masks) == 5:
            raise error
        return len(masks)

    found, _ = outlined([1, 99, 2, 3, 5, 1], ROOM / batch_inference.SHARE, monkeypatch, finish, fails=(3,))
    reasons = {number: result.reason for number, result in found if isinstance(result, DamagedRecording)}
    assert "GB of memory" in reasons.pop(1) and [result for number, result in found if number in (0, 2, 5)] == [1, 2, 1]
    assert reasons.keys() == {3, 4} and all("does not fit into memory" in reason for reason in reasons.values())


def test_an_error_ends_the_iteration_although_other_clips_wait_for_room(monkeypatch):
    def finish(masks):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        outlined([50] * 8, ROOM / batch_inference.SHARE, monkeypatch, finish)


def test_more_bytes_of_the_first_clip_never_wait_for_later_ones():
    room = Room(100 / batch_inference.SHARE)
    for number in (0, 1):
        room.outside.add(number)
        room.admit(number, 50)
    room.admit(0, 40)
    assert room.held == {0: 90, 1: 50}
    with pytest.raises(DamagedRecording, match="GB of memory"):
        room.admit(0, 40)
    room.leave(0)
    room.leave(1)
    assert not room.held
