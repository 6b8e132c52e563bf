"""A comparison of runs as one self-contained HTML page, as text for a terminal, and as JSON; no metric is recomputed."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from heartseg.evaluation import run_comparison
from heartseg.evaluation.ground_truth import Case
from heartseg.evaluation.run_comparison import Entry
from heartseg.labels import CLASS_COLOURS, CLASS_TITLES, CLASSES
from heartseg.metrics.segmentation import DISTANCES, SCORES
from heartseg.reporting import contours, pages, plots, report, text_tables, training_figures
from heartseg.storage import filesystem

PAGE, NUMBERS = "compare.html", "comparison.json"
EF_TITLES = {f"ef_{convention}_error": f"EF, absolute error ({convention}), points" for convention in ("camus", "ase")}
DISTANCE_TITLES = {
    f"{kind}_{name}_mm": f"{title}: {distance}, mm"
    for name, title in report.STRUCTURE_TITLES.items()
    for kind, distance in report.DISTANCE_COLUMNS.items()
}
TITLES = report.SCORE_TITLES | DISTANCE_TITLES | EF_TITLES
# Heading, whether higher or lower is better, and the names of its scores.
KINDS = (
    ("Overlap", "higher is better", tuple(report.SCORE_TITLES)),
    ("Distances between outlines", "lower is better", tuple(DISTANCE_TITLES)),
    ("Ejection fraction", "lower is better", tuple(EF_TITLES)),
)
SVG_DASHES = {"-": "none", "--": "6 3", ":": "2 3", "-.": "8 3 2 3"}  # like matplotlib's, for the page's own legend
PICTURE_ROWS = 320  # about the size at which a page shows them, so that thin lines do not break up
# Scores that a terminal shows; for more than three entries, differences of mean Dice only.
TEXT_NAMES = ("dice", "dice_endo", "dice_myo", "dice_la", "dice_epi", "masd_endo_mm", "hd95_endo_mm", "ef_camus_error")


def write_page(out: str, entries: Sequence[Entry], compared: dict, pictures: Mapping[str, list[dict]]) -> str:
    """Write `compare.html` and `comparison.json` into a folder; `pictures` are by image name. Returns the page's path."""
    filesystem.publish_json(filesystem.join(out, NUMBERS), compared)
    means, differences = compared["means"], compared["differences"]
    scored, paired = any(means.values()), any(differences.values())
    return pages.write(
        out,
        PAGE,
        entries=[
            {"letter": entry.letter, "label": entry.label, "colour": colour, "dashes": SVG_DASHES[dash],
             "runs": [_facts(one) for one in entry.runs], "dice": score_cell(means[entry.letter], "dice"),
             "found": difference_cell(differences.get(entry.letter, {}), "dice")}
            for place, entry in enumerate(entries) for colour, dash in [plots.run_style(place)]
        ],
        reference=compared["reference"],
        others=list(differences),
        datasets=sorted({one.run.description["dataset"] for entry in entries for one in entry.runs}),
        pooled=any(len(entry.scored) > 1 for entry in entries),
        notes=compared["notes"],
        score_kinds=[(*kind, _rows(names, score_cell, means)) for *kind, names in KINDS] if scored else [],
        difference_kinds=[(*kind, _rows(names, difference_cell, differences)) for *kind, names in KINDS] if paired else [],
        settings=compared["settings"],
        curves=curve_figures(entries),
        disagreements=compared["disagreements"],
        pictures=[(one["image"], one["spread"], pictures[one["image"]])
                  for one in compared["disagreements"] if one["image"] in pictures],
        legend=list(zip(CLASSES, CLASS_TITLES, CLASS_COLOURS, strict=True))[1:],
    )  # fmt: skip


def _rows(names: Sequence[str], cell: Callable, entries: Mapping[str, dict]) -> list[tuple[str, list]]:
    """One row per score: its title, and one cell per entry."""
    return [(TITLES[name], [cell(scores, name) for scores in entries.values()]) for name in names]


def _facts(one: run_comparison.Scored) -> dict:
    """A run's lineage and the origin of its scores."""
    summary, description, scored = one.summary, one.run.description, "no scores"
    if summary:
        scored = f"group {summary['group']} (patients: {summary['patients']}, images: {summary['images']})"
    return {
        "label": one.label, "path": one.run.path, "seed": description["identity"]["train"]["seed"], "epochs": len(one.record),
        "checkpoint": f"{summary['which']}, epoch {summary['epoch']}" if summary else "–", "scored": scored,
        "recipe": description["experiment"]["name"], "code": description.get("code", "–"),
        "data": description["data_fingerprint"],
    }  # fmt: skip


