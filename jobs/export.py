"""A trained model for other programs, as torch.export and ONNX: `python jobs/export.py --checkpoint RUN --out FOLDER`.

Hands on `model.pt2`, `model.onnx` and, written last, `export.json`, which says what goes in, what comes out and how far both
are from the checkpoint.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from heartseg.datasets import phantom
from heartseg.errors import UserError
from heartseg.inference.segmenter import Segmenter, load
from heartseg.labels import CLASSES, VIEWS
from heartseg.shards.loader import Intensity
from heartseg.shards.reader import Shards, as_frames, open_shards, read_part
from heartseg.shards.writer import resize_image
from heartseg.storage import filesystem, locks
from heartseg.training import run_directory
from jobs.support import command_line

FILES = {"torch.export": "model.pt2", "onnx": "model.onnx"}
NOTE = "export.json"
INPUT, OUTPUT = "images", "logits"
# Images that the files are checked on, and the share of their pixels that may get another label: rounding decides only
# between labels that are as good as equal.
CHECKED_IMAGES, MOST_DIFFERENT = 16, 1e-3
PREPROCESSING = (
    "Resize an upright greyscale image (row = depth, column = lateral) to the input's height and width, bilinear and "
    "antialiased, rounded to whole numbers from 0 to 255, and pass it as float32; the normalisation is inside the model. "
    "For a mask on the image's own grid resize the logits back, bilinear, then take the largest over the channels."
)


@dataclass(frozen=True)
class Options:
    """What to export, and where."""

    checkpoint: str = ""
    """Folder of a run, or of one of its checkpoints."""
    out: str = ""
    """Folder or URI to write."""
    which: Literal["last", "best"] = "last"
    """The checkpoint of a run; `best` is chosen on val."""
    data: str = ""
    """Shards whose images the files are checked on; the run's own where not given, synthetic ones where there are none."""


class Portable(nn.Module):
    """A model with its normalisation: float32 images [B,1,H,W] from 0 to 255 in, logits [B,4,H,W] out."""

    def __init__(self, model: nn.Module, intensity: Intensity):
        super().__init__()
        self.model, self.intensity = model, intensity

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(self.intensity.apply(images / 255))


def run(options: Options) -> str:
    """Write a checkpoint's two files and their note; returns the folder. Nothing is written that does not do as it does."""
    path = command_line.absolute(
        command_line.require_flag(options.checkpoint, "--checkpoint", "the folder of a run"), "checkpoint"
    )
    out = command_line.absolute(command_line.require_flag(options.out, "--out", "the folder to write"), "out")
    check_packages()
    segmenter = load(path, options.which, device="cpu")
    # A bf16 answer would tell the arithmetic's difference and not the export's.
    experiment = replace(segmenter.experiment, train=replace(segmenter.experiment.train, precision="fp32"))
    segmenter = replace(segmenter, experiment=experiment)
    images, origin = check_images(segmenter, options.data and command_line.absolute(options.data, "data"))
    written, calls = convert(segmenter)
    differences = {kind: compare(segmenter, call, images) for kind, call in calls.items()}
    for kind, found in differences.items():
        if not found["labels_that_differ"] <= MOST_DIFFERENT:
            raise UserError(
                f"The {kind} file labels {found['labels_that_differ']:.2%} of the pixels otherwise than {path}: nothing was "
                "written; take the versions of torch, onnx and onnxruntime that pyproject.toml names."
            )
    checked = {"images": origin, "number": len(images)}
    with locks.lock(out):
        # An older export's note would describe these files wrongly.
        filesystem.remove(filesystem.join(out, NOTE))
        for kind, data in written.items():
            filesystem.publish(filesystem.join(out, FILES[kind]), data)
        filesystem.publish_json(filesystem.join(out, NOTE), note(segmenter, path, written, checked | differences))
    for kind, found in differences.items():
        print(
            f"{filesystem.join(out, FILES[kind])}: {len(written[kind]) / 1e6:.1f} MB; on {len(images)} {origin} logits differ "
            f"from the checkpoint's by at most {found['largest_logit_difference']:.1e}, "
            f"and {found['labels_that_differ']:.4%} of the labels do."
        )
    return out


