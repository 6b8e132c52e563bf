"""Learning-rate schedules: torch's own values if torch has the same schedule, and the promises of all schedules."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as torchs

from heartseg.config.experiment import without_effect
from heartseg.config.recipes import seed
from heartseg.config.training import ScheduleConfig
from heartseg.training.lr_schedules import lr_multiplier

STEPS, STEPS_PER_EPOCH = 60, 10
REFERENCES = {  # name, parameters, and torch's schedule
    "constant": ({}, lambda o: torchs.ConstantLR(o, factor=1.0)),
    "step": ({"step_share": 0.25, "factor": 0.3}, lambda o: torchs.StepLR(o, step_size=15, gamma=0.3)),
    "multistep": ({"milestones": (0.2, 0.7), "factor": 0.5}, lambda o: torchs.MultiStepLR(o, milestones=[12, 42], gamma=0.5)),
    "exponential": ({"final": 0.05}, lambda o: torchs.ExponentialLR(o, gamma=0.05 ** (1 / STEPS))),
    "polynomial": ({"power": 0.7}, lambda o: torchs.PolynomialLR(o, total_iters=STEPS, power=0.7)),
    "cosine": ({}, lambda o: torchs.CosineAnnealingLR(o, T_max=STEPS)),
    "restarts": ({"cycles": 2, "cycle_growth": 2}, lambda o: torchs.CosineAnnealingWarmRestarts(o, T_0=20, T_mult=2)),
    "one_cycle": ({"rise": 0.3}, lambda o: torchs.OneCycleLR(o, max_lr=1.0, total_steps=STEPS, pct_start=0.3)),
}
KINDS = sorted({*REFERENCES, "plateau"})


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_schedule_is_torchs_of_the_same_name(name):
    parameters, build = REFERENCES[name]
    config, reference = ScheduleConfig(name, **parameters), build(sgd := optimizer())
    for step in range(STEPS):
        ours = lr_multiplier(config, step, STEPS, STEPS_PER_EPOCH)
        assert ours == pytest.approx(reference.get_last_lr()[0], abs=1e-6), step
        sgd.step()
        if step < STEPS - 1:
            reference.step()


@given(
    dice=st.lists(st.sampled_from([0.1, 0.5, 0.5 * (1 + 5e-5), 0.51, 0.9]), max_size=40),
    patience=st.integers(0, 4),
    factor=st.sampled_from([0.5, 0.1]),
)
def test_plateau_drops_where_torchs_does(dice, patience, factor):
    reference = torchs.ReduceLROnPlateau(optimizer(), mode="max", factor=factor, patience=patience, eps=0)
    config = ScheduleConfig("plateau", factor=factor, patience=patience)
    for epoch, value in enumerate(dice, 1):
        reference.step(value)
        assert lr_multiplier(config, epoch * 10, 1000, 10, dice[:epoch]) == pytest.approx(reference.get_last_lr()[0])
    # A plateau of NaN is a plateau.
    config = ScheduleConfig("plateau", patience=1)
    assert lr_multiplier(config, 0, 10, 1, [0.5, float("nan"), float("nan")]) == pytest.approx(0.1)
    assert lr_multiplier(config, 0, 10, 1, [float("nan"), 0.5, 0.4]) == 1.0


@given(kind=st.sampled_from(KINDS), warmup=st.floats(0, 3), steps=st.integers(1, 30))
def test_the_warm_up_rises_evenly_to_1_and_nothing_later_is_more(kind, warmup, steps):
    config = ScheduleConfig(kind, warmup_epochs=warmup)
    rates = [lr_multiplier(config, step, 5 * steps, steps) for step in range(5 * steps)]
    rise, foot = round(warmup * steps), 1 / 25 if kind == "one_cycle" else 1
    np.testing.assert_allclose(np.diff([0, *rates[:rise], foot]), foot / (rise + 1), atol=1e-12)
    assert all(0 <= rate <= 1 for rate in rates)
    if kind not in ("one_cycle", "restarts"):
        assert rates[rise] == 1.0 and sorted(rates[rise:], reverse=True) == rates[rise:]


@given(cycles=st.integers(1, 6), growth=st.sampled_from([0.5, 1.0, 1.5, 2.0]), steps=st.integers(200, 400))
def test_restarts_begin_each_cycle_at_the_full_rate_and_end_it_near_nothing(cycles, growth, steps):
    config = ScheduleConfig("restarts", cycles=cycles, cycle_growth=growth)
    rates = np.array([lr_multiplier(config, step, steps, 10) for step in range(steps)])
    assert (np.diff(rates) > 0).sum() == cycles - 1 and rates[0] == 1.0
    assert rates[-1] < 0.7


OTHERS = {"warmup_epochs": 2.0, "power": 2.0, "factor": 0.4, "step_share": 0.4, "milestones": (0.2,), "final": 0.2, "cycles": 5,
          "cycle_growth": 2.0, "rise": 0.5, "patience": 1}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_has_no_effect_exactly_if_its_refusal_says_so(kind):
    def rates(config: ScheduleConfig) -> list[float]:
        return [lr_multiplier(config, step, 60, 10, [0.5] * (step // 10)) for step in range(60)]

    plain = ScheduleConfig(kind, patience=3)
    refused = without_effect([replace(seed(), schedule=plain)])
    for name, value in OTHERS.items():
        assert (rates(replace(plain, **{name: value})) == rates(plain)) == (f"schedule.{name}" in refused), name
    assert {*OTHERS, "kind"} == {one.name for one in fields(ScheduleConfig)}
