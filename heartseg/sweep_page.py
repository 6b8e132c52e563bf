"""A sweep as one self-contained HTML page and as a table on the terminal; it recomputes no score."""

import jinja2
import pandas

from heartseg import storage, sweep_figures, sweeps
from heartseg.sections import inline
from heartseg.sweeps import METRIC, Sweep

PAGE = "sweep.html"
SCORE = f"best {METRIC}"
# What a trial's row has beside what it varied.
SHOWN = ["state", "epochs", SCORE, f"last {METRIC}", "seconds"]


def varied(table: pandas.DataFrame) -> list[str]:
    """The columns of what differs between trials, the schedule's first."""
    fields = [name for name in table.columns if "." in name and "/" not in name]
    return ["schedule.kind", *(name for name in fields if table[name].nunique() > 1 and name != "schedule.kind")]


def show_cell(value: object) -> str:
    """A cell's text: scores to four digits, other numbers as short as they are."""
    if isinstance(value, float):
        return "–" if pandas.isna(value) else f"{value:.4g}"
    return str(value)


def show_rows(table: pandas.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of what a reader wants to see of each trial, the best first."""
    columns = ["rank", "trial", *varied(table), *SHOWN]
    shown = table[columns].copy()
    for name in (SCORE, f"last {METRIC}"):
        shown[name] = ["–" if pandas.isna(value) else f"{value:.4f}" for value in table[name]]
    shown["seconds"] = [f"{seconds:.0f}" for seconds in table["seconds"]]
    return columns, [[show_cell(value) for value in row] for row in shown.itertuples(index=False)]


def show_table(table: pandas.DataFrame) -> str:
    """The trials as an aligned text table."""
    heading, rows = show_rows(table)
    widths = [max(len(row[place]) for row in [heading, *rows]) for place in range(len(heading))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heading, *rows])


def write_page(sweep: Sweep, table: pandas.DataFrame) -> str:
    """Write `sweep.html` into a sweep's folder and return its path."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("heartseg"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    trials = sweeps.read_trials(sweep)
    trained, planned = sweeps.epochs_saved(sweep, table)
    heading, rows = show_rows(table)
    page = environment.get_template(PAGE).render(
        name=sweep.name,
        dataset=sweep.description["dataset"],
        recipe=sweep.base.name,
        holdout=sweep.base.train.holdout,
        epochs=sweep.base.train.epochs,
        metric=METRIC,
        best=table.iloc[0] if (table["state"] == sweeps.FINISHED).any() else None,
        best_values=[(name, show_cell(table.iloc[0][name])) for name in varied(table)],
        states=table["state"].value_counts().to_dict(),
        trained=trained,
        planned=planned,
        heading=heading,
        rows=rows,
        reasons=[(t.run.name, t.state, t.reason) for t in trials if t.reason],
        pictures=pictures(sweep, table, trials),
    )
    path = storage.join(sweep.path, PAGE)
    storage.publish(path, page.encode())
    return path


def pictures(sweep: Sweep, table: pandas.DataFrame, trials: list[sweeps.Trial]) -> list[dict]:
    """The page's figures, each with its heading; none before a trial has a score."""
    if table[SCORE].isna().all():
        return []
    records = [(t.values["schedule.kind"], t.state, t.record) for t in trials]
    scored = table[table[SCORE].notna()]
    drawn = [
        ("What was tried, and what it reached", sweep_figures.parallel_coordinates(scored, varied(table), SCORE)),
        ("Learning curves by schedule", sweep_figures.sweep_curves(records, METRIC)),
        ("Rank, and what early stopping saved", sweep_figures.ranks(scored, SCORE, sweep.base.train.epochs)),
    ]
    return [{"title": title} | inline(figure, f"sweep{place}", title) for place, (title, figure) in enumerate(drawn)]
