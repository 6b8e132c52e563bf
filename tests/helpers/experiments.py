"""The repository, the real data, the tiny experiment for tests of equality, and models that predict every label."""

import os
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from heartseg.config.experiment import Experiment, ImageConfig, SplitConfig, TrackingConfig
from heartseg.config.recipes import quick
from heartseg.config.training import AugmentConfig, OptimConfig

ROOT = Path(__file__).resolve().parents[2]
CAMUS = os.environ.get("HEARTSEG_CAMUS", str(ROOT.parent / "shared" / "camus"))


def skip_or_fail(reason: str) -> NoReturn:
    """Skip a test whose requirements this machine lacks; fail it if HEARTSEG_NO_SKIPS is set."""
    (pytest.fail if os.environ.get("HEARTSEG_NO_SKIPS") else pytest.skip)(reason)


def tiny_experiment(**changes) -> Experiment:
    """MobileNetV3 on 64 x 64 without batch statistics, dropout or augmentation, in fp32: for tests of equality."""
    recipe = quick()
    base = replace(
        recipe,
        name="tiny",
        image=ImageConfig(height=64, width=64),
        split=SplitConfig(kind="ratio", test_share=0.25),
        model=replace(recipe.model, norm="group", dropout=0.0, decoder=False),
        augment=AugmentConfig(),
        # SGD, since AdamW's first steps turn rounding into whole steps.
        optim=OptimConfig(kind="sgd", lr=0.02, clip_norm=1.0, ema_decay=0.9),
        train=replace(recipe.train, epochs=2, batch_size=7, precision="fp32", deterministic=True),
        tracking=TrackingConfig(wandb="off"),
        checkpoint_seconds=0,
    )
    return replace(base, **changes)


def spread(model: torch.nn.Module, head: torch.nn.Conv2d, pixels: torch.Tensor) -> None:
    """Give a model its own batch statistics, and each class a mean of 0 and a deviation of 1, so that every label occurs."""
    with torch.no_grad():
        model.train()(pixels)
        logits = model.eval()(pixels)
        deviation = logits.std(dim=(0, 2, 3))
        head.bias.copy_((head.bias - logits.mean(dim=(0, 2, 3))) / deviation)
        head.weight.div_(deviation.view(-1, 1, 1, 1))
