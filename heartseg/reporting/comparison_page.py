"""A comparison of runs as one self-contained HTML page, as text for a terminal, and as JSON; it recomputes no metric."""

from collections.abc import Callable, Mapping, Sequence

from heartseg.evaluation import run_comparison
from heartseg.evaluation.run_comparison import Comparison, Entry
from heartseg.labels import CLASS_COLOURS, CLASS_TITLES, CLASSES
from heartseg.metrics.segmentation import DISTANCES, SCORES
from heartseg.reporting import contours, pages, plots, report, text_tables, training_figures
from heartseg.storage import filesystem

PAGE, NUMBERS = "compare.html", "comparison.json"
EF_TITLES = {
    "ef_camus_error": "EF, absolute error (camus), points",
    "ef_ase_error": "EF, absolute error (ase), points",
}
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
AGREEMENTS = ("ef_camus", "ef_ase")
SVG_DASHES = {"-": "none", "--": "6 3", ":": "2 3", "-.": "8 3 2 3"}  # as matplotlib's, for the page's own legend
PICTURE_ROWS = 320  # about as large as a page shows them, so that thin lines stay whole
# Scores that a terminal shows; for more than three entries, differences of mean Dice only.
TEXT_NAMES = ("dice", "dice_endo", "dice_myo", "dice_la", "dice_epi", "masd_endo_mm", "hd95_endo_mm", "ef_camus_error")


def write_page(out: str, compared: Comparison, pictures: Sequence[dict]) -> str:
    """Write `compare.html` and `comparison.json` into a folder, and return the page's path.

    `pictures` are those of `compared.disagreements` that could be drawn, with what `draw` needs.
    """
    entries, means, differences = compared.entries, compared.means, compared.differences
    numbers = {name: getattr(compared, name) for name in ("settings", "means", "differences", "disagreements", "notes")}
    paths = {entry.letter: [one.run.path for one in entry.runs] for entry in entries}
    filesystem.publish_json(filesystem.join(out, NUMBERS), numbers | {"reference": compared.reference.letter, "entries": paths})
    scored, paired = any(means.values()), any(differences.values())
    return pages.write(
        out,
        PAGE,
        entries=[_shown(compared, entry, place) for place, entry in enumerate(entries)],
        reference=compared.reference.letter,
        others=[entry.letter for entry in compared.others],
        datasets=sorted({one.run.description["dataset"] for entry in entries for one in entry.runs}),
        pooled=any(len(entry.scored) > 1 for entry in entries),
        notes=compared.notes,
        score_kinds=[(*kind, _rows(names, score_cell, means)) for *kind, names in KINDS] if scored else [],
        difference_kinds=[(*kind, _rows(names, difference_cell, differences)) for *kind, names in KINDS] if paired else [],
        settings=compared.settings,
        curves=curve_figures(*lines_of(entries)),
        agreement=_agreement_rows(entries),
        disagreements=compared.disagreements,
        pictures=[(item["image"], item["spread"], draw(item)) for item in pictures],
        legend=list(zip(CLASSES, CLASS_TITLES, CLASS_COLOURS, strict=True))[1:],
    )


def _shown(compared: Comparison, entry: Entry, place: int) -> dict:
    """An entry for the page: its line, the facts of its runs, its mean Dice and the difference from the reference."""
    colour, dash = plots.run_style(place)
    return {
        "letter": entry.letter, "label": entry.label, "colour": colour, "dashes": SVG_DASHES[dash],
        "runs": [_facts(one) for one in entry.runs], "dice": score_cell(compared.means[entry.letter], "dice"),
        "found": difference_cell(compared.differences.get(entry.letter, {}), "dice"),
    }  # fmt: skip


def _rows(names: Sequence[str], cell: Callable, entries: Mapping[str, dict]) -> list[tuple[str, list]]:
    """A row a score: its title, and a cell an entry."""
    return [(TITLES[name], [cell(scores, name) for scores in entries.values()]) for name in names]


def _facts(one: run_comparison.Scored) -> dict:
    """A run's lineage and the origin of its scores."""
    summary, description, scored = one.summary, one.run.description, "no scores"
    if summary:
        scored = f"{summary['group']} group, {summary['patients']} patients, {summary['images']} images"
    return {
        "label": one.label, "path": one.run.path, "seed": description["identity"]["train"]["seed"], "epochs": len(one.record),
        "checkpoint": f"{summary['which']}, epoch {summary['epoch']}" if summary else "–", "scored": scored,
        "recipe": description["experiment"]["name"], "code": description.get("code", "–"),
        "data": description["data_fingerprint"],
    }  # fmt: skip


