"""What a folder of shards holds, and whether it is what was written; one part is in memory at a time."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from heartseg.errors import StorageError, UserError
from heartseg.labels import NUM_CLASSES
from heartseg.shards import reader, writer
from heartseg.shards.reader import FrameRows, Shards
from heartseg.storage import filesystem

EF_EDGES = (30, 40, 50, 60, 70)  # percent; bins of a histogram, finer than labels.EF_CLASSES


@dataclass(frozen=True)
class Damage:
    """A file that is not what was written, and why."""

    file: str
    reason: str


def find_damage(path: str) -> Iterator[Damage]:
    """Every file of a folder of shards that is damaged, missing or not in the manifest; continues after each one.

    Raises UserError if there is no manifest at all, since then nothing is known about the parts.
    """
    try:
        opened = Shards(path, reader.read_manifest(path), {})
        parts = {part["file"]: part for part in opened.manifest["parts"]}
        for name, part in parts.items():
            if reason := part_damage(opened, part):
                yield Damage(name, reason)
    except (UserError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, StorageError) or not filesystem.exists(filesystem.join(path, writer.MANIFEST)):
            raise
        yield Damage(writer.MANIFEST, f"is not a manifest of ours ({error})")
        return
    for name in filesystem.list_names(path):
        if writer.PART_NAME.fullmatch(name) and name not in parts:
            yield Damage(name, "is not in the manifest")
    try:
        reader.open_shards(path)
    except StorageError:
        raise
    except UserError as error:
        yield Damage(writer.SPLITS, str(error))


def part_damage(opened: Shards, part: dict) -> str | None:
    """How a part differs from what the manifest records, or why its rows are not valid; None if all is well."""
    try:
        check_rows(reader.read_part(opened, part), opened, part)
    except StorageError:
        raise  # a store that cannot be reached says nothing about the part
    except UserError as error:
        return str(error)
    except (pa.ArrowException, OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        return f"does not hold the rows that the manifest describes ({error or type(error).__name__})"
    return None


def check_rows(table: pa.Table, opened: Shards, part: dict) -> None:
    """Raise ValueError if rows have other columns, labels, shapes or patients than they may."""
    if not table.schema.equals(writer.schema(opened.image)):
        raise ValueError("the columns differ")
    if table.num_rows != part["rows"]:
        raise ValueError(f"{table.num_rows} rows instead of {part['rows']}")
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

    def add(self, frames: FrameRows) -> None:
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
        """Patients by their ejection fraction in percent; the last entry counts those whose is not known."""
        known = [ef for ef in self.ef.values() if ef is not None]
        counts = np.bincount(np.digitize(known, EF_EDGES), minlength=len(EF_EDGES) + 1).tolist()
        pairs = zip(EF_EDGES[:-1], EF_EDGES[1:], strict=True)
        names = [f"below {EF_EDGES[0]}", *(f"{low} to {high}" for low, high in pairs), f"{EF_EDGES[-1]} and above"]
        return dict(zip(names, counts, strict=True)) | {"not known": len(self.ef) - len(known)}


def survey(opened: Shards, positions: Iterable[int] = ()) -> tuple[Survey, list[dict]]:
    """Count every row, and keep the rows at some positions: the table's columns, `image` [H,W] and `mask` [H,W].

    Raises UserError for the first part that is damaged.
    """
    counts, kept, positions = Survey(), [], sorted(positions)
    for part in opened.manifest["parts"]:
        frames = reader.as_frames(reader.read_part(opened, part), opened.image)
        for index in (position - counts.rows for position in positions if 0 <= position - counts.rows < len(frames)):
            row = frames.table.slice(index, 1).to_pylist()[0]
            # Copies: a view would keep the whole part in memory.
            kept.append(row | {"image": frames.images[index, 0].numpy().copy(), "mask": frames.masks[index].numpy().copy()})
        counts.add(frames)
    return counts, kept


def draw_rows(num_rows: int, num_images: int, seed: int) -> list[int]:
    """Positions of some rows, drawn without repetition; the same seed draws the same ones."""
    return sorted(np.random.default_rng(seed).choice(num_rows, min(num_images, num_rows), replace=False).tolist())
