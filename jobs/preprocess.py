"""NIfTI tree to Parquet shards: `python jobs/preprocess.py seed --source /data/CAMUS --out /data/shards`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from heartseg import camus, locks, shards, splits, storage
from heartseg.config import Experiment, first_difference, to_json
from heartseg.errors import UserError
from jobs import runtime


@dataclass(frozen=True)
class Options:
    """How to preprocess."""

    overwrite: bool = False
    """Begin anew where --out holds shards already."""
    max_quarantined: float = 0.01
    """Largest share of the recordings that may be damaged."""
    resplit: bool = False
    """Divide shards that are there in another way; runs that know the old groups will not resume on them."""
    launcher: Literal["ray", "plain"] = "ray"
    """`plain` needs no Ray and uses one process."""


def run(experiment: Experiment, options: Options) -> None:
    """Write the shards of `experiment.source` to `experiment.out`; what an interrupted call finished is kept."""
    source = runtime.require(experiment.source, "--source", "the folder of the CAMUS release")
    out = runtime.require(experiment.out, "--out", "the folder for the shards")
    patients = camus.find_patients(source)
    official = camus.read_groups(source)
    splits.make_groups(experiment.split, patients, official)
    with locks.lock(out):
        if options.overwrite:
            remove_shards(out)
        if storage.exists(storage.join(out, shards.MANIFEST)):
            check_split(experiment, options)
            manifest = check_same(experiment, shards.source_listing(source, patients))
            print(f"{out} is complete: {manifest['rows']} images.")
        else:
            manifest = write(experiment, options, patients)
        groups = shards.write_splits(out, experiment.split, manifest["patients"], official)
    print("  ".join(f"{group}: {len(names)} patients" for group, names in groups.items()))


def write(experiment: Experiment, options: Options, patients: list[str]) -> dict:
    """Write every part and then the manifest; refuses where too much is damaged."""
    parts = shards.part_names(patients)
    tasks = [(experiment.source, experiment.out, name, chunk, experiment.image) for name, chunk in parts]
    records, bar = {}, tqdm(total=len(patients), unit=" patients", desc="preprocess", file=sys.stdout, mininterval=1)
    for record in map_with_ray(tasks, experiment.workers) if options.launcher == "ray" else map_plainly(tasks):
        records[record["file"]] = record
        bar.update(len(record["patients"]))
    bar.close()
    found = [records[name] for name, _ in parts]
    show_quarantine([entry for record in found for entry in record["quarantined"]], found, options)
    manifest = shards.write_manifest(experiment.out, camus.dataset_name(experiment.source, patients), experiment.image, found)
    print(f"{manifest['rows']} images of {len(patients)} patients in {len(found)} parts: {experiment.out}")
    return manifest


def map_plainly(tasks: list[tuple]) -> Iterator[dict]:
    """The records of all parts, written here one after the other."""
    return (shards.write_part(*task) for task in tasks)


def map_with_ray(tasks: list[tuple], workers: int) -> Iterator[dict]:
    """The records of all parts as they are finished; at most one part a worker is under way."""
    import ray

    runtime.start_ray(workers)
    write_part = ray.remote(num_cpus=1, max_retries=runtime.MAX_TRIES)(_write_part)
    waiting, under_way = list(reversed(tasks)), []
    while waiting or under_way:
        while waiting and len(under_way) < workers:
            under_way.append(write_part.remote(*waiting.pop()))
        done, under_way = ray.wait(under_way)
        for record in ray.get(done):
            if "error" in record:
                raise UserError(record["error"])
            yield record


def _write_part(*task) -> dict:
    """A part's record, or the sentence of a user's mistake, which Ray would wrap in a traceback."""
    try:
        return shards.write_part(*task)
    except UserError as error:
        return {"error": str(error)}


def show_quarantine(quarantined: list[dict], parts: list[dict], options: Options) -> None:
    """Print what was damaged; raises UserError where it is more than the allowed share."""
    for entry in quarantined:
        print(f"quarantined  {entry['patient']} {entry['view']} {entry['phase']}  {entry['file']}: {entry['reason']}")
    total = sum(part["rows"] for part in parts) + len(quarantined)
    if len(quarantined) > options.max_quarantined * total:
        raise UserError(
            f"{len(quarantined)} of {total} recordings are damaged, more than --max-quarantined "
            f"{options.max_quarantined:g}: mend them, or allow more and --overwrite."
        )


def check_same(experiment: Experiment, listing: str) -> dict:
    """The manifest that is there; raises UserError where it is of another configuration or source."""
    manifest = storage.read_json(storage.join(experiment.out, shards.MANIFEST))
    there = {"image": manifest.get("image"), "source files": manifest.get("source_listing")}
    difference = first_difference(there, {"image": to_json(experiment.image), "source files": listing})
    if difference:
        raise UserError(f"{experiment.out} holds other shards ({difference}): give --overwrite, or another --out.")
    return manifest


def check_split(experiment: Experiment, options: Options) -> None:
    """Raise UserError where shards are divided in another way than asked and `--resplit` is not given."""
    path = storage.join(experiment.out, shards.SPLITS)
    if options.resplit or not storage.exists(path):
        return
    difference = first_difference(storage.read_json(path).get("config", {}), to_json(experiment.split), "split.")
    if difference:
        raise UserError(f"{experiment.out} is divided otherwise ({difference}): give --resplit, or another --out.")


def remove_shards(out: str) -> None:
    """Delete shards and nothing else; the manifest goes first, so that nothing damaged looks complete."""
    for name in (shards.MANIFEST, shards.SPLITS):
        storage.remove(storage.join(out, name))
    for name in storage.list_names(out):
        if shards.PART_NAME.fullmatch(name):
            storage.remove(storage.join(out, name))


def job(argv: Sequence[str]) -> None:
    """The command line."""
    run(*runtime.parse(Options(), argv, "preprocess.py", "Turn a CAMUS folder into Parquet shards."))


if __name__ == "__main__":
    runtime.main(job)
