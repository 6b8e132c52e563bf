"""Benchmarks of training speed: `python jobs/benchmark.py train`, or some sections, `--sections plain,metrics`.

A section is a function that takes a `Bench` and returns a table. The baseline trains like public repositories for CAMUS: it
reads a NIfTI pair with nibabel and resizes it whenever an image is needed, computes in float32 in the default memory layout,
and fetches the loss and a Dice computed in Python at every step.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from heartseg.config.experiment import Experiment, ImageConfig, TrackingConfig, to_json
from heartseg.config.recipes import seed
from heartseg.datasets import camus, phantom
from heartseg.datasets.image_folder import open_source
from heartseg.errors import UserError, require
from heartseg.labels import STRUCTURES
from heartseg.metrics.segmentation import ScoreSums, predicted_labels
from heartseg.models import deeplabv3
from heartseg.models.deeplabv3 import build_model
from heartseg.models.devices import choose_device
from heartseg.shards import preprocessing
from heartseg.shards.loader import Batch, Loader, epoch_order
from heartseg.shards.reader import FrameRows, load_groups
from heartseg.storage import filesystem
from heartseg.training import engine
from heartseg.training.distributed import Ranks, barrier, wrap_model
from jobs.benchmarks.two_sides import Cost, Row, Table, cost_of, in_turn

Backbone = Literal["resnet101", "resnet50", "mobilenet_v3_large"]
Losses = Iterator[torch.Tensor]
SMALL: Backbone = "mobilenet_v3_large"
# Sizes of the square matrices whose product shows the machine's peak; the last two are for GPUs.
MATRIX_SIZES = (1024, 2048, 4096, 8192)
BATCHES_SCORED, GPU_BATCHES = 20, (12, 16, 32, 64, 128)
SEED_EPOCHS, SEED_TRAINING, SEED_TEST = 170, 1600, 400


@dataclass(frozen=True)
class Options:
    sections: str = "all"
    """Sections to measure, separated by commas: plain, convolutions, metrics, peak, gpus, ray."""
    source: str = ""
    """Folder of the CAMUS release; synthetic patients if not given."""
    backbone: Backbone = "resnet101"
    """Network for the timed steps."""
    size: int = 256
    """Height and width of the images of the timed steps."""
    batch: int = 12
    """Images in a batch."""
    steps: int = 2
    """Timed steps, after an untimed one; the median is reported."""
    pairs: int = 5
    """Section ray: pairs of runs, with and without Ray in turn; the median of their ratios is reported."""
    ray_size: int = 128
    """Section ray: height and width of the images for MobileNetV3, small enough to take minutes on CPUs."""
    ray_patients: int = 40
    """Section ray: synthetic patients in an epoch; with 500, epochs take half a minute or more on 2 cores."""


@dataclass(frozen=True)
class Bench:
    """A benchmark's settings, a folder for its data, and the device."""

    options: Options
    folder: str
    device: torch.device

    def experiment(self, backbone: Backbone | None = None, size: int | None = None, **train) -> Experiment:
        """The seed recipe without dropout, which would draw differently on the two sides; by default at the settings' size."""
        recipe, side = seed(), size or self.options.size
        model = replace(recipe.model, backbone=backbone or self.options.backbone, dropout=0.0)
        train = replace(recipe.train, **{"batch_size": self.options.batch} | train)
        return replace(recipe, image=ImageConfig(side, side), model=model, train=train, tracking=TrackingConfig(wandb="off"))

    def model(self, experiment: Experiment, own_convolutions: bool = True) -> torch.nn.Module:
        """The experiment's network with its initial weights, on the device."""
        torch.manual_seed(experiment.train.seed)
        return build_model(experiment.model, own_convolutions).to(self.device)

    def random_batch(self, experiment: Experiment, size: int) -> Batch:
        """Images and masks of noise on the device, for measurements that do not depend on pixels."""
        grid = (experiment.image.height, experiment.image.width)
        images = torch.rand(size, 1, *grid, device=self.device)
        return images, torch.randint(4, (size, *grid), device=self.device, dtype=torch.uint8)

    def our_steps(
        self, experiment: Experiment, batches: Iterable[Batch], own_convolutions: bool = True, ranks: Ranks | None = None
    ) -> Losses:
        """Take one training step per iteration, with scores; yields its loss, on the device."""
        model, sums = self.model(experiment, own_convolutions), ScoreSums(self.device)
        ranks = ranks or Ranks(0, 1, self.device)
        state = engine.start(experiment, model, ranks, partial(wrap_model, ranks=ranks, train=experiment.train))
        state.wrapped.train()
        for images, masks in batches:
            loss, prediction = engine.train_step(experiment, state, images, masks, ranks)
            sums.add(loss, prediction, masks)
            yield loss

    def baseline_steps(self, experiment: Experiment, stills: "Stills") -> Losses:
        """Take one training step of the baseline per iteration; yields its loss."""
        model = self.model(experiment, own_convolutions=False).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=experiment.optim.lr, momentum=experiment.optim.momentum)
        for epoch in count():
            order = epoch_order(len(stills), experiment.train.seed, epoch).tolist()
            for images, masks in DataLoader(stills, experiment.train.batch_size, sampler=order, drop_last=True):
                # Whatever our own steps have set for the process, the baseline has PyTorch's defaults.
                with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
                    images, masks = images.to(self.device), masks.to(self.device)
                    optimizer.zero_grad()
                    logits = model(images)
                    loss = cross_entropy(logits, masks)
                    loss.backward()
                    optimizer.step()
                dice_in_python(logits, masks)
                yield loss.detach().cpu()

    def steps_in_turn(self, *sides: Iterator) -> list[Cost]:
        """The median costs of a step of each side."""
        return in_turn({place: partial(next, side) for place, side in enumerate(sides)}, self.options.steps, self.device)

    def both_sides(self, experiment: Experiment) -> tuple[Losses, Losses]:
        """The baseline's steps and ours, from the same weights over the same images."""
        source, train = self.options.source or os.path.join(self.folder, "source"), experiment.train
        if not self.options.source:
            phantom.write_phantom(source, 8)  # enough for two batches of the seed's 12 in the training group
        frames = write_shards(experiment, source, os.path.join(self.folder, "shards"))
        loader = Loader.of(frames, 0, 1, self.device)
        batches = (batch for epoch in count() for batch in loader.training_batches(train.batch_size, train.seed, epoch))
        stills = Stills(source, frames, experiment.image.height)
        return self.baseline_steps(experiment, stills), self.our_steps(experiment, batches)


