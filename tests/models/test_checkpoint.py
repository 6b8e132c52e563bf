"""A checkpoint is complete or ignored, and a run's folder is found again only by the same experiment."""

import copy
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heartseg.config import recipes
from heartseg.errors import UserError
from heartseg.models import checkpoint
from heartseg.shards.reader import Shards
from heartseg.storage import filesystem
from heartseg.training import run_directory

STATE = {"model": {"w": torch.arange(6.0).view(2, 3)}, "epoch": 3, "val_dice": [0.1, 0.2], "average": None}


def save(run: str, epoch: int, val_dice: float | None = None) -> checkpoint.Checkpoint:
    metrics = {"epoch": epoch} if val_dice is None else {"epoch": epoch, "val/dice": val_dice}
    return checkpoint.save(run, {"w": torch.full((2, 3), float(epoch))}, STATE, {"epoch": epoch, "metrics": metrics})


def epochs(run: str) -> list[int]:
    return [found.epoch for found in checkpoint.complete(run)]


@pytest.fixture
def run(tmp_path) -> str:
    return str(tmp_path / "run")


def test_weights_and_training_state_come_back_as_they_were_saved_if_they_are_tensors_and_plain_values(run):
    save(run, 3, 0.5)
    found = checkpoint.find(run)
    assert found.epoch == 3 and found.card["metrics"]["val/dice"] == 0.5
    assert torch.equal(found.weights()["w"], torch.full((2, 3), 3.0))
    state, model = found.training_state(), {"w": torch.arange(6.0).view(2, 3)}
    assert torch.equal(state["model"]["w"], model["w"]) and state | {"model": model} == STATE | {"model": model}
    # Nothing but tensors and plain values is unpickled.
    saved = checkpoint.save(run, {}, {"model": Path("only unpickling could bring this back")}, {"epoch": 1, "metrics": {}})
    with pytest.raises(UserError, match="damaged"):
        saved.training_state()


def test_a_snapshot_holds_every_tensor_as_it_was_whatever_training_does_next():
    wide = torch.randn(3, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    state = {"wide": wide, "steps": [torch.tensor(7.0), torch.tensor(3)], "half": (torch.ones(2).bfloat16(), 0.5), "empty": []}
    expected, found = copy.deepcopy(state), checkpoint.snapshot(state)
    for tensor in (wide, *state["steps"], state["half"][0]):
        tensor.zero_()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, check_stride=True)  # a fused optimizer requires equal strides


def test_tensors_that_leave_a_gpu_together_keep_their_numbers_and_strides():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 4, 4), (5, 1, 3, 3), (7, 3, 1, 1), (6,), ()]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors += [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors if tensor.ndim == 4]
    torch.testing.assert_close(checkpoint._joined_copies(tensors), tensors, rtol=0, atol=0, check_stride=True)
    wide = torch.randn(4, 6, generator=generator)
    (found,) = checkpoint._joined_copies([wide[:, ::2]])
    torch.testing.assert_close(found, wide[:, ::2], rtol=0, atol=0)


def test_a_folder_without_its_card_is_ignored_and_saving_an_epoch_again_replaces_it(run):
    save(run, 1, 0.9)
    torn = save(run, 2, 0.95)
    os.remove(os.path.join(torn.path, checkpoint.CARD))
    assert epochs(run) == [1] and checkpoint.last(run).epoch == checkpoint.best(run).epoch == checkpoint.find(run).epoch == 1
    with pytest.raises(UserError, match="epoch_0002 has no complete checkpoint"):
        checkpoint.find(torn.path)
    again = checkpoint.save(run, {"w": torch.zeros(1)}, {}, {"epoch": 2, "metrics": {}})
    assert epochs(run) == [1, 2] and torch.equal(checkpoint.find(run).weights()["w"], torch.zeros(1))
    assert sorted(os.listdir(again.path)) == sorted([checkpoint.CARD, checkpoint.TRAINING, checkpoint.WEIGHTS])