def digits_of(name: str) -> int:
    """Decimals of a score: 3 for a share, 2 for mm, 1 for points of EF."""
    return 3 if name in SCORES else 2 if name in DISTANCES else 1


def show_signed(value: float, digits: int) -> str:
    """A number with an explicit sign."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def score_cell(means: dict, name: str) -> dict[str, str]:
    """An entry's mean as text, with its interval and the range over its seeds."""
    digits, score = digits_of(name), means.get(name) or {"mean": None, "seeds": []}
    seeds = [value for value in score["seeds"] if value is not None]
    return {"mean": pages.show_number(score["mean"], digits), "interval": pages.show_interval(score, digits),
            "seeds": f"{min(seeds):.{digits}f} to {max(seeds):.{digits}f}" if len(seeds) > 1 else ""}  # fmt: skip


def difference_cell(differences: dict, name: str) -> dict | None:
    """An entry's paired difference as text, with one decimal more than its score; `patients` if fewer than for mean Dice."""
    found, digits = differences.get(name), digits_of(name) + 1
    if not found or found["difference"] is None:
        return None
    difference, low, high = (show_signed(found[value], digits) for value in ("difference", "low", "high"))
    p = "–" if found["p"] is None else "< 0.001" if found["p"] < 0.001 else f"{found['p']:.3f}"
    return {"difference": difference, "interval": f"{low} to {high}", "p": p, "reading": found["reading"],
            "seen": found["reading"] not in (run_comparison.NO_DIFFERENCE, run_comparison.NOTHING),
            "patients": found["patients"] if found["patients"] < differences["dice"]["patients"] else None}  # fmt: skip


def curve_figures(entries: Sequence[Entry]) -> list[dict]:
    """Held-out Dice, training loss and learning rate of all runs by epoch, as inline figures."""
    records = {one.label: one.record for entry in entries for one in entry.runs}
    styles = {one.label: plots.run_style(place) for place, entry in enumerate(entries) for one in entry.runs}
    if not any(records.values()):
        return []
    held_out = {name: "val" if any("val/dice" in epoch for epoch in record) else "test" for name, record in records.items()}
    groups = " or ".join(sorted({held_out[name] for name, record in records.items() if record}, reverse=True))
    panels = {
        f"Mean Dice, {groups} group": {name: f"{group}/dice" for name, group in held_out.items()},
        "Training loss": dict.fromkeys(records, "train/loss"),
        "Learning rate": dict.fromkeys(records, "lr"),
    }
    return [
        training_figures.curve_figure(f"runs-{place}", title, {n: (records[n], key) for n, key in keys.items()}, styles=styles)
        for place, (title, keys) in enumerate(panels.items())
    ]


def draw_outlines(name: str, letter: str, case: Case, pixels: np.ndarray, mask: np.ndarray, caption: str) -> dict:
    """An image's `pixels` with the outlines of the truth (white) and an entry's `mask`, all [H,W], for the page."""
    positions = contours.overlay(pixels, mask, case.spacing_mm, PICTURE_ROWS, case.truth)
    return pages.picture(positions, caption, f"{name} with the outlines of {letter} and of the expert")


def text(entries: Sequence[Entry], compared: dict) -> str:
    """The comparison for a terminal: what differs, the means, and the differences from the reference."""
    runs = [(e.letter, e.label, _facts((e.scored or e.runs)[0])["scored"]) for e in entries]
    tables: list[text_tables.Table] = [("Runs", ("", "name", "scored"), runs)]
    settings = compared["settings"] or [("none", *[""] * len(entries))]
    tables.append(("Settings that differ", ("", *(entry.letter for entry in entries)), settings))
    if any(compared["means"].values()):
        rows = [(letter, *(score_cell(mine, n)["mean"] for n in TEXT_NAMES)) for letter, mine in compared["means"].items()]
        tables.append(("Means over images (ef_camus_error: over patients)", ("", *TEXT_NAMES), rows))
    rows = [
        (letter, name, *(cell[key] for key in ("difference", "interval", "p", "reading")))
        for letter, found in compared["differences"].items()
        for name in (TEXT_NAMES if len(entries) <= 3 else TEXT_NAMES[:1])
        if (cell := difference_cell(found, name))
    ]
    if rows:
        heading = (f"minus {compared['reference']}", "", "difference", "95 % interval", "p", "")
        tables.append((f"Differences from {compared['reference']} on the same patients", heading, rows))
    return "\n\n".join([*map(text_tables.table_text, tables), *filter(None, ["\n".join(compared["notes"])])])
