"""The data tables measure two sides that do the same to the same images, and name a mistake."""

import os

import numpy as np
import pytest
import torch

from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.shards import reader
from heartseg.storage import filesystem
from jobs import benchmark
from jobs.benchmarks import data
from jobs.benchmarks.train_sides import link_patients


@pytest.fixture(autouse=True)
def threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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


def test_plain_and_memory_are_tables_of_two_sides(phantom, capsys):
    options = data.Options(source=phantom, sections=("plain", "memory"), patients=2, repeats=1, few=2, many=8)
    plain, memory = data.run(options)
    assert all(row.value > 0 and row.baseline > 0 for row in (*plain.rows, *memory.rows))
    printed = capsys.readouterr().out
    assert "the source, 8 images" in printed and "2 patients  8 patients" in printed and printed.count("torch 2") == 2


def test_patients_of_other_names_have_the_same_images(phantom, tmp_path):
    tree = link_patients(phantom, str(tmp_path), 9)
    names = camus.find_patients(tree)
    assert len(names) == 9
    first, second, again = (camus.read_still(tree, name, *next(camus.stills_of())) for name in (*names[:2], names[8]))
    assert np.array_equal(first.image, again.image) and not np.array_equal(first.image, second.image)


@pytest.mark.slow
def test_the_loader_section_needs_no_source_and_compares_memory_with_a_stream(capsys):
    benchmark.job(["data", "--sections", "loader", "--rows", "24", "--pairs", "1", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert "from memory  streamed" in printed and "one on a resident batch" in printed and "with 10 times the images" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "bogus"], "no section 'bogus': take some of plain, workers, memory, loader"),
        ([], "--source is missing"),
        (["--source", "{tree}", "--sections", "memory"], "has 8 patients: lower --few and --many"),
    ],
)
def test_a_mistake_names_the_thing(arguments, message, phantom):
    with pytest.raises(UserError, match=message):
        benchmark.job(["data", *(argument.format(tree=phantom) for argument in arguments)])