def digits_of(name: str) -> int:
    """Decimals of a score: 3 for a share, 2 for mm, 1 for points of EF."""
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


def score_cell(means: dict, name: str) -> dict[str, str]:
    """A mean of an entry as texts, with its interval and the range of its seeds."""
    digits, score = digits_of(name), means.get(name) or {"mean": None, "seeds": []}
    return {"mean": pages.show_number(score["mean"], digits), "interval": pages.show_interval(score, digits),
            "seeds": show_seeds(score, digits)}  # fmt: skip


def difference_cell(differences: dict, name: str) -> dict | None:
    """A paired difference of an entry as texts, to one decimal more than its score; None if there is none.

    `patients` is their number if it is lower than mean Dice's.
    """
    found, digits = differences.get(name), digits_of(name) + 1
    if not found or found["difference"] is None:
        return None
    ends = " to ".join(show_signed(found[end], digits) for end in ("low", "high"))
    patients = found["patients"] if found["patients"] < differences["dice"]["patients"] else None
    return {"difference": show_signed(found["difference"], digits), "interval": ends, "p": show_p(found["p"]),
            "reading": found["reading"], "seen": found["reading"] != run_comparison.NO_DIFFERENCE,
            "patients": patients}  # fmt: skip


def _agreement_rows(entries: Sequence[Entry]) -> list[tuple[str, str, str, dict]]:
    """Letter, run, index and its agreement in the run's own evaluation; no row if no patient has an EF."""
    return [
        (entry.letter, one.label, report.AGREEMENT_TITLES[name], found)
        for name in AGREEMENTS
        for entry in entries
        for one in entry.scored
        if (found := one.summary["clinical"]["agreement"][name])["r"] is not None
    ]


def lines_of(entries: Sequence[Entry]) -> tuple[dict[str, list[dict]], dict[str, tuple[str, str]]]:
    """Every run's record by its label, and its entry's (colour, dash), for `curve_figures`."""
    lines = {one.label: one.record for entry in entries for one in entry.runs}
    return lines, {one.label: plots.run_style(place) for place, entry in enumerate(entries) for one in entry.runs}


def curve_figures(records: Mapping[str, list[dict]], styles: Mapping[str, tuple[str, str]]) -> list[dict]:
    """Held-out Dice, training loss and learning rate of several runs by epoch, as inline figures.

    `records` are by name (run_directory.read_record), `styles` the (colour, dash) of each name; runs may be of any length.
    """
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


def draw(item: dict) -> list[dict]:
    """A picture for each entry: `image` pixels with the contours of the truth (white) and of the entry's `masks`.

    `item` has `image` (its name), `pixels`, `truth` and `masks` by letter, all [H,W], `scores` (the drawn masks' mean Dice)
    and `names` by letter, and `spacing_mm`.
    """
    drawn = []
    for letter, mask in item["masks"].items():
        positions = contours.overlay(item["pixels"], mask, item["spacing_mm"], PICTURE_ROWS, item["truth"])
        caption = f"{item['names'][letter]}: Dice {pages.show_score(item['scores'][letter])}"
        drawn.append(pages.picture(positions, caption, f"{item['image']} with the outlines of {letter} and of the expert"))
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
        rows = [(letter, *(score_cell(mine, n)["mean"] for n in TEXT_NAMES)) for letter, mine in compared.means.items()]
        tables.append(("Means over images; of ef_camus_error, over patients", ("", *TEXT_NAMES), rows))
    if rows := _difference_lines(compared):
        heading = (f"minus {compared.reference.letter}", "", "difference", "95 % interval", "p", "")
        tables.append((f"Differences from {compared.reference.letter} on the same patients", heading, rows))
    return "\n\n".join([*map(text_tables.table_text, tables), *(["\n".join(compared.notes)] if compared.notes else [])])


def _difference_lines(compared: Comparison) -> list[tuple[str, ...]]:
    rows = []
    for letter, found in compared.differences.items():
        for name in TEXT_NAMES if len(compared.entries) <= 3 else TEXT_NAMES[:1]:
            if cell := difference_cell(found, name):
                rows.append((letter, name, *(cell[key] for key in ("difference", "interval", "p", "reading"))))
    return rows
