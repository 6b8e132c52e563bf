"""A run that begins with another's weights: it is another run, records them, and refuses weights that do not fit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heartseg.errors import UserError
from heartseg.models import checkpoint
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.reader import open_shards
from heartseg.storage import filesystem
from heartseg.training import finetune, run_directory, worker
from heartseg.training.distributed import Ranks
from helpers.experiments import tiny_experiment
from jobs import train

ONE_EPOCH = replace(tiny_experiment().train, epochs=1)
# So small a rate that the first weights are still there after an epoch.
STILL = replace(tiny_experiment().optim, lr=1e-12, ema_decay=0.0)


def run(experiment, **options) -> str:
    return train.run(experiment, train.Options(launcher="plain", **options))


@pytest.fixture(scope="module")
def base(shards, tmp_path_factory) -> str:
    return run(tiny_experiment(data=shards, runs=str(tmp_path_factory.mktemp("base")), train=ONE_EPOCH))


def test_a_run_begins_with_the_weights_of_another_and_remembers_them(base, shards, tmp_path):
    experiment = tiny_experiment(data=shards, runs=str(tmp_path), train=ONE_EPOCH, optim=STILL)
    path, plain = run(experiment, init_from=base), run(experiment)
    torch.testing.assert_close(checkpoint.last(path).weights(), checkpoint.last(base).weights(), rtol=0, atol=1e-6)
    said = run_directory.find_run(path).description["initial"]
    assert said["weights_sha256"] == checkpoint.last(base).card["weights_sha256"] and said["checkpoint"].startswith(base)
    assert said["weights_sha256"] in Path(path, "MODEL_CARD.md").read_text()
    # Another beginning is another run; the same command finds its own again.
    assert plain != path and run(experiment, init_from=base) == path
    with pytest.raises(UserError, match="initial_weights_sha256"):
        run(experiment, run_name=path.rsplit("/", 1)[-1])


def test_weights_of_another_network_are_refused_by_the_first_tensor(base, shards, tmp_path):
    experiment = tiny_experiment(data=shards, runs=str(tmp_path))
    changes = {"aux_classifier.0.weight": {"aux_head": True}, "backbone.conv1.weight": {"backbone": "resnet50"}}
    for tensor, change in changes.items():
        with pytest.raises(UserError, match=f"network.{tensor} is missing there"):
            run(replace(experiment, model=replace(experiment.model, **change)), init_from=base)
    assert not list(tmp_path.iterdir())
    model = build_model(tiny_experiment().model)
    with pytest.raises(UserError, match=r"network.classifier.4.bias is \(7,\) there but \(4,\) here"):
        finetune.check_tensors(model.state_dict() | {"network.classifier.4.bias": torch.zeros(7)}, model, "there")
    with pytest.raises(UserError, match="extra is .* there but missing here"):
        finetune.check_tensors(model.state_dict() | {"extra": torch.zeros(1)}, model, "there")


def test_weights_that_have_seen_the_test_group_are_refused(base, shards, tmp_path):
    divided = str(tmp_path / "shards")
    shutil.copytree(shards, divided)
    groups = (split := filesystem.read_json(f"{divided}/splits.json"))["groups"]
    groups["train"], groups["test"] = groups["test"] + groups["train"][:4], groups["train"][4:]
    filesystem.publish_json(f"{divided}/splits.json", split)
    with pytest.raises(UserError, match="trained on 2 patients of this test group"):
        run(tiny_experiment(data=divided, runs=str(tmp_path / "runs")), init_from=base)


def test_first_weights_are_recorded_with_the_patients_that_they_have_seen_and_refused_if_they_changed_since(base, shards):
    opened = open_shards(shards)
    fewer = replace(opened, groups=opened.groups | {"train": opened.groups["train"][:2]})
    initial = finetune.find_initial(base, tiny_experiment(), fewer)
    assert initial["train_patients"] == sorted(opened.groups["train"])
    with pytest.raises(UserError, match="has changed since this run started from it"):
        finetune.load_initial(build_model(tiny_experiment().model), initial | {"weights_sha256": "0" * 64})


def test_a_run_that_has_a_checkpoint_of_its_own_no_longer_needs_its_first_weights(base, shards, tmp_path):
    first = shutil.copytree(base, tmp_path / "first")
    experiment = tiny_experiment(data=shards, runs=str(tmp_path / "runs"))
    initial = finetune.find_initial(str(first), experiment, open_shards(shards))
    opened = run_directory.open_run(experiment, open_shards(shards), initial=initial)

    def lose_the_first_weights(metrics):
        shutil.rmtree(first)
        raise InterruptedError  # what ends a process after an epoch

    rest = (Ranks(0, 1, torch.device("cpu")), lambda model: model)
    with pytest.raises(InterruptedError):
        worker.train_rank(experiment, opened, *rest, lose_the_first_weights)
    worker.train_rank(experiment, opened, *rest)
    assert [row["epoch"] for row in run_directory.read_record(opened.path)] == [1, 2]