def check_packages() -> None:
    """Raise UserError where what writes and runs ONNX is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: `pip install heartseg[export]` brings what it takes.") from error


def check_images(segmenter: Segmenter, data: str) -> tuple[torch.Tensor, str]:
    """Images uint8 [N,1,H,W] on the stored grid to compare on, and what they are: `real images`, or `synthetic` ones."""
    grid = segmenter.experiment.image
    shards = open_shards(data) if data else own_shards(segmenter)
    if shards:
        if shards.image != grid:
            raise UserError(
                f"{shards.path} has {shards.image.height} x {shards.image.width} images, the model sees others: give its own."
            )
        frames = as_frames(read_part(shards, shards.manifest["parts"][0]), grid)
        kind = "synthetic" if shards.manifest["dataset"] == "phantom" else "real"
        return frames.images[:CHECKED_IMAGES], f"{kind} images"
    scanners = [phantom.Scanner(number, 0, view, 0.25) for number in range(1, 1 + CHECKED_IMAGES // 2) for view in VIEWS]
    pictures = [resize_image(scanner.picture(0.0), grid.height, grid.width) for scanner in scanners]
    return torch.from_numpy(np.stack(pictures))[:, None], "synthetic images"


def own_shards(segmenter: Segmenter) -> Shards | None:
    """The shards that the run was trained on; None where they are gone, or written by another version."""
    try:
        return open_shards(segmenter.experiment.data) if segmenter.experiment.data else None
    except UserError:
        return None


def convert(segmenter: Segmenter) -> tuple[dict[str, bytes], dict[str, Callable]]:
    """The files' bytes by kind, and for each a function from float32 images [B,1,H,W] to logits, made of those bytes."""
    import onnxruntime

    grid = segmenter.experiment.image
    portable = Portable(segmenter.model, segmenter.intensity).to(memory_format=torch.contiguous_format).eval()
    # Two images, since a batch of one would be taken for a constant.
    example = torch.zeros(2, 1, grid.height, grid.width)
    with torch.no_grad():  # with gradients, some convolutions take a form that is for training
        exported = torch.export.export(portable, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in exported.graph.nodes:
        # It names this machine's folders, line by line.
        node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    with quiet():
        program = torch.onnx.export(
            exported, dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},), input_names=[INPUT], output_names=[OUTPUT]
        )
    written = {"torch.export": buffer.getvalue(), "onnx": program.model_proto.SerializeToString()}
    session = onnxruntime.InferenceSession(written["onnx"], providers=["CPUExecutionProvider"])
    reloaded = torch.export.load(io.BytesIO(written["torch.export"])).module()
    return written, {
        "torch.export": lambda images: reloaded(images),
        "onnx": lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0]),
    }


@contextlib.contextmanager
def quiet():
    """Without the exporter's own remarks, which are for its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@torch.inference_mode()
def compare(segmenter: Segmenter, call: Callable, images: torch.Tensor) -> dict[str, float]:
    """How far a file's answers to uint8 images are from the checkpoint's, in a batch of one and in one of the others."""
    expected = segmenter.logits(images)
    answers = torch.cat([call(images[:1].float()), call(images[1:].float())])
    return {
        "largest_logit_difference": (answers - expected).abs().max().item(),
        "labels_that_differ": (answers.argmax(dim=1) != expected.argmax(dim=1)).double().mean().item(),
    }


def note(segmenter: Segmenter, path: str, written: dict, checked: dict) -> dict:
    """What `export.json` says."""
    grid = segmenter.experiment.image
    try:
        terms = run_directory.TERMS.get(run_directory.find_run(path).description["dataset"], run_directory.TERMS["other"])
    except UserError:
        terms = "unknown: the checkpoint is in no run's folder; its model card has them."
    return {
        "use": "Research use only, not a medical device.",
        "terms": terms,
        "input": {"name": INPUT, "dtype": "float32", "shape": ["batch", 1, grid.height, grid.width], "range": [0, 255]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", len(CLASSES), grid.height, grid.width]},
        "labels": dict(enumerate(CLASSES)),
        "preprocessing": PREPROCESSING,
        "normalisation_inside": {"mean": segmenter.intensity.mean, "std": segmenter.intensity.std, "after": "division by 255"},
        "files": {kind: {"file": FILES[kind], "sha256": filesystem.sha256(data)} for kind, data in written.items()},
        "checked": checked,
        "run": segmenter.card.get("run"),
        "epoch": segmenter.card["epoch"],
        "weights_sha256": segmenter.card["weights_sha256"],
        "data_fingerprint": segmenter.card.get("data_fingerprint"),
        "torch": torch.__version__,
    }


def job(argv: Sequence[str]) -> None:
    """The command line."""
    shown = "python jobs/export.py"
    out = run(command_line.parse_line(Options, argv, shown, "Write a trained model for other programs, checked against it."))
    print(filesystem.join(out, NOTE))


if __name__ == "__main__":
    command_line.main(job)
