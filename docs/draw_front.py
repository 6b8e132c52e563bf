"""Draws the README's picture, docs/front.png, from docs/demo.png and the scores in docs/explanation/accuracy.md."""

import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread

from heartseg.reporting.plots import INK, plain, save_png

DOCS = Path(__file__).parent
SCORE = re.compile(r"\*{0,2}(0\.\d+)\*{0,2} \((0\.\d+) - (0\.\d+)\)")
# A row of the table by the beginning of its first cell, and what the picture calls it; from the bottom up.
ROWS = {
    "`seed`, 192 x 192": "seed\n192 x 192",
    "`quick`": "quick\n128 x 128",
    "`camus`, 192": "camus\n192 x 192",
    "the same, scored with `--tta`": "camus\nwith --tta",
}

table = (DOCS / "explanation" / "accuracy.md").read_text().split("### All rows")[1]
rows = [line for line in table.splitlines() if line.startswith("| ")]
found = [SCORE.search(next(row for row in rows if row.startswith(f"| {begin}"))) for begin in ROWS]
means, lows, highs = zip(*(map(float, match.groups()) for match in found), strict=True)

figure = Figure(figsize=(11.0, 3.9), layout="constrained")
outlines, dots = figure.subplots(1, 2, width_ratios=(1.5, 1.0))
outlines.imshow(imread(DOCS / "demo.png"))
outlines.set_axis_off()
outlines.set_title("two synthetic hearts: image, reference, model", color=INK, fontsize=10, loc="left")
errors = [
    [mean - low for mean, low in zip(means, lows, strict=True)],
    [high - mean for high, mean in zip(highs, means, strict=True)],
]
dots.errorbar(means, list(ROWS.values()), xerr=errors, fmt="o", color=INK, markersize=7, linewidth=2, capsize=4)
for place, (mean, high) in enumerate(zip(means, highs, strict=True)):
    dots.text(high + 0.006, place, f"{mean:.3f}", va="center", color=INK, fontsize=9)
dots.set_xlim(0.75, 0.95)
dots.set_ylim(-0.6, len(ROWS) - 0.4)
dots.set_title("mean Dice and 95 % interval, 50 CAMUS patients", color=INK, fontsize=10, loc="left")
plain(dots, labelsize=9)
dots.grid(axis="x", color=INK, alpha=0.12, linewidth=0.7)
(DOCS / "front.png").write_bytes(save_png(figure, dpi=100))
