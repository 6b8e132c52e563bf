"""Learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Sequence

from heartseg.config import ScheduleConfig


def lr_multiplier(
    config: ScheduleConfig, step: int, total_steps: int, steps_per_epoch: int, history: Sequence[float] = ()
) -> float:
    """What the base rate is multiplied by at `step` (from 0) of `total_steps`.

    The warm-up rises linearly and reaches 1 at its end; the shape runs over the steps that are left. `history`, the past
    validation values, is for schedules that react to them.
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match config.kind:
        case "constant":
            return 1.0
        case "polynomial":
            return (1 - progress) ** config.power
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
    raise AssertionError(f"no schedule {config.kind}")
