"""Many clips to masks at the speed of the model: threads read and write files while it runs, in batches across clips."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from heartseg.config.experiment import PredictConfig
from heartseg.datasets.nifti import DamagedRecording
from heartseg.datasets.readers import Frames
from heartseg.inference.segmenter import NO_POSTPROCESSING, Ensemble, Segmenter, confidence, scores_of, to_grid, to_mask

Clip, Result = TypeVar("Clip"), TypeVar("Result")
# Clips in memory on either side of the model; a long video is some 100 MB.
READERS, WRITERS, AHEAD = 2, 2, 12


@dataclass(eq=False)
class ClipInFlight:
    """A clip that is being segmented: its frames, the same on the model's grid [T,1,h,w], and its masks and confidences so far.

    A damaged clip has its `damage` and no frames.
    """

    clip: object
    frames: Frames | None
    small: torch.Tensor
    damage: DamagedRecording | None = None
    parts: list[Future] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)

    def masks(self) -> np.ndarray:
        """Labels uint8 [T,H,W] on the frames' own grid; waits for them."""
        return np.concatenate([part.result() for part in self.parts])


def outline(
    segmenter: Segmenter | Ensemble,
    clips: Iterable[Clip],
    read: Callable[[Clip], Frames],
    finish: Callable[[Clip, Frames, np.ndarray, list[float]], Result],
    batch_size: int = 8,
    options: PredictConfig = NO_POSTPROCESSING,
) -> Iterator[tuple[Clip, Result | DamagedRecording]]:
    """Segment every frame of every clip; yields each clip, in order, with the result of `finish`.

    `read` and `finish` are called in threads; `finish` gets the clip, its frames, its masks uint8 [T,H,W] and the
    network's confidence in each. A clip whose `read` raises DamagedRecording comes with it instead of a result; any other
    error ends the iteration.
    """

    def prepare(clip):
        try:
            frames = read(clip)
        except DamagedRecording as damage:
            return ClipInFlight(clip, None, torch.empty(0), damage)
        return ClipInFlight(clip, frames, to_grid(segmenter, frames.pixels))

    def complete(one: ClipInFlight):
        return one.clip, one.damage or finish(one.clip, one.frames, one.masks(), one.confidences)

    torch.get_num_threads()  # fixes this thread's share of the cores before the others ask for one each
    with _pool(READERS) as readers, _pool(WRITERS) as writers:
        waiting: deque[Future] = deque()
        try:
            for batch in batches(_in_order(readers, prepare, clips), batch_size):
                for one in _forward(segmenter, batch, writers, options):
                    waiting.append(writers.submit(complete, one))
                while waiting and (waiting[0].done() or len(waiting) > AHEAD):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def to_masks(logits: torch.Tensor, shape: tuple[int, int], options: PredictConfig) -> np.ndarray:
    """Labels uint8 [b,H,W] on the native grid of class scores [b,4,h,w]."""
    return np.stack([to_mask(scores, shape, options) for scores in logits])


def batches(clips: Iterable[ClipInFlight], size: int) -> Iterator[list[tuple[ClipInFlight, int, int]]]:
    """Frames of successive clips in batches of `size`: lists of (clip, its first frame in the batch, one past its last).

    A clip without frames (a damaged one) is (clip, 0, 0), so that the order is kept.
    """
    batch, room = [], size
    for one in clips:
        start, frames = 0, len(one.small)
        while True:
            stop = min(frames, start + room)
            batch.append((one, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], size
            if stop == frames:
                break
    if batch:
        yield batch


def _forward(segmenter: Segmenter | Ensemble, batch: list[tuple], writers: ThreadPoolExecutor, options: PredictConfig) -> list:
    """Run the model on a batch and let `writers` resample its scores; returns the clips that it completes, in order."""
    images = [one.small[start:stop] for one, start, stop in batch if stop]
    if images:
        logits = scores_of(segmenter, torch.cat(images), options)
        sure = confidence(logits)
        logits = logits.float().cpu()
    position = 0
    for one, start, stop in batch:
        if stop:
            chosen = slice(position, position := position + stop - start)
            one.confidences += sure[chosen]
            one.parts.append(writers.submit(to_masks, logits[chosen], one.frames.pixels.shape[1:], options))
    return [one for one, _, stop in batch if stop == len(one.small)]


def _in_order(pool: ThreadPoolExecutor, job: Callable, values: Iterable) -> Iterator:
    """Results of a job in the values' order, a few of them computed ahead."""
    values, ahead = iter(values), deque()
    try:
        while True:
            ahead.extend(pool.submit(job, value) for value in itertools.islice(values, AHEAD - len(ahead)))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def _pool(workers: int) -> ThreadPoolExecutor:
    # Threads that each start as many of torch's own as there are cores would take them from the model.
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
