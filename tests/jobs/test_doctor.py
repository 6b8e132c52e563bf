"""jobs/doctor.py: a healthy machine gets a table and exit code 0; real faults are reported by name, with their fix, in time."""

import errno
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from heartseg.storage import filesystem
from helpers.experiments import ROOT
from helpers.wandb_server import KEY, serving
from jobs import doctor
from jobs.doctor import GIB, Finding, run_check
from jobs.support import ray_runtime


def wrong(check, *arguments) -> list[str]:
    """The problems that a check finds; each has a fix."""
    faults = [finding for finding in run_check("the check", partial(check, *arguments)) if finding.wrong]
    assert all(fault.fix for fault in faults)
    return [fault.wrong for fault in faults]


def test_the_doctor_checks_everything_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    found = {one.name: one for one in doctor.run(doctor.Options("", str(tmp_path / "new" / "runs"), "plain", megabytes=1))}
    assert {"python", "heartseg", "torch", "ray", "CPUs", "memory", "shared memory", "wandb", "runs storage"} <= set(found)
    speeds = found["runs storage"].numbers
    assert speeds["write_mb_per_s"] > 0 and speeds["read_mb_per_s"] > 0
    assert list(tmp_path.iterdir()) == [] and "checking memory" in capsys.readouterr().err


