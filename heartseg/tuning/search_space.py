"""A sweep's search space: the settings to vary with their choices or ranges, and the points drawn from it."""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from heartseg.config.experiment import Experiment, flatten, from_json, to_json
from heartseg.config.training import LossKind, ScheduleKind
from heartseg.errors import require

RATE = "optim.lr"  # the one field whose values are drawn from a range


@dataclass(frozen=True)
class SearchSpace:
    """The settings that a sweep varies; an empty list keeps the recipe's value."""

    schedules: tuple[ScheduleKind, ...] = ("constant", "polynomial", "cosine", "one_cycle")
    """Learning-rate schedules."""
    lr_factors: tuple[float, float] = (0.3, 3.0)
    """Lowest and highest base rate, as multiples of the recipe's; drawn uniformly on a logarithmic scale."""
    lr_points: int = 3
    """Number of base rates in a grid, spaced geometrically from lowest to highest."""
    warmup_epochs: tuple[float, ...] = ()
    """Lengths of the warm-up."""
    momentum: tuple[float, ...] = ()
    """Momenta (first betas of AdamW)."""
    weight_decay: tuple[float, ...] = ()
    """Weight decays."""
    batch_size: tuple[int, ...] = ()
    """Images in a batch."""
    losses: tuple[LossKind, ...] = ()
    """Losses."""
    changes: tuple[str, ...] = ()
    """For `--search changes`: one trial per item, which changes one field (`loss.kind=cross_entropy`) or several
    (`optim.lr=0.002,train.seed=1`). All trials have the recipe's train.epochs."""

    def __post_init__(self):
        low, high = self.lr_factors
        require(0 < low <= high, f"--space.lr-factors must both be above 0, the lower one first, not {low:g} {high:g}.")
        require(self.lr_points >= 1, f"--space.lr-points must be at least 1, not {self.lr_points}.")
        require(len(self.schedules) > 0, "--space.schedules is empty: name at least one schedule.")


def make_axes(space: SearchSpace, base: Experiment) -> dict[str, tuple]:
    """The values to try, by dotted field, the schedule's kind first; for RATE, the two ends of its range."""
    axes = {
        "schedule.kind": space.schedules,
        RATE: tuple(base.optim.lr * factor for factor in space.lr_factors),
        "schedule.warmup_epochs": space.warmup_epochs,
        "optim.momentum": space.momentum,
        "optim.weight_decay": space.weight_decay,
        "train.batch_size": space.batch_size,
        "loss.kind": space.losses,
    }
    return {name: values for name, values in axes.items() if values}


def apply(base: Experiment, values: dict[str, object]) -> Experiment:
    """The experiment with some dotted fields set; raises UserError for an invalid value."""
    changed = to_json(base)
    for name, value in values.items():
        part, field = name.split(".")
        changed[part][field] = value
    return from_json(changed, origin="the search space")


def parse_change(text: str) -> dict[str, object]:
    """Parse `optim.lr=0.002,loss.kind=cross_entropy` into values by dotted field; raises UserError for any other form."""
    values = {}
    for part in re.split(r",(?=\s*\w+\.\w+=)", text):
        name, value = (side.strip() for side in part.partition("=")[::2])
        is_change = re.fullmatch(r"\w+\.\w+", name) and value.strip(" ,") == value != ""
        fix = "write FIELD=VALUE, as in optim.lr=0.002, with commas between several."
        require(is_change, f"--space.changes {text!r} is not a change: {fix}")
        values[name] = value
        with contextlib.suppress(json.JSONDecodeError):
            values[name] = json.loads(value)
    return values


def listed(base: Experiment, changes: tuple[str, ...]) -> list[dict]:
    """The recipe and each change to it, as points that all have the same fields, including the schedule's kind."""
    parsed = [parse_change(text) for text in changes]
    require(len(parsed) > 0, "--search changes needs --space.changes: name at least one.")
    # Trials are compared epoch by epoch, up to the recipe's last.
    fixed = not any("train.epochs" in values for values in parsed)
    require(fixed, "--space.changes cannot vary train.epochs, since all trials are compared epoch by epoch: leave it out.")
    own = values_of(base, dict.fromkeys(["schedule.kind", *(name for values in parsed for name in values)]))
    points = [own]
    for change, values in zip(changes, parsed, strict=True):
        require(own | values not in points, f"--space.changes {change!r} repeats the recipe or another change: leave it out.")
        points.append(own | values)
    return points


def describe(own: dict, values: dict) -> str:
    """A point's changes to the recipe, in the form of --space.changes; `-` for the recipe itself."""
    changed = {name: value for name, value in values.items() if value != own.get(name)}
    texts = (f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changed.items())
    return ",".join(texts) or "-"


def grid(axes: dict[str, tuple], lr_points: int, seed: int) -> list[dict]:
    """Every combination, with `lr_points` geometrically spaced base rates, in a seeded order; the schedules take turns."""
    low, high = axes[RATE]
    rates = np.geomspace(low, high, lr_points) if lr_points > 1 and low < high else [math.sqrt(low * high)]
    lists = axes | {RATE: [float(f"{rate:.6g}") for rate in rates]}
    points = [dict(zip(lists, point, strict=True)) for point in itertools.product(*lists.values())]
    order = np.random.default_rng(seed).permutation(len(points))
    hands = {kind: [points[i] for i in order if points[i]["schedule.kind"] == kind] for kind in axes["schedule.kind"]}
    return [point for turn in zip(*hands.values(), strict=True) for point in turn]


def draw(axes: dict[str, tuple], number: int, seed: int) -> dict:
    """The `number`-th random point, always the same; the schedules take turns, the rest is drawn."""
    generator = np.random.default_rng([seed, number])
    point = {name: values[generator.integers(len(values))] for name, values in axes.items()}
    low, high = axes[RATE]
    kinds = axes["schedule.kind"]
    return point | {RATE: float(f"{low * (high / low) ** generator.random():.6g}"), "schedule.kind": kinds[number % len(kinds)]}


def values_of(base: Experiment, fields: Iterable[str]) -> dict:
    """The recipe's own values of some fields; raises UserError for an unknown field."""
    known = flatten(to_json(base))
    for name in fields:
        require(name in known, f"The search space names {name}, which is not a setting: see train.py --help.")
    return {name: known[name] for name in fields}
