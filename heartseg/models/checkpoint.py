"""Checkpoints: weights and plain JSON, which are enough to rebuild the model, and the states for resuming training.

A folder `epoch_0007` holds `model.safetensors` (the weights to evaluate: the averaged ones if averaging is
on), `training.pt` (raw weights, optimizer, average) and, written last, `checkpoint.json`, which marks it as complete.
"""

import difflib
import io
import pickle
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import safetensors.torch
import torch

from heartseg.errors import UserError, require
from heartseg.storage import filesystem

CARD, WEIGHTS, TRAINING = "checkpoint.json", "model.safetensors", "training.pt"
FOLDER = "checkpoints"
NAME = re.compile(r"epoch_(\d{4,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and its card (`epoch`, `experiment`, `metrics`, `intensity`, lineage)."""

    path: str
    card: dict

    @property
    def epoch(self) -> int:
        """Number of trained epochs."""
        return self.card["epoch"]

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights to evaluate, on the CPU; raises UserError if the file is damaged."""
        path = filesystem.join(self.path, WEIGHTS)
        try:
            data = filesystem.read_bytes(path)
            if filesystem.sha256(data) != self.card["weights_sha256"]:
                raise ValueError("not the bytes that were written")
            return safetensors.torch.load(data)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(f"The weights {path} are damaged: use another checkpoint.") from error

    def training_state(self) -> dict:
        """The state to resume training from; unpickles only tensors and plain values. Raises UserError if it is damaged."""
        path = filesystem.join(self.path, TRAINING)
        try:
            return torch.load(io.BytesIO(filesystem.read_bytes(path)), map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            fix = "delete this checkpoint's folder, or give --fresh"
            raise UserError(f"The training state {path} is damaged: {fix}.") from error


def snapshot(value: object) -> object:
    """A copy of nested states on the CPU, which later training does not change; synchronises with a GPU once."""
    copies = iter(_copies([*_tensors(value)]))

    def rebuilt(inner: object) -> object:
        if isinstance(inner, torch.Tensor):
            return next(copies)
        if isinstance(inner, dict):
            return {key: rebuilt(each) for key, each in inner.items()}
        return type(inner)(map(rebuilt, inner)) if isinstance(inner, (list, tuple)) else inner

    return rebuilt(value)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies on the CPU with the same strides, which a resumed optimizer needs; those of a GPU in one transfer per dtype."""
    copies, on_gpu = {}, defaultdict(list)
    for number, tensor in enumerate(tensors):
        if tensor.is_cuda:
            on_gpu[tensor.device, tensor.dtype].append(number)
        else:
            copies[number] = tensor.detach().clone()
    for numbers in on_gpu.values():
        copies |= zip(numbers, _joined_copies([tensors[number].detach() for number in numbers]), strict=True)
    if on_gpu:
        torch.cuda.synchronize()
    return [copies[number] for number in range(len(tensors))]


def _joined_copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors of one device and dtype, parts of one tensor on the CPU; on a GPU, call `synchronize` before use."""
    dense = [tensor if _is_dense(tensor) else tensor.contiguous() for tensor in tensors]
    # Joined in the order of their memory, not of their indices, so that channels_last weights need no further copy.
    joined = torch.cat([tensor.as_strided((tensor.numel(),), (1,)) for tensor in dense]).to("cpu", non_blocking=True)
    parts = joined.split([tensor.numel() for tensor in dense])
    return [part.as_strided(tensor.shape, tensor.stride()) for part, tensor in zip(parts, dense, strict=True)]


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def save(run: str, weights: dict[str, torch.Tensor], training_state: dict, card: dict) -> Checkpoint:
    """Write the checkpoint of `card["epoch"]` below a run; it is complete once its card is written."""
    path = filesystem.join(run, FOLDER, f"epoch_{card['epoch']:04d}")
    # From here on, a copy of this epoch from before an interruption is no longer complete.
    filesystem.remove(filesystem.join(path, CARD))
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    torch.save(training_state, buffer := io.BytesIO())
    filesystem.publish(filesystem.join(path, TRAINING), buffer.getvalue())
    filesystem.publish(filesystem.join(path, WEIGHTS), data)
    card = card | {"weights_sha256": filesystem.sha256(data)}
    filesystem.publish_json(filesystem.join(path, CARD), card)
    return Checkpoint(path, card)


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint in a folder; raises UserError if it has none."""
    is_complete = filesystem.exists(filesystem.join(path, CARD))
    require(is_complete, f"{path} is not a checkpoint (no {CARD}): give a run's folder or one of its {FOLDER}/epoch_*.")
    return Checkpoint(path, filesystem.read_json(filesystem.join(path, CARD)))


def complete(run: str) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    folder = filesystem.join(run, FOLDER)
    paths = [filesystem.join(folder, name) for name in filesystem.list_names(folder) if NAME.fullmatch(name)]
    found = [open_checkpoint(path) for path in paths if filesystem.exists(filesystem.join(path, CARD))]
    return sorted(found, key=lambda checkpoint: checkpoint.epoch)


def last(run: str) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(complete(run)), None)


def best(run: str) -> Checkpoint | None:
    """The kept checkpoint with the highest `val/dice`; None without a validation group."""
    scored = [c for c in complete(run) if c.card["metrics"].get("val/dice") is not None]
    return max(scored, key=lambda c: c.card["metrics"]["val/dice"], default=None)


def keep_last_and_best(run: str) -> None:
    """Delete every checkpoint of a run but the newest and the best."""
    top = best(run)
    for old in complete(run)[:-1]:
        if top is None or old.path != top.path:
            filesystem.remove(filesystem.join(old.path, CARD))  # first, so that a half-removed one does not count as complete
            filesystem.remove(old.path)


def find(path: str, which: str = "last") -> Checkpoint:
    """The checkpoint in the folder `path`, or a run's `last` or `best` (without val scores, the last); raises UserError."""
    found = (best(path) if which == "best" else None) or last(path)
    if not found and not filesystem.exists(filesystem.join(path, CARD)):
        problem = "has no complete checkpoint" if filesystem.exists(path) else "does not exist"
        raise UserError(f"{path} {problem}: {_similar_run(path.rstrip('/'))}")
    return found or open_checkpoint(path)


def _similar_run(path: str) -> str:
    """Advice for a path without a checkpoint: a run in it, or one beside it with a similar name."""

    def runs_in(folder: str) -> list[str]:
        return [name for name in filesystem.list_names(folder) if filesystem.exists(filesystem.join(folder, name, FOLDER))]

    if inside := runs_in(path):
        return f"give one of the runs in it, such as {inside[0]}."
    near = difflib.get_close_matches(filesystem.last_part(path), runs_in(path.rpartition("/")[0]), 1)
    return f"did you mean {near[0]}?" if near else f"give the folder of a run, or one of its {FOLDER}/epoch_*."
