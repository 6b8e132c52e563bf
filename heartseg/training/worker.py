"""One rank of a training run, from shards to finished checkpoints; the same under Ray, under torchrun and alone."""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace

import numpy as np
import torch
from torch import nn, profiler

from heartseg.config.experiment import Experiment
from heartseg.errors import OneRankError, UserError, io_errors_as_user_errors, require
from heartseg.models import checkpoint, precision
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.loader import Intensity, check_shares, share, steps_per_epoch
from heartseg.shards.reader import Shards, hold_out, open_shards
from heartseg.storage import filesystem
from heartseg.training import callbacks, data_loading, engine, run_directory
from heartseg.training.distributed import Ranks, from_main, raise_first_problem
from heartseg.training.finetune import load_initial
from heartseg.training.wandb_logger import build_tracker

log = logging.getLogger(__name__)
NUM_SAMPLES = 4  # images whose predictions a run keeps


def check_plan(experiment: Experiment, shards: Shards) -> None:
    """Raise UserError for a plan that would fail later: a grid other than the recipe's, shares too small, too few images."""
    there, asked = shards.image, experiment.image
    sizes = f"{there.height} x {there.width}, but {experiment.name} expects {asked.height} x {asked.width}"
    fix = f"preprocess again for that size, or give --image.height {there.height} --image.width {there.width}"
    require(there == asked, f"{shards.path} holds images of {sizes}: {fix}.")
    check_shares(experiment.train.batch_size, experiment.workers, experiment.train.accumulate)
    steps_per_epoch(shards.num_rows("train"), experiment.train.batch_size)
    has_scores = experiment.schedule.kind != "plateau" or "val" in shards.groups
    require(has_scores, "schedule.kind plateau needs a validation group: give --train.holdout 0.1, or shards that have one.")


def open_data(experiment: Experiment) -> Shards:
    """The shards that a run trains on, in the groups of their split or with `train.holdout` of the training group held out."""
    return hold_out(open_shards(experiment.data), experiment.train.holdout)


def train_rank(
    experiment: Experiment, run: run_directory.Run, ranks: Ranks, wrap: Callable[[nn.Module], nn.Module],
    report: Callable[[dict[str, float]], None] = lambda metrics: None, profile: bool = False, saves_first: bool = False,
) -> None:  # fmt: skip
    """Train this rank's share of a run, from the last checkpoint if there is one; with `profile`, rank 0 traces a few steps.

    `wrap` adds gradient averaging to the model; `report` is called on every rank after each epoch, while it is being
    written or, with `saves_first`, once its checkpoint is. Raises UserError on all ranks at once, OneRankError on one only.
    """
    try:
        _train(experiment, run, ranks, wrap, report, profile, saves_first)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        train, image = experiment.train, experiment.image
        mine = share(train.batch_size, ranks.rank, ranks.world_size)
        raise OneRankError(
            f"Rank {ranks.rank} ran out of memory ({ranks.device}) with {mine.stop - mine.start} of a batch's "
            f"{train.batch_size} images of {image.height} x {image.width}: raise --train.accumulate or --workers, or use a "
            "smaller --train.batch-size or --model.backbone; complete checkpoints are kept."
        ) from error


