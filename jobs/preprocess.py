"""Converts NIfTI files to Parquet shards: `python jobs/preprocess.py camus --source /data/CAMUS --out /data/shards`.

`--source` is the CAMUS release, or any folder of images and masks in the layout of heartseg/datasets/image_folder.py.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from heartseg.config.experiment import Experiment
from heartseg.datasets import camus, image_folder
from heartseg.datasets.image_folder import open_source
from heartseg.errors import require
from heartseg.shards import preprocessing, writer
from heartseg.storage import filesystem
from jobs.support import command_line
from jobs.support.command_line import counted


@dataclass(frozen=True)
class Options:
    """How to preprocess a source."""

    frames: Literal["stills", "sequence"] = "stills"
    """`stills`: the ED and ES images. `sequence`: every frame from ED to ES (CAMUS's half sequences); only ED and ES have a
    phase."""
    overwrite: bool = False
    """Start over if --out holds shards already."""
    max_quarantined: float = preprocessing.MAX_QUARANTINED
    """Largest fraction of damaged recordings to tolerate, 0 to 1; damaged recordings are quarantined (left out)."""
    resplit: bool = False
    """Split existing shards differently, even without --source; runs on the old groups cannot resume."""
    patient_pattern: str = ""
    """For images/ and masks/ folders: a regular expression that matches the patient at the start of a file name; if it has a
    group, the first group is the patient."""
    dataset: Literal["", "camus"] = ""
    """`camus`: declare that --source is CAMUS, for copies that jobs/download.py did not fetch; other sources are private."""
    launcher: Literal["ray", "plain"] = "ray"
    """`plain` needs no Ray and uses one process."""

    @property
    def unused(self) -> dict[str, str]:
        """The experiment's fields that have no effect here, and why."""
        used = {"name", "image", "split", "source", "out", "workers"}
        others = {one.name for one in fields(Experiment)} - used
        plain = {"workers": "--launcher plain runs one process"} if self.launcher == "plain" else {}
        return dict.fromkeys(others, "preprocessing reads --source and writes --out") | plain


def run(experiment: Experiment, options: Options) -> None:
    """Write the shards of `experiment.source` to `experiment.out`, keeping what an interrupted job finished."""
    out = command_line.required_path(experiment.out, "out", "the folder for the shards")
    share = options.max_quarantined
    require(0 <= share <= 1, f"--max-quarantined {share:g} is not a share: give one from 0 to 1, such as 0.05 for 5 %.")
    complete = filesystem.exists(filesystem.join(out, writer.MANIFEST)) and not options.overwrite
    meaning = f"the folder of the CAMUS release, or one that holds {image_folder.LAYOUT}"
    if complete and options.resplit and not experiment.source:
        shards = preprocessing.split_again(out, experiment.split)
    else:
        path = command_line.required_path(experiment.source, "source", meaning)
        source = open_source(path, options.patient_pattern, options.dataset)
        write = preprocessing.write_parts_here
        if options.launcher == "ray":
            from jobs.support import ray_preprocessing

            write = partial(ray_preprocessing.write_parts_with_ray, workers=experiment.workers)
        shards = preprocessing.write_shards(
            source, out, experiment.image, experiment.split, options.frames, share, options.overwrite, options.resplit,
            map_parts=lambda tasks: show_progress(tasks, write(tasks)),
        )  # fmt: skip
        rows, patients, parts = (shards.manifest[name] for name in ("rows", "patients", "parts"))
        show_ignored(source.unnamed(), [file for record in patients.values() for file in record.get("ignored", [])])
        written = f"{counted(rows, 'image')} of {counted(len(patients), 'patient')} in {counted(len(parts), 'part')}: {out}"
        print(f"{out} is complete: {counted(rows, 'image')}." if complete else written)
    print("  ".join(f"{group}: {counted(len(names), 'patient')}" for group, names in shards.groups.items()))


def show_progress(tasks: list[tuple], records: Iterable[dict]) -> Iterator[dict]:
    """Pass on records of parts as they arrive, with a progress line; print the damaged recordings after the last one."""
    quarantined, num_patients = [], sum(len(patients) for _, _, _, patients, *_ in tasks)
    with tqdm(total=num_patients, unit=" patients", desc="preprocess", file=sys.stdout, mininterval=1, disable=None) as bar:
        for record in records:
            bar.update(len(record["patients"]))
            quarantined += record["quarantined"]
            yield record
    for entry in sorted(quarantined, key=lambda entry: entry["file"]):
        named = " ".join(entry[key] for key in ("patient", "view", "phase") if entry[key])
        print(f"quarantined  {named}  {entry['file']}: {entry['reason']}")


def show_ignored(unnamed: list[str], of_patients: list[str]) -> None:
    """Print the number of unread entries of each kind in the source, with an example."""
    kinds = {"half-sequence files": [], "patients' other files": [], "other entries": unnamed}
    for file in of_patients:
        kinds["half-sequence files" if camus.HALF_SEQUENCE in file.lower() else "patients' other files"].append(file)
    for what, names in kinds.items():
        if names:
            print(f"ignored  {len(names)} {what}, such as {names[0]}")


def job(argv: list[str]) -> None:
    about = f"Convert a CAMUS tree, or a folder with {image_folder.LAYOUT}, to Parquet shards."
    run(*command_line.parse(Options(), argv, "preprocess.py", about))


if __name__ == "__main__":
    command_line.main(job)
