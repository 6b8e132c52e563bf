"""The table of scores compares what it says: real pairs, the same answers on both sides, and a mistake in one sentence."""

import sys

import numpy as np
import pytest

from heartseg.errors import UserError
from jobs import benchmark
from jobs.benchmarks import scores


def test_the_table_has_a_row_with_both_times_and_the_same_distances(phantom, capsys):
    (row,) = scores.run(scores.Options(source=phantom, images=3, repeats=1))
    assert row.items == 3 and row.difference < 1e-4 and row.our_ms > 0 and row.their_ms > 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "MONAI" in printed[1] and f"{row.their_ms / row.our_ms:.1f}x" in printed[1]


def test_a_seed_draws_the_same_pairs_and_predictions_differ_from_truths(phantom):
    first, again, other = (scores.make_pairs(phantom, 4, seed) for seed in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.prediction, b.prediction) and np.array_equal(a.truth, b.truth)
        assert not np.array_equal(a.prediction, a.truth)
    assert not all(np.array_equal(a.truth, b.truth) for a, b in zip(first, other, strict=True))


def test_a_difference_shows_and_one_sided_absence_is_passed_over():
    assert scores.largest_difference([1.0, 2.5, 9.0, np.nan], [1.0, 2.0, np.inf, np.nan]) == 0.5


def test_a_missing_monai_is_said_with_the_mend(phantom, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(UserError, match="pip install"):
        benchmark.job(["scores", "--source", phantom, "--images", "1"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scores"], "--source is missing"),
        (["scores", "--source", "/nowhere"], "/nowhere does not exist"),
        (["scores", "--source", "/nowhere", "--images", "0"], "--images must be at least 1"),
        (["scores", "--bogus", "1"], "--bogus"),
    ],
)
def test_a_mistake_names_the_thing(arguments, said):
    with pytest.raises(UserError, match=said):
        benchmark.job(arguments)
