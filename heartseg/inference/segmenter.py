"""Turns images into masks on the images' own grids, with one or more checkpoints; each mask has a confidence.

Scoring and prediction share `scores_of`, `confidence` and `to_mask`, so that both get the same masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn.functional import interpolate

from heartseg.config.experiment import Experiment, PredictConfig, from_json
from heartseg.errors import UserError, require
from heartseg.labels import BACKGROUND, ENDO, LA, NUM_CLASSES
from heartseg.metrics.anatomy_checks import STRUCTURE_NAMES
from heartseg.metrics.regions import enclosed_holes, largest_component
from heartseg.metrics.segmentation import predicted_labels
from heartseg.models import checkpoint
from heartseg.models.deeplabv3 import build_model, forward
from heartseg.models.devices import choose_device
from heartseg.shards.loader import Intensity, to_device
from heartseg.shards.writer import resize_image

# Test-time augmentation: the image itself and copies shifted up, down, left and right by this share of its size. The network's
# last feature map is 8 or 16 times coarser than its input, and shifted copies fall on it differently; changes of size or
# brightness gained less (jobs/benchmarks/postprocess.py), and flips would swap the left and right of the heart.
TTA_SHIFT = 0.05
LEAST = 1e-12  # lowest probability whose log is taken: logs stay finite, also after resampling
TTA_STEPS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
NO_POSTPROCESSING = PredictConfig()
LARGEST_HOLE = 0.10  # of the heart; a larger one is a missed structure, not a flaw to repair
# Masks of lower confidence need review: `confidence` overestimates the Dice by about 0.03, and 0.80 is a poor Dice.
REVIEW_THRESHOLD = 0.83


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A trained model with everything needed to prepare an image as in training."""

    model: nn.Module
    experiment: Experiment
    intensity: Intensity
    card: dict
    device: torch.device

    @property
    def members(self) -> tuple["Segmenter", ...]:
        """This model alone, so that it can be used like an Ensemble."""
        return (self,)

    @torch.inference_mode()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B,4,H,W] of uint8 images [B,1,H,W] on the stored grid."""
        unit = to_device(images, self.device).float().div_(255)
        return forward(self.experiment.train, self.model, self.intensity.apply(unit))

    def predict(self, image: np.ndarray, options: PredictConfig = NO_POSTPROCESSING) -> np.ndarray:
        """The mask uint8 [H,W] (labels 0-3) of an upright uint8 image [H,W] of any size: rows are depth."""
        return segment_images(self, [image], options)[0].mask


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several trained models on one grid whose class probabilities are averaged; usable anywhere in place of a Segmenter."""

    members: tuple[Segmenter, ...]

    @property
    def experiment(self) -> Experiment:
        """The first member's experiment: all members share its grid."""
        return self.members[0].experiment

    @property
    def device(self) -> torch.device:
        """The members' device."""
        return self.members[0].device

    @torch.inference_mode()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logs of the members' mean class probabilities [B,4,H,W]; their softmax is that mean."""
        mean = sum(member.logits(images).softmax(dim=1) for member in self.members) / len(self.members)
        return mean.clamp_min(LEAST).log()

    predict = Segmenter.predict


Model = Segmenter | Ensemble


@dataclass(frozen=True, eq=False)
class Segmented:
    """A mask uint8 [H,W] on the image's own grid, and the network's `confidence` in it, from 0 to 1."""

    mask: np.ndarray
    confidence: float


def segment_images(
    segmenter: Model, images: Sequence[np.ndarray], options: PredictConfig = NO_POSTPROCESSING, shapes: Sequence | None = None
) -> list[Segmented]:
    """Masks of upright uint8 images [H,W] of any size, on the grids of `shapes` (default: the images' own)."""
    shapes, size, found = shapes or [image.shape for image in images], segmenter.experiment.train.eval_batch_size, []
    for start in range(0, len(images), size):
        chosen = slice(start, start + size)
        scores = scores_of(segmenter, to_grid(segmenter, images[chosen]), options)
        for logits, shape, sure in zip(scores, shapes[chosen], confidence(scores), strict=True):
            found.append(Segmented(to_mask(logits, shape, options), sure))
    return found


def scores_of(segmenter: Model, images: torch.Tensor, options: PredictConfig) -> torch.Tensor:
    """Class scores [B,4,H,W] of uint8 images [B,1,H,W] on the stored grid; their softmax is the class probabilities."""
    return shifted_logits(segmenter, images) if options.tta else segmenter.logits(images)


def to_grid(segmenter: Model, images: Sequence[np.ndarray]) -> torch.Tensor:
    """Images uint8 [H,W] of any size, resampled to the model's grid: uint8 [B,1,h,w]."""
    grid = segmenter.experiment.image
    stored = [resize_image(np.ascontiguousarray(image), grid.height, grid.width) for image in images]
    return torch.from_numpy(np.stack(stored))[:, None]


