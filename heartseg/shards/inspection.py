"""What a folder of shards holds, and whether it is what was written; one part is in memory at a time.

Hands on numbers and tables (a title, a heading, rows of text), which inspect_shards.py prints and lays out.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from heartseg.errors import UserError
from heartseg.labels import NUM_CLASSES
from heartseg.shards import reader, reuse, writer
from heartseg.shards.reader import Frames, Shards
from heartseg.storage import filesystem

EF_EDGES = (30, 40, 50, 60, 70)  # percent; below 40 is reduced, 50 and above preserved (ESC 2021)


@dataclass(frozen=True)
class Damage:
    """A file that is not what was written, and how that shows."""

    file: str
    reason: str


def find_damage(path: str) -> Iterator[Damage]:
    """Every file of a folder of shards that is damaged, missing or too many; goes on after each one.

    Raises UserError where there is no manifest at all, for then nothing is known of the parts.
    """
    manifest_path = filesystem.join(path, writer.MANIFEST)
    if not filesystem.exists(manifest_path):
        raise UserError(f"{path} holds no finished shards (no {writer.MANIFEST}): run jobs/preprocess.py first.")
    changed = False
    for name in (writer.MANIFEST, writer.SPLITS):
        if reason := seal_damage(filesystem.join(path, name)):
            changed = True
            yield Damage(name, reason)
    try:
        manifest = filesystem.read_json(manifest_path)
        parts = [dict(part, file=str(part["file"])) for part in manifest["parts"]]
        opened = Shards(path, manifest, {})
    except (UserError, ValueError, KeyError, TypeError):
        return  # the manifest is named already, and without its list of parts there is nothing to compare
    for part in parts:
        if reason := part_damage(opened, part):
            yield Damage(part["file"], reason)
    listed = {part["file"] for part in parts}
    for name in filesystem.list_names(path):
        if reuse.PART_NAME.fullmatch(name) and name not in listed:
            yield Damage(name, "is in no manifest")
    if not changed:
        try:
            reader.open_shards(path)
        except UserError as error:
            yield Damage(writer.SPLITS, str(error))


def seal_damage(path: str) -> str | None:
    """How a manifest or split differs from what was written; None where it does not."""
    try:
        data = filesystem.read_bytes(path)
        value = json.loads(data)
        if data == filesystem.json_bytes(reuse.sealed(value)):
            return None
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except (ValueError, AttributeError, RecursionError):
        return "is no valid JSON of ours"
    return "was changed after it was written (its seal is another)"


def part_damage(opened: Shards, part: dict) -> str | None:
    """How a part differs from what the manifest says, or why its rows are no rows; None where all is well."""
    try:
        check_rows(reader.read_part(opened, part), opened, part)
    except UserError as error:
        return str(error)
    except (pa.ArrowException, OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        return f"does not hold the rows that the manifest tells of ({error or type(error).__name__})"
    return None


def check_rows(table: pa.Table, opened: Shards, part: dict) -> None:
    """Raise ValueError where rows have other columns, labels, shapes or patients than they may."""
    if not table.schema.equals(writer.schema(opened.image, {})):
        raise ValueError("the columns are others")
    if table.num_rows != part["rows"]:
        raise ValueError(f"{table.num_rows} rows in place of {part['rows']}")
    strangers = set(table["patient"].to_pylist()) - opened.manifest["patients"].keys()
    if strangers:
        raise ValueError(f"{min(strangers)} is not in the manifest")
    frames = reader.as_frames(table, opened.image)
    for index in range(len(frames)):
        native = frames.native_mask(index)
        if max(native.max(), frames.masks[index].max()) >= NUM_CLASSES:
            raise ValueError(f"row {index} has labels above {NUM_CLASSES - 1}")
        if min(*table["spacing_mm"][index].as_py(), *table["native_spacing_mm"][index].as_py()) <= 0:
            raise ValueError(f"row {index} has a spacing that is not positive")


@dataclass
class Survey:
    """Counts over all rows of some shards; `grey` and `labels` count the pixels of each value, on the stored grid."""

    grey: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(NUM_CLASSES, np.int64))
    rows: int = 0
    stills: Counter = field(default_factory=Counter)
    quality: Counter = field(default_factory=Counter)
    ef: dict[str, float | None] = field(default_factory=dict)
    conventions: set[str] = field(default_factory=set)

    def add(self, frames: Frames) -> None:
        """Count the rows of one part."""
        self.grey += np.bincount(frames.images.numpy().ravel(), minlength=256)
        self.labels += np.bincount(frames.masks.numpy().ravel(), minlength=NUM_CLASSES)[:NUM_CLASSES]
        self.rows += len(frames)
        for row in frames.table.select(["patient", "view", "phase", "quality", "ef", "ef_convention"]).to_pylist():
            self.stills[f"{row['view'] or 'unknown view'} {row['phase'] or 'frame'}"] += 1
            self.quality[row["quality"] or "not known"] += 1
            if self.ef.get(row["patient"]) is None:
                self.ef[row["patient"]] = row["ef"]
            if row["ef"] is not None:
                self.conventions.add(row["ef_convention"] or "not known")

    @property
    def intensity(self) -> dict[str, float]:
        """Least, greatest, mean and standard deviation of the stored pixels, 0 to 255."""
        values, total = np.arange(256), self.grey.sum()
        there = np.flatnonzero(self.grey)
        if not total:
            return dict.fromkeys(("min", "max", "mean", "std"), math.nan)
        mean = float(self.grey @ values / total)
        std = float(np.sqrt(self.grey @ (values - mean) ** 2 / total))
        return {"min": float(there[0]), "max": float(there[-1]), "mean": mean, "std": std}

    @property
    def class_shares(self) -> np.ndarray:
        """Share of all stored pixels by class, float [4]."""
        return self.labels / max(1, self.labels.sum())

    @property
    def ef_counts(self) -> dict[str, int]:
        """Patients by their ejection fraction in percent; the last entry counts those of whom it is not known."""
        known = [ef for ef in self.ef.values() if ef is not None]
        counts = np.bincount(np.digitize(known, EF_EDGES), minlength=len(EF_EDGES) + 1).tolist()
        pairs = zip(EF_EDGES[:-1], EF_EDGES[1:], strict=True)
        names = [f"below {EF_EDGES[0]}", *(f"{low} to {high}" for low, high in pairs), f"{EF_EDGES[-1]} and above"]
        return dict(zip(names, counts, strict=True)) | {"not known": len(self.ef) - len(known)}


def look(opened: Shards, picked: Iterable[int] = ()) -> tuple[Survey, list[dict]]:
    """Count every row, and keep the rows at the positions `picked`: the table's columns, `image` [H,W] and `mask` [H,W].

    Raises UserError for the first part that is damaged.
    """
    survey, kept, picked = Survey(), [], sorted(picked)
    for part in opened.manifest["parts"]:
        frames = reader.as_frames(reader.read_part(opened, part), opened.image)
        for index in (place - survey.rows for place in picked if 0 <= place - survey.rows < len(frames)):
            row = frames.table.slice(index, 1).to_pylist()[0]
            # Copies: a view would keep the whole part in memory.
            kept.append(row | {"image": frames.images[index, 0].numpy().copy(), "mask": frames.masks[index].numpy().copy()})
        survey.add(frames)
    return survey, kept


def pick(num_rows: int, num_images: int, seed: int) -> list[int]:
    """Positions of some rows, drawn without repetition; the same seed draws the same ones."""
    return sorted(np.random.default_rng(seed).choice(num_rows, min(num_images, num_rows), replace=False).tolist())
