"""How sure a mean is: bootstrap over patients, since a patient's images are no independent draws."""

import numpy as np


def bootstrap_interval(
    values: np.ndarray, patients: np.ndarray, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [N] (NaN left out), resampling whole `patients` [N].

    Efron and Tibshirani 1993, the cluster bootstrap. Returns (nan, nan) where nothing has a value.
    """
    known = ~np.isnan(values)
    _, owner = np.unique(patients[known], return_inverse=True)
    if not len(owner):
        return float("nan"), float("nan")
    sums = np.bincount(owner, weights=values[known])
    counts = np.bincount(owner)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
