"""Tables and histograms of text for a terminal."""

import math

BAR = 30
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def bars(counts: dict[str, int]) -> list[tuple[str, str, str]]:
    """A histogram in text: name, count, and a bar of at most 30 characters."""
    most = max(counts.values(), default=0) or 1
    return [(name, str(count), "█" * math.ceil(BAR * count / most)) for name, count in counts.items()]


def table_text(table: Table) -> str:
    """A table in columns for a terminal: the first and a bar to the left, numbers to the right."""
    title, heading, rows = table
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 or heading[column] == "" else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heading, *rows)
    ]
    return "\n".join([title, *(f"  {line}" for line in lines)])
