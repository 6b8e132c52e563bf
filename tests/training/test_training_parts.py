"""The pieces of training: losses, optimizer, batches and the network."""

import contextlib
import urllib.request
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from heartseg.config.experiment import ModelConfig
from heartseg.config.training import LossConfig, OptimConfig
from heartseg.errors import UserError
from heartseg.models.deeplabv3 import build_model
from heartseg.shards import loader
from heartseg.training import losses
from heartseg.training.optimizers import AveragedWeights, build_optimizer

LOSSES = [LossConfig("cross_entropy"), LossConfig("dice_cross_entropy")]
SMALL = {"backbone": "mobilenet_v3_large"}


def logits_and_target(images: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    return torch.randn(images, 4, 8, 6, generator=generator), torch.randint(4, (images, 8, 6), generator=generator)


@pytest.mark.parametrize("deterministic", [False, True])
def test_cross_entropy_and_its_gradient_are_torchs(deterministic):
    was, (logits, target) = torch.are_deterministic_algorithms_enabled(), logits_and_target()
    found, wanted = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.use_deterministic_algorithms(deterministic)
    try:
        loss = losses.segmentation_loss(LOSSES[0], found, target.to(torch.uint8))
    finally:
        torch.use_deterministic_algorithms(was)
    # A GPU has no deterministic kernel for the loss of an image: there must be none of it in the graph.
    assert ("NllLoss" in loss.grad_fn.name()) != deterministic
    expected = cross_entropy(wanted, target)
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=1e-6)


def test_soft_dice_is_near_0_for_a_perfect_and_near_1_for_a_wrong_prediction_and_one_hot_is_the_four_channel_truth():
    truth = losses.one_hot((target := logits_and_target()[1]).to(torch.uint8))
    assert truth.shape == (5, 4, 8, 6) and truth.dtype == torch.float32
    assert all(torch.equal(truth[:, label], (target == label).float()) for label in range(4))
    target = torch.zeros(2, 64, 64, dtype=torch.long)
    target[0, :20], target[0, 20:40], target[0, 40:50] = 1, 2, 3  # structures that are absent from both do not count
    assert losses.soft_dice_loss(losses.one_hot(target) * 50, target) < 1e-4
    assert losses.soft_dice_loss(losses.one_hot((target[:1] + 1) % 4) * 50, target[:1]) > 0.99


