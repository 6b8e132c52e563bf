"""Starts a run from another run's weights."""

from dataclasses import replace

import torch
from torch import nn

from heartseg.config.experiment import Experiment
from heartseg.errors import UserError
from heartseg.models import checkpoint
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.reader import Shards
from heartseg.training import run_directory


def find_initial(path: str, experiment: Experiment, shards: Shards) -> dict:
    """The record of the weights that a new run starts from: those of the best checkpoint of the base run at `path`.

    Without val scores it is the last checkpoint. Raises UserError if its tensors do not fit the experiment, or if it was
    trained on patients of the new run's validation or test group.
    """
    found, base = checkpoint.find(path, "best"), run_directory.find_run(path).description
    with torch.device("meta"):
        model = build_model(replace(experiment.model, pretrained=False))
    check_tensors(found.weights(), model, found.path)
    # Names are unique only within a dataset: another dataset's patient0001 is another patient.
    seen = set(base["train_patients"]) if base["dataset"] == shards.manifest["dataset"] else set()
    for group in shards.groups.keys() - {"train"}:
        if both := seen.intersection(shards.groups[group]):
            fix = "use shards split as that run's were, or start from another run."
            raise UserError(f"--init-from {path} was trained on {len(both)} patients of this {group} group: {fix}")
    return {"checkpoint": found.path, "weights_sha256": found.card["weights_sha256"], "train_patients": sorted(seen)}


def load_initial(model: nn.Module, initial: dict) -> None:
    """Load the weights into a new model; raises UserError if they are no longer those that the run started from."""
    found = checkpoint.open_checkpoint(initial["checkpoint"])
    if found.card["weights_sha256"] != initial["weights_sha256"]:
        raise UserError(f"{found.path} has changed since this run started from it: give --fresh to start a new run.")
    weights = found.weights()
    check_tensors(weights, model, found.path)
    model.load_state_dict(weights)


def check_tensors(weights: dict[str, torch.Tensor], model: nn.Module, origin: str) -> None:
    """Raise UserError naming the first tensor that the weights or the model lack, or whose shape differs between them."""
    wanted = model.state_dict()
    for name in [*wanted, *(name for name in weights if name not in wanted)]:
        there, asked = (tuple(t[name].shape) if name in t else "missing" for t in (weights, wanted))
        if there != asked:
            fix = "use the --model settings that they were trained with."
            raise UserError(f"The weights {origin} do not fit: {name} is {there} there but {asked} here; {fix}")
