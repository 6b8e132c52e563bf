"""Blur and shadows: what they do to an image, and what they leave alone."""

import math

import pytest
import torch

from heartseg.config.training import AugmentConfig
from heartseg.training.augmentation import SECTOR_TANGENT, augment

OLDER = {"rotate_deg": 20, "scale": 0.2, "translate": 0.1, "gain": 0.3, "gamma": 0.3, "noise": 0.2}


def labels(images: int = 6) -> torch.Tensor:
    return torch.randint(4, (images, 64, 48), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_later_kinds_leave_the_draws_of_the_others_alone():
    # A blur and a shadow of next to nothing: everything else must come out as without them.
    images, masks = torch.rand(6, 1, 64, 48, generator=torch.Generator().manual_seed(2)), labels()
    alone = augment(AugmentConfig(**OLDER), images.clone(), masks, 6, 0, seed=3)
    beside = augment(AugmentConfig(**OLDER, blur=1e-9, sector_dropout=1e-9, contrast=1e-9), images.clone(), masks, 6, 0, seed=3)
    torch.testing.assert_close(alone[0], beside[0], rtol=0, atol=1e-5)
    assert torch.equal(alone[1], beside[1])


def test_blur_spreads_a_point_as_a_gaussian_and_keeps_its_sum():
    images = torch.zeros(64, 1, 41, 41)
    images[:, :, 20, 20] = 1
    blurred, _ = augment(AugmentConfig(blur=2.0), images, torch.zeros(64, 41, 41, dtype=torch.uint8), 64, 0, seed=4)
    torch.testing.assert_close(blurred.sum(dim=(1, 2, 3)), torch.ones(64), rtol=1e-4, atol=1e-4)
    offset = torch.arange(41) - 20.0
    along, across = (blurred[:, 0].sum(dim=axis) @ offset**2 for axis in (1, 2))
    torch.testing.assert_close(along, across, rtol=1e-3, atol=1e-4)
    # A variance for each image, up to two pixels squared (a tail beyond three deviations is cut).
    assert along.sqrt().max() == pytest.approx(2.0, rel=0.1) and along.sqrt().min() < 0.2
    assert len(set(along.tolist())) == 64


def test_contrast_stretches_greys_about_their_mean_and_leaves_black_black():
    images = 0.4 + 0.2 * torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(6))
    images[:, :, :, :8] = 0  # outside the sector
    changed, masks = augment(AugmentConfig(contrast=0.5), images.clone(), labels(64)[:, :32, :32], 64, 0, seed=7)
    inside, before = changed[..., 8:], images[..., 8:]
    assert changed[..., :8].eq(0).all() and masks.equal(labels(64)[:, :32, :32])
    torch.testing.assert_close(inside.mean(dim=(1, 2, 3)), before.mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-4)
    factors = inside.std(dim=(1, 2, 3)) / before.std(dim=(1, 2, 3))
    assert 1 / 1.5 <= factors.min() < 0.75 and 1.35 < factors.max() <= 1.5 + 1e-4
    assert len(set(factors.tolist())) == 64


def test_a_shadow_is_one_wedge_from_the_apex_and_its_share_of_the_sector():
    size, images = 256, torch.ones(200, 1, 256, 256)
    config = AugmentConfig(sector_dropout=0.5)
    changed, masks = augment(config, images.clone(), torch.ones(200, size, size, dtype=torch.uint8), 200, 0, seed=5)
    assert masks.eq(1).all() and changed.min() >= 0 and changed.max() == 1
    depth = (torch.arange(size) + 0.5) / size
    dark = changed[:, 0] < 1
    # At the row where the sector is as wide as the image, a wedge that lies inside covers its share of the columns.
    row = dark[:, int(0.5 / SECTOR_TANGENT * size)]
    assert row.sum(dim=1).max() <= 0.5 * size + 2 and row.sum(dim=1).max() > 0.4 * size
    for picture in dark[:20]:
        if picture.sum() < 500:
            continue
        rows = [r for r in (100, 150) if picture[r].sum() > 0 and not picture[r, 0] and not picture[r, -1]]
        edges = [((picture[r].nonzero()[0].item() + 0.5) / size - 0.5) / depth[r].item() for r in rows]
        # Its edge is a straight line from the apex.
        assert len(edges) < 2 or math.isclose(edges[0], edges[1], abs_tol=0.02)
        assert all(picture[r].int().diff().abs().sum() == 2 for r in rows)
    assert len({tuple(p.flatten().tolist()) for p in changed[:20, 0, ::16, ::16]}) >= 19


def test_a_darkness_differs_from_image_to_image():
    images = torch.ones(100, 1, 64, 64)
    changed, _ = augment(AugmentConfig(sector_dropout=1.0), images, torch.ones(100, 64, 64).byte(), 100, 0, seed=6)
    lowest = changed.amin(dim=(1, 2, 3))
    assert lowest.min() < 0.1 and lowest.max() > 0.8
