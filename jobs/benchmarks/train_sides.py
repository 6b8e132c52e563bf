"""The two sides of the training table: our steps, and a baseline that trains as public repositories on CAMUS do.

The baseline reads a NIfTI pair with nibabel and resizes it each time an image is needed, computes in float32 in the
ordinary memory layout, and fetches the loss and a Dice made in Python at every step.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset

from heartseg.config.experiment import Experiment, ImageConfig, TrackingConfig
from heartseg.config.recipes import seed
from heartseg.datasets import camus
from heartseg.datasets.source import open_source
from heartseg.labels import STRUCTURES
from heartseg.metrics.segmentation import ScoreSums
from heartseg.models.deeplabv3 import build_model
from heartseg.shards import preprocessing
from heartseg.shards.loader import Batch, Batches, Loader, epoch_order
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
    """Sections by name, with commas between them: plain, convolutions, metrics, peak, ray, gpu; `all` are all."""
    source: str = ""
    """Folder of the CAMUS release; synthetic patients if not given."""
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
    """Network of the loss curves and of section ray: a small one, so that they take minutes on CPUs."""
    curve_size: int = 128
    """Height and width of their images."""
    pairs: int = 5
    """Pairs of runs, one under Ray and one without, in turn; the median of their ratios counts."""
    ray_patients: int = 40
    """Synthetic patients whose images make an epoch of section ray; 500 make epochs of half a minute or more on 2 cores."""
    threads: int = 0
    """Threads of the arithmetic on CPUs; 0 takes all cores, as section ray always does."""


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
        """A CAMUS tree of PATIENTS patients: the first ones of --source, or synthetic ones at their full size."""
        tree = os.path.join(self.folder, "source")
        if self.options.source:
            return link_patients(self.options.source, tree, PATIENTS)
        from heartseg.datasets import phantom  # needs tyro

        phantom.write_phantom(tree, PATIENTS)
        return tree

    def frames(self, experiment: Experiment) -> FrameRows:
        """The training group on an experiment's grid."""
        shards = os.path.join(self.folder, f"shards-{experiment.image.height}")
        if not os.path.exists(shards):
            write_shards(experiment, self.source, shards)
        return load_groups(open_shards(shards), ["train"])["train"]

    def random_batch(self, experiment: Experiment, size: int) -> Batch:
        """Images and masks of noise on the device, for figures that do not depend on pixels."""
        grid = (experiment.image.height, experiment.image.width)
        images = torch.rand(size, 1, *grid, device=self.device)
        return images, torch.randint(4, (size, *grid), device=self.device, dtype=torch.uint8)


def write_shards(experiment: Experiment, source: str, out: str) -> None:
    """Shards of a source on an experiment's grid, written by this process."""
    preprocessing.write_shards(open_source(source), out, experiment.image, experiment.split)


def link_patients(source: str, tree: str, patients: int) -> str:
    """A CAMUS tree of links to the source's patients under new names, repeated if there are too few; returns its folder."""
    names = camus.find_patients(source)
    for number in range(patients):
        old, new = names[number % len(names)], f"patient{number + 1:05d}"
        old_folder, new_folder = (os.path.join(top, camus.IMAGES_FOLDER, name) for top, name in ((source, old), (tree, new)))
        os.makedirs(new_folder)
        for file in os.listdir(old_folder):
            os.symlink(os.path.abspath(os.path.join(old_folder, file)), os.path.join(new_folder, file.replace(old, new)))
    return tree


def new_model(experiment: Experiment, own_convolutions: bool = True) -> nn.Module:
    """The experiment's network with its first weights."""
    torch.manual_seed(experiment.train.seed)
    return build_model(experiment.model, own_convolutions)


def endless(loader: Batches, experiment: Experiment) -> Iterator[Batch]:
    """The training batches of one epoch after the other."""
    for epoch in count():
        yield from loader.training_batches(experiment.train.batch_size, experiment.train.seed, epoch)


def our_steps(experiment: Experiment, model: nn.Module, batches: Iterable[Batch], ranks: Ranks) -> Iterator[torch.Tensor]:
    """Take one training step at each call, scores included; yields its loss, on the device."""
    state, sums = engine.start(experiment, model, ranks, lambda model: model), ScoreSums(ranks.device)
    state.wrapped.train()
    for images, masks in batches:
        loss, prediction = engine.train_step(experiment, state, images, masks, ranks)
        sums.add(loss, prediction, masks)
        yield loss


class Stills(Dataset):
    """The images of a group, in the order of its shards' rows, each read from its NIfTI files when it is needed."""

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


def baseline_steps(experiment: Experiment, model: nn.Module, stills: Stills, device: torch.device) -> Iterator[float]:
    """Take one training step of the baseline at each call; yields its loss."""
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=experiment.optim.lr, momentum=experiment.optim.momentum)
    size = experiment.train.batch_size
    for epoch in count():
        order = epoch_order(len(stills), experiment.train.seed, epoch).tolist()
        for images, masks in DataLoader(stills, size, sampler=order, drop_last=True):
            # Whatever our own steps have set for the process, the baseline has PyTorch's defaults.
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


def both_sides(bench: Bench, experiment: Experiment) -> dict[str, Iterator]:
    """The steps of the baseline and ours, from the same weights over the same images."""
    frames = bench.frames(experiment)
    stills = Stills(bench.source, frames, experiment.image.height)
    batches = endless(Loader.of(frames, 0, 1, bench.device), experiment)
    return {
        "baseline": baseline_steps(experiment, new_model(experiment, own_convolutions=False), stills, bench.device),
        "ours": our_steps(experiment, new_model(experiment), batches, bench.ranks),
    }
