"""Training losses: cross-entropy (the seed's), or cross-entropy with soft Dice."""

import torch
from torch.nn.functional import cross_entropy
from torch.nn.functional import one_hot as class_one_hot

from heartseg.config.training import LossConfig
from heartseg.labels import NUM_CLASSES


def one_hot(mask: torch.Tensor) -> torch.Tensor:
    """Labels [B,H,W] as the four-channel truth, 0/1 floats [B,4,H,W]."""
    return class_one_hot(mask.long(), NUM_CLASSES).permute(0, 3, 1, 2).float()


def soft_dice_loss(logits: torch.Tensor, target: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """One minus V-Net's soft Dice (Milletari 2016, but without squares) from logits [B,4,H,W]: mean over structures, images."""
    # Adding `smooth` pixels keeps a structure that both lack from counting as a failure.
    probability = logits.float().softmax(dim=1)[:, 1:]
    truth = one_hot(target)[:, 1:]
    overlap = (probability * truth).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + truth.sum(dim=(2, 3))
    return 1 - ((2 * overlap + smooth) / (total + smooth)).mean()


def segmentation_loss(config: LossConfig, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The configured loss of logits [B,4,H,W] against labels [B,H,W], averaged over images."""
    logits, labels = logits.float(), target.long()
    if torch.are_deterministic_algorithms_enabled():  # PyTorch's kernel for images is not deterministic on GPUs
        loss = -logits.log_softmax(dim=1).gather(1, labels[:, None]).mean()
    else:
        loss = cross_entropy(logits, labels)
    return loss + soft_dice_loss(logits, target) if config.kind == "dice_cross_entropy" else loss


def training_loss(config: LossConfig, outputs, target: torch.Tensor) -> torch.Tensor:
    """The loss of a training model's output: logits, or (logits, auxiliary logits)."""
    if not isinstance(outputs, tuple):
        return segmentation_loss(config, outputs, target)
    main, auxiliary = (segmentation_loss(config, logits, target) for logits in outputs)
    return main + config.aux_weight * auxiliary
