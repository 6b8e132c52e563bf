"""Configurations are strict, recipes are what their names promise, and splits are by patient."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from heartseg.config import recipes
from heartseg.config.experiment import ImageConfig, ModelConfig, SplitConfig, first_difference, from_json, identity, to_json
from heartseg.config.training import AugmentConfig, TrainConfig
from heartseg.datasets import splits
from heartseg.errors import UserError
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.loader import steps_per_epoch


def changed(path: str, value) -> dict:
    whole = to_json(recipes.seed())
    *parents, key = path.split(".")
    part = whole
    for parent in parents:
        part = part[parent]
    part[key] = value
    return whole


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_comes_back_from_json_text_equal(name):
    recipe = recipes.RECIPES[name]()
    assert recipe.name == name
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


MISSING = object()
BAD_JSON = {
    **{
        path: ((1, f"extra fields found \\({path.split('.')[-1]}\\)"),)
        for path in ("colour", "train.epoch", "model.extra_head")
    },
    **{path: ((MISSING, f"required field missing @ a.json.{path}"),) for path in ("image.height", "name", "optim.kind")},
    "train.epochs": ((MISSING, "required field missing"), *((value, "train.epochs") for value in ("3", 3.5, True))),
    "train.deterministic": ((1, "train.deterministic"),),
    "optim.lr": (("0.1", "optim.lr"), (None, "optim.lr")),
    "source": ((7, "source"),),
    "loss.kind": (("hinge", "loss.kind"),),
    "model.backbone": (("resnet18", "model.backbone"),),
}


@pytest.mark.parametrize(("path", "value", "said"), [(path, *bad) for path, values in BAD_JSON.items() for bad in values])
def test_an_unknown_or_missing_key_or_a_value_of_the_wrong_kind_is_refused_by_its_field(path, value, said):
    whole = changed(path, value)
    *parents, key = path.split(".")
    if value is MISSING:
        del (whole[parents[0]] if parents else whole)[key]
    with pytest.raises(UserError, match=said):
        from_json(whole, origin="a.json")


BAD_VALUES = {
    "image.height": (31, 2049),
    "split.test_share": (0.0, 1.0, -0.1),
    "split.val_share": (0.8,),  # 0.2 are the test group's
    "model.dropout": (1.0, -0.1),
    "model.bn_momentum": (0.0,),
    "optim.lr": (0.0, -1, math.nan),
    "optim.ema_decay": (1.0,),
    "optim.weight_decay": (math.inf,),
    "optim.clip_norm": (math.inf, math.nan),
    "schedule.warmup_epochs": (math.inf, math.nan),
    "schedule.power": (math.inf,),
    "schedule.cycle_growth": (math.inf, 0.0),
    "schedule.factor": (1.0,),
    "schedule.milestones": ((0.5, 1.5),),
    "schedule.final": (0.0,),
    "schedule.cycles": (0,),
    "schedule.patience": (-1,),
    "augment.blur": (11.0,),
    "augment.sector_dropout": (1.1,),
    "loss.aux_weight": (math.inf,),
    "train.epochs": (0,),
    "train.batch_size": (1,),
    "train.eval_batch_size": (0,),
    "train.seed": (-1, 2**63),
    "train.accumulate": (7,),  # micro-batches of a batch of 12
    "workers": (0,),
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in BAD_VALUES.items() for value in values])
def test_a_bad_value_is_refused_by_its_field(path, value):
    with pytest.raises(UserError, match=path.rpartition(".")[2]):
        from_json(changed(path, value))


def test_parts_with_replayed_graphs_and_what_is_not_an_object_are_refused_and_an_integer_is_a_float():
    with pytest.raises(UserError, match="train.accumulate 2 rules out train.compile reduce-overhead"):
        TrainConfig(epochs=1, batch_size=12, accumulate=2, compile="reduce-overhead")
    assert from_json(changed("optim.lr", 1)).optim.lr == 1.0
    for value in (None, [], "text", 3):  # none is a JSON object
        for whole in (value, changed("train", value)):
            with pytest.raises(UserError):
                from_json(whole)


JSON_VALUES = st.recursive(st.integers(-3, 3) | st.booleans(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner))


@given(old=st.dictionaries(st.sampled_from("abc"), JSON_VALUES), new=st.dictionaries(st.sampled_from("abc"), JSON_VALUES))
def test_first_difference_is_none_exactly_for_equal_configurations(old, new):
    assert (first_difference(old, new) is None) == (old == new)


def test_first_difference_names_the_field_and_both_values_and_identity_leaves_out_where_a_run_is():
    assert first_difference(to_json(recipes.seed()), changed("train.epochs", 10)) == "train.epochs: 170 there, 10 requested"
    assert first_difference({"a": 1}, {}) == "a: 1 there, None requested"
    seed = recipes.seed()
    assert identity(replace(seed, source="/x", data="/y", runs="/z", workers=6, name="other")) == identity(seed)
    assert identity(replace(seed, train=replace(seed.train, seed=1))) != identity(seed)


def test_the_seed_recipe_is_exactly_the_seed():
    seed = recipes.seed()
    assert seed.image == ImageConfig(256, 256)
    assert seed.model == ModelConfig("resnet101", pretrained=False, aux_head=False, norm="batch")
    assert (seed.optim.kind, seed.optim.lr, seed.optim.momentum, seed.optim.weight_decay) == ("sgd", 0.001, 0.9, 0.0)
    assert (seed.optim.clip_norm, seed.optim.ema_decay) == (0.0, 0.0)
    assert (seed.schedule.kind, seed.schedule.power, seed.schedule.warmup_epochs) == ("polynomial", 0.9, 0.0)
    assert seed.loss.kind == "cross_entropy"
    assert (seed.train.epochs, seed.train.batch_size, seed.train.eval_batch_size) == (170, 12, 4)
    assert (seed.train.intensity, seed.train.seed) == ("unit", 0)
    assert set(to_json(seed.augment).values()) == {0.0} and seed.augment == AugmentConfig()
    assert seed.split == SplitConfig("ratio", test_share=0.2, val_share=0.0, seed=0)


def test_the_seeds_network_takes_its_batch_and_returns_four_maps():
    network = build_model(recipes.seed().model).eval().to("meta")
    assert network(torch.zeros(12, 1, 256, 256, device="meta")).shape == (12, 4, 256, 256)
    # ResNet-101 has 33 bottlenecks of three convolutions, a stem and four shortcuts.
    assert sum(isinstance(m, nn.Conv2d) for m in network.network.backbone.modules()) == 33 * 3 + 1 + 4


def test_500_patients_give_the_seed_400_and_100_and_133_steps_of_12():
    patients = [f"patient{number:04d}" for number in range(1, 501)]
    seed = recipes.seed()
    groups = splits.make_groups(seed.split, patients, {})
    assert {group: len(names) for group, names in groups.items()} == {"train": 400, "test": 100}
    assert not set(groups["train"]) & set(groups["test"]) and set().union(*groups.values()) == set(patients)
    assert [4 * len(groups[group]) for group in ("train", "test")] == [1600, 400]
    assert steps_per_epoch(4 * len(groups["train"]), seed.train.batch_size) == 133


def test_the_official_split_keeps_its_groups_and_only_patients_that_are_there_and_an_impossible_one_is_refused():
    official = {"train": ["c", "a"], "val": ["gone"], "test": ["b"]}
    groups = splits.make_groups(SplitConfig("official"), ["a", "b", "c", "extra"], official)
    assert groups == {"train": ["a", "c"], "test": ["b"]}
    with pytest.raises(UserError, match="database_split"):
        splits.make_groups(SplitConfig("official"), ["a"], {})
    with pytest.raises(UserError, match="1 patients are too few for a training"):
        splits.make_groups(SplitConfig("ratio"), ["a"], {})
    with pytest.raises(UserError, match="a is in both train and test"):
        splits.make_groups(SplitConfig("official"), ["a", "b"], {"train": ["a"], "test": ["a", "b"]})
