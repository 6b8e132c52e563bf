"""Local and remote storage alike: what is published is complete or absent, a folder has one writer, an outage is one line."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import torch

from heartseg.errors import StorageError, UserError
from heartseg.models import checkpoint
from heartseg.storage import filesystem, locks
from helpers.s3_server import KEYS, Proxy, environment

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
locks.HEARTBEAT_S, locks.DEAD_AFTER_S = 0.3, float(sys.argv[2])
with locks.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture(params=["local", "file", "s3"])
def folder(request, tmp_path) -> str:
    """A folder that does not exist yet: a local path, a file:// URI, or one in a bucket."""
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    return f"file://{tmp_path}/new" if request.param == "file" else str(tmp_path / "new")


@pytest.fixture
def bucket(s3) -> str:
    """A folder in the bucket that no other test uses."""
    return f"s3://bucket/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def one_try(monkeypatch):
    """A client that gives up at the first failure, so that a cut connection causes no wait."""
    monkeypatch.setattr(filesystem, "TRIES", 1)
    filesystem._s3.cache_clear()
    yield
    filesystem._s3.cache_clear()


@contextlib.contextmanager
def started(code: str, *arguments: str):
    """A Python process that runs some code, killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_published_files_are_listed_sized_read_replaced_and_removed(folder):
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
    size, digest = filesystem.write_table(path, pa.table({"a": [1, 2, None]}))
    data = filesystem.read_bytes(path)
    assert (len(data), filesystem.sha256(data)) == (size, digest)
    assert filesystem.read_table(data).to_pydict() == {"a": [1, 2, None]}


def test_a_write_that_the_disk_refuses_leaves_the_old_file_and_no_partial_one(tmp_path):
    path, command = tmp_path / "file.bin", [sys.executable, "-c", WRITE_ON_A_FULL_DISK]
    assert subprocess.run([*command, path], timeout=60).returncode == 3 and os.listdir(tmp_path) == []
    path.write_bytes(b"old")
    assert subprocess.run([*command, path], timeout=60).returncode == 3 and os.listdir(tmp_path) == ["file.bin"]
    assert path.read_bytes() == b"old"
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):  # of the rename
        filesystem.publish(str(tmp_path / "taken"), b"x")
    assert sorted(os.listdir(tmp_path)) == ["file.bin", "taken"] and (tmp_path / "taken").is_dir()


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


def test_a_uri_keeps_its_slashes_and_a_local_path_is_joined_and_made_absolute_as_the_system_does(tmp_path, monkeypatch):
    for path in ("s3://bucket/key", "gs://bucket", "file:///tmp/x"):
        assert filesystem.is_uri(path) and filesystem.absolute(path) == path
        assert filesystem.join(path, "a", "b.json") == filesystem.join(path + "/", "a", "b.json") == f"{path}/a/b.json"
    monkeypatch.chdir(tmp_path)
    assert not filesystem.is_uri("runs/a") and not filesystem.is_uri("/data")
    assert filesystem.join("runs", "a", "b") == "runs/a/b"
    assert filesystem.absolute("runs") == str(tmp_path / "runs")


def test_an_invalid_uri_is_refused_by_name():
    for path, message in (("nosuch://b/k", "nosuch://b"), ("s3://", "s3:// names no bucket"), ("s3:///a", "s3:///a names no")):
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


def test_checking_whether_a_folder_is_held_disturbs_neither_writers_nor_other_checks(tmp_path):
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
    with started(HOLD, folder, "60") as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="Another job is writing"), locks.lock(folder):
            pass
        holder.kill()
        holder.wait(timeout=30)
        with locks.lock(folder):
            assert os.path.isdir(folder)


def test_a_file_in_place_of_the_folder_is_refused_by_name(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "further"):
        with pytest.raises(UserError, match="taken.* must be a folder"), locks.lock(str(folder)):
            pass


@pytest.mark.parametrize(
    ("size", "before"),
    [(5, None), (5, b"old"), pytest.param(22_000_000, b"old", marks=pytest.mark.slow)],
)
def test_a_connection_cut_at_any_request_leaves_the_old_file_or_the_new_one(size, before, bucket, s3, one_try):
    data, cut_at, reached = os.urandom(size), 0, True
    while reached:
        cut_at += 1
        path = filesystem.join(bucket, str(cut_at), "file.bin")
        if before is not None:
            filesystem.publish(path, before)
        with Proxy(s3, cut_at) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
            try:
                filesystem.publish(path, data)
            except StorageError as error:
                assert "cannot be reached" in str(error) and path in str(error)
            reached = proxy.was_cut.is_set()
        found = filesystem.read_bytes(path) if filesystem.exists(path) else None
        assert found in (before, data)
        assert all(name.endswith(".part") for name in filesystem.list_names(os.path.dirname(path)) if name != "file.bin")
    assert cut_at >= 4 and found == data  # every request was cut once, and the last attempt was not cut


@pytest.mark.parametrize("new", [b"much longer than it was", b"x"])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(new, bucket, s3):
    path, replaced = filesystem.join(bucket, "file.bin"), []
    filesystem.publish(path, b"old")
    direct, inner = filesystem.resolve(path)

    def replace_it(head: bytes) -> None:
        if head.startswith(b"GET ") and b"file.bin " in head and not replaced:  # after its size was read
            replaced.append(True)
            with direct.open_output_stream(inner) as stream:
                stream.write(new)

    with Proxy(s3, answer=replace_it) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
        assert filesystem.read_bytes(path) == new and replaced


@contextlib.contextmanager
def behind(*arguments, **options):
    """S3 clients reach the server through this proxy."""
    with Proxy(*arguments, **options) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
        yield proxy


@pytest.mark.parametrize("cut_at", [1, 2, 3])
def test_a_single_lost_connection_is_retried(cut_at, bucket, s3):
    with behind(s3, cut_at, for_good=False) as proxy:
        filesystem.publish(filesystem.join(bucket, "file.bin"), b"n" * 1000)
        assert proxy.was_cut.is_set()
    assert filesystem.read_bytes(filesystem.join(bucket, "file.bin")) == b"n" * 1000


def test_a_write_that_an_exception_ends_or_whose_bytes_change_in_transit_leaves_nothing(bucket, s3):
    with pytest.raises(TypeError):
        filesystem.publish(filesystem.join(bucket, "file.bin"), "no bytes")

    # An endpoint that answers a read with other bytes of the same length.
    def answer(head: bytes) -> bytes | None:
        return b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nbad!" if head.startswith(b"GET /bucket/") else None

    with behind(s3, answer=answer), pytest.raises(StorageError, match="not those that were sent"):
        filesystem.publish(filesystem.join(bucket, "file.bin"), b"good")
    assert filesystem.list_names(bucket) == []


def test_a_killed_upload_leaves_no_file_and_the_next_one_is_complete(bucket, s3):
    path = filesystem.join(bucket, "file.bin")
    upload = "import sys; from heartseg.storage import filesystem; filesystem.publish(sys.argv[1], b'n' * 30_000_000)"
    for cut_at in (1, 3):  # 30 MB are three parts after the request that starts them
        with behind(s3, cut_at, hold=True) as proxy, started(upload, path):
            assert proxy.was_cut.wait(60)
        assert not filesystem.exists(path) and "file.bin" not in filesystem.list_names(bucket)
    filesystem.publish(path, b"n" * 30_000_000)
    assert filesystem.sha256(filesystem.read_bytes(path)) == filesystem.sha256(b"n" * 30_000_000)


def test_a_checkpoint_rewritten_over_a_connection_cut_at_any_request_is_the_new_one_or_none(bucket, s3, one_try):
    card, cut_at, reached = {"epoch": 1, "experiment": {}, "metrics": {}}, 0, True
    while reached:
        cut_at += 1
        run = filesystem.join(bucket, str(cut_at))
        checkpoint.save(run, {"w": torch.zeros(3)}, {"made": "before"}, card)
        with Proxy(s3, cut_at) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
            with contextlib.suppress(StorageError):
                checkpoint.save(run, {"w": torch.ones(3)}, {"made": "after"}, card)
            reached = proxy.was_cut.is_set()
        found = checkpoint.last(run)
        state = found and (found.training_state()["made"], found.weights()["w"].tolist())
        # Cut before the first byte, the old one is still complete.
        assert state in (None, ("after", [1, 1, 1])) or (cut_at == 1 and state == ("before", [0, 0, 0]))
    assert cut_at > 10 and state


def test_a_heartbeat_keeps_a_second_writer_out_until_it_stops(bucket, monkeypatch):
    monkeypatch.setattr(locks, "DEAD_AFTER_S", 2.0)
    with started(HOLD, bucket, "2") as holder:
        assert holder.stdout.readline() == "held\n"
        time.sleep(2.2)  # longer than a claim lives that is not renewed
        with pytest.raises(UserError, match=f"process {holder.pid} on .*folder is free after 2 s"), locks.lock(bucket):
            pass
        holder.kill()
        with pytest.raises(UserError, match="Another job is writing"), locks.lock(bucket):
            pass
        time.sleep(2.2)
        with locks.lock(bucket):
            names = filesystem.list_names(filesystem.join(bucket, locks.LOCK_NAME))
            assert len([name for name in names if locks.CLAIM.fullmatch(name)]) == 1  # the dead claim is gone


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_claim_is_alive_or_dead_by_the_clock_of_the_store_alone(hours, bucket, monkeypatch):
    there = filesystem.list_files

    def list_files(path: str) -> list[tuple]:
        return [(name, size, time and time + hours * 3600 * 10**9) for name, size, time in there(path)]

    monkeypatch.setattr(filesystem, "list_files", list_files)
    with locks.lock(bucket):
        assert locks.is_held(bucket)
        filesystem.publish(f"{bucket}/{locks.LOCK_NAME}/{'0' * 12}.json", b"{}")  # never renewed
    monkeypatch.setattr(locks, "DEAD_AFTER_S", 1.0)
    time.sleep(1.5)
    assert not locks.is_held(bucket)
    assert filesystem.list_names(f"{bucket}/{locks.LOCK_NAME}") == [f"{'0' * 12}.json"]


def test_at_most_one_of_many_writers_that_start_at_once_is_admitted(bucket):
    inside, most = [], []

    def write(_) -> None:
        try:
            with locks.lock(bucket):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.05)
                inside.pop()
        except (UserError, StorageError):  # another's claim may go while it is read
            pass

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(18)))
    with locks.lock(bucket):
        pass
    assert max(most, default=1) == 1


def test_an_outage_of_the_store_does_not_end_the_job_that_holds_a_folder(bucket, s3, monkeypatch, one_try, caplog):
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.1)
    with Proxy(s3) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url), locks.lock(bucket):
        proxy.was_cut.set()
        time.sleep(0.5)
        proxy.was_cut.clear()
        time.sleep(0.5)
    assert "could not be renewed" in caplog.text
    with locks.lock(bucket):
        pass


def unsigned(head: bytes) -> bytes | None:
    """Amazon's answer to a request without a signature; moto accepts those."""
    return None if b"uthorization:" in head else b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no credentials", "refused access to .*: check AWS_ACCESS_KEY_ID"),
        ("unreachable", "cannot be reached"),
        ("no bucket", "is in a bucket that does not exist"),
    ],
)
def test_a_store_that_refuses_is_a_one_line_error_with_the_path(case, message, s3, tmp_path, monkeypatch, one_try):
    monkeypatch.setenv("HOME", str(tmp_path))  # without the AWS profile of the user who runs this
    path = "s3://nosuchbucket/a/b" if case == "no bucket" else "s3://bucket/a/b"
    with Proxy(s3, answer=unsigned) as proxy:
        keys = {"AWS_EC2_METADATA_DISABLED": "true"} if case == "no credentials" else KEYS
        url = "http://127.0.0.1:9" if case == "unreachable" else proxy.url
        for call in (filesystem.exists, filesystem.list_names, filesystem.read_bytes, lambda p: filesystem.publish(p, b"x")):
            with environment(**keys, AWS_ENDPOINT_URL=url), pytest.raises(StorageError, match=message) as caught:
                call(path)
            assert path in str(caught.value) and "\n" not in str(caught.value)


def test_keys_and_an_address_with_a_trailing_newline_open_the_store(s3):
    with environment(**{name: f"{value}\n" for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3}.items()}):
        assert filesystem.exists("s3://bucket")


@pytest.mark.parametrize("silent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_store_that_refuses_connections_or_never_answers_is_given_up(silent, s3, monkeypatch):
    assert filesystem.REQUEST_S * filesystem.TRIES <= 60
    monkeypatch.setattr(filesystem, "REQUEST_S", 1)
    with Proxy(s3, answer=lambda head: time.sleep(300)) as proxy:
        url, started = proxy.url if silent else "http://127.0.0.1:9", time.monotonic()
        with environment(**KEYS, AWS_ENDPOINT_URL=url), pytest.raises(StorageError, match="cannot be reached"):
            filesystem.exists("s3://bucket/a")
        assert time.monotonic() - started < 15
