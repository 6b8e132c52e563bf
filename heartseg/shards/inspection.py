"""Surveys a folder of shards and checks it for damage, with one part in memory at a time."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas
import pyarrow as pa

from heartseg.errors import UserError
from heartseg.labels import NUM_CLASSES
from heartseg.shards import reader, writer
from heartseg.shards.reader import Shards
from heartseg.storage import filesystem

EF_EDGES = (30, 40, 50, 60, 70)  # percent; bins of a histogram, finer than labels.EF_CLASSES


def find_damage(path: str) -> Iterator[tuple[str, str]]:
    """Each file that is damaged, missing or not in the manifest, with the reason; raises UserError if there is no manifest."""
    try:
        opened = Shards(path, reader.read_manifest(path), {})
        parts = {part["file"]: part for part in opened.manifest["parts"]}
        for name, part in parts.items():
            try:
                check_rows(reader.read_part(opened, part), opened, part)
            except UserError as error:
                yield name, str(error)
            except (pa.ArrowException, OSError, AttributeError, LookupError, TypeError, ValueError) as error:
                yield name, f"does not hold the rows that the manifest describes ({error or type(error).__name__})"
    except (UserError, AttributeError, LookupError, TypeError, ValueError) as error:
        if not filesystem.exists(filesystem.join(path, writer.MANIFEST)):
            raise
        yield writer.MANIFEST, f"is not a heartseg manifest ({error})"
        return
    for name in filesystem.list_names(path):
        if writer.PART_NAME.fullmatch(name) and name not in parts:
            yield name, "is not in the manifest"
    try:
        reader.open_shards(path)
    except UserError as error:
        yield writer.SPLITS, str(error)


def check_rows(table: pa.Table, opened: Shards, part: dict) -> None:
    """Raise ValueError for columns, rows, patients, labels or spacings that shards cannot have."""
    if not table.schema.equals(writer.schema(opened.image)):
        raise ValueError("the columns differ")
    if table.num_rows != part["rows"]:
        raise ValueError(f"{table.num_rows} rows instead of {part['rows']}")
    if strangers := set(table["patient"].to_pylist()) - opened.manifest["patients"].keys():
        raise ValueError(f"{min(strangers)} is not in the manifest")
    frames = reader.as_frames(table, opened.image)
    for index in range(len(frames)):
        native = frames.native_mask(index)
        if max(native.max(), frames.masks[index].max()) >= NUM_CLASSES:
            raise ValueError(f"row {index} has labels above {NUM_CLASSES - 1}")
        if min(*table["spacing_mm"][index].as_py(), *table["native_spacing_mm"][index].as_py()) <= 0:
            raise ValueError(f"row {index} has a spacing that is not positive")


@dataclass(frozen=True)
class Survey:
    """A summary of all rows: `grey` [256] and `labels` [4] count the stored pixels by value, `frames` has the other columns."""

    grey: np.ndarray
    labels: np.ndarray
    frames: pandas.DataFrame

    @property
    def intensity(self) -> dict[str, float]:
        """Minimum, maximum, mean and standard deviation of the stored pixels, 0 to 255."""
        (there,) = np.nonzero(self.grey)
        if not len(there):
            return dict.fromkeys(("min", "max", "mean", "std"), math.nan)
        mean = np.average(there, weights=self.grey[there])
        std = math.sqrt(np.average((there - mean) ** 2, weights=self.grey[there]))
        return {"min": float(there[0]), "max": float(there[-1]), "mean": float(mean), "std": std}


def ef_counts(ef: pandas.Series) -> dict[str, int]:
    """Number of patients by ejection fraction in percent; the last entry counts those without one."""
    inner = (f"{low} to {high}" for low, high in itertools.pairwise(EF_EDGES))
    names = [f"below {EF_EDGES[0]}", *inner, f"{EF_EDGES[-1]} and above"]
    bins = pandas.cut(ef, [-math.inf, *EF_EDGES, math.inf], right=False, labels=names)
    return bins.value_counts(sort=False).to_dict() | {"not known": int(ef.isna().sum())}


def survey(opened: Shards, positions: Iterable[int] = ()) -> tuple[Survey, list[dict]]:
    """Survey every row; also returns the rows at `positions`, with `image` and `mask` [H,W]. Raises UserError for damage."""
    grey, labels, tables, kept, first, positions = 0, 0, [], [], 0, set(positions)
    for part in opened.manifest["parts"]:
        frames = reader.as_frames(reader.read_part(opened, part), opened.image)
        for index in (index for index in range(len(frames)) if first + index in positions):
            row = frames.table.slice(index, 1).to_pylist()[0]
            # Copies: a view would keep the whole part in memory.
            kept.append(row | {"image": frames.images[index, 0].numpy().copy(), "mask": frames.masks[index].numpy().copy()})
        grey += np.bincount(frames.images.numpy().ravel(), minlength=256)
        labels += np.bincount(frames.masks.numpy().ravel(), minlength=NUM_CLASSES)[:NUM_CLASSES]
        tables.append(frames.table.select(["patient", "view", "phase", "quality", "ef", "ef_convention"]))
        first += len(frames)
    return Survey(grey, labels, pa.concat_tables(tables).to_pandas(use_threads=False)), kept


def draw_rows(num_rows: int, num_images: int, seed: int) -> list[int]:
    """Sorted positions of up to `num_images` rows, drawn without replacement."""
    return sorted(np.random.default_rng(seed).choice(num_rows, min(num_images, num_rows), replace=False).tolist())