def run(options: Options) -> list[Table]:
    """Measure one section after another, except those that lack a package, and print each table when it is done."""
    steps, pairs, batch = options.steps, options.pairs, options.batch
    message = f"--steps ({steps}) and --pairs ({pairs}) must be at least 1, and --batch ({batch}) at least 2."
    require(min(steps, pairs, batch - 1) >= 1, message)
    names, tables = list(SECTIONS) if options.sections == "all" else options.sections.split(","), []
    for name in names:
        require(name in SECTIONS, f"{name!r} is not a section: choose from {', '.join(SECTIONS)}.")
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder, choose_device())
        for name in names:
            try:
                tables.append(SECTIONS[name](bench))
            except ModuleNotFoundError as error:
                print(f"\n{name} left out: the package {error.name} is not installed")
            else:
                tables[-1].show(bench.device)
    return tables


def about(experiment: Experiment) -> str:
    return f"{experiment.model.backbone}, {experiment.image.height} px, batch {experiment.train.batch_size}"


def measure_plain(bench: Bench) -> Table:
    """Images per second and memory of the baseline's steps and ours, in turn, and the losses of the same steps."""
    experiment, batch, losses = bench.experiment(), bench.options.batch, ([], [])

    def recorded(steps: Iterator[torch.Tensor], kept: list[torch.Tensor]) -> Iterator[None]:
        for loss in steps:
            kept.append(loss)
            yield

    base, ours = bench.steps_in_turn(*map(recorded, bench.both_sides(experiment), losses))
    rows = [
        Row("training", batch / ours.wall_s, "images/s", batch / base.wall_s, "target: at least 2.8 times on CPUs"),
        Row("peak memory, including the other model's weights", ours.peak_gb, "GB", base.peak_gb),
    ]
    if bench.device.type == "cpu":
        rows.insert(1, Row("training", batch / ours.cpu_s, "images per CPU second", batch / base.cpu_s))
    for step, (one, other) in enumerate(zip(*losses, strict=True), 1):
        rows.append(Row(f"loss of step {step}", other.item(), "", one.item()))
    return Table(f"plain: {about(experiment)}", ("baseline", "ours"), rows)


