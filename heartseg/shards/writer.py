"""Recordings to Parquet shards, a part at a time, with a manifest and a split.

A part is whole or not there, and equal sources make equal bytes, so that an interrupted call goes on where it stood. The
manifest is written last: a folder that has one is complete.
"""

import json
import re

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import interpolate

from heartseg.config.experiment import ImageConfig, SplitConfig, canonical, to_json
from heartseg.datasets import splits
from heartseg.datasets.camus import Recording
from heartseg.datasets.nifti import DamagedRecording
from heartseg.datasets.source import list_files
from heartseg.datasets.source import recordings as read_recordings
from heartseg.labels import CLASSES
from heartseg.shards import reuse
from heartseg.shards.reuse import NOTE, PARQUET, PART_NAME, listing_hash, sealed
from heartseg.storage import filesystem

FORMAT = 3
MANIFEST, SPLITS = "manifest.json", "splits.json"
# Native masks are packed one by one; zstd takes a seventh of zlib's time for a third of the bytes.
PACKING = "zstd"
# A worker holds one part in memory: 64 stills, or 8 sequences of 10 to 40 frames.
PATIENTS_PER_PART = {"stills": 16, "sequence": 4}
# What a killed call may leave: a file that was not yet given its name.
LEFTOVER = re.compile(rf"\.({PART_NAME.pattern}|{re.escape(MANIFEST)}|{re.escape(SPLITS)})\.[0-9a-f]{{8}}\.part")
INFO_COLUMNS = {
    "quality": pa.string(), "ef": pa.float64(), "ef_convention": pa.string(),
    "sex": pa.string(), "age": pa.int32(), "frame_rate": pa.float64(),
}  # fmt: skip


def pair_of(kind: pa.DataType) -> pa.DataType:
    """Two values of a kind, under the name that Parquet gives them: what was read is written again with the same bytes."""
    return pa.list_(pa.field("element", kind), 2)


def schema(image: ImageConfig, note: dict) -> pa.Schema:
    """Columns of a part; dtype and shape of the pixel columns and the part's `note` stand in the metadata."""
    pixels = image.height * image.width
    columns = {
        "patient": pa.string(), "view": pa.string(), "phase": pa.string(), "frame": pa.int32(),
        "image": pa.binary(pixels), "mask": pa.binary(pixels), "spacing_mm": pair_of(pa.float64()),
        "native_mask": pa.binary(), "native_shape": pair_of(pa.int32()),
        "native_spacing_mm": pair_of(pa.float64()),
    } | INFO_COLUMNS  # fmt: skip
    tensors = {
        "image": {"dtype": "uint8", "shape": [1, image.height, image.width]},
        "mask": {"dtype": "uint8", "shape": [image.height, image.width]},
        "native_mask": {"dtype": "uint8", "shape": "native_shape", "compression": PACKING},
    }
    metadata = {"heartseg.tensors": json.dumps(tensors), NOTE.decode(): canonical(note).decode()}
    return pa.schema(list(columns.items()), metadata=metadata)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An upright uint8 image on another grid, bilinear and antialiased."""
    pixels = torch.from_numpy(image)[None, None].float()
    # Where nothing shrinks the antialiasing filter is the plain one, at two thirds of the time.
    shrinks = height < image.shape[0] or width < image.shape[1]
    resized = interpolate(pixels, (height, width), mode="bilinear", antialias=shrinks, align_corners=False)
    return np.rint(resized[0, 0].numpy()).astype(np.uint8)  # averages leave 0 to 255 nowhere


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A label mask on another grid by nearest neighbour at pixel centres; labels are never interpolated."""
    labels = torch.from_numpy(mask)[None, None]
    return interpolate(labels, (height, width), mode="nearest-exact")[0, 0].numpy()


def pack_mask(mask: np.ndarray) -> bytes:
    """A native label mask uint8 [H,W] as a row holds it."""
    return pa.compress(mask.tobytes(), codec=PACKING, asbytes=True)


