"""A cluster of two small nodes on one machine that loses one and gets another, while an elastic run trains on it.

A script of its own, since `ray.cluster_utils.Cluster` and the tests' Ray cannot share a process.
"""

import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}

from ray.cluster_utils import Cluster

from heartseg.storage import filesystem
from heartseg.training import run_directory
from helpers.experiments import tiny_experiment
from jobs import train
from jobs.support import ray_runtime

EPOCHS = 60


def main(shards: str, folder: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    os.environ["RAY_ADDRESS"] = cluster.address
    ray_runtime.SECONDS_TO_GROW = 5
    base = tiny_experiment(data=shards, runs=folder, workers=2, min_workers=1)
    experiment = replace(base, train=replace(base.train, epochs=EPOCHS))
    # A node can be added from the main thread only.
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train.run, experiment, train.Options())
        disturb(cluster, nodes, folder)
        path = training.result()
    assert len(run_directory.read_record(path)) == EPOCHS


def disturb(cluster: Cluster, nodes: list, folder: str) -> None:
    wait(lambda: epochs(folder) >= 3)
    started = time.monotonic()
    cluster.remove_node(nodes[0], allow_graceful=False)
    before = epochs(folder)
    wait(lambda: epochs(folder) > before)
    print(f"shrink_seconds={time.monotonic() - started:.1f}", flush=True)
    cluster.add_node(num_cpus=1)
    started = time.monotonic()
    wait(lambda: worlds_of(folder)[-1] == 2)
    print(f"grow_seconds={time.monotonic() - started:.1f}", flush=True)


def run_of(folder: str) -> str:
    return filesystem.join(folder, filesystem.list_names(folder)[0])


def epochs(folder: str) -> int:
    return len(run_directory.read_record(run_of(folder))) if filesystem.list_names(folder) else 0


def worlds_of(folder: str) -> list[int]:
    return [epoch["workers"] for epoch in run_directory.read_record(run_of(folder))]


def wait(condition, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            os._exit(1)  # the training in its thread would hold the process
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
