"""Pictures of images, masks and scores: contours on an image, curves by epoch, the spread of scores over images.

The only file that knows matplotlib. It hands on pixels, PNG bytes and SVG text, and decides nothing about a page.
"""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from heartseg.labels import CLASS_COLOURS, CLASS_TITLES, CLASSES, NUM_CLASSES

# Lines and text that must follow the page's text colour, light or dark: `save_svg` puts `currentColor` in its place.
INK = "#123457"
# Told apart by shade, hue and dash, and at least 3:1 against a white and against a near-black page.
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
    """The `<svg>` element of a figure, transparent, its ink in the page's text colour; `name` is unique on the page.

    Identifiers begin with the name, so that figures on one page do not borrow each other's clip paths and glyphs; with
    the fixed salt the same figure gives the same bytes.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "heartseg"}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to the groups
    text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor").strip()


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of some inches with one set of axes that has only what is needed to read it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=INK, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def contact_sheet(cells: Sequence[tuple[np.ndarray, str, float]], columns: int = 4) -> Figure:
    """Pictures uint8 [h,w,3] with captions in rows, under the key of the classes' colours.

    A cell is the picture, its caption, and the height of a pixel over its width in mm, so that hearts have their true shape.
    """
    rows = -(-len(cells) // columns)
    tallest = max((p.shape[0] * aspect / p.shape[1] for p, _, aspect in cells), default=1.0)
    figure = Figure(figsize=(2.6 * columns, (2.6 * tallest + 0.3) * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (pixels, caption, aspect) in zip(grid.flat, cells, strict=False):
        axes.imshow(pixels, aspect=aspect, interpolation="nearest")
        axes.set_title(caption, color=INK, fontsize=9)
    key = [Line2D([], [], color=CLASS_COLOURS[c], linewidth=3) for c in range(1, NUM_CLASSES)]
    figure.legend(key, CLASS_TITLES[1:], loc="outside upper center", ncols=NUM_CLASSES - 1, frameon=False, labelcolor=INK)
    return figure


def run_style(place: int) -> tuple[str, str]:
    """Colour and dash of the run at a place from 0; after all colours the next dash begins."""
    return RUN_COLOURS[place % len(RUN_COLOURS)], RUN_DASHES[place // len(RUN_COLOURS) % len(RUN_DASHES)]


def curve(
    epochs: Sequence[int], series: Mapping[str, Sequence[float]], title: str, marked: int | None = None,
    styles: Mapping[str, tuple[str, str]] | None = None,
) -> Figure:  # fmt: skip
    """A quantity by epoch, one line a group; `marked` is the epoch that a dotted line points out.

    `series` holds the values by group (`train`, `val`, `test`, or "" for a quantity without group); NaN leaves a gap.
    `styles` gives lines of other names their (colour, dash); the page then says which is which.
    """
    figure, axes = new_axes(4.4, 2.9)
    for group, values in series.items():
        colour, dash = (INK, "-") if not group else (styles or GROUP_STYLES).get(group, OTHER_STYLE)
        marker = "o" if np.isfinite(values).sum() <= 3 else None  # a single point has no line
        axes.plot(epochs, values, color=colour, linestyle=dash, linewidth=1.7, marker=marker, markersize=5, label=group)
    if marked is not None:
        axes.axvline(marked, color=INK, linestyle=":", linewidth=1, alpha=0.7)
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel("epoch", color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    if any(series) and not styles:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def spread(values: Mapping[str, np.ndarray], titles: Mapping[str, str], xlabel: str) -> Figure:
    """Box and points of the scores of images (0 to 1), a row a structure; NaN is left out.

    Boxes span the quartiles, the line is the median, whiskers reach the last image within 1.5 times the box.
    """
    known = {name: np.asarray(v, float)[~np.isnan(np.asarray(v, float))] for name, v in values.items()}
    known = {name: v for name, v in known.items() if len(v)}
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
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.grid(axis="y", visible=False)
    return figure


def _label(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)


def _known_pairs(estimate: Sequence[float], reference: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays without the pairs that have a NaN."""
    pairs = np.stack([np.asarray(estimate, float), np.asarray(reference, float)])
    return tuple(pairs[:, np.isfinite(pairs).all(axis=0)])


