"""A comparison's promises: exactly the differences, tests on the same patients only, pooled seeds, a self-contained page."""

import contextlib
import io
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from heartseg.config.experiment import identity, to_json
from heartseg.errors import UserError
from heartseg.evaluation import run_comparison, scoring
from heartseg.evaluation.run_comparison import Scored, group_by_settings
from heartseg.labels import PHASES, VIEWS
from heartseg.metrics.agreement import bootstrap_interval
from heartseg.metrics.segmentation import DISTANCES, SCORES
from heartseg.models import checkpoint
from heartseg.models.deeplabv3 import build_model
from heartseg.reporting import comparison_page, plots
from heartseg.shards.reader import open_shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from heartseg.training.run_directory import Run
from helpers.experiments import tiny_experiment
from helpers.pages import Reader, look_at, outside_links
from jobs import compare, evaluate, preprocess, train

PLAIN = {"launcher": "plain", "group": "train"}  # the six patients to train on: two are too few for a test


def changed(seed: int = 0, lr: float = 0.02, **changes):
    base = tiny_experiment(**changes)
    return replace(base, train=replace(base.train, seed=seed, epochs=1), optim=replace(base.optim, lr=lr))


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> dict[str, str]:
    """The folders of two runs as an epoch of training leaves them, with weights drawn at random."""
    folder, paths = str(tmp_path_factory.mktemp("runs")), {}
    for name, lr in (("first", 0.02), ("faster", 0.1)):
        experiment = changed(lr=lr, data=shards, runs=folder)
        paths[name] = run_directory.open_run(experiment, open_shards(shards)).path
        row = {"epoch": 1, "test/dice": lr, "train/loss": 1.0, "lr": lr, "seconds": 1.0}
        torch.manual_seed(int(1000 * lr))
        card = {"epoch": 1, "experiment": to_json(experiment), "intensity": [0.2, 0.2], "metrics": row}
        checkpoint.save(paths[name], build_model(experiment.model).state_dict(), {}, card)
        run_directory.write_record(paths[name], [row])
    return paths


@pytest.fixture(scope="module")
def compared(trained, tmp_path_factory) -> tuple[str, str]:
    """The path of their page, and what the terminal showed."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        page = compare.run(compare.Options(runs=tuple(trained.values()), out=str(tmp_path_factory.mktemp("out")), **PLAIN))
    return page, shown.getvalue()


def make_scored(label: str, seed: int = 0, lr: float = 0.02) -> Scored:
    """A run and its evaluation with scores drawn at random, on the same truth as any other one's."""
    experiment, rng, truth = changed(seed, lr), np.random.default_rng([seed, int(1000 * lr)]), np.random.default_rng(0)
    names = [f"patient{number:04d}" for number in range(1, 7)]
    images = [
        {"patient": name, "view": str(view), "phase": str(phase), "frame": None}
        | {score: rng.uniform(0.5, 1) for score in (*SCORES, *DISTANCES)}
        for name in names for view in VIEWS for phase in PHASES
    ]  # fmt: skip
    patients = pandas.DataFrame({"patient": names, "wall_area_cm2_2CH_ED_truth": truth.uniform(9, 12, 6)})
    for convention in ("camus", "ase"):
        patients[f"ef_{convention}_truth"] = truth.uniform(30, 70, 6)
        patients[f"ef_{convention}_prediction"] = patients[f"ef_{convention}_truth"] + rng.normal(size=6)
    patients.loc[0, "ef_ase_prediction"] = np.nan
    description = {"experiment": to_json(experiment), "identity": identity(experiment)}
    description |= {"data_fingerprint": "f" * 64, "dataset": "phantom"}
    record = [{"epoch": 1, "test/dice": rng.uniform(), "train/loss": 1.0, "lr": lr}]
    summary = {"dataset": "phantom", "group": "train", "patients": 6, "images": 24, "which": "last", "epoch": 1}
    return Scored(Run(f"/runs/{label}", description), label, record, pandas.DataFrame(images), patients, summary)


