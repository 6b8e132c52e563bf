"""Our training steps against the plain way, as public CAMUS repositories have it: same network, weights and images.

The plain way reads a NIfTI pair with nibabel and resizes it each time an image is needed, computes in float32 in the
ordinary memory layout, and fetches the loss and a Dice made in Python at every step.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import nibabel
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset

from heartseg.config.experiment import Experiment
from heartseg.datasets import camus
from heartseg.labels import STRUCTURES
from heartseg.shards.loader import epoch_order
from heartseg.shards.reader import FrameRows
from jobs.benchmarks.train_bench import Bench, loader_batches, our_steps, peak_memory_gb, reset_peak_memory, row
from jobs.benchmarks.train_steps import new_model


class Stills(Dataset):
    """The images of a group, in the order of its shards' rows, read anew from their NIfTI files."""

    def __init__(self, source: str, frames: FrameRows, size: int):
        stills = frames.table.select(["patient", "view", "phase"]).to_pylist()
        self.paths = [
            [camus.recording_path(source, still["patient"], still["view"], still["phase"], suffix) for suffix in ("", "_gt")]
            for still in stills
        ]
        self.size = (size, size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = (torch.from_numpy(nibabel.load(path).get_fdata().T.copy())[None, None] for path in self.paths[index])
        image = interpolate(image.float() / 255, self.size, mode="bilinear", antialias=True)
        return image[0], interpolate(mask, self.size, mode="nearest-exact")[0, 0].long()


def plain_steps(experiment: Experiment, model: nn.Module, stills: Stills, device: torch.device) -> Iterator[float]:
    """Take one training step of the plain way at each call; yields its loss."""
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=experiment.optim.lr, momentum=experiment.optim.momentum)
    size = experiment.train.batch_size
    for epoch in count():
        order = epoch_order(len(stills), experiment.train.seed, epoch).tolist()
        for images, masks in DataLoader(stills, size, sampler=order, drop_last=True):
            # Whatever our own steps have set for the process, the plain way has PyTorch's defaults.
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
                images, masks = images.to(device), masks.to(device)
                optimizer.zero_grad()
                logits = model(images)
                loss = cross_entropy(logits, masks)
                loss.backward()
                optimizer.step()
            dice_in_python(logits, masks)
            yield loss.item()


def dice_in_python(logits: torch.Tensor, masks: torch.Tensor) -> float:
    """The mean Dice over structures and images, one after the other."""
    found = []
    for prediction, mask in zip(logits.argmax(dim=1).cpu().numpy(), masks.cpu().numpy(), strict=True):
        for label in range(1, len(STRUCTURES) + 1):
            total = (prediction == label).sum() + (mask == label).sum()
            found.append(2 * np.logical_and(prediction == label, mask == label).sum() / max(1, total))
    return float(np.mean(found))


def both_ways(bench: Bench, experiment: Experiment) -> tuple[Iterator[float], Iterator[torch.Tensor]]:
    """The steps of the plain way and ours, from the same weights over the same images."""
    frames = bench.frames(experiment)
    stills = Stills(bench.source, frames, experiment.image.height)
    plain = plain_steps(experiment, new_model(experiment, own_convolutions=False), stills, bench.device)
    batches = loader_batches(experiment, frames, bench.device)
    return plain, our_steps(experiment, new_model(experiment), batches, bench.ranks)


def measure(bench: Bench) -> list[dict]:
    """Images per second of both ways, step by step in turn, and their loss curves side by side."""
    experiment = bench.experiment()
    ways = dict(zip(("plain", "ours"), both_ways(bench, experiment), strict=True))
    wall, cores, memory = ({name: [] for name in ways} for _ in range(3))
    for _ in range(1 + bench.options.steps):
        for name, way in ways.items():
            reset_peak_memory(bench.device)
            seconds, core_seconds = bench.seconds(lambda way=way: next(way))
            wall[name].append(seconds)
            cores[name].append(core_seconds)
            memory[name].append(peak_memory_gb(bench.device))
    rows, batch = [], experiment.train.batch_size
    what = f"{experiment.model.backbone}, {experiment.image.height} px, batch {batch}"
    medians = {}
    for name in ways:
        medians[name] = [statistics.median(seconds[name][1:]) for seconds in (wall, cores)]
        rows.append(row("plain", f"{name}: images/s ({what})", batch / medians[name][0], "images/s"))
        rows.append(row("plain", f"{name}: peak memory beside the other's weights", max(memory[name]), "GB"))
    ratios = [one / other for one, other in zip(medians["plain"], medians["ours"], strict=True)]
    rows.append(row("plain", "ours / plain, images/s", ratios[0], "x", "on CPUs at least 2.8"))
    if bench.device.type == "cpu":
        rows.append(row("plain", "ours / plain, images per second of a core", ratios[1], "x"))
    return rows + curves(bench)


def curves(bench: Bench) -> list[dict]:
    """The losses of both ways over the first steps; without dropout, which would draw differently."""
    experiment = bench.experiment(small=True)
    experiment = replace(experiment, model=replace(experiment.model, dropout=0.0))
    losses = [[float(next(way)) for _ in range(bench.options.curve_steps)] for way in both_ways(bench, experiment)]
    pairs = list(zip(*losses, strict=True))
    rows = [row("plain", f"loss of step {step}: plain, ours", list(pair)) for step, pair in enumerate(pairs, 1)]
    apart = max(abs(ours - plain) / plain for plain, ours in pairs)
    what = f"{experiment.model.backbone}, {experiment.image.height} px"
    return [*rows, row("plain", f"largest difference of the two losses ({what})", 100 * apart, "%")]
