"""Learning-rate schedules as pure functions of the step; `plateau` also depends on past validation Dice."""

import math
from collections.abc import Sequence

from heartseg.config.training import ScheduleConfig

# One-cycle starts at a 25th of the peak and ends at a 10,000th of that, like torch.optim.lr_scheduler.OneCycleLR.
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 25e4
# Smaller relative gains than this do not count, as in torch.optim.lr_scheduler.ReduceLROnPlateau.
PLATEAU_GAIN = 1e-4


def lr_multiplier(
    config: ScheduleConfig, step: int, total_steps: int, steps_per_epoch: int, history: Sequence[float] = ()
) -> float:
    """The multiplier of the base rate at `step` (from 0) of `total_steps`; `plateau` uses the `history` of validation Dice.

    The warm-up rises linearly to the shape's first value (1; for `one_cycle`, the foot of its own rise); the shape runs over
    the remaining steps.
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    risen = min(1.0, (step + 1) / (warmup_steps + 1))
    return risen * _shape(config, max(0, step - warmup_steps), max(1, total_steps - warmup_steps), history)


def _shape(config: ScheduleConfig, step: int, steps: int, history: Sequence[float]) -> float:
    """The multiplier at `step` of `steps` after the warm-up."""
    progress = step / steps
    match config.kind:
        case "constant":
            return 1.0
        case "step":
            return config.factor ** (step // max(1, round(config.step_share * steps)))
        case "multistep":
            return config.factor ** sum(step >= round(share * steps) for share in config.milestones)
        case "exponential":
            return config.final**progress
        case "polynomial":
            return (1 - progress) ** config.power
        case "cosine":
            return _fall(progress)
        case "restarts":
            return _fall(_progress_in_cycle(progress, config.cycles, config.cycle_growth))
        case "one_cycle":
            return _one_cycle(step, steps, config.rise)
        case _:  # plateau
            return config.factor ** _num_plateaus(history, config.patience)


def _fall(progress: float, start: float = 1.0, end: float = 0.0) -> float:
    """Half a cosine from `start` to `end`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def _progress_in_cycle(progress: float, cycles: int, growth: float) -> float:
    """Completed share of the current cycle; each is `growth` times as long as the one before, and their lengths sum to 1."""
    length = 1 / sum(growth**cycle for cycle in range(cycles))
    for _ in range(cycles - 1):
        # A restart that falls on a step must not be delayed by a rounding error.
        if progress < length - 1e-9:
            break
        progress, length = max(0.0, progress - length), length * growth
    return progress / length


def _one_cycle(step: int, steps: int, rise: float) -> float:
    """Up and down in half cosines (Smith and Topin 2019, arXiv 1708.07120); the last step of each reaches its end value."""
    top, last = max(1e-9, rise * steps - 1), steps - 1
    if step <= top:
        return _fall(step / top, ONE_CYCLE_START, 1.0)
    return _fall((step - top) / (last - top), 1.0, ONE_CYCLE_END)


def _num_plateaus(history: Sequence[float], patience: int) -> int:
    """The number of times that `history` had more than `patience` values in a row without improvement."""
    best, bad, plateaus = -math.inf, 0, 0
    for value in history:
        if best == -math.inf or value > best * (1 + PLATEAU_GAIN):
            best, bad = (value if value == value else best), 0  # NaN is never the best
        else:
            bad += 1
        if bad > patience:
            bad, plateaus = 0, plateaus + 1
    return plateaus
