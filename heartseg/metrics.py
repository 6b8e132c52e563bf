"""Counts to accuracy, Dice and IoU, by the definitions that every table of the project uses.

Per image first, then the mean over images. A structure that is absent from truth and prediction has no score (NaN) and
is left out of means; absent from one of the two it scores 0. `dice` and `iou` are means over endo, myo and la; `dice4`
counts the background as a fourth; `epi` is endo and myo together and is in no mean.
"""

import torch

from heartseg.labels import BACKGROUND, NUM_CLASSES, STRUCTURE_LABELS, STRUCTURES

SCORES = (
    "accuracy",
    "dice",
    "iou",
    "dice4",
    *(f"dice_{s}" for s in STRUCTURE_LABELS),
    *(f"iou_{s}" for s in STRUCTURES),
)


def confusion(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Pixel counts int64 [B,4,4] (truth by prediction) of two label tensors [B,H,W]."""
    batch = prediction.shape[0]
    image = torch.arange(batch, device=target.device).view(-1, 1, 1)
    cell = (image * NUM_CLASSES + target.long()) * NUM_CLASSES + prediction.long()
    counts = torch.bincount(cell.flatten(), minlength=batch * NUM_CLASSES**2)
    return counts.view(batch, NUM_CLASSES, NUM_CLASSES)


def _overlap(counts: torch.Tensor, labels: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in both, and the sum of pixels in each, for the union of some labels; float64 [B]."""
    chosen = list(labels)
    in_truth, in_prediction = counts[:, chosen], counts[:, :, chosen]
    both = in_truth[:, :, chosen].sum(dim=(1, 2))
    return both.double(), (in_truth.sum(dim=(1, 2)) + in_prediction.sum(dim=(1, 2))).double()


def image_scores(counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores by name, float64 [B], of confusion counts [B,4,4]. 0 / 0 is NaN on purpose."""
    dice, iou = {}, {}
    for name, labels in STRUCTURE_LABELS.items():
        both, total = _overlap(counts, labels)
        dice[name], iou[name] = 2 * both / total, both / (total - both)
    both, total = _overlap(counts, (BACKGROUND,))
    structures = torch.stack([dice[name] for name in STRUCTURES])
    correct = counts.diagonal(dim1=1, dim2=2).sum(dim=1).double()
    return {
        "accuracy": correct / counts.sum(dim=(1, 2)).double(),
        "dice": structures.nanmean(dim=0),
        "iou": torch.stack([iou[name] for name in STRUCTURES]).nanmean(dim=0),
        "dice4": torch.cat([structures, (2 * both / total)[None]]).nanmean(dim=0),
        **{f"dice_{name}": value for name, value in dice.items()},
        **{f"iou_{name}": iou[name] for name in STRUCTURES},
    }


class ScoreSums:
    """Sums and counts of a group's scores and loss on the device, divided once at the end.

    One float64 tensor holds them all, so that ranks add up in a single reduction.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, len(SCORES) + 1, dtype=torch.float64, device=device)
        self.counts = torch.zeros(1, NUM_CLASSES, NUM_CLASSES, dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor, prediction: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: its mean loss, and labels [B,H,W] predicted and true."""
        counts = confusion(prediction, target)
        scores = image_scores(counts)
        values = torch.stack([scores[name] for name in SCORES] + [loss.double().expand(len(prediction))])
        known = ~values.isnan()
        # A loss that is NaN must show as NaN, and must not be left out as an absent structure is.
        known[-1] = True
        self.sums += torch.stack([torch.where(known, values, 0).sum(dim=1), known.sum(dim=1).double()])
        self.counts += counts.sum(dim=0)

    def means(self) -> dict[str, float]:
        """Means over images of `loss` and every score."""
        sums, counts = self.sums.cpu()
        return dict(zip((*SCORES, "loss"), (sums / counts).tolist(), strict=True))

    def pooled(self) -> dict[str, float]:
        """The scores of all images' pixels taken as one image."""
        return {name: value.item() for name, value in image_scores(self.counts).items()}
