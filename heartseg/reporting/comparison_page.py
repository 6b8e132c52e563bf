"""A comparison of runs as one self-contained HTML page, as text for a terminal, and as JSON; it recomputes no metric."""

from collections.abc import Mapping, Sequence

import numpy as np

from heartseg.evaluation import run_comparison
from heartseg.evaluation.run_comparison import Comparison, Entry
from heartseg.labels import CLASS_COLOURS, CLASS_TITLES, CLASSES
from heartseg.metrics.segmentation import DISTANCES, SCORES
from heartseg.reporting import overlays, plots, report, report_sections, text_tables
from heartseg.storage import filesystem

PAGE, TEMPLATE, NUMBERS = "compare.html", "compare.html", "comparison.json"
EF_TITLES = {
    "ef_camus_error": "EF, absolute error (camus), points",
    "ef_ase_error": "EF, absolute error (ase), points",
}
DISTANCE_TITLES = {
    f"{kind}_{name}_mm": f"{title}: {said}, mm"
    for name, title in report_sections.STRUCTURE_TITLES.items()
    for kind, said in report_sections.DISTANCE_COLUMNS.items()
}
TITLES = report.SCORE_TITLES | DISTANCE_TITLES | EF_TITLES
# Heading, whether higher or lower is better, and the names of its scores.
KINDS = (
    ("Overlap", "higher is better", tuple(report.SCORE_TITLES)),
    ("Distances between outlines", "lower is better", tuple(DISTANCE_TITLES)),
    ("Ejection fraction", "lower is better", tuple(EF_TITLES)),
)
AGREEMENTS = ("ef_camus", "ef_ase")
SVG_DASHES = {"-": "none", "--": "6 3", ":": "2 3", "-.": "8 3 2 3"}  # as matplotlib's, for the page's own legend
PICTURE_ROWS = 320  # about as large as a page shows them, so that thin lines stay whole
# What a terminal shows of each entry; of more than three entries, differences of mean Dice only.
TEXT_NAMES = ("dice", "dice_endo", "dice_myo", "dice_la", "dice_epi", "masd_endo_mm", "hd95_endo_mm", "ef_camus_error")


def write_page(out: str, compared: Comparison, pictures: Sequence[dict]) -> str:
    """Write `compare.html` and `comparison.json` into a folder, and return the page's path.

    `pictures` are those of `compared.disagreements` that could be drawn, with what `draw` needs.
    """
    entries, means, differences = compared.entries, compared.means, compared.differences
    datasets = sorted({one.run.description["dataset"] for entry in entries for one in entry.runs})
    page = (
        report.environment()
        .get_template(TEMPLATE)
        .render(
            entries=[_shown(entry, place) for place, entry in enumerate(entries)],
            reference=compared.reference.letter,
            others=[entry.letter for entry in compared.others],
            datasets=datasets,
            pooled=any(len(entry.scored) > 1 for entry in entries),
            notes=compared.notes,
            overview=_overview(compared),
            score_kinds=[(*kind[:2], _score_rows(kind[2], means)) for kind in KINDS] if any(means.values()) else [],
            difference_kinds=[(*kind[:2], _difference_rows(kind[2], differences)) for kind in KINDS]
            if any(differences.values())
            else [],
            settings=compared.settings,
            curves=curve_figures(*lines_of(entries)),
            agreement=_agreement_rows(entries),
            disagreements=compared.disagreements,
            pictures=[(item["image"], item["spread"], draw(item)) for item in pictures],
            legend=list(zip(CLASSES, CLASS_TITLES, CLASS_COLOURS, strict=True))[1:],
        )
    )
    numbers = {name: getattr(compared, name) for name in ("settings", "means", "differences", "disagreements", "notes")}
    paths = {entry.letter: [one.run.path for one in entry.runs] for entry in entries}
    filesystem.publish_json(filesystem.join(out, NUMBERS), numbers | {"reference": compared.reference.letter, "entries": paths})
    path = filesystem.join(out, PAGE)
    filesystem.publish(path, page.encode())
    return path


def _overview(compared: Comparison) -> list[dict]:
    """A row an entry: its mean Dice and the paired difference from the reference."""
    rows = []
    for place, entry in enumerate(compared.entries):
        mean = compared.means[entry.letter].get("dice")
        found = difference_cell(compared.differences.get(entry.letter, {}).get("dice"), "dice")
        rows.append({"letter": entry.letter, "label": entry.label, "colour": plots.run_style(place)[0], "dice": mean,
                     "seeds": show_seeds(mean, 3) if mean else "", "found": found})  # fmt: skip
    return rows


