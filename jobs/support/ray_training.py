"""Training under Ray Train: places the workers, restarts those that die, and turns failures into one-line errors.

Ray sends these functions to workers by name, so they are in a module that every node can import.
"""

import functools
import logging
import socket
from typing import NoReturn

import ray.train
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError
from ray.train import TrainingFailedError
from ray.train.torch import get_device, prepare_model

from heartseg.config.experiment import Experiment, from_json, to_json
from heartseg.errors import OneRankError, StorageError, UserError
from heartseg.shards.reader import open_shards
from heartseg.storage import filesystem
from heartseg.training import distributed, run_directory
from heartseg.training.worker import train_rank
from jobs.support import command_line, ray_runtime
from jobs.support.command_line import log

# Part of Ray Train's error message when there was no room for its workers in time.
TIMED_OUT = "worker group startup timed out"


class WorkersDied(UserError):
    """Workers died repeatedly; unlike after a mistake, another try may succeed."""


def train_with_ray(experiment: Experiment, run: run_directory.Run, profile: bool = False, trial: dict | None = None) -> None:
    """Train with `experiment.workers` workers in a Ray Train run; `trial` holds the resources per worker of a sweep's trial."""
    ray_runtime.start_ray(experiment.workers)
    if not trial:
        ray_runtime.check_own_gpus(experiment.min_workers or experiment.workers)
    resources = trial or ray_runtime.worker_resources(experiment.workers)
    if trial:
        from ray.tune.integration.ray_train import TuneReportCallback
    callbacks = [TuneReportCallback()] if trial else []  # Tune may end a trial at any report
    workers = (experiment.min_workers, experiment.workers) if experiment.min_workers else experiment.workers
    config = {"experiment": to_json(experiment), "run": run.path, "cores": resources["CPU"], "profile": profile}
    config |= {"is_trial": bool(trial), "gpu": resources.get("GPU", 0)}
    folder, result = filesystem.join(run.path, "ray"), None
    while result is None:
        epochs = len(run_directory.read_record(run.path))
        try:
            result = ray_runtime.build_trainer(worker, config, workers, resources, folder, callbacks=callbacks).fit()
        except TrainingFailedError as error:
            # Ray counts restarts over the whole run. On nodes that come and go, a long run needs many but still advances; an
            # elastic one also asks for workers on a node that has just gone, until the cluster notices.
            has_advanced = len(run_directory.read_record(run.path)) > epochs
            may_continue = dead_workers(error) or (experiment.min_workers and TIMED_OUT in str(error))
            if not has_advanced or trial or not may_continue:
                raise_user_error(error, experiment.workers, resources)
            log.info("The run continues after losing workers %d times: it made progress in between.", ray_runtime.MAX_TRIES + 1)
    # A worker returns a user's mistake as a value: if it raised it, Ray would restart the worker.
    if result.return_value and "error" in result.return_value:
        raise UserError(result.return_value["error"])


def dead_workers(error: Exception) -> list[int]:
    """The ranks of workers whose processes died without raising an error."""
    deaths = (RayActorError, OutOfMemoryError, NodeDiedError)
    failures = getattr(error, "worker_failures", {}).items()
    # Ray Train wraps the error of a health check.
    return sorted(rank for rank, failure in failures if isinstance(getattr(failure, "health_check_failure", failure), deaths))


def raise_user_error(error: Exception, workers: int, resources: dict[str, float]) -> NoReturn:
    """Raise a UserError for a failure that the user can fix, and any other failure unchanged."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, (StorageError, OneRankError)):
            raise type(failure)(str(failure)) from error
    if TIMED_OUT in str(error):
        each = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
        problem = f"The cluster had no room for {workers} workers with {each} each, in {ray_runtime.MAX_TRIES + 1} tries"
        fix = "use fewer --workers, use `--workers 1:N` to start on what is free, or wait until the cluster is free."
        raise UserError(f"{problem}: {fix}") from error
    if dead := dead_workers(error):
        who = f"Worker {dead[0]}" if len(dead) == 1 else f"Workers {', '.join(map(str, dead))}"
        raise WorkersDied(
            f"{who} of {workers} died, after {ray_runtime.MAX_TRIES} restarts: memory may be short there (use fewer workers "
            "per machine, --train.accumulate or a smaller --train.batch-size), or nodes were lost. Complete checkpoints are "
            "kept: rerun the same command to resume."
        ) from error
    raise error


def worker(config: dict) -> dict:
    """Run one rank under Ray: prepare its model, train, and report every epoch."""
    command_line.configure_logging()
    # Ray Train would log a line for each report.
    logging.getLogger(ray_runtime.ray_private(ray_runtime.REPORT_LOGGER)).setLevel(logging.WARNING)
    torch.set_num_threads(int(config["cores"]))  # Ray sets one thread for a worker
    experiment, ranks = from_json(config["experiment"]), distributed.current(get_device())
    if 0 < config["gpu"] < 1:  # other trials share its memory, a tenth of which is left for what CUDA itself needs
        torch.cuda.set_per_process_memory_fraction(0.9 * config["gpu"], ranks.device)
    try:
        run = open_on_every_rank(config["run"], experiment.data, ranks)
        # The engine chooses device and memory layout; Ray adds the gradient averaging.
        options = {"move_to_device": False, "parallel_strategy_kwargs": distributed.ddp_options(experiment.train)}
        wrap = functools.partial(prepare_model, **options)
        if config["is_trial"]:
            logging.getLogger("heartseg").setLevel(logging.WARNING)  # the sweep prints a line for each epoch
            if ranks.is_main:
                reservation = ray.util.get_current_placement_group().id.hex().encode()
                filesystem.publish(filesystem.join(run.path, ray_runtime.PLACEMENT), reservation)
        # A trial may be ended at any report, so a reported epoch must be on disk.
        train_rank(experiment, run, ranks, wrap, ray.train.report, config["profile"], saves_first=config["is_trial"])
    except OneRankError:
        raise  # only this rank knows, and the others would wait: Ray ends all of them and resumes from the checkpoint
    except UserError as error:
        return {"error": str(error)}
    return {}


def open_on_every_rank(path: str, data: str, ranks: distributed.Ranks) -> run_directory.Run:
    """The run, once every rank has found it and the shards; raises UserError on every rank if one has not."""
    run, problem = None, None
    try:
        run = run_directory.find_run(path)
        open_shards(data)
    except UserError as error:
        problem = f"Worker {ranks.rank} on {socket.gethostname()}: {error} Every node must see --runs and --data."
    distributed.raise_first_problem(problem, ranks)
    return run
