"""The pipeline and its numbers on real echocardiograms, and the wheel."""

import multiprocessing
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from heartseg.config.experiment import SplitConfig, canonical
from heartseg.config.recipes import seed
from heartseg.datasets import splits
from heartseg.shards.reader import open_shards
from heartseg.storage import filesystem
from heartseg.training import run_directory
from helpers.experiments import ROOT, tiny_experiment
from helpers.job_process import wait_for
from jobs import preprocess
from jobs.benchmarks import data, scores
from jobs.benchmarks.two_sides import peak_memory_gb

SEED_GROUPS = "ad5f11a49a894929157d04ab329be1f12d43955057655ca47d9b3b1a864ec4a4"  # SHA-256 of the seed's groups of the 450


@pytest.fixture()
def few(camus, tmp_path_factory) -> str:
    """A CAMUS tree of 120 real patients to train and 20 to validate, linked and not copied."""
    tree = tmp_path_factory.mktemp("few")
    for folder in ("database_nifti", "database_split"):
        (tree / folder).mkdir()
    for group, count in (("training", 120), ("validation", 20)):
        file = Path("database_split", f"subgroup_{group}.txt")
        names = Path(camus, file).read_text().split()[:count]
        (tree / file).write_text("\n".join(names))
        for name in names:
            (tree / "database_nifti" / name).symlink_to(Path(camus, "database_nifti", name))
    return str(tree)


@pytest.mark.real_data
def test_every_real_patient_becomes_a_row_an_image_in_the_official_groups(camus, tmp_path):
    experiment = tiny_experiment(source=camus, out=str(tmp_path))
    options = preprocess.Options(launcher="plain", dataset="camus")
    preprocess.run(replace(experiment, split=SplitConfig("official")), options)
    shards = open_shards(str(tmp_path))
    assert {group: len(names) for group, names in shards.groups.items()} == {"train": 400, "val": 50}
    assert shards.manifest["rows"] == 1800 and shards.manifest["quarantined"] == []
    assert shards.manifest["dataset"] == "CAMUS"


@pytest.mark.real_data
@pytest.mark.timeout(900)
def test_a_pipeline_killed_in_training_learns_real_hearts_and_does_nothing_twice(few, tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "quick", "--source", few, "--out", str(tmp_path / "out")]
    command += ["--dataset", "camus", "--workers", "2", "--train.epochs", "3", "--image.height", "64", "--image.width", "64"]
    command += ["--checkpoint-seconds", "0"]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: any((tmp_path / "out" / "runs").glob("*/checkpoints/epoch_0001/checkpoint.json")), killed, seconds=300)
    killed.kill()
    killed.communicate()
    reports = []
    for _ in range(2):  # the second time nothing is left to do
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        reports.append(done.stdout.splitlines()[-1])
    report, again = reports
    assert report == again
    assert os.path.getsize(report) > 100_000
    summary = filesystem.read_json(os.path.join(os.path.dirname(report), "summary.json"))
    assert summary["images"] == 80 and summary["patients"] == 20
    assert summary["scores"]["dice"]["mean"] > 0.5
    run = os.path.dirname(os.path.dirname(report))
    assert [row["epoch"] for row in run_directory.read_record(run)] == [1, 2, 3]
    stages = filesystem.read_json(str(tmp_path / "out" / "pipeline.json"))["stages"]
    ends = {name: [attempt["state"] for attempt in stage["attempts"]] for name, stage in stages.items()}
    assert ends == {"preprocess": ["done"], "train": ["killed", "done"], "evaluate": ["done"]}


@pytest.mark.real_data
def test_distances_on_real_hearts_are_monais(camus):
    _, difference = scores.run(scores.Options(source=camus, images=20, repeats=1))
    assert difference < 1e-4


@pytest.mark.real_data
@pytest.mark.timeout(600)
def test_the_experts_masks_scored_against_themselves_are_perfect(camus, tmp_path):
    truth = ["--predictions", os.path.join(camus, "database_nifti"), "--truth", camus, "--launcher", "plain"]
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *truth, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = filesystem.read_json(str(tmp_path / "summary.json"))
    assert summary["images"] == 1800 and summary["patients"] == 450
    means = {name: values["mean"] for name, values in summary["scores"].items()}
    assert {name for name, mean in means.items() if mean != (0 if name.endswith("_mm") else 1)} == set()
    assert {"dice", "iou", "accuracy", "hd_endo_mm", "masd_epi_mm"} <= set(means)
    agreement = summary["clinical"]["agreement"]
    assert {"ef_camus", "ef_ase", "edv_ml_camus"} <= set(agreement)
    assert [name for name, both in agreement.items() if (both["n"], both["bias"], both["mae"]) != (450, 0, 0)] == []


@pytest.mark.real_data
def test_a_workers_memory_does_not_grow_with_the_patients(camus, tmp_path):
    peaks, names = [], data.camus.find_patients(camus)
    for count in (50, 450):
        os.makedirs(tmp_path / str(count))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(data.ours, (camus, names[:count], str(tmp_path / str(count))))
            peaks.append(pool.apply(peak_memory_gb))
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.real_data
def test_the_seed_recipes_split_of_the_real_patients_never_changes(camus):
    names = data.camus.find_patients(camus)
    groups = splits.make_groups(seed().split, names, {}, {name: {"ef": None, "quality": {}} for name in names})
    assert filesystem.sha256(canonical(groups)) == SEED_GROUPS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_holds_only_the_library_and_its_template(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True, timeout=500)
    (wheel,) = tmp_path.glob("heartseg-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "heartseg/reporting/templates/report.html" in names and "heartseg/training/engine.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"heartseg"}
