"""Prediction intervals of a patient's ejection fraction (EF), calibrated on patients that the network has not seen.

Normalised split conformal prediction (Lei et al. 2018, J Am Stat Assoc 113:1094-1111, section 5.2): each error is divided
by its expected size, a straight line in the difference between the two views' own EFs, and a quantile of these ratios gives
intervals that contain the true EF of the chosen share of new patients, whatever the errors' distribution.
"""

import math
from collections.abc import Mapping

import numpy as np

COVERAGE = 0.8
MIN_PATIENTS = 20
EFS = ("ef_ase", "ef_camus")  # those with an interval: the biplane ones


def calibrate(predicted: np.ndarray, truth: np.ndarray, disagreement: np.ndarray) -> dict[str, float] | None:
    """The calibration from patients' predicted and true EF and the views' disagreement [N], in points; NaN are left out.

    A patient's interval is its EF -+ `factor` (`base` + `slope` disagreement). `held` is the share of `patients` whose true EF
    lies within the interval that the others' quantile gives. None with fewer than MIN_PATIENTS, or if all errors are 0.
    """
    error, apart = np.abs(np.asarray(predicted, float) - truth), np.asarray(disagreement, float)
    known = np.isfinite(error) & np.isfinite(apart)
    error, apart = error[known], apart[known]
    if len(error) < MIN_PATIENTS or not error.any():
        return None
    varies = apart.var()
    slope = max(0.0, float(np.cov(apart, error, ddof=0)[0, 1] / varies)) if varies else 0.0
    # An expected error near 0, when the views agree, would make intervals of no width.
    base = max(float(error.mean() - slope * apart.mean()), float(error.mean()) / 4)
    ratios = error / (base + slope * apart)
    factors = [_quantile(np.delete(ratios, i)) for i in range(len(ratios))]
    return {
        "patients": len(error), "base": base, "slope": slope, "factor": _quantile(ratios),
        "held": float(np.mean(ratios <= factors)),
    }  # fmt: skip


def _quantile(ratios: np.ndarray) -> float:
    """The ratio that a new one stays below with probability COVERAGE: the ceil((n + 1) COVERAGE)-th smallest of n."""
    return float(np.sort(ratios)[math.ceil((len(ratios) + 1) * COVERAGE) - 1])


def views_difference(row: Mapping, suffix: str = ""):
    """EF in 4CH alone minus EF in 2CH alone, in points, of a row of indices or of a table of rows."""
    return row[f"ef_4ch_ase{suffix}"] - row[f"ef_2ch_ase{suffix}"]


def intervals(row: dict, calibrations: dict[str, dict | None]) -> dict[str, float]:
    """`ef_ase_low`, `ef_ase_high` and so on, in percent, of a row of indices; NaN without an EF or a calibration."""
    apart, found = abs(views_difference(row)), {}
    for name in EFS:
        one = calibrations.get(name)
        half = one["factor"] * (one["base"] + one["slope"] * apart) if one else math.nan
        ends = (row[name] - half, row[name] + half)
        found |= {f"{name}_{end}": min(max(value, 0.0), 100.0) if math.isfinite(value) else math.nan
                  for end, value in zip(("low", "high"), ends, strict=True)}  # fmt: skip
    return found
