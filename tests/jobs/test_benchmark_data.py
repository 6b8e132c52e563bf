"""The data table measures both sides on the same images, and says what is wrong with what it is asked."""

import os

import numpy as np
import pytest
import torch

from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.shards import reader, writer
from heartseg.storage import filesystem
from heartseg.training import data_loading
from jobs import benchmark
from jobs.benchmarks import data, data_loader


def test_the_plain_way_and_ours_make_the_same_masks_and_nearly_the_same_images(phantom, tmp_path):
    patients = camus.find_patients(phantom)[:2]
    for name, way in (("plain", data.plain_way), ("ours", data.our_way)):
        os.makedirs(tmp_path / name)
        way(phantom, patients, str(tmp_path / name))
    with open(tmp_path / "ours" / "part-00000.parquet", "rb") as stream:
        frames = reader.as_frames(filesystem.read_table(stream.read()), data.GRID)
    assert len(frames) == 8
    for image, mask, row in zip(frames.images, frames.masks, frames.table.to_pylist(), strict=True):
        name = f"{row['patient']}_{row['view']}_{row['phase']}"
        theirs = np.load(tmp_path / "plain" / f"{name}.npy").T.astype(int)  # the plain way leaves pictures lying down
        assert np.abs(theirs - image[0].numpy()).mean() < 4
        assert (mask.numpy() == np.load(tmp_path / "plain" / f"{name}_gt.npy").T).mean() > 0.995


def test_a_row_of_the_table_counts_every_image_and_the_ratio_is_of_its_rates(phantom, tmp_path):
    text = data.plain_row(phantom, camus.find_patients(phantom)[:2], str(tmp_path), repeats=1)
    images, plain, ours, ratio, zlib, of_zlib, isal, of_isal, wall = text[34:].split()
    for rate, share in ((zlib, of_zlib), (isal, of_isal)):
        assert float(share.rstrip("%")) == pytest.approx(100 * float(ours) / float(rate), rel=0.1, abs=0.6)
    assert (
        wall.endswith("x")
        and images == "8"
        and float(ratio.rstrip("x")) == pytest.approx(float(ours) / float(plain), rel=0.1, abs=0.06)
    )


def test_memory_is_of_a_process_of_its_own_and_printed_in_a_table(phantom, capsys):
    benchmark.job(["data", "--source", phantom, "--sections", "memory", "--few", "2", "--many", "8"])
    said = capsys.readouterr().out
    assert "2 patients" in said and "8 against 2 patients" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sections", "bogus"], "no section 'bogus': take some of plain, workers, memory, loader"),
        ([], "--source is missing"),
        (["--source", "{tree}", "--sections", "memory"], "has 8 patients: lower --few and --many"),
    ],
)
def test_a_mistake_is_a_sentence(arguments, said, phantom):
    with pytest.raises(UserError) as caught:
        benchmark.job(["data", *(argument.format(tree=phantom) for argument in arguments)])
    assert said in str(caught.value)


def test_grown_shards_are_the_same_images_of_other_patients(phantom, tmp_path):
    names = camus.find_patients(phantom)[:2]
    base = writer.write_part(camus.CamusTree(phantom), str(tmp_path / "base"), "part-00000.parquet", names, data_loader.GRID)
    opened = reader.open_shards(data_loader.grow(base | {"path": str(tmp_path / "base")}, str(tmp_path / "grown"), 20))
    assert opened.num_rows("train") == 24 and len(opened.groups["train"]) == 6
    streamed = data_loading.open_groups(opened, "stream", data_loader.ALONE).loaders["train"]
    batches = list(streamed.evaluation_batches(8))
    assert len(batches) == 3 and all(torch.equal(images, batches[0][0]) for images, _ in batches)
    assert data_loader.paced(iter(batches)) >= 3 * data_loader.STEP_S


@pytest.mark.slow
def test_the_loader_section_needs_no_source_and_prints_what_it_measures(capsys):
    benchmark.job(["data", "--sections", "loader", "--rows", "24", "--pairs", "1", "--repeats", "1"])
    said = capsys.readouterr().out
    assert "24 images of 256 x 256" in said and "streamed epoch / epoch from memory" in said and "10 times the data" in said
