"""Local and remote storage alike: what is published is complete or absent, and a folder has one writer."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import uuid

import pyarrow as pa
import pytest

from heartseg.errors import StorageError, UserError
from heartseg.storage import filesystem, locks

# A file may not grow past 4096 bytes: what a full disk does to a writer.
WRITE_ON_A_FULL_DISK = """
import resource, sys
from heartseg.storage import filesystem
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    filesystem.publish(sys.argv[1], b"n" * 100_000)
except OSError:
    sys.exit(3)
"""
HOLD = """
import sys, time
from heartseg.storage import locks
with locks.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture(params=["local", "file", "s3"])
def folder(request, tmp_path) -> str:
    """A folder that does not exist yet: a local path, a file:// URI, or one in a bucket."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{uuid.uuid4().hex[:8]}"
    return f"file://{tmp_path}/new" if request.param == "file" else str(tmp_path / "new")


def test_what_is_published_is_listed_sized_read_replaced_and_removed(folder):
    name = "file.bin" if folder.startswith("file:") else "file ö.bin"  # file:// URIs need percent-encoding
    path = filesystem.join(folder, "a", name)
    assert not filesystem.exists(path) and filesystem.list_names(folder) == [] and filesystem.size_or_none(path) is None
    assert filesystem.list_files(folder) == []
    filesystem.remove(path)
    for data in (b"", b"first", b"second, longer"):
        filesystem.publish(path, data)
        assert filesystem.read_bytes(path) == data and filesystem.size_or_none(path) == len(data)
    filesystem.publish(folder + "/b", b"x")
    assert filesystem.list_names(folder) == ["a", "b"]
    assert [entry[:2] for entry in filesystem.list_files(folder)] == [("a", None), ("b", 1)]
    assert filesystem.list_names(folder + "/a") == [name]
    assert filesystem.exists(folder + "/a") and filesystem.size_or_none(folder + "/a") is None
    assert filesystem.walk(folder) == [path, folder + "/b"]
    filesystem.remove(folder + "/a")
    assert filesystem.list_names(folder) == ["b"]
    with pytest.raises(FileNotFoundError):
        filesystem.read_bytes(path)


def test_a_table_reads_back_and_its_size_and_hash_are_the_files(folder):
    path = filesystem.join(folder, "t.parquet")
    size, digest = filesystem.write_table(path, pa.table({"a": [1, 2, None]}))
    data = filesystem.read_bytes(path)
    assert (len(data), filesystem.sha256(data)) == (size, digest)
    assert filesystem.read_table(data).to_pydict() == {"a": [1, 2, None]}


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_write_that_the_disk_refuses_leaves_the_old_file_and_no_partial_one(before, tmp_path):
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)
    done = subprocess.run([sys.executable, "-c", WRITE_ON_A_FULL_DISK, str(path)], timeout=60)
    assert done.returncode == 3
    assert os.listdir(tmp_path) == ([] if before is None else ["file.bin"])
    assert before is None or path.read_bytes() == before


def test_a_rename_that_fails_leaves_no_partial_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        filesystem.publish(str(tmp_path / "taken"), b"x")
    assert os.listdir(tmp_path) == ["taken"] and (tmp_path / "taken").is_dir()


def test_json_reads_back_and_a_missing_damaged_or_unreadable_file_is_a_named_error(tmp_path):
    path = str(tmp_path / "a.json")
    with pytest.raises(ValueError):
        filesystem.publish_json(path, {"value": float("nan")})
    with pytest.raises(UserError, match=r"a\.json is missing or not valid JSON"):
        filesystem.read_json(path)
    filesystem.publish_json(path, {"b": [1, None], "a": "ö"})
    assert filesystem.read_json(path) == {"b": [1, None], "a": "ö"}
    for damage in (b'{"b": [1', b"\xff\xfe\x00\x01"):
        (tmp_path / "a.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"a\.json is missing or not valid JSON"):
            filesystem.read_json(path)
    os.symlink("loop.json", tmp_path / "loop.json")
    with pytest.raises(StorageError, match=r"loop\.json cannot be read \(Too many levels"):
        filesystem.read_json(str(tmp_path / "loop.json"))


@pytest.mark.parametrize(
    "call",
    [filesystem.exists, filesystem.size_or_none, filesystem.list_names, filesystem.list_files, filesystem.walk,
     filesystem.read_bytes, filesystem.read_json, lambda path: filesystem.publish(path + "/a", b"x")],
)  # fmt: skip
def test_a_mounted_disk_that_does_not_answer_is_an_outage_and_not_an_empty_one(call, tmp_path, monkeypatch):
    def away(path, *arguments, **options):
        raise OSError(errno.ESTALE, "Stale file handle", str(tmp_path))

    for name in ("stat", "listdir", "scandir", "mkdir", "open"):
        monkeypatch.setattr(os, name, away)
    monkeypatch.setattr("builtins.open", away)
    with pytest.raises(StorageError, match="cannot be reached .Stale file handle.: check its disk or network"):
        call(str(tmp_path))


@pytest.mark.parametrize("path", ["s3://bucket/key", "gs://bucket", "file:///tmp/x"])
def test_a_uri_keeps_its_slashes_when_joined_or_made_absolute(path):
    assert filesystem.is_uri(path) and filesystem.absolute(path) == path
    assert filesystem.join(path, "a", "b.json") == filesystem.join(path + "/", "a", "b.json") == f"{path}/a/b.json"


def test_a_local_path_is_joined_and_made_absolute_as_the_system_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not filesystem.is_uri("runs/a") and not filesystem.is_uri("/data")
    assert filesystem.join("runs", "a", "b") == "runs/a/b"
    assert filesystem.absolute("runs") == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("path", "message"),
    [("nosuch://bucket/key", "nosuch://bucket"), ("s3://", "s3:// names no bucket"), ("s3:///a", "s3:///a names no bucket")],
)
def test_an_invalid_uri_is_refused_by_name(path, message):
    with pytest.raises(UserError, match=message):
        filesystem.list_names(path)


def test_a_folder_is_free_again_after_its_block_even_after_an_error(folder):
    with pytest.raises(ZeroDivisionError), locks.lock(folder):
        raise ZeroDivisionError
    with locks.lock(folder), pytest.raises(UserError, match="Another job is writing"), locks.lock(folder):
        pass
    with locks.lock(folder):
        assert locks.is_held(folder)
    assert not locks.is_held(folder)


def test_whoever_asks_whether_a_folder_is_held_disturbs_neither_a_writer_nor_another_who_asks(tmp_path):
    with locks.lock(str(tmp_path)):
        pass
    with open(tmp_path / locks.LOCK_NAME) as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as is_held has it for an instant
        assert not locks.is_held(str(tmp_path))
        threading.Timer(0.05, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with locks.lock(str(tmp_path)):
            assert locks.is_held(str(tmp_path))


def test_a_killed_writer_frees_its_local_folder_at_once(tmp_path):
    folder = str(tmp_path / "out")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="Another job is writing"), locks.lock(folder):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(timeout=30)
        with locks.lock(folder):
            assert os.path.isdir(folder)
    finally:
        holder.kill()
        holder.stdout.close()
        holder.wait(timeout=30)


@pytest.mark.parametrize("below", ["", "further"])
def test_a_file_in_place_of_the_folder_is_refused_by_name(below, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken.* must be a folder"), locks.lock(os.path.join(tmp_path, "taken", below)):
        pass
