"""Sections about how training is launched: under Ray against a plain process, and one worker against two.

The two sides are whole processes that take turns, an epoch each; only the one under Ray imports Ray.
"""

import functools
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from heartseg.config.experiment import from_json, to_json
from heartseg.errors import UserError
from heartseg.shards.loader import share
from heartseg.shards.reader import open_shards
from heartseg.storage import filesystem
from heartseg.training import distributed, engine, run_directory
from heartseg.training.distributed import Ranks
from heartseg.training.worker import train_rank
from jobs.benchmarks.train_bench import Bench, row
from jobs.benchmarks.train_steps import new_model

SECONDS_TO_WAIT = 900


class Turns:
    """An epoch at a time, when it is this side's turn: `go-SIDE-N` starts it, `done-SIDE-N` tells how long it took."""

    def __init__(self, folder: str, side: str, epochs: int):
        self.folder, self.side, self.epochs, self.epoch, self.started = folder, side, epochs, 0, time.perf_counter()

    def next(self) -> None:
        """Tell of the epoch that has ended, and wait until the next may begin."""
        seconds = time.perf_counter() - self.started
        filesystem.publish(os.path.join(self.folder, f"done-{self.side}-{self.epoch}"), str(seconds).encode())
        self.epoch += 1
        if self.epoch < self.epochs:
            wait_for(os.path.join(self.folder, f"go-{self.side}-{self.epoch}"))
        self.started = time.perf_counter()


def wait_for(path: str, processes: tuple = ()) -> str:
    """The text of a file once it is there; raises UserError where one of the processes has failed, or nobody writes it."""
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not os.path.exists(path):
        if time.monotonic() > deadline or any(process.exitcode for process in processes):
            raise UserError(f"A side of the comparison has stopped before {os.path.basename(path)}: see what it printed.")
        time.sleep(0.05)  # rarely, for who waits takes a core from who is timed
    return Path(path).read_text()


def plain_side(experiment: dict, run: str, folder: str, threads: int) -> None:
    """Train in a process without Ray."""
    torch.set_num_threads(threads)
    settings = from_json(experiment)
    turns = Turns(folder, "plain", settings.train.epochs)
    alone = Ranks(0, 1, torch.device("cpu"))
    train_rank(settings, run_directory.find_run(run), alone, lambda model: model, lambda metrics: turns.next())


def ray_side(experiment: dict, run: str, folder: str, threads: int) -> None:
    """Train as one worker of Ray Train."""
    import ray

    from jobs.support import ray_runtime

    ray_runtime.start_ray(1)
    config = {"experiment": experiment, "run": run, "folder": folder, "threads": threads}
    resources = ray_runtime.worker_resources(1)
    ray_runtime.build_trainer(ray_worker, config, 1, resources, os.path.join(folder, "store"), tries=0).fit()
    ray.shutdown()


