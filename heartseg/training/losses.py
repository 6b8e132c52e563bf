"""What training minimises: cross-entropy (the seed's), or cross-entropy with soft Dice."""

import torch
from torch.nn.functional import cross_entropy
from torch.nn.functional import one_hot as class_one_hot

from heartseg.config.training import LossConfig
from heartseg.labels import NUM_CLASSES


def one_hot(mask: torch.Tensor) -> torch.Tensor:
    """The four-channel truth: labels [B,H,W] to 0/1 floats [B,4,H,W]."""
    return class_one_hot(mask.long(), NUM_CLASSES).permute(0, 3, 1, 2).float()


def soft_dice_loss(logits: torch.Tensor, target: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """One minus the soft Dice of the three structures, per image and then averaged, so that shares of a batch add up.

    `logits` [B,4,H,W], `target` [B,H,W]. V-Net's Dice (Milletari 2016) with plain sums in the denominator; `smooth`
    pixels keep a structure that is absent from both from counting as a failure.
    """
    probability = logits.float().softmax(dim=1)[:, 1:]
    truth = one_hot(target)[:, 1:]
    overlap = (probability * truth).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + truth.sum(dim=(2, 3))
    return 1 - ((2 * overlap + smooth) / (total + smooth)).mean()


def _mean_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PyTorch's cross-entropy of logits [B,4,H,W] against labels [B,H,W], where equal bits are asked for by another way.

    Its own kernel for images has no deterministic form on GPUs.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return cross_entropy(logits, target)
    return -logits.log_softmax(dim=1).gather(1, target[:, None]).mean()


def segmentation_loss(config: LossConfig, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The configured loss of logits [B,4,H,W] against labels [B,H,W]: a mean over images."""
    loss = _mean_cross_entropy(logits.float(), target.long())
    if config.kind == "dice_cross_entropy":
        loss = loss + soft_dice_loss(logits, target)
    return loss


def training_loss(config: LossConfig, outputs, target: torch.Tensor) -> torch.Tensor:
    """The loss of what a model in training returns: logits, or (logits, auxiliary logits)."""
    if isinstance(outputs, tuple):
        main, auxiliary = outputs
        return segmentation_loss(config, main, target) + config.aux_weight * segmentation_loss(config, auxiliary, target)
    return segmentation_loss(config, outputs, target)
