"""Distributed training: `python jobs/train.py seed --data /data/shards --workers 4`, also behind `ray job submit … --`.

Ray Train supervises: it places the workers, joins them for DistributedDataParallel and starts them again when one dies.
What a run knows lies in its own directory, the same with and without Ray, so the same command always resumes.
"""

import contextlib
import functools
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from heartseg.config.experiment import Experiment, from_json, to_json
from heartseg.errors import OutOfMemory, StorageError, UserError
from heartseg.models.deeplabv3 import check_installation
from heartseg.shards.reader import open_shards
from heartseg.storage import filesystem, locks
from heartseg.training import distributed, run_directory
from heartseg.training.finetune import find_initial
from heartseg.training.run_directory import Run
from heartseg.training.worker import check_plan, open_data, train_rank
from jobs.support import command_line, ray_runtime

log = logging.getLogger("heartseg.jobs")
# Seconds between two looks for nodes that an elastic run could grow onto.
SECONDS_TO_GROW = 30
# How long a trial waits for its epoch to be on disk; a disk that refuses is told by the next epoch.
SECONDS_TO_KEEP = 60


class WorkersDied(UserError):
    """Workers died time and again; unlike a mistake, another try may go better."""


@dataclass(frozen=True)
class Options:
    """How to launch."""

    launcher: Literal["ray", "plain"] = "ray"
    """`plain` needs no Ray: one process, or as many as torchrun starts."""
    fresh: bool = False
    """Begin a new run where the same command would resume one."""
    run_name: str = ""
    """Name of the run's folder; the recipe and a hash of the configuration where not given."""
    init_from: str = ""
    """Folder of a run whose best weights this one begins with, to fine-tune them."""
    profile: bool = False
    """Trace a few steps into the run's profile/steps.json, for https://ui.perfetto.dev."""


def run(experiment: Experiment, options: Options) -> str:
    """Train, or go on training; returns the run's directory, and an empty string on all ranks of torchrun but the first."""
    data = command_line.require_flag(experiment.data, "--data", "a folder of shards (HEARTSEG_DATA does as well)")
    command_line.require_flag(experiment.runs, "--runs", "a folder or URI that every node reaches (HEARTSEG_RUNS does as well)")
    if options.launcher == "plain":
        experiment = replace(experiment, workers=int(os.environ.get("WORLD_SIZE", 1)))
    check_installation()
    shards = open_data(replace(experiment, data=data))
    check_plan(experiment, shards)
    initial = None
    if options.init_from:
        initial = find_initial(command_line.absolute(options.init_from, "init-from"), experiment, shards)
    if options.launcher == "plain":
        return run_plainly(experiment, options, initial)
    opened = run_directory.open_run(experiment, shards, options.run_name, options.fresh, initial)
    with locks.lock(opened.path):
        print(f"run {opened.path}")
        train_with_ray(experiment, opened, options.profile)
    return opened.path


def run_plainly(experiment: Experiment, options: Options, initial: dict | None) -> str:
    """Train in this process, one of torchrun's or the only one."""
    ranks = distributed.start_plain()
    try:
        shards, opened = open_data(experiment), None
        if ranks.is_main:
            opened = run_directory.open_run(experiment, shards, options.run_name, options.fresh, initial)
            print(f"run {opened.path}")
        opened = distributed.from_main(opened, ranks)
        wrap_here = functools.partial(distributed.wrap_model, ranks=ranks, train=experiment.train)
        with locks.lock(opened.path) if ranks.is_main else contextlib.nullcontext():
            train_rank(experiment, opened, ranks, wrap_here, profile=options.profile)
        distributed.barrier(ranks)
        return opened.path if ranks.is_main else ""
    finally:
        distributed.stop_plain()


def train_with_ray(
    experiment: Experiment,
    opened: Run,
    profile: bool = False,
    resources: dict[str, float] | None = None,
    callbacks: Sequence[object] = (),
) -> None:
    """Train as `experiment.workers` workers of a Ray Train run, each with `resources`: its share of the cluster where None.

    With `callbacks` (Ray Train's) somebody else judges the run by its reports, and may end it at any of them.
    """
    from ray.train import TrainingFailedError

    ray_runtime.start_ray(experiment.workers)
    resources = resources or ray_runtime.worker_resources(experiment.workers)
    result = None
    while result is None:
        epochs = len(run_directory.read_record(opened.path))
        try:
            result = build_trainer(experiment, opened, profile, resources, callbacks).fit()
        except TrainingFailedError as error:
            # Ray counts the tries of a whole run. On nodes that come and go a long one loses many, and yet gets on.
            got_on = len(run_directory.read_record(opened.path)) > epochs
            if not (got_on and dead_workers(error) and not callbacks):
                raise_sentence(error, experiment.workers, resources)
            log.info("Workers died %d times, and the run goes on: it got on in between.", ray_runtime.MAX_TRIES + 1)
    # A sentence for the user comes back as a value: raised in a worker, Ray would try it again.
    if result.return_value and "error" in result.return_value:
        raise UserError(result.return_value["error"])