def flip(path: str) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def truncate(path: str) -> None:
    os.truncate(path, 10)


READS = {
    checkpoint.WEIGHTS: (lambda run: checkpoint.find(run).weights(), (flip, truncate, os.remove)),
    checkpoint.TRAINING: (lambda run: checkpoint.find(run).training_state(), (truncate, os.remove)),
    checkpoint.CARD: (checkpoint.find, (truncate,)),
}


@pytest.mark.parametrize(("file", "damage"), [(file, damage) for file, (_, damages) in READS.items() for damage in damages])
def test_a_damaged_file_is_refused_by_name(file, damage, run):
    damage(os.path.join(save(run, 1).path, file))
    with pytest.raises(UserError, match=f"{re.escape(file)} (is|are) (damaged|missing or not valid JSON)"):
        READS[file][0](run)


@pytest.mark.parametrize(
    ("dices", "last", "best"),
    [({1: 0.3, 2: 0.8, 3: 0.5}, 3, 2), ({1: None, 2: None}, 2, 2), ({9999: 0.1, 10000: 0.2}, 10000, 10000)],
)
def test_last_is_the_newest_and_best_the_highest_on_validation_or_the_last_without(run, dices, last, best):
    for epoch, dice in dices.items():
        save(run, epoch, dice)
    assert checkpoint.find(run).epoch == last and checkpoint.find(run, "best").epoch == best
    assert all(checkpoint.find(os.path.join(run, "checkpoints", f"epoch_{epoch:04d}")).epoch == epoch for epoch in dices)


@given(dices=st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=5))
def test_after_each_epoch_only_the_last_and_the_best_are_kept(dices, tmp_path_factory):
    run = str(tmp_path_factory.mktemp("keep"))
    for epoch, dice in enumerate(dices, start=1):
        save(run, epoch, dice)
        checkpoint.keep_last_and_best(run)
    known = [dice for dice in dices if dice is not None]
    expected = {len(dices)} | ({dices.index(max(known)) + 1} if known else set())
    assert set(epochs(run)) == expected and len(os.listdir(os.path.join(run, checkpoint.FOLDER))) == len(expected)


def test_a_run_without_checkpoints_and_a_folder_that_is_not_a_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="gone does not exist"):
        checkpoint.find(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="has no complete checkpoint: give the folder of a run"):
        checkpoint.find(str(tmp_path))
    save(str(tmp_path / "quick-1a2b3c4d"), 1, 0.5)
    with pytest.raises(UserError, match="give one of the runs in it, such as quick-1a2b3c4d"):
        checkpoint.find(str(tmp_path))
    with pytest.raises(UserError, match="does not exist: did you mean quick-1a2b3c4d"):
        checkpoint.find(str(tmp_path / "quick-1a2b3c4"))
    with pytest.raises(UserError, match="is not a run"):
        run_directory.find_run(str(tmp_path))
    assert checkpoint.last(str(tmp_path)) is None


@pytest.fixture
def data(tmp_path) -> Shards:
    """The facts that a run needs about shards: manifest, groups and their file."""
    folder, groups = str(tmp_path / "shards"), {"train": ["a", "b"], "test": ["c"]}
    manifest = {"dataset": "phantom", "source_sha256": "ab", "parts": [{"sha256": "cd"}]}
    manifest |= {"patients": {patient: {"rows": 4} for patient in "abc"}}
    filesystem.publish_json(os.path.join(folder, "splits.json"), {"config": {"kind": "ratio"}, "groups": groups})
    return Shards(folder, manifest, groups)


@pytest.fixture
def experiment(tmp_path):
    return replace(recipes.quick(), runs=str(tmp_path / "runs"))


