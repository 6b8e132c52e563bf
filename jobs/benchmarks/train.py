"""Training speed in tables of two sides: `python jobs/benchmark.py train`, or some sections, `--sections plain,metrics`.

A section is a function of the bench that returns its tables. Packages that only one section needs are imported there, so
that a machine without them measures the others.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from heartseg.config.experiment import Experiment, ImageConfig, to_json
from heartseg.errors import UserError, require
from heartseg.metrics.segmentation import ScoreSums, predicted_labels
from heartseg.models import precision
from heartseg.models.deeplabv3 import build_model
from heartseg.storage import filesystem
from jobs.benchmarks.train_sides import Bench, Options, both_sides, new_model, our_steps, write_shards
from jobs.benchmarks.two_sides import Cost, Row, Table, choose, cost_of, in_turn, machine

SIDES = ("baseline", "ours")
# Sizes of the square matrices whose product shows the machine's peak; the last two are for GPUs.
MATRIX_SIZES = (1024, 2048, 4096, 8192)
BATCHES_SCORED = 20
GPU_BATCHES = (12, 16, 32, 64, 128)
SEED_EPOCHS, SEED_TRAINING, SEED_TEST = 170, 1600, 400


def run(options: Options) -> list[dict]:
    """Measure the sections one after the other, print each as it is done, and write `--out`; returns the rows."""
    names = list(SECTIONS) if options.sections == "all" else options.sections.split(",")
    choose(names, SECTIONS)
    fit = min(options.batch - 1, options.steps, options.curve_steps, options.pairs) >= 1
    require(fit, "--steps, --curve-steps and --pairs must be at least 1, --batch at least 2.")
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        for name in names:
            try:
                tables = SECTIONS[name](bench)
            except ModuleNotFoundError as error:
                print(f"\n{name} left out: the package {error.name} is not installed")
                continue
            for table in tables:
                table.show(bench.device)
                rows += [{"section": name} | row._asdict() for row in table.rows]
    if options.out:
        filesystem.publish_json(options.out, {"machine": machine(bench.device), "options": asdict(options), "rows": rows})
        print(f"\n{options.out}")
    return rows


def about(experiment: Experiment, batch: int) -> str:
    """What is computed, for the name of a row."""
    return f"{experiment.model.backbone}, {experiment.image.height} px, batch {batch}"


def steps_in_turn(bench: Bench, sides: dict[str, Iterator]) -> list[Cost]:
    """The median costs of a step of each side."""
    return in_turn({name: lambda side=side: next(side) for name, side in sides.items()}, bench.options.steps, bench.device)


def measure_plain(bench: Bench) -> list[Table]:
    """Images per second and memory of the baseline and of our steps, in turn, and their loss curves side by side."""
    experiment, batch = bench.experiment(), bench.options.batch
    base, ours = steps_in_turn(bench, both_sides(bench, experiment))
    rows = [
        Row("training", batch / ours.wall_s, "images/s", batch / base.wall_s, "at least 2.8 on CPUs"),
        Row("peak memory beside the other side's weights", ours.peak_gb, "GB", base.peak_gb),
    ]
    if bench.device.type == "cpu":
        rows.insert(1, Row("training", batch / ours.cpu_s, "images/s of a core", batch / base.cpu_s))
    return [Table(f"plain: {about(experiment, batch)}", SIDES, rows), loss_curves(bench)]


def loss_curves(bench: Bench) -> Table:
    """The losses of both sides over the first steps; without dropout, which would draw differently."""
    experiment = bench.experiment(small=True)
    experiment = replace(experiment, model=replace(experiment.model, dropout=0.0))
    losses = [[float(next(side)) for _ in range(bench.options.curve_steps)] for side in both_sides(bench, experiment).values()]
    pairs = list(zip(*losses, strict=True))
    rows = [Row(f"step {step}", ours, "", base) for step, (base, ours) in enumerate(pairs, 1)]
    rows.append(Row("largest difference", max(100 * abs(ours - base) / base for base, ours in pairs), "%"))
    return Table(f"plain: loss of {about(experiment, bench.options.batch)}", SIDES, rows)


def measure_convolutions(bench: Bench) -> list[Table]:
    """Our steps with the convolutions of `heartseg.models.convolutions` and with PyTorch's own."""
    large, batch, rows = bench.experiment(), bench.options.batch, []
    small = replace(large, image=ImageConfig(192, 192), model=replace(large.model, backbone="mobilenet_v3_large"))
    for experiment in (large, small):
        batches = repeat(bench.random_batch(experiment, batch))
        models = {"theirs": new_model(experiment, own_convolutions=False), "ours": new_model(experiment)}
        sides = {name: our_steps(experiment, model, batches, bench.ranks) for name, model in models.items()}
        theirs, ours = steps_in_turn(bench, sides)
        note = f"{ours.wall_s:.2f} against {theirs.wall_s:.2f} s a step"
        rows.append(Row(about(experiment, batch), batch / ours.wall_s, "images/s", batch / theirs.wall_s, note))
    return [Table("convolutions: training", ("PyTorch's", "ours"), rows)]


def measure_metrics(bench: Bench) -> list[Table]:
    """What the scores of an evaluation cost beside its forward passes."""
    rows = []
    for experiment, batch in ((bench.experiment(), 4), (bench.experiment(small=True), 32)):
        model = build_model(experiment.model).to(bench.device, memory_format=torch.channels_last).eval()
        images, masks = bench.random_batch(experiment, batch)
        with torch.inference_mode():
            forward = partial(precision.forward, experiment.train, model, images)
            sides = {"forward": forward, "scores": partial(score_batches, forward(), masks)}
            forward_ms, scores_ms = (1000 * cost.wall_s for cost in in_turn(sides, 5, bench.device))
        scores_ms /= BATCHES_SCORED
        note = f"{100 * scores_ms / forward_ms:.2f} %, at most 2"
        rows.append(Row(about(experiment, batch), scores_ms, "ms", forward_ms, note))
    return [Table("metrics: an evaluation", ("forward pass", "scores"), rows)]


