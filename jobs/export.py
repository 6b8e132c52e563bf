"""Exports a trained model for other programs, as torch.export and ONNX: `python jobs/export.py --checkpoint RUN --out FOLDER`.

Writes `model.pt2`, `model.onnx` and, last, `export.json`, with their input, output and differences from the checkpoint.
"""

import contextlib
import importlib
import io
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from heartseg.datasets import phantom
from heartseg.errors import UserError, require
from heartseg.inference.segmenter import Segmenter, load
from heartseg.labels import CLASSES, VIEWS
from heartseg.shards.reader import as_frames, open_shards, read_part
from heartseg.shards.writer import resize_image
from heartseg.storage import filesystem, locks
from heartseg.training import run_directory
from jobs.support import command_line

FILES = {"torch.export": "model.pt2", "onnx": "model.onnx"}
NOTE = "export.json"
INPUT, OUTPUT = "images", "logits"
# Number of images that the files are checked on, and the share of their pixels whose labels may differ: rounding changes a
# label only where two classes have practically equal scores.
CHECKED_IMAGES, MAX_DIFFERENT = 16, 1e-3
PREPROCESSING = (
    "Resize an upright greyscale image (rows are depth, columns are lateral) to the input's height and width (bilinear, "
    "antialiased), round it to whole numbers from 0 to 255, and pass it as float32; the normalisation is inside the model. "
    "For a mask on the image's own grid, resize the logits to that grid (bilinear), then take the argmax over the channels."
)


@dataclass(frozen=True)
class Options:
    """The model to export, and the folder to write."""

    checkpoint: str = ""
    """Folder of a run, or of one of its checkpoints."""
    out: str = ""
    """Folder or URI to write."""
    which: Literal["last", "best"] = "last"
    """`last` needs no val group; `best` has the highest Dice on val, and is what evaluate scores on test."""
    data: str = ""
    """Shards with the images to check the files on (default: the run's own shards, or synthetic images if those are gone)."""


class Portable(nn.Module):
    """A model with its normalisation: float32 images [B,1,H,W] from 0 to 255 in, logits [B,4,H,W] out."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.model, self.intensity = segmenter.model, segmenter.intensity

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(self.intensity.apply(images / 255))


def run(options: Options) -> str:
    """Write both files and `export.json`, provided that the files label images like the checkpoint; returns the folder."""
    path = command_line.required_path(options.checkpoint, "checkpoint", "the folder of a run")
    out = command_line.required_path(options.out, "out", "the folder to write")
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"{package} is not installed: run `pip install 'heartseg[export]'`.") from error
    segmenter = load(path, options.which, device="cpu")
    # With bf16, the differences would be due to the arithmetic, not the export.
    experiment = replace(segmenter.experiment, train=replace(segmenter.experiment.train, precision="fp32"))
    segmenter = replace(segmenter, experiment=experiment)
    images, origin = check_images(segmenter, options.data and command_line.absolute(options.data, "data"))
    written, calls = convert(segmenter)
    checked = {kind: difference(segmenter, call, images) for kind, call in calls.items()}
    for kind, found in checked.items():
        problem = f"The {kind} file labels {found['labels_that_differ']:.2%} of the pixels differently from {path}"
        fix = "Install the versions of torch, onnx and onnxruntime that pyproject.toml names."
        require(found["labels_that_differ"] <= MAX_DIFFERENT, f"{problem}: nothing was written. {fix}")
    with locks.lock(out):
        # An older export's note would not describe these files.
        filesystem.remove(filesystem.join(out, NOTE))
        for kind, data in written.items():
            filesystem.publish(filesystem.join(out, FILES[kind]), data)
        checked_on = {"images": origin, "number": len(images)}
        filesystem.publish_json(filesystem.join(out, NOTE), note(segmenter, path, written, checked_on | checked))
    for kind, data in written.items():
        logits, labels = checked[kind].values()
        size = f"{filesystem.join(out, FILES[kind])}: {len(data) / 1e6:.1f} MB; on {len(images)} {origin}"
        print(f"{size}, logits differ from the checkpoint's by at most {logits:.1e}, and {labels:.4%} of the labels differ.")
    return out


def check_images(segmenter: Segmenter, data: str) -> tuple[torch.Tensor, str]:
    """Images uint8 [N,1,H,W] on the model's grid for the comparison, and their kind: `real images` or `synthetic images`.

    They come from the shards in `data`, or those that the run was trained on, or the phantom if those are gone.
    """
    grid, shards = segmenter.experiment.image, None
    with contextlib.nullcontext() if data else contextlib.suppress(UserError):
        shards = open_shards(data or segmenter.experiment.data)
    if shards is None:
        scanners = [phantom.Scanner(number, 0, view, 0.25) for number in range(1, 1 + CHECKED_IMAGES // 2) for view in VIEWS]
        pictures = [resize_image(scanner.picture(0.0), grid.height, grid.width) for scanner in scanners]
        return torch.from_numpy(np.stack(pictures))[:, None], "synthetic images"
    sizes = f"{shards.image.height} x {shards.image.width} images, but the model needs {grid.height} x {grid.width}"
    require(shards.image == grid, f"{shards.path} has {sizes}: give shards on the model's grid as --data.")
    frames = as_frames(read_part(shards, shards.manifest["parts"][0]), grid)
    kind = "synthetic" if shards.manifest["dataset"] == "phantom" else "real"
    return frames.images[:CHECKED_IMAGES], f"{kind} images"


def convert(segmenter: Segmenter) -> tuple[dict[str, bytes], dict[str, Callable]]:
    """The files' bytes by kind, and functions from float32 images [B,1,H,W] to logits, loaded from these bytes."""
    import onnxruntime

    grid = segmenter.experiment.image
    portable = Portable(segmenter).to(memory_format=torch.contiguous_format).eval()
    # Two images: a batch of one would become a constant.
    example = torch.zeros(2, 1, grid.height, grid.width)
    with torch.no_grad():  # with gradients, some convolutions use their training form
        exported = torch.export.export(portable, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains this machine's folders
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # its messages are for the exporter's developers
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            exported, dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},), input_names=[INPUT], output_names=[OUTPUT]
        )
    written = {"torch.export": buffer.getvalue(), "onnx": program.model_proto.SerializeToString()}
    session = onnxruntime.InferenceSession(written["onnx"], providers=["CPUExecutionProvider"])
    reloaded = torch.export.load(io.BytesIO(written["torch.export"])).module()
    return written, {"torch.export": reloaded, "onnx": lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])}


