"""Recordings to Parquet shards with a manifest, and back to tensors.

A folder of shards holds `part-00000.parquet …`, `splits.json` (patients by group) and, written last, `manifest.json`: a
folder with a manifest is complete. A row is one frame. Nothing that reads trusts what is there: sizes and hashes are
checked, and a damaged part is named.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import interpolate

from heartseg import camus, splits, storage
from heartseg.config import ImageConfig, SplitConfig, canonical, first_difference, to_json
from heartseg.errors import UserError
from heartseg.labels import CLASSES
from heartseg.nifti import DamagedRecording

FORMAT = 1
PATIENTS_PER_PART = 16
MANIFEST, SPLITS = "manifest.json", "splits.json"
PART_NAME = re.compile(r"part-\d{5}\.parquet")
# Measured: fixed-size binary columns read back 5 to 9 times faster than Arrow's tensor type, and neither a dictionary
# nor statistics pay for pixels.
PARQUET = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
INFO_COLUMNS = {
    "quality": pa.string(), "ef": pa.float64(), "ef_convention": pa.string(),
    "sex": pa.string(), "age": pa.int32(), "frame_rate": pa.float64(),
}  # fmt: skip


def schema(image: ImageConfig, note: dict) -> pa.Schema:
    """Columns of a part; dtype and shape of the pixel columns and the part's `note` stand in the metadata."""
    pixels = image.height * image.width
    columns = {
        "patient": pa.string(), "view": pa.string(), "phase": pa.string(), "frame": pa.int32(),
        "image": pa.binary(pixels), "mask": pa.binary(pixels), "spacing_mm": pa.list_(pa.float64(), 2),
        "native_mask": pa.binary(), "native_shape": pa.list_(pa.int32(), 2),
        "native_spacing_mm": pa.list_(pa.float64(), 2),
    } | INFO_COLUMNS  # fmt: skip
    tensors = {
        "image": {"dtype": "uint8", "shape": [1, image.height, image.width]},
        "mask": {"dtype": "uint8", "shape": [image.height, image.width]},
        "native_mask": {"dtype": "uint8", "shape": "native_shape", "compression": "zlib"},
    }
    metadata = {"heartseg.tensors": json.dumps(tensors), "heartseg.part": canonical(note).decode()}
    return pa.schema(list(columns.items()), metadata=metadata)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An upright uint8 image on another grid, bilinear and antialiased."""
    pixels = torch.from_numpy(image)[None, None].float()
    resized = interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)[0, 0].numpy()


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A label mask on another grid by nearest neighbour at pixel centres; labels are never interpolated."""
    labels = torch.from_numpy(mask)[None, None]
    return interpolate(labels, (height, width), mode="nearest-exact")[0, 0].numpy()


def make_row(recording: camus.Recording, image: ImageConfig) -> dict:
    """One shard row of a recording that has a mask."""
    native_shape = recording.image.shape
    grid = (image.height, image.width)
    spacing_mm = [mm * old / new for mm, old, new in zip(recording.spacing_mm, native_shape, grid, strict=True)]
    return {
        "patient": recording.patient,
        "view": str(recording.view),
        "phase": str(recording.phase) if recording.phase else None,
        "frame": recording.frame,
        "image": resize_image(recording.image, *grid).tobytes(),
        "mask": resize_mask(recording.mask, *grid).tobytes(),
        "spacing_mm": spacing_mm,
        "native_mask": zlib.compress(recording.mask.tobytes(), level=1),
        "native_shape": list(native_shape),
        "native_spacing_mm": list(recording.spacing_mm),
        **{name: getattr(recording.info, name, None) for name in INFO_COLUMNS},
    }


def part_names(patients: list[str]) -> list[tuple[str, list[str]]]:
    """The parts that a source's patients fall into: file name and patients, in order."""
    starts = range(0, len(patients), PATIENTS_PER_PART)
    return [(f"part-{i:05d}.parquet", patients[s : s + PATIENTS_PER_PART]) for i, s in enumerate(starts)]


