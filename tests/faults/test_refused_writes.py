"""A full disk is a one-line error whatever is being written, and so is out of memory whichever library reports it."""

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

# Runs whose disk is full before the first epoch, after the last one, or when the pictures are written.
SCRIPT = """
    import contextlib, json, sys
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
        with contextlib.suppress(OSError), open(Path(folder, "ballast"), "wb", buffering=0) as file:
            for _ in range(1 << 18):  # 1 GiB at most, whatever disk this is
                file.write(bytes(1 << 12))

    def fill_after_last(metrics):
        while not run_directory.read_record(opened.path):
            pass
        fill(opened.path)

    base = tiny_experiment(data=sys.argv[2], runs=sys.argv[3])
    base = replace(base, optim=replace(base.optim, momentum=0.0, ema_decay=0.0), train=replace(base.train, epochs=1))
    for when in ("ingest", "finish", "samples"):
        opened = run_directory.open_run(base, reader.open_shards(base.data), name=when)
        if when == "ingest":
            fill(opened.path)
        if when == "samples":
            Path(opened.path, "samples").symlink_to(sys.argv[4])
            fill(sys.argv[4])
        try:
            report = fill_after_last if when == "finish" else (lambda metrics: None)
            worker.train_rank(base, opened, Ranks(0, 1, torch.device("cpu")), lambda m: m, report)
        except UserError as error:
            print(json.dumps([when, str(error)]), flush=True)
        Path(opened.path, "ballast").unlink(missing_ok=True)
"""


def test_a_full_disk_is_a_one_line_error_at_the_start_of_a_run_at_its_pictures_and_at_its_end(shards, tmp_path):
    disk, small = tmp_path / "disk", tmp_path / "small"
    disk.mkdir(), small.mkdir()
    mount = f"mount -t tmpfs -o size=500m tmpfs {disk} && mount -t tmpfs -o size=64k tmpfs {small} || exit 99"
    command = ["unshare", "-rm", "sh", "-c", f'{mount}; exec "$@"', "sh", sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run([*command, str(ROOT), shards, str(disk), str(small)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert list(said) == ["ingest", "finish", "samples"]
    for sentence in said.values():
        assert "No space left on device" in sentence and "rerun the same command to resume" in sentence


def test_errors_other_than_refusals_are_not_turned_into_messages():
    with pytest.raises(FileNotFoundError), worker._problems_on_every_rank(Ranks(0, 1, torch.device("cpu"))):
        Path("/nowhere/at/all").read_bytes()


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("NCCL error: unhandled cuda error\nFailed to CUDA calloc async 608 bytes", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", False),
    ],
)
def test_out_of_memory_is_distinguished_from_other_failures_of_a_library(message, is_memory):
    assert worker.is_out_of_memory(RuntimeError(message)) == is_memory
    assert worker.is_out_of_memory(torch.OutOfMemoryError(message))
