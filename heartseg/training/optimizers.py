"""The optimizer, and the average of weights."""

import copy

import torch
from torch import nn

from heartseg.config.training import OptimConfig


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer for all parameters; normalisations and biases have no weight decay."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


class AveragedWeights:
    """An exponential average of a model's weights and running statistics; its decay warms up as (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0
        # Collected once: iterating over a model's hundreds of tensors at every step would keep a GPU waiting.
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged = [list(pair) for pair in zip(*(p for p in pairs if p[0].is_floating_point()), strict=True)]
        self._copied = [list(pair) for pair in zip(*(p for p in pairs if not p[0].is_floating_point()), strict=True)]

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the model's current weights."""
        self.updates += 1
        # TensorFlow's rule, so that a short run is not dominated by its initial weights.
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(*self._averaged, weight)
        if self._copied:
            torch._foreach_copy_(*self._copied)
