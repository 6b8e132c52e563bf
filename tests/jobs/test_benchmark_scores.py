"""The table of scores compares what it promises: real pairs, the same answers on both sides, and mistakes by name."""

import sys

import numpy as np
import pytest

from heartseg.errors import UserError
from jobs import benchmark
from jobs.benchmarks import scores


def test_the_table_has_both_times_the_same_distances_and_the_time_of_volumes(phantom, capsys):
    table, difference = scores.run(scores.Options(source=phantom, images=3, repeats=1))
    distances, volumes = table.rows
    assert difference < 1e-4 and distances.value > 0 and distances.baseline > 0 and volumes.value > 0
    printed = capsys.readouterr().out
    assert "MONAI" in printed and "3 images" in printed and "times as fast" in printed


def test_a_prediction_is_the_truth_bent_by_a_seed(phantom):
    (case,) = scores.draw_cases(scores.Options(source=phantom, images=1))
    first, again, other = (scores.bend(case.truth, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert 0.9 < (first == case.truth).mean() < 1


def test_a_difference_shows_and_one_sided_absence_is_left_out():
    assert scores.largest_difference([1.0, 2.5, np.inf, np.nan], [1.0, 2.0, 9.0, np.nan]) == 0.5


def test_a_missing_monai_is_named_with_the_command_that_installs_it(phantom, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(UserError, match="pip install"):
        benchmark.job(["scores", "--source", phantom, "--images", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scores"], "--source is missing"),
        (["scores", "--source", "/no/such/folder"], "/no/such/folder does not exist"),
        (["scores", "--source", "/no/such/folder", "--images", "0"], "--images and --repeats must be at least 1"),
        (["scores", "--bogus", "1"], "--bogus"),
        (["bogus"], "no table 'bogus'"),
    ],
)
def test_a_mistake_names_the_thing(arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark.job(arguments)
