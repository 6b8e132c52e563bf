"""Divides patients into groups, always by patient: a heart's other views and phases never cross a group's border."""

import difflib
import random
import re

from heartseg.config.experiment import SplitConfig
from heartseg.errors import UserError
from heartseg.labels import EF_CLASSES, ef_class

QUALITIES = ("Good", "Medium", "Poor")


def group_of(groups: dict[str, list[str]]) -> dict[str, str]:
    return {patient: group for group, patients in groups.items() for patient in patients}


def make_groups(
    config: SplitConfig, patients: list[str], official: dict[str, list[str]], known: dict[str, dict] | None = None
) -> dict[str, list[str]]:
    """Group names to sorted patients; `official` is the split that the source's own files give.

    `known` holds a patient's `ef` in percent and `quality` by view, as a manifest keeps them; patients of whom nothing is
    known are one stratum. Raises UserError if an official split is missing, or if no patient is left to train on.
    """
    if config.kind == "official":
        if not official:
            raise UserError("The source has no database_split/subgroup_*.txt and no groups.csv: take --split.kind ratio.")
        groups = {group: sorted({*patients} & {*names}) for group, names in official.items()}
    else:
        groups = draw_groups(config, draw_strata(config, patients, known or {}))
    groups = {group: names for group, names in groups.items() if names}
    if len(groups) < 2 or "train" not in groups:
        raise UserError(f"{len(patients)} patients give no training group and another one: give more, or another split.")
    assert_disjoint(groups)
    return groups


def check_official(patients: list[str], official: dict[str, list[str]]) -> None:
    """Raise UserError if the source's split names a stranger, unless it is a part of CAMUS, whose files name all 500."""
    named = {name for names in official.values() for name in names}
    left_out = sorted(set(patients) - named)
    strangers = [name for name in sorted(named - set(patients)) if left_out or not re.fullmatch(r"patient\d{4}", name)]
    if strangers:
        nearest = difflib.get_close_matches(strangers[0], left_out or patients, 3, 0.0)
        counts = f"{len(strangers)} such names, {len(left_out)} patients in no group"
        raise UserError(
            f"The split of the source names {strangers[0]!r}, who has no file (nearest: {', '.join(nearest)}; {counts}): "
            "correct its groups, or take --split.kind ratio."
        )


def stratum(known: dict) -> str:
    """What patients of a stratum share: the class of the ejection fraction and the worst image quality."""
    ef, qualities = known.get("ef"), set((known.get("quality") or {}).values())
    worst = max(qualities, key=lambda quality: (quality in QUALITIES and QUALITIES.index(quality), quality), default="")
    return f"{'' if ef is None else EF_CLASSES[int(ef_class(ef))]}/{worst}"


def draw_strata(config: SplitConfig, patients: list[str], known: dict[str, dict]) -> list[list[str]]:
    """The patients in the seed's order, in one list for each stratum; in one list without `stratify`."""
    drawn = sorted(patients)
    random.Random(config.seed).shuffle(drawn)
    strata: dict[str, list[str]] = {}
    for patient in drawn:
        strata.setdefault(stratum(known.get(patient, {})) if config.stratify else "", []).append(patient)
    return [strata[name] for name in sorted(strata)]


def draw_groups(config: SplitConfig, strata: list[list[str]]) -> dict[str, list[str]]:
    """The groups, sorted: shares are rounded to whole patients, and what remains trains.

    Folds are dealt like cards, stratum after stratum: they differ by one patient at most, in each stratum too. The share of
    the validation group is one of all patients, with folds one of those that are not in the test fold.
    """
    dealt = [patient for patients in strata for patient in patients]
    if config.kind == "ratio":
        test, rest = take(strata, round(config.test_share * len(dealt)), config.seed)
        num_val = round(config.val_share * len(dealt))
    else:
        if len(dealt) < config.folds:
            raise UserError(f"{len(dealt)} patients cannot fill {config.folds} folds: lower --split.folds.")
        test = dealt[config.fold :: config.folds]
        rest = [[patient for patient in patients if patient not in test] for patients in strata]
        num_val = round(config.val_share * (len(dealt) - len(test)))
    val, rest = take(rest, num_val, config.seed)
    return {"train": sorted(patient for patients in rest for patient in patients), "val": sorted(val), "test": sorted(test)}


def take(strata: list[list[str]], count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """The first few of every stratum, `count` in all, and the others by stratum.

    Each gives its share, rounded up or down: the share of the running total is cut at whole patients, from a start that
    the seed draws so that small strata are not rounded the same way each time.
    """
    total = max(1, sum(map(len, strata)))
    start, taken, rest, before = random.Random(seed).randrange(total), [], [], 0
    for patients in strata:
        after = before + len(patients)
        number = (after * count + start) // total - (before * count + start) // total
        taken += patients[:number]
        rest.append(patients[number:])
        before = after
    return taken, rest


def assert_disjoint(groups: dict[str, list[str]]) -> None:
    """Raise UserError if a patient is in two groups."""
    seen: dict[str, str] = {}
    for group, patients in groups.items():
        for patient in patients:
            if seen.setdefault(patient, group) != group:
                raise UserError(f"{patient} is in both {seen[patient]} and {group}: a split must be by patient.")
