"""Figures of scores: curves by epoch, the spread of scores over images, agreement, volume curves, contact sheets."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from heartseg.labels import CLASS_COLOURS, CLASS_TITLES, CLASSES

# For lines and text that must follow the page's text colour, light or dark: `save_svg` replaces it with `currentColor`.
INK = "#123457"
# Distinct in shade, hue and dash, with a contrast of at least 3:1 on white and on near-black pages.
GROUP_STYLES = {"train": ("#868C96", "--"), "val": ("#2F86D6", "-"), "test": ("#D2691E", "-")}
OTHER_STYLE = ("#9A6FC4", "-.")
RUN_COLOURS = ("#2F86D6", "#D2691E", "#2E9457", "#C74FA0", "#868C96", "#9A6FC4", "#14919B", "#A08414")
RUN_DASHES = ("-", "--", ":", "-.")
POINT, LINE = "#2F86D6", "#D2691E"  # measurements, and what is drawn over them
STRUCTURE_COLOURS = dict(zip(CLASSES, CLASS_COLOURS, strict=True)) | {"epi": "#B7BCC4"}


def save_png(figure: Figure, dpi: int = 150) -> bytes:
    """PNG of a figure on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def save_svg(figure: Figure, name: str) -> str:
    """The `<svg>` element of a figure, transparent, its ink in the page's text colour; `name` is unique on the page."""
    # Identifiers begin with the name, or figures on one page would borrow each other's clip paths; the salt fixes the bytes.
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "heartseg"}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to the groups
    text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor").strip()


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches with one set of axes, reduced to what a reader needs."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    plain(axes)
    axes.grid(color=INK, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def plain(axes: Axes, spines: Sequence[str] = ("left", "bottom"), labelsize: int = 9) -> None:
    """Hide all spines of a set of axes except `spines`, and draw those and the ticks in the page's text colour."""
    axes.spines[[side for side in axes.spines if side not in spines]].set_visible(False)
    axes.spines[list(spines)].set_color(INK)
    axes.tick_params(colors=INK, labelsize=labelsize)


def write_labels(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Write the title, left-aligned, and the axis labels."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)


def contact_sheet(cells: Sequence[tuple[np.ndarray, str]], columns: int = 4) -> Figure:
    """Pictures uint8 [h,w,3] with square pixels, captioned and in rows, below a legend of the class colours."""
    rows = -(-len(cells) // columns)
    tallest = max((pixels.shape[0] / pixels.shape[1] for pixels, _ in cells), default=1.0)
    figure = Figure(figsize=(2.6 * columns, (2.6 * tallest + 0.3) * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (pixels, caption) in zip(grid.flat, cells, strict=False):
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(caption, color=INK, fontsize=9)
    colour_key(figure, dict(zip(CLASS_TITLES[1:], CLASS_COLOURS[1:], strict=True)))
    return figure


def colour_key(figure: Figure, colours: Mapping[str, str], columns: int = 3) -> None:
    """Draw a legend of the colours above a figure."""
    lines = [Line2D([], [], color=colour, linewidth=3) for colour in colours.values()]
    figure.legend(lines, list(colours), loc="outside upper center", ncols=columns, frameon=False, labelcolor=INK)


def run_style(place: int) -> tuple[str, str]:
    """Colour and dash of the run at an index from 0; the dash changes once all colours are used."""
    return RUN_COLOURS[place % len(RUN_COLOURS)], RUN_DASHES[place // len(RUN_COLOURS) % len(RUN_DASHES)]


def curve(
    epochs: Sequence[int], series: Mapping[str, Sequence[float]], title: str, marked: int | None = None,
    styles: Mapping[str, tuple[str, str]] | None = None,
) -> Figure:  # fmt: skip
    """A quantity by epoch, one line per group; NaN is a gap, `marked` a dotted line; `styles` are (colour, dash) by name."""
    figure, axes = new_axes(4.4, 2.9)
    for group, values in series.items():
        colour, dash = (INK, "-") if not group else (styles or GROUP_STYLES).get(group, OTHER_STYLE)
        marker = "o" if np.isfinite(values).sum() <= 3 else None  # a single point has no line
        axes.plot(epochs, values, color=colour, linestyle=dash, linewidth=1.7, marker=marker, markersize=5, label=group)
    if marked is not None:
        axes.axvline(marked, color=INK, linestyle=":", linewidth=1, alpha=0.7)
    write_labels(axes, title, "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    if any(series) and not styles:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def spread(values: Mapping[str, np.ndarray], titles: Mapping[str, str], xlabel: str) -> Figure:
    """Box plots (whiskers within 1.5 boxes) and points of the images' scores, one row per structure; NaN are left out."""
    known = {name: scores[~np.isnan(scores)] for name, scores in values.items() if not np.isnan(scores).all()}
    figure, axes = new_axes(5.4, 0.7 + 0.55 * max(1, len(known)))
    rng = np.random.default_rng(0)
    line = {"color": INK, "linewidth": 1.1}
    for row, (name, scores) in enumerate(known.items()):
        fill = {"facecolor": STRUCTURE_COLOURS.get(name, "#B7BCC4"), "edgecolor": INK, "linewidth": 1.1}
        axes.boxplot(
            scores, positions=[row + 0.17], orientation="horizontal", widths=0.3, patch_artist=True, showfliers=False,
            manage_ticks=False, boxprops=fill, whiskerprops=line, capprops=line,
            medianprops={"color": "#000000", "linewidth": 2},
        )  # fmt: skip
        heights = row - 0.2 + rng.uniform(-0.12, 0.12, len(scores))
        # Thousands of points as vectors would weigh more than the rest of the page.
        axes.scatter(scores, heights, s=5, color="#7D848E", alpha=0.6, linewidths=0, rasterized=True)
    axes.set_yticks(range(len(known)), [titles[name] for name in known])
    axes.set_ylim(len(known) - 0.5, -0.5)
    write_labels(axes, xlabel=xlabel)
    axes.grid(axis="y", visible=False)
    return figure


def _known_pairs(estimate: Sequence[float], reference: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, without pairs that contain NaN."""
    pairs = np.stack([np.asarray(estimate, float), np.asarray(reference, float)])
    return tuple(pairs[:, np.isfinite(pairs).all(axis=0)])


def _points(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Draw one point per pair, fainter if there are many, so that dense parts stay visible; without pairs, a note."""
    alpha = 0.75 if len(x) <= 100 else 0.45
    axes.scatter(x, y, s=20, color=POINT, alpha=alpha, linewidths=0, rasterized=len(x) > 500)
    if not len(x):
        axes.text(0.5, 0.6, "no values", transform=axes.transAxes, ha="center", color=INK, fontsize=9)


def bland_altman(estimate: Sequence[float], reference: Sequence[float], found: Mapping, title: str, unit: str) -> Figure:
    """Difference against mean of two measurements (Bland and Altman 1986) with bias and limits of `agreement.agree`."""
    estimate, reference = _known_pairs(estimate, reference)
    difference = estimate - reference
    figure, axes = new_axes(4.4, 3.1)
    _points(axes, (estimate + reference) / 2, difference)
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    if found["bias"] is not None:
        bias, reach = found["bias"], 1.96 * found["sd"]
        limits = ((found["loa_high"], "+1.96 sd", "--"), (found["loa_low"], "-1.96 sd", "--")) if reach > 0 else ()
        for value, name, dash in ((bias, "bias", "-"), *limits):
            axes.axhline(value, color=LINE, linestyle=dash, linewidth=1.4)
            note = f"{name}\n{value:+.1f}".replace("-", "\N{MINUS SIGN}")
            place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "center"}
            axes.annotate(note, (1, value), (4, 0), color=INK, fontsize=8, linespacing=1.1, **place)
        # Symmetric about the bias, with room for three notes.
        half = max(np.abs(difference - bias).max(), 1.25 * reach) * 1.08
        if half > 0:
            axes.set_ylim(min(bias - half, -0.1 * half), max(bias + half, 0.1 * half))
    write_labels(axes, title, f"mean of estimate and reference ({unit})", f"estimate \N{MINUS SIGN} reference ({unit})")
    return figure


def agreement_scatter(estimate: Sequence[float], reference: Sequence[float], found: Mapping, title: str, unit: str) -> Figure:
    """Estimate against reference on equal axes, with the identity line, and r and n of `metrics.agreement.agree`."""
    estimate, reference = _known_pairs(estimate, reference)
    figure, axes = new_axes(3.7, 3.6)
    both = np.concatenate([estimate, reference])
    low, high = (both.min(), both.max()) if len(both) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=INK, linewidth=1, alpha=0.6, zorder=1)
    _points(axes, reference, estimate)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    note = "" if found["r"] is None else f"r = {found['r']:.3f}\n".replace("-", "\N{MINUS SIGN}")
    note += f"n = {found['n']}"
    axes.text(0.04, 0.96, note, transform=axes.transAxes, va="top", color=INK, fontsize=9, linespacing=1.3)
    write_labels(axes, title, f"reference ({unit})", f"estimate ({unit})")
    return figure


def volume_curve(frames: Sequence[int], volumes: Sequence[float], ed: int, es: int, unit: str = "ml") -> Figure:
    """A ventricle's `volumes` in `unit` (NaN if unknown) by frame number; `ed` and `es` are positions in both."""
    (figure, axes), frames, volumes = new_axes(4.4, 2.9), np.asarray(frames, float), np.asarray(volumes, float)
    axes.plot(frames, volumes, color=POINT, linewidth=1.7, marker="o" if len(volumes) <= 60 else None, markersize=3)
    for index, name, above in ((ed, "ED", True), (es, "ES", False)):
        if np.isfinite(volumes[index]):
            axes.plot(frames[index], volumes[index], "o", color=LINE, markersize=7, clip_on=False)
            late = frames[index] > (frames.min() + frames.max()) / 2
            place = {"ha": "right" if late else "left", "va": "bottom" if above else "top", "textcoords": "offset points"}
            note, offset = f"{name}  {volumes[index]:.0f} {unit}", (4 if late else -4, 8 if above else -8)
            axes.annotate(note, (frames[index], volumes[index]), offset, color=INK, fontsize=9, **place)
    axes.margins(x=0.04, y=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    write_labels(axes, "", "frame", f"volume ({unit})")
    return figure
