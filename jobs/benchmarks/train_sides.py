"""The two sides of the training table: our steps, and a baseline that trains as public repositories on CAMUS do.

The baseline reads a NIfTI pair with nibabel and resizes it each time an image is needed, computes in float32 in the
ordinary memory layout, and fetches the loss and a Dice made in Python at every step.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset

from heartseg.config.experiment import Experiment, ImageConfig, TrackingConfig
from heartseg.config.recipes import seed
from heartseg.datasets import camus, phantom
from heartseg.datasets.image_folder import open_source
from heartseg.labels import STRUCTURES
from heartseg.metrics.segmentation import ScoreSums
from heartseg.models.deeplabv3 import build_model
from heartseg.shards import preprocessing
from heartseg.shards.loader import Batch, Loader, epoch_order
from heartseg.shards.reader import FrameRows, load_groups
from heartseg.training import engine
from heartseg.training.distributed import Ranks

Backbone = Literal["resnet101", "resnet50", "mobilenet_v3_large"]
Losses = Iterator[torch.Tensor]
SMALL: Backbone = "mobilenet_v3_large"


@dataclass(frozen=True)
class Options:
    """What to measure, and on what."""

    sections: str = "all"
    """Sections by name, with commas between them: plain, convolutions, metrics, peak, ray; `all` are all."""
    source: str = ""
    """Folder of the CAMUS release; synthetic patients if not given."""
    backbone: Backbone = "resnet101"
    """Network of the steps that are timed."""
    size: int = 256
    """Height and width of their images."""
    batch: int = 12
    """Images in a batch."""
    steps: int = 2
    """Steps that are timed, after one that is not; the median counts."""
    pairs: int = 5
    """Section ray: pairs of runs, one under Ray and one without, in turn; the median of their ratios counts."""
    ray_size: int = 128
    """Section ray: height and width of the images, for MobileNetV3, so that it takes minutes on CPUs."""
    ray_patients: int = 40
    """Section ray: synthetic patients whose images make an epoch; 500 make epochs of half a minute or more on 2 cores."""


@dataclass(frozen=True)
class Bench:
    """A run of the benchmark: its settings, a folder for its data, and the device."""

    options: Options
    folder: str
    device: torch.device

    def experiment(self, backbone: Backbone | None = None, size: int | None = None, **train) -> Experiment:
        """The seed recipe without dropout, which would draw differently on two sides; by default of the settings' size."""
        recipe, side = seed(), size or self.options.size
        return replace(
            recipe,
            image=ImageConfig(side, side),
            model=replace(recipe.model, backbone=backbone or self.options.backbone, dropout=0.0),
            train=replace(recipe.train, **{"batch_size": self.options.batch} | train),
            tracking=TrackingConfig(wandb="off"),
        )

    def model(self, experiment: Experiment, own_convolutions: bool = True) -> nn.Module:
        """The experiment's network with its first weights, on the device."""
        torch.manual_seed(experiment.train.seed)
        return build_model(experiment.model, own_convolutions).to(self.device)

    def random_batch(self, experiment: Experiment, size: int) -> Batch:
        """Images and masks of noise on the device, for figures that do not depend on pixels."""
        grid = (experiment.image.height, experiment.image.width)
        images = torch.rand(size, 1, *grid, device=self.device)
        return images, torch.randint(4, (size, *grid), device=self.device, dtype=torch.uint8)

    def our_steps(
        self, experiment: Experiment, batches: Iterable[Batch], own_convolutions: bool = True
    ) -> Iterator[torch.Tensor]:
        """Take one training step at each call, scores included; yields its loss, on the device."""
        model, ranks, sums = self.model(experiment, own_convolutions), Ranks(0, 1, self.device), ScoreSums(self.device)
        state = engine.start(experiment, model, ranks, lambda model: model)
        state.wrapped.train()
        for images, masks in batches:
            loss, prediction = engine.train_step(experiment, state, images, masks, ranks)
            sums.add(loss, prediction, masks)
            yield loss

    def baseline_steps(self, experiment: Experiment, stills: "Stills") -> Losses:
        """Take one training step of the baseline at each call; yields its loss."""
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

    def both_sides(self, experiment: Experiment) -> tuple[Losses, Losses]:
        """The steps of the baseline and ours, from the same weights over the same images."""
        source, train = self.options.source or os.path.join(self.folder, "source"), experiment.train
        if not self.options.source:
            phantom.write_phantom(source, 8)  # enough for two batches of the seed's 12 in the training group
        frames = write_shards(experiment, source, os.path.join(self.folder, "shards"))
        loader = Loader.of(frames, 0, 1, self.device)
        batches = (batch for epoch in count() for batch in loader.training_batches(train.batch_size, train.seed, epoch))
        stills = Stills(source, frames, experiment.image.height)
        return self.baseline_steps(experiment, stills), self.our_steps(experiment, batches)


def write_shards(experiment: Experiment, source: str, out: str) -> FrameRows:
    """Write the shards of a source on an experiment's grid; returns its training group."""
    shards = preprocessing.write_shards(open_source(source), out, experiment.image, experiment.split)
    return load_groups(shards, ["train"])["train"]


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


def dice_in_python(logits: torch.Tensor, masks: torch.Tensor) -> float:
    """The mean Dice over structures and images, one after the other."""
    found = []
    for prediction, mask in zip(logits.argmax(dim=1).cpu().numpy(), masks.cpu().numpy(), strict=True):
        for label in range(1, len(STRUCTURES) + 1):
            total = (prediction == label).sum() + (mask == label).sum()
            found.append(2 * np.logical_and(prediction == label, mask == label).sum() / max(1, total))
    return float(np.mean(found))
