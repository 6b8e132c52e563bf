"""What the sections of the training table share: their settings, their data, a clock, and our own steps."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Literal

import torch
from torch import nn

from heartseg.config.experiment import Experiment, ImageConfig, TrackingConfig
from heartseg.config.recipes import seed
from heartseg.datasets import camus
from heartseg.datasets.source import open_source
from heartseg.metrics.segmentation import ScoreSums
from heartseg.shards.loader import Loader
from heartseg.shards.preprocessing import write_shards
from heartseg.shards.reader import FrameRows, load_groups, open_shards
from heartseg.training import engine
from heartseg.training.distributed import Ranks

Backbone = Literal["resnet101", "resnet50", "mobilenet_v3_large"]
# Enough for two batches of the seed's 12 in the training group.
PATIENTS = 8


@dataclass(frozen=True)
class Options:
    """What to measure, and on what."""

    sections: str = "all"
    """Sections by name, with commas between them: plain, convolutions, metrics, loader, peak, ray, workers, gpu; `all`
    are all."""
    source: str = ""
    """Folder of the CAMUS release; a phantom is written for the while where not given."""
    out: str = ""
    """File for the table as JSON."""
    backbone: Backbone = "resnet101"
    """Network of the steps that are timed."""
    size: int = 256
    """Height and width of their images."""
    batch: int = 12
    """Images in a batch."""
    steps: int = 2
    """Steps that are timed, after one that is not; the median counts."""
    curve_steps: int = 20
    """Steps of the two loss curves."""
    curve_backbone: Backbone = "mobilenet_v3_large"
    """Network of the loss curves and of the sections ray and workers: a small one, so that they take minutes on CPUs."""
    curve_size: int = 128
    """Height and width of their images."""
    pairs: int = 5
    """Pairs of epochs, one under Ray and one without, in turn; the median of their ratios counts."""
    ray_patients: int = 40
    """Synthetic patients whose images make an epoch of section ray; 500 make epochs of half a minute or more on 2 cores."""
    threads: int = 0
    """Threads of the arithmetic on CPUs; 0 takes all cores."""


@dataclass
class Bench:
    """A run of the benchmark: its settings, a folder for its data, and the device."""

    options: Options
    folder: str
    device: torch.device

    @property
    def ranks(self) -> Ranks:
        """One process."""
        return Ranks(0, 1, self.device)

    def experiment(self, small: bool = False, **train) -> Experiment:
        """The seed recipe with the settings' network and sizes, or with the small ones."""
        recipe, options = seed(), self.options
        backbone, size = (options.curve_backbone, options.curve_size) if small else (options.backbone, options.size)
        return replace(
            recipe,
            image=ImageConfig(size, size),
            model=replace(recipe.model, backbone=backbone),
            train=replace(recipe.train, **{"batch_size": options.batch} | train),
            tracking=TrackingConfig(wandb="off"),
        )

    @cached_property
    def source(self) -> str:
        """A CAMUS tree of PATIENTS patients: the first ones of --source, or a phantom at its full size."""
        tree = os.path.join(self.folder, "source")
        if not self.options.source:
            from heartseg.datasets.phantom import write_phantom

            write_phantom(tree, PATIENTS)
            return tree
        os.makedirs(os.path.join(tree, camus.IMAGES_FOLDER))
        for patient in camus.find_patients(self.options.source)[:PATIENTS]:
            inner = os.path.join(camus.IMAGES_FOLDER, patient)
            os.symlink(os.path.join(os.path.abspath(self.options.source), inner), os.path.join(tree, inner))
        return tree

    def shards(self, experiment: Experiment, source: str = "") -> str:
        """Shards of the source on an experiment's grid."""
        source = source or self.source
        out = os.path.join(self.folder, f"shards-{os.path.basename(source)}-{experiment.image.height}")
        if not os.path.exists(out):
            write_shards(open_source(source), out, experiment.image, experiment.split)
        return out

    def frames(self, experiment: Experiment) -> FrameRows:
        """The training group on an experiment's grid."""
        return load_groups(open_shards(self.shards(experiment)), ["train"])["train"]

    def seconds(self, action: Callable[[], object]) -> tuple[float, float]:
        """Seconds of the wall and of this process's cores that an action takes, the device's work included."""
        self._wait()
        wall, cores = time.perf_counter(), time.process_time()
        action()
        self._wait()
        return time.perf_counter() - wall, time.process_time() - cores

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def random_batch(self, experiment: Experiment, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and masks of noise on the device, where pixels do not matter."""
        grid = (experiment.image.height, experiment.image.width)
        images = torch.rand(size, 1, *grid, device=self.device)
        return images, torch.randint(4, (size, *grid), device=self.device, dtype=torch.uint8)


def loader_batches(
    experiment: Experiment, frames: FrameRows, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch after the other, as training has them."""
    loader = Loader.of(frames, 0, 1, device)
    for epoch in count():
        yield from loader.training_batches(experiment.train.batch_size, experiment.train.seed, epoch)


def our_steps(experiment: Experiment, model: nn.Module, batches: Iterable, ranks: Ranks) -> Iterator[torch.Tensor]:
    """Take one training step at each call, scores included; yields its loss, on the device."""
    state, sums = engine.start(experiment, model, ranks, lambda model: model), ScoreSums(ranks.device)
    state.wrapped.train()
    for images, masks in batches:
        loss, prediction = engine.train_step(experiment, state, images, masks, ranks)
        sums.add(loss, prediction, masks)
        yield loss


def row(section: str, name: str, value: float | list[float], unit: str = "", note: str = "") -> dict:
    """A line of the table."""
    return {"section": section, "name": name, "value": value, "unit": unit, "note": note}


def peak_memory_gb(device: torch.device) -> float:
    """The most memory since `reset_peak_memory`: of the GPU, or this process's on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure the peak anew; where Linux does not let us, it goes on from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
