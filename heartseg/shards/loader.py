"""Rows to global batches to this rank's share of them on its device.

One permutation an epoch, from (seed, epoch) alone, is cut into global batches; each rank takes its slice of each, so that
several workers follow one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from heartseg.errors import UserError
from heartseg.shards.reader import FrameRows

# Images [b,1,H,W] and labels [b,H,W].
Batch = tuple[torch.Tensor, torch.Tensor]
# A generator of torch takes this many seeds; what is mixed from a large one wraps around.
SEEDS = 2**64


class Batches(Protocol):
    """What feeds the engine: a `Loader` from memory or a `streaming_loader.Stream`, which the engine treats alike."""

    def __len__(self) -> int: ...
    def training_batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]: ...
    def batch_rows(self, batch_size: int, seed: int, epoch: int, step: int) -> list[int]: ...
    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Intensity:
    """How 0-255 becomes what the network sees: (value / 255 - mean) / std."""

    mean: float = 0.0
    std: float = 1.0

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images whose values lie between 0 and 1."""
        return images if (self.mean, self.std) == (0.0, 1.0) else (images - self.mean) / self.std


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Training steps of an epoch: the last incomplete batch is dropped. Raises UserError if none is complete."""
    if num_rows < batch_size:
        raise UserError(
            f"The training group has {num_rows} images, fewer than a batch of {batch_size}: lower --train.batch-size."
        )
    return num_rows // batch_size


def check_shares(batch_size: int, world_size: int, accumulate: int = 1) -> None:
    """Raise UserError if a worker's share, or one of its parts, is under two images: batch normalisation needs two."""
    if batch_size // world_size < 2:
        raise UserError(
            f"A batch of {batch_size} over {world_size} workers leaves one of them under 2 images: "
            f"use --workers {batch_size // 2} or fewer, or a larger --train.batch-size."
        )
    if batch_size // world_size // accumulate < 2:
        raise UserError(
            f"A batch of {batch_size} over {world_size} workers, each in {accumulate} parts, leaves a part under 2 images: "
            f"use --train.accumulate {batch_size // world_size // 2} or less, or a larger --train.batch-size."
        )


def share(batch_size: int, rank: int, world_size: int) -> slice:
    """A rank's rows of a global batch: contiguous, and at most one row more than any other rank's."""
    return slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; to a GPU it goes from pinned memory, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def epoch_seed(seed: int, epoch: int, among: int = 1, place: int = 0) -> int:
    """A generator's seed for an epoch of a run, or for one of `among` places in it: a rank, a step."""
    return ((seed * 1_000_003 + epoch) * among + place) % SEEDS


def epoch_order(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of an epoch, the same on every rank: int64 [num_rows]."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    return torch.randperm(num_rows, generator=generator)


@dataclass(frozen=True, eq=False)
class Loader:
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

    def training_batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """This rank's share of each global batch of an epoch: images [b,1,H,W] from 0 to 1 and labels [b,H,W]."""
        order = to_device(epoch_order(len(self), seed, epoch), self.images.device)
        mine = share(batch_size, self.rank, self.world_size)
        for step in range(steps_per_epoch(len(self), batch_size)):
            rows = order[step * batch_size : (step + 1) * batch_size][mine]
            # Copies whole images: indexing with a tensor copies single bytes, at twenty times the price on a CPU.
            yield self.images.index_select(0, rows).float().div_(255), self.masks.index_select(0, rows)

    def batch_rows(self, batch_size: int, seed: int, epoch: int, step: int) -> list[int]:
        """The rows of one global batch, to name what was in it."""
        return epoch_order(len(self), seed, epoch)[step * batch_size : (step + 1) * batch_size].tolist()

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's rows in order, as training batches have them; over all ranks each row comes once."""
        mine = share(len(self), self.rank, self.world_size)
        for start in range(mine.start, mine.stop, batch_size):
            rows = slice(start, min(start + batch_size, mine.stop))
            yield self.images[rows].float().div_(255), self.masks[rows]