def unpack_mask(packed: bytes, height: int, width: int) -> np.ndarray:
    """The label mask uint8 [H,W] in the bytes of `pack_mask`."""
    raw = pa.decompress(packed, decompressed_size=height * width, codec=PACKING, asbytes=True)
    return np.frombuffer(raw, dtype=np.uint8).reshape(height, width)


def make_row(recording: Recording, image: ImageConfig) -> dict:
    """One shard row of a recording that has a mask."""
    native_shape = recording.image.shape
    grid = (image.height, image.width)
    spacing_mm = [mm * old / new for mm, old, new in zip(recording.spacing_mm, native_shape, grid, strict=True)]
    return {
        "patient": recording.patient,
        "view": str(recording.view) if recording.view else None,
        "phase": str(recording.phase) if recording.phase else None,
        "frame": recording.frame,
        "image": resize_image(recording.image, *grid).tobytes(),
        "mask": resize_mask(recording.mask, *grid).tobytes(),
        "spacing_mm": spacing_mm,
        "native_mask": pack_mask(recording.mask),
        "native_shape": list(native_shape),
        "native_spacing_mm": list(recording.spacing_mm),
        **{name: getattr(recording.info, name, None) for name in INFO_COLUMNS},
    }


def part_names(patients: list[str], frames: str = "stills") -> list[tuple[str, list[str]]]:
    """The parts that a source's patients fall into: file name and patients, in order."""
    size = PATIENTS_PER_PART[frames]
    return [(f"part-{i:05d}.parquet", patients[s : s + size]) for i, s in enumerate(range(0, len(patients), size))]


def write_part(
    source: str,
    out: str,
    name: str,
    patients: list[str],
    image: ImageConfig,
    frames: str = "stills",
    listing: dict[str, list] | None = None,
) -> dict:
    """Write one part, or take it as it is where an earlier, interrupted call has finished it; returns its record.

    `frames` is one of sources.FRAMES, `listing` the patients' `source.list_files` where the caller has it. A part that
    lacks recordings is written anew, since they may be mended. Raises UserError where the part there is damaged or was made
    from another configuration or source.
    """
    path = filesystem.join(out, name)
    listing = listing or list_files(source, patients)
    asked = json.loads(canonical({"format": FORMAT, "image": to_json(image), "frames": frames, "listing": listing}))
    taken = reuse.take_part(path, source, asked) if filesystem.exists(path) else None
    if taken:
        return {"file": name, **taken}
    rows, note = [], asked | {"patients": {}, "quarantined": [], "source_files": {}}
    for patient in patients:
        files = [file for file, _ in listing[patient]]
        patient_rows, record, damaged, hashes = read_patient(source, patient, files, image, frames)
        rows += patient_rows
        note["patients"][patient] = record
        note["quarantined"] += damaged
        note["source_files"] |= hashes
    note["rows"] = len(rows)
    table = pa.Table.from_pylist(rows, schema(image, sealed(note)))
    num_bytes, digest = filesystem.write_table(path, table, **PARQUET)
    return {"file": name, "bytes": num_bytes, "sha256": digest, **note}


def read_patient(
    source: str, patient: str, files: list[str], image: ImageConfig, frames: str
) -> tuple[list[dict], dict, list[dict], dict[str, str]]:
    """A patient's shard rows, what the manifest keeps of them, the damaged recordings, and the SHA-256 of each file read."""
    rows, damaged, by_path, recordings = [], [], {}, 0
    for view, phase, read in read_recordings(source, patient, files, frames, by_path):
        recordings += 1
        try:
            rows += [make_row(recording, image) for recording in read()]
        except DamagedRecording as error:
            file = below(source, error.file)
            damaged.append({"patient": patient, "view": view, "phase": phase, "file": file, "reason": error.reason})
    hashes = {below(source, path): digest for path, digest in by_path.items()}
    record = {"rows": len(rows), "recordings": recordings, "sha256": filesystem.sha256(canonical(hashes))}
    # What groups of patients are balanced by, kept here so that a split needs no look at the rows.
    record["ef"] = next((row["ef"] for row in rows if row["ef"] is not None), None)
    record["quality"] = {row["view"]: row["quality"] for row in rows if row["quality"]}
    record["intensity_sums"] = [sum(sums) for sums in zip((0, 0, 0), *map(intensity_sums, rows), strict=True)]
    return rows, record, damaged, hashes


