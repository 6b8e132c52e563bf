"""Reads folders of shards: the manifest, the groups of patients, and the rows (one per frame) as tensors.

A folder holds `part-00000.parquet …`, a record of each part's source, `splits.json` (patients by group) and, written
last, `manifest.json`, which marks it as complete. Reading checks sizes and hashes, and names a damaged part.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from heartseg.config.experiment import ImageConfig, SplitConfig, canonical
from heartseg.datasets import splits
from heartseg.errors import UserError, require
from heartseg.shards.writer import FORMAT, MANIFEST, PACKING, PART_NAME, SPLITS, schema
from heartseg.storage import filesystem

MANIFEST_KEYS = {"dataset", "image", "parts", "rows", "patients", "quarantined"}


@dataclass(frozen=True)
class Shards:
    """A complete folder of shards: its manifest and its groups of patients."""

    path: str
    manifest: dict
    groups: dict[str, list[str]]

    @property
    def image(self) -> ImageConfig:
        """The grid of the stored images."""
        return ImageConfig(**self.manifest["image"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the parts' hashes and the groups; equal for equal pixels written by the same version of pyarrow."""
        hashes = [part["sha256"] for part in self.manifest["parts"]]
        return filesystem.sha256(canonical([hashes, self.groups]))

    @property
    def intensity(self) -> tuple[float, float]:
        """Mean and standard deviation of the training group's stored pixels, as shares of 255."""
        sums = np.sum([self.manifest["patients"][p]["intensity_sums"] for p in self.groups["train"]], axis=0)
        mean = sums[0] / sums[2]
        return float(mean / 255), float(np.sqrt(sums[1] / sums[2] - mean * mean) / 255)

    def num_rows(self, group: str) -> int:
        """Images in a group."""
        return sum(self.manifest["patients"][patient]["rows"] for patient in self.groups[group])


def read_manifest(path: str) -> dict:
    """The manifest of a complete folder; raises UserError if it is incomplete or of another format."""
    manifest_path, again = filesystem.join(path, MANIFEST), "preprocess again with --overwrite."
    if not filesystem.exists(manifest_path):
        raise UserError(f"{path} holds no finished shards (no {MANIFEST}): check the path, or run jobs/preprocess.py first.")
    manifest = filesystem.read_json(manifest_path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    require(found == FORMAT, f"{path} has shard format {found}, but this version reads {FORMAT}: {again}")
    missing = MANIFEST_KEYS - manifest.keys()
    require(not missing, f"{manifest_path} lacks the key {min(missing, default='')!r}: {again}")
    is_ours = isinstance(manifest["patients"], dict) and isinstance(manifest["parts"], list)
    require(is_ours, f"{manifest_path} is not a manifest: {again}")
    if manifest["dataset"] == "CAMUS" and not manifest.get("dataset_is_marked"):
        manifest["dataset"] = "other"  # a guess from patients' names; other people's data is private
    for part in manifest["parts"]:  # a manifest's paths must stay in its folder
        require(PART_NAME.fullmatch(part["file"]), f"{manifest_path} names {part['file']!r}, which is not a part: {again}")
    return manifest


def read_split(path: str) -> dict:
    """A folder's split: `groups`, and the `config` that made them; raises UserError if it is damaged."""
    split = filesystem.read_json(filesystem.join(path, SPLITS))
    groups = split.get("groups") if isinstance(split, dict) else None
    names = groups.values() if isinstance(groups, dict) else [None]
    is_split = all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in names)
    if not is_split or "train" not in groups:
        raise UserError(f"{path}/{SPLITS} names no training group: preprocess again with --resplit.")
    splits.group_of(groups)
    return split


def open_shards(path: str) -> Shards:
    """Open a complete folder of shards; raises UserError if it is incomplete or damaged."""
    manifest, groups = read_manifest(path), read_split(path)["groups"]
    if unknown := splits.group_of(groups).keys() - manifest["patients"].keys():
        raise UserError(f"{path}/{SPLITS} names {min(unknown)}, who has no shards: preprocess again with --resplit.")
    return Shards(path, manifest, groups)


def hold_out(shards: Shards, share: float) -> Shards:
    """Only the training group, a seeded, stratified `share` of which becomes the validation group; unchanged if it is 0."""
    if not share:
        return shards
    split = SplitConfig("ratio", test_share=0.0, val_share=share)
    groups = splits.make_groups(split, shards.groups["train"], {}, shards.manifest["patients"])
    return replace(shards, groups=groups)


@dataclass(frozen=True, eq=False)
class FrameRows:
    """Rows in memory: `images` uint8 [N,1,H,W], `masks` uint8 [N,H,W], `table` all other columns."""

    images: torch.Tensor
    masks: torch.Tensor
    table: pa.Table

    def __len__(self) -> int:
        return len(self.images)

    def native_mask(self, index: int) -> np.ndarray:
        """The label mask of a row as the expert drew it, uint8 [H,W] on the native grid."""
        packed, shape = (self.table[name][index].as_py() for name in ("native_mask", "native_shape"))
        raw = pa.decompress(packed, decompressed_size=math.prod(shape), codec=PACKING, asbytes=True)
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape)


