"""Rows to global batches to this rank's share of them on its device.

One permutation an epoch, from (seed, epoch) alone, is cut into global batches; each rank takes its slice of each, so that
several workers follow one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from heartseg.errors import require
from heartseg.shards.reader import FrameRows

# Images [b,1,H,W] and labels [b,H,W].
Batch = tuple[torch.Tensor, torch.Tensor]
# A generator of torch takes this many seeds; what is mixed from a large one wraps around.
SEEDS = 2**64
# Parts that feed a batch of a stream side by side, and so parts in memory; a smaller batch has as many lanes as images.
LANES = 16


@dataclass(frozen=True)
class Intensity:
    """How images with values from 0 to 1 become what the network sees: (value - mean) / std."""

    mean: float = 0.0
    std: float = 1.0

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        return images if (self.mean, self.std) == (0.0, 1.0) else (images - self.mean) / self.std


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Training steps of an epoch: the last incomplete batch is dropped. Raises UserError if none is complete."""
    fix = "lower --train.batch-size"
    require(num_rows >= batch_size, f"The training group has {num_rows} images, fewer than a batch of {batch_size}: {fix}.")
    return num_rows // batch_size


def check_shares(batch_size: int, world_size: int, accumulate: int = 1) -> None:
    """Raise UserError if a worker's share, or one of its parts, is under two images: batch normalisation needs two."""
    each, batch = batch_size // world_size, f"A batch of {batch_size} over {world_size} workers"
    fix = f"use --workers {batch_size // 2} or fewer, or a larger --train.batch-size"
    require(each >= 2, f"{batch} leaves one of them under 2 images: {fix}.")
    fix = f"use --train.accumulate {each // 2} or less, or a larger --train.batch-size"
    require(each // accumulate >= 2, f"{batch}, each in {accumulate} parts, leaves a part under 2 images: {fix}.")


def share(batch_size: int, rank: int, world_size: int) -> slice:
    """A rank's rows of a global batch: contiguous, at most one more than any other rank's."""
    return slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


def lanes_of(batch_size: int) -> torch.Tensor:
    """The lane of each place of a batch, int64 [batch_size]: as `share` would divide the batch among the lanes."""
    return (torch.arange(1, batch_size + 1) * min(batch_size, LANES) - 1) // batch_size


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; to a GPU it goes from pinned memory, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def epoch_seed(seed: int, epoch: int, among: int = 1, place: int = 0) -> int:
    """A generator's seed for an epoch of a run, or for one of `among` places in it: a rank, a step."""
    return ((seed * 1_000_003 + epoch) * among + place) % SEEDS


def epoch_order(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of an epoch, the same on every rank: int64 [num_rows]."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(epoch_seed(seed, epoch)))


class Batches:
    """What feeds the engine, which does not know the kind: a `Loader` in memory, or a `Stream`.

    Each kind has a length; `order(batch_size, seed, epoch)`, the rows of each global batch, int64 [steps, batch_size]; and
    `batches(rows, lanes)`, these rows in batches of `len(lanes)`, the place of a batch being filled from its lane.
    """

    rank: int
    world_size: int

    def training_batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """This rank's share of each global batch of an epoch: images [b,1,H,W] from 0 to 1 and labels [b,H,W]."""
        mine = share(batch_size, self.rank, self.world_size)
        return self.batches(self.order(batch_size, seed, epoch)[:, mine].flatten(), lanes_of(batch_size)[mine])

    def batch_rows(self, batch_size: int, seed: int, epoch: int, step: int) -> list[int]:
        """The rows of one global batch."""
        return self.order(batch_size, seed, epoch)[step].tolist()

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's rows in order, as training batches have them; over all ranks each row comes once."""
        mine = share(len(self), self.rank, self.world_size)
        return self.batches(torch.arange(mine.start, mine.stop), torch.zeros(batch_size, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class Loader(Batches):
    """A group in memory, resident on the device, and which of its rows are this rank's."""

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
        for mine in to_device(rows, self.images.device).split(len(lanes)) if len(rows) else ():  # a split of none is not none
            # Copies whole images: indexing with a tensor copies single bytes, at twenty times the price on a CPU.
            yield self.images.index_select(0, mine).float().div_(255), self.masks.index_select(0, mine)