@pytest.fixture()
def scored() -> dict[str, Scored]:
    return {"seed0": make_scored("a"), "seed1": make_scored("b", seed=1), "faster": make_scored("c", lr=0.1)}


@pytest.fixture()
def copied(trained, tmp_path) -> dict[str, Path]:
    return {name: Path(shutil.copytree(path, tmp_path / "runs" / Path(path).name)) for name, path in trained.items()}


def test_exactly_the_differing_settings_are_named_and_not_those_unknown_to_an_older_version(scored):
    entries = group_by_settings([scored["seed0"], scored["seed1"], scored["faster"]])
    assert run_comparison.differing_settings(entries) == [("optim.lr", "0.02", "0.1"), ("train.seed", "0, 1", "0")]
    old = scored["seed0"]
    experiment = old.run.description["experiment"]
    older = experiment | {"train": {name: value for name, value in experiment["train"].items() if name != "accumulate"}}
    older = replace(old, run=replace(old.run, description=old.run.description | {"experiment": older}))
    assert run_comparison.settings(older.run) == run_comparison.settings(old.run)


def test_runs_that_differ_in_their_seed_only_are_one_entry_and_the_same_seed_again_is_another(scored):
    entries = group_by_settings([scored["seed1"], scored["faster"], scored["seed0"]])
    found = [[one.label for one in entry.runs] for entry in entries]
    assert found == [[scored["seed0"].label, scored["seed1"].label], [scored["faster"].label]]
    again = group_by_settings([scored["seed0"], scored["seed1"], scored["seed0"]])
    assert [len(entry.runs) for entry in again] == [2, 1] and [entry.letter for entry in again] == ["A", "B"]


def test_seeds_are_averaged_image_by_image_and_their_means_are_reported(scored):
    (entry,) = group_by_settings([scored["seed0"], scored["seed1"]])
    tables = [scored[name].images.set_index(["patient", "view", "phase"])["dice"] for name in ("seed0", "seed1")]
    found = run_comparison.means(entry)["dice"]
    assert found["seeds"] == pytest.approx([table.mean() for table in tables])
    assert found["mean"] == pytest.approx(np.mean(found["seeds"])) and found["seeds"][0] != found["seeds"][1]
    both = (tables[0] + tables[1]) / 2
    interval = bootstrap_interval(both.to_numpy(), both.index.get_level_values(0).to_numpy())
    assert (found["low"], found["high"]) == pytest.approx(interval)


def test_a_difference_is_over_the_same_images_its_interval_over_patients_and_a_run_has_none_to_itself(scored):
    itself = group_by_settings([scored["seed0"], scored["seed0"]])
    assert {run_comparison.differences(*itself)[name]["reading"] for name in ("dice", "hd_la_mm")} == {"no difference seen"}
    assert run_comparison.disagreements(itself, 5) == []
    shuffled = scored["faster"].images.sample(frac=1, random_state=0)
    first, second = group_by_settings([scored["seed0"], replace(scored["faster"], images=shuffled)])
    joined = scored["seed0"].images.merge(shuffled, on=["patient", "view", "phase"], suffixes=("_a", "_b"))
    assert len(joined) == 24
    for name in ("dice", "dice_la", "masd_endo_mm"):
        found = run_comparison.differences(second, first)[name]
        by_hand = joined[f"{name}_b"] - joined[f"{name}_a"]
        assert found["difference"] == pytest.approx(by_hand.mean())
        interval = bootstrap_interval(by_hand.to_numpy(), joined["patient"].to_numpy())
        assert (found["low"], found["high"]) == pytest.approx(interval)
        assert found["patients"] == 6 and 0 < found["p"] <= 1
    error = run_comparison.differences(second, first)["ef_ase_error"]
    wrong = [abs(s.patients["ef_ase_prediction"] - s.patients["ef_ase_truth"]) for s in (scored["faster"], scored["seed0"])]
    assert error["n"] == int((wrong[0] - wrong[1]).notna().sum())
    # The images whose Dice differs most come first.
    found = run_comparison.disagreements([first, second], 24)
    assert [item["spread"] for item in found] == sorted((item["spread"] for item in found), reverse=True)
    assert found[0]["spread"] == pytest.approx((joined["dice_a"] - joined["dice_b"]).abs().max())
    assert set(found[0]["dice"]) == {"A", "B"}


