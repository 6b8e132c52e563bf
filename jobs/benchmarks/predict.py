"""Time from files to masks compared with the forward passes alone: the cost of reading, resampling and writing."""

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
from heartseg.inference.segmenter import Segmenter
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.loader import Intensity
from jobs.benchmarks.two_sides import CPU, Row, Table, in_turn


@dataclass(frozen=True)
class Options:
    source: str = ""
    """A CAMUS tree whose first images are used; synthetic ones of the release's size if not given."""
    images: int = 200
    """Number of images."""
    side: int = 256
    """Height and width of the model's input, in pixels; the model is a MobileNetV3 with random weights."""
    batch_size: int = 8
    """Frames in a batch, in both measurements."""
    repeats: int = 3
    """Repetitions of both measurements, alternating; the median is reported."""


def run(options: Options) -> Table:
    """Measure both and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        source = options.source or f"{folder}/phantom"
        if not options.source:
            write_phantom(source, patients=-(-options.images // 4), workers=torch.get_num_threads())
        clips = study_files.find_clips(source)[: options.images]
        experiment = replace(quick(), image=ImageConfig(height=options.side, width=options.side))
        torch.manual_seed(0)
        model = build_model(experiment.model).to(memory_format=torch.channels_last).eval()
        segmenter = Segmenter(model, experiment, Intensity(), {}, CPU)
        images = torch.zeros((len(clips), 1, options.side, options.side), dtype=torch.uint8).split(options.batch_size)

        def files_to_masks() -> None:
            """Segment clips as jobs/predict.py does, without overlays and the EF table."""
            read, finish = lambda clip, _: readers.read(clip.path, clip.kind), partial(study_results.finish, folder)
            for _, result in outline(segmenter, clips, read, finish, options.batch_size):
                if isinstance(result, DamagedRecording):
                    raise UserError(f"{result.file} {result.reason}.")

        sides = {"forward passes": lambda: [segmenter.logits(batch) for batch in images], "files to masks": files_to_masks}
        forward, whole = ([1000 * seconds / len(clips) for seconds in cost[:2]] for cost in in_turn(sides, options.repeats))
    units = ("ms per image", "CPU ms per image")
    rows = [Row("files to masks", *of) for of in zip(whole, units, forward, strict=True)]
    what = f"{len(clips)} images, {experiment.model.backbone}, {options.side} px, batch {options.batch_size}"
    table = Table(f"predict: {what}", ("forward passes", "whole"), rows)
    table.show()
    return table
