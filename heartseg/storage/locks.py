"""One writer per folder: a file lock on a local disk, a claim that is renewed like a heartbeat on an object store.

The claims are advisory: a holder that cannot renew its own for a minute (a network that is down, a machine that sleeps)
counts as dead and does not learn of it.
"""

import contextlib
import datetime
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
BEAT_S, DEAD_AFTER_S = 15.0, 60.0


def lock(folder: str) -> contextlib.AbstractContextManager[None]:
    """Hold the only writer's place in a folder; raises UserError where another process holds it.

    A local lock dies with its process, so a killed job never blocks the next; on an object store it blocks for
    `DEAD_AFTER_S` seconds.
    """
    return _hold_claim(folder) if filesystem.is_uri(folder) else _hold_file(folder)


def is_held(folder: str) -> bool:
    """True where somebody holds the writer's place in a folder at the moment; takes nobody's place on an object store."""
    if filesystem.is_uri(folder):
        times = filesystem.modification_times(filesystem.join(folder, LOCK_NAME)).values()
        now = datetime.datetime.now(datetime.UTC)
        return any((now - time).total_seconds() < DEAD_AFTER_S for time in times)
    path = os.path.join(folder, LOCK_NAME)
    if not os.path.exists(path):
        return False
    holder = filelock.FileLock(path)
    try:
        holder.acquire(timeout=0)
    except (filelock.Timeout, OSError) as error:
        return isinstance(error, filelock.Timeout)
    holder.release()
    return False


@contextlib.contextmanager
def _hold_file(folder: str) -> Iterator[None]:
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} is to be a folder, and a file is in its place: give another.") from error
    holder = filelock.FileLock(os.path.join(folder, LOCK_NAME))
    try:
        holder.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"Another job is writing {folder}: wait for it, or give another folder.") from error
    try:
        yield
    finally:
        holder.release()


@contextlib.contextmanager
def _hold_claim(folder: str) -> Iterator[None]:
    """Every job writes a claim of its own and then lists them all, so of two that start at once none misses the other.

    In that instant both may be refused; never are both let in, since a listing on S3 shows every write before it.
    """
    claims, mine = filesystem.join(folder, LOCK_NAME), f"{uuid.uuid4().hex[:12]}.json"
    path, stop = filesystem.join(claims, mine), threading.Event()
    started = _now()
    try:
        _beat(path, started)
        _refuse_if_claimed(folder, claims, mine)
        beating = threading.Thread(target=_keep_beating, args=(path, started, stop), daemon=True)
        beating.start()
        try:
            yield
        finally:
            stop.set()
            beating.join()  # a beat after the removal would leave the claim behind
    finally:
        with contextlib.suppress(StorageError):
            filesystem.remove(path)


def _refuse_if_claimed(folder: str, claims: str, mine: str) -> None:
    """Raise UserError that names the holder where a claim beside `mine` is alive; dead ones are removed."""
    times = {name: time for name, time in filesystem.modification_times(claims).items() if CLAIM.fullmatch(name)}
    # The newest is mine, written just now: ages are by the store's clock alone, whatever ours says.
    now = max(times.values(), default=None)
    for name, time in times.items():
        path = filesystem.join(claims, name)
        if name == mine:
            continue
        if (now - time).total_seconds() >= DEAD_AFTER_S:
            filesystem.remove(path)
            continue
        with contextlib.suppress(FileNotFoundError):  # released in between
            holder = json.loads(filesystem.read_bytes(path))
            raise UserError(
                f"Another job is writing {folder} (process {holder['pid']} on {holder['host']}, since {holder['started']}): "
                f"wait for it, or give another folder; if it was killed, its place is free after {DEAD_AFTER_S:g} s."
            )


def _beat(path: str, started: str) -> None:
    filesystem.publish_json(path, {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "renewed": _now()})


def _keep_beating(path: str, started: str, stop: threading.Event) -> None:
    """Renew a claim until told to stop; a store that is away for a while is no reason to end the job."""
    while not stop.wait(BEAT_S):
        try:
            _beat(path, started)
        except StorageError as error:
            log.warning("This job's place as the only writer could not be renewed: %s", error)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
