"""What a user sees of a mistake: a one-line message, exit code 2, and no cluster."""

import io
import json
import os
import subprocess
import sys

import pytest

from heartseg.config.experiment import to_json
from heartseg.config.recipes import camus
from heartseg.errors import UserError
from helpers.experiments import ROOT
from jobs import evaluate, preprocess, train
from jobs.support import command_line

JOBS = ("preprocess.py", "train.py", "evaluate.py", "compare.py", "pipeline.py")


def run_job(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a job as a user does, away from the repository."""
    command = [sys.executable, str(ROOT / "jobs" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | environment, timeout=120)


@pytest.mark.parametrize("name", JOBS)
def test_help_shows_the_flags_and_exits_with_0(name):
    done = run_job(name, "--help")
    assert done.returncode == 0 and "--workers" in done.stdout and "(default:" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("train.py", ["quick", "--data", "/nowhere"], "/nowhere holds no finished shards"),
        ("pipeline.py", ["quick", "--source", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_a_mistake_is_a_one_line_message_with_exit_code_2_and_starts_no_cluster(name, arguments, said):
    done = run_job(name, *arguments)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "ray" not in done.stdout.lower()


@pytest.mark.parametrize(
    ("job", "arguments", "said"),
    [
        (train.job, ["bogus"], "no recipe 'bogus': use one of seed, camus, quick"),
        (train.job, ["quick", "--bogus", "3"], "--bogus"),
        (train.job, [], "--data is missing"),
        (train.job, ["quick", "--train.epochs", "many"], "train.epochs"),
        (train.job, ["quick", "--train.epochs", "0"], "train.epochs must be at least 1"),
        (train.job, ["quick", "--optim.kind", "magic"], "magic"),
        (train.job, ["--config", "/nowhere.json"], "/nowhere.json is missing"),
        (train.job, ["--config", "{empty}/list.json"], "list.json is not an experiment"),
        (train.job, ["quick", "--schedule.warmup-epochs", "inf"], "schedule.warmup_epochs"),
        (train.job, ["--workers", "0"], "--workers must be at least 1"),
        (preprocess.job, ["quick", "--out", "/tmp/x"], "--source is missing"),
        (preprocess.job, ["quick", "--source", "{empty}", "--out", "/tmp/x"], "holds no database_nifti"),
        (evaluate.job, [], "--checkpoint is missing"),
        (evaluate.job, ["--checkpoint", "/nowhere"], "/nowhere does not exist"),
        (evaluate.job, ["--checkpoint", "{empty}"], "is not a checkpoint"),
        (evaluate.job, ["--group", "bogus"], "bogus"),
    ],
)
def test_a_mistakes_message_names_the_value(job, arguments, said, tmp_path, monkeypatch):
    monkeypatch.delenv("HEARTSEG_DATA", raising=False)
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(UserError) as caught:
        job([argument.format(empty=tmp_path) for argument in arguments])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_arguments_mean_the_seed_and_the_environments_paths(monkeypatch):
    monkeypatch.setenv("HEARTSEG_DATA", "s3://bucket/shards")
    monkeypatch.setenv("HEARTSEG_RUNS", "/somewhere/runs")
    experiment, _ = command_line.parse(train.Options(), [], "train.py", "Train.")
    assert (experiment.name, experiment.data, experiment.runs) == ("seed", "s3://bucket/shards", "/somewhere/runs")


def test_an_experiment_of_a_run_is_a_configuration(tmp_path):
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps({"experiment": to_json(camus())}))
    experiment, _ = command_line.parse(train.Options(), ["--config", str(file), "--train.epochs", "3"], "train.py", "Train.")
    assert experiment.name == "camus" and experiment.train.epochs == 3


def test_mismatched_builds_of_torch_and_torchvision_are_a_one_line_error(tmp_path):
    # A torchvision that fails at import as the real one does beside a CPU-only torch.
    fake = tmp_path / "torchvision"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    done = run_job("train.py", "quick", "--data", "/nowhere", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "install both together" in done.stderr and "Traceback" not in done.stderr


def test_a_terminal_that_is_not_utf_8_gets_every_line(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", terminal)
    command_line.configure_logging()
    print("jos\udce9  ███  12 – 15 …")
    assert terminal.buffer.getvalue() == b"jos?  ???  12 ? 15 ?\n"
