"""Ray for the jobs: starts or joins a cluster, counts the workers that fit, and frees a dead run's reservations."""

import logging
import os
import pkgutil
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from heartseg.errors import UserError, require
from heartseg.models.devices import choose_device
from heartseg.storage import filesystem
from heartseg.training.distributed import TIMEOUT_S
from jobs.support.command_line import JOB_CONFIG, ROOT, counted, first_line, log

# Times that Ray restarts a worker group that cannot start or that dies.
MAX_TRIES = 3
# Seconds between checks for nodes that an elastic run could grow onto.
SECONDS_TO_GROW = 30
# Seconds for the head of a cluster to accept a connection.
CONNECT_TIMEOUT_S = 10
PLACEMENT = "placement_group"  # file in a run's folder that names its workers' reservation on the cluster
UPLOAD_LOGGER, REPORT_LOGGER = "ray._private.runtime_env.packaging", "ray.train.v2._internal.execution.context.__file__"
AUTH_LOGGER = "ray._private.authentication.authentication_token_setup"
# Objects without a public name in Ray: their purpose here, and where to look if a new version has moved them.
RAY_PRIVATE = {
    "ray._private.state.state": "An autoscaler's maximum: find get_max_resources_from_cluster_config, or do without.",
    "ray._raylet.PlacementGroupID": "Frees a trial's workers: see the type of ray.util.get_current_placement_group().id.",
    REPORT_LOGGER: "A logger to silence: find what logs `Reporting training result`.",
    "ray._private.services.canonicalize_bootstrap_address": "Finds this machine's cluster: see ray.init('auto').",
    AUTH_LOGGER: "A logger to silence: find what logs `Token authentication is enabled`.",
    UPLOAD_LOGGER: "A logger to silence: find what logs `Ignoring upload to cluster`.",
    "ray.train.v2._internal.exceptions.WorkerHealthCheckFailedError": "Tests make one: see what wraps a dead worker's error.",
    "ray._private.worker.global_worker": "Tests announce an autoscaler's plan with its gcs_client: find another client.",
    "ray.core.generated.autoscaler_pb2": "Tests announce an autoscaler's plan: find the new protobuf module.",
    "ray._private.ray_constants": "Reaches a cluster on 127.0.0.1: see what ray.init makes of that address.",
}


def ray_private(name: str) -> Any:
    """An object of RAY_PRIVATE; raises ImportError with its explanation if this version of Ray lacks it."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"This version of Ray has no {name}. {RAY_PRIVATE[name]}") from error


def cluster_address() -> str:
    """The cluster to join, from RAY_ADDRESS (set in every submitted job); `local` means this process's own Ray."""
    return os.environ.get("RAY_ADDRESS") or "local"


def start_ray(workers: int) -> None:
    """Join the cluster at RAY_ADDRESS, or start Ray for this process alone; raises UserError if no cluster answers there."""
    # How often Ray Train and Tune collect reports: each waits until the last is collected, by default up to 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray's watcher for nodes about to be preempted costs one more process each time workers start, and logs an error.
    # Without it, a run resumes from its last checkpoint when the node is lost, as after any such loss.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    if ray.is_initialized():
        return
    # The workers of our own Ray import heartseg and jobs from here, wherever the command was started.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    handler, address = signal.getsignal(signal.SIGTERM), cluster_address()
    if address == "local":
        cores = os.cpu_count() or 1
        require(workers <= cores, f"This machine has only {cores} cores for {workers} workers: use --workers {cores} or fewer.")
        _start_own_ray()
    else:
        _join_cluster(address)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init replaces the handler
    resources = ray.cluster_resources()
    slots = int(resources.get("GPU", 0) or resources.get("CPU", 0))
    if workers > slots:
        log.info("The cluster has room for %d of %d workers: waiting for nodes.", slots, workers)


def _start_own_ray(tries: int = 2) -> None:
    asked, port = os.environ.pop("RAY_API_SERVER_ADDRESS", None), free_port()
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "-1":  # hides every GPU from CUDA, but Ray counts it as one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Its processes would otherwise contact this machine's last cluster, whose address a killed one leaves in a file.
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    logging.getLogger(AUTH_LOGGER).setLevel(logging.ERROR)  # it announces a token that only this process needs
    # Ray asks its dashboard for the state of a training run; without one, the log would fill with failed requests.
    try:
        ray.init(address="local", logging_level=logging.WARNING, include_dashboard=True, dashboard_port=port)
    except Exception as error:  # Ray waits half a minute for its own node, which no setting changes, and raises just Exception
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        problem = "Ray did not start within 30 s, twice: other programs may be keeping this machine busy"
        require(tries > 1, f"{problem}. Wait until they end, then rerun the same command to resume.")
        _start_own_ray(tries - 1)
    # A child of this process may join another cluster and must not inherit this one.
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)
    if asked:
        os.environ["RAY_API_SERVER_ADDRESS"] = asked