def test_runs_with_empty_masks_cannot_be_compared(scored):
    untrained = [replace(one, images=one.images.assign(dice=0.01)) for one in (scored["seed0"], scored["faster"])]
    entries = group_by_settings(untrained)
    found = run_comparison.compare_entries(entries, entries[0])
    assert {test["reading"] for test in found["differences"]["B"].values()} == {"nothing to compare"}
    assert "A, B cannot be compared" in comparison_page.text(entries, found)
    cell = comparison_page.difference_cell(found["differences"]["B"], "hd_la_mm")
    assert not cell["seen"]
    one_alone = group_by_settings([untrained[0], scored["faster"]])  # a real difference
    assert run_comparison.differences(one_alone[1], one_alone[0])["dice"]["reading"] == "higher"
    assert "A cannot be compared:" in " ".join(run_comparison.notes(one_alone, one_alone[0]))


@pytest.mark.parametrize(
    ("low", "high", "p", "said"),
    [(-0.1, 0.2, 0.01, "no difference seen"), (0.0, 0.2, 0.01, "no difference seen"), (0.01, 0.2, 0.01, "higher"),
     (-0.2, -0.1, 0.01, "lower"), (0.01, 0.2, 0.06, "no difference seen"), (None, None, 0.01, "too few patients")],
)  # fmt: skip
def test_a_difference_is_reported_only_if_interval_and_p_agree(low, high, p, said):
    difference = None if low is None else (low + high) / 2
    assert run_comparison.reading({"low": low, "high": high, "difference": difference, "p": p}) == said


def without(one: Scored, patient: str) -> Scored:
    kept = {name: getattr(one, name) for name in ("images", "patients")}
    return replace(one, **{name: table[table["patient"] != patient] for name, table in kept.items()})


def test_scores_of_other_hearts_are_neither_paired_nor_pooled_and_a_note_says_so(scored):
    one, other = scored["seed0"], scored["faster"]
    fewer = without(other, other.patients["patient"][0])
    area = "wall_area_cm2_2CH_ED_truth"
    # The phantom's patients and CAMUS's have the same names; so have two phantoms'.
    camus = replace(other, summary=other.summary | {"dataset": "CAMUS"})
    redrawn = replace(other, patients=other.patients.assign(**{area: other.patients[area] * 1.01}))
    assert run_comparison.same_hearts(other, one)
    for another in (fewer, camus, redrawn):
        entries = group_by_settings([one, another])
        assert run_comparison.differences(entries[1], entries[0]) == {} and run_comparison.disagreements(entries, 5) == []
    entries = group_by_settings([one, fewer])
    (note,) = run_comparison.notes(entries, entries[0])
    assert "different hearts (5 patient names in common)" in note and "not paired" in note
    assert run_comparison.means(entries[1])["dice"]["mean"] == pytest.approx(fewer.images["dice"].mean())
    (entry,) = group_by_settings([one, without(scored["seed1"], one.patients["patient"][0])])
    assert run_comparison.means(entry)["dice"]["seeds"] == [one.images["dice"].mean()]
    assert any("so not pooled" in note for note in run_comparison.notes([entry], entry))


def test_the_page_is_one_file_without_network_with_a_text_for_every_picture(compared):
    text = Path(compared[0]).read_text()
    tags = Reader(text).tags
    assert outside_links(text) == set() and not re.search(r"https?://(?!www\.w3\.org)", text)
    names = [a["id"] for _, a in tags if "id" in a]
    assert len(names) == len(set(names))
    assert {a["href"][1:] for _, a in tags if a.get("href", "").startswith("#")} <= set(names)
    assert all(a.get("alt") for tag, a in tags if tag == "img")
    # Six images on which two entries disagree, each with both entries' outlines.
    assert sum(tag == "img" for tag, _ in tags) == 12