def _shown(entry: Entry, place: int) -> dict:
    """What the page says of an entry: its line, and of each run its scores' origin and its lineage."""
    colour, dash = plots.run_style(place)
    return {"letter": entry.letter, "label": entry.label, "colour": colour, "dashes": SVG_DASHES[dash],
            "runs": [_facts(one) for one in entry.runs]}  # fmt: skip


def _facts(one: run_comparison.Scored) -> dict:
    summary, said = one.summary or {}, one.run.description
    scored = "no scores"
    if summary:
        scored = f"{summary['group']} group, {summary['patients']} patients, {summary['images']} images"
    return {
        "label": one.label, "path": one.run.path, "seed": said["identity"]["train"]["seed"], "epochs": len(one.record),
        "checkpoint": f"{summary['which']}, epoch {summary['epoch']}" if summary else "–", "scored": scored,
        "recipe": said["experiment"]["name"], "code": said.get("code", "–"), "data": said["data_fingerprint"],
    }  # fmt: skip


def digits_of(name: str) -> int:
    """Decimals that a score is told with: 3 of a share, 2 of mm, 1 of points of EF."""
    return 3 if name in SCORES else 2 if name in DISTANCES else 1


def show_signed(value: float | None, digits: int) -> str:
    """A number with its sign, or a dash."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def show_p(p: float | None) -> str:
    """A p value to three decimals, or a dash."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def show_seeds(cell: dict, digits: int) -> str:
    """The lowest and the highest mean of the seeds; empty for one seed."""
    known = [value for value in cell["seeds"] if value is not None]
    return f"{min(known):.{digits}f} to {max(known):.{digits}f}" if len(known) > 1 else ""


def _score_rows(names: Sequence[str], means: Mapping[str, dict]) -> list[tuple[str, list[dict]]]:
    rows = []
    for name in names:
        digits = digits_of(name)
        cells = [
            {"mean": report.show_number(cell["mean"], digits), "interval": report.show_interval(cell, digits),
             "seeds": show_seeds(cell, digits)} if (cell := mine.get(name)) else {"mean": "–", "interval": "–", "seeds": ""}
            for mine in means.values()
        ]  # fmt: skip
        rows.append((TITLES[name], cells))
    return rows


def difference_cell(found: dict | None, name: str) -> dict | None:
    """A paired difference as texts, to one decimal more than its score; None where there is none."""
    if not found or found["difference"] is None:
        return None
    digits = digits_of(name) + 1
    ends = " to ".join(show_signed(found[end], digits) for end in ("low", "high"))
    return {"difference": show_signed(found["difference"], digits), "interval": ends, "p": show_p(found["p"]),
            "reading": found["reading"], "seen": found["reading"] != run_comparison.NO_DIFFERENCE}  # fmt: skip


def _difference_rows(names: Sequence[str], differences: Mapping[str, dict]) -> list[tuple[str, list[dict | None]]]:
    """A row a score; a cell says of how many patients it is where that is fewer than mean Dice's."""
    rows = []
    for name in names:
        cells = [difference_cell(mine.get(name), name) for mine in differences.values()]
        for cell, mine in zip(cells, differences.values(), strict=True):
            if cell:
                cell["patients"] = mine[name]["patients"] if mine[name]["patients"] < mine["dice"]["patients"] else None
        rows.append((TITLES[name], cells))
    return rows


def _agreement_rows(entries: Sequence[Entry]) -> list[tuple[str, str, str, dict]]:
    """Letter, run, index and what the run's own evaluation says of its agreement; none where no patient has an EF."""
    return [
        (entry.letter, one.label, report_sections.AGREEMENT_TITLES[name], found)
        for name in AGREEMENTS
        for entry in entries
        for one in entry.scored
        if (found := one.summary["clinical"]["agreement"][name])["r"] is not None
    ]


def lines_of(entries: Sequence[Entry]) -> tuple[dict[str, list[dict]], dict[str, tuple[str, str]]]:
    """Every run's record by its label, and its entry's (colour, dash), as `curve_figures` takes them."""
    lines = {one.label: one.record for entry in entries for one in entry.runs}
    return lines, {one.label: plots.run_style(place) for place, entry in enumerate(entries) for one in entry.runs}


