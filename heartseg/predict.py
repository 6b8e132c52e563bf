"""A checkpoint and images to masks on the images' own grid."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate

from heartseg import checkpoint
from heartseg.batches import Intensity
from heartseg.config import Experiment, from_json
from heartseg.engine import forward
from heartseg.model import build_model
from heartseg.shards import resize_image


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A trained model with all that it needs to see an image as it was trained to."""

    model: nn.Module
    experiment: Experiment
    intensity: Intensity
    card: dict
    device: torch.device

    @torch.inference_mode()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B,4,H,W] of uint8 images [B,1,H,W] that are on the stored grid."""
        unit = images.to(self.device).float().div_(255)
        return forward(self.experiment.train, self.model, self.intensity.apply(unit))

    def predict(self, image: np.ndarray) -> np.ndarray:
        """The mask uint8 [H,W] (labels 0-3) of an upright uint8 image [H,W] of any size: rows are depth."""
        grid = self.experiment.image
        small = torch.from_numpy(resize_image(np.ascontiguousarray(image), grid.height, grid.width))
        return to_native(self.logits(small[None, None])[0], image.shape)


def to_native(logits: torch.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Labels uint8 [H,W] on the native grid: class scores [4,h,w] are resampled, then the largest taken.

    Labels are never resampled, so that contours stay smooth.
    """
    return interpolate(logits[None], tuple(shape), mode="bilinear")[0].argmax(dim=0).to(torch.uint8).cpu().numpy()


def load(path: str, which: str = "last", device: str | torch.device | None = None) -> Segmenter:
    """Rebuild a trained model from a run's folder or a checkpoint's, from its files alone.

    `which` is `last` or `best`. Raises UserError where there is no checkpoint or it is damaged.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = checkpoint.find(path, which)
    experiment = from_json(found.card["experiment"], origin=found.path)
    model = build_model(experiment.model)
    model.load_state_dict(found.weights())
    model = model.to(device, memory_format=torch.channels_last).eval()
    return Segmenter(model, experiment, Intensity(*found.card["intensity"]), found.card, torch.device(device))