def ray_worker(config: dict) -> None:
    """What jobs/train.py's worker does, an epoch a turn."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    from jobs.support import ray_runtime

    logging.getLogger("heartseg").setLevel(logging.WARNING)
    ray_runtime.silence_reports()
    torch.set_num_threads(config["threads"])
    experiment = from_json(config["experiment"])
    turns = Turns(config["folder"], "ray", experiment.train.epochs)

    def report(metrics: dict) -> None:
        ray.train.report(metrics)
        turns.next()

    options = {"move_to_device": False, "parallel_strategy_kwargs": distributed.ddp_options(experiment.train)}
    wrap = functools.partial(prepare_model, **options)
    train_rank(experiment, run_directory.find_run(config["run"]), distributed.current(get_device()), wrap, report)


def measure_ray(bench: Bench) -> list[dict]:
    """Epochs of a real run under Ray and in a plain process, in turn; and the time from the command to the first step."""
    import ray  # noqa: F401  (a machine without Ray has no such section)

    from heartseg.datasets.phantom import write_phantom

    pairs, threads = bench.options.pairs, torch.get_num_threads()
    experiment = bench.experiment(small=True, epochs=1 + pairs)
    patients = bench.options.ray_patients
    source, folder = os.path.join(bench.folder, f"small-{patients}"), os.path.join(bench.folder, "turns")
    if not os.path.exists(source):
        write_phantom(source, patients, scale=0.25)
    os.makedirs(folder)
    experiment = replace(experiment, data=bench.shards(experiment, source))
    processes = []
    for side, start in (("plain", plain_side), ("ray", ray_side)):
        run = run_directory.open_run(replace(experiment, runs=os.path.join(folder, side)), open_shards(experiment.data))
        process = multiprocessing.get_context("spawn").Process(
            target=start, args=(to_json(experiment), run.path, folder, threads)
        )
        process.start()
        processes.append(process)
    for side in ("plain", "ray"):
        wait_for(os.path.join(folder, f"done-{side}-0"), tuple(processes))
    seconds: dict[str, list[float]] = {"plain": [], "ray": []}
    for pair in range(1, 1 + pairs):
        # Who goes first changes, so that a machine that slows down harms neither.
        for side in ("plain", "ray") if pair % 2 else ("ray", "plain"):
            filesystem.publish(os.path.join(folder, f"go-{side}-{pair}"), b"")
            seconds[side].append(float(wait_for(os.path.join(folder, f"done-{side}-{pair}"), tuple(processes))))
    for process in processes:
        process.join()
    ratios = [under_ray / plain for plain, under_ray in zip(seconds["plain"], seconds["ray"], strict=True)]
    what = f"{pairs} pairs of epochs, {threads} threads, {statistics.median(seconds['plain']):.1f} s each"
    overhead = 100 * (statistics.median(ratios) - 1)
    first_s = first_step_s(experiment, folder)
    return [
        row("ray", f"one worker under Ray against a plain process ({what})", overhead, "% longer", "at most 3"),
        row("ray", "from the command to the end of the first step", first_s, "s", "under 30 on 2 cores"),
    ]


def first_step_s(experiment, folder: str) -> float:
    """Seconds from starting jobs/train.py, Ray's start included, until it prints its first step."""
    config = os.path.join(folder, "first.json")
    filesystem.publish_json(config, to_json(replace(experiment, train=replace(experiment.train, epochs=1))))
    job = str(Path(__file__).resolve().parents[1] / "train.py")
    started, found = time.perf_counter(), None
    command = [sys.executable, "-u", job, "--config", config, "--runs", os.path.join(folder, "first")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found is None and "step 1/" in line:
                found = time.perf_counter() - started
    if found is None:
        raise UserError(f"{' '.join(command)} came to no step: {''.join(lines[-3:])}")
    return found


def measure_workers(bench: Bench) -> list[dict]:
    """One worker and two over gloo, with the same cores between them and the same global batch."""
    experiment, rates = bench.experiment(small=True), {}
    threads = torch.get_num_threads()
    for world in (1, 2):
        folder = os.path.join(bench.folder, f"workers-{world}")
        os.makedirs(folder)
        arguments = (world, to_json(experiment), folder, max(1, threads // world), bench.options.steps)
        torch.multiprocessing.spawn(rank_of, arguments, nprocs=world)
        rates[world] = experiment.train.batch_size / float(Path(folder, "seconds").read_text())
    what = f"{experiment.model.backbone}, {experiment.image.height} px, batch {experiment.train.batch_size}"
    return [
        row("workers", f"1 worker ({what})", rates[1], "images/s"),
        row("workers", "2 workers (gloo) with the same cores between them", rates[2], "images/s"),
        row("workers", "2 workers / 1 worker", rates[2] / rates[1], "x"),
    ]


def rank_of(rank: int, world: int, experiment: dict, folder: str, threads: int, steps: int) -> None:
    """One of some workers on CPUs; rank 0 writes the median seconds of a step."""
    torch.set_num_threads(threads)
    settings, cpu = from_json(experiment), torch.device("cpu")
    if world > 1:
        method = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    ranks = distributed.current(cpu)
    state = engine.start(settings, new_model(settings), ranks, lambda m: distributed.wrap_model(m, ranks, settings.train))
    state.wrapped.train()
    images, masks = Bench(None, folder, cpu).random_batch(settings, settings.train.batch_size)
    mine, seconds = share(settings.train.batch_size, rank, world), []
    for _ in range(1 + max(3, steps)):
        distributed.barrier(ranks)
        started = time.perf_counter()
        engine.train_step(settings, state, images[mine], masks[mine], ranks)
        seconds.append(time.perf_counter() - started)
    if ranks.is_main:
        filesystem.publish(os.path.join(folder, "seconds"), str(statistics.median(seconds[1:])).encode())
    distributed.barrier(ranks)
    distributed.stop_plain()
