"""The batches of a group that is too large for memory, read from its shards as they are needed, on threads of this process.

Threads instead of Ray Data: the order follows from (seed, epoch) alone, it works under every launcher, and it needs no CPU
that a scheduler could withhold.

The shuffle has two levels. The parts are permuted, the rows of each are permuted, and that sequence is cut into up to
`LANES` equal lanes that run side by side: a batch takes its rows from all of them. Unlike in memory, the images of a part
(16 patients' stills) come within as many steps as it has of them, and seldom two in one batch; which parts run beside each
other is drawn again each epoch. A worker holds a part of each lane of its share, however large the group.
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

from heartseg.errors import OneRankError, StorageError, UserError
from heartseg.shards.loader import Batch, Batches, epoch_seed, lanes_of, steps_per_epoch, to_device
from heartseg.shards.reader import PartRows, Shards, as_frames, read_part_rows
from heartseg.storage import filesystem

log = logging.getLogger(__name__)
# Parts that are read before they are needed.
PARTS_AHEAD = 4
# Seconds until the log names a part that does not come, and until it is given up.
SAY_AFTER_S, GIVE_UP_AFTER_S = 30, 300
COLUMNS = ["patient", "image", "mask"]
# A part's number in the group's index, and the rows of the group in it that are to be read.
Piece = tuple[int, np.ndarray]


def stream_order(rows_of_parts: list[int], batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of each global batch of an epoch, int64 [steps, batch_size], for parts of so many rows; on every rank the same.

    The columns (places in a batch) of a lane hold its rows one after the other.
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    starts = np.cumsum([0, *rows_of_parts])
    order = torch.randperm(len(rows_of_parts), generator=generator).tolist()
    drawn = [starts[part] + torch.randperm(rows_of_parts[part], generator=generator).numpy() for part in order]
    steps = steps_per_epoch(int(starts[-1]), batch_size)
    sequence = np.concatenate(drawn)[: steps * batch_size]
    widths = np.bincount(lanes_of(batch_size))
    lanes = np.split(sequence, steps * np.cumsum(widths)[:-1])
    return np.concatenate([lane.reshape(steps, -1) for lane in lanes], axis=1)


def read_ahead(pieces: Iterable[Piece], read: Callable[[Piece], Batch], name_of: Callable[[Piece], str]) -> Iterator[Batch]:
    """What `read` returns for each piece, in order; a few are read before they are needed, each on a thread of its own.

    Raises what `read` raised, and StorageError for a piece that never comes. The threads are daemons: a read that never returns
    keeps neither the training nor its end waiting.
    """

    def fulfil(future: Future, piece: Piece) -> None:
        try:
            future.set_result(read(piece))
        except BaseException as error:  # whoever waits for the piece must get it, whatever it is
            future.set_exception(error)

    waiting, pending = iter(pieces), deque()
    while True:
        for piece in itertools.islice(waiting, PARTS_AHEAD + 1 - len(pending)):
            pending.append((future := Future(), name_of(piece)))
            threading.Thread(target=fulfil, args=(future, piece), name="stream", daemon=True).start()
        if not pending:
            return
        yield _wait_for(*pending.popleft())


def _wait_for(future: Future, name: str) -> Batch:
    for waits in range(1, round(GIVE_UP_AFTER_S / SAY_AFTER_S) + 1):
        if concurrent.futures.wait([future], SAY_AFTER_S).done:
            return future.result()
        log.warning("%s has not come for %d s: waiting for its disk or network.", name, waits * SAY_AFTER_S)
    fix = "check its disk or network, then rerun the same command to resume"
    raise StorageError(f"The shard {name} did not come within {GIVE_UP_AFTER_S} s: {fix}.")


@dataclass(frozen=True, eq=False)
class Stream(Batches):
    """A group that is read again each epoch; its rows are numbered as in a `Loader`.

    Raises OneRankError for a damaged part, and StorageError for one that does not come.
    """

    shards: Shards
    index: list[PartRows]
    rank: int
    world_size: int
    device: torch.device

    def __len__(self) -> int:
        return sum(held.rows for held in self.index)

    def order(self, batch_size: int, seed: int, epoch: int) -> torch.Tensor:
        return torch.from_numpy(stream_order([held.rows for held in self.index], batch_size, seed, epoch))

    def batches(self, rows: torch.Tensor, lanes: torch.Tensor) -> Iterator[Batch]:
        rows, size, lanes = rows.numpy(), len(lanes), np.resize(lanes, len(rows))
        starts = np.cumsum([0, *(held.rows for held in self.index)])
        parts = np.searchsorted(starts, rows, side="right") - 1
        # A piece is what a lane takes from a part, read at once. Pieces are read in the order in which batches need them.
        _, first, piece_of = np.unique(lanes * len(starts) + parts, return_index=True, return_inverse=True)
        places = np.split(np.argsort(piece_of, kind="stable"), np.cumsum(np.bincount(piece_of))[:-1])
        schedule = [(int(parts[first[p]]), rows[places[p]] - starts[parts[first[p]]]) for p in np.argsort(first)]
        ahead = read_ahead(schedule, self._read, self._name)
        left: dict[int, Batch] = {}
        for start in range(0, len(rows), size):
            taken: list[Batch] = []
            for piece, run in itertools.groupby(piece_of[start : start + size].tolist()):
                count = len(list(run))
                images, masks = left.pop(piece, None) or next(ahead)
                taken.append((images[:count], masks[:count]))
                if len(images) > count:
                    left[piece] = images[count:], masks[count:]
            images, masks = (torch.cat(tensors) for tensors in zip(*taken, strict=True))
            yield to_device(images, self.device).float().div_(255), to_device(masks, self.device)

    def _read(self, piece: Piece) -> Batch:
        try:
            table = read_part_rows(self.shards, self.index[piece[0]], piece[1], COLUMNS)
        except UserError as error:
            raise OneRankError(str(error)) from error
        return (frames := as_frames(table, self.shards.image)).images, frames.masks

    def _name(self, piece: Piece) -> str:
        return filesystem.join(self.shards.path, self.index[piece[0]].part["file"])
