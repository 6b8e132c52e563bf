"""What a user sees of a mistake: a one-line message, exit code 2, and no cluster."""

import json
import os
import subprocess
import sys

import pytest

from heartseg.config.experiment import to_json
from heartseg.config.recipes import camus
from heartseg.errors import UserError
from helpers.experiments import ROOT
from jobs import compare, evaluate, pipeline, preprocess, train
from jobs.support import command_line


def run_job(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a job as a user does, away from the repository."""
    command = [sys.executable, str(ROOT / "jobs" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | environment, timeout=120)


@pytest.mark.parametrize("job", [preprocess.job, train.job, evaluate.job, compare.job, pipeline.job])
def test_help_shows_the_flags_and_exits_with_0(job, capsys):
    with pytest.raises(SystemExit) as left:
        job(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "--workers" in shown and "(default:" in shown


def test_a_mistake_is_a_one_line_message_with_exit_code_2_and_starts_no_cluster():
    done = run_job("train.py", "quick", "--data", "/nowhere")
    assert done.returncode == 2 and "ray" not in done.stdout.lower()
    assert done.stderr == "train.py: /nowhere holds no finished shards (no manifest.json): run jobs/preprocess.py first.\n"


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
        (pipeline.job, ["quick", "--source", "/nowhere"], "/nowhere does not exist"),
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


def test_mismatched_builds_of_torch_and_torchvision_are_a_one_line_error(monkeypatch):
    # A torchvision that fails at import as the real one does beside a CPU-only torch.
    class Mismatched:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torchvision"):
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Mismatched(), *sys.meta_path])
    with pytest.raises(UserError, match="install both together"):
        train.job(["quick", "--data", "/nowhere"])
