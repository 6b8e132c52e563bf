"""Compares runs in tables: which settings differ, how scores differ on the same patients, and where masks disagree."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
import pandas

from heartseg.config.experiment import flatten, from_json, identity, none_if_nan
from heartseg.errors import UserError
from heartseg.labels import UNTRAINED_DICE, frame_name
from heartseg.metrics.agreement import mean_interval, paired_test
from heartseg.metrics.segmentation import DISTANCES, SCORES
from heartseg.training.run_directory import Run

SEED, CODE = "train.seed", "code"
# Absolute errors of the ejection fraction, one per patient: the column's name, and the index it is the error of.
EF_ERRORS = {f"ef_{convention}_error": f"ef_{convention}" for convention in ("camus", "ase")}
NAMES = (*SCORES, *DISTANCES, *EF_ERRORS)
# Reference measurements that differ by more than this share are of different hearts.
SAME_TRUTH = 1e-3
NO_DIFFERENCE, NOTHING = "no difference seen", "nothing to compare"


@dataclass(frozen=True, eq=False)
class Scored:
    """A run, its epochs so far, and its evaluation's tables and summary; without scores these are None and `problem` is set."""

    run: Run
    label: str
    record: list[dict]
    images: pandas.DataFrame | None = None
    patients: pandas.DataFrame | None = None
    summary: dict | None = None
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Entry:
    """One entry of a comparison: a run, or several that differ only in their seed."""

    letter: str
    runs: tuple[Scored, ...]

    @property
    def label(self) -> str:
        """The run's name; of several runs, the first one's name and the number of seeds."""
        first = self.runs[0].label
        return first if len(self.runs) == 1 else f"{first} ({len(self.runs)} seeds)"

    @functools.cached_property
    def scored(self) -> list[Scored]:
        """The runs whose scores are pooled: those scored on the same hearts as the first scored run."""
        known = [run for run in self.runs if run.images is not None]
        return [run for run in known if same_hearts(run, known[0])]

    @functools.cached_property
    def table(self) -> pandas.DataFrame | None:
        """`score_table` with each score averaged over the seeds; None if no run has scores."""
        tables = [score_table(one) for one in self.scored]
        if not tables:
            return None
        means = pandas.concat(tables)[list(NAMES)].groupby(level=0, sort=False).mean()
        return tables[0][["patient"]].join(means)


def compare_entries(entries: Sequence[Entry], reference: Entry) -> dict:
    """Compare entries with one of them, the reference; returns the content of `comparison.json`."""
    return {
        "reference": reference.letter,
        "entries": {entry.letter: [one.run.path for one in entry.runs] for entry in entries},
        "settings": differing_settings(entries),
        "means": {entry.letter: means(entry) for entry in entries},
        "differences": {entry.letter: differences(entry, reference) for entry in entries if entry is not reference},
        "disagreements": disagreements(entries, 6),
        "notes": notes(entries, reference),
    }


def settings(run: Run) -> dict[str, str]:
    """The settings that decide a run's result (configuration, data, initial weights and code) as text, by dotted name."""
    try:
        # A run of an older version gets the defaults of settings that did not exist then.
        decided = identity(from_json(run.description["experiment"]))
    except UserError:
        decided = run.description["identity"]
    weights = run.description.get("initial_weights_sha256")
    return {name: str(value) for name, value in flatten(decided).items()} | {
        "data": run.description["data_fingerprint"][:12],
        "first weights": weights[:12] if weights else "the recipe's",
        CODE: run.description.get("code", "–")[:20],
    }


