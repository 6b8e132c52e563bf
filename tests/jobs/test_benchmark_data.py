"""The tables of preprocessing measure two sides that do the same to the same images, and name a mistake."""

import os

import numpy as np
import pytest

from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.shards import reader
from heartseg.storage import filesystem
from jobs import benchmark
from jobs.benchmarks import data


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


def test_plain_is_a_table_of_two_sides(phantom, capsys, monkeypatch):
    monkeypatch.setattr(data, "FLOAT_PATIENTS", (1,))
    (plain,) = data.run(data.Options(source=phantom, sections="plain", patients=1, repeats=1))
    assert len(plain.rows) == 2 and all(row.value > 0 and row.baseline > 0 for row in plain.rows)
    printed = capsys.readouterr().out
    assert "the source, 4 images" in printed and "baseline" in printed and "torch 2" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "{tree}", "--sections", "plain,bogus"], "no section 'bogus': use some of plain, workers"),
        ([], "--source is missing"),
    ],
)
def test_a_mistake_names_the_thing(arguments, message, phantom):
    with pytest.raises(UserError, match=message):
        benchmark.job(["data", *(argument.format(tree=phantom) for argument in arguments)])
