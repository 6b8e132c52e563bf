"""NIfTI files to Parquet shards: `python jobs/preprocess.py seed --source /data/CAMUS --out /data/shards`.

`--source` is the CAMUS release, or a folder of anybody's images/PATIENT_ANYTHING.nii.gz and masks/PATIENT_ANYTHING.nii.gz
(heartseg/datasets/image_folder.py has the whole layout).
"""

import logging
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from heartseg.config.experiment import Experiment, SplitConfig, first_difference, from_json, to_json
from heartseg.datasets import image_folder, splits
from heartseg.datasets.source import check_frames, dataset_name, find_patients, is_there, list_files, read_groups
from heartseg.errors import UserError, io_errors_as_user_errors, require
from heartseg.shards import reader, reuse, writer
from heartseg.storage import filesystem, locks
from jobs.support import command_line, ray_runtime

log = logging.getLogger("heartseg.jobs")
# A part takes seconds; after so long without one a user is told why.
SECONDS_OF_SILENCE = 60


@dataclass(frozen=True)
class Options:
    """How to preprocess."""

    frames: Literal["stills", "sequence"] = "stills"
    """`stills`: the ED and ES images. `sequence`: every frame of the half sequences, with a phase at ED and at ES only."""
    overwrite: bool = False
    """Begin anew where --out holds shards already."""
    max_quarantined: float = 0.01
    """Largest share of the recordings that may be damaged, 0 to 1."""
    resplit: bool = False
    """Divide shards that are there in another way, also without --source; runs on the old groups will not resume on them."""
    launcher: Literal["ray", "plain"] = "ray"
    """`plain` needs no Ray and uses one process."""


def run(experiment: Experiment, options: Options) -> None:
    """Write the shards of `experiment.source` to `experiment.out`; what an interrupted call finished is kept."""
    out = command_line.require_flag(experiment.out, "--out", "the folder for the shards")
    share = options.max_quarantined
    require(0 <= share <= 1, f"--max-quarantined {share:g} is no share: give one from 0 to 1, as 0.05 for 5 %.")
    complete = filesystem.exists(filesystem.join(out, writer.MANIFEST)) and not options.overwrite
    if complete and options.resplit and not experiment.source:
        with locks.lock(out):
            manifest = reader.read_manifest(out)
            groups = writer.write_splits(out, experiment.split, manifest["patients"], manifest["official_groups"])
    else:
        groups = run_from_source(experiment, options, out)
    print("  ".join(f"{group}: {len(names)} patients" for group, names in groups.items()))


def run_from_source(experiment: Experiment, options: Options, out: str) -> dict[str, list[str]]:
    """Write what is missing of the shards and their split; returns the groups."""
    meaning = f"the folder of the CAMUS release, or one that holds {image_folder.LAYOUT}"
    source = command_line.require_flag(experiment.source, "--source", meaning)
    patients = find_patients(source)
    official = read_groups(source)
    check_frames(source, patients, options.frames)
    splits.make_groups(experiment.split, patients, official)
    with locks.lock(out):
        writer.remove_leftovers(out)
        if options.overwrite:
            writer.remove_shards(out)
        if filesystem.exists(filesystem.join(out, writer.MANIFEST)):
            manifest = check_same(experiment, options, patients)
            reader.check_sizes(reader.Shards(out, manifest, {}))
            check_split(experiment, options, manifest, official)
            writer.keep_groups(out, manifest, official)
            print(f"{out} is complete: {manifest['rows']} images.")
        else:
            manifest = write(experiment, options, patients, official)
        return writer.write_splits(out, experiment.split, manifest["patients"], official)


def write(experiment: Experiment, options: Options, patients: list[str], official: dict[str, list[str]]) -> dict:
    """Write every part and then the manifest; refuses where too much is damaged, and where a part is not there."""
    source, out, image, frames = experiment.source, experiment.out, experiment.image, options.frames
    parts = writer.part_names(patients, frames)
    names = [name for name, _ in parts]
    reuse.check_strays(out, names)
    # A plain folder is listed once; each patient of CAMUS has a folder of its own, which the workers list.
    listing = list_files(source, patients) if image_folder.is_plain_folder(source) else {}
    tasks = [(source, out, name, chunk, image, frames, {p: listing[p] for p in chunk if listing}) for name, chunk in parts]
    records, bar = {}, tqdm(total=len(patients), unit=" patients", desc="preprocess", file=sys.stdout, mininterval=1)
    for record in map_with_ray(tasks, experiment.workers) if options.launcher == "ray" else map_plainly(tasks):
        records[record["file"]] = record
        bar.update(len(record["patients"]))
    bar.close()
    found = [records[name] for name in names]
    show_quarantine(found, options)
    reuse.check_parts(out, found)
    reuse.check_strays(out, names)
    name = dataset_name(source, patients)
    manifest = writer.write_manifest(out, name, image, found, frames, official)
    print(f"{manifest['rows']} images of {len(patients)} patients in {len(found)} parts: {out}")
    return manifest


