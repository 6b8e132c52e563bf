"""The batches of a group that is too large for memory, read from its shards as they are needed, on threads of this process.

Threads instead of Ray Data: the order follows from (seed, epoch) alone, it works under every launcher, and it needs no CPU
that a scheduler could withhold, so nothing can wait for one in silence.

The shuffle has two levels. The parts are permuted, the rows of each are permuted, and that sequence is cut into up to
`LANES` equal lanes that run side by side: a batch takes its rows from all of them. Against the full permutation of a group in
memory, the images of a part (16 patients' stills) stay in one lane and so come within as many steps as it has of them, and
seldom two in one batch; which parts run beside each other is drawn again each epoch. A worker reads the lanes of its share
and holds a part of each: its memory depends on the lanes, not on the group.
"""

import concurrent.futures
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from heartseg.errors import StorageError, UserError
from heartseg.shards.loader import Batch, epoch_seed, share, steps_per_epoch, to_device
from heartseg.shards.reader import PartRows, Shards, as_frames, read_part_rows
from heartseg.storage import filesystem

log = logging.getLogger(__name__)
# Parts that feed a batch side by side, and so parts in memory; a batch of fewer images has as many lanes as images.
LANES = 16
# Parts that are read before they are needed.
PARTS_AHEAD = 4
# Seconds until the log names a part that does not come, and until it is given up.
SAY_AFTER_S, GIVE_UP_AFTER_S = 30, 300
COLUMNS = ["patient", "image", "mask"]


