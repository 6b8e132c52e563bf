"""A preprocessing job killed at any moment resumes with the same command and ends with the files of an undisturbed one."""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from heartseg.datasets import camus
from heartseg.shards import writer
from heartseg.storage import filesystem, locks
from helpers.experiments import ROOT, tiny_experiment
from jobs import preprocess

NUM_PATIENTS = 56  # four parts


@pytest.fixture(scope="module")
def many(phantom, tmp_path_factory) -> str:
    """The phantom's eight patients, each under seven names."""
    source = str(tmp_path_factory.mktemp("many"))
    for number in range(1, NUM_PATIENTS + 1):
        old, new = f"patient{(number - 1) % 8 + 1:04d}", f"patient{number:04d}"
        folder = os.path.join(source, camus.IMAGES_FOLDER, new)
        os.makedirs(folder)
        for name in os.listdir(os.path.join(phantom, camus.IMAGES_FOLDER, old)):
            shutil.copy(os.path.join(phantom, camus.IMAGES_FOLDER, old, name), os.path.join(folder, name.replace(old, new)))
    return source


class Terminal(io.StringIO):
    """An output on which progress is shown; a log has none."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def undisturbed(many, tmp_path_factory) -> dict[str, str]:
    """SHA-256 of every file of an undisturbed job, which shows its progress on a terminal."""
    out = str(tmp_path_factory.mktemp("undisturbed"))
    with contextlib.redirect_stdout(Terminal()) as shown:
        preprocess.run(tiny_experiment(source=many, out=out), preprocess.Options(launcher="plain"))
    assert f"{NUM_PATIENTS}/{NUM_PATIENTS}" in shown.getvalue()
    assert re.search(r"\d+:\d+<\d+:\d+, +[\d.]+ patients/s", shown.getvalue())
    return hashes(out)


def hashes(out: str) -> dict[str, str]:
    """SHA-256 of every file below a folder, including hidden ones, except the lock's empty file."""
    paths = [path for path in filesystem.walk(out) if os.path.basename(path) != locks.LOCK_NAME]
    return {os.path.relpath(path, out): filesystem.sha256(filesystem.read_bytes(path)) for path in paths}


def start(many: str, out: str, launcher: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*prefix, sys.executable, str(ROOT / "jobs" / "preprocess.py"), "quick", "--source", many, "--out", out]
    command += ["--image.height", "64", "--image.width", "64", "--split.kind", "ratio", "--split.test-share", "0.25"]
    command += ["--launcher", launcher, *(["--workers", "2"] if launcher == "ray" else [])]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)


def kill_when(job: subprocess.Popen, out: str, moment) -> bool:
    """SIGKILL as soon as `moment` is true for the names in `out`; False if the job was done before that."""
    names: list[str] = []
    while job.poll() is None and not moment(names):
        names = os.listdir(out) if os.path.isdir(out) else []
        time.sleep(0.0005)
    alive = job.poll() is None
    job.send_signal(signal.SIGKILL)
    job.wait()
    return alive


def parts(names: list[str]) -> int:
    return sum(bool(writer.PART_NAME.fullmatch(name)) for name in names)


# A part half written, one and three parts done, and the manifest there but not the split.
MOMENTS = {
    "in a part": lambda names: any(name.endswith(".part") for name in names),
    "after one part": lambda names: parts(names) >= 1,
    "after three parts": lambda names: parts(names) >= 3,
    "after the manifest": lambda names: writer.MANIFEST in names,
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["plain", "ray"])
def test_killed_repeatedly_it_ends_with_the_bytes_of_an_undisturbed_one(launcher, many, undisturbed, tmp_path):
    out = str(tmp_path / "out")
    for when in MOMENTS:
        # The manifest is there for a moment only before the job is done: then there was nothing left to kill.
        assert kill_when(start(many, out, launcher), out, MOMENTS[when]) or when == "after the manifest"
    done = start(many, out, launcher)
    said, _ = done.communicate(timeout=400)
    assert done.returncode == 0, said
    assert hashes(out) == undisturbed


def test_only_files_that_a_kill_left_half_written_are_removed(tmp_path):
    left = [".part-00003.parquet.0a1b2c3d.part", ".part-00003.json.0a1b2c3d.part", ".manifest.json.00000000.part"]
    kept = ["part-00000.parquet", ".part-3.parquet.0a1b2c3d.part", "mine.part", ".mine.0a1b2c3d.part"]
    for name in left + kept:
        (tmp_path / name).write_bytes(b"x")
    writer.remove_leftovers(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_any_number_of_patients_makes_the_parts_of_that_many(many, undisturbed):
    assert parts(list(undisturbed)) == 4
    names = camus.find_patients(many)
    chunks = [chunk for _, chunk in writer.part_names(names)]
    assert sum(chunks, []) == names and max(map(len, chunks)) == 16
    assert max(len(chunk) for _, chunk in writer.part_names(names, "sequence")) == 4


@pytest.mark.parametrize("launcher", ["plain", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_full_disk_is_a_one_line_error_whoever_writes_the_parts(launcher, many, tmp_path):
    # A small file system in a mount namespace of its own, which the first part does not fit on.
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=100k tmpfs {disk} || exit 99; "$@"'
    job = start(many, str(disk), launcher, ("unshare", "-rm", "sh", "-c", script, "sh"))
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 2, said
    assert "No space left on device" in said and "then rerun the same command to resume" in said and "Traceback" not in said
