"""What some shards hold, in numbers and pictures, and whether they are whole: `python jobs/inspect_shards.py --data SHARDS`."""

import base64
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jinja2

from heartseg import figures, storage, survey
from heartseg.errors import UserError
from heartseg.labels import frame_name
from heartseg.shards import Shards, open_shards
from jobs import runtime

SHEET, PAGE = "contact_sheet.png", "shards.html"


@dataclass(frozen=True)
class Options:
    """What to look at, and how."""

    data: str = ""
    """Folder or URI of the shards; HEARTSEG_DATA's where not given."""
    out: str = ""
    """Folder for contact_sheet.png and shards.html; none are written where not given."""
    verify: bool = False
    """Check every file against the manifest and every row; damaged files are listed, and the exit code is 2."""
    images: int = 16
    """Images on the contact sheet."""
    seed: int = 0
    """Seed of the draw of these images."""


def run(options: Options) -> str | None:
    """Print what the shards hold; returns the path of the page, None where none was asked for."""
    data = runtime.require(options.data or os.environ.get("HEARTSEG_DATA", ""), "--data", "the folder of the shards")
    path = runtime.absolute(data, "data")
    if options.images < 1 or options.seed < 0:
        raise UserError("--images must be at least 1 and --seed not negative.")
    if options.verify:
        verify(path)
    opened = open_shards(path)
    picked = survey.pick(opened.manifest["rows"], options.images, options.seed) if options.out else []
    found, rows = survey.look(opened, picked)
    facts = headline(opened)
    tables = survey.tables(opened, found)
    print("\n\n".join([facts, *map(survey.table_text, tables)]))
    return write_page(runtime.absolute(options.out, "out"), opened, facts, tables, rows) if options.out else None


def verify(path: str) -> None:
    """Print every damaged file; raises UserError that names them all."""
    damaged = []
    for damage in survey.find_damage(path):
        print(f"damaged  {damage.file}: {damage.reason}")
        damaged.append(damage.file)
    if damaged:
        raise UserError(f"{path} has {len(damaged)} damaged files: {', '.join(damaged)}; preprocess again with --overwrite.")
    print(f"{path} is whole: every file is as it was written, every row decodes.\n")


def headline(opened: Shards) -> str:
    """The shards in one line."""
    manifest, image = opened.manifest, opened.image
    patients = sum(record["rows"] > 0 for record in manifest["patients"].values())
    return (
        f"{opened.path}: {manifest['dataset']}, {manifest['rows']} images of {patients} patients, {image.height} x "
        f"{image.width}, {len(manifest['parts'])} parts, {len(manifest['quarantined'])} recordings in quarantine"
    )


def write_page(out: str, opened: Shards, facts: str, tables: list[survey.Table], rows: list[dict]) -> str:
    """Write the contact sheet and a page with it and the tables; returns the page's path."""
    cells = []
    for row in rows:
        caption = " ".join(filter(None, [frame_name(row), row["quality"]]))
        picture = figures.overlay(figures.enlarge(row["image"]), figures.enlarge(row["mask"]), thick=True)
        cells.append((picture, caption, row["spacing_mm"][0] / row["spacing_mm"][1]))
    sheet = figures.save_png(figures.contact_sheet(cells))
    storage.publish(storage.join(out, SHEET), sheet)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("heartseg"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(PAGE).render(
        dataset=opened.manifest["dataset"], facts=facts, fingerprint=opened.fingerprint, tables=tables,
        quarantined=opened.manifest["quarantined"], sheet=base64.b64encode(sheet).decode(), num_images=len(rows),
    )  # fmt: skip
    path = storage.join(out, PAGE)
    storage.publish(path, page.encode())
    return path


def job(argv: Sequence[str]) -> None:
    """The command line."""
    options = runtime.parse_line(Options, argv, "python jobs/inspect_shards.py", "Show what shards hold, and check them.")
    page = run(options)
    if page:
        print(page)


if __name__ == "__main__":
    runtime.main(job)
