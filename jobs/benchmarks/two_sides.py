"""Measures two implementations (the sides) in turn in one run, and prints them side by side in a table."""

import contextlib
import datetime
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from heartseg.reporting import text_tables

CPU = torch.device("cpu")


class Cost(NamedTuple):
    """Wall-clock seconds, CPU seconds of this process, and peak memory."""

    wall_s: float
    cpu_s: float
    peak_gb: float


class Row(NamedTuple):
    """One measurement of ours, and the baseline's, if any."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    note: str = ""


class Table(NamedTuple):
    """Measurements of two sides, named by `sides`: the baseline, then ours."""

    title: str
    sides: tuple[str, str]
    rows: list[Row]

    def show(self, device: torch.device = CPU) -> None:
        """Print the table with a column for the ratio of ours to the baseline."""
        rows = [(r.name, r.baseline, r.value, r.value / r.baseline if r.baseline else None, r.unit, r.note) for r in self.rows]
        print_table(self.title, ("", *self.sides, "ratio", "", ""), rows, device)


def print_table(title: str, heading: Sequence[str], rows: Iterable[Sequence], device: torch.device = CPU) -> None:
    """Print a table below the date, the processor or GPU, the number of threads and the version of torch."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else found[1] if found else platform.machine()
    table = text_tables.table_text((title, tuple(heading), [tuple(map(shown, row)) for row in rows]))
    threads = torch.get_num_threads()
    print(f"\n{datetime.date.today()}, {name}, {threads} threads, torch {torch.__version__}\n{table}", flush=True)


def shown(value: str | float | None) -> str:
    """A cell: four significant digits of a number, as many as a measurement can resolve; empty for None."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def in_turn(sides: Mapping[Any, Callable[[], Any]], repeats: int, device: torch.device = CPU) -> list[Cost]:
    """Run each side `repeats` times, after an uncounted run; returns each side's median costs."""
    # The sides take turns, in alternating order, so that other load on the machine slows them equally.
    costs: dict[Any, list[Cost]] = {name: [] for name in sides}
    for turn in range(1 + repeats):
        for name in sides if turn % 2 else reversed(sides):
            costs[name].append(cost_of(sides[name], device))
    return [Cost(*map(statistics.median, zip(*found[1:], strict=True))) for found in costs.values()]


def cost_of(action: Callable[[], Any], device: torch.device = CPU) -> Cost:
    """The cost of an action, including the device's work; the peak is the whole process's if Linux cannot reset it."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    if on_gpu:
        torch.cuda.synchronize()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, peak_memory_gb(device))


def peak_memory_gb(device: torch.device = CPU) -> float:
    """The peak memory of the GPU, or the peak resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # getrusage would also count the parent process.
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
