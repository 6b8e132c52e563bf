"""jobs/doctor.py: what it says of a machine that is well, and of faults made for real, each by name, with its mend, in time."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from heartseg.errors import UserError
from helpers.experiments import ROOT
from helpers.wandb_server import KEY, serving
from jobs import doctor
from jobs.doctor import Options
from jobs.support import ray_runtime, system_checks
from jobs.support.system_checks import GIB, Finding

PLAIN = ("--launcher", "plain", "--megabytes", "1")


def wrong(found: list[Finding] | Finding) -> list[str]:
    """The sentences of what is wrong; each has a mend."""
    faults = [finding for finding in (found if isinstance(found, list) else [found]) if finding.wrong]
    assert all(fault.mend for fault in faults)
    return [fault.wrong for fault in faults]


def test_a_machine_that_is_well_gets_a_table_and_0_and_keeps_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / "doctor.py"), *PLAIN, "--runs", str(tmp_path), "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    said = json.loads(done.stdout)  # and nothing else is on stdout
    names = [finding["name"] for finding in said["findings"]]
    assert {"python", "heartseg", "torch", "ray", "CPUs", "memory", "shared memory", "wandb", "runs storage"} <= set(names)
    speeds = next(finding for finding in said["findings"] if finding["name"] == "runs storage")["numbers"]
    assert speeds["write_mb_per_s"] > 0 and speeds["read_mb_per_s"] > 0
    assert said["ok"] == (not any(finding["wrong"] for finding in said["findings"]))
    assert done.returncode == (0 if said["ok"] else 1)
    assert list(tmp_path.iterdir()) == [] and "looking at memory" in done.stderr


WITHOUT_TORCH = """
import importlib.metadata, runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def version(name, real=importlib.metadata.version):
    if name == "torch":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

sys.meta_path.insert(0, Missing())
importlib.metadata.version = version
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_torch_the_doctor_says_so():
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "jobs" / "doctor.py"), "--launcher", "plain", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1, done.stderr
    said = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert said["torch"]["wrong"] == "torch is not installed." and "pip install" in said["torch"]["mend"]
    assert not said["ray"]["wrong"] and {"CPUs", "shared memory"} <= set(said)  # and the rest is looked at


def test_the_table_ends_with_what_is_wrong_and_its_mend():
    well = [Finding("python", "3.11"), Finding("torch", "2.15")]
    assert doctor.table_text(well).endswith("Nothing is wrong.")
    text = doctor.table_text([*well, Finding("ray", "–", "ray is not installed.", "Install it.")])
    assert text.splitlines()[-2:] == ["! ray is not installed.", "  Install it."] and "! ray " in text


def test_something_wrong_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run", lambda options: [Finding("ray", "–", "ray is not installed.", "Install it.")])
    with pytest.raises(SystemExit) as stopped:
        doctor.job([*PLAIN, "--json"])
    assert stopped.value.code == 1 and json.loads(capsys.readouterr().out)["ok"] is False


def test_a_mistake_on_the_line_is_a_sentence():
    with pytest.raises(UserError, match="--seconds must be positive"):
        doctor.job(["--seconds", "0"])


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on():
    def breaks() -> Finding:
        raise ZeroDivisionError("by zero")

    assert "ZeroDivisionError: by zero" in wrong(doctor.listed("memory", breaks))[0]


