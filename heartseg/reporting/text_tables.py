"""Tables and histograms of text for a terminal."""

import math

from heartseg.labels import LOW_CAVITY_DICE, MAX_EF_ERROR
from heartseg.metrics.segmentation import DISTANCES, SCORES

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
OUTLIER_TITLES = {
    "cavity": f"Images with a cavity Dice under {LOW_CAVITY_DICE}",
    "ef_camus": f"Patients with an EF error over {MAX_EF_ERROR} points (camus)",
    "ef_ase": f"Patients with an EF error over {MAX_EF_ERROR} points (ase)",
}
# Indices whose agreement the terminal shows; the report has all of them.
SHOWN_AGREEMENTS = ("ef_camus", "ef_ase", "edv_ml_camus", "esv_ml_camus")


def bars(counts: dict[str, int]) -> list[tuple[str, str, str]]:
    """A histogram in text: name, count, and a bar of at most 30 characters."""
    most = max(counts.values(), default=0) or 1
    return [(name, str(count), "█" * math.ceil(30 * count / most)) for name, count in counts.items()]


def table_text(table: Table) -> str:
    """A table for a terminal: the first column and columns without a heading are left-aligned, others right-aligned."""
    title, heading, rows = table
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 or heading[column] == "" else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heading, *rows)
    ]
    return "\n".join([title, *(f"  {line}" for line in lines)] if title else lines)


def summary_text(summary: dict) -> str:
    """An evaluation's summary as tables: scores, distances, agreement of the clinical indices, and implausible masks."""
    scores, pooled, clinical = summary["scores"], summary["pooled"], summary["clinical"]
    names = ["dice", "iou", "accuracy", "dice4", *(name for name in SCORES if name.startswith("dice_"))]
    overlaps = [_score_row(name, scores[name], pooled[name], 4) for name in names if scores[name]["mean"] is not None]
    distances = [_score_row(n, scores[n], scores[n]["median"], 2) for n in DISTANCES if scores[n]["mean"] is not None]
    found = {name: row for name, row in clinical["agreement"].items() if name in SHOWN_AGREEMENTS}
    for convention, kinds in clinical["reference"].items():
        found |= {f"ef_{convention}, {kind} against cfg": row for kind, row in kinds.items()}
    known = {name: row for name, row in found.items() if row["r"] is not None}
    agreement = [(n, str(row["n"]), *(f"{row[key]:.2f}" for key in ("r", "bias", "sd", "mae"))) for n, row in known.items()]
    tables: list[Table] = [
        ("", ("score", "mean", "95 % interval", "pooled"), overlaps),
        ("", ("distance", "mean", "95 % interval", "median"), distances),
        ("", ("against masks", "n", "r", "bias", "sd", "MAE"), agreement),
        ("", ("outliers", "share", "95 % interval"), outlier_rows(summary)),
    ]
    texts, flags = [table_text(table) for table in tables if table[2]], summary["flags"]
    if flags["implausible"]:
        why = next((f"; most often: {reason}" for reason in flags.get("reasons", ())), "")
        texts.append(f"{flags['implausible']} of {summary['images']} masks cannot be a whole left heart{why}.")
    return "\n".join(texts)


def outlier_rows(summary: dict) -> list[tuple[str, str, str]]:
    """Title, share and interval of each kind of outlier; empty for an older evaluation without them."""
    shares = {name: row for name, row in summary.get("outliers", {}).items() if row["low"] is not None}
    known = ((title, shares[name]) for name, title in OUTLIER_TITLES.items() if name in shares)  # a summary's keys are sorted
    return [(title, f"{100 * s['mean']:.1f} %", f"{100 * s['low']:.1f} - {100 * s['high']:.1f}") for title, s in known]


def _score_row(name: str, score: dict, last: float | None, digits: int) -> tuple[str, ...]:
    """A row of a score; without an interval if there is only one patient."""
    mean, low, high, last = ("" if x is None else f"{x:.{digits}f}" for x in (score["mean"], score["low"], score["high"], last))
    return name, mean, f"{low} - {high}" if low and high else "", last
