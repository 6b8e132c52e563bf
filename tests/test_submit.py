"""`ray job submit` for real, on loopback and with token authentication: the README's lines, and what they upload."""

import io
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_experiment

from heartseg import checkpoint, engine, runs
from heartseg.config import to_json
from heartseg.distributed import Ranks
from heartseg.model import build_model
from heartseg.phantom import write_phantom
from heartseg.recipes import seed
from heartseg.shards import open_shards
from jobs import preprocess

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def seed_run(tmp_path_factory) -> dict[str, str]:
    """Shards for the seed recipe, and its run as it stands after 169 of 170 epochs."""
    folder = tmp_path_factory.mktemp("seed")
    environment = {"HEARTSEG_DATA": str(folder / "shards"), "HEARTSEG_RUNS": str(folder / "runs")}
    write_phantom(str(folder / "phantom"), patients=4, scale=0.3)
    experiment = replace(seed(), source=str(folder / "phantom"), out=environment["HEARTSEG_DATA"])
    preprocess.run(experiment, preprocess.Options(launcher="plain"))
    experiment = replace(experiment, data=environment["HEARTSEG_DATA"], runs=environment["HEARTSEG_RUNS"])
    run = runs.open_run(experiment, open_shards(experiment.data))
    alone = Ranks(0, 1, torch.device("cpu"))
    state = engine.start(experiment, build_model(experiment.model), alone, lambda model: model)
    state.epoch = 169
    card = {"epoch": 169, "experiment": to_json(experiment), "intensity": [0.0, 1.0], "metrics": {"epoch": 169}}
    checkpoint.save(run.path, state.model.state_dict(), state.state_dict(), card)
    runs.write_record(run.path, [{"epoch": 169, "seconds": 1.0}])
    return environment | {"run": run.path}


@pytest.fixture(scope="module")
def cluster(seed_run, tmp_path_factory):
    """A cluster as `cluster/local.sh start` starts it, with design's environment; yields what a client needs."""
    folder = tmp_path_factory.mktemp("cluster")
    environment = os.environ | seed_run
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HEARTSEG_CLUSTER_DIR": str(folder)}
    ports = {name: str(free_port()) for name in ("PORT", "DASHBOARD_PORT", "AGENT_PORT", "CLIENT_PORT")}
    environment |= {f"HEARTSEG_CLUSTER_{name}": port for name, port in ports.items()}
    environment.pop("RAY_ADDRESS", None)
    script = str(ROOT / "cluster" / "local.sh")
    subprocess.run([script, "start", "--num-cpus", "2"], env=environment, check=True, timeout=200)
    address = f"http://127.0.0.1:{ports['DASHBOARD_PORT']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_API_SERVER_ADDRESS": address}
    yield environment | token
    subprocess.run([script, "stop"], env=environment, check=True, timeout=200)


def submit(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    """`ray job submit --working-dir . -- …`, typed in the repository."""
    line = [RAY, "job", "submit", "--working-dir", ".", "--", *command]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_the_literal_line_trains_the_seed_and_its_logs_show_the_progress(cluster):
    done = submit(cluster, "python", "jobs/train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 170/170" in done.stdout and "170 epochs done" in done.stdout
    assert checkpoint.last(cluster["run"]).epoch == 170


def test_the_same_line_with_arguments_takes_them(cluster, shards, tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(to_json(tiny_experiment())))
    arguments = ["--config", str(config), "--data", shards, "--runs", str(tmp_path / "runs"), "--workers", "2"]
    done = submit(cluster, "python", "jobs/train.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 2/2" in done.stdout and "2 epochs done" in done.stdout


def test_a_failing_job_exits_non_zero_and_only_the_code_was_uploaded(cluster):
    code = "import os; print('UPLOADED', sorted(os.listdir('.'))); raise SystemExit(3)"
    done = submit(cluster, "python", "-c", code)
    assert done.returncode != 0
    line = next(line for line in done.stdout.splitlines() if line.startswith("UPLOADED"))
    assert "jobs" in line and "heartseg" in line
    assert not any(name in line for name in ("'.venv'", "'demo'", "'runs'", "'results'", "'.git'"))


def test_a_relative_path_in_a_job_is_refused_in_one_sentence(cluster):
    done = submit(cluster, "python", "jobs/train.py", "quick", "--data", "shards")
    assert done.returncode != 0 and "--data shards is relative" in done.stdout and "Traceback" not in done.stdout


def test_without_the_token_nothing_is_submitted(cluster):
    body = io.BytesIO(json.dumps({"entrypoint": "true"}).encode())
    request = urllib.request.Request(cluster["RAY_API_SERVER_ADDRESS"] + "/api/jobs/", data=body.read(), method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 401
