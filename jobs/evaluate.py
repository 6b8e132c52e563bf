"""Scores on the native grid and the report: `python jobs/evaluate.py --checkpoint RUN --data /data/shards`."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas
import pyarrow as pa

from heartseg import checkpoint, evaluation, predict, runs, storage
from heartseg.batches import share
from heartseg.errors import UserError
from heartseg.report import write_report
from heartseg.shards import load_groups, open_shards
from jobs import runtime


@dataclass(frozen=True)
class Options:
    """What to evaluate, and where."""

    checkpoint: str = ""
    """Folder of a run, or of one of its checkpoints."""
    data: str = ""
    """Folder or URI of the shards; the run's own where not given."""
    group: Literal["auto", "train", "val", "test"] = "auto"
    """Group of patients; `auto` is test where there is one, else val."""
    which: Literal["auto", "last", "best"] = "auto"
    """`best` is chosen on val; `auto` takes it only to report on test, and the last one else."""
    workers: int = 1
    """Processes that share the images."""
    launcher: Literal["ray", "plain"] = "ray"
    """`plain` needs no Ray and uses one process."""


def run(options: Options) -> str:
    """Score a checkpoint; returns the folder with `images.parquet`, `summary.json` and `report.html`."""
    path = runtime.absolute(runtime.require(options.checkpoint, "--checkpoint", "the folder of a run"), "checkpoint")
    found = checkpoint.find(path)
    owner = runs.find_run(path)
    data = options.data or found.card["experiment"]["data"]
    shards = open_shards(runtime.absolute(data, "data"))
    group = options.group if options.group != "auto" else ("test" if "test" in shards.groups else "val")
    if group not in shards.groups:
        raise UserError(f"The shards have no group {group}: take one of {', '.join(shards.groups)}.")
    seen = set(owner.description["train_patients"]) & set(shards.groups[group])
    if seen and group != "train":
        raise UserError(
            f"{owner.path} was trained on {len(seen)} patients of this {group} group: give the shards and split it knew."
        )
    which = options.which if options.which != "auto" else ("best" if group == "test" else "last")
    found = checkpoint.find(path, which)
    out = storage.join(owner.path, f"evaluation-{group}")
    evaluated = {"checkpoint": found.path, "epoch": found.epoch, "group": group, "data_fingerprint": shards.fingerprint}
    evaluated |= {"which": which, "weights_sha256": found.card["weights_sha256"]}
    summary_path = storage.join(out, "summary.json")
    if storage.exists(summary_path):
        summary = storage.read_json(summary_path)
        if {key: summary.get(key) for key in evaluated} == evaluated and storage.exists(storage.join(out, "report.html")):
            print(f"{out} is complete.\n{evaluation.table_text(summary)}")
            return out
    started = time.perf_counter()
    images = pandas.DataFrame(score(found.path, shards, group, options))
    table = pa.Table.from_pandas(images.drop(columns="confusion"), preserve_index=False)
    summary = evaluation.summarise(images) | evaluated | {"seconds": time.perf_counter() - started}
    storage.write_table(storage.join(out, "images.parquet"), table)
    storage.publish_json(summary_path, summary)
    write_report(owner.path, out)
    print(
        f"{summary['images']} images of {summary['patients']} patients ({group}), native grid\n{evaluation.table_text(summary)}"
    )
    return out


def score(path: str, shards, group: str, options: Options) -> list[dict]:
    """Scores of every image of a group, in order, one share a worker."""
    if options.launcher == "plain":
        return score_share(path, shards, group, 0, 1)
    import ray

    runtime.start_ray(options.workers)
    resources = runtime.worker_resources(options.workers)
    task = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(score_share)
    cores = int(resources["CPU"])
    tasks = [task.remote(path, shards, group, rank, options.workers, cores) for rank in range(options.workers)]
    return [row for rows in ray.get(tasks) for row in rows]


def score_share(path: str, shards, group: str, rank: int, world_size: int, cores: int = 0) -> list[dict]:
    """Scores of one worker's images."""
    if cores:
        import torch

        torch.set_num_threads(cores)
    frames = load_groups(shards, [group])[group]
    mine = share(len(frames), rank, world_size)
    return evaluation.score_images(predict.load(path), frames, range(mine.start, mine.stop))


def job(argv: Sequence[str]) -> None:
    """The command line."""
    options = runtime.parse_line(Options, argv, "python jobs/evaluate.py", "Score a trained model and write its report.")
    out = run(options)
    print(storage.join(out, "report.html"))


if __name__ == "__main__":
    runtime.main(job)