def test_a_run_is_named_by_what_decides_its_result(experiment, data):
    assert re.fullmatch(r"quick-[0-9a-f]{8}", name := run_directory.run_name(experiment, data))
    assert run_directory.run_name(replace(experiment, workers=4, data="/elsewhere", runs="/x"), data) == name
    assert run_directory.run_name(replace(experiment, train=replace(experiment.train, epochs=3)), data) != name
    assert run_directory.run_name(experiment, replace(data, groups={"train": ["a"], "test": ["b", "c"]})) != name
    assert run_directory.run_name(experiment, replace(data, manifest=data.manifest | {"parts": [{"sha256": "ce"}]})) != name


@pytest.mark.parametrize(
    ("there", "again", "fresh"),
    [([], "a", "a"), (["a", "a-2"], "a-2", "a-3"), (["a-9", "a-10"], "a-10", "a-11"), (["ab", "a-x", "xa-3"], "a", "a")],
)
def test_the_same_command_finds_the_newest_generation_and_fresh_the_next(there, again, fresh, tmp_path):
    for name in there:
        (tmp_path / name).mkdir()
    assert run_directory.generation_name(str(tmp_path), "a", fresh=False) == again
    assert run_directory.generation_name(str(tmp_path), "a", fresh=True) == fresh


def test_the_same_experiment_finds_its_run_again_and_fresh_begins_another(experiment, data):
    first = run_directory.open_run(experiment, data)
    assert run_directory.open_run(experiment, data) == first == run_directory.find_run(first.path)
    assert first.description["groups"] == {"train": {"patients": 2, "images": 8}, "test": {"patients": 1, "images": 4}}
    fresh = run_directory.open_run(experiment, data, fresh=True)
    assert fresh.name == f"{first.name}-2" and fresh.description["wandb_id"] != first.description["wandb_id"]
    assert run_directory.open_run(experiment, data) == fresh
    assert run_directory.find_run(f"{fresh.path}/checkpoints/epoch_0003/") == fresh


def test_a_name_that_was_asked_for_is_that_folder_whatever_others_are_called(experiment, data):
    first = run_directory.open_run(experiment, data, name="exp")
    run_directory.open_run(replace(experiment, train=replace(experiment.train, epochs=99)), data, name="exp-2")
    assert run_directory.open_run(experiment, data, name="exp") == first
    assert run_directory.open_run(experiment, data, name="exp", fresh=True).name == "exp-3"
    for name in ("../up", "a/b", " "):
        with pytest.raises(UserError, match="--run-name .* is not a valid folder name"):
            run_directory.open_run(experiment, data, name=name)


def test_a_run_of_another_configuration_or_other_data_is_refused_by_its_first_field(experiment, data):
    run_directory.open_run(experiment, data, name="mine")
    longer = replace(experiment, train=replace(experiment.train, epochs=99))
    with pytest.raises(UserError, match=r"mine holds another run \(train\.epochs: 16 there, 99 requested\)"):
        run_directory.open_run(longer, data, name="mine")
    with pytest.raises(UserError, match=r"holds another run \(data_fingerprint: "):
        run_directory.open_run(experiment, replace(data, groups={"train": ["a"], "test": ["b"]}), name="mine")


def test_the_record_is_strict_json_that_reads_back_with_its_nan_and_a_csv_beside_it(run):
    assert run_directory.read_record(run) == []
    run_directory.write_record(run, [{"epoch": 1, "test/dice": 0.1}, {"epoch": 2, "test/dice": float("nan")}])
    record = Path(run, run_directory.RECORD)
    assert record.read_text().splitlines()[1] == '{"epoch": 2, "test/dice": null}'
    record.write_text(record.read_text() + '{"epoch": 3, "test/dice": NaN}\n')  # as earlier versions wrote it
    first, *others = run_directory.read_record(run)
    assert first == {"epoch": 1, "test/dice": 0.1} and np.isnan([epoch["test/dice"] for epoch in others]).all()
    assert Path(run, run_directory.RECORD_CSV).read_text().splitlines()[:2] == ["epoch,test/dice", "1,0.1"]