def curve_figures(lines: Mapping[str, list[dict]], styles: Mapping[str, tuple[str, str]]) -> list[dict]:
    """Held-out Dice, training loss and learning rate of several runs by epoch, as inline figures.

    `lines` are records (runs.read_record) by name, `styles` the (colour, dash) of each name; runs may be of any length.
    """
    epochs = sorted({int(epoch["epoch"]) for record in lines.values() for epoch in record})
    if not epochs:
        return []
    held_out = {name: "val" if any("val/dice" in epoch for epoch in record) else "test" for name, record in lines.items()}
    groups = " or ".join(sorted({held_out[name] for name, record in lines.items() if record}, reverse=True))
    panels = {
        f"Mean Dice, {groups} group": {name: f"{group}/dice" for name, group in held_out.items()},
        "Training loss": dict.fromkeys(lines, "train/loss"),
        "Learning rate": dict.fromkeys(lines, "lr"),
    }
    drawn = []
    for number, (title, keys) in enumerate(panels.items()):
        series = {name: _by_epoch(lines[name], key, epochs) for name, key in keys.items()}
        last = ", ".join(f"{n} {v[np.isfinite(v)][-1]:.4g}" for n, v in series.items() if np.isfinite(v).any())
        figure = plots.curve(epochs, series, title, styles=styles)
        drawn.append(report_sections.inline(figure, f"runs-{number}", f"{title} by epoch; last values: {last}."))
    return drawn


def _by_epoch(record: list[dict], key: str, epochs: Sequence[int]) -> np.ndarray:
    """A metric at each of some epochs, NaN where the run has none."""
    known = {int(epoch["epoch"]): epoch.get(key) for epoch in record}
    return np.array([np.nan if known.get(epoch) is None else known[epoch] for epoch in epochs], float)


def draw(item: dict) -> list[dict]:
    """A picture for each entry: `image` pixels with the contours of the truth (white) and of the entry's `masks`.

    `item` has `image` (its name), `pixels`, `truth` and `masks` by letter, all [H,W], `scores` (the drawn masks' mean Dice)
    and `names` by letter, and `spacing_mm`.
    """
    drawn = []
    for letter, mask in item["masks"].items():
        positions = overlays.compared(item["pixels"], item["truth"], mask, item["spacing_mm"], PICTURE_ROWS)
        caption = f"{item['names'][letter]}: Dice {report.show_score(item['scores'][letter])}"
        alt = f"{item['image']} with the outlines of {letter} and of the expert"
        drawn.append(report_sections.embedded(overlays.encode_png(positions), positions.shape, caption, alt))
    return drawn


def text(compared: Comparison) -> str:
    """The comparison for a terminal: what differs, the means, and the differences from the reference."""
    entries = compared.entries
    letters = [entry.letter for entry in entries]
    runs = [(e.letter, e.label, _facts((e.scored or e.runs)[0])["scored"]) for e in entries]
    tables: list[text_tables.Table] = [("Runs", ("", "name", "scored"), runs)]
    none = [("none", *[""] * len(letters))]
    tables.append(("Settings that differ", ("", *letters), compared.settings or none))
    if any(compared.means.values()):
        rows = [(letter, *(_mean_text(mine.get(n), n) for n in TEXT_NAMES)) for letter, mine in compared.means.items()]
        tables.append(("Means over images; of ef_camus_error, over patients", ("", *TEXT_NAMES), rows))
    if rows := _difference_lines(compared):
        heading = (f"minus {compared.reference.letter}", "", "difference", "95 % interval", "p", "")
        tables.append((f"Differences from {compared.reference.letter} on the same patients", heading, rows))
    return "\n\n".join([*map(text_tables.table_text, tables), *(["\n".join(compared.notes)] if compared.notes else [])])


def _mean_text(cell: dict | None, name: str) -> str:
    return report.show_number(cell["mean"] if cell else None, digits_of(name))


def _difference_lines(compared: Comparison) -> list[tuple[str, ...]]:
    rows = []
    for letter, found in compared.differences.items():
        for name in TEXT_NAMES if len(compared.entries) <= 3 else TEXT_NAMES[:1]:
            if cell := difference_cell(found.get(name), name):
                rows.append((letter, name, *(cell[key] for key in ("difference", "interval", "p", "reading"))))
    return rows