def test_the_page_and_the_terminal_show_the_same_and_name_no_winner(compared):
    page, shown = compared
    words, numbers = Reader(Path(page).read_text()).words, filesystem.read_json(str(Path(page).with_name("comparison.json")))
    for letter in "AB":
        mean = f"{numbers['means'][letter]['dice']['mean']:.3f}"
        assert mean in shown and mean in words
    found = numbers["differences"]["B"]["dice"]
    assert comparison_page.show_signed(found["difference"], 4) in words and found["reading"] in words
    assert numbers["settings"] == [["optim.lr", "0.02", "0.1"]]
    assert "optim.lr" in words and "optim.lr" in shown and "Synthetic hearts." in words
    assert "Research use only, not a medical device." in words
    assert not re.search(r"\b(best|winner is|wins)\b", shown)


def test_curves_are_as_long_as_each_run_and_a_run_under_way_is_named(scored):
    longer = replace(scored["seed0"], record=[*scored["seed0"].record, {"epoch": 2, "test/dice": 0.5}])
    under_way = replace(scored["faster"], record=[])
    entries = group_by_settings([longer, scored["faster"]])
    dice, *_ = comparison_page.curve_figures(entries)
    assert f"{longer.label} 0.5" in dice["alt"] and f"c {scored['faster'].record[0]['test/dice']:.4g}" in dice["alt"]
    assert "c has finished only 0 of" in " ".join(run_comparison.notes(group_by_settings([longer, under_way]), entries[0]))
    assert len({plots.run_style(place) for place in range(24)}) == 24


def test_a_run_without_evaluation_and_data_has_curves_and_settings_only(copied, tmp_path, capsys):
    for path in copied.values():
        for file in (path / "experiment.json", *path.glob("checkpoints/*/checkpoint.json")):
            file.write_text(re.sub(r'"data": "[^"]*"', '"data": "/no/such/shards"', file.read_text()))
    page = compare.run(compare.Options(runs=(str(tmp_path / "runs"),), **PLAIN))
    assert page == str(tmp_path / "runs" / "comparison" / "compare.html")
    words = Reader(Path(page).read_text()).words
    shown = ("No entry has scores.", "/no/such/shards", "Training, epoch by epoch", "optim.lr")
    assert all(text in words for text in shown)
    assert "has no scores here: /no/such/shards" in capsys.readouterr().out


def test_a_matching_evaluation_is_reused_and_one_of_other_weights_is_not(copied, compared, tmp_path, capsys):
    path = str(copied["first"])
    shutil.copytree(Path(compared[0]).parent / "evaluations" / copied["first"].name, f"{path}/evaluation-train")
    one, options = run_directory.find_run(path), compare.Options(**PLAIN)
    seen, plan = compare.assess(one, "a", options, str(tmp_path / "out"))
    assert "scoring" not in capsys.readouterr().out and not (tmp_path / "out").exists() and plan
    pandas.testing.assert_frame_equal(seen.images, scoring.read_rows(f"{path}/evaluation-train", "images.parquet"))
    # Without data it is still known by its weights and by the run's own data.
    assert compare.find_old_evaluation(one, options) == f"{path}/evaluation-train"
    assert not compare.find_old_evaluation(one, replace(options, group="test"))
    summary = filesystem.read_json(f"{path}/evaluation-train/summary.json")
    filesystem.publish_json(f"{path}/evaluation-train/summary.json", summary | {"weights_sha256": ["other"]})
    assert not compare.find_old_evaluation(one, options)
    assert not compare.find_evaluation(one, plan.described)