def below(source: str, path: str) -> str:
    """A path without the folder of the source, so that a moved source is the same one."""
    return path.removeprefix(source).lstrip("/")


def intensity_sums(row: dict) -> tuple[int, int, int]:
    """Sum, sum of squares and number of a row's pixels: exact, so that any split's mean and deviation follow from them."""
    pixels = np.frombuffer(row["image"], dtype=np.uint8).astype(np.float64)  # whole numbers far below 2**53
    # Not `@`: BLAS would wake a thread on each core for every picture.
    return int(pixels.sum()), int(np.einsum("i,i", pixels, pixels)), pixels.size


def write_manifest(
    out: str, source_name: str, image: ImageConfig, parts: list[dict], frames: str = "stills", official: dict | None = None
) -> dict:
    """Write the manifest of finished parts (records of `write_part`, in order): the folder is complete with it.

    `official` is the split that the source comes with, kept so that shards can be divided anew without their source.
    """
    patients = {patient: record for part in parts for patient, record in part["patients"].items()}
    manifest = {
        "format": FORMAT,
        "dataset": source_name,
        "frames": frames,
        "image": to_json(image),
        "classes": list(CLASSES),
        # The patients say which parts hold a group's rows, before any part is read.
        "parts": [
            {key: part[key] for key in ("file", "rows", "bytes", "sha256")} | {"patients": sorted(part["patients"])}
            for part in parts
        ],
        "rows": sum(part["rows"] for part in parts),
        "patients": patients,
        "official_groups": official or {},
        "quarantined": [entry for part in parts for entry in part["quarantined"]],
        "source_listing": listing_hash([part["listing"] for part in parts]),
        "source_sha256": filesystem.sha256(canonical({name: record["sha256"] for name, record in patients.items()})),
    }
    filesystem.publish_json(filesystem.join(out, MANIFEST), sealed(manifest))
    return manifest


def keep_groups(out: str, manifest: dict, official: dict[str, list[str]]) -> None:
    """Write into a finished folder's manifest how its source divides itself by now; nothing else in it changes."""
    if manifest["official_groups"] != official:
        filesystem.publish_json(filesystem.join(out, MANIFEST), sealed(manifest | {"official_groups": official}))


def source_listing(source: str, patients: list[str], frames: str = "stills") -> str:
    """The hash that `write_manifest` keeps of a source's file names and sizes, computed without reading the files."""
    listing = list_files(source, patients)
    return listing_hash([{p: listing[p] for p in chunk} for _, chunk in part_names(patients, frames)])


def write_splits(out: str, config: SplitConfig, manifest_patients: dict, official: dict[str, list[str]]) -> dict:
    """Write `splits.json` for the patients that have rows; returns the groups."""
    groups = make_groups(config, manifest_patients, official)
    filesystem.publish_json(filesystem.join(out, SPLITS), sealed({"config": to_json(config), "groups": groups}))
    return groups


def make_groups(config: SplitConfig, manifest_patients: dict, official: dict[str, list[str]]) -> dict[str, list[str]]:
    """The groups of the patients that have rows."""
    patients = [name for name, record in manifest_patients.items() if record["rows"]]
    return splits.make_groups(config, patients, official, manifest_patients)


def remove_leftovers(out: str) -> None:
    """Delete what a killed call left half written; only the holder of the folder's lock may."""
    for name in filesystem.list_names(out):
        if LEFTOVER.fullmatch(name):
            filesystem.remove(filesystem.join(out, name))


def remove_shards(out: str) -> None:
    """Delete shards and nothing else; the manifest goes first, so that nothing damaged looks complete."""
    for name in (MANIFEST, SPLITS):
        filesystem.remove(filesystem.join(out, name))
    for name in filesystem.list_names(out):
        if PART_NAME.fullmatch(name):
            filesystem.remove(filesystem.join(out, name))