@torch.inference_mode()
def shifted_logits(segmenter: Model, images: torch.Tensor) -> torch.Tensor:
    """Logs of class probabilities [B,4,H,W], averaged over TTA_STEPS shifts of uint8 images [B,1,H,W] by whole pixels."""
    height, width = images.shape[-2:]
    down, right = round(TTA_SHIFT * height), round(TTA_SHIFT * width)
    rows = torch.arange(-down, height + down, device=images.device).clamp(0, height - 1)
    columns = torch.arange(-right, width + right, device=images.device).clamp(0, width - 1)
    wider = images[:, :, rows][..., columns]

    def window(i: int, j: int) -> tuple:
        return ..., slice(down * (1 + i), down * (1 + i) + height), slice(right * (1 + j), right * (1 + j) + width)

    total = torch.zeros(len(images), NUM_CLASSES, *wider.shape[-2:], device=segmenter.device)
    seen = torch.zeros(wider.shape[-2:], device=segmenter.device)
    for step in TTA_STEPS:
        total[window(*step)] += segmenter.logits(wider[window(*step)]).softmax(dim=1)
        seen[window(*step)] += 1
    return (total[window(0, 0)] / seen[window(0, 0)]).clamp_min(LEAST).log()


def confidence(scores: torch.Tensor) -> list[float]:
    """The network's confidence in its own labels, from 0 to 1, from class scores [B,4,H,W]: the Dice that it expects.

    With class probabilities p (averaged over copies and members) and labels m, a structure's is 2 sum(p m) / (sum p + sum m),
    and 0 if it was not found; the confidence is the mean of the three. Use it to rank images; it is not calibrated.
    """
    probabilities = scores[..., ::2, ::2].softmax(dim=1)  # every second pixel in both directions is enough for a sum
    labels = torch.arange(1, NUM_CLASSES, device=scores.device).view(1, -1, 1, 1)
    chosen, found = predicted_labels(probabilities)[:, None] == labels, probabilities[:, 1:]
    expected = 2 * (found * chosen).sum(dim=(2, 3)) / (found.sum(dim=(2, 3)) + chosen.sum(dim=(2, 3))).clamp_min(1e-9)
    return expected.mean(dim=1).tolist()


def to_mask(logits: torch.Tensor, shape: tuple[int, int], options: PredictConfig) -> np.ndarray:
    """Labels uint8 [H,W] on the native grid: the class scores [4,h,w] are resampled, not labels, then `clean` is applied."""
    return clean(predicted_labels(interpolate(logits[None], tuple(shape), mode="bilinear"))[0].cpu().numpy(), options)


def clean(mask: np.ndarray, options: PredictConfig) -> np.ndarray:
    """The mask uint8 [H,W] postprocessed by `options`: stray pieces first, so that the holes they leave are closed too."""
    if options.largest_component:
        mask = largest_components(mask)
    return fill_holes(mask) if options.fill_holes else mask


def largest_components(mask: np.ndarray) -> np.ndarray:
    """The mask [H,W] with only the largest connected piece of each structure; other pieces become background."""
    kept = np.full_like(mask, BACKGROUND)
    for label in STRUCTURE_NAMES:
        kept[largest_component(mask == label)] = label
    return kept


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask [H,W] without holes up to LARGEST_HOLE of the heart: holes in cavity or atrium, then enclosed background."""
    filled, largest = mask.copy(), LARGEST_HOLE * np.count_nonzero(mask)
    for label in (ENDO, LA):
        filled[enclosed_holes(filled == label, largest)] = label
    gaps = enclosed_holes(filled != BACKGROUND, largest)
    if gaps.any():
        empty = filled == BACKGROUND
        nearest = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
        filled[gaps] = filled[tuple(nearest[:, gaps])]
    return filled


def load(path: str, which: str = "last", device: str | torch.device | None = None) -> Segmenter:
    """Load a run's `last` or `best` checkpoint, or the checkpoint in a folder; raises UserError if it is missing or damaged."""
    device = device or choose_device()
    found = checkpoint.find(path, which)
    experiment = from_json(found.card["experiment"], origin=found.path)
    model = build_model(experiment.model)
    model.load_state_dict(found.weights())
    model = model.to(device, memory_format=torch.channels_last).eval()
    return Segmenter(model, experiment, Intensity(*found.card["intensity"]), found.card, torch.device(device))


def load_all(paths: Sequence[str], which: str = "last", device: str | torch.device | None = None) -> Model:
    """One checkpoint as a Segmenter, several as an Ensemble; raises UserError like `load`, and if their grids differ."""
    require(len(paths) > 0, "No checkpoint was given: give the folder of at least one run.")
    members = tuple(load(path, which, device) for path in paths)
    sizes = [f"{member.experiment.image.height} x {member.experiment.image.width}" for member in members]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(f"{path} takes {size} images, but {paths[0]} takes {sizes[0]}: an ensemble needs equal sizes.")
    return Ensemble(members) if len(members) > 1 else members[0]
