"""The decoder of DeepLabv3+ (Chen 2018, arXiv 1802.02611): DeepLabv3's context beside finer features, for sharper outlines."""

import torch
from torch import nn
from torch.nn.functional import interpolate

from heartseg.labels import NUM_CLASSES


class Decoder(nn.Module):
    """Logits [B,4,h,w] from coarse features, which `context` condenses to 256 channels, and fine ones [B,`channels`,h,w]."""

    def __init__(self, context: nn.Module, channels: int):
        super().__init__()
        self.context = context
        self.project = _block(nn.Conv2d(channels, 48, 1, bias=False))
        self.refine = nn.Sequential(_separable(256 + 48, 128), _separable(128, 128))
        self.classify = nn.Conv2d(128, NUM_CLASSES, 1)

    def forward(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        context = interpolate(self.context(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.classify(self.refine(torch.cat([context, self.project(fine)], dim=1)))


def _block(*convolutions: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(*convolutions, nn.BatchNorm2d(convolutions[-1].out_channels), nn.ReLU())


def _separable(channels: int, out_channels: int) -> nn.Sequential:
    """A 3 x 3 convolution as one per channel (depthwise), then one over channels (pointwise), each normalised."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return nn.Sequential(_block(depthwise), _block(nn.Conv2d(channels, out_channels, 1, bias=False)))
