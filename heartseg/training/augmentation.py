"""Random augmentation of images together with their masks, on the batch's device, drawn for each sample."""

import math

import torch
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from heartseg.config.training import AugmentConfig
from heartseg.shards.loader import epoch_seed

# Tangent of half the sector's opening angle, with the image's height and width both taken as 1: 0.6 to 0.7 in CAMUS.
SECTOR_TANGENT = 0.65


def augment(
    config: AugmentConfig, images: torch.Tensor, masks: torch.Tensor, global_size: int, offset: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment images [b,1,H,W] (floats from 0 to 1) together with their masks [b,H,W]; returns both.

    `seed` determines the draws for a global batch of `global_size` images, of which these start at `offset`, so that the
    result does not depend on the number of ranks. Newer kinds of change draw last, so that the older ones' draws stay the same.
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
        noise = torch.stack([_noise(image, seed, row) for row, image in enumerate(images, start=offset)])
        # Speckle is multiplicative: black stays black, above all outside the sector.
        images = (images * (1 + config.noise * draw(1, 1, 1).abs() * noise)).clamp_(0, 1)
    is_moved = bool(config.rotate_deg or config.scale or config.translate)
    moves = draw(4) if is_moved else None
    if config.blur:
        images = _blur(images, config.blur * draw(1).abs(), config.blur)
    if config.sector_dropout:
        images = _darken_wedge(images, config.sector_dropout * draw(1, 1).abs(), draw(1, 1), draw(1, 1).abs())
    if config.contrast:
        images = _stretch(images, (1 + config.contrast) ** draw(1, 1, 1))
    return _affine(config, images, masks, moves) if is_moved else (images, masks)


def _noise(image: torch.Tensor, seed: int, row: int) -> torch.Tensor:
    """Normal noise shaped like an image, from a generator of its row's own: each rank draws for its own rows alone."""
    generator = torch.Generator(image.device).manual_seed(epoch_seed(seed, row))
    return torch.randn(image.shape, generator=generator, device=image.device)


def _stretch(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Scale the distance of each image's greys from their mean by `factor` [b,1,1,1]; black stays black."""
    seen = images > 0
    mean = images.sum(dim=(1, 2, 3), keepdim=True) / seen.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    return torch.where(seen, (mean + factor * (images - mean)).clamp(0, 1), images)


def _blur(images: torch.Tensor, sigma_px: torch.Tensor, largest_px: float) -> torch.Tensor:
    """Blur each image with its own Gaussian: `sigma_px` [b,1], none above `largest_px`; borders are replicated."""
    reach = math.ceil(3 * largest_px)
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernels = torch.softmax(-0.5 * (offsets / sigma_px.clamp(min=1e-3)) ** 2, dim=1)
    # One group per sample: the batch becomes the channels of one image, each with its own kernel.
    rows = pad(images.transpose(0, 1), (0, 0, reach, reach), mode="replicate")
    rows = conv2d(rows, kernels[:, None, :, None], groups=len(images))
    columns = pad(rows, (reach, reach, 0, 0), mode="replicate")
    return conv2d(columns, kernels[:, None, None, :], groups=len(images)).transpose(0, 1)


def _darken_wedge(images: torch.Tensor, width: torch.Tensor, place: torch.Tensor, darkness: torch.Tensor) -> torch.Tensor:
    """Darken a wedge below the probe: `width` is its share of the sector, `place` its position, -1 to 1; these are [b,1,1]."""
    depth, lateral = ((torch.arange(size, device=images.device) + 0.5) / size for size in images.shape[-2:])
    # Each scan line from the apex (the middle of the top row, as in CAMUS) has its own tangent, from -1 to 1 across the sector.
    tangent = (lateral - 0.5) / depth[:, None] / SECTOR_TANGENT
    # A beam has no sharp border: the shadow fades over a tenth of its half-width.
    inside = ((1 - (tangent - place).abs() / width.clamp(min=1e-6)) * 10).clamp(0, 1)
    return images * (1 - darkness * inside)[:, None]


def _affine(
    config: AugmentConfig, images: torch.Tensor, masks: torch.Tensor, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate, scale and shift images (bilinear) and masks (nearest neighbour); what lies outside is black and background."""
    height, width = images.shape[-2:]
    angle = draws[:, 0] * math.radians(config.rotate_deg)
    zoom = 1 / (1 + config.scale * draws[:, 1])
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    # The grid's axes run from -1 to 1 along sides of different lengths; the aspect ratio keeps a rotation rigid.
    first = torch.stack([cosine, -sine * height / width, 2 * config.translate * draws[:, 2]], dim=1)
    second = torch.stack([sine * width / height, cosine, 2 * config.translate * draws[:, 3]], dim=1)
    grid = affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    moved = grid_sample(images, grid, mode="bilinear", align_corners=False)
    labels = grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)
    return moved, labels[:, 0].to(masks.dtype)