def measure_convolutions(bench: Bench) -> Table:
    """Our steps with the convolutions of `heartseg.models.convolutions` and with PyTorch's own."""
    batch, rows = bench.options.batch, []
    for experiment in (bench.experiment(), bench.experiment(SMALL, 192)):
        batches = repeat(bench.random_batch(experiment, batch))
        theirs, ours = bench.steps_in_turn(*(bench.our_steps(experiment, batches, own) for own in (False, True)))
        note = f"{ours.wall_s:.2f} compared with {theirs.wall_s:.2f} s per step"
        rows.append(Row(about(experiment), batch / ours.wall_s, "images/s", batch / theirs.wall_s, note))
    return Table("convolutions: training", ("PyTorch's", "ours"), rows)


def measure_metrics(bench: Bench) -> Table:
    """The cost of an evaluation's scores, compared with that of its forward passes."""
    rows = []
    for experiment in (bench.experiment(batch_size=4), bench.experiment(SMALL, 128, batch_size=32)):
        forward, masks = forward_pass(bench, experiment)
        sides = {"forward": forward, "scores": partial(score_batches, forward(), masks)}
        forward_ms, scores_ms = (1000 * cost.wall_s for cost in in_turn(sides, 5, bench.device))
        scores_ms /= BATCHES_SCORED
        rows.append(Row(about(experiment), scores_ms, "ms", forward_ms, f"{scores_ms / forward_ms:.2%}; target: at most 2 %"))
    return Table("metrics: an evaluation", ("forward pass", "scores"), rows)


def forward_pass(bench: Bench, experiment: Experiment) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """A function that computes the logits of a batch of noise like an evaluation, and the batch's masks."""
    model = bench.model(experiment).to(memory_format=torch.channels_last).eval()
    images, masks = bench.random_batch(experiment, experiment.train.batch_size)
    return torch.inference_mode()(partial(deeplabv3.forward, experiment.train, model, images)), masks


def score_batches(logits: torch.Tensor, masks: torch.Tensor) -> dict[str, float]:
    """Score the logits of some batches like an evaluation, without the loss."""
    sums = ScoreSums(logits.device)
    for _ in range(BATCHES_SCORED):
        sums.add(logits.new_zeros(()), predicted_labels(logits), masks)
    return sums.means()


def measure_peak(bench: Bench) -> Table:
    """Our training steps (by batch on a GPU) against matrix products of as many operations; evaluation; the seed's hours."""
    on_gpu, experiment, peaks, rates = bench.device.type == "cuda", bench.experiment(), matrix_rates(bench), {}
    flop, steps = flop_per_image(bench, experiment), 20 if on_gpu else bench.options.steps
    rows = [Row(f"matrix product, {name}", rate / 1e9, "GFLOP/s") for name, rate in peaks.items()]
    rows.append(Row("one image, forward and backward", flop / 1e9, "GFLOP", note="counted by PyTorch"))
    for batch in GPU_BATCHES if on_gpu else (bench.options.batch,):
        if on_gpu:
            torch.cuda.empty_cache()  # of a batch that did not fit
        try:
            rates[batch], peak_gb = training_rate(bench, batch, steps)
        except torch.OutOfMemoryError:
            rows.append(Row(f"training, batch {batch}", float("nan"), "images/s", note="out of memory"))
            continue
        print(f"batch {batch}: {rates[batch]:.1f} images/s", flush=True)  # the table comes only when all is measured
        row = (rates[batch], "images/s", max(peaks.values()) / flop, f"{peak_gb:.1f} GB at the peak")
        rows.append(Row(f"training, batch {batch}", *row))
    for batch in (4, 32):
        forward, _ = forward_pass(bench, bench.experiment(batch_size=batch))
        (cost,) = in_turn({"forward": forward}, steps, bench.device)
        slowest = next(iter(rates.values()), float("nan"))
        hours = SEED_EPOCHS * (SEED_TRAINING / slowest + SEED_TEST * cost.wall_s / batch) / 3600
        rows.append(Row(f"evaluation, batch {batch}", batch / cost.wall_s, "images/s"))
        name, note = f"170 epochs of the seed, evaluated in batches of {batch}", "estimated from these rates, not run"
        rows.append(Row(name, hours, "h", note=note))
    title = f"peak: {experiment.model.backbone}, {experiment.image.height} px"
    return Table(title, ("matrix product", "ours"), rows)