def build_trainer(
    experiment: Experiment, opened: Run, profile: bool, resources: dict[str, float], callbacks: Sequence[object]
) -> object:
    """Ray Train's trainer of a run, for one fit."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Ray Train's own handler of Ctrl-C ends the process with code 1 and no word; ours is the one of every job.
    kind = type("Trainer", (TorchTrainer,), {"_register_sigint_handler": lambda self, controller: None})
    return kind(
        worker,
        train_loop_config={
            "experiment": to_json(experiment),
            "run": opened.path,
            "cores": resources["CPU"],
            "profile": profile,
            "is_judged": bool(callbacks),
        },
        scaling_config=ScalingConfig(
            # Elastic: lost nodes shrink the run at once, new ones let it grow; the global batch stays what it is.
            num_workers=(experiment.min_workers, experiment.workers) if experiment.min_workers else experiment.workers,
            elastic_resize_monitor_interval_s=SECONDS_TO_GROW,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            # A name of its own each time: what to resume is the run directory's to say, not Ray's snapshot's.
            name=uuid.uuid4().hex[:8],
            storage_path=filesystem.join(opened.path, "ray"),
            failure_config=FailureConfig(max_failures=ray_runtime.MAX_TRIES, controller_failure_limit=ray_runtime.MAX_TRIES),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
        ),
    )


def dead_workers(error: Exception) -> list[int]:
    """The ranks of the workers whose processes died, rather than raised."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

    kinds = (RayActorError, OutOfMemoryError, NodeDiedError)
    found = getattr(error, "worker_failures", {}).items()
    # Ray Train wraps what it met when it looked after a worker.
    return sorted(rank for rank, failure in found if isinstance(getattr(failure, "health_check_failure", failure), kinds))


def raise_sentence(error: Exception, workers: int, resources: dict[str, float]) -> NoReturn:
    """Raise UserError for a failure that is the user's to mend, and the failure itself for any other."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, (StorageError, OutOfMemory)):
            raise (StorageError if isinstance(failure, StorageError) else UserError)(str(failure)) from error
    if "worker group startup timed out" in str(error):
        each = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
        raise UserError(
            f"The cluster had no room for {workers} workers of {each} ({ray_runtime.MAX_TRIES + 1} tries): "
            "use fewer --workers, `--workers 1:N` to start on what there is, or wait until it is free."
        ) from error
    dead = dead_workers(error)
    if dead:
        who = f"Worker {dead[0]}" if len(dead) == 1 else f"Workers {', '.join(map(str, dead))}"
        raise WorkersDied(
            f"{who} of {workers} died, after {ray_runtime.MAX_TRIES} restarts: memory may be short there (use fewer workers a "
            "machine, --train.accumulate or a smaller --train.batch-size), or nodes were lost; what was complete is kept, "
            "and the same command goes on."
        ) from error
    raise error


def worker(config: dict) -> dict:
    """One rank under Ray: configuration in, the model prepared, every epoch reported."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    command_line.configure_logging()
    logging.getLogger(ray.train.v2._internal.execution.context.__file__).setLevel(logging.WARNING)
    torch.set_num_threads(int(config["cores"]))  # Ray sets one thread for a worker
    experiment, ranks = from_json(config["experiment"]), distributed.current(get_device())
    try:
        opened = see_storage(config["run"], experiment.data, ranks)
        # The device is the engine's to choose the layout for; Ray adds the gradient averaging.
        options = {"move_to_device": False, "parallel_strategy_kwargs": distributed.ddp_options(experiment.train)}
        wrap = functools.partial(prepare_model, **options)
        report = ray.train.report
        if config["is_judged"]:
            report = functools.partial(report_what_is_kept, opened.path)
            logging.getLogger("heartseg").setLevel(logging.WARNING)  # who judges it tells a line an epoch
            if ranks.is_main:
                ray_runtime.note_placement(opened.path)
        train_rank(experiment, opened, ranks, wrap, report, config["profile"])
    except (StorageError, OutOfMemory):
        raise  # one rank's: the others would wait for it, so Ray ends them all and goes on from the checkpoint
    except UserError as error:
        return {"error": str(error)}
    return {}


def report_what_is_kept(run: str, metrics: dict[str, float]) -> None:
    """Report an epoch when its checkpoint and its line of the record are on disk: the run may be ended by this report."""
    import ray.train

    deadline = time.monotonic() + SECONDS_TO_KEEP
    while time.monotonic() < deadline and not any(row["epoch"] == metrics["epoch"] for row in run_directory.read_record(run)):
        time.sleep(0.05)
    ray.train.report(metrics)


def see_storage(run_path: str, data: str, ranks: distributed.Ranks) -> Run:
    """The run, where every rank sees it and the shards; raises UserError on every rank where one of them does not."""
    opened, problem = None, None
    try:
        opened = run_directory.find_run(run_path)
        open_shards(data)
    except UserError as error:
        problem = f"Worker {ranks.rank} on {socket.gethostname()}: {error} Every node must see --runs and --data."
    distributed.raise_first_problem(problem, ranks)
    return opened


def job(argv: Sequence[str]) -> None:
    """The command line."""
    path = run(*command_line.parse(Options(), argv, "train.py", "Train a segmentation model; the same command resumes."))
    if not path:
        return  # another of torchrun's processes tells
    record = run_directory.read_record(path)
    last = record[-1]
    scores = "  ".join(f"{name} {last[name]:.4f}" for name in ("val/dice", "test/dice") if name in last)
    print(f"{last['epoch']} epochs done  {scores}  {path}")


if __name__ == "__main__":
    command_line.main(job)