def map_plainly(tasks: list[tuple]) -> Iterator[dict]:
    """The records of all parts, written here one after the other."""
    return (writer.write_part(*task) for task in tasks)


def map_with_ray(tasks: list[tuple], workers: int) -> Iterator[dict]:
    """The records of all parts as they are finished; at most one part a worker is under way."""
    import ray

    ray_runtime.start_ray(workers)
    write_part = ray.remote(num_cpus=1, max_retries=ray_runtime.MAX_TRIES)(_write_part)
    waiting, under_way = list(reversed(tasks)), []
    while waiting or under_way:
        while waiting and len(under_way) < workers:
            under_way.append(write_part.remote(*waiting.pop()))
        done, under_way = ray.wait(under_way, timeout=SECONDS_OF_SILENCE)
        if not done:
            free, total = (resources.get("CPU", 0) for resources in (ray.available_resources(), ray.cluster_resources()))
            log.info(
                "No part was finished for a while: %d of the cluster's %d CPUs are free; others may hold them.", free, total
            )
        for record in ray.get(done):
            if "error" in record:
                raise record["error"]
            yield record


def _write_part(*task) -> dict:
    """A part's record, or an error, which Ray would wrap in a traceback if it were raised.

    An error is a user's mistake, a store that was away or a disk that refuses.
    """
    source, out = task[:2]
    try:
        with io_errors_as_user_errors(out):
            # Elsewhere than on the first machine, a source that is not there would be patients without files.
            node = socket.gethostname()
            require(is_there(source), f"The source {source} is not there on {node}: every node must see --source.")
            return writer.write_part(*task)
    except UserError as error:
        return {"error": error}


def show_quarantine(parts: list[dict], options: Options) -> None:
    """Print what was damaged; raises UserError where it is more than the allowed share of the recordings."""
    quarantined = [entry for part in parts for entry in part["quarantined"]]
    for entry in quarantined:
        named = " ".join(entry[key] for key in ("patient", "view", "phase") if entry[key])
        print(f"quarantined  {named}  {entry['file']}: {entry['reason']}")
    total = sum(record["recordings"] for part in parts for record in part["patients"].values())
    if len(quarantined) > options.max_quarantined * total:
        raise UserError(
            f"{len(quarantined)} of {total} recordings are damaged, more than --max-quarantined "
            f"{options.max_quarantined:g}: mend them and give the same command again, or allow more with --max-quarantined."
        )


def check_same(experiment: Experiment, options: Options, patients: list[str]) -> dict:
    """The manifest that is there; raises UserError where it is of another configuration, or the source has changed since."""
    manifest, source = reader.read_manifest(experiment.out), experiment.source
    there = {"image": manifest.get("image"), "frames": manifest.get("frames")}
    difference = first_difference(there, {"image": to_json(experiment.image), "frames": options.frames})
    if not difference:
        difference = reuse.changed_source(experiment.out, manifest, source, list_files(source, patients))
    if difference:
        raise UserError(f"{experiment.out} holds other shards ({difference}): give --overwrite, or another --out.")
    return manifest


def check_split(experiment: Experiment, options: Options, manifest: dict, official: dict[str, list[str]]) -> None:
    """Raise UserError where shards are divided in another way than asked and `--resplit` is not given.

    `official` is the source's own split: its files may have been edited since.
    """
    path = filesystem.join(experiment.out, writer.SPLITS)
    if options.resplit or not filesystem.exists(path):
        return
    split = filesystem.read_json(path)
    there = from_json(split.get("config", {}), SplitConfig, path)
    difference = first_difference(to_json(there), to_json(experiment.split), "split.")
    if not difference and split == reuse.sealed(split):  # a damaged one is written anew
        written = splits.group_of(split["groups"])
        by_source = splits.group_of(writer.make_groups(experiment.split, manifest["patients"], official))
        if moved := sorted(written.items() ^ by_source.items()):
            name = moved[0][0]
            difference = f"{name}: {written.get(name)} there, {by_source.get(name)} by the source"
    if difference:
        raise UserError(f"{experiment.out} is divided otherwise ({difference}): give --resplit, or another --out.")


def job(argv: Sequence[str]) -> None:
    """The command line."""
    about = f"Turn a CAMUS folder, or anybody's {image_folder.LAYOUT}, into Parquet shards."
    run(*command_line.parse(Options(), argv, "preprocess.py", about))


if __name__ == "__main__":
    command_line.main(job)