def training_rate(bench: Bench, batch: int, steps: int, ranks: Ranks | None = None) -> tuple[float, float]:
    """Images per second of training steps with `batch` images on each rank, over all ranks, and the peak memory in GB."""
    world_size = ranks.world_size if ranks else 1
    experiment = bench.experiment(batch_size=batch * world_size)
    side = bench.our_steps(experiment, repeat(bench.random_batch(experiment, batch)), ranks=ranks)
    warm_up = cost_of(lambda: [next(side) for _ in range(2)], bench.device)
    if ranks:
        barrier(ranks)
    # All steps are timed together: a GPU stays busy only if nothing waits for it between steps.
    cost = cost_of(lambda: [next(side) for _ in range(steps)], bench.device)
    return steps * batch * world_size / cost.wall_s, max(warm_up.peak_gb, cost.peak_gb)


def measure_gpus(bench: Bench) -> Table:
    """Training on all GPUs of this machine, with as many images on each, against one of them; on CPUs two processes."""
    on_gpu, rows = bench.device.type == "cuda", []
    count, kind = (torch.cuda.device_count(), "GPUs") if on_gpu else (2, "processes")
    if count < 2:
        return Table("gpus: this machine has one GPU only", ("one", "all"), rows)
    if on_gpu:
        torch.cuda.empty_cache()  # of earlier sections: the ranks are other processes
    for batch in (12, 64) if on_gpu else (bench.options.batch,):
        name, rates = f"{count} {kind}, {batch} images each", []
        try:
            for world_size in (1, count):
                file = os.path.join(bench.folder, f"{world_size}-ranks-of-{batch}")
                torch.multiprocessing.spawn(time_rank, (world_size, batch, bench.options, file), world_size)
                rates.append(float(Path(f"{file}.rate").read_text()))
        except torch.multiprocessing.ProcessRaisedException as error:
            if "OutOfMemoryError" not in str(error):
                raise
            rows.append(Row(name, float("nan"), "images/s", note="out of memory"))
        else:
            rows.append(Row(name, rates[1], "images/s", rates[0], f"{rates[1] / rates[0] / count:.0%} of {count} times one's"))
    return Table(f"gpus: {bench.options.backbone}, {bench.options.size} px", ("one", "all"), rows)


def time_rank(rank: int, world_size: int, batch: int, options: Options, file: str) -> None:
    """Train for some steps as one of `world_size` ranks, which meet at `file`; the first writes their rate to `file`.rate."""
    device = choose_device(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=world_size)
    steps = 20 if device.type == "cuda" else options.steps
    rate, _ = training_rate(Bench(options, "", device), batch, steps, Ranks(rank, world_size, device))
    if rank == 0:
        Path(f"{file}.rate").write_text(str(rate))
    dist.destroy_process_group()


def matrix_rates(bench: Bench) -> dict[str, float]:
    """The best rate of square matrix products by type, in FLOP/s."""
    is_gpu, rates = bench.device.type == "cuda", {}
    times = 20 if is_gpu else 3
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for size in MATRIX_SIZES if is_gpu else MATRIX_SIZES[:2]:
            one, other, out = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(3))
            multiply = partial(torch.mm, one, other, out=out)
            (cost,) = in_turn({name: lambda call=multiply: [call() for _ in range(times)]}, 3, bench.device)
            rates[name] = max(rates.get(name, 0.0), times * 2 * size**3 / cost.wall_s)
    return rates


def flop_per_image(bench: Bench, experiment: Experiment) -> float:
    """Floating-point operations of one image's forward and backward pass, counted without computing them."""
    with FakeTensorMode(), bench.device:
        model = build_model(experiment.model).train()
        images = torch.empty(2, 1, experiment.image.height, experiment.image.width)
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
    return counter.get_total_flops() / 2


