"""The training table: it compares like with like, names what it lacks, and writes what it prints."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from heartseg.errors import UserError
from heartseg.shards.reader import load_groups, open_shards
from helpers.experiments import tiny_experiment
from jobs.benchmarks import train, train_launch, train_plain, train_steps
from jobs.benchmarks.train_bench import Bench, Options, loader_batches

TINY = Options(backbone="mobilenet_v3_large", size=64, batch=4, steps=1, curve_steps=3, curve_size=64, pairs=1, threads=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(phantom, tmp_path_factory) -> Bench:
    return Bench(replace(TINY, source=phantom), str(tmp_path_factory.mktemp("bench")), CPU)


def test_the_plain_way_reads_the_images_of_the_shards_in_their_order(bench):
    experiment = bench.experiment()
    frames = bench.frames(experiment)
    stills = train_plain.Stills(bench.source, frames, 64)
    assert len(stills) == len(frames) == 24
    for index in (0, 7, 23):
        image, mask = stills[index]
        torch.testing.assert_close(image, frames.images[index] / 255, rtol=0, atol=0.51 / 255)
        assert torch.equal(mask, frames.masks[index].long())


def test_both_ways_train_on_the_same_images_from_the_same_weights(bench):
    rows = train_plain.curves(bench)
    assert len(rows) == 4
    assert rows[0]["value"][0] != rows[2]["value"][0]
    for entry in rows[:-1]:
        # bf16 against fp32; other weights or another order differ by tenths.
        assert entry["value"][0] == pytest.approx(entry["value"][1], rel=0.03)


def test_batches_go_on_into_the_next_epoch(bench):
    experiment = bench.experiment()
    batches = loader_batches(experiment, bench.frames(experiment), CPU)
    seen = [next(batches)[0] for _ in range(7)]
    assert all(images.shape == (4, 1, 64, 64) for images in seen) and not torch.equal(seen[0], seen[6])


def test_the_table_is_printed_and_written_and_says_what_is_left_out(phantom, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jobs.benchmarks.train_launch", None)  # as where a package of it is missing
    out = str(tmp_path / "table.json")
    threads = torch.get_num_threads()
    try:
        found = train.run(replace(TINY, source=phantom, sections="plain,convolutions,metrics,loader,peak,ray,gpu", out=out))
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "this machine has no GPU" in printed or torch.cuda.is_available()
    assert "left out: the package jobs.benchmarks.train_launch" in printed
    with open(out) as file:
        written = json.load(file)
    assert written["rows"] == found and written["options"]["batch"] == 4 and "torch" in written["machine"]
    assert {entry["section"] for entry in found} == {"plain", "convolutions", "metrics", "loader", "peak"}
    assert all(entry["name"] in printed for entry in found)
    assert all(
        value > 0 for entry in found if not isinstance(value := entry["value"], list) and "difference" not in entry["name"]
    )


def test_operations_are_counted_forward_and_backward(tmp_path):
    base, bench = tiny_experiment(), Bench(TINY, str(tmp_path), torch.device("cpu"))
    smaller, larger = (
        train_steps.flop_per_image(bench, replace(base, image=replace(base.image, height=side, width=side)))
        for side in (64, 128)
    )
    # Convolutions grow with the area; the pooled branch does not.
    assert larger / smaller == pytest.approx(4, rel=0.01) and smaller > 1e8


def test_a_side_that_stops_is_told_and_not_waited_for(tmp_path):
    class Failed:
        exitcode = 1

    with pytest.raises(UserError, match="stopped before done-ray-1"):
        train_launch.wait_for(str(tmp_path / "done-ray-1"), (Failed(),))


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"sections": "plain,bogus"}, "no section 'bogus'"), ({"steps": 0}, "--steps"), ({"batch": 1}, "--batch")],
)
def test_a_mistake_is_told_before_anything_is_measured(setting, said):
    with pytest.raises(UserError, match=said):
        train.run(replace(TINY, **setting))


@pytest.mark.slow
def test_ray_and_workers_are_measured(tmp_path):
    found = train.run(replace(TINY, sections="ray,workers", threads=0))
    assert {entry["section"] for entry in found} == {"ray", "workers"}


def test_shards_of_the_first_patients_are_enough(bench):
    shards = open_shards(bench.shards(bench.experiment()))
    assert len(load_groups(shards, ["train"])["train"]) == 24
