"""Pictures of a sweep: parallel coordinates, learning curves by schedule, rank and epochs."""

import textwrap
from collections.abc import Collection, Sequence

import numpy as np
import pandas
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
    """A line a trial over what it varied and what it reached; finished trials strong, others faint, and not below the axis.

    `fields` are columns of `table`: numbers of more than a few values lie on a scale (logarithmic where the highest is three
    times the lowest), all else on evenly spaced places.
    """
    names = [*fields, score]
    figure, axes = new_axes(max(5.0, 1.9 * len(names)), 3.6)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set(xlim=(-0.15, len(names) - 0.7), ylim=(-0.06, 1.06), yticks=[])
    # The score's axis is that of the finished trials, or those stopped at their start would press them all into one point.
    finished = table.loc[table["state"] == "finished", score]
    floor = finished.min() - 0.25 * (finished.max() - finished.min()) if len(finished) > 1 else None
    shown = table.assign(**{score: table[score].clip(lower=floor)})
    places = {name: place_values(shown[name], is_score=name == score) for name in names}
    for column, name in enumerate(names):
        axes.axvline(column, color=INK, linewidth=0.8, alpha=0.6)
        for height, label in places[name][1]:
            axes.annotate(label, (column, height), (5, 0), textcoords="offset points", color=INK, fontsize=8, va="center")
    for row, (_, trial) in enumerate(table.iterrows()):
        heights = [places[name][0][row] for name in names]
        done = trial["state"] == "finished"
        colour = SCHEDULE_COLOURS[trial["schedule.kind"]]
        axes.plot(range(len(names)), heights, color=colour, linewidth=2.2 if done else 1.0, alpha=0.95 if done else 0.45)
    axes.set_xticks(range(len(names)), names, color=INK, fontsize=9)
    axes.tick_params(length=0)
    schedule_key(figure, set(table["schedule.kind"]))
    return figure


def place_values(values: pandas.Series, is_score: bool = False) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Heights from 0 to 1 of a column's values, and the labels of its axis as (height, text)."""
    known = sorted(set(values.dropna()))
    is_number = pandas.api.types.is_numeric_dtype(values)
    if not is_number or (len(known) <= 4 and not is_score):
        heights = {value: (place + 0.5) / len(known) for place, value in enumerate(known)}
        texts = [(heights[value], f"{value:g}" if is_number else str(value)) for value in known]
        return np.array([heights.get(value, np.nan) for value in values]), texts
    low, high = known[0], known[-1]
    if low > 0 and high / low >= 3 and not is_score:
        scale = np.log
        marks = np.geomspace(low, high, 4)
    else:
        scale, marks = np.asarray, np.linspace(low, high, 4)
    span = (scale(high) - scale(low)) or 1.0
    heights = (scale(np.asarray(values, float)) - scale(low)) / span
    return heights, [(float((scale(mark) - scale(low)) / span), f"{mark:.3g}") for mark in marks]


def sweep_curves(records: Sequence[tuple[str, str, list[dict]]], metric: str) -> Figure:
    """The metric by epoch, one line a trial in its schedule's colour; `records` are (schedule, state, epochs).

    A dot marks where a trial was stopped early.
    """
    figure, axes = new_axes(6.2, 3.6)
    for kind, state, record in records:
        known = [(row["epoch"], row[metric]) for row in record if row.get(metric) is not None]
        if known:
            epochs, values = zip(*known, strict=True)
            done = state == "finished"
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
    heights = -np.arange(len(table))
    colours = [SCHEDULE_COLOURS[kind] for kind in table["schedule.kind"]]
    left.hlines(heights, np.nanmin(table[score]), table[score], color=colours, linewidth=1, alpha=0.5)
    left.scatter(table[score], heights, c=colours, s=36, zorder=3)
    right.barh(heights, [epochs] * len(table), color=INK, alpha=0.12, height=0.6)
    right.barh(heights, table["epochs"], color=colours, height=0.6)
    left.set_yticks(heights, table["trial"], fontsize=8, color=INK)
    for axes, title in ((left, score), (right, "epochs trained of those planned")):
        plain(axes, ["bottom"], labelsize=8)
        axes.tick_params(left=False)
        axes.set_title(title, color=INK, fontsize=10, loc="left")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def differences(table: pandas.DataFrame, score: str) -> Figure:
    """What each listed change reached, in the table's order, against the recipe's own score (a line); its gain at the right."""
    # A change is settings joined by commas: lines break there.
    labels = [textwrap.fill(change.replace(",", ", "), 44, break_long_words=False) for change in table["change"]]
    rows = np.array([label.count("\n") + 1 for label in labels])
    heights = -(np.cumsum(rows) - rows / 2 + 0.5 * np.arange(len(rows)))
    figure = Figure(figsize=(8.0, 0.9 + 0.19 * (rows.sum() + 0.5 * len(rows))), layout="constrained")
    axes = figure.subplots()
    recipe = table.loc[table["trial"].str.startswith("000-"), score]
    start = recipe.iloc[0] if len(recipe) else table[score].min()
    colours = [SCHEDULE_COLOURS[kind] for kind in table["schedule.kind"]]
    axes.axvline(start, color=INK, linewidth=1)
    axes.hlines(heights, start, table[score], color=colours, linewidth=2)
    axes.scatter(table[score], heights, c=colours, s=36, zorder=3)
    axes.set_yticks(heights, ["the recipe" if label == "-" else label for label in labels], fontsize=8, color=INK)
    right = axes.secondary_yaxis("right")
    gains = [f"{value - start:+.4f}" if len(recipe) else f"{value:.4f}" for value in table[score]]
    right.set_yticks(heights, gains, fontsize=8, color=INK)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    plain(axes, ["bottom"], labelsize=8)
    axes.tick_params(left=False)
    write_labels(axes, xlabel=score)
    return figure
