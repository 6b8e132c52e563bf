"""Turns a source into a complete folder of shards; finished parts are kept, and a folder of other data is refused."""

import itertools
from collections.abc import Callable, Iterable

from heartseg.config.experiment import ImageConfig, SplitConfig, first_difference, from_json, to_json
from heartseg.datasets import splits
from heartseg.errors import UserError
from heartseg.shards import reader, writer
from heartseg.shards.reader import Shards
from heartseg.storage import filesystem, locks

MAX_QUARANTINED = 0.01  # largest share of the recordings that may be damaged
MapParts = Callable[[list[tuple]], Iterable[dict]]


def write_parts_here(tasks: list[tuple]) -> Iterable[dict]:
    """Write all parts one after another in this process; yields their records."""
    return itertools.starmap(writer.write_part, tasks)


def write_shards(
    source: writer.Source,
    out: str,
    image: ImageConfig,
    split: SplitConfig,
    frames: str = "stills",
    max_quarantined: float = MAX_QUARANTINED,
    overwrite: bool = False,
    resplit: bool = False,
    map_parts: MapParts = write_parts_here,
) -> Shards:
    """Write the missing parts of a source's shards, and the split; returns the shards.

    `map_parts` calls `writer.write_part` with each tuple of arguments and returns the records in any order. Raises UserError if
    a complete folder holds other data or another split (unless `resplit`), or if too many recordings are damaged.
    """
    patients, official = source.patients(), source.groups()
    source.check_frames(patients, frames)
    if split.kind == "official":
        splits.check_official(patients, official)
    splits.make_groups(split, patients, official)
    with locks.lock(out):
        writer.remove_leftovers(out, shards=overwrite)
        if filesystem.exists(filesystem.join(out, writer.MANIFEST)):
            manifest = check_same(source, out, image, frames)
            if not resplit:
                check_split(out, split, manifest, official)
            now = {"official_groups": official, "dataset": source.dataset_name(), "dataset_is_marked": True}
            if manifest != manifest | now:
                manifest |= now
                filesystem.publish_json(filesystem.join(out, writer.MANIFEST), manifest)
        else:
            listing = source.list_files(patients)
            parts = write_parts(source, listing, out, image, frames, map_parts)
            damaged = [entry for part in parts for entry in part["quarantined"]]
            total = sum(record["recordings"] for part in parts for record in part["patients"].values())
            if len(damaged) > max_quarantined * total:
                first = "{file} {reason}".format(**damaged[0])
                problem = f"{len(damaged)} of {total} recordings cannot be used (first: {first})"
                fix = f"correct them and rerun the same command, or raise --max-quarantined (now {max_quarantined:g})"
                raise UserError(f"{problem}: {fix}.")
            manifest = writer.write_manifest(out, source.dataset_name(), image, parts, listing, frames, official)
        return Shards(out, manifest, writer.write_splits(out, split, manifest["patients"], official))


def write_parts(
    source: writer.Source, listing: dict[str, list], out: str, image: ImageConfig, frames: str, map_parts: MapParts
) -> list[dict]:
    """Write the parts of all patients of a listing; returns their records, in order."""
    parts = dict(writer.part_names(list(listing), frames))
    for name in filesystem.list_names(out):
        if writer.PART_NAME.fullmatch(name) and name not in parts:
            raise UserError(f"{out}/{name} belongs to other shards: remove it, or give --overwrite or another --out.")
    tasks = [(source, out, name, chunk, image, frames, {p: listing[p] for p in chunk}) for name, chunk in parts.items()]
    records = {record["file"]: record for record in map_parts(tasks)}
    sizes = {name: size for name, size, _ in filesystem.list_files(out)}
    for name, record in records.items():
        if sizes.get(name) != record["bytes"]:
            raise UserError(f"{out}/{name} is missing or incomplete: every node must see --out, so give a shared folder.")
    return [records[name] for name in parts]


def check_same(source: writer.Source, out: str, image: ImageConfig, frames: str) -> dict:
    """The manifest of a complete folder; raises UserError if its settings differ, or if its source or a part has changed."""
    manifest = reader.read_manifest(out)
    there = {"image": manifest["image"], "frames": manifest.get("frames")}
    difference = first_difference(there, {"image": to_json(image), "frames": frames})
    if difference := difference or changed_file(out, manifest, source.list_files(source.patients())):
        raise UserError(f"{out} holds other shards ({difference}): give --overwrite, or another --out.")
    reader.check_sizes(Shards(out, manifest, {}))
    return manifest


def changed_file(out: str, manifest: dict, listing: dict[str, list]) -> str | None:
    """The first file of the source that is new, gone or changed since the shards were written, otherwise None."""
    sidecars = [writer.read_sidecar(filesystem.join(out, part["file"])) for part in manifest["parts"]]
    if not all(sidecars):  # written by a version that kept one hash of all names and sizes
        now = writer.listing_hash([part["patients"] for part in manifest["parts"]], listing)
        same = now == manifest["source_listing"] and listing.keys() == manifest["patients"].keys()
        return None if same else "files of the source were added, removed or changed in size"
    recorded = {name: files for sidecar in sidecars for name, files in sidecar["made_from"]["listing"].items()}
    both = (recorded, listing)
    old, new = ({f"{name} of {p}": rest for p, files in found.items() for name, *rest in files} for found in both)
    for file in sorted(old.keys() | new.keys()):
        if old.get(file) != new.get(file):
            return f"{file} {'is new' if file not in old else 'is gone' if file not in new else 'has changed'}"
    return None


def check_split(out: str, split: SplitConfig, manifest: dict, official: dict[str, list[str]]) -> None:
    """Raise UserError if a complete folder's split is not the requested one, or not the source's current `official` one."""
    path, patients = filesystem.join(out, writer.SPLITS), manifest["patients"]
    if not filesystem.exists(path):
        return
    written = reader.read_split(out)
    difference = first_difference(to_json(from_json(written.get("config", {}), SplitConfig, path)), to_json(split), "split.")
    if not difference:
        there = splits.group_of(written["groups"])
        by_source = splits.group_of(splits.make_groups(split, list(patients), official, patients))
        if moved := sorted(there.items() ^ by_source.items()):
            name = moved[0][0]
            difference = f"{name}: {there.get(name)} there, {by_source.get(name)} in the source"
    if difference:
        raise UserError(f"{out} is split differently ({difference}): give --resplit, or another --out.")


def split_again(out: str, split: SplitConfig) -> Shards:
    """Divide the patients of a complete folder differently, without its source."""
    with locks.lock(out):
        manifest = reader.read_manifest(out)
        return Shards(out, manifest, writer.write_splits(out, split, manifest["patients"], manifest["official_groups"]))