def _join_cluster(address: str) -> None:
    """Join a cluster; raises UserError if it does not answer, which Ray would report only after minutes."""
    found = address
    try:
        if address == "auto":
            found = ray_private("ray._private.services.canonicalize_bootstrap_address")(address)
        host, _, port = found.rpartition("/")[2].rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        if found in (f"127.0.0.1:{port}", f"localhost:{port}"):
            try:  # Ray looks for it at the machine's own address
                socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=2).close()
            except OSError:  # it listens on loopback alone
                ray_private("ray._private.ray_constants").ENABLE_RAY_CLUSTER = False
        # Every node must run this code, as it does for a submitted job.
        code = {} if JOB_CONFIG in os.environ else {"runtime_env": {"working_dir": str(ROOT)}}
        ray.init(address=found, logging_level=logging.WARNING, **code)
    except (OSError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        fix = "Correct the address, start the cluster, or unset RAY_ADDRESS to use this machine alone."
        raise UserError(f"RAY_ADDRESS={address}: cannot join a cluster there ({first_line(error)}). {fix}") from error


def free_port() -> int:
    """A free port on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def worker_resources(workers: int, gpu: float = 1) -> dict[str, float]:
    """The resources of one of `workers`: a `gpu` or a part of one if the cluster has or may get any, otherwise some cores."""
    # An autoscaled cluster has no GPU until one is requested.
    if max(sum(_on_each_node("GPU")), _after_autoscaling("GPU")) >= 1:
        return {"GPU": gpu, "CPU": 1}
    return {"CPU": share_of_cores(_on_each_node("CPU"), workers)}


def share_of_cores(nodes: Sequence[float], workers: int) -> int:
    """Cores for each of `workers` on `nodes` with these numbers of cores: the most with which all fit, but at least 1."""
    # A worker is on one node, so cores left over on two nodes do not make another worker.
    even = min(int(max(nodes, default=1)), int(sum(nodes) // workers))
    return next((each for each in range(even, 1, -1) if sum(int(cores // each) for cores in nodes) >= workers), 1)


def check_own_gpus(workers: int) -> None:
    """Raise UserError if this process's own Ray has GPUs, but fewer than `workers`, or ones that PyTorch cannot use."""
    gpus = int(sum(_on_each_node("GPU")))
    if gpus and cluster_address() == "local":
        choose_device()
        fix = f"use --workers {gpus}, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        require(workers <= gpus, f"This machine has {counted(gpus, 'GPU')} for {workers} workers: {fix}.")


def room_for(workers: int, gpu: float = 1) -> int:
    """The number of runs of `workers` each that fit on the cluster, autoscaled if it can be; `gpu` as in `worker_resources`."""
    gpus, cores = ([*map(int, _on_each_node(kind))] for kind in ("GPU", "CPU"))
    most_gpus, most_cores = (int(_after_autoscaling(kind)) for kind in ("GPU", "CPU"))
    if not (sum(gpus) or most_gpus):
        return max(1, max(sum(cores), most_cores) // workers)
    # Each worker needs a whole core and its share of a single GPU, on the same node.
    each = int(1 / gpu)
    slots = sum(min(on_node * each, beside) for on_node, beside in zip(gpus, cores, strict=False))
    elsewhere = sum(beside for on_node, beside in zip(gpus, cores, strict=False) if not on_node)
    return max(1, max(slots, min(most_gpus * each, most_cores - elsewhere)) // workers)


def _on_each_node(kind: str) -> list[float]:
    return [node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]]


def _after_autoscaling(kind: str) -> float:
    """The most of a resource that the cluster's autoscaler can reach; 0 without an autoscaler."""
    return (ray_private("ray._private.state.state").get_max_resources_from_cluster_config() or {}).get(kind, 0)


def build_trainer(
    loop: Callable, config: dict, workers: int | tuple, resources: dict, folder: str, tries: int = MAX_TRIES, callbacks=()
) -> Any:
    """A Ray Train trainer for a function that every worker runs with `config`; two numbers in `workers` make it elastic."""
    # Ray Train's own Ctrl-C handler ends the process with code 1 and no message; every job has its own handler.
    trainer = type("Trainer", (TorchTrainer,), {"_register_sigint_handler": lambda self, controller: None})
    scaling = {"num_workers": workers, "resources_per_worker": resources, "use_gpu": "GPU" in resources}
    run = RunConfig(
        name=uuid.uuid4().hex[:8],  # new each time: the run directory decides what to resume, not Ray's snapshot
        storage_path=folder,
        failure_config=FailureConfig(max_failures=tries, controller_failure_limit=tries),
        # On a busy machine, Ray warns with a traceback of a request that it repeats; its log files keep every warning.
        logging_config=LoggingConfig(log_level="ERROR"),
        callbacks=list(callbacks),
    )
    scaling_config = ScalingConfig(**scaling, elastic_resize_monitor_interval_s=SECONDS_TO_GROW)
    ranks = TorchConfig(timeout_s=TIMEOUT_S)
    return trainer(loop, train_loop_config=config, torch_config=ranks, scaling_config=scaling_config, run_config=run)


def free_placement(path: str) -> None:
    """Release the resources that a run's last workers reserved."""
    # For a run ended from outside, Ray Train leaves this to an actor that dies after one failed request.
    noted = filesystem.join(path, PLACEMENT)
    if filesystem.exists(noted):
        number = ray_private("ray._raylet.PlacementGroupID")(bytes.fromhex(filesystem.read_bytes(noted).decode()))
        remove_placement_group(PlacementGroup(number))
        filesystem.remove(noted)
