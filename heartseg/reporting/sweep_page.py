"""A sweep as one self-contained HTML page with its pictures and as a table on the terminal; no score is recomputed."""

import textwrap
from collections.abc import Collection, Sequence

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from heartseg.reporting import pages
from heartseg.reporting.plots import INK, colour_key, new_axes, plain, write_labels
from heartseg.reporting.text_tables import table_text
from heartseg.storage import filesystem
from heartseg.tuning.sweep import FINISHED, METRIC, Sweep, Trial, epochs_saved, read_trials, rungs, why_no_winner

PAGE = "sweep.html"
SCORE = f"best {METRIC}"
# The columns of a trial's row besides the settings that it varies.
SHOWN = ["state", "epochs", SCORE, f"last {METRIC}", "seconds"]
# Okabe and Ito's colours, which colour-blind readers can distinguish, with yellow darkened for white pages. By family:
# schedules that drop in steps, fall smoothly, or rise again.
SCHEDULE_COLOURS = {
    "constant": "#868C96", "step": "#D55E00", "multistep": "#E69F00", "plateau": "#A8780C", "exponential": "#009E73",
    "polynomial": "#56B4E9", "cosine": "#2F6FD0", "restarts": "#9A6FC4", "one_cycle": "#CC79A7",
}  # fmt: skip


def varied(table: pandas.DataFrame) -> list[str]:
    """The columns that differ between trials, the schedule's first; for listed changes, their names."""
    if "change" in table:
        return ["change"]
    fields = [name for name in table.columns if "." in name and "/" not in name]
    return ["schedule.kind", *(name for name in fields if table[name].nunique() > 1 and name != "schedule.kind")]


def show_cell(value: object) -> str:
    """A cell's text: scores with four digits, other numbers as short as possible."""
    if isinstance(value, float):
        return "–" if pandas.isna(value) else f"{value:.4g}"
    return str(value)


def show_rows(table: pandas.DataFrame) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heading and rows with the essentials of each trial, the best first."""
    columns = [name for name in ["rank", "trial", *varied(table), *SHOWN] if name in table]
    shown = table[columns].copy()
    for name, digits in ((SCORE, 4), (f"last {METRIC}", 4), ("seconds", 0)):
        shown[name] = [pages.show_number(value, digits) for value in table[name]]
    return tuple(columns), [tuple(map(show_cell, row)) for row in shown.itertuples(index=False)]


def show_table(table: pandas.DataFrame) -> str:
    """The trials as an aligned text table."""
    return table_text(("", *show_rows(table)))


def write_page(sweep: Sweep, table: pandas.DataFrame) -> str:
    """Write `sweep.html` into a sweep's folder and return its path."""
    trials = read_trials(sweep)
    trained, planned = epochs_saved(sweep, table)
    heading, rows = show_rows(table)
    return pages.write(
        sweep.path, PAGE, name=sweep.name, dataset=sweep.description["dataset"], recipe=sweep.base.name,
        holdout=sweep.base.train.holdout, facts=facts(sweep), metric=METRIC, trained=trained, planned=planned,
        heading=heading, rows=rows, states=table["state"].value_counts().to_dict(),
        best=None if why_no_winner(table) else table.iloc[0], why_no_winner=why_no_winner(table),
        best_path=filesystem.join(sweep.path, "best.json"), against=against_recipe(table),
        best_values=[(name, show_cell(table.iloc[0][name])) for name in varied(table)] if len(table) else [],
        reasons=[(t.run.name, t.state, t.reason) for t in trials if t.reason], pictures=figures(sweep, table, trials),
    )  # fmt: skip


def against_recipe(table: pandas.DataFrame) -> str:
    """One sentence on the winner's gain over the recipe itself, which is trial 0; empty if the recipe has not finished."""
    finished = table[table["state"] == FINISHED].set_index("trial")[SCORE]
    recipe = finished[finished.index.str.startswith("000-")]
    if recipe.empty or finished.index[0] == recipe.index[0]:
        return "The recipe itself is the best." if len(recipe) else ""
    gap = finished.iloc[0] - recipe.iloc[0]
    return f"The recipe itself reached {recipe.iloc[0]:.4f} (trial {recipe.index[0]}): the winner is {gap:.4f} higher."


