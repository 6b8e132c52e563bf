"""A user's mistake leads to a one-line message, exit code 2, and no cluster."""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import replace
from unittest.mock import patch

import pytest

from heartseg.config.experiment import to_json
from heartseg.config.recipes import camus, quick
from heartseg.errors import UserError
from helpers.experiments import ROOT
from jobs import compare, doctor, evaluate, export, inspect_shards, pipeline, predict, preprocess, train, tune
from jobs.support import command_line


@pytest.mark.parametrize(
    ("job", "words"),
    [
        *((verb.job, "--workers") for verb in (preprocess, train, evaluate, compare, pipeline)),
        (predict.job, "--input --view --spacing-mm _pred.nii.gz ef.csv"),
        (export.job, "--checkpoint --out --which --data"),
    ],
)
def test_help_shows_the_flags_and_exits_with_0(job, words, capsys):
    with pytest.raises(SystemExit) as left:
        job(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and all(word in shown for word in (*words.split(), "(default:")) and "(default: )" not in shown


def test_a_mistake_is_a_one_line_message_with_exit_code_2_and_starts_no_cluster():
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "quick", "--data", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)  # away from the repository
    assert done.returncode == 2 and "ray" not in done.stdout.lower()
    fix = "check the path, or run jobs/preprocess.py first"
    assert done.stderr == f"train.py: /nowhere holds no finished shards (no manifest.json): {fix}.\n"


