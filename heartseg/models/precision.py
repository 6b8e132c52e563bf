"""Which arithmetic a model computes in, and its forward pass in it."""

import torch
from torch import nn

from heartseg.config.training import TrainConfig


def wants_bf16(config: TrainConfig, device: torch.device) -> bool:
    """True where bf16 autocast is asked for, or is `auto` and the hardware computes in it."""
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def forward(train: TrainConfig, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits [B,4,H,W] in float32 of normalised images, computed in the configured precision."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=wants_bf16(train, images.device)):
        logits = model(images.contiguous(memory_format=torch.channels_last))
    # One class after the other: so losses take a third and labels half of the time on CPUs.
    return logits.to(torch.float32, memory_format=torch.contiguous_format)
