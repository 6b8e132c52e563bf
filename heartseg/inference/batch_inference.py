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
from heartseg.inference.postprocessing import clean
from heartseg.inference.segmenter import NETWORKS_OWN, Ensemble, Segmenter, confidence, scores_of, to_native
from heartseg.shards.writer import resize_image

Clip, Result = TypeVar("Clip"), TypeVar("Result")
# Clips that are held in memory on either side of the model; a long video is some 100 MB.
READERS, WRITERS, AHEAD = 2, 2, 12


@dataclass(eq=False)
class Work:
    """A clip on its way: its frames, the same on the model's grid [T,1,h,w], and masks and confidences as they come."""

    clip: object
    frames: Frames
    small: torch.Tensor
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
    options: PredictConfig = NETWORKS_OWN,
) -> Iterator[tuple[Clip, Result | DamagedRecording]]:
    """Segment every frame of every clip; yields each clip, in order, with what `finish` makes of its masks.

    `read` and `finish` are called in threads; `finish` gets the clip, its frames, its masks uint8 [T,H,W] and the
    network's confidence in each. A clip whose `read` raises DamagedRecording comes with it in the place of a result; any
    other error ends all.
    """

    def prepare(clip):
        try:
            frames = read(clip)
        except DamagedRecording as damage:
            return clip, damage
        return Work(clip, frames, to_grid(segmenter, frames.pixels))

    def complete(work: Work):
        return work.clip, finish(work.clip, work.frames, work.masks(), work.confidences)

    torch.get_num_threads()  # fixes this thread's share of the cores before the others ask for one each
    with _pool(READERS) as readers, _pool(WRITERS) as writers:
        waiting: deque[Future] = deque()
        try:
            for batch in batches(_in_order(readers, prepare, clips), batch_size):
                for work in _forward(segmenter, batch, writers, options):
                    waiting.append(writers.submit(complete, work) if isinstance(work, Work) else _done(work))
                while waiting and (waiting[0].done() or len(waiting) > AHEAD):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def to_grid(segmenter: Segmenter | Ensemble, pixels: np.ndarray) -> torch.Tensor:
    """Frames uint8 [T,H,W] as the model sees them: [T,1,h,w]."""
    grid = segmenter.experiment.image
    small = [torch.from_numpy(resize_image(frame, grid.height, grid.width)) for frame in pixels]
    return torch.stack(small)[:, None]


def to_masks(logits: torch.Tensor, shape: tuple[int, int], options: PredictConfig) -> np.ndarray:
    """Labels uint8 [b,H,W] on the native grid of class scores [b,4,h,w]."""
    return np.stack([clean(to_native(scores, shape), options) for scores in logits])


def batches(works: Iterable, size: int) -> Iterator[list[tuple]]:
    """Frames of successive works in batches of `size`: lists of (work, its first frame in the batch, one past its last).

    What is no Work (a damaged clip) goes along as (it, 0, 0), so that the order is kept.
    """
    batch, room = [], size
    for work in works:
        if not isinstance(work, Work):
            batch.append((work, 0, 0))
            continue
        start, frames = 0, len(work.small)
        while start < frames:
            stop = min(frames, start + room)
            batch.append((work, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], size
    if batch:
        yield batch


def _forward(segmenter: Segmenter | Ensemble, batch: list[tuple], writers: ThreadPoolExecutor, options: PredictConfig) -> list:
    """Run the model on a batch, hand the scores on to be resampled; returns what is complete with it, in order."""
    images = [work.small[start:stop] for work, start, stop in batch if isinstance(work, Work)]
    if images:
        logits = scores_of(segmenter, torch.cat(images), options)
        sure = confidence(logits)
        logits = logits.float().cpu()
    complete, position = [], 0
    for work, start, stop in batch:
        if isinstance(work, Work):
            scores = logits[position : position + stop - start]
            work.confidences += sure[position : position + stop - start]
            position += stop - start
            work.parts.append(writers.submit(to_masks, scores, work.frames.pixels.shape[1:], options))
            if stop < len(work.small):
                continue
        complete.append(work)
    return complete


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


def _done(value) -> Future:
    future = Future()
    future.set_result(value)
    return future