@pytest.mark.parametrize(
    ("job", "arguments", "said"),
    [
        (train.job, ["bogus"], "'bogus' is not a recipe: use one of seed, camus, compact, quick"),
        (train.job, ["quick", "--bogus", "3"], "--bogus is not a flag of this command; --help lists all flags."),
        (train.job, ["quick", "--optm.lr", "3"], "--optm.lr is not a flag of this command: did you mean --optim.lr?"),
        (train.job, ["quick", "--run", "x"], "--run is not a flag of this command: did you mean --runs or --run-name?"),
        (train.job, ["quick", "--epochs", "3"], "--epochs is not a flag of this command: did you mean --train.epochs?"),
        (
            train.job,
            ["quick", "--seed", "1"],
            "--seed is not a flag of this command: did you mean --split.seed or --train.seed?",
        ),
        (train.job, ["quick", "--gpu", "1"], "--gpu is not a flag of this command; --help lists all flags."),
        (train.job, ["quick", "--train.epochs"], "--train.epochs needs a value"),
        (train.job, [], "--data is missing"),
        (train.job, ["quick", "--train.epochs", "many"], "--train.epochs must be a whole number, not 'many'."),
        (train.job, ["quick", "optim.lr=fast"], "--optim.lr must be a number, not 'fast'."),
        (train.job, ["quick", "--optim.kind", "foo"], "--optim.kind must be one of 'adamw', 'sgd', not 'foo'."),
        (predict.job, ["--view", "3CH"], "'4CH', not '3CH'."),
        (predict.job, ["--spacing-mm", "1"], "--spacing-mm must be FLOAT FLOAT, not '1'."),
        (train.job, ["--config", "/nowhere.json"], "/nowhere.json is missing"),
        (train.job, ["--config", "{empty}/list.json"], "list.json is not an experiment"),
        (train.job, ["--workers", "0"], "--workers must be at least 1"),
        (train.job, ["quick", "--workers", "4:1"], "--min-workers must be at least 0 and no more than"),
        (preprocess.job, ["quick", "--out", "/tmp/x"], "--source is missing"),
        (preprocess.job, ["quick", "--source", "{empty}", "--out", "/tmp/x"], "holds neither database_nifti"),
        (evaluate.job, [], "--checkpoint is missing"),
        (evaluate.job, ["--checkpoint", "/nowhere"], "/nowhere does not exist"),
        (evaluate.job, ["--checkpoint", "{empty}"], "has no complete checkpoint"),
        (pipeline.job, ["quick", "--source", "/nowhere"], "/nowhere does not exist"),
        (train.job, ["--config"], "--config needs a file"),
        (train.job, ["--run-name", "quick", "optim.bogus=3"], "'optim.bogus=3' is not a recipe"),
        (evaluate.job, ["--checkpoint", "/run", "--launcher", "plain", "--workers", "2"], "leave --workers out"),
        (evaluate.job, ["--checkpoint", "/run", "--data", "/a", "--truth", "/b"], "give one of them"),
        (export.job, [], "--checkpoint is missing"),
        (export.job, ["--checkpoint", "/nowhere"], "--out is missing"),
        (doctor.job, ["--seconds", "0"], "--seconds must be above 0"),
    ],
)
def test_a_mistakes_message_names_the_value(job, arguments, said, tmp_path, monkeypatch):
    monkeypatch.delenv("HEARTSEG_DATA", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)  # where tyro draws its boxes in colour
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(UserError) as caught:
        job([argument.format(empty=tmp_path) for argument in arguments])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("job", "arguments", "flag"),
    [
        (train.job, ["--launcher", "plain", "--workers", "4"], "--workers 4"),
        (train.job, ["quick", "--split.kind", "ratio"], "--split.kind ratio"),
        (train.job, ["--source", "/data"], "--source /data"),
        (tune.job, ["--out", "/out"], "--out /out"),
        (tune.job, ["--tracking.job-type", "mine"], "--tracking.job-type mine"),
        (tune.job, ["--space.changes", "optim.lr=0.1", "--search", "grid"], "--space.changes ['optim.lr=0.1']"),
        (tune.job, ["--search", "changes", "--space.changes", "optim.lr=0.1", "--search-seed", "3"], "--search-seed 3"),
        (tune.job, ["--space.lr-points", "4"], "--space.lr-points 4"),
        (tune.job, ["--schedule.rise", "0.2", "--space.schedules", "cosine"], "--schedule.rise 0.2"),
        (train.job, ["seed", "--schedule.kind", "cosine", "--schedule.power", "2"], "--schedule.power 2.0"),
        (train.job, ["--loss.aux-weight", "0.3"], "--loss.aux-weight 0.3"),
        (train.job, ["--tracking.wandb", "off", "--tracking.project", "p"], "--tracking.project p"),
        (preprocess.job, ["camus", "--split.test-share", "0.3"], "--split.test-share 0.3"),
        (pipeline.job, ["--tune", "3", "--space.lr-points", "4"], "--space.lr-points 4"),
        (tune.job, ["--no-stop-early", "--reduction", "4"], "--reduction 4.0"),
        (preprocess.job, ["quick", "train.epochs=3"], "--train.epochs 3"),
        (preprocess.job, ["--launcher", "plain", "--workers", "2"], "--workers 2"),
        (pipeline.job, ["--data", "/shards", "--source", "/data"], "--data /shards"),
        (pipeline.job, ["--folds", "3", "--split.folds", "4"], "--split.folds 4"),
        (evaluate.job, ["--predictions", "/masks", "--which", "best"], "--which best"),
        (evaluate.job, ["--predictions", "/masks", "--overwrite"], "--overwrite True"),
        (evaluate.job, ["--checkpoint", "/run", "--pattern", "{patient}"], "--pattern {patient}"),
        (evaluate.job, ["--pool", "/a", "--out", "/b", "--overwrite"], "--overwrite True"),
        (doctor.job, ["--launcher", "plain", "--workers", "4"], "--workers 4"),
        (inspect_shards.job, ["--data", "/shards", "--images", "4"], "--images 4"),
    ],
)
def test_a_flag_that_has_no_effect_is_refused(job, arguments, flag):
    with pytest.raises(UserError, match=f"{re.escape(flag)} has no effect here: .*Leave it out"):
        job(arguments)


def test_an_experiment_of_a_run_is_a_configuration_and_may_hold_what_a_job_does_not_use(tmp_path, monkeypatch):
    monkeypatch.setenv("HEARTSEG_DATA", "/shards")
    config = tmp_path / "experiment.json"
    config.write_text(json.dumps({"experiment": to_json(replace(camus(), workers=4, source="/data"))}))
    line = ["--launcher", "plain", "--config", str(config), "--train.epochs", "3"]
    experiment, _ = command_line.parse(train.Options(), line, "train.py", "")
    assert (experiment.name, experiment.workers, experiment.source, experiment.train.epochs) == ("camus", 4, "/data", 3)
    command_line.parse(pipeline.PipelineOptions(), ["--source", "/data"], "pipeline.py", "")


