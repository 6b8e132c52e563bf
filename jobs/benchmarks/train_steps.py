"""Sections about our own steps: what scores and the loader cost, how near the machine's peak we are, sizes on a GPU."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from heartseg.config.experiment import Experiment, ImageConfig
from heartseg.metrics.segmentation import ScoreSums, predicted_labels
from heartseg.models import precision
from heartseg.models.deeplabv3 import build_model
from heartseg.training.losses import segmentation_loss
from jobs.benchmarks.train_bench import Bench, loader_batches, our_steps, peak_memory_gb, reset_peak_memory, row

# Sizes of the square matrices whose product shows the machine's peak; the last is for GPUs.
MATRIX_SIZES = (1024, 2048, 4096, 8192)
BATCHES_SCORED = 20
GPU_BATCHES = (12, 16, 32, 64, 128)
SEED_EPOCHS, SEED_TRAINING, SEED_TEST = 170, 1600, 400


def median_seconds(bench: Bench, action: Callable[[], object], times: int) -> float:
    """The median time of an action, after one that is not counted."""
    return statistics.median([bench.seconds(action)[0] for _ in range(1 + times)][1:])


def measure_metrics(bench: Bench) -> list[dict]:
    """What the scores of an evaluation cost, as a share of its forward passes."""
    rows = []
    for experiment, size in ((bench.experiment(), 4), (bench.experiment(small=True), 32)):
        model = build_model(experiment.model).to(bench.device, memory_format=torch.channels_last).eval()
        images, masks = bench.random_batch(experiment, size)
        with torch.inference_mode():
            logits = precision.forward(experiment.train, model, images)
            forward = median_seconds(bench, lambda e=experiment, m=model, x=images: precision.forward(e.train, m, x), 5)
            scores = median_seconds(bench, lambda x=logits, y=masks: _score(x, y), 5) / BATCHES_SCORED
            loss = median_seconds(bench, lambda e=experiment, x=logits, y=masks: segmentation_loss(e.loss, x, y), 5)
        what = f"{experiment.model.backbone}, {experiment.image.height} px, batch {size}"
        rows.append(row("metrics", f"scores / forward pass ({what})", 100 * scores / forward, "%", "at most 2"))
        rows.append(row("metrics", "loss / forward pass", 100 * loss / forward, "%"))
    return rows


def _score(logits: torch.Tensor, masks: torch.Tensor) -> None:
    """What an evaluation does with the logits of some batches but for the loss."""
    sums = ScoreSums(logits.device)
    for _ in range(BATCHES_SCORED):
        sums.add(logits.new_zeros(()), predicted_labels(logits), masks)
    sums.means()


def new_model(experiment: Experiment, own_convolutions: bool = True) -> nn.Module:
    """The experiment's network with its first weights."""
    torch.manual_seed(experiment.train.seed)
    return build_model(experiment.model, own_convolutions)


def medians_in_turn(bench: Bench, ways: Sequence[Iterator]) -> list[float]:
    """The median seconds of a step of each way, one step after the other in turn, after one that is not counted."""
    rounds = [[bench.seconds(lambda way=way: next(way))[0] for way in ways] for _ in range(1 + bench.options.steps)]
    return [statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True)]


def measure_loader(bench: Bench) -> list[dict]:
    """Steps fed by the loader, in turn with steps on one batch that stays on the device."""
    experiment = bench.experiment()
    fed = loader_batches(experiment, bench.frames(experiment), bench.device)
    resident = next(loader_batches(experiment, bench.frames(experiment), bench.device))
    ways = [our_steps(experiment, new_model(experiment), batches, bench.ranks) for batches in (fed, repeat(resident))]
    fed_s, resident_s = medians_in_turn(bench, ways)
    return [row("loader", "fed by the loader / one resident batch, images/s", resident_s / fed_s, "x")]


def measure_convolutions(bench: Bench) -> list[dict]:
    """Our steps with the convolutions of `heartseg.models.convolutions`, in turn with steps on PyTorch's own."""
    large = bench.experiment()
    small = replace(large, image=ImageConfig(192, 192), model=replace(large.model, backbone="mobilenet_v3_large"))
    rows = []
    for experiment in (large, small):
        batches = repeat(bench.random_batch(experiment, bench.options.batch))
        ways = [our_steps(experiment, new_model(experiment, own), batches, bench.ranks) for own in (True, False)]
        ours_s, theirs_s = medians_in_turn(bench, ways)
        what = f"{experiment.model.backbone}, {experiment.image.height} px, batch {bench.options.batch}"
        note = f"{ours_s:.2f} against {theirs_s:.2f} s a step"
        rows.append(row("convolutions", f"our convolutions / PyTorch's, images/s ({what})", theirs_s / ours_s, "x", note))
    return rows


