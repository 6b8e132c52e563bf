"""Turns rows, in memory or streamed, into global batches, and puts this rank's share of each on its device.

One permutation per epoch, from (seed, epoch) alone, is cut into global batches, and each rank takes its slice of each.
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

from heartseg.errors import OneRankError, StorageError, UserError, require
from heartseg.shards.reader import FrameRows, PartRows, Shards, as_frames, read_part_rows
from heartseg.storage import filesystem

log = logging.getLogger(__name__)
Batch = tuple[torch.Tensor, torch.Tensor]  # images [b,1,H,W] and labels [b,H,W]
SEEDS = 2**64  # number of seeds of a torch generator; mixed seeds wrap around
LANES = 16  # parts that feed a streamed batch side by side, and so parts in memory
PARTS_AHEAD = 4  # parts that are read before they are needed
SAY_AFTER_S, GIVE_UP_AFTER_S = 30, 300  # until the log names a late part, and until reading gives up
COLUMNS = ["patient", "image", "mask"]
Piece = tuple[int, np.ndarray]  # a part's number in the group's index, and the group's rows to read from it


@dataclass(frozen=True)
class Intensity:
    """How images with values from 0 to 1 are normalised for the network: (value - mean) / std."""

    mean: float = 0.0
    std: float = 1.0

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images whose values lie between 0 and 1."""
        return images if (self.mean, self.std) == (0.0, 1.0) else (images - self.mean) / self.std


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Training steps per epoch; a last incomplete batch is dropped. Raises UserError if no batch is complete."""
    fix = "lower --train.batch-size"
    require(num_rows >= batch_size, f"The training group has {num_rows} images, fewer than a batch of {batch_size}: {fix}.")
    return num_rows // batch_size


def check_shares(batch_size: int, world_size: int, accumulate: int = 1) -> None:
    """Raise UserError if a worker's share, or one of its micro-batches, has under 2 images, too few for batch normalisation."""
    each, batch = batch_size // world_size, f"A batch of {batch_size} over {world_size} workers"
    fix = f"use --workers {batch_size // 2} or fewer, or a larger --train.batch-size"
    require(each >= 2, f"{batch} gives a worker fewer than the 2 images that batch normalisation needs: {fix}.")
    problem = f"{batch}, each in {accumulate} micro-batches, gives some fewer than the 2 images that batch normalisation needs"
    fix = f"use --train.accumulate {each // 2} or less, or a larger --train.batch-size"
    require(each // accumulate >= 2, f"{problem}: {fix}.")


def share(batch_size: int, rank: int, world_size: int) -> slice:
    """A rank's contiguous rows of a global batch; shares differ by at most one row."""
    return slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


def lanes_of(batch_size: int) -> torch.Tensor:
    """The lane of each position in a batch, int64 [batch_size]; the lanes divide the batch as `share` does."""
    return (torch.arange(1, batch_size + 1) * min(batch_size, LANES) - 1) // batch_size


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; to a GPU it is copied from pinned memory, asynchronously."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def epoch_seed(seed: int, epoch: int, among: int = 1, place: int = 0) -> int:
    """A generator's seed for an epoch of a run, or for one of `among` places in it, such as ranks or steps."""
    return ((seed * 1_000_003 + epoch) * among + place) % SEEDS


def epoch_order(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of an epoch, int64 [num_rows], the same on every rank."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(epoch_seed(seed, epoch)))


class Batches:
    """The engine's source of batches: a `Loader` in memory, or a `Stream`.

    Both have a length; `order(batch_size, seed, epoch)`, the rows of each global batch, int64 [steps, batch_size]; and
    `batches(rows, lanes)`, these rows in batches of `len(lanes)`, each position being filled from its lane.
    """

    rank: int
    world_size: int

    def training_batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """This rank's share of each global batch of an epoch: images [b,1,H,W] from 0 to 1 and labels [b,H,W]."""
        mine = share(batch_size, self.rank, self.world_size)
        return self.batches(self.order(batch_size, seed, epoch)[:, mine].flatten(), lanes_of(batch_size)[mine])

    def batch_rows(self, batch_size: int, seed: int, epoch: int, step: int) -> list[int]:
        """The rows of one global batch, for messages that name its images."""
        return self.order(batch_size, seed, epoch)[step].tolist()

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's rows in order, shaped like training batches; over all ranks, each row occurs once."""
        mine = share(len(self), self.rank, self.world_size)
        return self.batches(torch.arange(mine.start, mine.stop), torch.zeros(batch_size, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class Loader(Batches):
    """A group kept on the device, as a rank's source of batches."""

    images: torch.Tensor
    masks: torch.Tensor
    rank: int
    world_size: int

    @classmethod
    def of(cls, frames: FrameRows, rank: int, world_size: int, device: torch.device) -> "Loader":
        """Put a group's uint8 pixels on the device once: 2,000 images of 256 x 256 are 262 MB."""
        return cls(to_device(frames.images, device), to_device(frames.masks, device), rank, world_size)

    def __len__(self) -> int:
        return len(self.images)

    def order(self, batch_size: int, seed: int, epoch: int) -> torch.Tensor:
        steps = steps_per_epoch(len(self), batch_size)
        return epoch_order(len(self), seed, epoch)[: steps * batch_size].view(steps, batch_size)

    def batches(self, rows: torch.Tensor, lanes: torch.Tensor) -> Iterator[Batch]:
        for mine in to_device(rows, self.images.device).split(len(lanes)) if len(rows) else ():  # not one empty batch
            # Copies whole images: indexing with a tensor copies single bytes, twenty times slower on a CPU.
            yield self.images.index_select(0, mine).float().div_(255), self.masks.index_select(0, mine)


def stream_order(rows_of_parts: list[int], batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of each global batch of an epoch, int64 [steps, batch_size], lane by lane, for parts of these sizes."""
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
    """The result (or exception) of `read` for each piece, in order; a few are read ahead, each on its own thread.

    The threads are daemons, so that a read that never returns blocks neither training nor exit.
    """

    def fulfil(future: Future, piece: Piece) -> None:
        try:
            future.set_result(read(piece))
        except BaseException as error:  # the waiting consumer must get any exception
            future.set_exception(error)

    waiting, pending = iter(pieces), deque()
    while True:
        for piece in itertools.islice(waiting, PARTS_AHEAD + 1 - len(pending)):
            pending.append((future := Future(), name_of(piece)))
            threading.Thread(target=fulfil, args=(future, piece), name="stream", daemon=True).start()
        if not pending:
            return
        future, name, waited_s = *pending.popleft(), 0
        while not concurrent.futures.wait([future], SAY_AFTER_S).done:
            waited_s += SAY_AFTER_S
            log.warning("%s has not arrived after %d s: waiting for its disk or network.", name, waited_s)
            if waited_s >= GIVE_UP_AFTER_S:
                fix = "check its disk or network, then rerun the same command to resume"
                raise StorageError(f"The shard {name} did not arrive within {GIVE_UP_AFTER_S} s: {fix}.")
        yield future.result()


@dataclass(frozen=True, eq=False)
class Stream(Batches):
    """A group too large for memory, read from its shards each epoch, on threads of this process.

    Threads rather than Ray Data, so that the order depends on (seed, epoch) alone, under every launcher.

    The shuffle has two levels. The parts are permuted, the rows of each are permuted, and that sequence is cut into up to
    `LANES` equal lanes that run in parallel: a batch takes its rows from all of them, rarely two from one part (16 patients'
    stills). A worker holds one part per lane of its share, however large the group is.

    Raises OneRankError for a damaged part, and StorageError for one that does not arrive.
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
        # A piece is a lane's rows from one part, read together. Pieces are read in the order in which batches need them.
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
