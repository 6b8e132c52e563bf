"""Ranks, and the operations across them, which do nothing in a single process."""

import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from heartseg.config.experiment import ModelConfig
from heartseg.config.training import TrainConfig
from heartseg.errors import require
from heartseg.models.devices import choose_device


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for the one rank that writes and reports."""
        return self.rank == 0


def current(device: torch.device) -> Ranks:
    """The ranks of torch.distributed, or a single one if it is not initialised."""
    return Ranks(dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else Ranks(0, 1, device)


TIMEOUT_S = 600  # until a collective operation gives up on a rank; Ray Train's default is half an hour


@contextlib.contextmanager
def plain_ranks() -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment, if any, and leave it at the end; yields the ranks.

    Raises UserError if this process has no GPU on a machine with GPUs.
    """
    device = choose_device(int(os.environ.get("LOCAL_RANK", 0)))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend, own = ("nccl", device) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S), device_id=own)
    try:
        yield current(device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# SyncBatchNorm costs several host synchronisations per layer: `auto` uses it only for ranks with fewer images than this.
FEW_IMAGES = 8


def ddp_options(train: TrainConfig) -> dict[str, bool]:
    """DistributedDataParallel's arguments, for `wrap_model` and Ray's `prepare_model`."""
    # Buckets that are views of the gradients save a copy. The graph is the same at every step, but declaring it static fails
    # an internal assertion in the first backward pass under `no_sync`, and torch.compile splits the graph again.
    is_static = train.accumulate == 1 and train.compile == "off"
    # Training does not use running statistics, and `share_buffers` synchronises them before an evaluation. PyTorch has
    # renamed the option since 2.11, and warns about the old name.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    no_broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {"gradient_as_bucket_view": True, "static_graph": is_static, no_broadcast: False}


def wrap_model(model: nn.Module, ranks: Ranks, train: TrainConfig) -> nn.Module:
    """The model with its gradients averaged over ranks; in a single process, the model itself."""
    if ranks.world_size == 1:
        return model
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, **ddp_options(train))


def share_batch_statistics(model: nn.Module, config: ModelConfig, ranks: Ranks, images: int) -> nn.Module:
    """The model, with SyncBatchNorm if `sync_bn` and a rank's `images` call for it; raises UserError for `on` on CPUs."""
    if ranks.world_size == 1 or config.sync_bn == "off" or config.norm != "batch":
        return model
    has_gpu = ranks.device.type == "cuda"
    fix = "use --model.sync-bn auto or --model.norm group."
    require(has_gpu or config.sync_bn == "auto", f"--model.sync-bn on requires GPUs, but this run uses CPUs: {fix}")
    is_shared = has_gpu and (config.sync_bn == "on" or images < FEW_IMAGES)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if is_shared else model


@torch.no_grad()
def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Copy rank 0's running statistics to every rank, in place, so that all evaluate the model that rank 0 saves."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if ranks.world_size > 1 and buffers:
        joined = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(joined, src=0)
        for buffer, part in zip(buffers, joined.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def reduce_over_ranks(tensor: torch.Tensor, ranks: Ranks, operation=dist.ReduceOp.SUM) -> torch.Tensor:
    """Sum a tensor over ranks in place, or reduce it by another `operation`; returns it."""
    if ranks.world_size > 1:
        dist.all_reduce(tensor, op=operation)
    return tensor


def from_main(value: object, ranks: Ranks) -> object:
    """Rank 0's value, on every rank."""
    box = [value]
    if ranks.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier(ranks: Ranks) -> None:
    """Wait until every rank has arrived."""
    if ranks.world_size > 1:
        dist.barrier()


def raise_first_problem(problem: str | None, ranks: Ranks) -> None:
    """Raise UserError on every rank if any has a problem, with the lowest rank's message, so that none is left waiting."""
    problems = [problem] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(problems, problem)
    require(not any(problems), next(filter(None, problems), ""))
