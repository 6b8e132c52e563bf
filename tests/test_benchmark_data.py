"""The data table measures both sides on the same images, and says what is wrong with what it is asked."""

import os

import numpy as np
import pytest

from heartseg import camus, shards
from heartseg.errors import UserError
from jobs import benchmark
from jobs.benchmarks import data


def test_the_plain_way_and_ours_make_the_same_masks_and_nearly_the_same_images(phantom, tmp_path):
    patients = camus.find_patients(phantom)[:2]
    for name, way in (("plain", data.plain_way), ("ours", data.our_way)):
        os.makedirs(tmp_path / name)
        way(phantom, patients, str(tmp_path / name))
    with open(tmp_path / "ours" / "part-00000.parquet", "rb") as stream:
        frames = shards.as_frames(shards.storage.read_table(stream.read()), data.GRID)
    assert len(frames) == 8
    for image, mask, row in zip(frames.images, frames.masks, frames.table.to_pylist(), strict=True):
        name = f"{row['patient']}_{row['view']}_{row['phase']}"
        theirs = np.load(tmp_path / "plain" / f"{name}.npy").T.astype(int)  # the plain way leaves pictures lying down
        assert np.abs(theirs - image[0].numpy()).mean() < 4
        assert (mask.numpy() == np.load(tmp_path / "plain" / f"{name}_gt.npy").T).mean() > 0.995


def test_a_row_of_the_table_counts_every_image_and_the_ratio_is_of_its_rates(phantom, tmp_path):
    text = data.plain_row(phantom, camus.find_patients(phantom)[:2], str(tmp_path), repeats=1)
    images, plain, ours, ratio = text[34:].split()[:4]
    assert images == "8" and float(ratio.rstrip("x")) == pytest.approx(float(ours) / float(plain), rel=0.1, abs=0.06)


def test_memory_is_of_a_process_of_its_own_and_printed_in_a_table(phantom, capsys):
    benchmark.job(["data", "--source", phantom, "--sections", "memory", "--few", "2", "--many", "8"])
    said = capsys.readouterr().out
    assert "2 patients" in said and "8 against 2 patients" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sections", "bogus"], "no section 'bogus': take some of plain, workers, memory"),
        ([], "--source is missing"),
        (["--source", "{tree}", "--sections", "memory"], "has 8 patients: lower --few and --many"),
    ],
)
def test_a_mistake_is_a_sentence(arguments, said, phantom):
    with pytest.raises(UserError) as caught:
        benchmark.job(["data", *(argument.format(tree=phantom) for argument in arguments)])
    assert said in str(caught.value)