def write_part(source: str, out: str, name: str, patients: list[str], image: ImageConfig) -> dict:
    """Write one part, or take it as it is where an earlier, interrupted call has finished it; returns its record.

    Raises UserError where the part there was made from another configuration or source.
    """
    path = storage.join(out, name)
    asked = {"format": FORMAT, "image": to_json(image), "listing": {p: camus.list_files(source, p) for p in patients}}
    asked = json.loads(canonical(asked))
    if storage.exists(path):
        try:
            note = json.loads(storage.read_table_metadata(path).get(b"heartseg.part", b"{}"))
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise UserError(f"{path} is damaged: give --overwrite, or another --out.") from error
        difference = first_difference({key: note.get(key) for key in asked}, asked)
        if difference:
            raise UserError(f"{path} was made from something else ({difference}): give --overwrite, or another --out.")
        data = storage.read_bytes(path)
        return {"file": name, "bytes": len(data), "sha256": storage.sha256(data), **note}
    rows, note = [], asked | {"patients": {}, "quarantined": []}
    for patient in patients:
        patient_rows, record, damaged = read_patient(source, patient, image)
        rows += patient_rows
        note["patients"][patient] = record
        note["quarantined"] += damaged
    note["rows"] = len(rows)
    num_bytes, digest = storage.write_table(path, pa.Table.from_pylist(rows, schema(image, note)), **PARQUET)
    return {"file": name, "bytes": num_bytes, "sha256": digest, **note}


def read_patient(source: str, patient: str, image: ImageConfig) -> tuple[list[dict], dict, list[dict]]:
    """A patient's shard rows, what the manifest keeps of them, and the recordings that were damaged."""
    rows, damaged, digest = [], [], hashlib.sha256()
    for view, phase in camus.stills_of():
        try:
            rows.append(make_row(camus.read_still(source, patient, view, phase, digest), image))
        except DamagedRecording as error:
            file = error.file.removeprefix(source).lstrip("/")
            damaged.append({"patient": patient, "view": view, "phase": phase, "file": file, "reason": error.reason})
    pixels = np.frombuffer(b"".join(row["image"] for row in rows), dtype=np.uint8).astype(np.int64)
    # Exact integer sums, so that any split's mean and deviation follow without another look at the pixels.
    sums = [int(pixels.sum()), int((pixels * pixels).sum()), int(pixels.size)]
    return rows, {"rows": len(rows), "sha256": digest.hexdigest(), "intensity_sums": sums}, damaged


def write_manifest(out: str, source_name: str, image: ImageConfig, parts: list[dict]) -> dict:
    """Write the manifest of finished parts (records of `write_part`, in order): the folder is complete with it."""
    patients = {patient: record for part in parts for patient, record in part["patients"].items()}
    manifest = {
        "format": FORMAT,
        "dataset": source_name,
        "frames": "stills",
        "image": to_json(image),
        "classes": list(CLASSES),
        "parts": [{key: part[key] for key in ("file", "rows", "bytes", "sha256")} for part in parts],
        "rows": sum(part["rows"] for part in parts),
        "patients": patients,
        "quarantined": [entry for part in parts for entry in part["quarantined"]],
        "source_listing": storage.sha256(canonical([part["listing"] for part in parts])),
        "source_sha256": storage.sha256(canonical({name: record["sha256"] for name, record in patients.items()})),
    }
    storage.publish_json(storage.join(out, MANIFEST), sealed(manifest))
    return manifest


def sealed(value: dict) -> dict:
    """A value with the hash of the rest of it under `seal`, by which a change of the file is seen."""
    rest = {key: inner for key, inner in value.items() if key != "seal"}
    return rest | {"seal": storage.sha256(canonical(rest))}


def source_listing(source: str, patients: list[str]) -> str:
    """The hash that `write_manifest` keeps of a source's file names and sizes, computed without reading the files."""
    listings = [{p: camus.list_files(source, p) for p in chunk} for _, chunk in part_names(patients)]
    return storage.sha256(canonical(listings))


def write_splits(out: str, config: SplitConfig, manifest_patients: dict, official: dict[str, list[str]]) -> dict:
    """Write `splits.json` for the patients that have rows; returns the groups."""
    patients = [name for name, record in manifest_patients.items() if record["rows"]]
    groups = splits.make_groups(config, patients, official)
    storage.publish_json(storage.join(out, SPLITS), sealed({"config": to_json(config), "groups": groups}))
    return groups


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
        """SHA-256 over the parts' hashes and the groups: equal for equal pixels in equal groups."""
        hashes = [part["sha256"] for part in self.manifest["parts"]]
        return storage.sha256(canonical([hashes, self.groups]))

    @property
    def intensity(self) -> tuple[float, float]:
        """Mean and standard deviation of the training group's stored pixels, as shares of 255."""
        sums = np.sum([self.manifest["patients"][p]["intensity_sums"] for p in self.groups["train"]], axis=0)
        mean = sums[0] / sums[2]
        return float(mean / 255), float(np.sqrt(sums[1] / sums[2] - mean * mean) / 255)

    def num_rows(self, group: str) -> int:
        """Images in a group."""
        return sum(self.manifest["patients"][patient]["rows"] for patient in self.groups[group])


