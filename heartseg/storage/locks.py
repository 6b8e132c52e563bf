"""One writer per folder: a file lock on a local disk, a claim with a heartbeat on an object store.

Claims are advisory: a holder that cannot renew its claim for a minute counts as dead, and is not notified.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator

import filelock

from heartseg.errors import StorageError, UserError
from heartseg.storage import filesystem

log = logging.getLogger(__name__)
LOCK_NAME = ".heartseg.lock"
CLAIM = re.compile(r"[0-9a-f]{12}\.json")
HEARTBEAT_S, DEAD_AFTER_S = 15.0, 60.0


def lock(folder: str) -> contextlib.AbstractContextManager[None]:
    """Become the only writer of a folder; raises UserError if another process is, or on a store was within DEAD_AFTER_S."""
    return _claim(folder) if filesystem.is_uri(folder) else _lock_file(folder)


def is_held(folder: str) -> bool:
    """True if a process is currently writing to a folder."""
    if filesystem.is_uri(folder):
        claims = filesystem.join(folder, LOCK_NAME)
        if not _ages_of_claims(claims):
            return False
        clock = filesystem.join(claims, f"clock-{uuid.uuid4().hex[:8]}")  # not a claim: its time stamp reads the store's clock
        try:
            filesystem.publish(clock, b"")
            return any(age_s < DEAD_AFTER_S for age_s in _ages_of_claims(claims).values())
        finally:
            filesystem.remove(clock)
    try:
        with open(os.path.join(folder, LOCK_NAME)) as file:  # for reading: the check needs no write permission
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


@contextlib.contextmanager
def _lock_file(folder: str) -> Iterator[None]:
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} must be a folder, but a file has that name: choose another folder.") from error
    holder = filelock.FileLock(os.path.join(folder, LOCK_NAME))
    try:
        holder.acquire(timeout=0.2, poll_interval=0.01)  # `is_held` takes the lock for an instant
    except filelock.Timeout as error:
        raise UserError(f"Another job is writing to {folder}: wait for it, or choose another folder.") from error
    try:
        yield
    finally:
        holder.release()


@contextlib.contextmanager
def _claim(folder: str) -> Iterator[None]:
    """Write a claim, then list all claims, so that at most one of two jobs that start at once is admitted."""
    claims, mine = filesystem.join(folder, LOCK_NAME), f"{uuid.uuid4().hex[:12]}.json"
    path, stop, started = filesystem.join(claims, mine), threading.Event(), _now()

    def renew() -> None:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "renewed": _now()}
        filesystem.publish_json(path, who)

    def keep_renewing() -> None:
        while not stop.wait(HEARTBEAT_S):
            try:
                renew()
            except StorageError as error:  # an outage of the store does not end the job
                log.warning("This job's claim as the only writer could not be renewed: %s", error)

    try:
        renew()
        _refuse_if_claimed(folder, claims, mine)
        beating = threading.Thread(target=keep_renewing, daemon=True)
        beating.start()
        try:
            yield
        finally:
            stop.set()
            beating.join()  # a heartbeat after the removal would recreate the claim
    finally:
        with contextlib.suppress(StorageError):
            filesystem.remove(path)


def _refuse_if_claimed(folder: str, claims: str, mine: str) -> None:
    """Raise UserError, naming the holder, if a claim other than `mine` is alive; remove dead ones."""
    others = {name: age_s for name, age_s in _ages_of_claims(claims).items() if name != mine}  # mine is the newest
    for name, age_s in others.items():
        path = filesystem.join(claims, name)
        if age_s >= DEAD_AFTER_S:
            filesystem.remove(path)
            continue
        with contextlib.suppress(FileNotFoundError):  # released in between
            holder = json.loads(filesystem.read_bytes(path))
            fix = f"wait for it, or choose another folder; if it was killed, the folder is free after {DEAD_AFTER_S:g} s"
            who = f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
            raise UserError(f"Another job is writing to {folder} ({who}): {fix}.")


def _ages_of_claims(claims: str) -> dict[str, float]:
    """Seconds from each claim's renewal to the newest file there: by the store's clock, not this machine's."""
    times = {name: time_ns for name, _, time_ns in filesystem.list_files(claims) if time_ns is not None}
    return {name: (max(times.values()) - time_ns) / 1e9 for name, time_ns in times.items() if CLAIM.fullmatch(name)}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
