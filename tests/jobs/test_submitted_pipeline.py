"""`ray job submit` for real, on loopback and with token authentication: the README's lines, and what they upload."""

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heartseg.config.experiment import TrackingConfig, to_json
from heartseg.config.recipes import seed
from heartseg.datasets.phantom import write_phantom
from heartseg.models import checkpoint
from heartseg.models.deeplabv3 import build_model
from heartseg.shards.reader import open_shards
from heartseg.training import engine, run_directory
from heartseg.training.distributed import Ranks
from helpers import local_cluster
from helpers.experiments import ROOT, tiny_experiment
from helpers.job_process import wait_for
from helpers.local_cluster import begin_until
from jobs import preprocess
from jobs.support.pipeline_state import PipelineState
from jobs.support.ray_runtime import free_port

# Looks like a key of Weights & Biases, and is found in what a run leaves if it is anywhere there.
SECRET = "5ec7e7" + "0123456789abcdef" * 2 + "17"
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster on this machine with folders for data and runs; yields its clients' environment."""
    folder = tmp_path_factory.mktemp("cluster")
    variables = {"HEARTSEG_DATA": str(folder / "shards"), "HEARTSEG_RUNS": str(folder / "runs"), "HOME": str(folder)}
    # The key is where it belongs; its server refuses the connection, so that runs are tracked offline.
    secrets = {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"}
    with local_cluster.started(folder, **variables, **secrets) as environment:
        yield environment


def submit(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    line = [RAY, "job", "submit", "--working-dir", ".", "--", *command]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_the_literal_line_trains_the_seed_and_its_logs_show_the_progress(cluster, tmp_path):
    # Shards for the seed recipe, and its run as it stands after 169 of 170 epochs.
    write_phantom(str(tmp_path), patients=4, scale=0.3)
    experiment = replace(seed(), source=str(tmp_path), out=cluster["HEARTSEG_DATA"])
    preprocess.run(experiment, preprocess.Options(launcher="plain"))
    experiment = replace(experiment, data=cluster["HEARTSEG_DATA"], runs=cluster["HEARTSEG_RUNS"])
    run = run_directory.open_run(experiment, open_shards(experiment.data))
    alone = Ranks(0, 1, torch.device("cpu"))
    state = engine.start(experiment, build_model(experiment.model), alone, lambda model: model)
    state.epoch = 169
    card = {"epoch": 169, "experiment": to_json(experiment), "intensity": [0.0, 1.0], "metrics": {"epoch": 169}}
    checkpoint.save(run.path, state.model.state_dict(), state.state_dict(), card)
    run_directory.write_record(run.path, [{"epoch": 169, "seconds": 1.0}])

    done = submit(cluster, "python", "jobs/train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 170/170" in done.stdout and "170 epochs done" in done.stdout
    assert checkpoint.last(run.path).epoch == 170


def test_a_failing_job_exits_non_zero_with_a_one_line_message_and_only_the_code_was_uploaded(cluster):
    code = "import os; print('UPLOADED', sorted(os.listdir('.')), flush=True); "
    code += "os.execlp('python', 'python', 'jobs/train.py', 'quick', '--data', 'shards')"
    done = submit(cluster, "python", "-c", code)
    assert done.returncode != 0 and "--data shards is relative" in done.stdout and "Traceback" not in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("UPLOADED"))
    assert "jobs" in line and "heartseg" in line
    assert not any(name in line for name in ("'.venv'", "'demo'", "'runs'", "'results'", "'.git'"))


@pytest.mark.slow
def test_no_secret_is_in_anything_that_a_run_leaves(cluster, shards, tmp_path):
    config = tmp_path / "tiny.json"
    tracked = tiny_experiment(tracking=TrackingConfig())
    config.write_text(json.dumps(to_json(replace(tracked, train=replace(tracked.train, epochs=1)))))
    runs_folder = tmp_path / "runs"
    done = submit(cluster, "python", "jobs/train.py", "--config", str(config), "--data", shards, "--runs", str(runs_folder))
    assert done.returncode == 0, done.stdout + done.stderr
    shown = subprocess.run(
        [RAY, "job", "list", "--log-color", "false"], env=cluster, capture_output=True, text=True, timeout=60
    )
    assert "jobs/train.py" in shown.stdout
    assert SECRET not in done.stdout + done.stderr + shown.stdout
    home = Path(cluster["HEARTSEG_CLUSTER_DIR"])
    ray_files = Path((home / "temp_dir").read_text().strip())
    found = {root: [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
             for root in (runs_folder, home, ray_files)}  # fmt: skip
    # The tracked run is there, and so are Ray's own logs: what is searched is not nothing.
    assert any(path.suffix == ".wandb" for path in found[runs_folder])
    assert any(path.name.startswith("job-driver-") for path in found[ray_files])
    assert [str(path) for paths in found.values() for path in paths if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_a_secret_in_a_runtime_env_is_warned_of_at_submission_and_by_the_job(cluster):
    given = json.dumps({"env_vars": {"MY_API_KEY": "1", "HEARTSEG_RUNS": "/mine"}})
    line = [str(ROOT / "cluster" / "local.sh"), "submit", "--runtime-env-json", given, "--", "bash", "-c"]
    code = "python jobs/compare.py; echo SEEN $HEARTSEG_DATA $HEARTSEG_RUNS"
    elsewhere = cluster | {"HEARTSEG_DATA": "/elsewhere"}  # than where the cluster started
    done = subprocess.run([*line, code], cwd=ROOT, env=elsewhere, capture_output=True, text=True, timeout=120)
    assert "MY_API_KEY: all who open the dashboard see" in done.stderr
    assert "MY_API_KEY is in this job's runtime_env" in done.stdout
    assert "SEEN /elsewhere /mine" in done.stdout  # both what the script hands on and what is given


def test_every_port_of_the_cluster_is_on_loopback_alone_and_without_the_token_nothing_is_submitted(cluster):
    others = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    for name in ("PORT", "DASHBOARD_PORT", "AGENT_PORT", "CLIENT_PORT"):
        port = int(cluster[f"HEARTSEG_CLUSTER_{name}"])
        wait_for(lambda port=port: not socket.socket().connect_ex(("127.0.0.1", port)))  # the client's server comes up last
        for address in others:
            with pytest.raises(OSError):
                socket.create_connection((address, port), timeout=10)
    body = json.dumps({"entrypoint": "true"}).encode()
    request = urllib.request.Request(cluster["RAY_API_SERVER_ADDRESS"] + "/api/jobs/", data=body, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 401


def pipeline_command(tmp_path: Path, phantom: str, epochs: int) -> list[str]:
    config, experiment = tmp_path / "tiny.json", tiny_experiment(source=phantom, out=str(tmp_path / "out"))
    config.write_text(json.dumps(to_json(replace(experiment, train=replace(experiment.train, epochs=epochs)))))
    return [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "--config", str(config), "--submit"]


def read_record(tmp_path: Path, stage: str) -> dict:
    return PipelineState.open(str(tmp_path / "out")).stages[stage]


@pytest.mark.slow
def test_a_killed_pipelines_job_is_found_again_and_stopped_with_it(cluster, phantom, tmp_path):
    def was_stopped(job: str) -> bool:
        shown = subprocess.run([RAY, "job", "status", job], env=cluster, capture_output=True, text=True, timeout=60)
        return "was stopped" in shown.stdout + shown.stderr

    command = pipeline_command(tmp_path, phantom, epochs=400)
    killed = begin_until(command, cluster, "epoch 2/400")
    killed.kill()
    killed.wait()
    (first,) = (attempt["job"] for attempt in read_record(tmp_path, "train")["attempts"])

    interrupted = begin_until(command, cluster, f"found {first}")
    interrupted.send_signal(signal.SIGINT)
    output = interrupted.stdout.read()
    assert interrupted.wait(timeout=100) == 130 and "rerun the same command to resume" in output, output
    record = read_record(tmp_path, "train")
    assert was_stopped(first) and record["state"] == "stopped" and len(record["attempts"]) == 1  # no job twice
    assert checkpoint.last(record["path"]).epoch >= 1


@pytest.mark.slow
def test_the_pipeline_itself_can_be_submitted(cluster, phantom, tmp_path):
    arguments = pipeline_command(tmp_path, phantom, epochs=1)[2:]
    elsewhere = {name: value for name, value in cluster.items() if name not in ("HEARTSEG_RUNS", "HEARTSEG_DATA")}
    done = submit(elsewhere, "python", "jobs/pipeline.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("preprocess", "train", "evaluate"):
        record = read_record(tmp_path, stage)
        assert record["state"] == "done" and [attempt["job"].startswith(stage) for attempt in record["attempts"]] == [True]