def _points(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """One point a pair; many of them turn fainter, so that the dense part still shows; none is said in words."""
    alpha = 0.75 if len(x) <= 100 else 0.45
    axes.scatter(x, y, s=20, color=POINT, alpha=alpha, linewidths=0, rasterized=len(x) > 500)
    if not len(x):
        axes.text(0.5, 0.6, "no values", transform=axes.transAxes, ha="center", color=INK, fontsize=9)


def bland_altman(estimate: Sequence[float], reference: Sequence[float], title: str, unit: str) -> Figure:
    """Difference against mean of two measurements, with bias and limits of agreement (Bland and Altman 1986).

    Values are in `unit`; pairs with a NaN are left out, and under three there are no lines.
    """
    estimate, reference = _known_pairs(estimate, reference)
    difference = estimate - reference
    figure, axes = new_axes(4.4, 3.1)
    _points(axes, (estimate + reference) / 2, difference)
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    if len(difference) >= 3:
        bias, reach = difference.mean(), 1.96 * difference.std(ddof=1)
        limits = ((bias + reach, "+1.96 sd", "--"), (bias - reach, "-1.96 sd", "--")) if reach > 0 else ()
        for value, name, dash in ((bias, "bias", "-"), *limits):
            axes.axhline(value, color=LINE, linestyle=dash, linewidth=1.4)
            note = f"{name}\n{value:+.1f}".replace("-", "\N{MINUS SIGN}")
            place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "center"}
            axes.annotate(note, (1, value), (4, 0), color=INK, fontsize=8, linespacing=1.1, **place)
        # Symmetric about the bias, with room for three notes.
        half = max(np.abs(difference - bias).max(), 1.25 * reach) * 1.08
        if half > 0:
            axes.set_ylim(min(bias - half, -0.1 * half), max(bias + half, 0.1 * half))
    _label(axes, title, f"mean of estimate and reference ({unit})", f"estimate \N{MINUS SIGN} reference ({unit})")
    return figure


def agreement_scatter(estimate: Sequence[float], reference: Sequence[float], title: str, unit: str) -> Figure:
    """Estimate against reference on equal axes, with the line of identity, Pearson's r and the number of pairs.

    Values are in `unit`; pairs with a NaN are left out.
    """
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
    note = f"n = {len(estimate)}"
    if len(estimate) >= 3 and np.ptp(estimate) > 0 and np.ptp(reference) > 0:
        note = f"r = {np.corrcoef(estimate, reference)[0, 1]:.3f}\n{note}".replace("-", "\N{MINUS SIGN}")
    axes.text(0.04, 0.96, note, transform=axes.transAxes, va="top", color=INK, fontsize=9, linespacing=1.3)
    _label(axes, title, f"reference ({unit})", f"estimate ({unit})")
    return figure


def volume_curve(
    moments: Sequence[float], volumes: Sequence[float], ed: int, es: int, unit: str = "ml", xlabel: str = "frame"
) -> Figure:
    """A ventricle's volume over a sequence, with end-diastole and end-systole pointed out.

    `moments` are the frames' numbers or times (say which in `xlabel`), `volumes` their volumes in `unit`, NaN where one is
    unknown; `ed` and `es` are positions in both, from 0.
    """
    figure, axes = new_axes(4.4, 2.9)
    moments, volumes = np.asarray(moments, float), np.asarray(volumes, float)
    marker = "o" if len(volumes) <= 60 else None
    axes.plot(moments, volumes, color=POINT, linewidth=1.7, marker=marker, markersize=3)
    for index, name, above in ((ed, "ED", True), (es, "ES", False)):
        if np.isfinite(volumes[index]):
            axes.plot(moments[index], volumes[index], "o", color=LINE, markersize=7, clip_on=False)
            late = moments[index] > (moments.min() + moments.max()) / 2
            place = {"ha": "right" if late else "left", "va": "bottom" if above else "top", "textcoords": "offset points"}
            note, offset = f"{name}  {volumes[index]:.0f} {unit}", (4 if late else -4, 8 if above else -8)
            axes.annotate(note, (moments[index], volumes[index]), offset, color=INK, fontsize=9, **place)
    axes.margins(x=0.04, y=0.2)
    if xlabel == "frame":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    _label(axes, "", xlabel, f"volume ({unit})")
    return figure