def facts(sweep: Sweep) -> list[tuple[str, str]]:
    """The facts that a reader needs to judge the sweep."""
    plan, groups, compared = sweep.plan, sweep.description["groups"], ", ".join(map(str, rungs(sweep)))
    low, high = (sweep.base.optim.lr * factor for factor in plan.space.lr_factors)
    rates = f"{low:g} to {high:g} (recipe: {sweep.base.optim.lr:g})"
    return [
        ("search", f"{plan.search}, seed {plan.search_seed}; trial 000 is the recipe itself"),
        *([("schedules", ", ".join(plan.space.schedules)), ("base rates", rates)] if plan.search != "changes" else []),
        ("epochs of a trial", str(sweep.base.train.epochs)),
        ("early stopping", f"at epochs {compared}, about 1 in {plan.reduction:g} continues" if compared else "none"),
        ("patients", f"{groups['train']} for training, {groups['val']} held out to compare trials"),
    ]


def figures(sweep: Sweep, table: pandas.DataFrame, trials: list[Trial]) -> list[dict]:
    """The page's figures, each with its heading; none before a trial has a score."""
    if table[SCORE].isna().all():
        return []
    records = [(t.values["schedule.kind"], t.state, t.record) for t in trials]
    scored = table[table[SCORE].notna()]
    curves = ("Learning curves by schedule", sweep_curves(records, METRIC))
    if "change" in table:
        drawn = [("Each change compared with the recipe", differences(scored, SCORE)), curves]
    else:
        drawn = [
            ("Settings and scores of the trials", parallel_coordinates(scored, varied(table), SCORE)),
            curves,
            ("Ranking, and the epochs that early stopping saved", ranks(scored, SCORE, sweep.base.train.epochs)),
        ]
    return [{"title": title} | pages.figure(one, f"sweep{place}", title) for place, (title, one) in enumerate(drawn)]


def schedule_key(figure: Figure, kinds: Collection[str]) -> None:
    """Draw a key of the schedules' colours above the picture."""
    colour_key(figure, {kind: colour for kind, colour in SCHEDULE_COLOURS.items() if kind in kinds}, columns=5)


def parallel_coordinates(table: pandas.DataFrame, fields: Sequence[str], score: str) -> Figure:
    """One line per trial across its values of `fields`, evenly spaced in order, and its score; unfinished trials are faint."""
    figure, axes = new_axes(max(5.0, 1.9 * (len(fields) + 1)), 3.6)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set(xlim=(-0.15, len(fields) + 0.3), ylim=(-0.06, 1.06), yticks=[])
    # The score's axis spans the finished trials only; trials stopped at the start would squeeze them into one point.
    is_done = table["state"] == "finished"
    finished = table.loc[is_done, score]
    shown = table[score].clip(lower=1.25 * finished.min() - 0.25 * finished.max() if len(finished) > 1 else None)
    low, high = shown.min(), shown.max()
    heights = [(table[name].rank(method="dense") - 0.5) / table[name].nunique() for name in fields]
    heights.append((shown - low) / ((high - low) or 1.0))
    labels = [pick_labels(values, place) for values, place in zip((table[name] for name in fields), heights, strict=False)]
    labels.append([(place, f"{low + place * (high - low):.3g}") for place in np.linspace(0, 1, 4)])
    for column, texts in enumerate(labels):
        axes.axvline(column, color=INK, linewidth=0.8, alpha=0.6)
        for height, text in texts:
            axes.annotate(text, (column, height), (5, 0), textcoords="offset points", color=INK, fontsize=8, va="center")
    for row, kind in table["schedule.kind"].items():
        strength = {"linewidth": 2.2, "alpha": 0.95} if is_done[row] else {"linewidth": 1.0, "alpha": 0.45}
        axes.plot([places[row] for places in heights], color=SCHEDULE_COLOURS[kind], **strength)
    axes.set_xticks(range(len(labels)), [*fields, score], color=INK, fontsize=9)
    axes.tick_params(length=0)
    schedule_key(figure, set(table["schedule.kind"]))
    return figure