@torch.inference_mode()
def difference(segmenter: Segmenter, call: Callable, images: torch.Tensor) -> dict[str, float]:
    """A file's differences from the checkpoint on uint8 images: the first one as a batch of its own, then the others."""
    expected = segmenter.logits(images)
    answers = torch.cat([call(images[:1].float()), call(images[1:].float())])
    labels_that_differ = (answers.argmax(dim=1) != expected.argmax(dim=1)).double().mean().item()
    return {"largest_logit_difference": (answers - expected).abs().max().item(), "labels_that_differ": labels_that_differ}


def note(segmenter: Segmenter, path: str, written: dict, checked: dict) -> dict:
    """The contents of `export.json`."""
    card, shape = segmenter.card, [segmenter.experiment.image.height, segmenter.experiment.image.width]
    try:
        terms = run_directory.TERMS.get(run_directory.find_run(path).description["dataset"], run_directory.TERMS["other"])
    except UserError:
        terms = "unknown: the checkpoint is not in a run's folder; the MODEL_CARD.md of its run has them."
    return {
        "use": "Research use only, not a medical device.",
        "terms": terms,
        "input": {"name": INPUT, "dtype": "float32", "shape": ["batch", 1, *shape], "range": [0, 255]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", len(CLASSES), *shape]},
        "labels": dict(enumerate(CLASSES)),
        "preprocessing": PREPROCESSING,
        "normalisation_inside": {"mean": segmenter.intensity.mean, "std": segmenter.intensity.std, "after": "division by 255"},
        "files": {kind: {"file": FILES[kind], "sha256": filesystem.sha256(data)} for kind, data in written.items()},
        "checked": checked,
        **{name: card.get(name) for name in ("run", "epoch", "weights_sha256", "data_fingerprint")},
        "torch": torch.__version__,
    }


def job(argv: list[str]) -> None:
    about = "Export a trained model for other programs, and check the exported files against it."
    out = run(command_line.parse_line(Options, argv, "python jobs/export.py", about))
    print(filesystem.join(out, NOTE))


if __name__ == "__main__":
    command_line.main(job)
