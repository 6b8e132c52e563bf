"""Whatever is published is whole or not there, and a folder has one writer, whose death frees it."""

import os
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heartseg.errors import UserError
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


@settings(max_examples=20, deadline=None)
@given(data=st.binary(max_size=300))
def test_published_bytes_read_back_and_the_folder_is_made(data, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("publish") / "a" / "b" / "file.bin")
    filesystem.publish(path, data)
    assert filesystem.read_bytes(path) == data and filesystem.size_or_none(path) == len(data)
    assert filesystem.list_names(os.path.dirname(path)) == ["file.bin"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_write_that_the_disk_refuses_leaves_what_was_there_and_no_remains(before, tmp_path):
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)
    done = subprocess.run([sys.executable, "-c", WRITE_ON_A_FULL_DISK, str(path)], timeout=60)
    assert done.returncode == 3
    assert os.listdir(tmp_path) == ([] if before is None else ["file.bin"])
    assert before is None or path.read_bytes() == before


def test_a_rename_that_fails_leaves_no_remains(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        filesystem.publish(str(tmp_path / "taken"), b"x")
    assert os.listdir(tmp_path) == ["taken"] and (tmp_path / "taken").is_dir()


def test_publish_replaces_a_file_and_reaches_uris_as_it_does_paths(tmp_path):
    path, uri = str(tmp_path / "a.txt"), f"file://{tmp_path}/a.txt"
    filesystem.publish(path, b"first")
    filesystem.publish(uri, b"second, longer")
    assert filesystem.read_bytes(path) == filesystem.read_bytes(uri) == b"second, longer"
    assert filesystem.list_names(f"file://{tmp_path}") == ["a.txt"] and filesystem.size_or_none(uri) == 14


def test_json_with_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError):
        filesystem.publish_json(str(tmp_path / "a.json"), {"value": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_second_process_is_refused_and_a_killed_holder_frees_the_folder(tmp_path):
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


def test_a_lock_is_free_again_after_its_block_even_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locks.lock(str(tmp_path)):
        raise ZeroDivisionError
    with locks.lock(str(tmp_path)), pytest.raises(UserError), locks.lock(str(tmp_path)):
        pass


@pytest.mark.parametrize("below", ["", "further"])
def test_a_file_where_a_folder_is_to_be_is_refused_by_name(below, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken.* is to be a folder"), locks.lock(os.path.join(tmp_path, "taken", below)):
        pass


def test_json_reads_back_and_a_missing_or_damaged_file_is_refused_by_name(tmp_path):
    path = str(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json is missing or no valid JSON"):
        filesystem.read_json(path)
    filesystem.publish_json(path, {"b": [1, None], "a": "ö"})
    assert filesystem.read_json(path) == {"b": [1, None], "a": "ö"}
    for damage in (b'{"b": [1', b"\xff\xfe\x00\x01"):
        (tmp_path / "a.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"a\.json is missing or no valid JSON"):
            filesystem.read_json(path)


@pytest.mark.parametrize("path", ["s3://bucket/key", "gs://bucket", "file:///tmp/x"])
def test_a_uri_keeps_its_slashes_when_joined_or_made_absolute(path):
    assert filesystem.is_uri(path) and filesystem.absolute(path) == path
    assert filesystem.join(path, "a", "b.json") == filesystem.join(path + "/", "a", "b.json") == f"{path}/a/b.json"


def test_a_local_path_is_joined_and_made_absolute_as_the_system_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not filesystem.is_uri("runs/a") and not filesystem.is_uri("/data")
    assert filesystem.join("runs", "a", "b") == "runs/a/b"
    assert filesystem.absolute("runs") == str(tmp_path / "runs")


def test_an_unknown_kind_of_uri_is_refused_by_name():
    with pytest.raises(UserError, match="nosuch://bucket"):
        filesystem.list_names("nosuch://bucket/key")


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_what_is_not_there_is_neither_listed_nor_sized_and_is_removed_without_complaint(prefix, tmp_path):
    gone = f"{prefix}{tmp_path}/gone"
    assert not filesystem.exists(gone) and filesystem.list_names(gone) == [] and filesystem.size_or_none(gone) is None
    filesystem.remove(gone)
    filesystem.publish(f"{gone}/deep/file", b"x")
    assert filesystem.exists(gone) and filesystem.list_names(gone) == ["deep"]
    filesystem.remove(gone)
    assert not os.path.exists(tmp_path / "gone")


def test_a_table_reads_back_and_its_bytes_and_hash_are_the_files(tmp_path):
    path = str(tmp_path / "t.parquet")
    table = pa.table({"a": [1, 2, None]})
    size, digest = filesystem.write_table(path, table)
    data = filesystem.read_bytes(path)
    assert (len(data), filesystem.sha256(data)) == (size, digest)
    assert filesystem.read_table(data).to_pydict() == {"a": [1, 2, None]}
