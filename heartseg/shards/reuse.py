"""Whether shards that are there may stay: the parts of an interrupted call, and a finished folder, held against their source.

What is damaged, or made from something else, is refused by the name of the part or of the file that changed.
"""

import json
import re
from collections.abc import Iterable
from datetime import datetime, timedelta

import pyarrow as pa

from heartseg.config.experiment import canonical, first_difference
from heartseg.datasets.nifti import DamagedRecording, read_source
from heartseg.datasets.source import file_paths
from heartseg.errors import UserError
from heartseg.storage import filesystem

PART_NAME = re.compile(r"part-\d{5}\.parquet")
NOTE = b"heartseg.part"
# Measured: fixed-size binary columns read back 5 to 9 times faster than Arrow's tensor type, and neither a dictionary nor
# statistics pay for pixels. By its checksums a part that no manifest lists yet shows damage; they take 1 ms of its 100.
PARQUET = {
    "compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False,
    "write_page_checksum": True,
}  # fmt: skip
# The source and the shards may lie on machines whose clocks differ, and a file may change while its part is written.
MARGIN = timedelta(hours=1)


def sealed(value: dict) -> dict:
    """A value with the hash of the rest of it under `seal`, by which a change of the file is seen."""
    rest = {key: inner for key, inner in value.items() if key != "seal"}
    return rest | {"seal": filesystem.sha256(canonical(rest))}


def take_part(path: str, source: str, asked: dict) -> dict | None:
    """What a finished part says of itself; None where it is to be written anew.

    That is where it lacks recordings that were damaged and may be mended by now, and where another version wrote it. `asked`
    is what the part is to be made from. Raises UserError where it is damaged, or made from something else: a file of the
    source with other bytes than it had is that too.
    """
    data = filesystem.read_bytes(path)
    try:
        table = filesystem.read_table(data, verify=True)
        note = json.loads((table.schema.metadata or {}).get(NOTE, b"{}"))
        # The source's files are held against each other below, one by one.
        others = [key for key in asked if key != "listing"]
        difference = first_difference({key: note.get(key) for key in others}, {key: asked[key] for key in others})
        if not difference and (note != sealed(note) or note["rows"] != table.num_rows):  # earlier formats have no seal
            raise ValueError(f"{path} has another seal")
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged: remove it, and the same command writes it anew.") from error
    same_patients = not difference and note["listing"].keys() == asked["listing"].keys()
    # The checksums leave out headers and footer, but of whole rows these come out the same again.
    if same_patients and (note["quarantined"] or filesystem.table_bytes(table, **PARQUET) != data):
        return None
    difference = difference or changed_names(note["listing"], asked["listing"]) or changed_bytes(source, note["source_files"])
    if difference:
        raise UserError(f"{path} was made from something else ({difference}): give --overwrite, or another --out.")
    return note | {"bytes": len(data), "sha256": filesystem.sha256(data)}


def changed_names(there: dict[str, list], now: dict[str, list]) -> str | None:
    """The first file that came, went or has another size, by two listings of patients' files; None where there is none."""
    for patient in sorted(there.keys() | now.keys()):
        if patient not in there or patient not in now:
            return f"{patient} is {'new' if patient in now else 'gone'}"
        old, new = dict(there[patient]), dict(now[patient])
        for name in sorted(old.keys() | new.keys()):
            if name not in old or name not in new:
                return f"{name} of {patient} is {'new' if name in new else 'gone'}"
            if old[name] != new[name]:
                return f"{name} of {patient}: {old[name]} bytes then, {new[name]} now"
    return None


def changed_bytes(source: str, hashes: dict[str, str]) -> str | None:
    """The first file below `source` that has not its SHA-256 any more; None where there is none. Nothing is decoded."""
    for name, digest in sorted(hashes.items()):
        try:
            if filesystem.sha256(read_source(filesystem.join(source, name))) != digest:
                return f"{name} has other bytes than it had"
        except DamagedRecording as error:
            return f"{name} {error.reason}"
    return None


def changed_source(out: str, manifest: dict, source: str, listing: dict[str, list]) -> str | None:
    """The first file of a source that is not as it was when finished shards were made from it; None where there is none.

    All are compared by name and size; by their bytes those that were written since, or up to MARGIN before. A file of equal
    size that was given an old time goes unnoticed.
    """
    parts = manifest["parts"]
    now = listing_hash([{name: listing.get(name, []) for name in part["patients"]} for part in parts])
    if now != manifest["source_listing"] or listing.keys() != manifest["patients"].keys():
        there = [read_note(filesystem.join(out, part["file"]))["listing"] for part in parts]
        return changed_names({name: files for each in there for name, files in each.items()}, listing)
    times = filesystem.modification_times(out)
    written = [times[part["file"]] for part in parts if part["file"] in times]
    young = young_files(source, listing, min(written) - MARGIN) if written else {}
    for part in parts:
        if mine := {path for patient in part["patients"] for path in young.get(patient, [])}:
            hashes = read_note(filesystem.join(out, part["file"]))["source_files"]
            if changed := changed_bytes(source, {path: hashes[path] for path in mine & hashes.keys()}):
                return changed
    return None


def young_files(source: str, listing: dict[str, list], since: datetime) -> dict[str, list[str]]:
    """Paths below `source` of the files that were written after a moment, by patient; patients without one are left out."""
    times: dict[str, dict] = {}
    young: dict[str, list[str]] = {}
    for patient, paths in file_paths(source, listing).items():
        for path in paths:
            folder, _, name = path.rpartition("/")
            if folder not in times:
                times[folder] = filesystem.modification_times(filesystem.join(source, folder))
            if name in times[folder] and times[folder][name] > since:
                young.setdefault(patient, []).append(path)
    return young


def read_note(path: str) -> dict:
    """What a part says of itself; raises UserError where it is damaged."""
    try:
        note = json.loads(filesystem.read_table_metadata(path)[NOTE])
        if note != sealed(note):
            raise ValueError(f"{path} has another seal")
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"The shard {path} is damaged: preprocess with --overwrite.") from error
    return note


def listing_hash(listings: list[dict[str, list]]) -> str:
    """The hash that a manifest keeps of its source's file names and sizes, from the listing of each part."""
    return filesystem.sha256(canonical(listings))


def check_parts(out: str, parts: Iterable[dict]) -> None:
    """Raise UserError for the first part that is not in the folder with its bytes: one that another node wrote elsewhere."""
    there = filesystem.sizes(out)
    for part in parts:
        if there.get(part["file"]) != part["bytes"]:
            path = filesystem.join(out, part["file"])
            raise UserError(f"{path} is not there as it was written: every node must see --out, so give a folder they share.")


def check_strays(out: str, names: Iterable[str]) -> None:
    """Raise UserError for a part in the folder that is none of `names`: no manifest would list it."""
    strays = {name for name in filesystem.list_names(out) if PART_NAME.fullmatch(name)} - set(names)
    if strays:
        path = filesystem.join(out, min(strays))
        raise UserError(f"{path} is a part of other shards: remove it, or give --overwrite or another --out.")
