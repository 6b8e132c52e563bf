"""The main job on real echocardiograms, and the wheel: what takes minutes."""

import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

from heartseg import runs, splits, storage
from heartseg.config import canonical
from heartseg.recipes import seed
from heartseg.shards import open_shards
from jobs.benchmarks import data, scores

SEED_GROUPS = "ad5f11a49a894929157d04ab329be1f12d43955057655ca47d9b3b1a864ec4a4"  # SHA-256 of the seed's groups of the 450
CAMUS = os.environ.get("HEARTSEG_CAMUS", str(ROOT.parent / "shared" / "camus"))


@pytest.fixture(scope="module")
def camus() -> str:
    """The folder of the real patients; where it must be there (HEARTSEG_NO_SKIPS), its absence is a failure."""
    if not os.path.isdir(CAMUS):
        (pytest.fail if os.environ.get("HEARTSEG_NO_SKIPS") else pytest.skip)(f"no CAMUS at {CAMUS}: set HEARTSEG_CAMUS")
    return CAMUS


@pytest.mark.real_data
@pytest.mark.timeout(1500)
def test_two_epochs_on_real_hearts_learn_and_the_same_command_finds_all_done(camus, tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "quick", "--source", camus, "--out", str(tmp_path)]
    command += ["--workers", "2", "--train.epochs", "2"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    report = first.stdout.splitlines()[-1]
    assert os.path.getsize(report) > 100_000
    shards = open_shards(str(tmp_path / "shards-128x128-official"))
    assert {group: len(names) for group, names in shards.groups.items()} == {"train": 400, "val": 50}
    assert shards.manifest["rows"] == 1800 and shards.manifest["quarantined"] == []
    assert shards.manifest["dataset"] == "CAMUS"
    summary = storage.read_json(os.path.join(os.path.dirname(report), "summary.json"))
    assert summary["images"] == 200 and summary["patients"] == 50
    # Sixteen epochs reach .889 and two of them .837 in that longer schedule; a broken eye sees nothing at all.
    assert summary["scores"]["dice"]["mean"] > 0.70
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == report
    assert len(runs.read_record(os.path.dirname(os.path.dirname(report)))) == 2


@pytest.mark.real_data
def test_distances_on_real_hearts_are_monais(camus):
    (row,) = scores.run(scores.Options(source=camus, images=20, repeats=1))
    assert row.items == 20 and row.difference < 1e-4


@pytest.mark.real_data
def test_a_workers_memory_does_not_grow_with_the_patients(camus):
    few, many = (float(line.split()[3]) for line in data.memory_section(data.Options(source=camus))[1:3])
    assert many < 1.1 * few


@pytest.mark.real_data
def test_the_seeds_draw_of_real_patients_stays_what_it_was(camus):
    names = data.camus.find_patients(camus)
    groups = splits.make_groups(seed().split, names, {}, {name: {"ef": None, "quality": {}} for name in names})
    assert storage.sha256(canonical(groups)) == SEED_GROUPS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_holds_the_library_with_its_template_and_nothing_else(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True, timeout=500)
    (wheel,) = tmp_path.glob("heartseg-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "heartseg/templates/report.html" in names and "heartseg/engine.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"heartseg"}
