"""Divides patients into groups, always by patient: a heart's other views and phases never cross a group's border."""

import random

from heartseg.config import SplitConfig
from heartseg.errors import UserError

GROUPS = ("train", "val", "test")


def make_groups(config: SplitConfig, patients: list[str], official: dict[str, list[str]]) -> dict[str, list[str]]:
    """Group names to sorted patients; `official` is what the source's own split files say.

    Raises UserError where an official split is asked for and not there, or where no patient is left to train on.
    """
    groups = official_groups(patients, official) if config.kind == "official" else ratio_groups(config, patients)
    if len(groups) < 2 or "train" not in groups:
        raise UserError(f"{len(patients)} patients give no training group and another one: give more, or another split.")
    assert_disjoint(groups)
    return groups


def official_groups(patients: list[str], official: dict[str, list[str]]) -> dict[str, list[str]]:
    """The release's own groups, kept to the patients that are there; patients in no file are left out."""
    if not official:
        raise UserError("The source has no database_split/subgroup_*.txt: take --split.kind ratio.")
    there = set(patients)
    groups = {group: sorted(there & set(names)) for group, names in official.items()}
    return {group: names for group, names in groups.items() if names}


def ratio_groups(config: SplitConfig, patients: list[str]) -> dict[str, list[str]]:
    """A seeded draw: shares are rounded to whole patients, and what remains trains."""
    drawn = sorted(patients)
    random.Random(config.seed).shuffle(drawn)
    num_test = round(config.test_share * len(drawn))
    num_val = round(config.val_share * len(drawn))
    cut = {"test": drawn[:num_test], "val": drawn[num_test : num_test + num_val], "train": drawn[num_test + num_val :]}
    return {group: sorted(cut[group]) for group in GROUPS if cut[group]}


def assert_disjoint(groups: dict[str, list[str]]) -> None:
    """Raise UserError where a patient stands in two groups."""
    seen: dict[str, str] = {}
    for group, patients in groups.items():
        for patient in patients:
            if seen.setdefault(patient, group) != group:
                raise UserError(f"{patient} is in both {seen[patient]} and {group}: a split must be by patient.")
