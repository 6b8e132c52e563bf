"""Ray for the jobs: starts or joins a cluster, counts what it has room for, frees what a dead run reserved."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence

from heartseg.errors import UserError
from heartseg.storage import filesystem
from jobs.support.command_line import JOB_CONFIG, ROOT, log

# A worker group that cannot start, or that dies, is tried this often and not for ever.
MAX_TRIES = 3
PLACEMENT = "placement_group"


def start_ray(workers: int) -> None:
    """Join the cluster of RAY_ADDRESS (every submitted job has one), or start a Ray of this process's own."""
    import ray

    # How often Ray Train and Tune take a report. An epoch that ends before the last was taken waits: up to 2 s else.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray's watch for nodes that are to be taken back is one more process at each start of the workers, and an error in the log.
    # Without it a run trains up to the node's last second, and goes on from its last epoch as after any loss of a node.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    if ray.is_initialized():
        return
    # The workers of a Ray of our own import heartseg and jobs from here, wherever the command was typed.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    cores = os.cpu_count() or 1
    if address == "local" and workers > cores:
        raise UserError(f"This machine has {cores} cores for {workers} workers: use --workers {cores} or fewer.")
    # Ray asks its own dashboard for the state of a training run; without it, the log fills with failed questions.
    handler = signal.getsignal(signal.SIGTERM)
    own, asked = {}, os.environ.get("RAY_API_SERVER_ADDRESS")
    if address == "local":
        own = {"include_dashboard": True, "dashboard_port": free_port()}
        # Its processes would ask whichever cluster this machine had last, by a file that a killed one leaves.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{own['dashboard_port']}"
    elif JOB_CONFIG not in os.environ:
        own = {"runtime_env": {"working_dir": str(ROOT)}}  # as a submitted job has it: every node runs this code
    ray.init(address=address, logging_level=logging.WARNING, **own)
    if address == "local":  # and children of this process, which may join another cluster, not this one
        os.environ.pop("RAY_API_SERVER_ADDRESS")
        if asked:
            os.environ["RAY_API_SERVER_ADDRESS"] = asked
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init takes the signal for itself
    resources = ray.cluster_resources()
    slots = int(resources.get("GPU", 0) or resources.get("CPU", 0))
    if workers > slots:
        log.info("The cluster has room for %d of %d workers: waiting for nodes.", slots, workers)


def free_port() -> int:
    """A port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def worker_resources(workers: int) -> dict[str, float]:
    """What one of `workers` asks of the cluster: a GPU where there are any or may come, else its share of the cores."""
    import ray

    total = ray.cluster_resources()
    # An autoscaled cluster has no GPU until one is asked for.
    to_come = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    if max(total.get("GPU", 0), to_come.get("GPU", 0)) >= 1:
        return {"GPU": 1, "CPU": 1}
    return {"CPU": share_of_cores(_on_each_node("CPU"), workers)}


def share_of_cores(nodes: Sequence[float], workers: int) -> int:
    """Cores for each of `workers` on nodes of so many: as many as leave all of them room, and at least 1.

    A worker lives on one node, so that what is over on two of them is nobody's.
    """
    even = min(int(max(nodes, default=1)), int(sum(nodes) // workers))
    return next((each for each in range(even, 1, -1) if sum(int(cores // each) for cores in nodes) >= workers), 1)


def _on_each_node(kind: str) -> list[float]:
    """What each living node has of a resource."""
    import ray

    return [node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]]


def room_for(workers: int) -> int:
    """How many runs of `workers` each the cluster has room for, or may grow to: by GPUs where there are any, else by cores."""
    import ray

    to_come = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    # A worker's GPU and its core are whole ones of one node.
    gpus, cores = (max(sum(map(int, _on_each_node(kind))), int(to_come.get(kind, 0))) for kind in ("GPU", "CPU"))
    return max(1, (gpus or cores) // workers)


def note_placement(path: str) -> None:
    """Write down in a run's folder which reservation of the cluster this worker lives in."""
    import ray

    filesystem.publish(filesystem.join(path, PLACEMENT), ray.util.get_current_placement_group().id.hex().encode())


def free_placement(path: str) -> None:
    """Give back what the last workers of a run had reserved, which Ray Train may not where it was ended from outside.

    It leaves that to an actor that dies of one failed question to the cluster, which then stays full for ever.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    noted = filesystem.join(path, PLACEMENT)
    if filesystem.exists(noted):
        group = PlacementGroup(PlacementGroupID(bytes.fromhex(filesystem.read_bytes(noted).decode())))
        remove_placement_group(group)
        filesystem.remove(noted)