def test_a_sweeps_folder_stands_for_its_trials_and_two_of_one_name_get_different_labels(copied, trained, tmp_path):
    (tmp_path / "runs").rename(tmp_path / "trials")
    labels = list(compare.find_runs([str(tmp_path), trained["first"]]))
    first, faster = (Path(trained[name]).name for name in ("first", "faster"))
    assert len(set(labels)) == 3 and faster in labels
    ends = sorted(label.split("/")[-2:] for label in labels if label != faster)
    assert ends == sorted([["trials", first], [Path(trained["first"]).parent.name, first]])


def test_trials_are_trained_and_compared_without_the_test_group(trained, shards, tmp_path, capsys):
    base = changed(data=shards, runs=str(tmp_path / "trials"))
    first = train.run(replace(base, train=replace(base.train, holdout=0.34)), train.Options(launcher="plain"))
    (row,) = run_directory.read_record(first)
    assert "val/dice" in row and not any(name.startswith("test/") for name in row)
    shutil.copytree(first, tmp_path / "trials" / "again")
    page = compare.run(compare.Options(runs=(str(tmp_path),), launcher="plain"))
    said = run_directory.find_run(first).description
    assert f"scoring again: {len(said['val_patients'])} patients (holdout)" in capsys.readouterr().out
    scores = scoring.read_rows(os.path.join(os.path.dirname(page), "evaluations", "again"), "images.parquet")
    assert set(scores["patient"]) == set(said["val_patients"]) and len(said["val_patients"]) == 2
    assert not set(said["val_patients"]) & set(said["train_patients"])
    with pytest.raises(UserError, match="no patients in group holdout"):
        evaluate.run(evaluate.Options(checkpoint=trained["first"], group="holdout", launcher="plain"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "at least two runs, not 0"),
        (("{first}", "{first}"), "at least two runs, not 1"),
        (("{first}", "{empty}"), "is not a run and contains none"),
        (("{first}", "{faster}", "--reference", "bogus"), "--reference bogus matches none of the runs"),
        (("{first}", "{faster}", "--data", "{empty}/none"), "/none holds no finished shards"),
        (("{first}", "{faster}", "--truth", "{empty}/none"), "/none does not exist"),
    ],
)
def test_a_mistake_is_a_user_error_and_nothing_is_written(trained, tmp_path, given, message):
    filled = [word.format(**trained, empty=tmp_path) for word in given]
    with pytest.raises(UserError, match=message):
        compare.job([*filled, "--out", str(tmp_path / "out"), "--launcher", "plain"])
    assert not (tmp_path / "out").exists()


def test_a_group_with_patients_that_a_run_was_trained_on_is_never_scored(trained, shards, phantom, tmp_path):
    resplit = str(shutil.copytree(shards, tmp_path / "shards"))
    base = tiny_experiment(source=phantom, out=resplit)
    other = replace(base, split=replace(base.split, seed=1))
    with pytest.raises(UserError, match="split.seed: 0 there, 1 requested"):  # shards are not split again unless asked
        preprocess.run(other, preprocess.Options(launcher="plain"))
    preprocess.run(other, preprocess.Options(launcher="plain", resplit=True))
    with pytest.raises(UserError, match="was trained on . patients of this test group"):
        evaluate.run(evaluate.Options(checkpoint=trained["first"], data=resplit, launcher="plain"))
    options = compare.Options(data=resplit, launcher="plain", group="test")
    seen, plan = compare.assess(run_directory.find_run(trained["first"]), "a", options, str(tmp_path / "out"))
    assert plan is None and seen.images is None and "was trained on" in seen.problem


def test_scores_of_the_patients_that_a_model_was_trained_on_are_printed_with_that_remark(trained, tmp_path, capsys):
    for group, count in (("train", 1), ("test", 0)):
        options = evaluate.Options(checkpoint=trained["first"], group=group, launcher="plain", out=str(tmp_path / group))
        evaluate.run(options)
        assert capsys.readouterr().out.count("was trained on these patients") == count


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look with")
@pytest.mark.parametrize("width", [420, 1280])
def test_a_browser_shows_the_page_in_light_and_in_dark(compared, tmp_path, width):
    look_at(compared[0], tmp_path, width)