def group_by_settings(found: Sequence[Scored]) -> list[Entry]:
    """Runs as entries A, B, C …, in order; runs that differ only in their seed (and code revision) share an entry."""
    entries: dict[tuple, dict[str, Scored]] = {}
    for one in found:
        texts = settings(one.run)
        alike = tuple(sorted((name, text) for name, text in texts.items() if name not in (SEED, CODE)))
        # A repeated seed with the same settings, as after `--fresh`, starts another entry.
        again = next(n for n in itertools.count() if texts[SEED] not in entries.get((alike, n), {}))
        entries.setdefault((alike, again), {})[texts[SEED]] = one
    by_seed = [tuple(mine[seed] for seed in sorted(mine, key=int)) for mine in entries.values()]
    # A to Z, then A2 to Z2, and so on.
    letters = [ascii_uppercase[place % 26] + (str(place // 26 + 1) if place > 25 else "") for place in range(len(by_seed))]
    return [Entry(letter, runs) for letter, runs in zip(letters, by_seed, strict=True)]


def differing_settings(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """One row per setting that differs: its dotted name and its value in each entry, or all values if its runs differ."""
    texts = [[settings(one.run) for one in entry.runs] for entry in entries]
    names = dict.fromkeys(name for mine in texts for one in mine for name in one)
    rows = [(n, *(", ".join(dict.fromkeys(one.get(n, "–") for one in mine)) for mine in texts)) for n in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def image_names(rows: Iterable[dict]) -> list[str]:
    """Each image's `frame_name`, numbered if repeated: unique within an evaluation, and the same in every evaluation."""
    keys = ("patient", "view", "phase", "frame")
    names = [frame_name({key: None if pandas.isna(row[key]) else row[key] for key in keys}) for row in rows]
    places = pandas.Series(names).groupby(names).cumcount()
    return [f"{name} ({place + 1})" if place else name for name, place in zip(names, places, strict=True)]


def score_table(one: Scored) -> pandas.DataFrame:
    """One row per image and per patient, indexed by name: `patient` and NAMES, NaN for scores of the other kind."""
    images = one.images[["patient", *SCORES, *DISTANCES]].set_axis(image_names(one.images.to_dict("records")))
    known = one.patients
    errors = {name: (known[f"{index}_prediction"] - known[f"{index}_truth"]).abs() for name, index in EF_ERRORS.items()}
    patients = pandas.DataFrame({"patient": known["patient"], **errors}).set_axis(known["patient"] + ", EF")
    return pandas.concat([images.astype(dict.fromkeys((*SCORES, *DISTANCES), float)), patients])


def same_hearts(one: Scored, other: Scored) -> bool:
    """True if two evaluations scored the same patients against the same reference; equal names alone prove little."""
    tables = [each.patients.set_index("patient").sort_index() for each in (one, other)]
    known = [table.filter(regex="_truth$").select_dtypes("number") for table in tables]
    if one.summary["dataset"] != other.summary["dataset"] or not known[0].index.equals(known[1].index):
        return False
    shared = known[0].columns.intersection(known[1].columns)
    return np.allclose(known[0][shared], known[1][shared], rtol=SAME_TRUTH, atol=SAME_TRUTH, equal_nan=True)


def means(entry: Entry) -> dict[str, dict]:
    """Each score's mean with its 95 % interval over patients, and `seeds`, the mean per seed; empty without scores."""
    if entry.table is None:
        return {}
    alone, owners = [score_table(one)[list(NAMES)].mean() for one in entry.scored], entry.table["patient"].to_numpy()
    seeds = {name: [none_if_nan(mean[name]) for mean in alone] for name in NAMES}
    return {name: mean_interval(entry.table[name], owners) | {"seeds": seeds[name]} for name in NAMES}


def differences(entry: Entry, reference: Entry) -> dict[str, dict]:
    """`agreement.paired_test` of entry minus reference and its `reading`, by score; empty without scores of the same hearts."""
    if not (entry.scored and reference.scored and same_hearts(entry.scored[0], reference.scored[0])):
        return {}
    shared = reference.table.index.intersection(entry.table.index, sort=False)
    table, other = entry.table.loc[shared], reference.table.loc[shared]
    tested = {n: paired_test(table[n], other[n], other["patient"]) for n in NAMES}
    is_nothing = is_untrained(entry) and is_untrained(reference)
    return {name: found | {"reading": NOTHING if is_nothing else reading(found)} for name, found in tested.items()}


def is_untrained(entry: Entry) -> bool:
    """True if an entry's masks are empty or miss the hearts, so that scores and distances mean nothing."""
    return bool(entry.scored) and entry.table["dice"].mean() < UNTRAINED_DICE


def reading(found: dict) -> str:
    """A paired test in words: a direction if interval and p agree on a difference, otherwise no difference."""
    # With a handful of patients, a bootstrap interval is too narrow, and the signed-rank test cannot reach 0.05.
    if found["difference"] is None:
        return "too few patients"
    if found["low"] <= 0 <= found["high"] or found["p"] >= 0.05:
        return NO_DIFFERENCE
    return "higher" if found["difference"] > 0 else "lower"


def disagreements(entries: Sequence[Entry], count: int) -> list[dict]:
    """Of the images that all entries on the same hearts scored, those whose mean Dice differs most, widest spread first."""
    scored = [entry for entry in entries if entry.scored]
    alike = [entry for entry in scored if same_hearts(entry.scored[0], scored[0].scored[0])]
    if len(alike) < 2:
        return []
    owners = alike[0].table["patient"]
    dice = pandas.DataFrame({entry.letter: entry.table["dice"] for entry in alike}).dropna()
    spread = (dice.max(axis=1) - dice.min(axis=1)).sort_values(ascending=False, kind="stable").head(count)
    return [
        {"image": name, "patient": owners[name], "spread": float(wide), "dice": dice.loc[name].to_dict()}
        for name, wide in spread[spread > 0].items()
    ]


def notes(entries: Sequence[Entry], reference: Entry) -> list[str]:
    """Sentences about missing results and invalid comparisons."""
    lines = []
    for entry in entries:
        for one in entry.runs:
            epochs, planned = len(one.record), one.run.description["identity"]["train"]["epochs"]
            if epochs < planned:
                lines.append(f"{one.label} has finished only {epochs} of its {planned} epochs: the comparison uses those.")
            if one.problem:
                lines.append(f"{one.label} has no scores here: {one.problem.rstrip('.')}.")
        if left_out := [one.label for one in entry.runs if one.images is not None and one not in entry.scored]:
            names, first = ", ".join(left_out), entry.scored[0].label
            lines.append(f"Not scored on the patients of {first}, so not pooled with it: {names}.")
        if entry.scored and reference.scored and not same_hearts(entry.scored[0], reference.scored[0]):
            where = "{letter} on the {group} group of {dataset} ({patients} patients)"
            these, those = (where.format(letter=e.letter, **e.scored[0].summary) for e in (entry, reference))
            shared = len(set(entry.table["patient"]) & set(reference.table["patient"]))
            unpaired = "Their scores are shown side by side, not paired."
            lines.append(f"Scored on different hearts ({shared} patient names in common): {these}, {those}. {unpaired}")
    if untrained := [entry.letter for entry in entries if is_untrained(entry)]:
        empty = f"with a mean Dice below {UNTRAINED_DICE}, the masks are empty or miss the hearts, and distances mean nothing"
        lines.append(f"{', '.join(untrained)} cannot be compared: {empty}. Train longer.")
    groups = {one.summary["group"] for entry in entries for one in entry.scored}
    sweeps = {entry.runs[0].run.description["experiment"]["tracking"].get("group") for entry in entries}
    if groups == {"holdout"} and sweeps != {""}:
        chosen = "A sweep's winner was chosen on these held-out patients"
        lines.append(f"{chosen}: its lead here is partly luck. Train both with new seeds.")
    if not reference.scored:
        lines.append(f"The reference {reference.letter} has no scores, so nothing is compared with it.")
    if len({settings(one.run).get("loss.kind") for entry in entries for one in entry.runs}) > 1:
        lines.append("The runs minimise different losses: their loss values cannot be compared.")
    return lines
