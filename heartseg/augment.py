"""Paired random changes of images and masks, a batch at a time on its device, each sample with its own draw."""

import math

import torch
from torch.nn.functional import affine_grid, grid_sample

from heartseg.config import AugmentConfig


def augment(
    config: AugmentConfig, images: torch.Tensor, masks: torch.Tensor, global_size: int, offset: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change images [b,1,H,W] (floats 0 to 1) and masks [b,H,W] alike; returns both.

    Draws are made for a whole global batch of `global_size` images from `seed`, and these rows take theirs from `offset`
    on: the same image is changed in the same way whatever the number of ranks.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    rows = slice(offset, offset + len(images))

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(global_size, *shape, generator=generator, device=images.device)[rows] * 2 - 1

    if config.gain or config.gamma:
        gain = 1 + config.gain * draw(1, 1, 1)
        exponent = (1 + config.gamma) ** draw(1, 1, 1)
        images = (gain * images.pow(exponent)).clamp_(0, 1)
    if config.noise:
        size = (global_size, *images.shape[1:])
        noise = torch.randn(size, generator=generator, device=images.device)[rows]
        # Speckle is multiplicative: what is black, the outside of the sector above all, stays black.
        images = (images * (1 + config.noise * draw(1, 1, 1).abs() * noise)).clamp_(0, 1)
    if config.rotate_deg or config.scale or config.translate:
        images, masks = _affine(config, images, masks, draw(4))
    return images, masks


def _affine(
    config: AugmentConfig, images: torch.Tensor, masks: torch.Tensor, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate, scale and shift; images bilinear, masks nearest, black and background from outside."""
    height, width = images.shape[-2:]
    angle = draws[:, 0] * math.radians(config.rotate_deg)
    zoom = 1 / (1 + config.scale * draws[:, 1])
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    # The grid's axes run from -1 to 1 along sides of different length: the aspect ratio keeps a rotation rigid.
    first = torch.stack([cosine, -sine * height / width, 2 * config.translate * draws[:, 2]], dim=1)
    second = torch.stack([sine * width / height, cosine, 2 * config.translate * draws[:, 3]], dim=1)
    grid = affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    moved = grid_sample(images, grid, mode="bilinear", align_corners=False)
    labels = grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)
    return moved, labels[:, 0].to(masks.dtype)
