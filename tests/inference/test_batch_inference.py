"""What clips in flight hold is bounded in bytes, and one that does not fit is left out while the rest is finished."""

import threading
import time

import numpy as np
import pytest
import torch

from heartseg.datasets.nifti import DamagedRecording
from heartseg.datasets.readers import Frames
from heartseg.inference import batch_inference
from heartseg.inference.batch_inference import Room, outline
from helpers.experiments import tiny_experiment


class Bright:
    """A segmenter that gives every pixel the class of its brightest quarter."""

    experiment, device = tiny_experiment(), torch.device("cpu")

    def logits(self, images):
        return -((images.float() - torch.tensor([30.0, 95.0, 160.0, 225.0]).view(1, 4, 1, 1)) / 40).square()


SIDE = 40


def outlined(lengths: list[int], free: float, monkeypatch, finish=None, fails: tuple[int, ...] = ()) -> tuple[list, int]:
    """Results of clips of so many frames in memory of `free` bytes, and the most bytes that frames and masks held at a time."""
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

    return list(outline(Bright(), range(len(lengths)), read, done, batch_size=4)), most[0]


def test_long_clips_take_turns_within_the_bytes_that_are_there(monkeypatch):
    frame = 2 * SIDE * SIDE
    lengths = [1, 30, 2, 50, 50, 1, 1, 40, 3, 1]
    found, most = outlined(lengths, 60 * frame / batch_inference.SHARE, monkeypatch)
    assert found == [(number, (length, SIDE, SIDE)) for number, length in enumerate(lengths)]
    assert most <= 60 * frame
    _, most = outlined(lengths, 1e9, monkeypatch)
    assert most > 60 * frame


def test_a_clip_that_does_not_fit_is_left_out_with_a_reason_and_the_rest_is_finished(monkeypatch):
    frame = 2 * SIDE * SIDE
    found, _ = outlined([1, 99, 2, 3, 1], 60 * frame / batch_inference.SHARE, monkeypatch, fails=(3,))
    reasons = {number: result.reason for number, result in found if isinstance(result, DamagedRecording)}
    assert reasons.keys() == {1, 3} and "GB of memory" in reasons[1] and "does not fit into memory" in reasons[3]
    assert [result for _, result in found if isinstance(result, tuple)] == [(length, SIDE, SIDE) for length in (1, 2, 1)]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_while_masks_are_written_costs_that_clip_alone(error, monkeypatch):
    def finish(masks):
        if len(masks) == 5:
            raise error
        return len(masks)

    found, _ = outlined([1, 5, 2], 1e9, monkeypatch, finish)
    assert [result for _, result in found if not isinstance(result, DamagedRecording)] == [1, 2]


def test_an_error_ends_the_iteration_although_other_clips_wait_for_room(monkeypatch):
    def finish(masks):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        outlined([50] * 8, 60 * 2 * SIDE * SIDE / batch_inference.SHARE, monkeypatch, finish)


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