def measure_ray(bench: Bench) -> Table:
    """An epoch under Ray and in a plain process, from whole runs of jobs/train.py in turn, and the time to the first step."""
    import ray  # noqa: F401  (a machine without Ray leaves this section out)

    experiment, pairs = bench.experiment(SMALL, bench.options.ray_size, epochs=2), bench.options.pairs
    source, shards = (os.path.join(bench.folder, name) for name in ("ray-source", "ray-shards"))
    phantom.write_phantom(source, bench.options.ray_patients, scale=0.25)
    write_shards(experiment, source, shards)
    experiment = replace(experiment, data=shards)
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "ray": []}
    for pair in range(pairs):
        for launcher in times if pair % 2 else reversed(times):
            times[launcher].append(time_run(experiment, launcher, bench.folder))
    longer = statistics.median(under_ray[1] / plain[1] for plain, under_ray in zip(*times.values(), strict=True)) - 1
    plain, under_ray = ([statistics.median(seconds) for seconds in zip(*runs, strict=True)] for runs in times.values())
    rows = [
        Row("an epoch", under_ray[1], "s", plain[1], f"{100 * longer:+.1f} %, median of {pairs} pairs; target: at most 3 %"),
        Row("from the command to the first step", under_ray[0], "s", plain[0], "target: under 30 on 2 cores"),
    ]
    return Table(f"ray: {about(experiment)}", ("plain process", "under Ray"), rows)


def time_run(experiment: Experiment, launcher: str, folder: str) -> tuple[float, float]:
    """Seconds from the start of a two-epoch run to its first step, and seconds of its second epoch, with Ray's report."""
    runs, config = (os.path.join(folder, name) for name in ("runs", "experiment.json"))
    filesystem.publish_json(config, to_json(experiment))
    job = Path(__file__).resolve().parents[1] / "train.py"
    command = [sys.executable, "-u", str(job), "--config", config, "--runs", runs, "--launcher", launcher]
    first_s, started, lines = None, time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            lines.append(line)
            if first_s is None and "step 1/" in line:
                first_s = time.perf_counter() - started
    if process.returncode or first_s is None:
        raise UserError(f"{' '.join(command)} failed: {''.join(lines[-3:])}")
    # The epoch is timed from one set of samples to the next, so that the cost of its end is included.
    ends = [next(Path(runs).glob(f"*/samples/{name}.npz")).stat().st_mtime for name in ("first", "last")]
    shutil.rmtree(runs)
    return first_s, ends[1] - ends[0]


def write_shards(experiment: Experiment, source: str, out: str) -> FrameRows:
    """Write a source's shards on an experiment's grid; returns the training group."""
    shards = preprocessing.write_shards(open_source(source), out, experiment.image, experiment.split)
    return load_groups(shards, ["train"])["train"]


class Stills(Dataset):
    """A group's images in the order of its rows, each read from its NIfTI files when needed."""

    def __init__(self, source: str, frames: FrameRows, size: int):
        stills = frames.table.select(["patient", "view", "phase"]).to_pylist()
        self.paths = [[camus.recording_path(source, *still.values(), suffix) for suffix in ("", "_gt")] for still in stills]
        self.size = (size, size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        import nibabel

        image, mask = (torch.from_numpy(nibabel.load(path).get_fdata().T.copy())[None, None] for path in self.paths[index])
        image = interpolate(image.float() / 255, self.size, mode="bilinear", antialias=True)
        return image[0], interpolate(mask, self.size, mode="nearest-exact")[0, 0].long()


def dice_in_python(logits: torch.Tensor, masks: torch.Tensor) -> float:
    """The mean Dice over structures and images, computed one by one."""
    found = []
    for prediction, mask in zip(logits.argmax(dim=1).cpu().numpy(), masks.cpu().numpy(), strict=True):
        for label in range(1, len(STRUCTURES) + 1):
            ours, theirs = prediction == label, mask == label
            found.append(2 * (ours & theirs).sum() / max(1, ours.sum() + theirs.sum()))
    return float(np.mean(found))


MEASURES = (measure_plain, measure_convolutions, measure_metrics, measure_peak, measure_gpus, measure_ray)
SECTIONS: dict[str, Callable[[Bench], Table]] = {measure.__name__.removeprefix("measure_"): measure for measure in MEASURES}