@pytest.mark.parametrize("config", LOSSES, ids=lambda config: config.kind)
@given(cut=st.integers(1, 4))
@settings(max_examples=5, deadline=None)
def test_a_batchs_loss_is_the_share_weighted_mean_of_its_parts_and_the_auxiliary_heads_is_added_with_its_weight(config, cut):
    logits, target = logits_and_target()
    parts = [losses.segmentation_loss(config, logits[rows], target[rows]) for rows in (slice(cut), slice(cut, 5))]
    whole = losses.segmentation_loss(config, logits, target)
    torch.testing.assert_close(whole, (cut * parts[0] + (5 - cut) * parts[1]) / 5)
    weighted = losses.training_loss(replace(config, aux_weight=0.25), (logits, logits), target)
    torch.testing.assert_close(weighted, 1.25 * losses.training_loss(config, logits, target))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_every_parameter_is_optimized_once_and_only_kernels_are_decayed(kind):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = build_optimizer(OptimConfig(kind, lr=0.1, weight_decay=0.3), model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert decayed == {"0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}
    assert type(optimizer).__name__.lower() == kind


def test_averaged_weights_follow_their_rule_statistics_included_and_reach_a_model_that_stands_still():
    model = nn.BatchNorm2d(2)
    average = AveragedWeights(model, decay=0.5)
    model.running_mean.fill_(8.0)
    model.weight.data.fill_(9.0)
    model.num_batches_tracked.fill_(7)
    average.update()
    kept = 2 / 11  # (1 + n) / (10 + n) after the first update
    torch.testing.assert_close(average.model.running_mean, torch.full((2,), (1 - kept) * 8.0))
    torch.testing.assert_close(average.model.weight.data, torch.full((2,), kept * 1.0 + (1 - kept) * 9.0))
    assert average.model.num_batches_tracked == 7 and not average.model.weight.requires_grad
    for _ in range(60):
        average.update()
    torch.testing.assert_close(average.model.running_mean, model.running_mean)
    before = average.model.running_mean.clone()
    model.running_mean.fill_(0.0)
    average.update()  # the warm-up is over: the decay is now the limit that was asked for
    torch.testing.assert_close(average.model.running_mean, 0.5 * before)
    assert torch.equal(model.running_mean, torch.zeros(2))


@given(size=st.integers(2, 100), world=st.integers(1, 40))
def test_shares_cover_a_batch_differ_by_at_most_one_and_are_refused_exactly_where_one_is_under_two(size, world):
    shares = [range(size)[loader.share(size, rank, world)] for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    few = pytest.raises(UserError, match=f"--workers {size // 2} or fewer")
    with few if min(map(len, shares)) < 2 else contextlib.nullcontext():
        loader.check_shares(size, world)


def numbered(rows: int, rank: int = 0, world: int = 1) -> loader.Loader:
    """A group whose pixels hold the row number."""
    images = torch.arange(rows, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return loader.Loader(images, images[:, 0], rank, world)


def rows_in(batches) -> list[list[int]]:
    found = [(images[:, 0, 0, 0] * 255, masks[:, 0, 0]) for images, masks in batches]
    assert all(images.round().tolist() == masks.tolist() for images, masks in found)
    return [masks.tolist() for _, masks in found]


@given(rows=st.integers(8, 60), size=st.integers(2, 8), world=st.integers(1, 4), epoch=st.integers(0, 5))
def test_ranks_together_train_on_the_batches_of_one_process(rows, size, world, epoch):
    assume(world <= size)
    alone = rows_in(numbered(rows).training_batches(size, 7, epoch))
    ranks = [rows_in(numbered(rows, rank, world).training_batches(size, 7, epoch)) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone
    assert len(alone) == rows // size == loader.steps_per_epoch(rows, size)
    assert len(set(sum(alone, []))) == len(alone) * size
    assert [numbered(rows).batch_rows(size, 7, epoch, step) for step in range(len(alone))] == alone


def test_the_order_follows_epoch_and_seed_a_group_smaller_than_a_batch_is_refused_and_intensity_is_standardised():
    orders = {tuple(loader.epoch_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert torch.equal(loader.epoch_order(50, 1, 2), loader.epoch_order(50, 1, 2))
    with pytest.raises(UserError, match="11 images, fewer than a batch of 12"):
        loader.steps_per_epoch(11, 12)
    # Standard intensity has mean 0 and deviation 1.
    images = torch.rand(6, 1, 24, 20, generator=torch.Generator().manual_seed(1))
    standard = loader.Intensity(images.mean().item(), images.std(correction=0).item()).apply(images)
    assert [standard.mean().item(), standard.std(correction=0).item()] == pytest.approx([0, 1], abs=1e-5)
    assert torch.equal(loader.Intensity().apply(images), images)


@given(rows=st.integers(1, 40), size=st.integers(1, 9), world=st.integers(1, 5))
def test_every_row_is_evaluated_once_over_all_ranks(rows, size, world):
    found = [row for rank in range(world) for row in rows_in(numbered(rows, rank, world).evaluation_batches(size))]
    assert sum(found, []) == list(range(rows)) and all(0 < len(batch) <= size for batch in found)


@pytest.mark.parametrize(("backbone", "stride"), [("mobilenet_v3_large", 16), ("resnet50", 8)])
@pytest.mark.parametrize("decoder", [False, True])
def test_the_network_takes_one_channel_and_returns_four_from_a_quarter_of_the_image_with_the_decoder(backbone, stride, decoder):
    model = build_model(ModelConfig(backbone, dropout=0.25, bn_momentum=0.05, decoder=decoder)).eval()
    sizes = []
    model.network.classifier.register_forward_hook(lambda *call: sizes.append(call[-1].shape))
    assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels == 1
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.05}
    assert 0.25 in {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 4, 64, 64)
    side = 64 // (4 if decoder else stride)
    assert sizes == [(1, 4, side, side)]


@pytest.mark.parametrize("decoder", [False, True])
def test_the_auxiliary_head_has_logits_in_training_only_and_group_normalisation_has_no_batch_statistics(decoder):
    config = ModelConfig(**SMALL, norm="group", aux_head=True, decoder=decoder)
    model, images = build_model(config), torch.zeros(2, 1, 64, 64)
    assert not list(model.buffers()) and any(isinstance(module, nn.GroupNorm) for module in model.modules())
    with torch.no_grad():
        outputs = model.train()(images)
        assert isinstance(outputs, tuple) and [o.shape for o in outputs] == [(2, 4, 64, 64)] * 2
        assert model.eval()(images).shape == (2, 4, 64, 64)


def test_pretrained_weights_that_cannot_be_downloaded_are_a_users_error_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no one listens there: a machine without a network
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib remembers the proxies of its first call
    with pytest.raises(UserError, match=rf"put mobilenet_v3_large-.*\.pth into {tmp_path}"):
        build_model(ModelConfig(**SMALL, pretrained=True))


def test_each_step_of_each_epoch_of_each_seed_draws_from_a_seed_of_its_own():
    places = [(seed, epoch, 100, step) for seed in (0, 1) for epoch in range(3) for step in range(100)]
    assert len({loader.epoch_seed(*place) for place in places}) == len(places)