def measure_peak(bench: Bench) -> list[dict]:
    """Our training steps as a share of what the machine's matrix products reach, and the memory that they take."""
    experiment, batch = bench.experiment(), bench.options.batch
    rows = [row("peak", f"matrix product, {name}", rate / 1e9, "GFLOP/s") for name, rate in matrix_rates(bench).items()]
    images_per_s, memory_gb = our_rate(bench, experiment, batch, bench.options.steps)
    flop = flop_per_image(bench, experiment)
    best = max(entry["value"] for entry in rows)
    what = f"{experiment.model.backbone}, {experiment.image.height} px, batch {batch}"
    return [
        *rows,
        row("peak", f"one image, forward and backward ({what})", flop / 1e9, "GFLOP", "what is computed, counted by PyTorch"),
        row("peak", "training", images_per_s, "images/s"),
        row("peak", "training", images_per_s * flop / 1e9, "GFLOP/s"),
        row("peak", "training / the best matrix product", 100 * images_per_s * flop / 1e9 / best, "%"),
        row("peak", "peak memory", memory_gb, "GB"),
    ]


def our_rate(bench: Bench, experiment: Experiment, batch: int, steps: int) -> tuple[float, float]:
    """Images per second of our steps on a batch that stays on the device, and the peak memory in GB."""
    batches = repeat(bench.random_batch(experiment, batch))
    way = our_steps(experiment, new_model(experiment), batches, bench.ranks)
    reset_peak_memory(bench.device)
    next(way), next(way)
    # All steps under one clock: a GPU is kept busy only where nobody waits for it in between.
    seconds, _ = bench.seconds(lambda: [next(way) for _ in range(steps)])
    return steps * batch / seconds, peak_memory_gb(bench.device)


def matrix_rates(bench: Bench) -> dict[str, float]:
    """The best rate of square matrix products by type, in FLOP/s."""
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for size in MATRIX_SIZES if bench.device.type == "cuda" else MATRIX_SIZES[:2]:
            one, other = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(one)
            times = 20 if bench.device.type == "cuda" else 3
            seconds = median_seconds(bench, lambda a=one, b=other, o=out, n=times: [torch.mm(a, b, out=o) for _ in range(n)], 3)
            rates[name] = max(rates.get(name, 0.0), times * 2 * size**3 / seconds)
    return rates


def flop_per_image(bench: Bench, experiment: Experiment) -> float:
    """Floating-point operations of one image's forward and backward pass on the device, counted without computing them."""
    with FakeTensorMode(), bench.device:
        model = build_model(experiment.model).train()
        images = torch.empty(2, 1, experiment.image.height, experiment.image.width)
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
    return counter.get_total_flops() / 2


def measure_gpu(bench: Bench) -> list[dict]:
    """Images per second against the batch and with compilation; what the seed's 170 epochs would take."""
    rows, flop, rates = [], flop_per_image(bench, bench.experiment()), {}
    peak = max(matrix_rates(bench).values())
    for batch in GPU_BATCHES:
        experiment = bench.experiment(batch_size=batch)
        rates[batch], memory_gb = our_rate(bench, experiment, batch, 20)
        share = f"{100 * rates[batch] * flop / peak:.0f} % of the matrix peak, {memory_gb:.1f} GB"
        rows.append(row("gpu", f"training, batch {batch}", rates[batch], "images/s", share))
    for batch in (GPU_BATCHES[0], GPU_BATCHES[-2]):
        for mode in ("default", "reduce-overhead"):
            experiment = bench.experiment(batch_size=batch, compile=mode)
            rate, memory_gb = our_rate(bench, experiment, batch, 20)
            note = f"{rate / rates[batch]:.2f} x without, {memory_gb:.1f} GB"
            rows.append(row("gpu", f"training, batch {batch}, compile {mode}", rate, "images/s", note))
    model = new_model(bench.experiment()).to(bench.device, memory_format=torch.channels_last).eval()
    for batch in (4, 32):
        images, _ = bench.random_batch(bench.experiment(), batch)
        with torch.inference_mode():
            forward = median_seconds(bench, lambda x=images: precision.forward(bench.experiment().train, model, x), 20)
        rows.append(row("gpu", f"evaluation, batch {batch}", batch / forward, "images/s"))
        hours = SEED_EPOCHS * (SEED_TRAINING / rates[12] + SEED_TEST * forward / batch) / 3600
        note = "estimated from these rates, not run"
        rows.append(row("gpu", f"170 epochs of the seed at its batch of 12, evaluated by {batch}", hours, "h", note))
    return rows
