"""The training tables compare like with like, name what they lack, and write what they print."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from heartseg.errors import UserError
from helpers.experiments import ROOT, tiny_experiment
from jobs.benchmarks import train, train_sides
from jobs.benchmarks.train_sides import Bench, Options

TINY = Options(backbone="mobilenet_v3_large", size=64, batch=4, steps=1, curve_steps=3, curve_size=64, pairs=1, threads=1)


@pytest.fixture(scope="module")
def bench(phantom, tmp_path_factory) -> Bench:
    return Bench(replace(TINY, source=phantom), str(tmp_path_factory.mktemp("bench")), torch.device("cpu"))


def test_the_baseline_reads_the_images_of_the_shards_in_their_order(bench):
    frames = bench.frames(bench.experiment())
    stills = train_sides.Stills(bench.source, frames, 64)
    assert len(stills) == len(frames) == 24
    for index in (0, 7, 23):
        image, mask = stills[index]
        torch.testing.assert_close(image, frames.images[index] / 255, rtol=0, atol=0.51 / 255)
        assert torch.equal(mask, frames.masks[index].long())


def test_both_sides_train_on_the_same_images_from_the_same_weights(bench):
    *steps, _ = train.loss_curves(bench).rows
    assert len(steps) == 3 and steps[0].value != steps[2].value
    for step in steps:
        # bf16 against fp32; other weights or another order differ by tenths.
        assert step.value == pytest.approx(step.baseline, rel=0.03)


def test_the_tables_are_printed_and_written_and_name_what_is_left_out(phantom, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    out = str(tmp_path / "table.json")
    threads = torch.get_num_threads()
    try:
        found = train.run(replace(TINY, source=phantom, sections="plain,convolutions,metrics,ray,gpu", out=out))
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "this machine has no GPU" in printed or torch.cuda.is_available()
    assert "ray left out: the package ray is not installed" in printed
    with open(out) as file:
        written = json.load(file)
    assert written["rows"] == found and written["options"]["batch"] == 4 and "torch" in written["machine"]
    assert {"plain", "convolutions", "metrics"} <= {row["section"] for row in found}
    assert all(row["name"] in printed and row["value"] > 0 for row in found)


def test_a_gpu_machine_needs_neither_ray_nor_wandb_nor_tyro():
    lines = [
        "import sys",
        "sys.modules |= dict.fromkeys(('ray', 'wandb', 'tyro', 'matplotlib', 'skimage', 'monai'))",
        "from jobs.benchmarks.train import Options, run",
        "run(Options(sections='gpu,peak', backbone='mobilenet_v3_large', size=64, batch=2, steps=1))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "matrix product, bfloat16" in done.stdout, done.stderr[-2000:]


def test_operations_are_counted_forward_and_backward(bench):
    smaller, larger = (
        train.flop_per_image(bench, replace(tiny_experiment(), image=train.ImageConfig(side, side))) for side in (64, 128)
    )
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
    found = train.run(replace(TINY, sections="ray", threads=0))
    assert [row["name"] for row in found] == ["an epoch", "from the command to the first step"]
    assert all(row["value"] > 0 and row["baseline"] > 0 for row in found)
