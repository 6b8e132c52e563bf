"""Requests to a cluster, reports of dead workers, and the private names that Ray must still have; no Ray starts."""

import re

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from heartseg.errors import StorageError, UserError
from jobs.support import ray_runtime, ray_training
from jobs.support.ray_runtime import free_port
from jobs.support.ray_training import WorkersDied


@pytest.mark.parametrize("name", ray_runtime.RAY_PRIVATE)
def test_this_version_of_ray_has_each_private_name_that_we_use(name):
    assert ray_runtime.ray_private(name) is not None


def test_a_private_name_that_ray_has_moved_is_reported_with_what_to_do(monkeypatch):
    monkeypatch.setitem(ray_runtime.RAY_PRIVATE, "ray._private.gone.Thing", "Find it in ray.util.")
    with pytest.raises(ImportError, match=r"no ray._private.gone.Thing. Find it in ray.util."):
        ray_runtime.ray_private("ray._private.gone.Thing")


@pytest.mark.parametrize(
    ("nodes", "workers", "cores"),  # of [8, 8] five each would leave the third worker 3 + 3
    [([8, 8], 3, 4), ([8, 8], 2, 8), ([8, 8], 4, 4), ([8], 3, 2), ([3, 3, 3], 4, 1), ([16, 2], 2, 8), ([2, 2], 1, 2),
     ([2], 5, 1), ([], 2, 1), ([0.5, 4.0], 2, 2)],
)  # fmt: skip
def test_cores_are_shared_out_so_that_every_worker_fits_on_one_node(nodes, workers, cores):
    assert ray_runtime.share_of_cores(nodes, workers) == cores


def test_workers_ask_for_the_gpus_that_there_are_or_may_be_and_otherwise_for_cores(monkeypatch):
    now, planned = {"CPU": [4.0]}, {}
    monkeypatch.setattr(ray_runtime, "_on_each_node", lambda kind: now.get(kind, [0.0]))
    monkeypatch.setattr(ray_runtime, "_after_autoscaling", lambda kind: planned.get(kind, 0))
    assert ray_runtime.worker_resources(2) == {"CPU": 2} and ray_runtime.room_for(2) == 2
    planned |= {"GPU": 4, "CPU": 20}
    assert ray_runtime.worker_resources(2) == {"GPU": 1, "CPU": 1} and ray_runtime.room_for(1) == 4
    assert ray_runtime.worker_resources(8, 0.25) == {"GPU": 0.25, "CPU": 1}


@pytest.mark.parametrize(
    ("gpus", "cores", "planned", "workers", "gpu", "room"),
    [
        ([4], [8], {}, 1, 1, 4), ([4], [8], {}, 3, 1, 1), ([0, 1, 1], [64, 4, 4], {}, 1, 0.25, 8),
        ([0, 1, 1], [64, 4, 4], {}, 1, 0.1, 8), ([1], [64], {}, 1, 0.3, 3), ([0], [8], {}, 2, 0.25, 4),
        # The head of a cluster that may start four machines of one GPU and four cores.
        ([0], [2], {"GPU": 4, "CPU": 18}, 1, 0.2, 16), ([0], [2], {"GPU": 4, "CPU": 18}, 1, 1, 4),
    ],
)  # fmt: skip
def test_trials_that_share_gpus_each_have_a_core_on_the_same_node(gpus, cores, planned, workers, gpu, room, monkeypatch):
    monkeypatch.setattr(ray_runtime, "_on_each_node", lambda kind: {"GPU": gpus, "CPU": cores}[kind])
    monkeypatch.setattr(ray_runtime, "_after_autoscaling", lambda kind: planned.get(kind, 0))
    assert ray_runtime.room_for(workers, gpu) == room


def test_more_workers_than_this_machines_gpus_are_refused_but_not_on_a_cluster_that_may_grow(monkeypatch):
    monkeypatch.setattr(ray_runtime, "_on_each_node", lambda kind: [1.0])
    monkeypatch.setattr(ray_runtime, "choose_device", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray_runtime.check_own_gpus(1)
    with pytest.raises(
        UserError, match=r"^This machine has 1 GPU for 2 workers: use --workers 1, or set CUDA_VISIBLE_DEVICES="
    ):
        ray_runtime.check_own_gpus(2)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray_runtime.check_own_gpus(2)


def died(*ranks: int, **others: Exception) -> WorkerGroupError:
    """Ray Train's error after the processes of some workers died, with the errors that others raised because of it."""
    unhealthy = ray_runtime.ray_private("ray.train.v2._internal.exceptions.WorkerHealthCheckFailedError")
    gone = {rank: unhealthy("A worker health check failed.", ActorDiedError()) for rank in ranks}
    return WorkerGroupError("...", gone | {int(rank.strip("_")): error for rank, error in others.items()})


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (died(1, _0=RuntimeError("closed by peer")), WorkersDied, "Worker 1 of 3 died, after 3 restarts: memory may be short"),
        (died(2, 0), WorkersDied, "Workers 0, 2 of 3 died.*rerun the same command to resume"),
        (died(1, _0=StorageError("no bucket")), StorageError, "no bucket"),  # a worker's own message comes first
        (died(_0=KeyError("a bug")), WorkerGroupError, r"\.\.\."),
    ],
)
def test_dead_workers_are_named_and_a_workers_own_message_comes_before_the_death_of_others(error, raised, message):
    with pytest.raises(raised, match=message) as caught:
        ray_training.raise_user_error(error, 3, {"CPU": 1})
    assert isinstance(caught.value, WorkersDied) == (raised is WorkersDied)
    assert isinstance(caught.value, UserError) == (raised in (UserError, WorkersDied))


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:{port}", "ray://127.0.0.1:{port}", "[::1]:{port}", "nonsense"])
@pytest.mark.parametrize("left_behind", [True, False])
def test_an_address_without_a_cluster_is_a_one_line_error_at_once(address, left_behind, tmp_path, monkeypatch):
    find = ray_runtime.ray_private("ray._private.services.canonicalize_bootstrap_address")
    monkeypatch.setitem(find.__globals__, "find_gcs_addresses", set)  # other clusters of this machine
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    port = free_port()
    if left_behind:  # by a killed cluster, for `auto`
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    address = address.format(port=port)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS={re.escape(address)}: cannot join a cluster.*unset RAY_ADDRESS"):
        ray_runtime.start_ray(1)
