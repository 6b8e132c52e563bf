"""A disk that refuses, whatever is being written, and memory that runs out, whoever says so: sentences."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from heartseg.training import worker
from heartseg.training.distributed import Ranks
from helpers.experiments import ROOT

# In a mount namespace of its own: the run's disk is full, before its first epoch, at its pictures or at its end.
SCRIPT = """
    import json, sys
    from dataclasses import replace
    from pathlib import Path
    sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
    import torch
    from helpers.experiments import tiny_experiment
    from heartseg.shards import reader
    from heartseg.training import run_directory, worker
    from heartseg.training.distributed import Ranks
    from heartseg.errors import UserError

    def fill(folder):
        try:
            with open(Path(folder, "ballast"), "wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
        except OSError:
            pass

    def fill_after_last(metrics):
        while len(run_directory.read_record(opened.path)) < metrics["epoch"] == 2:
            pass
        if metrics["epoch"] == 2:
            fill(opened.path)

    for when in ("ingest", "finish", "samples"):
        base = tiny_experiment(data=sys.argv[2], runs=sys.argv[3])
        optim = replace(base.optim, momentum=0.0, ema_decay=0.0)
        opened = run_directory.open_run(replace(base, optim=optim), reader.open_shards(base.data), name=when)
        samples = Path(opened.path, "samples")
        if when == "samples":
            samples.mkdir()
            samples.rmdir()
            samples.symlink_to(sys.argv[4])
        if when in ("ingest", "samples"):
            fill({"ingest": opened.path, "samples": sys.argv[4]}[when])
        try:
            report = fill_after_last if when == "finish" else (lambda metrics: None)
            worker.train_rank(replace(base, optim=optim), opened, Ranks(0, 1, torch.device("cpu")), lambda m: m, report)
        except UserError as error:
            print(json.dumps([when, str(error)]), flush=True)
        Path(opened.path, "ballast").unlink(missing_ok=True)
"""


def test_a_full_disk_is_a_sentence_at_a_runs_beginning_at_its_pictures_and_at_its_end(shards, tmp_path):
    disk, small = tmp_path / "disk", tmp_path / "small"
    disk.mkdir(), small.mkdir()
    mount = f"mount -t tmpfs -o size=500m tmpfs {disk} && mount -t tmpfs -o size=64k tmpfs {small} || exit 99"
    command = ["unshare", "-rm", "sh", "-c", f'{mount}; exec "$@"', "sh", sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run([*command, str(ROOT), shards, str(disk), str(small)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert list(said) == ["ingest", "finish", "samples"]
    for sentence in said.values():
        assert "No space left on device" in sentence and "rerun the same command to resume" in sentence


def test_another_error_than_a_refusal_is_no_sentence():
    with pytest.raises(FileNotFoundError), worker._problems_on_every_rank(Ranks(0, 1, torch.device("cpu"))):
        Path("/nowhere/at/all").read_bytes()


@pytest.mark.parametrize(
    ("said", "is_memory"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", False),
    ],
)
def test_libraries_that_get_no_memory_are_told_from_those_that_fail_otherwise(said, is_memory):
    assert worker.is_out_of_memory(RuntimeError(said)) == is_memory
    assert worker.is_out_of_memory(torch.OutOfMemoryError(said))