def _train(experiment: Experiment, run: run_directory.Run, ranks: Ranks, wrap, report, profile, saves_first) -> None:
    shards = open_data(experiment)
    # Runs older than this choice all read from memory.
    begun = run.description.get("ingest") or ("memory" if checkpoint.last(run.path) else None)
    ingest = data_loading.choose(experiment, shards, begun, ranks)
    chosen = choose_precision(experiment, run, ranks)
    with _problems_on_every_rank(ranks):
        run = run_directory.record_choices(run, {"ingest": ingest, "precision": chosen}, ranks.is_main)
        data = data_loading.open_groups(shards, ingest, ranks)
        sampled = "val" if "val" in shards.groups else "test"
        count = shards.num_rows(sampled)
        samples = data.rows(sampled, np.linspace(0, count - 1, min(NUM_SAMPLES, count)).astype(int).tolist())
    intensity = Intensity(*shards.intensity) if experiment.train.intensity == "standard" else Intensity()
    torch.manual_seed(experiment.train.seed)
    model = build_model(experiment.model)
    if run.description.get("initial") and checkpoint.last(run.path) is None:  # its own checkpoint replaces them
        load_initial(model, run.description["initial"])
    computed = replace(experiment, train=replace(experiment.train, precision=chosen))  # checkpoints keep `auto`
    state = engine.start(computed, model, ranks, wrap)
    record = resume(state, run)
    has_card = filesystem.exists(filesystem.join(run.path, run_directory.MODEL_CARD))
    # Not decided by each rank alone, or one could leave because of a card that another has just written.
    if from_main(state.epoch >= experiment.train.epochs and has_card, ranks):
        return
    tracker = build_tracker(experiment, run, ranks.is_main, record)
    seconds = 0.0 if saves_first else experiment.checkpoint_seconds
    on_main = callbacks.EpochCallbacks(experiment, run, intensity, samples, tracker, record, seconds)

    def after_epoch(state: engine.TrainState, metrics: dict[str, float]) -> None:
        with _problems_on_every_rank(ranks):
            if ranks.is_main:
                on_main.end_epoch(state, metrics)
                if saves_first:
                    on_main.wait()
        report(metrics)

    exit_code = 1
    try:
        with trace_steps(run.path) if profile and ranks.is_main else nullcontext(lambda: None) as step_traced:

            def after_step(*at: int) -> None:
                step_traced()
                if ranks.is_main:
                    on_main.print_progress(*at)

            engine.fit(computed, state, data.loaders, intensity, ranks, after_epoch, after_step)
        with _problems_on_every_rank(ranks):
            if ranks.is_main:
                on_main.finish(state)
        exit_code = 0
    except engine.NonFiniteLoss as error:
        names = ", ".join(sorted({*data.rows("train", error.rows).table["patient"].to_pylist()}))
        kept = "the checkpoint of the previous epoch is kept" if error.epoch > 1 else "no checkpoint exists yet"
        wrong = f"The loss of epoch {error.epoch}, step {error.step} is not finite (patients in the batch: {names})"
        raise UserError(f"{wrong}: lower --optim.lr or set --optim.clip-norm 1; {kept}.") from error
    finally:
        with suppress(Exception):
            on_main.stop()
        tracker.finish(exit_code)


def choose_precision(experiment: Experiment, run: run_directory.Run, ranks: Ranks) -> str:
    """`fp32` or `bf16`, the same on every rank: as the run began, otherwise as configured, otherwise the faster on rank 0."""
    if not ranks.is_main:  # which would measure for nothing
        return from_main(None, ranks)
    chosen, why = run.description.get("precision"), "as when the run began"
    if not chosen and experiment.train.precision != "auto":
        chosen, why = experiment.train.precision, "as configured"
    elif not chosen:
        chosen, why = precision.fastest(ranks.device), "the faster one on this GPU"
        if ranks.device.type == "cpu":
            why = f"the faster one on this CPU: {precision.describe_rates()}"
    log.info("Precision: %s (%s).", chosen, why)
    return from_main(chosen, ranks)


@contextmanager
def trace_steps(run: str) -> Iterator[Callable[[], None]]:
    """Trace steps 4 to 6 to `profile/steps.json`, for https://ui.perfetto.dev; yields a function to call after each step."""

    def keep(trace: profiler.profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "steps.json")
            trace.export_chrome_trace(file)
            filesystem.publish(filesystem.join(run, "profile", "steps.json"), filesystem.read_bytes(file))

    activities = [profiler.ProfilerActivity.CPU, *[profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()]
    schedule = profiler.schedule(wait=2, warmup=1, active=3, repeat=1)  # excludes compilation and the choice of kernels
    with profiler.profile(activities=activities, schedule=schedule, on_trace_ready=keep) as trace:
        yield trace.step


@contextmanager
def _problems_on_every_rank(ranks: Ranks) -> Iterator[None]:
    """Raise a rank's UserError, or its failed write, on every rank, since the others would wait for it."""
    problem = None
    try:
        with io_errors_as_user_errors():
            yield
    except UserError as error:
        problem = str(error)
    raise_first_problem(problem, ranks)


def is_out_of_memory(error: BaseException) -> bool:
    """True for an out-of-memory error, on a GPU or a CPU."""
    on_gpu = r"(CUBLAS|CUDNN)_STATUS_\w*ALLOC\w*_FAILED|CUDA error: out of memory|Failed to CUDA [cm]alloc"
    message = rf"can't allocate memory|{on_gpu}"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(message, str(error)) is not None


def resume(state: engine.TrainState, run: run_directory.Run) -> list[dict]:
    """Load the run's last checkpoint, if there is one; returns the record up to it."""
    found = checkpoint.last(run.path)
    if found is None:
        return []
    state.load_state_dict(found.training_state())
    record = [epoch for epoch in run_directory.read_record(run.path) if epoch["epoch"] <= state.epoch]
    if not record or record[-1]["epoch"] < state.epoch:
        # After a kill between writing the checkpoint and the record's line, the checkpoint's card has the same metrics.
        record.append({name: np.nan if value is None else value for name, value in found.card["metrics"].items()})
    return record
