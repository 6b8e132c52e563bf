"""Agreement and its intervals: equal to values worked by hand or by scipy, and plain JSON for any input."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from heartseg.labels import EF_CLASSES, ef_class
from heartseg.metrics.agreement import agree, auc, bootstrap_interval, ef_confusion, mean_interval, paired_test

NAN = float("nan")


def test_agreement_of_four_pairs_by_hand():
    found = agree([50.0, 62.0, 31.0, 45.0], [48.0, 60.0, 35.0, 41.0])
    # Differences 2, 2, -4, 4: their mean is 1, their squares about it 1 + 1 + 25 + 9 = 36, over 3.
    assert found["bias"] == pytest.approx(1) and found["mae"] == pytest.approx(3)
    assert found["sd"] == pytest.approx(12**0.5) and found["n"] == 4
    assert found["loa_low"] == pytest.approx(1 - 1.96 * 12**0.5) and found["loa_high"] == pytest.approx(1 + 1.96 * 12**0.5)


def test_pairs_with_a_nan_are_left_out_under_three_have_no_value_and_what_is_not_paired_is_refused():
    whole, patients = agree([1.0, 2, 4], [1.5, 2, 3], ["a", "b", "c"]), ["a", "x", "b", "y", "c"]
    assert agree([1.0, NAN, 2, 9, 4], [1.5, 8, 2, NAN, 3], patients) == whole
    for pairs in (([], []), ([1.0], [2.0]), ([1.0, 2.0, NAN], [1.0, 2.0, 3.0])):
        found = agree(*pairs)
        assert found.pop("n") < 3 and set(found.values()) == {None}
    with pytest.raises(ValueError, match="2 estimates, 3 references"):
        agree([1.0, 2.0], [1.0, 2.0, 3.0])


@given(seed=st.integers(0, 10**6), count=st.integers(3, 30), offset=st.sampled_from([0.0, 50.0, 1e6]), same=st.booleans())
def test_agreement_is_json_and_its_intervals_hold_the_estimate(seed, count, offset, same):
    rng = np.random.default_rng(seed)
    reference = offset + (np.full(count, 50.1) if same else rng.normal(50, 10, count))
    estimate = reference + rng.normal(3, 5, count)
    found = json.loads(json.dumps(agree(estimate, reference), allow_nan=False))
    assert found["bias"] == pytest.approx(np.mean(estimate - reference))
    if same:
        assert found["r"] is None and found["r_low"] is None
    else:
        assert found["r"] == pytest.approx(stats.pearsonr(estimate, reference)[0], abs=1e-6)
        assert -1 <= found["r_low"] <= found["r_high"] <= 1
    for name in ("bias", "mae"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert found["loa_low"] < found["bias"] < found["loa_high"]


def test_intervals_are_over_patients_and_the_bootstrap_is_scipys():
    rng = np.random.default_rng(3)
    reference = rng.normal(50, 12, 60)
    estimate = 0.8 * reference + rng.normal(8, 6, 60)
    found = agree(estimate, reference)
    sample = (estimate, reference)
    options = {"paired": True, "vectorized": False, "method": "percentile", "rng": 1, "n_resamples": 2000}
    for name, statistic in (("r", lambda x, y: stats.pearsonr(x, y)[0]), ("bias", lambda x, y: np.mean(x - y))):
        low, high = stats.bootstrap(sample, statistic, **options).confidence_interval
        assert (found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx((low, high), abs=0.08 * (high - low))
    # Each patient four times over adds no information, if patients are known.
    fourfold, owners = (np.repeat(values, 4) for values in sample), np.repeat(np.arange(60), 4)
    clustered = agree(*fourfold, owners)
    naive = agree(*(np.repeat(values, 4) for values in sample))
    assert clustered["r_low"] == pytest.approx(found["r_low"], abs=0.02)
    assert naive["r_high"] - naive["r_low"] < 0.6 * (clustered["r_high"] - clustered["r_low"])


def test_the_bootstrap_interval_of_a_mean_leaves_nan_out_and_needs_two_patients():
    values, owners = np.array([0.2, 0.4, NAN, 0.9]), np.array([0, 0, 1, 2])
    low, high = bootstrap_interval(values, owners, draws=200)
    assert 0.3 <= low <= high <= 0.9  # the means of the patients are 0.3 and 0.9
    assert bootstrap_interval(values[[0, 1, 3]], owners[[0, 1, 3]], draws=200) == (low, high)
    assert all(map(math.isnan, bootstrap_interval(values[:3], owners[:3])))  # one patient says nothing of others
    assert mean_interval(values[:3], owners[:3]) == {"mean": pytest.approx(0.3), "low": None, "high": None}


def test_auc_is_the_share_of_pairs_in_order():
    score, good = np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False])
    assert auc(score, good) == (1 + 1 + 0.5 + 1) / 4 and math.isnan(auc(score, good | True))


def test_ef_of_40_and_of_50_percent_are_mildly_reduced_and_the_confusion_has_the_reference_in_rows():
    assert EF_CLASSES == ("<40", "40-50", ">50")
    assert ef_class(np.array([12, 39.9, 40, 45, 50, 50.1, 70])).tolist() == [0, 0, 1, 1, 1, 2, 2]
    found = ef_confusion([30, 45, 45, 60, NAN, 60], [30, 30, 50, 60, 60, 40])
    assert found.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]] and found.dtype.kind == "i"
    assert ef_confusion([], []).tolist() == [[0] * 3] * 3


def test_a_paired_test_sees_a_small_steady_difference_and_none_by_chance_in_equal_or_in_too_few_scores():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(25), 4)
    b = 0.85 + np.repeat(rng.normal(0, 0.05, 25), 4) + rng.normal(0, 0.01, 100)
    steady, chance = b + 0.01 + rng.normal(0, 0.01, 100), b + rng.normal(0, 0.01, 100)
    found = paired_test(steady, b, patients)
    assert found["n"] == 100 and found["patients"] == 25 and found["p"] < 0.001
    assert 0 < found["low"] < found["difference"] < found["high"]
    means = np.array([np.mean((steady - b)[patients == patient]) for patient in range(25)])
    assert found["p"] == pytest.approx(stats.wilcoxon(means).pvalue)
    by_chance = paired_test(chance, b, patients)
    assert by_chance["low"] < 0 < by_chance["high"] and by_chance["p"] > 0.05
    equal = paired_test([0.9, 0.8, 0.7], [0.9, 0.8, 0.7], ["a", "b", "c"])
    assert equal["p"] == 1 and equal["difference"] == equal["low"] == equal["high"] == 0
    few = paired_test([0.9, 0.8, NAN, 0.6], [0.8, 0.7, 0.9, 0.6], ["a", "a", "c", "b"])
    assert few == {"n": 3, "patients": 2, "difference": None, "low": None, "high": None, "p": None}


def test_a_paired_tests_p_is_of_patients_means_however_many_images_each_has():
    found = paired_test([1, 0, 0, 0, 3, 4], [0, 2, 2, 2, 0, 0], list("abbbcd"))
    # Means 1, -2, 3, 4: of the 16 signs of the ranks 1 to 4, 3 have a negative sum of at most 2.
    assert found["p"] == pytest.approx(2 * 3 / 16) and found["difference"] == pytest.approx(2 / 6)
