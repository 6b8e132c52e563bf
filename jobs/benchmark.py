"""Runs one of the benchmarks in jobs/benchmarks/ and prints its table: `python jobs/benchmark.py scores`."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heartseg.errors import require
from jobs.support import command_line

# Name -> help; the module of that name in jobs/benchmarks/ has `Options` and `run`.
TABLES = {
    "data": "speed of converting NIfTI to shards, compared with nibabel, scikit-image and np.save",
    "predict": "speed of prediction from files to masks, compared with the forward passes alone",
    "scores": "speed of surface distances, compared with MONAI's, and of volumes",
    "postprocess": "effect of test-time augmentation, postprocessing and ensembles on the scores",
    "train": "speed of training: steps against the baseline, convolutions, several GPUs, Ray, share of the machine's peak",
}


def job(argv: list[str]) -> None:
    if argv and argv[0] in ("-h", "--help"):
        print("usage: python jobs/benchmark.py BENCHMARK [-h] [SETTINGS]\n")
        print("\n".join(f"  {name:<13}{text}" for name, text in TABLES.items()))
        return
    asked = f"{argv[0]!r} is not a benchmark" if argv else "No benchmark is named"
    require(bool(argv) and argv[0] in TABLES, f"{asked}: use one of {', '.join(TABLES)}.")
    name, table = argv[0], importlib.import_module(f"jobs.benchmarks.{argv[0]}")
    options = command_line.parse_line(table.Options, argv[1:], f"python jobs/benchmark.py {name}", f"{TABLES[name]}.")
    for flag in ("source", "checkpoint", "data"):
        if paths := getattr(options, flag, ""):
            absolute = (command_line.absolute(path, flag) for path in paths.split(","))
            options = replace(options, **{flag: ",".join(absolute)})
    table.run(options)


if __name__ == "__main__":
    command_line.main(job)
