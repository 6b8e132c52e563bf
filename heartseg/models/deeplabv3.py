"""DeepLabv3 for one-channel echocardiograms on one device, and its arithmetic: [B,1,H,W] in, [B,4,H,W] out."""

import math
import os
from urllib.error import URLError

import torch
from torch import nn
from torch.nn.functional import interpolate

from heartseg.config.experiment import ModelConfig
from heartseg.config.training import TrainConfig
from heartseg.errors import UserError
from heartseg.labels import NUM_CLASSES
from heartseg.models import convolutions, precision
from heartseg.models.decoder import Decoder

# For each backbone: its first convolution, the layer whose features have stride 4, and the number of their channels.
LAYERS = {
    "mobilenet_v3_large": ("0.0", "3", 24),
    "resnet50": ("conv1", "layer1", 256),
    "resnet101": ("conv1", "layer1", 256),
}


def _backbone(name: str) -> tuple:
    """torchvision's constructor of DeepLabv3 for a backbone, and that backbone's ImageNet weights; raises UserError."""
    try:
        from torchvision import models
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        raise UserError(
            "torch and torchvision come from different builds (a CPU-only torch beside an ordinary torchvision): "
            "install both together with `pip install --force-reinstall torch torchvision`."
        ) from error
    weights = models.get_model_weights(name).IMAGENET1K_V2
    return models.get_model_builder(f"deeplabv3_{name}"), weights


def check_installation() -> None:
    """Raise UserError if torch and torchvision are incompatible."""
    _backbone("resnet101")


class DeepLab(nn.Module):
    """torchvision's DeepLabv3: logits [B,4,H,W], or (logits, auxiliary logits) when training with an auxiliary head."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        features = self.network.backbone(images)
        logits = [self.network.classifier(*(features[name] for name in ("out", "fine") if name in features))]
        if self.training and self.network.aux_classifier:
            logits.append(self.network.aux_classifier(features["aux"]))
        logits = tuple(interpolate(each, images.shape[-2:], mode="bilinear", align_corners=False) for each in logits)
        return logits if len(logits) > 1 else logits[0]


def build_model(config: ModelConfig, own_convolutions: bool = True) -> DeepLab:
    """Build the network, with heartseg's faster convolutions or, without `own_convolutions`, PyTorch's.

    Raises UserError if the ImageNet weights cannot be downloaded.
    """
    constructor, weights = _backbone(config.backbone)
    first_conv, fine, channels = LAYERS[config.backbone]
    # torchvision downloads backbone weights by default.
    arguments = {"weights": None, "num_classes": NUM_CLASSES, "aux_loss": config.aux_head}
    try:
        network = constructor(weights_backbone=weights if config.pretrained else None, **arguments)
    except URLError as error:
        fix = f"put {os.path.basename(weights.url)} into {os.path.join(torch.hub.get_dir(), 'checkpoints')}"
        raise UserError(f"The ImageNet weights cannot be downloaded: {fix}, or leave --model.pretrained out.") from error
    _take_one_channel(network.backbone, first_conv)
    if config.decoder:
        network.backbone.return_layers[fine] = "fine"
        network.classifier = Decoder(network.classifier[0], channels)
    if config.norm == "group":
        _replace_batch_norm(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = config.bn_momentum
        elif isinstance(module, nn.Dropout):
            module.p = config.dropout
    if own_convolutions:
        convolutions.faster(network)
    return DeepLab(network)


def _take_one_channel(backbone: nn.Module, name: str) -> None:
    """Reduce the first convolution to one channel: its kernel is the sum over colours, so a grey RGB image gives the same."""
    old = backbone.get_submodule(name)
    new = nn.Conv2d(1, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
    new.weight.data = old.weight.data.sum(dim=1, keepdim=True)
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, new)


def _replace_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(math.gcd(32, child.num_features), child.num_features))
        else:
            _replace_batch_norm(child)


def wants_bf16(config: TrainConfig, device: torch.device) -> bool:
    """True if bf16 autocast is requested, or is `auto` and the faster one here."""
    return (precision.fastest(device) if config.precision == "auto" else config.precision) == "bf16"


def forward(train: TrainConfig, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits [B,4,H,W] in float32 of normalised images, computed in the configured precision."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=wants_bf16(train, images.device)):
        logits = model(images.contiguous(memory_format=torch.channels_last))
    # Laid out one class after another: on CPUs, losses then take a third of the time and labels half.
    return logits.to(torch.float32, memory_format=torch.contiguous_format)
