"""Intervals of EF: they hold the promised share of new patients, and say nothing where nothing is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heartseg.metrics.ef_intervals import COVERAGE, MIN_PATIENTS, calibrate, intervals


def patients(count: int, seed: int, growth: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted EF, true EF and the views' disagreement, with errors that grow with it and are not normal."""
    rng = np.random.default_rng(seed)
    truth, apart = rng.uniform(20, 70, count), rng.exponential(8, count)
    return truth + rng.standard_t(3, count) * (2 + growth * apart), truth, apart


def row(ef: float, apart: float) -> dict[str, float]:
    return {"ef_ase": ef, "ef_camus": math.nan, "ef_4ch_ase": 50.0, "ef_2ch_ase": 50.0 - apart}


def test_four_of_five_new_patients_are_within_their_interval_where_the_views_agree_and_where_they_do_not():
    found = calibrate(*patients(450, seed=1))
    assert found["held"] == pytest.approx(COVERAGE, abs=0.03) and found["slope"] > 0
    predicted, truth, apart = patients(20_000, seed=2)
    ends = [intervals(row(*each), {"ef_ase": found}) for each in zip(predicted, apart, strict=True)]
    low, high = (np.array([each[f"ef_ase_{end}"] for each in ends]) for end in ("low", "high"))
    is_held = (low <= truth) & (truth <= high)
    for chosen in (apart >= 0, apart < 5, apart > 15):
        assert is_held[chosen].mean() == pytest.approx(COVERAGE, abs=0.06)


@given(count=st.integers(MIN_PATIENTS, 60), seed=st.integers(0, 10**6), same=st.booleans())
def test_the_factor_is_the_conformal_rank_and_a_patient_without_ef_does_not_count(count, seed, same):
    predicted, truth, apart = patients(count, seed)
    apart = np.full(count, 3.0) if same else apart
    found = calibrate(predicted, truth, apart)
    ratios = np.abs(predicted - truth) / (found["base"] + found["slope"] * apart)
    assert (ratios <= found["factor"] + 1e-12).sum() == math.ceil((count + 1) * COVERAGE)
    assert found["base"] > 0 and found["slope"] >= 0 and found["patients"] == count
    assert calibrate(np.append(predicted, math.nan), np.append(truth, 50), np.append(apart, 2)) == found


def test_too_few_patients_calibrate_nothing_and_without_ef_or_calibration_there_is_no_interval():
    assert calibrate(*patients(MIN_PATIENTS - 1, seed=0)) is None
    found = {"ef_ase": calibrate(*patients(100, seed=0)), "ef_camus": None}
    unknown = [intervals(row(50, 5), {}), intervals(row(math.nan, 5), found), intervals(row(50, math.nan), found)]
    assert all(math.isnan(value) for each in unknown for value in each.values())
    wide = intervals(row(4, 60), found)
    assert wide["ef_ase_low"] == 0 and wide["ef_ase_high"] < 100 and math.isnan(wide["ef_camus_low"])
    assert intervals(row(96, 60), found)["ef_ase_high"] == 100


@pytest.mark.parametrize(
    ("error", "slope", "base"),
    [(lambda apart: 2 + 0.5 * apart, 0.5, 2), (lambda apart: 0.5 * apart, 0.5, 5.25 / 4), (lambda apart: 30 - apart, 0, 19.5)],
)
def test_the_expected_error_is_the_line_through_the_errors_never_falling_and_never_near_nothing(error, slope, base):
    apart, truth = np.arange(1.0, 21), np.full(20, 50.0)
    found = calibrate(truth + error(apart), truth, apart)
    assert (found["slope"], found["base"]) == (pytest.approx(slope), pytest.approx(base))
