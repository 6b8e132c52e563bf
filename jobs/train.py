"""Distributed training: `python jobs/train.py camus --data /data/shards --workers 4`, or the same after `ray job submit … --`.

Ray Train places the workers and restarts them if one dies; the run's directory holds its state, with or without Ray.
"""

import contextlib
import functools
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heartseg.config.experiment import Experiment
from heartseg.models.deeplabv3 import check_installation
from heartseg.shards.reader import Shards
from heartseg.storage import locks
from heartseg.training import distributed, run_directory
from heartseg.training.finetune import find_initial
from heartseg.training.worker import check_plan, open_data, train_rank
from jobs.support import command_line


@dataclass(frozen=True)
class Options:
    """How to launch the run."""

    launcher: Literal["ray", "plain"] = "ray"
    """`plain` needs no Ray: one process, or as many as torchrun starts."""
    fresh: bool = False
    """Start a new run even if the same command would resume one."""
    run_name: str = ""
    """Name of the run's folder (default: the recipe and a hash of the configuration and data)."""
    init_from: str = ""
    """Folder of a run whose best weights this one starts from, to fine-tune them."""
    profile: bool = False
    """Write a trace of a few steps to the run's profile/steps.json; open it at https://ui.perfetto.dev."""

    @property
    def unused(self) -> dict[str, str]:
        """The experiment's fields that have no effect here, and why."""
        plain = "--launcher plain runs one process, or as many as torchrun starts"
        of_plain = dict.fromkeys(("workers", "min_workers"), plain) if self.launcher == "plain" else {}
        return dict.fromkeys(("source", "out", "split"), "training reads the shards of --data as they are") | of_plain


def run(experiment: Experiment, options: Options) -> str:
    """Train or resume; returns the run's directory, or an empty string on all torchrun ranks but the first."""
    command_line.required_path(experiment.data, "data", "a folder of shards, or set HEARTSEG_DATA")
    command_line.required_path(experiment.runs, "runs", "a folder or URI that every node can reach, or set HEARTSEG_RUNS")
    if options.launcher == "plain":
        experiment = replace(experiment, workers=int(os.environ.get("WORLD_SIZE", 1)))
    check_installation()
    shards = open_data(experiment)
    check_plan(experiment, shards)
    older = options.init_from and command_line.absolute(options.init_from, "init-from")
    initial = find_initial(older, experiment, shards) if older else None
    if options.launcher == "plain":
        return train_without_ray(experiment, shards, options, initial)
    from jobs.support import ray_training

    opened = run_directory.open_run(experiment, shards, options.run_name, options.fresh, initial)
    with locks.lock(opened.path):
        print(f"run {opened.path}")
        ray_training.train_with_ray(experiment, opened, options.profile)
    return opened.path


def train_without_ray(experiment: Experiment, shards: Shards, options: Options, initial: dict | None) -> str:
    """Train in this process, which is the only one or one of torchrun's."""
    with distributed.plain_ranks() as ranks:
        opened = None
        if ranks.is_main:
            opened = run_directory.open_run(experiment, shards, options.run_name, options.fresh, initial)
            print(f"run {opened.path}")
        opened = distributed.from_main(opened, ranks)
        wrap = functools.partial(distributed.wrap_model, ranks=ranks, train=experiment.train)
        with locks.lock(opened.path) if ranks.is_main else contextlib.nullcontext():
            train_rank(experiment, opened, ranks, wrap, profile=options.profile)
        distributed.barrier(ranks)
    return opened.path if ranks.is_main else ""


def job(argv: list[str]) -> None:
    about = "Train a segmentation model; rerun the same command to resume."
    path = run(*command_line.parse(Options(), argv, "train.py", about))
    if not path:
        return  # another of torchrun's processes prints the scores
    last = run_directory.read_record(path)[-1]
    scores = "  ".join(f"{name} {last[name]:.4f}" for name in ("val/dice", "test/dice") if name in last)
    print(f"{command_line.counted(last['epoch'], 'epoch')} done  {scores}  {path}")


if __name__ == "__main__":
    command_line.main(job)
