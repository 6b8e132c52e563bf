"""Segments many clips as fast as the model runs: threads read and write files meanwhile, and batches span clips.

The memory of clips in flight is bounded: long clips wait until others are finished.
"""

import contextlib
import itertools
import resource
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from heartseg.config.experiment import PredictConfig
from heartseg.datasets.nifti import DamagedRecording
from heartseg.datasets.readers import Frames
from heartseg.inference.segmenter import NO_POSTPROCESSING, Model, confidence, scores_of, to_grid, to_mask
from heartseg.training.data_loading import free_on_machine

Clip, Result = TypeVar("Clip"), TypeVar("Result")
READERS, WRITERS = 2, 2
AHEAD, BATCHES = 12, 8  # clips waiting before the model, and after it; batches whose scores wait to be resampled
# Clips in flight share this fraction of the memory free at the start, but at most MOST_BYTES; one clip alone may use all of it.
SHARE, MOST_BYTES = 0.75, 4 << 30
TOO_LARGE = "trim it to the beats of interest, or use a machine with more memory"


class Room:
    """The memory budget of all clips in flight; admits clips in the order of their numbers, each as soon as it fits."""

    def __init__(self, free: float):
        self.alone, self.together = SHARE * free, min(SHARE * free, MOST_BYTES)
        self.changed, self.is_closed = threading.Condition(), False
        self.outside, self.waiting, self.held = set(), {}, {}  # numbers not admitted yet; bytes by number

    def admit(self, number: int, num_bytes: int) -> None:
        """Wait until `num_bytes` (more) for a clip fit beside what others hold; raises DamagedRecording if they never will."""
        total = self.held.get(number, 0) + num_bytes
        if total > self.alone:
            size = f"needs {total / 1e9:.1f} GB of memory, but may use only {self.alone / 1e9:.1f} GB"
            raise DamagedRecording(f"{size}: {TOO_LARGE}", "")
        with self.changed:
            self.waiting[number] = num_bytes
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.may_enter(number))
            del self.waiting[number]
            self.outside.discard(number)
            self.held[number] = total
            self.changed.notify_all()

    def may_enter(self, number: int) -> bool:
        """True if a waiting clip fits and every clip before it has been admitted."""
        together = sum(self.held.values()) + self.waiting[number]
        fits = number <= min(self.held, default=number) or together <= self.together
        return self.is_closed or (fits and number <= min(self.outside, default=number))

    def leave(self, number: int) -> None:
        """Release a clip's bytes."""
        with self.changed:
            self.outside.discard(number)
            self.held.pop(number, None)
            self.changed.notify_all()

    def wake(self, *_) -> None:
        """Wake all waiting threads to check again."""
        with self.changed:
            self.changed.notify_all()

    def is_read(self, number: int, reading: Future) -> bool:
        """Wait until a clip is read; returns False if it must first wait for others to leave."""
        reading.add_done_callback(self.wake)
        with self.changed:
            self.changed.wait_for(lambda: reading.done() or (number in self.waiting and not self.may_enter(number)))
            return reading.done()


def free_bytes() -> float:
    """Bytes that this process may still allocate, by the limits of the machine, its container and its address space."""
    free, (most, _) = free_on_machine(), resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return free
    return min(free, most - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())


@dataclass(eq=False)
class ClipInFlight:
    """A clip being segmented; `small` [T,1,h,w] are its frames on the model's grid, empty if it is damaged."""

    number: int
    clip: object
    frames: Frames | None = None
    small: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    masks: np.ndarray | None = None
    confidences: np.ndarray | None = None
    damage: DamagedRecording | None = None
    parts: list[Future] = field(default_factory=list)

    @contextlib.contextmanager
    def keeps_damage(self) -> Iterator[None]:
        """Context manager: store a DamagedRecording or an out-of-memory error in `damage` instead of raising it."""
        try:
            yield
        except DamagedRecording as damage:
            self.damage = damage
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or "alloc" in str(error)):
                raise
            self.damage = DamagedRecording(f"does not fit into memory: {TOO_LARGE}", "")