def test_a_setting_that_another_trial_or_fold_uses_has_an_effect():
    command_line.parse(tune.Options(), ["camus", "--schedule.power", "2", "--schedule.rise", "0.2"], "tune.py", "")
    line = ["camus", "--folds", "3", "--split.seed", "3", "--tune", "2", "--schedule.power", "2"]
    command_line.parse(pipeline.PipelineOptions(), line, "pipeline.py", "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--workers 2 quick", ("quick", 2, 0.002, "")),
        ("--workers=2 optim.lr=.01 quick", ("quick", 2, 0.01, "")),
        ("camus --fresh optim.lr=.3 --run-name quick", ("camus", 1, 0.3, "quick")),
        ("--run-name quick optim.lr=.3 camus", ("camus", 1, 0.3, "quick")),
        ("--run-name quick", ("seed", 1, 0.001, "quick")),
        ("", ("seed", 1, 0.001, "")),
        ("quick workers=3 train.batch-size=9", ("quick", 3, 0.002, "")),
    ],
)
def test_the_recipe_may_stand_anywhere_and_a_field_needs_no_dashes(line, expected):
    experiment, options = command_line.parse(train.Options(), line.split(), "train.py", "Train.")
    assert (experiment.name, experiment.workers, experiment.optim.lr, options.run_name) == expected


@pytest.mark.parametrize("line", ["--workers 1:4", "--workers=1:4"])
def test_elastic_workers_are_given_as_a_range(line):
    experiment, _ = command_line.parse(train.Options(), ["quick", *line.split()], "train.py", "")
    assert (experiment.min_workers, experiment.workers) == (1, 4)


def test_the_changes_of_an_ablation_stay_values_of_their_flag():
    line = ["quick", "--search", "changes", "--space.changes", "loss.kind=cross_entropy", "optim.lr=0.01", "--trials", "3"]
    experiment, options = command_line.parse(tune.Options(), line, "tune.py", "Sweep.")
    assert options.plan.space.changes == ("loss.kind=cross_entropy", "optim.lr=0.01") and experiment.optim == quick().optim


def test_paths_come_from_the_environment_too_and_a_tilde_that_the_shell_left_is_the_home_folder(tmp_path, monkeypatch):
    for name, value in {"HOME": str(tmp_path), "HEARTSEG_RUNS": "~/runs", "HEARTSEG_DATA": "s3://bucket/shards"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "my.json").write_text(json.dumps(to_json(quick())))
    line = ["--config=~/my.json", "--out=~/x", "--source=~/data"]
    experiment, _ = command_line.parse(pipeline.PipelineOptions(), line, "pipeline.py", "")
    found = (experiment.out, experiment.source, experiment.runs)
    assert found == tuple(str(tmp_path / name) for name in ("x", "data", "runs")) and experiment.data == "s3://bucket/shards"
    with pytest.raises(UserError, match=f"{tmp_path}/nowhere does not exist"):
        evaluate.job(["--checkpoint=~/nowhere"])


def test_the_environment_is_made_fit_for_ray_and_wandb(monkeypatch):
    long, hosts = "/tmp/" + 40 * "x", ("127.0.0.1", "localhost", "intranet", "example.org")
    given = {"RAY_ADDRESS": "", "TMPDIR": long, "CUDA_VISIBLE_DEVICES": "", "no_proxy": "intranet", "RAY_AUTH_TOKEN": "t\n"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", long)
    with patch.dict(os.environ):
        command_line.prepare_environment()
        assert "RAY_ADDRESS" not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert os.environ["TMPDIR"] == tempfile.gettempdir() == "/tmp" and os.environ["RAY_AUTH_TOKEN"] == "t"
        with patch.dict(os.environ, http_proxy="http://127.0.0.1:9"):
            direct = {host: bool(urllib.request.proxy_bypass(host)) for host in hosts}
        assert direct == {"127.0.0.1": True, "localhost": True, "intranet": True, "example.org": False}


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


def test_a_terminal_that_is_not_utf_8_gets_every_line(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", terminal)
    command_line.configure_logging()
    print("jos\udce9  ███  12 – 15 …")
    assert terminal.buffer.getvalue() == b"jos?  ???  12 ? 15 ?\n"
