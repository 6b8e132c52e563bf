"""Shows statistics and images of shards, and checks that they are intact: `python jobs/inspect_shards.py --data SHARDS`."""

import base64
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas

from heartseg.errors import require
from heartseg.labels import CLASS_TITLES, frame_name
from heartseg.reporting import contours, pages, plots
from heartseg.reporting.text_tables import Table, bars, table_text
from heartseg.shards import inspection
from heartseg.shards.reader import Shards, open_shards
from heartseg.storage import filesystem
from jobs.support import command_line
from jobs.support.command_line import counted

SHEET, PAGE = "contact_sheet.png", "shards.html"


@dataclass(frozen=True)
class Options:
    """The shards to inspect, and how."""

    data: str = ""
    """Folder or URI of the shards (default: HEARTSEG_DATA)."""
    out: str = ""
    """Folder for contact_sheet.png and shards.html; without it, neither is written."""
    verify: bool = False
    """Check every shard file against the manifest, and decode every row; lists damaged files and exits with code 2."""
    images: int = 16
    """Images on the contact sheet."""
    seed: int = 0
    """Seed for choosing the images of the contact sheet."""


def run(options: Options) -> str | None:
    """Print a survey of the shards; returns the path of the page, None without --out."""
    path = command_line.required_path(options.data or os.environ.get("HEARTSEG_DATA", ""), "data", "the folder of the shards")
    fit = options.images >= 1 and options.seed >= 0
    require(fit, f"--images ({options.images}) must be at least 1, and --seed ({options.seed}) at least 0.")
    if not options.out:
        command_line.refuse_unused(Options(), options, dict.fromkeys(("images", "seed"), "the contact sheet needs --out"))
    if options.verify:
        verify(path)
    opened = open_shards(path)
    manifest, image = opened.manifest, opened.image
    positions = inspection.draw_rows(manifest["rows"], options.images, options.seed) if options.out else []
    found, rows = inspection.survey(opened, positions)
    patients = sum(record["rows"] > 0 for record in manifest["patients"].values())
    facts = (
        f"{path}: {manifest['dataset']}, {counted(manifest['rows'], 'image')} of {counted(patients, 'patient')}, "
        f"{image.height} x {image.width}, {counted(len(manifest['parts']), 'part')}, "
        f"{counted(len(manifest['quarantined']), 'recording')} quarantined"
    )
    tables = survey_tables(opened, found)
    print("\n\n".join([facts, *map(table_text, tables)]))
    return write_page(command_line.absolute(options.out, "out"), opened, facts, tables, rows) if options.out else None


def verify(path: str) -> None:
    """Print every damaged file; raises UserError naming them all."""
    damaged = []
    for file, reason in inspection.find_damage(path):
        print(f"damaged  {file}: {reason}")
        damaged.append(file)
    problem = f"{path} has {command_line.counted(len(damaged), 'damaged file')}: {', '.join(damaged)}"
    require(not damaged, f"{problem}; preprocess again with --overwrite.")
    print(f"{path} is intact: every part matches the manifest, and every row decodes.\n")


def survey_tables(opened: Shards, survey: inspection.Survey) -> list[Table]:
    """The survey as text tables."""
    patients, grouped = opened.manifest["patients"], set().union(*opened.groups.values())
    groups = [(group, str(len(names)), str(opened.num_rows(group))) for group, names in opened.groups.items()]
    if left := [record["rows"] for name, record in patients.items() if record["rows"] and name not in grouped]:
        groups.append(("in no group", str(len(left)), str(sum(left))))
    pixels = max(1, survey.labels.sum())
    shares = [(title, f"{count / pixels:.2%}") for title, count in zip(CLASS_TITLES, survey.labels, strict=True)]
    grey, (mean, std) = survey.intensity, opened.intensity
    intensity = [("all images", *(f"{grey[key]:.0f}" for key in ("min", "max")), f"{grey['mean']:.2f}", f"{grey['std']:.2f}")]
    intensity.append(("train", "", "", f"{255 * mean:.2f}", f"{255 * std:.2f}"))
    levels = sum((Counter(record.get("grey_levels", {})) for record in patients.values()), Counter())  # old shards have none
    frames = survey.frames
    stills = frames.view.fillna("unknown view") + " " + frames.phase.fillna("frame")
    conventions = frames.ef_convention.fillna("not known")[frames.ef.notna()].unique()
    convention = f" ({', '.join(sorted(conventions))} convention)" if len(conventions) else ""
    efs = inspection.ef_counts(frames.groupby("patient").ef.first())
    return [
        ("Groups", ("group", "patients", "images"), groups),
        ("Pixels by class", ("class", "share"), shares),
        ("Intensity, 0 to 255", ("", "min", "max", "mean", "std"), intensity),
        ("Grey levels in the files", ("", "images"), [(name, str(count)) for name, count in levels.most_common()]),
        ("Views and phases", ("", "images", ""), counts(stills)),
        ("Image quality", ("", "images", ""), counts(frames.quality.fillna("not known"))),
        (f"Ejection fraction in %{convention}", ("", "patients", ""), bars(efs)),
    ]


def counts(column: pandas.Series) -> list[tuple[str, str, str]]:
    """The number of occurrences of each value, as rows of a histogram."""
    return bars(column.value_counts().sort_index().to_dict())


def write_page(out: str, opened: Shards, facts: str, tables: list[Table], rows: list[dict]) -> str:
    """Write the contact sheet, and a page that shows it with the tables; returns the page's path."""
    cells = []
    for row in rows:
        caption = " ".join(filter(None, [frame_name(row), row["quality"]]))
        cells.append((contours.PALETTE[contours.overlay(row["image"], row["mask"], row["spacing_mm"])], caption))
    sheet = plots.save_png(plots.contact_sheet(cells))
    filesystem.publish(filesystem.join(out, SHEET), sheet)
    return pages.write(
        out, PAGE, dataset=opened.manifest["dataset"], facts=facts, fingerprint=opened.fingerprint, tables=tables,
        quarantined=opened.manifest["quarantined"], sheet=base64.b64encode(sheet).decode(), num_images=len(rows),
    )  # fmt: skip


def job(argv: list[str]) -> None:
    options = command_line.parse_line(Options, argv, "python jobs/inspect_shards.py", "Show what shards hold, and check them.")
    if page := run(options):
        print(page)


if __name__ == "__main__":
    command_line.main(job)
