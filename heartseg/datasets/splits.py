"""Divides patients into groups, so that all views and phases of a heart are in the same group."""

import difflib
import random
import re
from collections import defaultdict

from heartseg.config.experiment import SplitConfig
from heartseg.errors import UserError, require
from heartseg.labels import EF_CLASSES, ef_class

QUALITIES = ("Good", "Medium", "Poor")


def group_of(groups: dict[str, list[str]]) -> dict[str, str]:
    """The group of each patient; raises UserError if a patient is in two."""
    found: dict[str, str] = {}
    for patient, group in ((patient, group) for group, patients in groups.items() for patient in patients):
        if found.setdefault(patient, group) != group:
            raise UserError(f"{patient} is in both {found[patient]} and {group}: list each patient in one group only.")
    return found


def make_groups(
    config: SplitConfig, patients: list[str], official: dict[str, list[str]], known: dict[str, dict] | None = None
) -> dict[str, list[str]]:
    """Sorted patients by group; `official` is the split in the source's own files.

    `known` holds a patient's `rows` (0 leaves the patient out), `ef` in percent and `quality` by view, as a manifest does.
    Raises UserError if the official split is missing, or if no patient remains to train on.
    """
    known = known or {}
    patients = [patient for patient in patients if known.get(patient, {}).get("rows") != 0]
    if config.kind == "official":
        if not official:
            missing = "--split.kind official needs database_split/subgroup_*.txt or groups.csv, and the source has neither"
            raise UserError(f"{missing}: add one, or use --split.kind ratio.")
        groups = {group: sorted({*patients} & {*names}) for group, names in official.items()}
    else:
        groups = draw_groups(config, patients, known)
    groups = {group: names for group, names in groups.items() if names}
    if len(groups) < 2 or "train" not in groups:
        problem = f"{len(patients)} patients are too few for a training group and a second group"
        raise UserError(f"{problem}: add patients, or change the --split flags.")
    group_of(groups)
    return groups


def check_official(patients: list[str], official: dict[str, list[str]]) -> None:
    """Raise UserError if the split names an unknown patient, unless the source is part of CAMUS, whose files name all 500."""
    named = {name for names in official.values() for name in names}
    left_out = sorted(set(patients) - named)
    strangers = [name for name in sorted(named - set(patients)) if left_out or not re.fullmatch(r"patient\d{4}", name)]
    if strangers:
        nearest = difflib.get_close_matches(strangers[0], left_out or patients, 3, 0.0)
        counts = f"{len(strangers)} such names, {len(left_out)} patients in no group"
        problem = f"The source's split names {strangers[0]!r}, who has no file (nearest: {', '.join(nearest)}; {counts})"
        raise UserError(f"{problem}: correct its groups, or use --split.kind ratio.")


def stratum(known: dict) -> str:
    """A patient's stratum: the class of the ejection fraction and the worst image quality."""
    ef, qualities = known.get("ef"), set((known.get("quality") or {}).values())
    worst = max(qualities, key=lambda quality: (quality in QUALITIES and QUALITIES.index(quality), quality), default="")
    return f"{'' if ef is None else EF_CLASSES[int(ef_class(ef))]}/{worst}"


def draw_groups(config: SplitConfig, patients: list[str], known: dict[str, dict]) -> dict[str, list[str]]:
    """The groups, sorted: shares are rounded to whole patients, folds are dealt like cards, and the others train."""
    drawn, by_stratum = sorted(patients), defaultdict(list)
    random.Random(config.seed).shuffle(drawn)
    for patient in drawn:
        by_stratum[stratum(known.get(patient, {})) if config.stratify else ""].append(patient)
    strata = [by_stratum[name] for name in sorted(by_stratum)]
    dealt = sum(strata, [])
    if config.kind == "ratio":
        test, rest = take(strata, round(config.test_share * len(dealt)), config.seed)
        num_val = round(config.val_share * len(dealt))
    else:
        require(len(dealt) >= config.folds, f"{len(dealt)} patients cannot fill {config.folds} folds: lower --split.folds.")
        test = dealt[config.fold :: config.folds]
        rest = [[patient for patient in patients if patient not in test] for patients in strata]
        num_val = round(config.val_share * (len(dealt) - len(test)))
    val, rest = take(rest, num_val, config.seed)
    return {"train": sorted(sum(rest, [])), "val": sorted(val), "test": sorted(test)}


def take(strata: list[list[str]], count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Take `count` patients in proportion to the strata's sizes; returns them, and the remaining patients of each stratum.

    Fractions of a patient carry over from stratum to stratum, from a random offset, so that rounding favours no stratum.
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
