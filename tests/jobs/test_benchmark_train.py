"""The training tables compare like with like, and name what they lack."""

import sys
from dataclasses import replace

import pytest
import torch

from heartseg.config.experiment import ImageConfig
from heartseg.errors import UserError
from helpers.experiments import tiny_experiment
from jobs.benchmarks import train
from jobs.benchmarks.train import Bench, Options

TINY = Options(backbone="mobilenet_v3_large", size=64, batch=4, steps=1, pairs=1, ray_size=64)


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
    (table,) = train.measure_plain(bench)
    steps = [row for row in table.rows if row.name.startswith("loss of step")]
    assert len(steps) == 2 and steps[0].value != steps[1].value
    for step in steps:
        # bf16 against fp32; other weights or another order differ by tenths.
        assert step.value == pytest.approx(step.baseline, rel=0.03)


@pytest.mark.parametrize("sections", ["peak,ray", pytest.param("convolutions,metrics,ray", marks=pytest.mark.slow)])
def test_sections_are_printed_and_what_lacks_a_package_is_left_out(sections, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(train, "MATRIX_SIZES", (64, 128))
    tables = train.run(replace(TINY, sections=sections, batch=2))
    printed = capsys.readouterr().out
    assert "ray left out: the package ray is not installed" in printed
    assert [table.title.split(":")[0] for table in tables] == sections.split(",")[:-1]
    assert all(row.name in printed and row.value > 0 for table in tables for row in table.rows)


def test_operations_are_counted_forward_and_backward(bench):
    smaller, larger = (train.flop_per_image(bench, tiny_experiment(image=ImageConfig(side, side))) for side in (64, 128))
    # Convolutions grow with the area; the pooled branch does not.
    assert larger / smaller == pytest.approx(4, rel=0.01) and smaller > 1e8


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"sections": "plain,bogus"}, "no section 'bogus'"), ({"steps": 0}, "--steps"), ({"batch": 1}, "--batch")],
)
def test_a_mistake_is_named_before_anything_is_measured(setting, message):
    with pytest.raises(UserError, match=message):
        train.run(replace(TINY, **setting))


@pytest.mark.slow
def test_an_epoch_under_ray_is_compared_with_one_in_a_plain_process():
    (table,) = train.run(replace(TINY, sections="ray"))
    assert [row.name for row in table.rows] == ["an epoch", "from the command to the first step"]
    assert all(row.value > 0 and row.baseline > 0 for row in table.rows)
