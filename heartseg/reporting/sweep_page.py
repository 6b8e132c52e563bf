"""A sweep as one self-contained HTML page and as a table on the terminal; it recomputes no score."""

import pandas

from heartseg.reporting import pages, sweep_plots
from heartseg.reporting.text_tables import table_text
from heartseg.storage import filesystem
from heartseg.tuning.sweep import FINISHED, METRIC, Sweep, Trial, epochs_saved, read_trials, rungs, why_no_winner

PAGE = "sweep.html"
SCORE = f"best {METRIC}"
# What a trial's row has beside what it varied.
SHOWN = ["state", "epochs", SCORE, f"last {METRIC}", "seconds"]


def varied(table: pandas.DataFrame) -> list[str]:
    """The columns of what differs between trials, the schedule's first; of listed changes their own names."""
    if "change" in table:
        return ["change"]
    fields = [name for name in table.columns if "." in name and "/" not in name]
    return ["schedule.kind", *(name for name in fields if table[name].nunique() > 1 and name != "schedule.kind")]


def show_cell(value: object) -> str:
    """A cell's text: scores to four digits, other numbers as short as they are."""
    if isinstance(value, float):
        return "–" if pandas.isna(value) else f"{value:.4g}"
    return str(value)


def show_rows(table: pandas.DataFrame) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heading and rows of what a reader wants to see of each trial, the best first."""
    columns = [name for name in ["rank", "trial", *varied(table), *SHOWN] if name in table]
    shown = table[columns].copy()
    for name, digits in ((SCORE, 4), (f"last {METRIC}", 4), ("seconds", 0)):
        shown[name] = [pages.show_number(value, digits) for value in table[name]]
    return tuple(columns), [tuple(map(show_cell, row)) for row in shown.itertuples(index=False)]


def show_table(table: pandas.DataFrame) -> str:
    """The trials as an aligned text table."""
    return table_text(("", *show_rows(table)))


def write_page(sweep: Sweep, table: pandas.DataFrame) -> str:
    """Write `sweep.html` into a sweep's folder and return its path."""
    trials = read_trials(sweep)
    trained, planned = epochs_saved(sweep, table)
    heading, rows = show_rows(table)
    return pages.write(
        sweep.path,
        PAGE,
        name=sweep.name,
        dataset=sweep.description["dataset"],
        recipe=sweep.base.name,
        holdout=sweep.base.train.holdout,
        best_path=filesystem.join(sweep.path, "best.json"),
        against=against_recipe(table),
        facts=facts(sweep),
        metric=METRIC,
        best=None if why_no_winner(table) else table.iloc[0],
        why_no_winner=why_no_winner(table),
        best_values=[(name, show_cell(table.iloc[0][name])) for name in varied(table)] if len(table) else [],
        states=table["state"].value_counts().to_dict(),
        trained=trained,
        planned=planned,
        heading=heading,
        rows=rows,
        reasons=[(t.run.name, t.state, t.reason) for t in trials if t.reason],
        pictures=figures(sweep, table, trials),
    )


def against_recipe(table: pandas.DataFrame) -> str:
    """How far the winner is from the recipe itself, which is trial 0; empty if either has not finished."""
    finished = table[table["state"] == FINISHED].set_index("trial")[SCORE]
    recipe = finished[finished.index.str.startswith("000-")]
    if recipe.empty or finished.index[0] == recipe.index[0]:
        return "The recipe itself is the best." if len(recipe) else ""
    gap = finished.iloc[0] - recipe.iloc[0]
    return f"The recipe itself reached {recipe.iloc[0]:.4f} (trial {recipe.index[0]}): the winner is {gap:.4f} higher."


def facts(sweep: Sweep) -> list[tuple[str, str]]:
    """What a reader needs to judge the sweep by."""
    plan, groups, compared = sweep.plan, sweep.description["groups"], ", ".join(map(str, rungs(sweep)))
    low, high = (sweep.base.optim.lr * factor for factor in plan.space.lr_factors)
    rates = f"{low:g} to {high:g} (recipe: {sweep.base.optim.lr:g})"
    return [
        ("search", f"{plan.search}, seed {plan.search_seed}; trial 000 is the recipe itself"),
        *([("schedules", ", ".join(plan.space.schedules)), ("base rates", rates)] if plan.search != "changes" else []),
        ("epochs of a trial", str(sweep.base.train.epochs)),
        ("early stopping", f"at epochs {compared}, about 1 in {plan.reduction:g} continues" if compared else "none"),
        ("patients", f"{groups['train']} to train, {groups['val']} held out to compare"),
    ]


def figures(sweep: Sweep, table: pandas.DataFrame, trials: list[Trial]) -> list[dict]:
    """The page's figures, each with its heading; none before a trial has a score."""
    if table[SCORE].isna().all():
        return []
    records = [(t.values["schedule.kind"], t.state, t.record) for t in trials]
    scored = table[table[SCORE].notna()]
    curves = ("Learning curves by schedule", sweep_plots.sweep_curves(records, METRIC))
    if "change" in table:
        drawn = [("Each change against the recipe", sweep_plots.differences(scored, SCORE)), curves]
    else:
        drawn = [
            ("What was tried, and what it reached", sweep_plots.parallel_coordinates(scored, varied(table), SCORE)),
            curves,
            ("Rank, and what early stopping saved", sweep_plots.ranks(scored, SCORE, sweep.base.train.epochs)),
        ]
    return [{"title": title} | pages.figure(one, f"sweep{place}", title) for place, (title, one) in enumerate(drawn)]
