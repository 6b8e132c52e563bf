"""Writes recordings to Parquet shards, part by part, then a split and, last, the manifest that marks the folder as complete.

`part-00000.json` records the source of `part-00000.parquet`, so that a rerun after an interruption keeps the part.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import interpolate

from heartseg.config.experiment import ImageConfig, SplitConfig, canonical, to_json
from heartseg.datasets import grey, splits
from heartseg.datasets.camus import CamusTree, Recording, names_and_sizes
from heartseg.datasets.image_folder import ImageFolder
from heartseg.datasets.nifti import DamagedRecording
from heartseg.labels import CLASSES
from heartseg.storage import filesystem

Source = CamusTree | ImageFolder
FORMAT = 3
MANIFEST, SPLITS = "manifest.json", "splits.json"
PART_NAME = re.compile(r"part-\d{5}\.parquet")
OURS = re.compile(rf"{PART_NAME.pattern}|part-\d{{5}}\.json|{re.escape(MANIFEST)}|{re.escape(SPLITS)}")
# Left by a killed job: a file that has not been renamed yet.
LEFTOVER = re.compile(rf"\.({OURS.pattern})\.[0-9a-f]{{8}}\.part")
# Measured: fixed-size binary reads back 5 to 9 times faster than Arrow's tensor type; dictionaries and statistics do not pay.
PARQUET = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
PACKING = "zstd"  # of native masks: a seventh of zlib's time for a third of the bytes
PATIENTS_PER_PART = {"stills": 16, "sequence": 4}  # a worker holds a part: 64 stills, or 8 sequences of 10 to 40 frames
INFO_COLUMNS = {
    "quality": pa.string(), "ef": pa.float64(), "ef_convention": pa.string(),
    "sex": pa.string(), "age": pa.int32(), "frame_rate": pa.float64(),
}  # fmt: skip


def schema(image: ImageConfig) -> pa.Schema:
    """Columns of a part; dtype and shape of the pixel columns are in the metadata."""
    pixels = image.height * image.width
    # Under Parquet's name for list items, so that a part reads back with the schema that was written.
    reals, sizes = (pa.list_(pa.field("element", kind), 2) for kind in (pa.float64(), pa.int32()))
    columns = {
        "patient": pa.string(), "view": pa.string(), "phase": pa.string(), "frame": pa.int32(),
        "image": pa.binary(pixels), "mask": pa.binary(pixels), "spacing_mm": reals,
        "native_mask": pa.binary(), "native_shape": sizes, "native_spacing_mm": reals,
    } | INFO_COLUMNS  # fmt: skip
    tensors = {
        "image": {"dtype": "uint8", "shape": [1, image.height, image.width]},
        "mask": {"dtype": "uint8", "shape": [image.height, image.width]},
        "native_mask": {"dtype": "uint8", "shape": "native_shape", "compression": PACKING},
    }
    return pa.schema(list(columns.items()), metadata={"heartseg.tensors": json.dumps(tensors)})


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An upright uint8 image on another grid, bilinear and antialiased."""
    pixels = torch.from_numpy(image)[None, None].float()
    # Without shrinking, antialiasing changes nothing, and the plain filter takes two thirds of the time.
    shrinks = height < image.shape[0] or width < image.shape[1]
    resized = interpolate(pixels, (height, width), mode="bilinear", antialias=shrinks, align_corners=False)
    return np.rint(resized[0, 0].numpy()).astype(np.uint8)  # averages stay within 0 to 255


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A label mask on another grid, by nearest neighbour at pixel centres; labels are never interpolated."""
    labels = torch.from_numpy(mask)[None, None]
    return interpolate(labels, (height, width), mode="nearest-exact")[0, 0].numpy()


def make_row(recording: Recording, image: ImageConfig) -> dict:
    """The shard row of a recording that has a mask."""
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
        "native_mask": pa.compress(recording.mask.tobytes(), codec=PACKING, asbytes=True),
        "native_shape": list(native_shape),
        "native_spacing_mm": list(recording.spacing_mm),
        **{name: getattr(recording.info, name, None) for name in INFO_COLUMNS},
    }


def write_part(
    source: Source, out: str, name: str, patients: list[str], image: ImageConfig, frames: str = "stills", listing=None
) -> dict:
    """Write one part and its sidecar, or keep them from an interrupted job; returns the part's record.

    A part that lacks recordings is always written again: their files may have been repaired.
    """
    path = filesystem.join(out, name)
    listing = listing or source.list_files(patients)
    made_from = {"format": FORMAT, "image": to_json(image), "frames": frames, "listing": listing}
    sidecar = read_sidecar(path)
    if sidecar and sidecar["made_from"] == made_from and not sidecar["record"]["quarantined"]:
        with contextlib.suppress(FileNotFoundError):
            if filesystem.sha256(filesystem.read_bytes(path)) == sidecar["record"]["sha256"]:
                return sidecar["record"]
    rows, records, quarantined = [], {}, []
    for patient in patients:
        files = [file for file, *_ in listing[patient]]
        patient_rows, records[patient], damaged = read_patient(source, patient, files, image, frames)
        rows += patient_rows
        quarantined += damaged
    num_bytes, digest = filesystem.write_table(path, pa.Table.from_pylist(rows, schema(image)), **PARQUET)
    record = {"file": name, "rows": len(rows), "bytes": num_bytes, "sha256": digest}
    record |= {"patients": records, "quarantined": quarantined}
    filesystem.publish(path.removesuffix(".parquet") + ".json", canonical({"made_from": made_from, "record": record}))
    return record


def read_sidecar(part_path: str) -> dict | None:
    """A part's `made_from` and `record`; None if its sidecar is missing or unreadable, as in older shards."""
    try:
        sidecar = json.loads(filesystem.read_bytes(part_path.removesuffix(".parquet") + ".json"))
    except (FileNotFoundError, ValueError):
        return None
    return sidecar if isinstance(sidecar, dict) and {"made_from", "record"} <= sidecar.keys() else None


