"""The device to compute on: a GPU where PyTorch can use one, otherwise the CPU."""

import glob
import os

import torch

from heartseg.errors import UserError, require

GPU_FILES = "/dev/nvidia[0-9]*"  # as NVIDIA's driver names its GPUs; a container sees those that it was given


def choose_device(number: int = 0) -> torch.device:
    """This machine's GPU `number`, or the CPU if there is none or CUDA_VISIBLE_DEVICES hides all.

    `number` counts from 0. Raises UserError if there are fewer GPUs, or if PyTorch cannot use the one there is: training on the
    CPU instead would take days.
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        fix = f"start at most one process per GPU (torchrun --nproc-per-node {count})"
        require(number < count, f"Process {number + 1} has no GPU, since this machine shows only {count}: {fix}.")
        return torch.device("cuda", number)
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    if glob.glob(GPU_FILES) and not is_hidden:
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            fix = "install a torch for its driver (see nvidia-smi), or set CUDA_VISIBLE_DEVICES= to use the CPU"
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"PyTorch cannot use this machine's GPU ({reason}): {fix}.") from error
    return torch.device("cpu")
