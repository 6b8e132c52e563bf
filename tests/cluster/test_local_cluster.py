"""cluster/local.sh refuses a wrong call, and stops and removes only what it made; test_submitted_pipeline.py submits to it."""

import os
import re
import subprocess

import pytest

from helpers import local_cluster
from helpers.experiments import ROOT

SCRIPT = ROOT / "cluster" / "local.sh"


def local_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """cluster/local.sh with these arguments, in an environment that has nothing of the caller's but PATH."""
    environment["PATH"] = os.environ["PATH"]
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize(
    "line", ["restart", "", "stop --force", "submit python", "submit --", "submit --runtime-env env.yaml -- true",
             "submit --runtime-env-json [1] -- true"],
)  # fmt: skip
def test_a_wrong_call_is_refused_in_one_line(line, tmp_path):
    done = local_sh(*line.split(), HEARTSEG_CLUSTER_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("cluster/local.sh: ")


def test_stop_ends_and_removes_only_what_start_made(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "temp_dir").write_text(str(tmp_path / "precious"))
    assert local_sh("stop", HEARTSEG_CLUSTER_DIR=str(tmp_path)).returncode == 0 and (tmp_path / "precious").is_dir()
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "pid").write_text(str(bystander.pid))  # a number that another program was given since
        (tmp_path / "temp_dir").write_text("/tmp/heartseg-ray.abcdef/t")
        done = local_sh("stop", HEARTSEG_CLUSTER_DIR=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, "not running\n")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert re.search(r"(?m)^[^#]*\b(ray|\"\$RAY\") stop\b|pkill|killall", SCRIPT.read_text()) is None


EVERY_VERB = """
cluster/local.sh start --num-cpus 1 "$@"
cluster/local.sh status
cluster/local.sh submit -- python -c 'print("SUBMITTED")'
eval "$(cluster/local.sh env)"
RAY_ADDRESS=$ADDRESS:$HEARTSEG_CLUSTER_PORT python jobs/doctor.py --workers 1 --seconds 0.1
cluster/local.sh stop
"""


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1", local_cluster.OTHER_ADDRESS])
def test_every_verb_and_the_doctor_reach_the_cluster_on_a_machine_with_a_network(address, tmp_path):
    options = [] if address == "127.0.0.1" else ["--node-ip-address", address]
    command = [*local_cluster.ON_A_NETWORK, "bash", "-uc", EVERY_VERB, "bash", *options]
    environment = os.environ | local_cluster.settings(tmp_path) | {"ADDRESS": address}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    finally:
        subprocess.run([str(SCRIPT), "stop"], env=environment, check=True, timeout=100)
    shown = done.stdout + done.stderr
    assert "1.0 CPU" in shown and "\nSUBMITTED\n" in shown and "nodes 1, CPUs 1" in shown, shown
    assert "1 on 1 host (CPU), gloo" in shown and "\nstopped: process" in shown and "Traceback" not in shown, shown
