"""An object store holds what a folder holds: whole files or none, one writer, and refusals in one sentence."""

import contextlib
import os
import signal
import subprocess
import sys
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

PUBLISH = "import sys; from heartseg.storage import filesystem; filesystem.publish(sys.argv[1], b'n' * int(sys.argv[2]))"
HOLD = """
import sys, time
from heartseg.storage import locks
locks.BEAT_S, locks.DEAD_AFTER_S = 0.5, float(sys.argv[2])
with locks.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def folder(s3) -> str:
    """A folder in the bucket that no other test uses."""
    return f"s3://bucket/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def one_try(monkeypatch):
    """A client that gives up at the first failure, so that a cut connection costs no waiting."""
    monkeypatch.setattr(filesystem, "TRIES", 1)
    filesystem._s3.cache_clear()
    yield
    filesystem._s3.cache_clear()


def start(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.stdout.close()
    process.wait(timeout=30)


def test_what_is_published_is_listed_sized_read_replaced_and_removed(folder):
    path = filesystem.join(folder, "a", "file ö.bin")
    assert not filesystem.exists(path) and filesystem.list_names(folder) == [] and filesystem.size_or_none(path) is None
    filesystem.remove(path)
    for data in (b"", b"first", b"second, longer"):
        filesystem.publish(path, data)
        assert filesystem.read_bytes(path) == data and filesystem.size_or_none(path) == len(data)
    assert filesystem.list_names(folder) == ["a"] and filesystem.list_names(folder + "/a") == ["file ö.bin"]
    assert filesystem.exists(folder + "/a") and filesystem.size_or_none(folder + "/a") is None
    filesystem.publish(folder + "/b", b"x")
    filesystem.remove(folder + "/a")
    assert filesystem.list_names(folder) == ["b"]
    filesystem.remove(folder + "/b")
    with pytest.raises(FileNotFoundError):
        filesystem.read_bytes(path)


@pytest.mark.slow
def test_more_names_than_one_answer_holds_are_all_listed(folder):
    with ThreadPoolExecutor(8) as pool:
        fs, inner = filesystem.filesystem(folder)
        list(pool.map(lambda i: fs.open_output_stream(f"{inner}/{i:04d}").close(), range(1002)))
    assert filesystem.list_names(folder) == [f"{i:04d}" for i in range(1002)]


def test_a_table_reads_back(folder):
    path = filesystem.join(folder, "t.parquet")
    size, digest = filesystem.write_table(path, pa.table({"a": [1, None]}))
    data = filesystem.read_bytes(path)
    assert (len(data), filesystem.sha256(data)) == (size, digest)
    assert filesystem.read_table(data).to_pydict() == {"a": [1, None]}


def test_a_write_that_an_exception_ends_leaves_nothing(folder):
    with pytest.raises(TypeError):
        filesystem.publish(filesystem.join(folder, "file.bin"), "no bytes")
    assert filesystem.list_names(folder) == []


@pytest.mark.parametrize(
    ("size", "before"),
    [(5, None), (5, b"old"), *(pytest.param(22_000_000, before, marks=pytest.mark.slow) for before in (None, b"old"))],
)
def test_a_connection_cut_at_any_request_leaves_the_old_file_or_the_new_one(size, before, folder, s3, one_try):
    data, cut_at, reached = os.urandom(size), 0, True
    while reached:
        cut_at += 1
        path = filesystem.join(folder, str(cut_at), "file.bin")
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
    assert cut_at >= 4 and found == data  # every request was cut once, and the last turn saw no cut


@pytest.mark.parametrize("new", [b"much longer than it was", b"x"])
def test_a_file_that_is_replaced_while_it_is_read_is_the_new_one_whole(new, folder, s3):
    path, replaced = filesystem.join(folder, "file.bin"), []
    filesystem.publish(path, b"old")
    past_the_proxy, inner = filesystem.filesystem(path)

    def replace_it(head: bytes) -> None:
        if head.startswith(b"GET ") and b"file.bin " in head and not replaced:  # its size was asked for before
            replaced.append(True)
            with past_the_proxy.open_output_stream(inner) as stream:
                stream.write(new)

    with Proxy(s3, answer=replace_it) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
        assert filesystem.read_bytes(path) == new and replaced


@pytest.mark.parametrize("cut_at", [1, 2, 3])
def test_one_connection_lost_is_tried_again_unnoticed(cut_at, folder, s3):
    with Proxy(s3, cut_at, for_good=False) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
        filesystem.publish(filesystem.join(folder, "file.bin"), b"n" * 1000)
        assert proxy.was_cut.is_set()
    assert filesystem.read_bytes(filesystem.join(folder, "file.bin")) == b"n" * 1000


def test_bytes_that_changed_on_the_way_are_not_published(folder, s3):
    # An endpoint that answers a read with other bytes of the same length.
    def answer(head: bytes) -> bytes | None:
        return b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nbad!" if head.startswith(b"GET /bucket/") else None

    with (
        Proxy(s3, answer=answer) as proxy,
        environment(**KEYS, AWS_ENDPOINT_URL=proxy.url),
        pytest.raises(StorageError, match="not the bytes that were sent"),
    ):
        filesystem.publish(filesystem.join(folder, "file.bin"), b"good")
    assert filesystem.list_names(folder) == []


def test_a_killed_upload_leaves_no_file_and_the_next_one_is_whole(folder, s3):
    path = filesystem.join(folder, "file.bin")
    for cut_at in (1, 3):  # 30 MB are three parts after the request that begins them
        with Proxy(s3, cut_at, hold=True) as proxy:
            with environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
                writer = start(PUBLISH, path, str(30_000_000))
            assert proxy.was_cut.wait(60)
            os.kill(writer.pid, signal.SIGKILL)
            end(writer)
        assert not filesystem.exists(path) and "file.bin" not in filesystem.list_names(folder)
    filesystem.publish(path, b"n" * 30_000_000)
    assert filesystem.sha256(filesystem.read_bytes(path)) == filesystem.sha256(b"n" * 30_000_000)


def test_a_checkpoint_written_anew_and_cut_off_at_any_request_is_the_new_one_or_none(folder, s3, one_try):
    card, cut_at, reached = {"epoch": 1, "experiment": {}, "metrics": {}}, 0, True
    while reached:
        cut_at += 1
        run = filesystem.join(folder, str(cut_at))
        checkpoint.save(run, {"w": torch.zeros(3)}, {"made": "before"}, card)
        with Proxy(s3, cut_at) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
            with contextlib.suppress(StorageError):
                checkpoint.save(run, {"w": torch.ones(3)}, {"made": "after"}, card)
            reached = proxy.was_cut.is_set()
        found = checkpoint.last(run)
        state = found and (found.training_state()["made"], found.weights()["w"].tolist())
        # Cut off before the first byte, the one from before is still whole.
        assert state in (None, ("after", [1, 1, 1])) or (cut_at == 1 and state == ("before", [0, 0, 0]))
    assert cut_at > 10 and state


def test_a_second_writer_is_refused_by_name_and_a_killed_one_frees_the_folder(folder, monkeypatch):
    monkeypatch.setattr(locks, "DEAD_AFTER_S", 3.0)
    holder = start(HOLD, folder, "3")
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on .*place is free after 3 s"), locks.lock(folder):
            pass
        time.sleep(4.5)  # longer than a claim that nobody renews
        with pytest.raises(UserError, match="Another job is writing"), locks.lock(folder):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="Another job is writing"), locks.lock(folder):
            pass
        time.sleep(4.5)
        with locks.lock(folder):
            assert len(filesystem.list_names(filesystem.join(folder, locks.LOCK_NAME))) == 1  # the dead claim is gone
    finally:
        end(holder)


def test_a_place_is_free_at_once_after_its_block_even_after_an_error(folder):
    with pytest.raises(ZeroDivisionError), locks.lock(folder):
        raise ZeroDivisionError
    with locks.lock(folder), pytest.raises(UserError), locks.lock(folder):
        pass
    with locks.lock(folder):
        pass


def test_of_many_writers_that_start_at_once_at_most_one_is_let_in(folder):
    inside, most = [], []

    def write(_) -> None:
        try:
            with locks.lock(folder):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.05)
                inside.pop()
        except UserError:
            pass

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(18)))
    with locks.lock(folder):
        pass
    assert max(most, default=1) == 1


def test_a_store_that_goes_away_for_a_while_does_not_end_the_job_that_holds_it(folder, s3, monkeypatch, one_try, caplog):
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    with Proxy(s3) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url), locks.lock(folder):
        proxy.was_cut.set()
        time.sleep(0.5)
        proxy.was_cut.clear()
        time.sleep(0.5)
    assert "could not be renewed" in caplog.text
    with locks.lock(folder):
        pass


def unsigned(head: bytes) -> bytes | None:
    """Amazon's answer to a request without a signature; moto has none."""
    return None if b"uthorization:" in head else b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no credentials", "is refused by its store: check AWS_ACCESS_KEY_ID"),
        ("unreachable", "cannot be reached"),
        ("no bucket", "is in a bucket that does not exist"),
    ],
)
@pytest.mark.parametrize(
    "call", [filesystem.exists, filesystem.list_names, filesystem.read_bytes, lambda p: filesystem.publish(p, b"x")]
)
def test_a_store_that_refuses_is_one_sentence_with_the_path(call, case, said, s3, tmp_path, monkeypatch, one_try):
    monkeypatch.setenv("HOME", str(tmp_path))  # without the profile of whoever runs this
    bucket = "nosuchbucket" if case == "no bucket" else "bucket"
    with Proxy(s3, answer=unsigned) as proxy:
        keys = {"AWS_EC2_METADATA_DISABLED": "true"} if case == "no credentials" else KEYS
        url = "http://127.0.0.1:9" if case == "unreachable" else proxy.url
        with environment(**keys, AWS_ENDPOINT_URL=url), pytest.raises(StorageError, match=said) as caught:
            call(f"s3://{bucket}/a/b")
    assert f"s3://{bucket}/a/b" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["s3://", "s3:///folder"])
def test_a_path_without_a_bucket_is_refused_by_name(path):
    with pytest.raises(UserError, match=f"{path} names no bucket"):
        filesystem.exists(path)


def test_a_store_that_refuses_connections_costs_seconds(s3):
    with environment(**KEYS, AWS_ENDPOINT_URL="http://127.0.0.1:9"):
        started = time.monotonic()
        with pytest.raises(StorageError, match="cannot be reached"):
            filesystem.exists("s3://bucket/a")
        assert time.monotonic() - started < 15


@pytest.mark.slow
def test_a_store_that_never_answers_costs_little_more_than_a_minute(s3):
    with Proxy(s3, answer=lambda head: time.sleep(300)) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
        started = time.monotonic()
        with pytest.raises(StorageError, match="cannot be reached"):
            filesystem.exists("s3://bucket/a")
        assert time.monotonic() - started < 90
