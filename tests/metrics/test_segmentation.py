"""Scores equal a count of pixels by hand, and their means do not depend on batches."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from heartseg.metrics.segmentation import SCORES, ScoreSums, confusion, image_scores

SETS = {"endo": {1}, "myo": {2}, "la": {3}, "epi": {1, 2}}


@st.composite
def label_pairs(draw, max_batch=3):
    """Two label batches [B,H,W]; few labels at a time, so that structures are often absent."""
    shape = draw(st.tuples(st.integers(1, max_batch), st.integers(1, 5), st.integers(1, 5)))
    labels = st.sampled_from(sorted(draw(st.sets(st.integers(0, 3), min_size=1))))
    return tuple(torch.from_numpy(draw(arrays("uint8", shape, elements=labels))) for _ in range(2))


def mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def by_hand(prediction: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Scores of one image [H,W] from sets of pixels, by the definitions."""
    pairs = list(zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True))

    def overlap(chosen: set[int]) -> tuple[float, float]:
        mine = {i for i, (p, _) in enumerate(pairs) if p in chosen}
        true = {i for i, (_, t) in enumerate(pairs) if t in chosen}
        if not mine | true:
            return math.nan, math.nan
        return 2 * len(mine & true) / (len(mine) + len(true)), len(mine & true) / len(mine | true)

    both = {name: overlap(chosen) for name, chosen in SETS.items()}
    three = ("endo", "myo", "la")
    return {
        "accuracy": sum(p == t for p, t in pairs) / len(pairs),
        "dice": mean([both[name][0] for name in three]),
        "iou": mean([both[name][1] for name in three]),
        "dice4": mean([both[name][0] for name in three] + [overlap({0})[0]]),
        **{f"dice_{name}": both[name][0] for name in SETS},
        **{f"iou_{name}": both[name][1] for name in three},
    }


@given(label_pairs())
def test_confusion_is_truth_by_prediction_and_scores_are_the_definitions_counted_pixel_by_pixel(pair):
    prediction, target = pair
    counts = confusion(prediction, target)
    found = image_scores(counts)
    assert set(found) == set(SCORES)
    for image in range(len(prediction)):
        for t, p in itertools.product(range(4), range(4)):
            assert counts[image, t, p] == ((target[image] == t) & (prediction[image] == p)).sum()
        for name, value in by_hand(prediction[image], target[image]).items():
            assert found[name][image].item() == pytest.approx(value, nan_ok=True, abs=1e-12), name


@given(label_pairs(max_batch=7), st.data())
def test_means_are_over_images_whatever_the_batches(pair, data):
    prediction, target = pair
    batch = data.draw(st.integers(1, len(prediction)))
    losses = torch.arange(1.0, len(prediction) + 1)
    sums = ScoreSums(torch.device("cpu"))
    for start in range(0, len(prediction), batch):
        rows = slice(start, min(start + batch, len(prediction)))
        sums.add(losses[rows].mean(), prediction[rows], target[rows])
        assert not data.draw(st.booleans()) or sums.sums[1, 0] == rows.stop  # not the last to be added
    means = sums.means()
    singles = [by_hand(p, t) for p, t in zip(prediction, target, strict=True)]
    for name in SCORES:
        assert means[name] == pytest.approx(mean([single[name] for single in singles]), nan_ok=True), name
    assert means["loss"] == pytest.approx(losses.mean().item())
    sums.add(torch.tensor(math.nan), prediction, target)  # the loss of one batch that is NaN stays NaN
    assert math.isnan(sums.means()["loss"]) and sums.means()["accuracy"] == pytest.approx(means["accuracy"])