def score_batches(logits: torch.Tensor, masks: torch.Tensor) -> dict[str, float]:
    """What an evaluation does with the logits of some batches except the loss."""
    sums = ScoreSums(logits.device)
    for _ in range(BATCHES_SCORED):
        sums.add(logits.new_zeros(()), predicted_labels(logits), masks)
    return sums.means()


def measure_peak(bench: Bench) -> list[Table]:
    """Our training steps beside what the machine's matrix products reach, and the memory that they take."""
    experiment, batch = bench.experiment(), bench.options.batch
    rates = matrix_rates(bench)
    images_per_s, memory_gb = our_rate(bench, experiment, batch, bench.options.steps)
    gflop = flop_per_image(bench, experiment) / 1e9
    rows = [
        *(Row(f"matrix product, {name}", rate / 1e9, "GFLOP/s") for name, rate in rates.items()),
        Row("one image, forward and backward", gflop, "GFLOP", note="counted by PyTorch"),
        Row("training", images_per_s, "images/s"),
        Row("training", images_per_s * gflop, "GFLOP/s", max(rates.values()) / 1e9),
        Row("peak memory", memory_gb, "GB"),
    ]
    return [Table(f"peak: {about(experiment, batch)}", ("matrix product", "ours"), rows)]


def our_rate(bench: Bench, experiment: Experiment, batch: int, steps: int) -> tuple[float, float]:
    """Images per second of our steps on a batch that stays on the device, and the peak memory in GB."""
    side = our_steps(experiment, new_model(experiment), repeat(bench.random_batch(experiment, batch)), bench.ranks)
    warm_up = cost_of(lambda: [next(side) for _ in range(2)], bench.device)
    # All steps under one clock: a GPU is busy throughout only if no one waits for it between them.
    cost = cost_of(lambda: [next(side) for _ in range(steps)], bench.device)
    return steps * batch / cost.wall_s, max(warm_up.peak_gb, cost.peak_gb)


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
    """Floating-point operations of one image's forward and backward pass on the device, counted without computing them."""
    with FakeTensorMode(), bench.device:
        model = build_model(experiment.model).train()
        images = torch.empty(2, 1, experiment.image.height, experiment.image.width)
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
    return counter.get_total_flops() / 2


def measure_gpu(bench: Bench) -> list[Table]:
    """Images per second by batch; what the seed's 170 epochs would take."""
    if bench.device.type != "cuda":
        print("\ngpu left out: this machine has no GPU")
        return []
    flop, peak = flop_per_image(bench, bench.experiment()), max(matrix_rates(bench).values())
    rates, rows = {}, []
    for batch in GPU_BATCHES:
        rates[batch], memory_gb = our_rate(bench, bench.experiment(batch_size=batch), batch, 20)
        note = f"{100 * rates[batch] * flop / peak:.0f} % of the matrix peak, {memory_gb:.1f} GB"
        rows.append(Row(f"training, batch {batch}", rates[batch], "images/s", note=note))
    experiment = bench.experiment()
    model = new_model(experiment).to(bench.device, memory_format=torch.channels_last).eval()
    for batch in (4, 32):
        images, _ = bench.random_batch(experiment, batch)
        with torch.inference_mode():
            forward = partial(precision.forward, experiment.train, model, images)
            seconds = in_turn({"forward": forward}, 20, bench.device)[0].wall_s
        hours = SEED_EPOCHS * (SEED_TRAINING / rates[12] + SEED_TEST * seconds / batch) / 3600
        rows.append(Row(f"evaluation, batch {batch}", batch / seconds, "images/s"))
        note = "estimated from these rates, not run"
        rows.append(Row(f"170 epochs of the seed at its batch of 12, evaluated by {batch}", hours, "h", note=note))
    return [Table(f"gpu: {experiment.model.backbone}, {experiment.image.height} px", SIDES, rows)]


def measure_ray(bench: Bench) -> list[Table]:
    """An epoch under Ray and in a plain process, whole runs of jobs/train.py in turn; and the time to their first step."""
    if bench.device.type == "cuda":
        print("\nray left out: it compares processes on CPUs")
        return []
    import ray  # noqa: F401  (a machine without Ray leaves this section out)

    from heartseg.datasets import phantom

    experiment, pairs = bench.experiment(small=True, epochs=2), bench.options.pairs
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
        Row("an epoch", under_ray[1], "s", plain[1], f"{100 * longer:+.1f} % in the median of {pairs} pairs, at most 3"),
        Row("from the command to the first step", under_ray[0], "s", plain[0], "under 30 on 2 cores"),
    ]
    return [Table(f"ray: {about(experiment, bench.options.batch)}", ("plain process", "under Ray"), rows)]


def time_run(experiment: Experiment, launcher: str, folder: str) -> tuple[float, float]:
    """Seconds from the command of a training run of two epochs to its first step, and of its second epoch.

    The epoch is counted from one set of samples to the next: what its end costs, Ray's report included, is part of it.
    """
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
    ends = [next(Path(runs).glob(f"*/samples/{name}.npz")).stat().st_mtime for name in ("first", "last")]
    shutil.rmtree(runs)
    return first_s, ends[1] - ends[0]


SECTIONS: dict[str, Callable[[Bench], list[Table]]] = {
    "plain": measure_plain,
    "convolutions": measure_convolutions,
    "metrics": measure_metrics,
    "peak": measure_peak,
    "ray": measure_ray,
    "gpu": measure_gpu,
}
