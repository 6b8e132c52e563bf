"""What is asked of a cluster, and what a training says when it ends there; no Ray is started."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from heartseg.errors import StorageError, UserError
from jobs import train
from jobs.support import ray_runtime


@pytest.mark.parametrize(
    ("nodes", "workers", "cores"),
    [
        ([8, 8], 3, 4),  # five each would leave the third worker 3 + 3
        ([8, 8], 2, 8),
        ([8, 8], 4, 4),
        ([8], 3, 2),
        ([3, 3, 3], 4, 1),
        ([16, 2], 2, 8),
        ([2, 2], 1, 2),
        ([2], 5, 1),
        ([], 2, 1),
        ([0.5, 4.0], 2, 2),
    ],
)
def test_cores_are_shared_out_so_that_every_worker_has_room_on_one_node(nodes, workers, cores):
    assert ray_runtime.share_of_cores(nodes, workers) == cores


def died(*ranks: int, **others: Exception) -> WorkerGroupError:
    """What Ray Train raises when the processes of some workers are gone, with what others raised over it."""
    gone = {rank: WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError()) for rank in ranks}
    return WorkerGroupError("...", gone | {int(rank.strip("_")): error for rank, error in others.items()})


@pytest.mark.parametrize(
    ("error", "who"),
    [(died(1, _0=RuntimeError("Connection closed by peer")), "Worker 1 of 3 died"), (died(2, 0), "Workers 0, 2 of 3 died")],
)
def test_workers_that_die_time_and_again_are_a_sentence_that_names_them(error, who):
    with pytest.raises(train.WorkersDied, match=rf"{who}, after 3 restarts: memory may be short.*same command goes on"):
        train.raise_sentence(error, 3, {"CPU": 1})


def test_what_a_worker_says_comes_before_the_death_of_others_and_a_fault_of_ours_stays_one():
    with pytest.raises(UserError, match="no bucket") as caught:
        train.raise_sentence(died(1, _0=StorageError("no bucket")), 2, {"CPU": 1})
    assert not isinstance(caught.value, train.WorkersDied)
    with pytest.raises(WorkerGroupError):
        train.raise_sentence(died(_0=KeyError("a bug")), 2, {"CPU": 1})
