"""Augmentation: what each kind changes in an image and what not, and draws that do not depend on the number of ranks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heartseg.config.training import AugmentConfig
from heartseg.shards.loader import share
from heartseg.training.augmentation import SECTOR_TANGENT, augment

OLDER = {"rotate_deg": 20, "scale": 0.2, "translate": 0.1, "gain": 0.3, "gamma": 0.3, "noise": 0.2}
ALL_CHANGES = AugmentConfig(**OLDER, blur=1.0, sector_dropout=0.4)


def pictures(images: int = 6, height: int = 24, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, black in their first rows, and random masks."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(images, 1, height, width, generator=generator)
    image[:, :, :6] = 0
    return image, torch.randint(4, (images, height, width), generator=generator).to(torch.uint8)


def changed(images: torch.Tensor, masks: torch.Tensor, seed: int = 1, **kinds) -> tuple[torch.Tensor, torch.Tensor]:
    return augment(AugmentConfig(**kinds), images.clone(), masks.clone(), len(images), 0, seed)


def test_no_augmentation_changes_nothing_and_later_kinds_leave_the_draws_of_the_others_alone():
    images, masks = pictures(6, 64, 48)
    same_images, same_masks = changed(images, masks)
    assert torch.equal(same_images, images) and torch.equal(same_masks, masks)
    # A blur and a shadow of next to nothing: everything else must come out as without them.
    alone = changed(images, masks, **OLDER)
    beside = changed(images, masks, **OLDER, blur=1e-9, sector_dropout=1e-9, contrast=1e-9)
    torch.testing.assert_close(alone[0], beside[0], rtol=0, atol=1e-5)
    assert torch.equal(alone[1], beside[1])


@given(seed=st.integers(0, 2**31), world=st.integers(1, 3))
def test_augmentation_is_the_same_whatever_the_number_of_ranks(seed, world):
    images, masks = pictures()
    whole = augment(ALL_CHANGES, images.clone(), masks.clone(), 6, 0, seed)
    slices = [share(6, rank, world) for rank in range(world)]
    parts = [augment(ALL_CHANGES, images[s].clone(), masks[s].clone(), 6, s.start, seed) for s in slices]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole[0])
    assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
    assert whole[1].dtype == torch.uint8 and set(whole[1].unique().tolist()) <= {0, 1, 2, 3}
    assert whole[0].min() >= 0 and whole[0].max() <= 1


def test_each_image_has_its_own_draw_and_each_seed_others():
    images, masks = (one.expand(4, *one.shape[1:]) for one in pictures(1))
    found = [picture for seed in (1, 2) for picture in augment(ALL_CHANGES, images, masks, 4, 0, seed)[0]]
    assert len({tuple(picture.flatten().tolist()) for picture in found}) == 8


@pytest.mark.parametrize("kind", ["gain", "gamma", "noise"])
def test_black_stays_black_and_masks_stay_the_same_when_only_greys_change(kind):
    images, masks = pictures()
    brighter, same_masks = changed(images, masks, seed=3, **{kind: 0.5})
    assert (brighter[:, :, :6] == 0).all() and not torch.equal(brighter, images) and torch.equal(same_masks, masks)


def test_image_and_mask_move_together_and_rotation_is_rigid():
    masks = torch.zeros(4, 80, 120, dtype=torch.uint8)
    masks[:, 25:55, 40:80] = 1
    moved, labels = changed(masks[:, None].float(), masks, seed=5, rotate_deg=30, translate=0.05)
    assert ((moved[:, 0] > 0.5) == (labels == 1)).float().mean() > 0.99
    assert not torch.equal(labels, masks)
    torch.testing.assert_close(labels.sum(dim=(1, 2)).double(), torch.full((4,), 1200.0).double(), rtol=0.02, atol=0)


def test_blur_spreads_a_point_as_a_gaussian_and_keeps_its_sum():
    images = torch.zeros(64, 1, 41, 41)
    images[:, :, 20, 20] = 1
    blurred, _ = changed(images, images[:, 0].byte(), seed=4, blur=2.0)
    torch.testing.assert_close(blurred.sum(dim=(1, 2, 3)), torch.ones(64), rtol=1e-4, atol=1e-4)
    offset = torch.arange(41) - 20.0
    along, across = (blurred[:, 0].sum(dim=axis) @ offset**2 for axis in (1, 2))
    torch.testing.assert_close(along, across, rtol=1e-3, atol=1e-4)
    # A variance for each image, up to two pixels squared (a tail beyond three deviations is cut).
    assert along.sqrt().max() == pytest.approx(2.0, rel=0.1) and along.sqrt().min() < 0.2 and len(set(along.tolist())) == 64


def test_contrast_stretches_greys_about_their_mean_and_leaves_black_black():
    images, masks = pictures(64, 32, 32)
    images = torch.where(images > 0, 0.4 + 0.2 * images, 0)
    stretched, same_masks = changed(images, masks, seed=7, contrast=0.5)
    inside, before = stretched[:, :, 6:], images[:, :, 6:]
    assert stretched[:, :, :6].eq(0).all() and same_masks.equal(masks)
    torch.testing.assert_close(inside.mean(dim=(1, 2, 3)), before.mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-4)
    factors = inside.std(dim=(1, 2, 3)) / before.std(dim=(1, 2, 3))
    assert 1 / 1.5 - 1e-4 <= factors.min() < 0.75 and 1.35 < factors.max() <= 1.5 + 1e-4
    assert len(set(factors.tolist())) == 64


def test_a_shadow_is_one_wedge_from_the_apex_of_its_share_of_the_sector_and_its_own_darkness():
    size, images = 256, torch.ones(200, 1, 256, 256)
    darkened, masks = changed(images, images[:, 0].byte(), seed=5, sector_dropout=0.5)
    assert masks.eq(1).all() and darkened.min() >= 0 and darkened.max() == 1
    depth, dark = (torch.arange(size) + 0.5) / size, darkened[:, 0] < 1
    # At the row where the sector is as wide as the image, a wedge that lies inside covers its share of the columns.
    row = dark[:, int(0.5 / SECTOR_TANGENT * size)]
    assert 0.4 * size < row.sum(dim=1).max() <= 0.5 * size + 2
    for picture in (picture for picture in dark[:20] if picture.sum() >= 500):
        rows = [r for r in (100, 150) if picture[r].sum() > 0 and not picture[r, 0] and not picture[r, -1]]
        edges = [((picture[r].nonzero()[0].item() + 0.5) / size - 0.5) / depth[r].item() for r in rows]
        # Its edge is a straight line from the apex.
        assert len(edges) < 2 or math.isclose(edges[0], edges[1], abs_tol=0.02)
        assert all(picture[r].int().diff().abs().sum() == 2 for r in rows)
    assert len({tuple(p.flatten().tolist()) for p in darkened[:20, 0, ::16, ::16]}) >= 19
    lowest = changed(images, masks, seed=6, sector_dropout=1.0)[0].amin(dim=(1, 2, 3))
    assert lowest.min() < 0.1 and lowest.max() > 0.8
