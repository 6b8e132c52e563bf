"""A trace of a few training steps, for chrome://tracing or https://ui.perfetto.dev."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import profiler

from heartseg.storage import filesystem

# Steps that are left alone (compilation, the choice of kernels), watched without being kept, and kept.
SKIPPED, WARMUP, KEPT = 2, 1, 3


@contextmanager
def trace_steps(run: str) -> Iterator[Callable[[], None]]:
    """Trace steps 4 to 6 from here on into `profile/steps.json` below a run; what is yielded is called after each step."""

    def keep(trace: profiler.profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "steps.json")
            trace.export_chrome_trace(file)
            filesystem.publish(filesystem.join(run, "profile", "steps.json"), filesystem.read_bytes(file))

    activities = [profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(profiler.ProfilerActivity.CUDA)
    schedule = profiler.schedule(wait=SKIPPED, warmup=WARMUP, active=KEPT, repeat=1)
    with profiler.profile(activities=activities, schedule=schedule, on_trace_ready=keep) as trace:
        yield trace.step
