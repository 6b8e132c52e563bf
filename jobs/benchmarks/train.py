"""Training speed as one table: `python jobs/benchmark.py train`, or some sections, `--sections plain,metrics`."""

import importlib
import json
import os
import platform
import tempfile
from collections.abc import Sequence

import torch

from heartseg.errors import UserError
from heartseg.storage import filesystem
from jobs.benchmarks.train_bench import Bench, Options
from jobs.support import command_line

# Section -> the module and function that measure it; imported when it is its turn, since machines lack some packages.
SECTIONS = {
    "plain": ("train_plain", "measure"),
    "convolutions": ("train_steps", "measure_convolutions"),
    "metrics": ("train_steps", "measure_metrics"),
    "loader": ("train_steps", "measure_loader"),
    "peak": ("train_steps", "measure_peak"),
    "ray": ("train_launch", "measure_ray"),
    "workers": ("train_launch", "measure_workers"),
    "gpu": ("train_steps", "measure_gpu"),
}
CPU_ONLY = ("ray", "workers")


def run(options: Options) -> list[dict]:
    """Measure the sections one after the other, print each as it is done, and write `--out`; returns the rows."""
    names = list(SECTIONS) if options.sections == "all" else options.sections.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise UserError(f"There is no section {unknown[0]!r}: take some of {', '.join(SECTIONS)}.")
    if min(options.batch, options.steps, options.curve_steps, options.pairs) < 1 or options.batch < 2:
        raise UserError("--steps, --curve-steps and --pairs must be at least 1, --batch at least 2.")
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe(device)
    print(machine)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder, device)
        for name in names:
            print(f"\n{name}", flush=True)
            found = measure(bench, name)
            print("\n".join(map(line_of, found)), flush=True)
            rows += found
    if options.out:
        result = {"machine": machine, "options": {name: getattr(options, name) for name in options.__dataclass_fields__}}
        filesystem.publish_json(command_line.absolute(options.out, "out"), json.loads(json.dumps(result | {"rows": rows})))
        print(f"\n{options.out}")
    return rows


def measure(bench: Bench, name: str) -> list[dict]:
    """The rows of a section; none, and a line that says why, where this machine cannot measure it."""
    wants_gpu = name == "gpu"
    if wants_gpu and bench.device.type != "cuda":
        print("  left out: this machine has no GPU")
        return []
    if name in CPU_ONLY and bench.device.type == "cuda":
        print("  left out: it compares processes on CPUs")
        return []
    module, function = SECTIONS[name]
    try:
        return getattr(importlib.import_module(f"jobs.benchmarks.{module}"), function)(bench)
    except ModuleNotFoundError as error:
        print(f"  left out: the package {error.name} is not installed")
        return []


def describe(device: torch.device) -> str:
    """The machine in a line."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def line_of(entry: dict) -> str:
    """A row as text."""
    value = entry["value"]
    shown = "  ".join(f"{v:.4f}" for v in value) if isinstance(value, list) else f"{value:.2f}"
    note = f"  ({entry['note']})" if entry["note"] else ""
    return f"  {entry['name']:<76} {shown:>12} {entry['unit']}{note}"


def job(argv: Sequence[str]) -> None:
    """The command line."""
    run(command_line.parse_line(Options, argv, "python jobs/benchmark.py train", "Measure training, side by side in one run."))