def stream_order(rows_of_parts: list[int], batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of each global batch of an epoch, int64 [steps, batch_size], for parts of so many rows; on every rank the same.

    Columns are places in the batch; the columns of a lane hold its rows one after the other.
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    starts = np.cumsum([0, *rows_of_parts])
    order = torch.randperm(len(rows_of_parts), generator=generator).tolist()
    drawn = [starts[part] + torch.randperm(rows_of_parts[part], generator=generator).numpy() for part in order]
    steps = steps_per_epoch(int(starts[-1]), batch_size)
    sequence = np.concatenate(drawn)[: steps * batch_size]
    lanes = [sequence[steps * lane.start : steps * lane.stop].reshape(steps, -1) for lane in lanes_of(batch_size)]
    return np.concatenate(lanes, axis=1)


def lanes_of(batch_size: int) -> list[slice]:
    """The places of a batch that each lane fills."""
    lanes = min(batch_size, LANES)
    return [share(batch_size, lane, lanes) for lane in range(lanes)]


@dataclass(frozen=True)
class Piece:
    """Rows of one part that come one after the other in a lane: where in the part, and at which step the first is needed."""

    step: int
    lane: int
    part: int
    rows: np.ndarray


def pieces_of(lane: int, rows: np.ndarray, width: int, starts: np.ndarray) -> list[Piece]:
    """A lane's rows, `width` of them a step, as pieces; part `p` has the rows from `starts[p]`."""
    parts = np.searchsorted(starts, rows, side="right") - 1
    cuts = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(rows)] if len(rows) else []
    return [
        Piece(first // width, lane, int(parts[first]), rows[first:end] - starts[parts[first]])
        for first, end in zip(cuts[:-1], cuts[1:], strict=True)
    ]


def take(count: int, left: Batch | None, more: Iterator[Batch]) -> tuple[list[Batch], Batch | None]:
    """The next `count` rows of a lane, from what is left of its last piece and from its next ones; and what is left then."""
    taken: list[Batch] = []
    while count:
        images, masks = left or next(more)
        taken.append((images[:count], masks[:count]))
        left = (images[count:], masks[count:]) if len(images) > count else None
        count -= len(taken[-1][0])
    return taken, left


def read_ahead(pieces: Iterable[Piece], read: Callable[[Piece], Batch], name_of: Callable[[Piece], str]) -> Iterator[Batch]:
    """What `read` returns for each piece, in order; a few are read before they are needed, each on a thread of its own.

    Raises what `read` raised, and StorageError for a piece that never comes. The threads are daemons that pass their result
    by a future: a read that never returns keeps neither the training nor its end waiting.
    """
    left, pending = iter(pieces), deque()
    while True:
        for piece in itertools.islice(left, PARTS_AHEAD + 1 - len(pending)):
            pending.append((_start_reading(read, piece), name_of(piece)))
        if not pending:
            return
        yield _wait_for(*pending.popleft())


def _start_reading(read: Callable[[Piece], Batch], piece: Piece) -> Future:
    future = Future()

    def fulfil() -> None:
        try:
            future.set_result(read(piece))
        except BaseException as error:  # whoever waits for the piece must get it, whatever it is
            future.set_exception(error)

    threading.Thread(target=fulfil, name="stream", daemon=True).start()
    return future


def _wait_for(future: Future, name: str) -> Batch:
    for waits in range(1, round(GIVE_UP_AFTER_S / SAY_AFTER_S) + 1):
        if concurrent.futures.wait([future], SAY_AFTER_S).done:
            return future.result()
        log.warning("%s has not come for %d s: waiting for its disk or network.", name, waits * SAY_AFTER_S)
    raise StorageError(
        f"The shard {name} did not come within {GIVE_UP_AFTER_S} s: check its disk or network; "
        "rerun the same command to resume."
    )


@dataclass(frozen=True, eq=False)
class Stream:
    """A group that is read again each epoch, with the methods of `loader.Loader`; its rows are numbered as there."""

    shards: Shards
    index: list[PartRows]
    rank: int
    world_size: int
    device: torch.device

    def __len__(self) -> int:
        return sum(held.rows for held in self.index)

    def training_batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """This rank's share of each global batch of an epoch: images [b,1,H,W] from 0 to 1 and labels [b,H,W].

        Raises StorageError for a part that cannot be read or is damaged: the other ranks may not know.
        """
        order = self._order(batch_size, seed, epoch)
        mine = share(batch_size, self.rank, self.world_size)
        lanes = [order[:, max(lane.start, mine.start) : min(lane.stop, mine.stop)] for lane in lanes_of(batch_size)]
        lanes = [lane for lane in lanes if lane.size]
        yield from self._batches([lane.ravel() for lane in lanes], [lane.shape[1] for lane in lanes])

    def batch_rows(self, batch_size: int, seed: int, epoch: int, step: int) -> list[int]:
        """The rows of one global batch, to name what was in it."""
        return self._order(batch_size, seed, epoch)[step].tolist()

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's rows in order, as training batches have them; over all ranks each row comes once."""
        mine = share(len(self), self.rank, self.world_size)
        yield from self._batches([np.arange(mine.start, mine.stop)], [batch_size])

    def _order(self, batch_size: int, seed: int, epoch: int) -> np.ndarray:
        return stream_order([held.rows for held in self.index], batch_size, seed, epoch)

    def _batches(self, lanes: list[np.ndarray], widths: list[int]) -> Iterator[Batch]:
        """Batches of the next `widths[l]` rows of each lane `l`, until the lanes end, all at the same step."""
        starts = np.cumsum([0, *(held.rows for held in self.index)])
        pieces = [pieces_of(number, *lane, starts) for number, lane in enumerate(zip(lanes, widths, strict=True))]
        # Sorted as the loop below comes to need them: by step, in it by lane, in that as they follow each other.
        schedule = sorted((piece for lane in pieces for piece in lane), key=lambda piece: (piece.step, piece.lane))
        left: list[Batch | None] = [None] * len(lanes)
        ahead = read_ahead(schedule, self._read, self._name)
        for step in range(-(-len(lanes[0]) // widths[0])):
            taken: list[Batch] = []
            for lane, width in enumerate(widths):
                count = min(width, len(lanes[lane]) - step * width)
                found, left[lane] = take(count, left[lane], ahead)
                taken += found
            images, masks = (torch.cat(part) for part in zip(*taken, strict=True))
            yield to_device(images, self.device).float().div_(255), to_device(masks, self.device)

    def _read(self, piece: Piece) -> Batch:
        try:
            table = read_part_rows(self.shards, self.index[piece.part], piece.rows, COLUMNS)
        except UserError as error:
            raise StorageError(str(error)) from error
        frames = as_frames(table, self.shards.image)
        return frames.images, frames.masks

    def _name(self, piece: Piece) -> str:
        return filesystem.join(self.shards.path, self.index[piece.part].part["file"])
