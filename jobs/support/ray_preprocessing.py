"""Writes the parts of shards as Ray tasks."""

import socket
from collections.abc import Iterator

import ray

from heartseg.errors import StorageError, UserError, io_errors_as_user_errors, require
from heartseg.shards import writer
from jobs.support import ray_runtime
from jobs.support.command_line import log

# A part takes seconds; after this time without one, a log line gives the likely reason.
SECONDS_OF_SILENCE = 60


def write_parts_with_ray(tasks: list[tuple], workers: int) -> Iterator[dict]:
    """The records of all parts as they finish; each worker writes one part at a time."""
    ray_runtime.start_ray(workers)
    write_part = ray.remote(num_cpus=1, max_retries=ray_runtime.MAX_TRIES)(_write_part)
    waiting, running = list(reversed(tasks)), []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(write_part.remote(*waiting.pop()))
        done, running = ray.wait(running, timeout=SECONDS_OF_SILENCE)
        if not done:
            free, total = (resources.get("CPU", 0) for resources in (ray.available_resources(), ray.cluster_resources()))
            message = "No part was finished for a while: %d of the cluster's %d CPUs are free; other jobs may use the rest."
            log.info(message, free, total)
        for record in ray.get(done):
            if "error" in record:
                raise record["error"]
            yield record


def _write_part(source, out: str, *rest) -> dict:
    """A part's record, or a user's error under `error`, since Ray would wrap a raised one in a traceback."""
    try:
        with io_errors_as_user_errors(out):
            # On another machine, an unmounted source would look like patients without files.
            node = socket.gethostname()
            require(source.is_there(), f"The source {source.path} is missing on {node}: every node must see --source.")
            return writer.write_part(source, out, *rest)
    except (UserError, StorageError) as error:
        return {"error": error}
