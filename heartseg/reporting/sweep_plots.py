"""Pictures of a sweep: parallel coordinates, learning curves by schedule, rank and epochs."""

import textwrap
from collections.abc import Collection, Sequence

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from heartseg.reporting.plots import INK, colour_key, new_axes, plain, write_labels

# Okabe and Ito's colours, which colour-blind readers tell apart; yellow darkened to be seen on white. Sorted by kinship:
# what drops in steps, what falls smoothly, what rises again.
SCHEDULE_COLOURS = {
    "constant": "#868C96",
    "step": "#D55E00",
    "multistep": "#E69F00",
    "plateau": "#A8780C",
    "exponential": "#009E73",
    "polynomial": "#56B4E9",
    "cosine": "#2F6FD0",
    "restarts": "#9A6FC4",
    "one_cycle": "#CC79A7",
}


def schedule_key(figure: Figure, kinds: Collection[str]) -> None:
    """Name the schedules of the colours, above the picture."""
    colour_key(figure, {kind: colour for kind, colour in SCHEDULE_COLOURS.items() if kind in kinds}, columns=5)


def parallel_coordinates(table: pandas.DataFrame, fields: Sequence[str], score: str) -> Figure:
    """A line a trial over its values of `fields`, evenly in their order, and its score; those not finished are faint."""
    figure, axes = new_axes(max(5.0, 1.9 * (len(fields) + 1)), 3.6)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set(xlim=(-0.15, len(fields) + 0.3), ylim=(-0.06, 1.06), yticks=[])
    # The score's axis is that of the finished trials, or those stopped at their start would press them all into one point.
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
    """At most five of a column's values, the lowest and the highest among them, as (height, text)."""
    texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    known = sorted(set(zip(heights, texts, strict=True)))
    return [known[round(place)] for place in np.linspace(0, len(known) - 1, min(len(known), 5))]


def sweep_curves(records: Sequence[tuple[str, str, list[dict]]], metric: str) -> Figure:
    """The metric by epoch of (schedule, state, epochs), a line a trial; a dot marks where one was stopped early."""
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
    """Trials from the best to the worst: the score reached at the left, the epochs trained of those planned at the right."""
    figure = Figure(figsize=(7.2, 0.9 + 0.27 * len(table)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    heights, colours = draw_scores(left, table, score, np.nanmin(table[score]), table["trial"])
    right.barh(heights, epochs, color=INK, alpha=0.12, height=0.6)
    right.barh(heights, table["epochs"], color=colours, height=0.6)
    plain(right, ["bottom"], labelsize=8)
    right.tick_params(left=False)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes, title in ((left, score), (right, "epochs trained of those planned")):
        axes.set_title(title, color=INK, fontsize=10, loc="left")
    return figure


def differences(table: pandas.DataFrame, score: str) -> Figure:
    """What each listed change reached, in the table's order, against the recipe's own score (a line); its gain at the right."""
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
    """A point a trial with a line from `start` to it, from the top; returns their heights and colours."""
    heights, colours = -np.arange(len(table)), [SCHEDULE_COLOURS[kind] for kind in table["schedule.kind"]]
    axes.hlines(heights, start, table[score], color=colours, linewidth=1.5, alpha=0.7)
    axes.scatter(table[score], heights, c=colours, s=36, zorder=3)
    axes.set_yticks(heights, labels, fontsize=8, color=INK)
    plain(axes, ["bottom"], labelsize=8)
    axes.tick_params(left=False)
    return heights, colours
