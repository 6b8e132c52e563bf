"""Files to masks against the forward passes alone: what reading, resampling and writing cost beside the model."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from heartseg.config.experiment import ImageConfig
from heartseg.config.recipes import quick
from heartseg.datasets.nifti import DamagedRecording
from heartseg.datasets.phantom import write_phantom
from heartseg.errors import UserError
from heartseg.inference import study_files
from heartseg.inference.batch_inference import outline
from heartseg.inference.segmenter import Segmenter, load
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.loader import Intensity
from heartseg.storage import filesystem
from jobs import predict
from jobs.support import command_line


@dataclass(frozen=True)
class Options:
    """What is measured."""

    source: str = ""
    """A CAMUS tree whose first images are taken; a phantom of the release's size is made where none is given."""
    checkpoint: str = ""
    """Run whose model is taken; one with random weights where none is given."""
    images: int = 200
    """Number of images."""
    side: int = 256
    """Rows and columns of the model's grid."""
    batch_size: int = 8
    """Frames that the model sees at once, in both."""
    repeats: int = 3
    """Each way is measured this often, in turns; the median counts."""


def job(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    options = command_line.parse_line(
        Options, argv, "python jobs/benchmark.py predict", "Files to masks against forwards alone."
    )
    with tempfile.TemporaryDirectory() as folder:
        source = options.source
        if not source:
            source = filesystem.join(folder, "phantom")
            write_phantom(source, patients=-(-options.images // 4), workers=torch.get_num_threads())
        clips = study_files.find_clips(source)[: options.images]
        segmenter = trained(options.checkpoint, options.side) if options.checkpoint else untrained(options.side)
        ways = {
            "forwards alone": partial(forwards, segmenter, len(clips), options.batch_size),
            "files to masks": partial(files, segmenter, clips, folder, options.batch_size, "off"),
            "files to masks and overlays": partial(files, segmenter, clips, folder, options.batch_size, "on"),
        }
        for way in ways.values():
            way(warm_up=True)
        seconds = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                started, worked = time.perf_counter(), time.process_time()
                way()
                seconds[name].append((time.perf_counter() - started, time.process_time() - worked))
    print_table(seconds, len(clips), options)


def trained(path: str, side: int) -> Segmenter:
    """A run's model on a grid of `side`: it is convolutional, so any will do, and its masks are hearts and not noise."""
    found = load(command_line.absolute(path, "checkpoint"), device="cpu")
    return replace(found, experiment=replace(found.experiment, image=ImageConfig(height=side, width=side)))


def untrained(side: int) -> Segmenter:
    """A MobileNetV3 with random weights on the CPU; its masks are noise, which takes longer to check and to pack."""
    torch.manual_seed(0)
    experiment = replace(quick(), image=ImageConfig(height=side, width=side))
    model = build_model(experiment.model).to(memory_format=torch.channels_last).eval()
    return Segmenter(model, experiment, Intensity(), {}, torch.device("cpu"))


def forwards(segmenter: Segmenter, count: int, batch_size: int, warm_up: bool = False) -> None:
    """The model alone, on images that are in memory and on its grid."""
    grid = segmenter.experiment.image
    images = torch.zeros((batch_size, 1, grid.height, grid.width), dtype=torch.uint8)
    for start in range(0, batch_size if warm_up else count, batch_size):
        segmenter.logits(images[: count - start])


def files(segmenter: Segmenter, clips: list, out: str, batch_size: int, overlays: str, warm_up: bool = False) -> None:
    """What jobs/predict.py does with its clips; the EF table comes after it."""
    read = partial(predict.read_clip, spacing_mm=None, flips=())
    chosen = clips[:batch_size] if warm_up else clips
    for _, result in outline(segmenter, chosen, read, partial(predict.finish_clip, out, overlays), batch_size):
        if isinstance(result, DamagedRecording):
            raise UserError(f"{result.file} {result.reason}.")


def print_table(seconds: dict[str, list[tuple[float, float]]], images: int, options: Options) -> None:
    """Medians of wall and core time, and what each is beside the forwards; core time is what a busy machine leaves true."""
    print(f"{images} images, MobileNetV3 at {options.side} x {options.side}, {torch.get_num_threads()} threads")
    print(f"{'':<28}{'wall ms':>9}{'of forwards':>13}{'core ms':>9}{'of forwards':>13}   wall of each run, s")
    base = None
    for name, runs in seconds.items():
        wall, cores = (1000 / images * statistics.median(values) for values in zip(*runs, strict=True))
        base = base or (wall, cores)
        each = " ".join(f"{run[0]:.2f}" for run in runs)
        print(f"{name:<28}{wall:>9.1f}{wall / base[0]:>13.2f}{cores:>9.1f}{cores / base[1]:>13.2f}   {each}")
