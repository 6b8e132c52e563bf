"""What every job shares: its command line, the sentences that users see, and its Ray."""

import contextlib
import importlib
import io
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from heartseg import storage
from heartseg.config import Experiment, from_json
from heartseg.errors import StorageError, UserError, refusals_told
from heartseg.recipes import RECIPES

log = logging.getLogger("heartseg.jobs")
ROOT = Path(__file__).resolve().parents[1]
# A worker group that cannot start, or that dies, is tried this often and not for ever.
MAX_TRIES = 3
# Marks a part of a dataclass whose fields are flags without the part's name before them.
FLAT = tyro.conf.arg(name="")
PLACEMENT = "placement_group"
# Every submitted job has it: the configuration that Ray gives to its driver.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Names of environment variables whose values nobody else should see.
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?$", re.IGNORECASE)
MISTAKE = 2
# EX_TEMPFAIL of sysexits.h, a submitted job's word to whoever follows it: a store was away, and another try may help.
STORE_AWAY = 75


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: what is under way becomes complete on the way out. A wait of Ray's ends for no other kind."""


def main(job: Callable[[Sequence[str]], None]) -> None:
    """Run a job; a user's mistake or a disk that refuses becomes one sentence and exit code 2.

    A submitted job whose object store was away ends with 75 instead.
    """
    if job.__module__ == "__main__":
        # What Ray sends to workers must be importable there: of a script's own classes it would send all they hold.
        job = importlib.import_module(f"jobs.{Path(job.__code__.co_filename).stem}").job
    show_log()
    heed_sigterm()
    warn_of_secrets()
    try:
        with refusals_told():
            job(sys.argv[1:])
    except UserError as error:
        is_worth_a_try = isinstance(error, StorageError) and JOB_CONFIG in os.environ
        leave(str(error), STORE_AWAY if is_worth_a_try else MISTAKE)
    except KeyboardInterrupt:
        # Ray raises one of its own in the place of ours; after SIGTERM, ours has set the signal aside.
        terminated = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        leave("stopped; the same command goes on from here.", 143 if terminated else 130)


def leave(sentence: str, code: int) -> None:
    """End the process with a sentence."""
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(code)


def heed_sigterm() -> None:
    """Make SIGTERM an exception in the main thread, so that a job ends in order."""

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the second one must not disturb the end
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def warn_of_secrets() -> None:
    """Say which secrets stand in a submitted job's runtime_env: Ray shows it to whoever sees the dashboard."""
    given = json.loads(os.environ.get(JOB_CONFIG) or "{}").get("runtime_env", {}).get("env_vars", {})
    for name in sorted(name for name, value in given.items() if value and SECRET.search(name)):
        log.warning(
            "%s stands in this job's runtime_env, which Ray's dashboard shows: set it where the cluster starts instead "
            "(cluster/README.md, Secrets), and change it if others could see it.",
            name,
        )


def show_log() -> None:
    """Print heartseg's log lines, here and in Ray's workers."""
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s")
    logging.getLogger("heartseg").setLevel(logging.INFO)


def parse(options: Any, argv: Sequence[str], prog: str, description: str) -> tuple[Experiment, Any]:
    """A recipe (`seed` where none is named) or `--config FILE`, then changes to it: the experiment and the job's options.

    `options` is an instance of the job's own dataclass. Raises UserError for whatever is wrong on the line.
    """
    experiment, rest = _pick_recipe(_spell_out_elastic(list(argv)))

    fields = [("experiment", Annotated[Experiment, FLAT]), ("options", Annotated[type(options), FLAT])]
    kind = make_dataclass("Command", fields, frozen=True)
    shown = f"python jobs/{prog} [{'|'.join(RECIPES)}|--config FILE]"
    command = parse_line(kind, rest, shown, description, default=kind(experiment, options))
    return with_environment(command.experiment), command.options


def _spell_out_elastic(argv: list[str]) -> list[str]:
    """`--workers 1:4` as `--workers 4 --min-workers 1`."""
    for place, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag != "--workers":
            continue
        taken = 1 if equals else 2
        fewest, colon, most = (value if equals else "".join(argv[place + 1 : place + 2])).partition(":")
        if colon:
            return [*argv[:place], "--workers", most, "--min-workers", fewest, *argv[place + taken :]]
    return argv


def _pick_recipe(argv: list[str]) -> tuple[Experiment, list[str]]:
    if argv and argv[0] == "--config":
        if len(argv) < 2:
            raise UserError("--config needs the file of a complete experiment.")
        value = storage.read_json(argv[1])
        if not isinstance(value, dict):
            raise UserError(f"--config {argv[1]} is no experiment: give a JSON object, as a run's experiment.json is.")
        # A run's experiment.json and a checkpoint's card hold the experiment under this key.
        return from_json(value.get("experiment", value), origin=argv[1]), argv[2:]
    if not argv or argv[0].startswith("-"):
        return RECIPES["seed"](), argv
    if argv[0] not in RECIPES:
        raise UserError(f"There is no recipe {argv[0]!r}: take one of {', '.join(RECIPES)}, or --config FILE.")
    return RECIPES[argv[0]](), argv[1:]


def parse_line(kind: type, argv: Sequence[str], prog: str, description: str, default: Any = None) -> Any:
    """tyro's command line for a dataclass, its boxed errors made one sentence."""
    errors = io.StringIO()
    arguments = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=list(argv), prog=prog, description=description, **arguments)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("│ ") for line in errors.getvalue().splitlines() if line.startswith("│")]
        sentence = " ".join(lines).split(" ───")[0].strip("─ ") or "the command line cannot be read"
        raise UserError(f"{sentence.rstrip('.')}; --help lists what there is.") from None


def with_environment(experiment: Experiment) -> Experiment:
    """Paths that were not given taken from the environment, and all made absolute."""
    defaults = {"source": "HEARTSEG_SOURCE", "data": "HEARTSEG_DATA", "runs": "HEARTSEG_RUNS"}
    paths = {name: getattr(experiment, name) or os.environ.get(variable, "") for name, variable in defaults.items()}
    if JOB_CONFIG not in os.environ:  # whose folder is a copy
        paths["runs"] = paths["runs"] or "runs"
    paths["out"] = experiment.out
    return replace(experiment, **{name: absolute(path, name) for name, path in paths.items() if path})


def absolute(path: str, name: str) -> str:
    """A path made absolute; inside a Ray job, whose folder is an uploaded copy, a relative one is refused."""
    if JOB_CONFIG in os.environ and not (storage.is_uri(path) or os.path.isabs(path)):
        raise UserError(f"--{name} {path} is relative, and a submitted job runs in a copy of the folder: give it in full.")
    return storage.absolute(path)


def require(value: str, flag: str, meaning: str) -> str:
    """A path that a job cannot do without; raises UserError where it is missing."""
    if not value:
        raise UserError(f"{flag} is missing: give {meaning}.")
    return value


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

    storage.publish(storage.join(path, PLACEMENT), ray.util.get_current_placement_group().id.hex().encode())


def free_placement(path: str) -> None:
    """Give back what the last workers of a run had reserved, which Ray Train may not where it was ended from outside.

    It leaves that to an actor that dies of one failed question to the cluster, which then stays full for ever.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    noted = storage.join(path, PLACEMENT)
    if storage.exists(noted):
        group = PlacementGroup(PlacementGroupID(bytes.fromhex(storage.read_bytes(noted).decode())))
        remove_placement_group(group)
        storage.remove(noted)
