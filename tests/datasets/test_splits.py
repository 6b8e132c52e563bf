"""Groups are by patient, disjoint, balanced if anything is known, and drawn as before if not."""

import itertools
import os
import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heartseg.config.experiment import ImageConfig, SplitConfig
from heartseg.datasets import splits
from heartseg.datasets.phantom import patient_info
from heartseg.errors import UserError
from heartseg.shards import writer
from heartseg.shards.reader import open_shards
from heartseg.storage import filesystem
from helpers.experiments import tiny_experiment
from jobs import preprocess
from jobs.support.pipeline_stages import shards_name

PLAIN = preprocess.Options(launcher="plain")


@st.composite
def known_patients(draw) -> dict[str, dict]:
    """Patients with known EF and quality, and others without."""
    quality = st.dictionaries(st.sampled_from(["2CH", "4CH"]), st.sampled_from(["Good", "Medium", "Poor", "odd"]))
    record = st.fixed_dictionaries({"ef": st.none() | st.floats(10, 80), "quality": quality})
    listed = draw(st.lists(st.just({}) | record, min_size=5, max_size=150))
    return {f"patient{number:04d}": each for number, each in enumerate(listed)}


def by_stratum(names: list[str], known: dict[str, dict]) -> Counter:
    return Counter(splits.stratum(known[name]) for name in names)


@given(known=known_patients(), test=st.floats(0.05, 0.5), val=st.floats(0, 0.3), seed=st.integers(0, 999), data=st.data())
def test_a_ratio_split_gives_each_group_its_share_of_every_stratum(known, test, val, seed, data):
    patients = list(known)
    config = SplitConfig("ratio", test, val, seed)
    num_test, num_val = round(test * len(patients)), round(val * len(patients))
    if not (num_test or num_val):
        return
    groups = splits.make_groups(config, patients, {}, known)
    assert sorted(name for names in groups.values() for name in names) == patients
    assert (len(groups.get("test", [])), len(groups.get("val", []))) == (num_test, num_val)
    everywhere = by_stratum(patients, known)
    for group, size, most in (("test", num_test, 1), ("val", num_val, 2)):
        for name, number in by_stratum(groups.get(group, []), known).items():
            assert abs(number - everywhere[name] * size / len(patients)) < most
    assert groups == splits.make_groups(config, data.draw(st.permutations(patients)), {}, known)


@given(known=known_patients(), folds=st.integers(2, 12), val=st.floats(0, 0.5), seed=st.integers(0, 999))
def test_folds_test_everybody_once_and_share_no_patient(known, folds, val, seed):
    patients = list(known)
    config = SplitConfig("kfold", val_share=val, seed=seed, folds=folds)
    if len(patients) < folds:
        with pytest.raises(UserError, match="lower --split.folds"):
            splits.make_groups(config, patients, {}, known)
        return
    divided = [splits.make_groups(replace(config, fold=fold), patients, {}, known) for fold in range(folds)]
    assert sorted(name for groups in divided for name in groups["test"]) == patients
    sizes = [len(groups["test"]) for groups in divided]
    assert max(sizes) - min(sizes) <= 1
    for groups in divided:
        assert sorted(name for names in groups.values() for name in names) == patients
        assert len(groups.get("val", [])) == round(val * (len(patients) - len(groups["test"])))
    for name in by_stratum(patients, known):
        counts = [by_stratum(groups["test"], known)[name] for groups in divided]
        assert max(counts) - min(counts) <= 1


@given(num=st.integers(3, 200), test=st.floats(0.1, 0.5), val=st.floats(0, 0.3), seed=st.integers(0, 999))
@pytest.mark.parametrize("stratify", [True, False])
def test_where_nothing_is_known_or_used_the_draw_is_a_plain_shuffle(stratify, num, test, val, seed):
    patients = [f"patient{number:04d}" for number in range(num)]
    drawn = list(patients)
    random.Random(seed).shuffle(drawn)
    num_test, num_val = round(test * num), round(val * num)
    cut = {"train": drawn[num_test + num_val :], "val": drawn[num_test : num_test + num_val], "test": drawn[:num_test]}
    expected = {group: sorted(names) for group, names in cut.items() if names}
    known = {name: {"ef": None if stratify else 20.0 + number, "quality": {}} for number, name in enumerate(patients)}
    if len(expected) > 1 and "train" in expected:
        assert splits.make_groups(SplitConfig("ratio", test, val, seed, stratify=stratify), patients, {}, known) == expected


def test_a_patients_stratum_is_the_class_of_the_ef_and_the_worst_quality():
    assert splits.stratum({"ef": 39.9, "quality": {"2CH": "Good", "4CH": "Poor"}}) == "<40/Poor"
    assert splits.stratum({"ef": 55.0, "quality": {"2CH": "Good"}}) == ">50/Good"
    assert splits.stratum({"ef": None, "quality": {}}) == splits.stratum({}) == "/"


def test_impossible_folds_are_refused():
    for changes, message in (({"folds": 1}, "split.folds"), ({"fold": 5}, "split.fold must"), ({"fold": -1}, "fold")):
        with pytest.raises(UserError, match=message):
            SplitConfig("kfold", **changes)


@pytest.fixture
def copied(shards, tmp_path) -> str:
    return shutil.copytree(shards, str(tmp_path / "shards"))


def test_shards_are_split_again_without_their_source_and_without_touching_a_part(copied, phantom):
    before = {name: os.stat(os.path.join(copied, name)).st_mtime_ns for name in os.listdir(copied) if "part" in name}
    tests = []
    for fold in range(4):
        split = SplitConfig("kfold", folds=4, fold=fold, val_share=0.2)
        preprocess.run(tiny_experiment(out=copied, split=split), replace(PLAIN, resplit=True))
        tests += open_shards(copied).groups["test"]
        assert len(open_shards(copied).groups["val"]) == 1
    assert sorted(tests) == sorted(open_shards(copied).manifest["patients"])
    preprocess.run(tiny_experiment(out=copied, split=SplitConfig("official")), replace(PLAIN, resplit=True))
    official = open_shards(copied).groups
    preprocess.run(tiny_experiment(source=phantom, out=copied, split=SplitConfig("official")), PLAIN)
    assert open_shards(copied).groups == official
    assert before == {name: os.stat(os.path.join(copied, name)).st_mtime_ns for name in before}


def test_the_manifest_keeps_what_groups_are_balanced_by_and_a_split_from_before_there_were_folds_is_the_same(copied, phantom):
    for name, record in open_shards(copied).manifest["patients"].items():
        info = patient_info(int(name.removeprefix("patient")))
        assert record["ef"] == info.ef and record["quality"] == {"2CH": info.quality, "4CH": info.quality}
    path = os.path.join(copied, writer.SPLITS)
    written = filesystem.read_json(path)
    for name in ("folds", "fold", "stratify"):
        del written["config"][name]
    filesystem.publish_json(path, written)
    preprocess.run(tiny_experiment(source=phantom, out=copied), PLAIN)


def test_a_pipeline_keeps_every_grid_kind_of_frames_and_fold_in_a_folder_of_its_own():
    kinds = [SplitConfig("official"), *(SplitConfig("kfold", folds=3, fold=fold) for fold in range(3))]
    asked = itertools.product(kinds, (32, 64), ("stills", "sequence"))
    folders = [shards_name(tiny_experiment(split=kind, image=ImageConfig(side, 64)), frames) for kind, side, frames in asked]
    assert len(set(folders)) == 16 and "shards-64x64-official" in folders and "shards-64x64-kfold-1of3" in folders