def test_the_containers_limits_count(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    cpus = system_checks.processors(str(tmp_path))
    assert "may use 0.5 of" in cpus.wrong and "OMP_NUM_THREADS=1" in cpus.mend
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert wrong(system_checks.processors(str(tmp_path))) == []
    group = tmp_path / "sys/fs/cgroup"
    for folder in (tmp_path / "proc", group):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {8 * 2**20} kB\nMemAvailable: {6 * 2**20} kB\n")
    (group / "memory.max").write_text(f"{3 * GIB}\n")
    (group / "memory.current").write_text(f"{2.5 * GIB:.0f}\n")
    (group / "memory.stat").write_text(f"inactive_file {GIB}\n")
    assert "Only 1.5 GiB of memory are free" in system_checks.memory(str(tmp_path)).wrong  # a file cache gives way
    (group / "memory.max").write_text("max\n")
    assert system_checks.memory(str(tmp_path)).found == "8.0 GiB, 6.0 free"


SMALL_DISK = """
set -e
mount -t tmpfs -o size=2m tmpfs {disk}
exec {python} -c "
import json
from jobs.support import system_checks
found = system_checks.round_trip('{disk}/runs', 4) + [system_checks.shared_memory('{disk}')]
print(json.dumps([[f.name, f.wrong, f.mend] for f in found]))
"
"""


def test_a_full_disk_and_a_small_shared_memory_are_named(tmp_path):
    script = SMALL_DISK.format(disk=tmp_path, python=sys.executable)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, env=environment, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = {name: (fault, mend) for name, fault, mend in json.loads(done.stdout)}
    assert "No space left on device" in found["runs storage"][0] and "Make room" in found["runs storage"][1]
    assert "GiB free" in found["runs"][0]
    assert str(tmp_path) in found["shared memory"][0] and "--shm-size" in found["shared memory"][1]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    faults = wrong(system_checks.round_trip(str(tmp_path / "file" / "runs"), 1))
    assert len(faults) == 1 and str(tmp_path / "file" / "runs") in faults[0]
    assert any("/proc/nowhere" in fault for fault in wrong(system_checks.round_trip("/proc/nowhere", 1)))


def test_no_shared_memory_is_named():
    assert "There is no /nowhere/shm" in system_checks.shared_memory("/nowhere/shm").wrong


def test_an_object_store_is_written_read_and_left_as_it_was(s3):
    from heartseg.storage import filesystem

    assert wrong(system_checks.round_trip("s3://bucket/doctor", 1)) == []
    assert filesystem.list_names("s3://bucket/doctor") == []
    assert "bucket that does not exist" in wrong(system_checks.round_trip("s3://no-such-bucket/doctor", 1))[0]


def test_shards_are_read_and_what_are_none_is_said(shards, tmp_path):
    assert system_checks.readable(shards).numbers["read_mb_per_s"] > 0
    assert "holds no finished shards" in wrong(system_checks.readable(str(tmp_path)))[0]


@pytest.fixture()
def with_key(monkeypatch):
    """A key in the environment, and the address that it is sent to."""
    for name in ("WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return lambda url: monkeypatch.setenv("WANDB_BASE_URL", url)


def test_wandb_that_answers_is_well(with_key):
    with serving() as server:
        with_key(server.url)
        found = system_checks.wandb()
    assert not found.wrong and "takes the key" in found.found and KEY not in str(found)


def test_wandb_that_is_silent_is_named_within_5_seconds(with_key):
    with serving(failure="silent") as server:
        with_key(server.url)
        started = time.perf_counter()
        found = system_checks.wandb()
        taken = time.perf_counter() - started
    assert "cannot be reached: no answer within 5 s" in found.wrong and "WANDB_MODE=offline" in found.mend
    assert taken < 6.5 and KEY not in str(found)


def test_wandb_that_nobody_serves_and_one_that_fails_are_named(with_key):
    with_key("http://127.0.0.1:9")
    assert "cannot be reached" in system_checks.wandb().wrong
    with serving(failure="error") as server:
        with_key(server.url)
        assert "HTTP 500" in system_checks.wandb().wrong


def test_a_key_that_is_refused_is_named_and_not_shown(with_key):
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with_key(f"http://127.0.0.1:{server.server_address[1]}")
        found = system_checks.wandb()
    assert "refuses the key" in found.wrong and KEY not in str(found)


def test_without_a_key_wandb_is_not_asked(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not system_checks.wandb().wrong


@pytest.mark.slow
def test_two_workers_exchange_and_the_bandwidth_is_told(ray_session, tmp_path):
    cluster, exchanged = doctor.workers(Options(workers=2, seconds=1.0), str(tmp_path))
    assert cluster.numbers["nodes"] == 1 and not exchanged.wrong, exchanged
    assert exchanged.numbers["workers"] == 2 and exchanged.numbers["backend"] == "gloo"
    assert exchanged.numbers["gb_per_s"] > 0 and exchanged.numbers["rounds"] >= 5
    assert list(tmp_path.iterdir()) == []


def test_several_versions_among_the_workers_are_named():
    machines = [{"versions": {"torch": "2.15.0", "ray": "2.60.0"}}, {"versions": {"torch": "2.14.0", "ray": "2.60.0"}}]
    assert wrong(doctor.mixed(machines)) == ["The workers have torch in several versions: 2.14.0, 2.15.0."]


def test_a_wrong_sum_is_named():
    machines = [{"host": "a", "device": "CPU", "versions": {}}, {"host": "b", "device": "CPU", "versions": {}}]
    heard = {"bytes": 8 << 20, "seconds": 2.0, "rounds": 100, "right": False, "backend": "gloo", "machines": machines}
    found = doctor.bandwidth(2, heard)
    assert "sum over the workers was wrong" in found.wrong and "2 on 2 hosts" in found.found


def test_workers_of_an_autoscaled_cluster_ask_for_the_gpus_that_may_come(ray_session):
    """The cluster's plan, as an autoscaler tells Ray of it, has a GPU node and none is up."""
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2

    client = global_worker.gcs_client
    plan = autoscaler_pb2.ClusterConfig()
    assert ray_runtime.worker_resources(1).keys() == {"CPU"}
    group = plan.node_group_configs.add(name="gpu", max_count=4)
    group.resources["CPU"], group.resources["GPU"] = 4, 1
    try:
        client.report_cluster_config(plan.SerializeToString())
        assert ray_runtime.worker_resources(1) == {"GPU": 1, "CPU": 1}
    finally:
        client.report_cluster_config(autoscaler_pb2.ClusterConfig().SerializeToString())
    assert ray_runtime.worker_resources(1).keys() == {"CPU"}
