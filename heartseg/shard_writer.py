"""Recordings to Parquet shards, a part at a time, with a manifest and a split.

A part is whole or not there, and equal sources make equal bytes, so that an interrupted call goes on where it stood. The
manifest is written last: a folder that has one is complete.
"""

import hashlib
import json
import re

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import interpolate

from heartseg import sources, splits, storage
from heartseg.camus import Recording
from heartseg.config import ImageConfig, SplitConfig, canonical, first_difference, to_json
from heartseg.errors import UserError
from heartseg.labels import CLASSES
from heartseg.nifti import DamagedRecording

FORMAT = 2
MANIFEST, SPLITS = "manifest.json", "splits.json"
PART_NAME = re.compile(r"part-\d{5}\.parquet")
# Native masks are packed one by one; zstd takes a seventh of zlib's time for a third of the bytes.
PACKING = "zstd"
# A worker holds one part in memory: 64 stills, or 8 sequences of 10 to 40 frames.
PATIENTS_PER_PART = {"stills": 16, "sequence": 4}
# What a killed call may leave: a file that was not yet given its name.
LEFTOVER = re.compile(rf"\.({PART_NAME.pattern}|{re.escape(MANIFEST)}|{re.escape(SPLITS)})\.[0-9a-f]{{8}}\.part")
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
        "native_mask": {"dtype": "uint8", "shape": "native_shape", "compression": PACKING},
    }
    metadata = {"heartseg.tensors": json.dumps(tensors), "heartseg.part": canonical(note).decode()}
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


def write_part(source: str, out: str, name: str, patients: list[str], image: ImageConfig, frames: str = "stills") -> dict:
    """Write one part, or take it as it is where an earlier, interrupted call has finished it; returns its record.

    `frames` is one of sources.FRAMES. Raises UserError where the part there was made from another configuration or source.
    """
    path = storage.join(out, name)
    listing = sources.list_files(source, patients)
    asked = json.loads(canonical({"format": FORMAT, "image": to_json(image), "frames": frames, "listing": listing}))
    if storage.exists(path):
        return take_part(path, name, asked)
    rows, note = [], asked | {"patients": {}, "quarantined": []}
    for patient in patients:
        files = [file for file, _ in listing[patient]]
        patient_rows, record, damaged = read_patient(source, patient, files, image, frames)
        rows += patient_rows
        note["patients"][patient] = record
        note["quarantined"] += damaged
    note["rows"] = len(rows)
    num_bytes, digest = storage.write_table(path, pa.Table.from_pylist(rows, schema(image, note)), **PARQUET)
    return {"file": name, "bytes": num_bytes, "sha256": digest, **note}


def take_part(path: str, name: str, asked: dict) -> dict:
    """The record of a finished part; raises UserError where it is damaged or made from something else than `asked`."""
    try:
        note = json.loads(storage.read_table_metadata(path).get(b"heartseg.part", b"{}"))
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: give --overwrite, or another --out.") from error
    difference = first_difference({key: note.get(key) for key in asked}, asked)
    if difference:
        raise UserError(f"{path} was made from something else ({difference}): give --overwrite, or another --out.")
    data = storage.read_bytes(path)
    return {"file": name, "bytes": len(data), "sha256": storage.sha256(data), **note}


def read_patient(
    source: str, patient: str, files: list[str], image: ImageConfig, frames: str
) -> tuple[list[dict], dict, list[dict]]:
    """A patient's shard rows, what the manifest keeps of them, and the recordings that were damaged."""
    rows, damaged, digest, recordings = [], [], hashlib.sha256(), 0
    for view, phase, read in sources.recordings(source, patient, files, frames, digest):
        recordings += 1
        try:
            rows += [make_row(recording, image) for recording in read()]
        except DamagedRecording as error:
            file = error.file.removeprefix(source).lstrip("/")
            damaged.append({"patient": patient, "view": view, "phase": phase, "file": file, "reason": error.reason})
    record = {"rows": len(rows), "recordings": recordings, "sha256": digest.hexdigest()}
    # What groups of patients are balanced by, kept here so that a split needs no look at the rows.
    record["ef"] = next((row["ef"] for row in rows if row["ef"] is not None), None)
    record["quality"] = {row["view"]: row["quality"] for row in rows if row["quality"]}
    record["intensity_sums"] = [sum(sums) for sums in zip((0, 0, 0), *map(intensity_sums, rows), strict=True)]
    return rows, record, damaged


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
        "source_listing": storage.sha256(canonical([part["listing"] for part in parts])),
        "source_sha256": storage.sha256(canonical({name: record["sha256"] for name, record in patients.items()})),
    }
    storage.publish_json(storage.join(out, MANIFEST), sealed(manifest))
    return manifest


def sealed(value: dict) -> dict:
    """A value with the hash of the rest of it under `seal`, by which a change of the file is seen."""
    rest = {key: inner for key, inner in value.items() if key != "seal"}
    return rest | {"seal": storage.sha256(canonical(rest))}


def source_listing(source: str, patients: list[str], frames: str = "stills") -> str:
    """The hash that `write_manifest` keeps of a source's file names and sizes, computed without reading the files."""
    listing = sources.list_files(source, patients)
    return storage.sha256(canonical([{p: listing[p] for p in chunk} for _, chunk in part_names(patients, frames)]))


def write_splits(out: str, config: SplitConfig, manifest_patients: dict, official: dict[str, list[str]]) -> dict:
    """Write `splits.json` for the patients that have rows; returns the groups."""
    patients = [name for name, record in manifest_patients.items() if record["rows"]]
    groups = splits.make_groups(config, patients, official, manifest_patients)
    storage.publish_json(storage.join(out, SPLITS), sealed({"config": to_json(config), "groups": groups}))
    return groups


def remove_leftovers(out: str) -> None:
    """Delete what a killed call left half written; only the holder of the folder's lock may."""
    for name in storage.list_names(out):
        if LEFTOVER.fullmatch(name):
            storage.remove(storage.join(out, name))


def remove_shards(out: str) -> None:
    """Delete shards and nothing else; the manifest goes first, so that nothing damaged looks complete."""
    for name in (MANIFEST, SPLITS):
        storage.remove(storage.join(out, name))
    for name in storage.list_names(out):
        if PART_NAME.fullmatch(name):
            storage.remove(storage.join(out, name))