def pick_labels(values: pandas.Series, heights: pandas.Series) -> list[tuple[float, str]]:
    """At most five of a column's values, including the lowest and highest, as (height, text)."""
    texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    known = sorted(set(zip(heights, texts, strict=True)))
    return [known[round(place)] for place in np.linspace(0, len(known) - 1, min(len(known), 5))]


def sweep_curves(records: Sequence[tuple[str, str, list[dict]]], metric: str) -> Figure:
    """The metric by epoch of (schedule, state, epochs), one line per trial; a dot marks an early stop."""
    figure, axes = new_axes(6.2, 3.6)
    for kind, state, record in records:
        known = [(row["epoch"], row[metric]) for row in record if row.get(metric) is not None]
        if known:
            (epochs, values), done = zip(*known, strict=True), state == "finished"
            axes.plot(epochs, values, color=SCHEDULE_COLOURS[kind], linewidth=1.8 if done else 1.2, alpha=1 if done else 0.7)
            if not done:
                axes.plot(epochs[-1:], values[-1:], "o", color=SCHEDULE_COLOURS[kind], markersize=5)
    write_labels(axes, xlabel="epoch", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    schedule_key(figure, {kind for kind, _, _ in records})
    return figure


def ranks(table: pandas.DataFrame, score: str, epochs: int) -> Figure:
    """Trials from best to worst: the score on the left, the trained share of the planned epochs on the right."""
    figure = Figure(figsize=(7.2, 0.9 + 0.27 * len(table)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    heights, colours = draw_scores(left, table, score, np.nanmin(table[score]), table["trial"])
    right.barh(heights, epochs, color=INK, alpha=0.12, height=0.6)
    right.barh(heights, table["epochs"], color=colours, height=0.6)
    plain(right, ["bottom"], labelsize=8)
    right.tick_params(left=False)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes, title in ((left, score), (right, "epochs trained, out of those planned")):
        axes.set_title(title, color=INK, fontsize=10, loc="left")
    return figure


def differences(table: pandas.DataFrame, score: str) -> Figure:
    """The score of each listed change, in the table's order, against the recipe's own (a line), with the gain on the right."""
    # A change is settings joined by commas: lines break there.
    labels = [textwrap.fill(change.replace(",", ", "), 44, break_long_words=False) for change in table["change"]]
    rows = 1.5 + max(label.count("\n") for label in labels)
    figure = Figure(figsize=(8.0, 0.9 + 0.19 * rows * len(table)), layout="constrained")
    axes = figure.subplots()
    recipe = table.loc[table["change"] == "-", score]
    start = recipe.iloc[0] if len(recipe) else table[score].min()
    axes.axvline(start, color=INK, linewidth=1)
    heights, _ = draw_scores(axes, table, score, start, ["the recipe" if label == "-" else label for label in labels])
    right = axes.secondary_yaxis("right")
    gains = [f"{value - start:+.4f}" if len(recipe) else f"{value:.4f}" for value in table[score]]
    right.set_yticks(heights, gains, fontsize=8, color=INK)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    write_labels(axes, xlabel=score)
    return figure


def draw_scores(
    axes: Axes, table: pandas.DataFrame, score: str, start: float, labels: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Draw a point per trial, from the top, with a line from `start` to it; returns their heights and colours."""
    heights, colours = -np.arange(len(table)), [SCHEDULE_COLOURS[kind] for kind in table["schedule.kind"]]
    axes.hlines(heights, start, table[score], color=colours, linewidth=1.5, alpha=0.7)
    axes.scatter(table[score], heights, c=colours, s=36, zorder=3)
    axes.set_yticks(heights, labels, fontsize=8, color=INK)
    plain(axes, ["bottom"], labelsize=8)
    axes.tick_params(left=False)
    return heights, colours
