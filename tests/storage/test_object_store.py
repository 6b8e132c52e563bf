"""Faults of an object store: files stay complete, a folder keeps one writer, and an outage is a one-line StorageError."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

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
locks.HEARTBEAT_S, locks.DEAD_AFTER_S = 0.3, float(sys.argv[2])
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


def test_a_write_that_an_exception_ends_leaves_nothing(folder):
    with pytest.raises(TypeError):
        filesystem.publish(filesystem.join(folder, "file.bin"), "no bytes")
    assert filesystem.list_names(folder) == []


@pytest.mark.parametrize(
    ("size", "before"),
    [(5, None), (5, b"old"), pytest.param(22_000_000, b"old", marks=pytest.mark.slow)],
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
    assert cut_at >= 4 and found == data  # every request was cut once, and the last attempt was not cut


@pytest.mark.parametrize("new", [b"much longer than it was", b"x"])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(new, folder, s3):
    path, replaced = filesystem.join(folder, "file.bin"), []
    filesystem.publish(path, b"old")
    direct, inner = filesystem.resolve(path)

    def replace_it(head: bytes) -> None:
        if head.startswith(b"GET ") and b"file.bin " in head and not replaced:  # after its size was read
            replaced.append(True)
            with direct.open_output_stream(inner) as stream:
                stream.write(new)

    with Proxy(s3, answer=replace_it) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
        assert filesystem.read_bytes(path) == new and replaced


@pytest.mark.parametrize("cut_at", [1, 2, 3])
def test_a_single_lost_connection_is_retried(cut_at, folder, s3):
    with Proxy(s3, cut_at, for_good=False) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
        filesystem.publish(filesystem.join(folder, "file.bin"), b"n" * 1000)
        assert proxy.was_cut.is_set()
    assert filesystem.read_bytes(filesystem.join(folder, "file.bin")) == b"n" * 1000


def test_bytes_that_change_in_transit_are_not_published(folder, s3):
    # An endpoint that answers a read with other bytes of the same length.
    def answer(head: bytes) -> bytes | None:
        return b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\nbad!" if head.startswith(b"GET /bucket/") else None

    with (
        Proxy(s3, answer=answer) as proxy,
        environment(**KEYS, AWS_ENDPOINT_URL=proxy.url),
        pytest.raises(StorageError, match="not those that were sent"),
    ):
        filesystem.publish(filesystem.join(folder, "file.bin"), b"good")
    assert filesystem.list_names(folder) == []


def test_a_killed_upload_leaves_no_file_and_the_next_one_is_complete(folder, s3):
    path = filesystem.join(folder, "file.bin")
    for cut_at in (1, 3):  # 30 MB are three parts after the request that starts them
        with Proxy(s3, cut_at, hold=True) as proxy:
            with environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
                writer = start(PUBLISH, path, str(30_000_000))
            assert proxy.was_cut.wait(60)
            os.kill(writer.pid, signal.SIGKILL)
            end(writer)
        assert not filesystem.exists(path) and "file.bin" not in filesystem.list_names(folder)
    filesystem.publish(path, b"n" * 30_000_000)
    assert filesystem.sha256(filesystem.read_bytes(path)) == filesystem.sha256(b"n" * 30_000_000)


def test_a_checkpoint_rewritten_over_a_connection_cut_at_any_request_is_the_new_one_or_none(folder, s3, one_try):
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
        # Cut before the first byte, the old one is still complete.
        assert state in (None, ("after", [1, 1, 1])) or (cut_at == 1 and state == ("before", [0, 0, 0]))
    assert cut_at > 10 and state


def test_a_heartbeat_keeps_a_second_writer_out_until_it_stops(folder, monkeypatch):
    monkeypatch.setattr(locks, "DEAD_AFTER_S", 2.0)
    holder = start(HOLD, folder, "2")
    try:
        assert holder.stdout.readline() == "held\n"
        time.sleep(2.2)  # longer than a claim lives that is not renewed
        with pytest.raises(UserError, match=f"process {holder.pid} on .*folder is free after 2 s"), locks.lock(folder):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="Another job is writing"), locks.lock(folder):
            pass
        time.sleep(2.2)
        with locks.lock(folder):
            names = filesystem.list_names(filesystem.join(folder, locks.LOCK_NAME))
            assert len([name for name in names if locks.CLAIM.fullmatch(name)]) == 1  # the dead claim is gone
    finally:
        end(holder)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_claim_is_alive_or_dead_by_the_clock_of_the_store_alone(hours, folder, monkeypatch):
    """The store's clock is an hour before or behind this machine's."""
    there = filesystem.list_files

    def list_files(path: str) -> list[tuple]:
        return [(name, size, time and time + hours * 3600 * 10**9) for name, size, time in there(path)]

    monkeypatch.setattr(filesystem, "list_files", list_files)
    with locks.lock(folder):
        assert locks.is_held(folder)
        filesystem.publish(f"{folder}/{locks.LOCK_NAME}/{'0' * 12}.json", b"{}")  # never renewed
    monkeypatch.setattr(locks, "DEAD_AFTER_S", 1.0)
    time.sleep(1.5)
    assert not locks.is_held(folder)
    assert filesystem.list_names(f"{folder}/{locks.LOCK_NAME}") == [f"{'0' * 12}.json"]


def test_of_many_writers_that_start_at_once_at_most_one_is_admitted(folder):
    inside, most = [], []

    def write(_) -> None:
        try:
            with locks.lock(folder):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.05)
                inside.pop()
        except (UserError, StorageError):  # another's claim may go while it is read
            pass

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(18)))
    with locks.lock(folder):
        pass
    assert max(most, default=1) == 1


def test_an_outage_of_the_store_does_not_end_the_job_that_holds_a_folder(folder, s3, monkeypatch, one_try, caplog):
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.1)
    with Proxy(s3) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url), locks.lock(folder):
        proxy.was_cut.set()
        time.sleep(0.5)
        proxy.was_cut.clear()
        time.sleep(0.5)
    assert "could not be renewed" in caplog.text
    with locks.lock(folder):
        pass


def unsigned(head: bytes) -> bytes | None:
    """Amazon's answer to a request without a signature; moto accepts those."""
    return None if b"uthorization:" in head else b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no credentials", "is refused by its store: check AWS_ACCESS_KEY_ID"),
        ("unreachable", "cannot be reached"),
        ("no bucket", "is in a bucket that does not exist"),
    ],
)
@pytest.mark.parametrize(
    "call", [filesystem.exists, filesystem.list_names, filesystem.read_bytes, lambda p: filesystem.publish(p, b"x")]
)
def test_a_store_that_refuses_is_a_one_line_error_with_the_path(call, case, message, s3, tmp_path, monkeypatch, one_try):
    monkeypatch.setenv("HOME", str(tmp_path))  # without the AWS profile of the user who runs this
    bucket = "nosuchbucket" if case == "no bucket" else "bucket"
    with Proxy(s3, answer=unsigned) as proxy:
        keys = {"AWS_EC2_METADATA_DISABLED": "true"} if case == "no credentials" else KEYS
        url = "http://127.0.0.1:9" if case == "unreachable" else proxy.url
        with environment(**keys, AWS_ENDPOINT_URL=url), pytest.raises(StorageError, match=message) as caught:
            call(f"s3://{bucket}/a/b")
    assert f"s3://{bucket}/a/b" in str(caught.value) and "\n" not in str(caught.value)


def test_a_store_that_refuses_connections_is_given_up_after_seconds(s3):
    with environment(**KEYS, AWS_ENDPOINT_URL="http://127.0.0.1:9"):
        started = time.monotonic()
        with pytest.raises(StorageError, match="cannot be reached"):
            filesystem.exists("s3://bucket/a")
        assert time.monotonic() - started < 15


@pytest.mark.slow
def test_a_store_that_never_answers_is_given_up_after_about_a_minute(s3):
    with Proxy(s3, answer=lambda head: time.sleep(300)) as proxy, environment(**KEYS, AWS_ENDPOINT_URL=proxy.url):
        started = time.monotonic()
        with pytest.raises(StorageError, match="cannot be reached"):
            filesystem.exists("s3://bucket/a")
        assert time.monotonic() - started < 90
