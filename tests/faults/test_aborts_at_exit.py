"""A job that ends while a library's thread holds a Python object aborts with -6: no such thread may remain."""

import os
import subprocess
import sys

import pytest

from helpers.experiments import ROOT

TABLE = """
import os, sys
from heartseg.storage import filesystem

data = filesystem.read_bytes(sys.argv[1])
before = os.listdir("/proc/self/task")
assert filesystem.read_table(data).to_pandas(use_threads=False).shape[0] > 0
assert os.listdir("/proc/self/task") == before
"""
# The last of Python's handlers counts the threads: the main one, and that of an allocator, which never needs Python.
ENDS = """
import atexit, importlib, os, sys
from pathlib import Path

def count_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    os._exit(sum(name != "jemalloc_bg_thd" for name in names) if is_done else 99)

is_done = False
atexit.register(count_threads)
importlib.import_module(f"jobs.{sys.argv[1]}").job(sys.argv[2:])
is_done = True
"""
# Each child runs the job's command line, and ends as Python ends.
JOB = """
import os, sys
from jobs import inspect_shards
from jobs.support import command_line

codes = []
for _ in range(17):
    if not (child := os.fork()):
        command_line.main(inspect_shards.job)
        sys.exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert codes == [0] * 17, codes
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_reading_a_table_starts_no_thread(shards):
    done = start(TABLE, os.path.join(shards, "part-00000.parquet"))
    assert done.wait(60) == 0, done.communicate()


@pytest.mark.slow
def test_no_thread_outlives_a_job_that_starts_no_ray(phantom, shards, tmp_path):
    plain, sizes = ["--launcher", "plain"], ["--image.height", "64", "--image.width", "64", "--train.batch-size", "8"]
    paths = ["--data", shards, "--runs", f"{tmp_path}/runs", "--train.epochs", "1", "--tracking.wandb", "off"]
    run = ["--checkpoint", f"{tmp_path}/runs/a"]
    for job in (
        ["preprocess", "quick", *plain, "--split.kind", "ratio", "--source", phantom, "--out", f"{tmp_path}/new"],
        ["inspect_shards", "--data", shards, "--verify"],
        ["train", "quick", *plain, *sizes, *paths, "--run-name", "a"],
        ["evaluate", *plain, *run],
        ["predict", *run, "--input", f"{phantom}/database_nifti/patient0001", "--out", f"{tmp_path}/out"],
    ):
        assert start(ENDS, *job).wait(100) == 1, job


@pytest.mark.slow
def test_a_job_that_reads_shards_exits_with_0_each_of_51_times_on_a_busy_machine(shards):
    jobs = [start(JOB, "--data", shards, "--verify") for _ in range(3)]
    for job in jobs:
        _, errors = job.communicate(timeout=250)
        assert job.returncode == 0 and "terminate called" not in errors, errors[-2000:]
