"""Agreement of two measurements, and intervals of means (bootstrap over patients), as plain JSON types; NaN are left out."""

import numpy as np

from heartseg.config.experiment import none_if_nan
from heartseg.labels import ef_class

MIN_PAIRS = 3
DRAWS, TAILS = 2000, (0.025, 0.975)
# The keys of `agree` other than `n`.
AGREEMENT = ("r", "r_low", "r_high", "bias", "bias_low", "bias_high", "sd", "loa_low", "loa_high", "mae", "mae_low", "mae_high")


def _resampled(columns: list[np.ndarray], patients: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """Sums [C,draws] of some columns [N] over bootstrap draws, which resample whole `patients` [N] with replacement."""
    _, owner = np.unique(patients, return_inverse=True)
    sums = np.stack([np.bincount(owner, weights=column) for column in columns])
    drawn = np.random.default_rng(0).integers(sums.shape[1], size=(draws, sums.shape[1]))
    return sums[:, drawn].sum(axis=2)


def bootstrap_interval(values: np.ndarray, patients: np.ndarray, draws: int = DRAWS) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` [N] (NaN left out) by cluster bootstrap over `patients` [N], or NaN."""
    known = ~np.isnan(values)
    if len(np.unique(patients[known])) < 2:
        return float("nan"), float("nan")
    sums, counts = _resampled([values[known], np.ones(known.sum())], patients[known], draws)
    low, high = np.quantile(sums / counts, TAILS)
    return float(low), float(high)


def mean_interval(values: np.ndarray, patients: np.ndarray) -> dict[str, float | None]:
    """The `mean` of values [N] (NaN left out) with `low` and `high` of its bootstrap interval over `patients` [N]."""
    values = np.asarray(values, float)
    known = values[~np.isnan(values)]
    found = (known.mean() if len(known) else np.nan, *bootstrap_interval(values, patients))
    return {name: none_if_nan(value) for name, value in zip(("mean", "low", "high"), found, strict=True)}


def _pairs(estimate, reference, patients) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both as float [N] and their patients, without pairs that contain NaN; without `patients`, every pair is a patient."""
    estimate, reference = np.asarray(estimate, float), np.asarray(reference, float)
    patients = np.arange(len(estimate)) if patients is None else np.asarray(patients)
    if not len(estimate) == len(reference) == len(patients):
        raise ValueError(f"{len(estimate)} estimates, {len(reference)} references, {len(patients)} patients: not equally many")
    known = np.isfinite(estimate) & np.isfinite(reference)
    return estimate[known], reference[known], patients[known]


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Correlation from the sums [6,...] of 1, x, y, xx, yy, xy; NaN if x or y does not vary."""
    count, x, y, xx, yy, xy = sums
    spread_x, spread_y = count * xx - x * x, count * yy - y * y
    varies = (spread_x > 1e-12 * count * xx) & (spread_y > 1e-12 * count * yy)  # less is rounding
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (count * xy - x * y) / np.sqrt(spread_x * spread_y)
    return np.where(varies, np.clip(r, -1, 1), np.nan)


def _pearson_interval(x: np.ndarray, y: np.ndarray, patients: np.ndarray) -> tuple[float, float, float]:
    """Pearson's r and its 95 % percentile interval, resampling whole patients."""
    x, y = x - np.median(x), y - np.median(y)  # so that the sums of squares do not cancel
    columns = [np.ones_like(x), x, y, x * x, y * y, x * y]
    resampled = _pearson(_resampled(columns, patients))
    known = resampled[~np.isnan(resampled)]
    return _pearson(np.sum(columns, axis=1)), *(np.quantile(known, TAILS) if len(known) else (np.nan, np.nan))


def agree(estimate, reference, patients=None) -> dict[str, float | int | None]:
    """Agreement of an estimate [N] with a reference [N]: plain numbers, or None.

    `n`, Pearson's `r`, `bias` (estimate minus reference), `sd` of the differences, limits of agreement `loa_low` and
    `loa_high` (bias -+ 1.96 sd, Bland and Altman 1986, Lancet 327:307-310) and the mean absolute error `mae`; `*_low` and
    `*_high` of r, bias and mae are 95 % bootstrap intervals over `patients` [N]. With fewer than 3 pairs, all but `n` are None.
    """
    x, y, owners = _pairs(estimate, reference, patients)
    values = [np.nan] * len(AGREEMENT)
    if len(x) >= MIN_PAIRS:
        difference, wrong = x - y, np.abs(x - y)
        bias, sd = difference.mean(), difference.std(ddof=1)
        values = [*_pearson_interval(x, y, owners), bias, *bootstrap_interval(difference, owners), sd]
        values += [bias - 1.96 * sd, bias + 1.96 * sd, wrong.mean(), *bootstrap_interval(wrong, owners)]
    return {"n": len(x)} | {name: none_if_nan(float(value)) for name, value in zip(AGREEMENT, values, strict=True)}


def ef_confusion(estimate, reference) -> np.ndarray:
    """Numbers of patients by class of ejection fraction, int [3,3]: rows are the reference's class, columns the estimate's."""
    x, y, _ = _pairs(estimate, reference, None)
    return np.bincount(3 * ef_class(y) + ef_class(x), minlength=9).reshape(3, 3)


def paired_test(a, b, patients) -> dict[str, float | int | None]:
    """Test whether one of two methods is better on the same images: scores `a`, `b` [N] of images of `patients` [N].

    Returns `n` pairs of `patients`, the mean `difference` a - b over images, its interval (`low`, `high`) and the two-sided
    `p` of Wilcoxon's signed-rank test (1945, Biometrics Bull 1:80-83) on patients' means. Under 3 patients these are None.
    """
    from scipy.stats import wilcoxon  # here, since every command imports this file: it is a quarter of the start-up time

    x, y, owners = _pairs(a, b, patients)
    names, owner = np.unique(owners, return_inverse=True)
    counted = {"n": len(x), "patients": len(names)}
    if len(names) < MIN_PAIRS:
        return counted | dict.fromkeys(("difference", "low", "high", "p"))
    low, high = bootstrap_interval(x - y, owners)
    means = np.bincount(owner, weights=x - y) / np.bincount(owner)
    p = wilcoxon(means).pvalue if np.any(means) else 1.0
    return counted | {"difference": none_if_nan((x - y).mean()), "low": low, "high": high, "p": none_if_nan(p)}


def auc(score: np.ndarray, is_good: np.ndarray) -> float:
    """Area under the ROC curve (Hanley and McNeil 1982): the chance that a good one outscores a poor one, or NaN."""
    from scipy.stats import mannwhitneyu

    good, poor = score[is_good], score[~is_good]
    if not len(good) * len(poor):
        return float("nan")
    return float(mannwhitneyu(good, poor, method="asymptotic").statistic / (len(good) * len(poor)))
