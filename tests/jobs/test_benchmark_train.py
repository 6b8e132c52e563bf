"""The tables of jobs/benchmark.py compare like with like, and name missing packages and mistakes."""

import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.shards import reader
from heartseg.storage import filesystem
from jobs import benchmark
from jobs.benchmarks import data, predict, scores, train
from jobs.benchmarks.train import Bench, Options

TINY = Options(backbone="mobilenet_v3_large", size=64, batch=4, steps=1, pairs=1, ray_size=64, ray_patients=20)


@pytest.fixture(scope="module")
def bench(phantom, tmp_path_factory) -> Bench:
    return Bench(replace(TINY, source=phantom), str(tmp_path_factory.mktemp("bench")), torch.device("cpu"))


def test_the_baseline_reads_the_images_of_the_shards_in_their_order(bench, phantom):
    frames = train.write_shards(bench.experiment(), phantom, f"{bench.folder}/shards")
    stills = train.Stills(phantom, frames, 64)
    assert len(stills) == len(frames) == 24
    for index in (0, 7, 23):
        image, mask = stills[index]
        torch.testing.assert_close(image, frames.images[index] / 255, rtol=0, atol=0.51 / 255)
        assert torch.equal(mask, frames.masks[index].long())


def test_both_sides_train_on_the_same_images_from_the_same_weights(bench):
    table = train.measure_plain(bench)
    steps = [row for row in table.rows if row.name.startswith("loss of step")]
    assert len(steps) == 2 and steps[0].value != steps[1].value
    for step in steps:
        # bf16 against fp32; other weights or another order differ by tenths.
        assert step.value == pytest.approx(step.baseline, rel=0.03)


@pytest.mark.slow
def test_sections_are_printed_and_those_that_lack_a_package_are_left_out(monkeypatch, capsys):
    sections = "peak,convolutions,metrics,gpus,ray"
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(train, "MATRIX_SIZES", (64, 128))
    tables = train.run(replace(TINY, sections=sections, batch=2))
    printed = capsys.readouterr().out
    assert "ray left out: the package ray is not installed" in printed
    assert [table.title.split(":")[0] for table in tables] == sections.split(",")[:-1]
    assert all(row.name in printed and row.value > 0 for table in tables for row in table.rows)


def test_the_baseline_and_ours_make_the_same_masks_and_nearly_the_same_images(phantom, tmp_path):
    patients = camus.find_patients(phantom)[:2]
    for way in (data.baseline, data.ours):
        os.makedirs(tmp_path / way.__name__)
        way(phantom, patients, str(tmp_path / way.__name__))
    table = filesystem.read_table((tmp_path / "ours" / "part-00000.parquet").read_bytes())
    frames = reader.as_frames(table, data.GRID)
    assert len(frames) == 8
    for image, mask, row in zip(frames.images, frames.masks, frames.table.to_pylist(), strict=True):
        name = f"{row['patient']}_{row['view']}_{row['phase']}"
        theirs = np.load(tmp_path / "baseline" / f"{name}.npy").T.astype(int)  # the baseline leaves pictures lying down
        assert np.abs(theirs - image[0].numpy()).mean() < 4
        assert (mask.numpy() == np.load(tmp_path / "baseline" / f"{name}_gt.npy").T).mean() > 0.995


def test_the_table_of_data_has_the_source_and_synthetic_patients_on_two_sides(phantom, capsys, monkeypatch):
    monkeypatch.setattr(data, "FLOAT_PATIENTS", (1,))
    table = data.run(data.Options(source=phantom, patients=1, repeats=1))
    assert len(table.rows) == 2 and all(row.value > 0 and row.baseline > 0 for row in table.rows)
    printed = capsys.readouterr().out
    assert "the source, 4 images" in printed and "baseline" in printed and "torch 2" in printed


def test_the_table_of_scores_has_both_times_the_same_distances_and_the_time_of_volumes(phantom, capsys):
    table, difference = scores.run(scores.Options(source=phantom, images=3, repeats=1))
    distances, volumes = table.rows
    assert difference < 1e-4 and distances.value > 0 and distances.baseline > 0 and volumes.value > 0
    printed = capsys.readouterr().out
    assert "MONAI" in printed and "3 images" in printed and "times as fast" in printed


def test_a_missing_monai_is_named_with_the_command_that_installs_it(phantom, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(UserError, match="pip install"):
        benchmark.job(["scores", "--source", phantom, "--images", "1"])


def test_the_table_of_predictions_measures_files_to_masks_against_forward_passes(phantom, capsys):
    table = predict.run(predict.Options(source=phantom, images=2, side=64, repeats=1))
    assert all(row.value > 0 and row.baseline > 0 for row in table.rows)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("forward passes", "files to masks  "))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --sections plain,bogus", "'bogus' is not a section"),
        ("train --steps 0", "--steps"),
        ("train --batch 1", "--batch"),
        ("data", "--source is missing"),
        ("scores --source /no/such/folder", "/no/such/folder does not exist"),
        ("scores --source /no/such/folder --images 0", "--images .0. and --repeats .5. must be at least 1"),
        ("scores --bogus 1", "--bogus"),
        ("bogus", "'bogus' is not a benchmark"),
    ],
)
def test_a_mistake_is_named_before_anything_is_measured(line, message):
    with pytest.raises(UserError, match=message):
        benchmark.job(line.split())


@pytest.mark.slow
def test_an_epoch_under_ray_is_compared_with_one_in_a_plain_process():
    (table,) = train.run(replace(TINY, sections="ray"))
    assert [row.name for row in table.rows] == ["an epoch", "from the command to the first step"]
    assert all(row.value > 0 and row.baseline > 0 for row in table.rows)
