"""Named experiments as functions. A variant calls another recipe and changes some of its fields."""

from dataclasses import replace

from heartseg.config.experiment import Experiment, ImageConfig, ModelConfig, SplitConfig
from heartseg.config.training import AugmentConfig, LossConfig, OptimConfig, ScheduleConfig, TrainConfig


def seed() -> Experiment:
    """DeepLabv3-ResNet-101 as first specified: 256 x 256, batch 12, SGD at 0.001, cross-entropy, 170 epochs, 80:20."""
    return Experiment(
        name="seed",
        image=ImageConfig(height=256, width=256),
        split=SplitConfig(kind="ratio", test_share=0.2),
        model=ModelConfig(backbone="resnet101"),
        loss=LossConfig(kind="cross_entropy"),
        optim=OptimConfig(kind="sgd", lr=0.001),
        schedule=ScheduleConfig(kind="polynomial", power=0.9),
        train=TrainConfig(epochs=170, batch_size=12, eval_batch_size=4),
    )


# Choices that the specification of `seed` leaves open; the report lists them as ours.
SEED_CHOICES = (
    "SGD momentum 0.9, no weight decay",
    "polynomial decay of the learning rate, power 0.9",
    "images divided by 255",
    "random initial weights (not from ImageNet), no auxiliary head",
    "80:20 split by patient, drawn with seed 0",
)


def camus() -> Experiment:
    """The recommended recipe for GPUs: DeepLabv3+ (ResNet-101), AdamW, Dice loss, augmentation and averaged weights."""
    return replace(
        seed(),
        name="camus",
        split=SplitConfig(kind="official"),
        model=ModelConfig(backbone="resnet101", decoder=True),
        loss=LossConfig(kind="dice_cross_entropy"),
        optim=OptimConfig(kind="adamw", lr=0.002, weight_decay=0.01, clip_norm=1.0, ema_decay=0.998),
        schedule=ScheduleConfig(kind="cosine", warmup_epochs=1.0),
        augment=AugmentConfig(rotate_deg=10.0, scale=0.15, translate=0.06, gain=0.2, gamma=0.3, noise=0.1),
        train=TrainConfig(epochs=100, batch_size=16, eval_batch_size=32, intensity="standard"),
    )


def compact() -> Experiment:
    """The recommended recipe for CPUs: `camus` with MobileNetV3-Large at 224 x 224, an auxiliary head and small batches."""
    full, image = camus(), ImageConfig(height=224, width=224)
    model = replace(full.model, backbone="mobilenet_v3_large", aux_head=True, dropout=0.1)
    train = replace(full.train, epochs=32, batch_size=8)
    return replace(full, name="compact", image=image, model=model, train=train)


def quick() -> Experiment:
    """`camus` in minutes, for demos, tests and sweeps on CPUs: MobileNetV3-Large at 128 x 128, 16 epochs."""
    full, image = camus(), ImageConfig(height=128, width=128)
    model, train = replace(full.model, backbone="mobilenet_v3_large"), replace(full.train, epochs=16)
    return replace(full, name="quick", image=image, model=model, train=train)


RECIPES = {"seed": seed, "camus": camus, "compact": compact, "quick": quick}