def read_part(shards: Shards, part: dict, columns: list[str] | None = None) -> pa.Table:
    """The rows of one part, all columns or some; raises UserError naming the part if it does not match the manifest."""
    try:
        data = filesystem.read_bytes(filesystem.join(shards.path, part["file"]))
    except OSError as error:
        raise _bad_part(shards, part, f"cannot be read ({error.strerror or error})") from error
    if len(data) != part["bytes"] or filesystem.sha256(data) != part["sha256"]:
        raise _bad_part(shards, part, "is damaged (not the bytes that were written)")
    return filesystem.read_table(data, columns)


def _bad_part(shards: Shards, part: dict, problem: str) -> UserError:
    path = filesystem.join(shards.path, part["file"])
    return UserError(f"The shard {path} {problem}: preprocess again with --overwrite.")


def load_groups(shards: Shards, groups: Iterable[str]) -> dict[str, FrameRows]:
    """Read the rows of some groups into memory, each part once."""
    wanted = splits.group_of({group: shards.groups[group] for group in groups})
    kept: dict[str, list[pa.Table]] = {group: [] for group in groups}
    for part in shards.manifest["parts"]:
        table = read_part(shards, part)
        owner = np.array([wanted.get(patient, "") for patient in table["patient"].to_pylist()])
        for group, tables in kept.items():
            tables.append(table.filter(pa.array(owner == group)))
    return {group: as_frames(pa.concat_tables(tables), shards.image) for group, tables in kept.items()}


@dataclass(frozen=True)
class PartRows:
    """A group's rows in one part: the part's record in the manifest, the group's patients, and the number of their rows."""

    part: dict
    patients: list[str]
    rows: int


def index_groups(shards: Shards) -> dict[str, list[PartRows]]:
    """The parts that hold each group's rows, in the order of `load_groups`; reads no part."""
    index: dict[str, list[PartRows]] = {}
    for group, names in shards.groups.items():
        inside = [(part, sorted({*names} & {*part["patients"]})) for part in shards.manifest["parts"]]
        found = (PartRows(part, p, sum(shards.manifest["patients"][name]["rows"] for name in p)) for part, p in inside)
        index[group] = [held for held in found if held.rows]
    return index


def check_sizes(shards: Shards) -> None:
    """Raise UserError for the first part that is missing or of the wrong size, from one listing, before anything is read."""
    sizes = {name: size for name, size, _ in filesystem.list_files(shards.path)}
    for part in shards.manifest["parts"]:
        if sizes.get(part["file"]) != part["bytes"]:
            problem = "is damaged (not the size that was written)" if part["file"] in sizes else "is missing"
            raise _bad_part(shards, part, problem)


def read_part_rows(shards: Shards, held: PartRows, rows: Sequence[int], columns: list[str] | None = None) -> pa.Table:
    """Some of a group's rows in one part, numbered from its first row there; `patient` must be among `columns`."""
    table = read_part(shards, held.part, columns)
    (places,) = np.nonzero(np.isin(np.array(table["patient"].to_pylist(), dtype=str), held.patients))
    if len(places) != held.rows:
        raise _bad_part(shards, held.part, "lacks rows that its manifest names")
    return table.take(pa.array(places[np.asarray(rows, dtype=np.int64)]))


def read_rows(shards: Shards, index: list[PartRows], rows: Sequence[int]) -> FrameRows:
    """Some rows of a group, in the requested order and numbered as in `load_groups`; reads only the parts that hold them."""
    starts = np.cumsum([0, *(held.rows for held in index)])
    wanted = np.asarray(rows, dtype=np.int64)
    owners = np.searchsorted(starts, wanted, side="right") - 1
    by_part = np.argsort(owners, kind="stable")
    tables = [read_part_rows(shards, index[o], wanted[owners == o] - starts[o]) for o in np.unique(owners)]
    # Read part by part, returned in the requested order.
    read = pa.concat_tables([schema(shards.image).empty_table(), *tables])
    return as_frames(read.take(pa.array(np.argsort(by_part), pa.int64())), shards.image)


def as_frames(table: pa.Table, image: ImageConfig) -> FrameRows:
    """A table of rows as FrameRows: the pixel columns become tensors."""
    images = column_tensor(table["image"], (1, image.height, image.width))
    masks = column_tensor(table["mask"], (image.height, image.width))
    return FrameRows(images, masks, table.drop_columns(["image", "mask"]))


def column_tensor(column: pa.ChunkedArray, shape: tuple[int, ...]) -> torch.Tensor:
    """A fixed-size binary column as one uint8 tensor [N, *shape] with its own memory."""
    size = math.prod(shape)
    chunks = (np.frombuffer(one.buffers()[1], np.uint8)[one.offset * size :][: len(one) * size] for one in column.chunks)
    return torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *chunks])).view(len(column), *shape)