def outline(
    segmenter: Model,
    clips: Iterable[Clip],
    read: Callable[[Clip, Callable[[int], None]], Frames],
    finish: Callable[[Clip, Frames, np.ndarray, list[float]], Result],
    batch_size: int = 8,
    options: PredictConfig = NO_POSTPROCESSING,
) -> Iterator[tuple[Clip, Result | DamagedRecording]]:
    """Segment every frame of every clip; yields each clip, in order, with the result of `finish` or its DamagedRecording.

    `read` and `finish` run in threads. `read` gets a clip, and a function to call with the number of bytes that its frames and
    masks need, which may wait; `finish` gets the clip, its frames, its masks uint8 [T,H,W] and the confidence in each.
    """
    room, waiting, parts = Room(free_bytes()), deque(), deque()

    def prepare(one: ClipInFlight) -> ClipInFlight:
        with one.keeps_damage():
            one.frames = read(one.clip, partial(room.admit, one.number))
            one.small = to_grid(segmenter, one.frames.pixels)
            one.masks, one.confidences = np.empty(one.frames.pixels.shape, np.uint8), np.empty(len(one.frames.pixels))
        if one.damage:
            one.frames, one.small = None, torch.empty(0)
            room.leave(one.number)
        return one

    def prepared(readers: ThreadPoolExecutor) -> Iterator[ClipInFlight | None]:
        """The clips in order, some read ahead; None if the next one must wait until earlier ones are finished."""
        coming, ahead = (ClipInFlight(number, clip) for number, clip in enumerate(clips)), deque()
        try:
            while True:
                for one in itertools.islice(coming, AHEAD - len(ahead)):
                    room.outside.add(one.number)
                    ahead.append((one.number, readers.submit(prepare, one)))
                if not ahead:
                    return
                if not room.is_read(*ahead[0]):
                    yield None
                yield ahead.popleft()[1].result()
        finally:
            for _, future in ahead:
                future.cancel()

    def forward(batch: list[tuple[ClipInFlight, int, int]], writers: ThreadPoolExecutor) -> None:
        """Run the model on a batch and let `writers` resample its scores."""
        held, position = [(one, start, stop) for one, start, stop in batch if stop], 0
        if held:
            scores = scores_of(segmenter, torch.cat([one.small[start:stop] for one, start, stop in held]), options)
        for one, start, stop in held:
            chosen = slice(position, position := position + stop - start)
            parts.append(writers.submit(_fill, one.masks[start:stop], one.confidences[start:stop], scores[chosen], options))
            one.parts.append(parts[-1])

    def complete(one: ClipInFlight) -> tuple:
        try:
            with one.keeps_damage():
                for part in one.parts:
                    part.result()
                if not one.damage:
                    return one.clip, finish(one.clip, one.frames, one.masks, one.confidences.tolist())
        finally:
            room.leave(one.number)
        return one.clip, one.damage

    torch.get_num_threads()  # fixes this thread's share of the cores before other threads ask for theirs
    # Threads that each start one torch thread per core would take the cores from the model.
    pool = partial(ThreadPoolExecutor, initializer=torch.set_num_threads, initargs=(1,))
    with pool(READERS) as readers, pool(WRITERS) as writers:
        try:
            for batch in batches(prepared(readers), batch_size):
                forward(batch, writers)
                for one in (one for one, _, stop in batch if stop == len(one.small)):  # complete
                    waiting.append(writers.submit(complete, one))
                while len(parts) > BATCHES:
                    wait([parts.popleft()])
                while waiting and (waiting[0].done() or len(waiting) > AHEAD):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            room.is_closed = True  # no clip will leave from here on
            room.wake()
            for future in waiting:
                future.cancel()


def batches(clips: Iterable[ClipInFlight | None], size: int) -> Iterator[list[tuple[ClipInFlight, int, int]]]:
    """Frames of successive clips in batches of `size`: lists of (clip, first frame in the batch, one past the last).

    A clip without frames (damaged) is (clip, 0, 0), which keeps the order. None in place of a clip ends a batch.
    """
    batch, room = [], size
    for one in clips:
        stop, is_whole = 0, one is None
        while not is_whole:
            start, stop = stop, min(len(one.small), stop + room)
            batch.append((one, start, stop))
            room -= stop - start
            is_whole = stop == len(one.small)
            if room == 0:
                yield batch
                batch, room = [], size
        if one is None:
            yield batch
            batch, room = [], size
    yield batch


def _fill(masks: np.ndarray, confidences: np.ndarray, scores: torch.Tensor, options: PredictConfig) -> None:
    """Fill parts of a clip's masks uint8 [b,H,W] and confidences [b] from class scores [b,4,h,w].

    On a GPU, scores are resampled there: only labels, one byte per pixel, are copied to the host.
    """
    confidences[:] = confidence(scores)
    for mask, each in zip(masks, scores, strict=True):
        mask[:] = to_mask(each, mask.shape, options)