WITHOUT_TORCH = """
import importlib.metadata as metadata, runpy, sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing)
metadata.version = lambda name, real=metadata.version: real("no-such-package" if name == "torch" else name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_missing_torch_is_reported_the_other_checks_still_run_and_only_json_is_on_stdout():
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "jobs" / "doctor.py"), "--launcher", "plain", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    output = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in output["findings"]}
    assert done.returncode == 1 and output["ok"] is False
    assert found["torch"]["wrong"] == "torch is not installed." and "pip install" in found["torch"]["fix"]
    assert not found["ray"]["wrong"] and {"CPUs", "shared memory"} <= set(found)


def test_the_table_ends_with_what_is_wrong_and_its_fix(monkeypatch, capsys):
    healthy = [Finding("python", "3.11"), Finding("torch", "2.15")]
    assert doctor.findings_text(healthy).endswith("Nothing is wrong.")
    monkeypatch.setattr(doctor, "run", lambda options: [*healthy, Finding("ray", "–", "ray is not installed.", "Install it.")])
    with pytest.raises(SystemExit) as stopped:
        doctor.job([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["! ray is not installed.", "  Install it."] and "! ray     –" in lines and stopped.value.code == 1


def test_a_check_that_fails_keeps_what_it_found_and_adds_a_finding():
    def breaks():
        yield Finding("memory", "8 GiB")
        raise ZeroDivisionError("by zero")

    found = run_check("memory", breaks)
    assert found[0].found == "8 GiB" and "ZeroDivisionError: by zero" in found[1].wrong


def test_the_containers_limits_count(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (cpus,) = doctor.check_processors(str(tmp_path))
    assert "may use 0.5 of" in cpus.wrong and "OMP_NUM_THREADS=1" in cpus.fix
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert wrong(doctor.check_processors, str(tmp_path)) == []
    group = tmp_path / "sys/fs/cgroup"
    for folder in (tmp_path / "proc", group):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {8 * 2**20} kB\nMemAvailable: {6 * 2**20} kB\n")
    (group / "memory.max").write_text(f"{3 * GIB}\n")
    (group / "memory.current").write_text(f"{2.5 * GIB:.0f}\n")
    (group / "memory.stat").write_text(f"inactive_file {GIB}\n")
    assert "1.5 GiB of memory is free" in wrong(doctor.check_memory, str(tmp_path))[0]  # a file cache gives way
    (group / "memory.max").write_text("max\n")
    assert wrong(doctor.check_memory, str(tmp_path)) == []


def test_a_full_disk_and_a_small_or_missing_shared_memory_are_reported(tmp_path, monkeypatch):
    def publish(path: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "full", path)

    monkeypatch.setattr(filesystem, "publish", publish)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB // 10))
    problem = wrong(doctor.check_round_trip, str(tmp_path), 1)[0]
    assert "No space left on device" in problem and "free up space" in problem
    assert f"0.1 GiB of the disk of {tmp_path}/runs" in wrong(doctor.check_disk, "disk", f"{tmp_path}/runs")[0]
    (found,) = doctor.check_shared_memory(str(tmp_path))
    assert str(tmp_path) in found.wrong and "--shm-size" in found.fix
    assert "0.0 GiB of /nowhere/shm" in wrong(doctor.check_shared_memory, "/nowhere/shm")[0]


def test_storage_that_cannot_be_written_or_read_is_named_and_left_as_it_was(s3, shards, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for folder, problem in ((f"{tmp_path}/file/runs", "file/runs"), ("/proc/nowhere", "/proc/nowhere"),
                            ("s3://no-such-bucket/doctor", "bucket that does not exist")):  # fmt: skip
        assert problem in wrong(doctor.check_round_trip, folder, 1)[0]
    assert wrong(doctor.check_round_trip, "s3://bucket/doctor", 1) == []
    assert filesystem.list_names("s3://bucket/doctor") == []
    (found,) = doctor.check_shards(shards)
    assert found.numbers["read_mb_per_s"] > 0
    assert "holds no finished shards" in wrong(doctor.check_shards, str(tmp_path))[0]


@pytest.mark.parametrize(
    ("server", "fault"),
    [
        (serving, None),
        (partial(serving, failure="silent"), "cannot be reached: no answer within 0.5 s"),
        (partial(serving, failure="error"), "HTTP 500"),
        (lambda: nullcontext(SimpleNamespace(url="http://127.0.0.1:9")), "cannot be reached"),  # nothing listens there
        (partial(serving, failure="refusal"), "refuses the key"),
    ],
)
def test_wandb_is_asked_for_a_limited_time_its_faults_are_named_and_the_key_is_never_shown(server, fault, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", f"{KEY}\n")  # as a secret that is mounted from a file
    monkeypatch.setattr(doctor, "WANDB_TIMEOUT_S", 0.5)
    with server() as there:
        monkeypatch.setenv("WANDB_BASE_URL", there.url)
        (found,) = doctor.check_wandb()
    assert KEY not in str(found)
    assert (fault in found.wrong and found.fix) if fault else (not found.wrong and "accepts the key" in found.found)


def test_a_stalled_address_lookup_is_limited_too_and_skipped_without_a_key(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(doctor, "WANDB_TIMEOUT_S", 0.1)
    is_over = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments: is_over.wait(20) and [])
    assert wrong(doctor.check_wandb) == []
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert "no answer within 0.1 s" in wrong(doctor.check_wandb)[0] and not is_over.is_set()
    is_over.set()


def test_another_version_on_another_node_and_a_wrong_sum_are_reported():
    found = [replace(one, found="0.1") if one.name == "torch" else one for one in doctor.check_versions()]
    row, fault = doctor.describe_node("node b", [*found, Finding("CPUs", "3")])
    assert "torch: 0.1" in row.found and row.found.endswith("CPUs: 3") and fault.fix
    assert fault.wrong == f"node b: torch is 0.1 there but {importlib.metadata.version('torch')} here."
    report = {"bytes": 8 << 20, "seconds": 2.0, "rounds": 100, "is_right": False, "backend": "gloo"}
    found = doctor.bandwidth(2, report | {"machines": [("host4", "CPU"), ("host5", "CPU")]})
    assert "sum over the workers was wrong" in found.wrong and found.fix and "2 on 2 hosts (CPU)" in found.found


@pytest.mark.slow
def test_workers_of_an_autoscaled_cluster_ask_for_the_gpus_that_may_come(ray_session):
    """The cluster's plan, as reported to Ray by an autoscaler, has a GPU node, but none is running."""
    client = ray_runtime.ray_private("ray._private.worker.global_worker").gcs_client
    new_plan = ray_runtime.ray_private("ray.core.generated.autoscaler_pb2").ClusterConfig
    plan = new_plan()
    assert ray_runtime.worker_resources(1).keys() == {"CPU"}
    group = plan.node_group_configs.add(name="gpu", max_count=4)
    group.resources["CPU"], group.resources["GPU"] = 4, 1
    try:
        client.report_cluster_config(plan.SerializeToString())
        assert ray_runtime.worker_resources(1) == {"GPU": 1, "CPU": 1}
    finally:
        client.report_cluster_config(new_plan().SerializeToString())
    assert ray_runtime.worker_resources(1).keys() == {"CPU"}