def open_shards(path: str) -> Shards:
    """Open a complete folder of shards; raises UserError for anything else."""
    manifest_path = storage.join(path, MANIFEST)
    if not storage.exists(manifest_path):
        raise UserError(f"{path} holds no finished shards (no {MANIFEST}): run jobs/preprocess.py first.")
    manifest = storage.read_json(manifest_path)
    if not isinstance(manifest, dict):
        raise UserError(f"{manifest_path} is no manifest: preprocess anew.")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has shard format {manifest.get('format')}, this version reads {FORMAT}: preprocess anew.")
    split = storage.read_json(storage.join(path, SPLITS))
    groups = split.get("groups") if isinstance(split, dict) else None
    if not isinstance(groups, dict) or "train" not in groups:
        raise UserError(f"{path}/{SPLITS} names no training group: preprocess again to write it anew.")
    splits.assert_disjoint(groups)
    unknown = {p for names in groups.values() for p in names} - manifest["patients"].keys()
    if unknown:
        raise UserError(f"{path}/{SPLITS} names {min(unknown)}, of whom there are no shards: preprocess anew.")
    return Shards(path, manifest, groups)


@dataclass(frozen=True, eq=False)
class Frames:
    """Rows in memory: `images` uint8 [N,1,H,W], `masks` uint8 [N,H,W], `table` all other columns."""

    images: torch.Tensor
    masks: torch.Tensor
    table: pa.Table

    def __len__(self) -> int:
        return len(self.images)

    def native_mask(self, index: int) -> np.ndarray:
        """The label mask of a row as the expert drew it, uint8 [H,W] on the native grid."""
        height, width = self.table["native_shape"][index].as_py()
        raw = zlib.decompress(self.table["native_mask"][index].as_py())
        return np.frombuffer(raw, dtype=np.uint8).reshape(height, width)


def read_part(shards: Shards, part: dict) -> pa.Table:
    """The rows of one part; raises UserError that names the part where its size or hash is not the manifest's."""
    if not PART_NAME.fullmatch(part["file"]):
        raise UserError(f"The manifest of {shards.path} names a part {part['file']!r} that is none.")
    path = storage.join(shards.path, part["file"])
    try:
        data = storage.read_bytes(path)
    except OSError as error:
        raise UserError(f"The shard {path} cannot be read: preprocess again with --overwrite.") from error
    if len(data) != part["bytes"] or storage.sha256(data) != part["sha256"]:
        raise UserError(f"The shard {path} is damaged (not the bytes that were written): preprocess with --overwrite.")
    return storage.read_table(data)


def load_groups(shards: Shards, groups: Iterable[str]) -> dict[str, Frames]:
    """Read the rows of some groups into memory, each part once."""
    wanted = {patient: group for group in groups for patient in shards.groups[group]}
    kept: dict[str, list[pa.Table]] = {group: [] for group in groups}
    for part in shards.manifest["parts"]:
        table = read_part(shards, part)
        owner = np.array([wanted.get(patient, "") for patient in table["patient"].to_pylist()])
        for group, tables in kept.items():
            tables.append(table.filter(pa.array(owner == group)))
    return {group: as_frames(pa.concat_tables(tables), shards.image) for group, tables in kept.items()}


def as_frames(table: pa.Table, image: ImageConfig) -> Frames:
    """A table of rows as tensors; the pixel columns leave the table."""
    images = column_tensor(table["image"], (1, image.height, image.width))
    masks = column_tensor(table["mask"], (image.height, image.width))
    return Frames(images, masks, table.drop_columns(["image", "mask"]))


def column_tensor(column: pa.ChunkedArray, shape: tuple[int, ...]) -> torch.Tensor:
    """A fixed-size binary column as one uint8 tensor [N, *shape] of its own memory."""
    rows = []
    for chunk in column.chunks:
        width = chunk.type.byte_width
        raw = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
        rows.append(raw[chunk.offset * width : (chunk.offset + len(chunk)) * width].reshape(-1, *shape))
    return torch.from_numpy(np.concatenate(rows) if rows else np.empty((0, *shape), np.uint8))
