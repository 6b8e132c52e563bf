"""Files to masks against the forward passes alone: what reading, resampling and writing cost beside the model."""

import tempfile
from dataclasses import dataclass, replace
from functools import partial

import torch

from heartseg.config.experiment import ImageConfig
from heartseg.config.recipes import quick
from heartseg.datasets import readers
from heartseg.datasets.nifti import DamagedRecording
from heartseg.datasets.phantom import write_phantom
from heartseg.errors import UserError
from heartseg.inference import study_files, study_results
from heartseg.inference.batch_inference import outline
from heartseg.inference.segmenter import Segmenter, load
from heartseg.models.deeplabv3 import build_model
from heartseg.reporting.overlays import write_overlays
from heartseg.shards.loader import Intensity
from jobs.benchmarks.two_sides import CPU, Row, Table, in_turn


@dataclass(frozen=True)
class Options:
    """What is measured."""

    source: str = ""
    """A CAMUS tree, of which the first images count; synthetic ones of the release's size if not given."""
    checkpoint: str = ""
    """Run whose model is measured; a MobileNetV3 with random weights if not given."""
    images: int = 200
    """Number of images."""
    side: int = 256
    """Rows and columns of the model's grid."""
    batch_size: int = 8
    """Frames that the model sees at once, in both."""
    repeats: int = 3
    """Times that each side does the same, in turn; the median counts."""


def run(options: Options) -> Table:
    """Measure both sides and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        source = options.source or f"{folder}/phantom"
        if not options.source:
            write_phantom(source, patients=-(-options.images // 4), workers=torch.get_num_threads())
        clips = study_files.find_clips(source)[: options.images]
        segmenter = segmenter_of(options)
        sides = {
            "forward passes": partial(forward_passes, segmenter, len(clips), options.batch_size),
            "files to masks": partial(files_to_masks, segmenter, clips, folder, options.batch_size, False),
            "files to masks and overlays": partial(files_to_masks, segmenter, clips, folder, options.batch_size, True),
        }
        forward, *others = ([1000 * s / len(clips) for s in cost[:2]] for cost in in_turn(sides, options.repeats))
    rows = [
        Row(name, cost[place], unit, forward[place])
        for name, cost in zip(list(sides)[1:], others, strict=True)
        for place, unit in enumerate(("ms an image", "ms of a core"))
    ]
    what = f"{len(clips)} images, {segmenter.experiment.model.backbone}, {options.side} px, batch {options.batch_size}"
    table = Table(f"predict: {what}", ("forward passes", "whole"), rows)
    table.show()
    return table


def segmenter_of(options: Options) -> Segmenter:
    """The model on the CPU on a grid of the asked size: the run's, whose masks are hearts, or a random one, whose are noise."""
    image = ImageConfig(height=options.side, width=options.side)
    if options.checkpoint:
        found = load(options.checkpoint, device="cpu")
        return replace(found, experiment=replace(found.experiment, image=image))
    torch.manual_seed(0)
    experiment = replace(quick(), image=image)
    model = build_model(experiment.model).to(memory_format=torch.channels_last).eval()
    return Segmenter(model, experiment, Intensity(), {}, CPU)


def forward_passes(segmenter: Segmenter, count: int, batch_size: int) -> None:
    """The model alone, on images that are in memory and on its grid."""
    grid = segmenter.experiment.image
    images = torch.zeros((batch_size, 1, grid.height, grid.width), dtype=torch.uint8)
    for start in range(0, count, batch_size):
        segmenter.logits(images[: count - start])


def files_to_masks(segmenter: Segmenter, clips: list[study_files.Clip], out: str, batch_size: int, overlays: bool) -> None:
    """What jobs/predict.py does with its clips; the EF table comes after it."""

    def finish(clip, frames, masks, confidences):
        outcome = study_results.finish(out, clip, frames, masks, confidences)
        if overlays:
            write_overlays(out, clip, frames, masks, {at: str(phase) for phase, (at, _) in outcome.phases.items()})

    for _, result in outline(segmenter, clips, lambda clip, _: readers.read(clip.path, clip.kind), finish, batch_size):
        if isinstance(result, DamagedRecording):
            raise UserError(f"{result.file} {result.reason}.")