def read_patient(
    source: Source, patient: str, files: list[str], image: ImageConfig, frames: str
) -> tuple[list[dict], dict, list[dict]]:
    """A patient's shard rows, entry in the manifest, and damaged recordings."""
    rows, damaged, hashes, recordings, levels = [], [], {}, 0, Counter()
    for view, phase, read in source.recordings(patient, files, frames, hashes):
        recordings += 1
        try:
            for recording in read():
                rows.append(make_row(recording, image))
                levels[recording.grey] += 1
        except DamagedRecording as error:
            file = path_below(source.path, error.file)
            damaged.append({"patient": patient, "view": view, "phase": phase, "file": file, "reason": error.reason})
    by_file = {path_below(source.path, path): digest for path, digest in hashes.items()}
    read_files, damaged_stems = set(map(filesystem.last_part, by_file)), {stem_of(entry["file"]) for entry in damaged}
    unread = (file for file in files if filesystem.last_part(file) not in read_files)
    record = {
        "rows": len(rows),
        "recordings": recordings,
        "sha256": filesystem.sha256(canonical(by_file)),
        # The values that balance the groups, so that a split can be drawn without reading rows.
        "ef": next((row["ef"] for row in rows if row["ef"] is not None), None),
        "grey_levels": {grey.describe(found): count for found, count in levels.items()},
        "quality": {row["view"]: row["quality"] for row in rows if row["quality"]},
        # Neither read nor quarantined: other frames, or an unknown name.
        "ignored": [file for file in unread if stem_of(file) not in damaged_stems],
        "intensity_sums": [sum(sums) for sums in zip((0, 0, 0), *map(intensity_sums, rows), strict=True)],
    }
    return rows, record, damaged


def stem_of(file: str) -> str:
    """A file's name without the suffixes that mark its kind."""
    return re.sub(r"(_gt)?\.nii(\.gz)?$", "", filesystem.last_part(file).lower())


def path_below(folder: str, path: str) -> str:
    """A path relative to the source, so that a moved source counts as unchanged."""
    return path.removeprefix(folder).lstrip("/")


def intensity_sums(row: dict) -> tuple[int, int, int]:
    """Exact sum, sum of squares and number of a row's pixels, from which the mean and deviation of any split follow."""
    pixels = np.frombuffer(row["image"], dtype=np.uint8).astype(np.float64)  # whole numbers far below 2**53
    # Not `@`: BLAS would wake a thread on each core for every picture.
    return int(pixels.sum()), int(np.einsum("i,i", pixels, pixels)), pixels.size


def write_manifest(
    out: str, dataset: str, image: ImageConfig, parts: list[dict], listing: dict, frames: str = "stills", official=None
) -> dict:
    """Write the manifest of finished parts (records of `write_part`, in order), which makes the folder complete."""
    patients = {patient: record for part in parts for patient, record in part["patients"].items()}
    manifest = {
        "format": FORMAT,
        "dataset": dataset,
        "dataset_is_marked": True,  # by a note in the source or by the user; older versions guessed it from patients' names
        "frames": frames,
        "image": to_json(image),
        "classes": list(CLASSES),
        # The patients identify the parts that hold a group's rows, before any part is read.
        "parts": [
            {key: part[key] for key in ("file", "rows", "bytes", "sha256")} | {"patients": sorted(part["patients"])}
            for part in parts
        ],
        "rows": sum(part["rows"] for part in parts),
        "patients": patients,
        "official_groups": official or {},
        "quarantined": [entry for part in parts for entry in part["quarantined"]],
        "source_listing": listing_hash([part["patients"] for part in parts], listing),
        "source_sha256": filesystem.sha256(canonical({name: record["sha256"] for name, record in patients.items()})),
    }
    filesystem.publish_json(filesystem.join(out, MANIFEST), manifest)
    return manifest


def listing_hash(patients_of_parts: Iterable[Iterable[str]], listing: dict[str, list]) -> str:
    """One hash of a source's file names and sizes, by part; modification times would tie it to one copy."""
    found = names_and_sizes(listing)
    return filesystem.sha256(canonical([{p: found.get(p, []) for p in patients} for patients in patients_of_parts]))


def part_names(patients: list[str], frames: str = "stills") -> list[tuple[str, list[str]]]:
    """File name and patients of each of a source's parts."""
    size = PATIENTS_PER_PART[frames]
    return [(f"part-{i:05d}.parquet", patients[s : s + size]) for i, s in enumerate(range(0, len(patients), size))]


def write_splits(out: str, config: SplitConfig, manifest_patients: dict, official: dict[str, list[str]]) -> dict:
    """Write `splits.json` for the patients that have rows; returns the groups."""
    groups = splits.make_groups(config, list(manifest_patients), official, manifest_patients)
    filesystem.publish_json(filesystem.join(out, SPLITS), {"config": to_json(config), "groups": groups})
    return groups


def remove_leftovers(out: str, shards: bool = False) -> None:
    """Delete a killed job's half-written files and, with `shards`, the shards too; needs the folder's lock."""
    names = [name for name in filesystem.list_names(out) if LEFTOVER.fullmatch(name) or (shards and OURS.fullmatch(name))]
    for name in sorted(names, key=lambda name: name != MANIFEST):  # the manifest first: half a folder must not look complete
        filesystem.remove(filesystem.join(out, name))
