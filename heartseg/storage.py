"""A local path or an object-store URI, one way for both: read, list, publish whole, lock.

The only file that knows pyarrow's file systems and its Parquet. A path is a `str` everywhere (`pathlib` turns
`s3://b/x` into `s3:/b/x`); whatever is published appears complete or not at all.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator

import filelock
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from heartseg.errors import UserError

LOCK_NAME = ".heartseg.lock"


def is_uri(path: str) -> bool:
    """True for `s3://…` and its like, False for a local path."""
    return "://" in path


def filesystem(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system that a path lives on, and the path as that file system spells it."""
    if is_uri(path):
        try:
            return pyarrow.fs.FileSystem.from_uri(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"The path {path} cannot be used: {error}.") from error
    return pyarrow.fs.LocalFileSystem(), os.path.abspath(path)


def join(base: str, *parts: str) -> str:
    """`base` with parts added, for a path or a URI."""
    return "/".join([base.rstrip("/"), *parts]) if is_uri(base) else os.path.join(base, *parts)


def absolute(path: str) -> str:
    """A local path made absolute; a URI as it is. Ray workers have a working directory of their own."""
    return path if is_uri(path) else os.path.abspath(path)


def exists(path: str) -> bool:
    """True where a file or a folder is there."""
    if not is_uri(path):
        return os.path.exists(path)
    fs, inner = filesystem(path)
    return fs.get_file_info(inner).type != pyarrow.fs.FileType.NotFound


def list_names(path: str) -> list[str]:
    """Sorted names of the entries of a folder; empty where there is no folder."""
    if not is_uri(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    fs, inner = filesystem(path)
    found = fs.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True))
    return sorted(entry.base_name for entry in found)


def size_or_none(path: str) -> int | None:
    """Size of a file in bytes; None where the path is no file."""
    if not is_uri(path):
        return os.path.getsize(path) if os.path.isfile(path) else None
    fs, inner = filesystem(path)
    return fs.get_file_info(inner).size


def walk(path: str) -> list[str]:
    """Paths of all files below a folder, sorted, through links to folders too, each folder once; empty for no folder."""
    if not is_uri(path):
        found, seen = [], set()
        for folder, folders, names in os.walk(path, followlinks=True):
            folders[:] = [] if os.path.realpath(folder) in seen else sorted(folders)
            if os.path.realpath(folder) not in seen:
                found += [os.path.join(folder, name) for name in names]
            seen.add(os.path.realpath(folder))
        return sorted(found)
    fs, inner = filesystem(path)
    found = fs.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True, recursive=True))
    files = [entry.path.removeprefix(inner).lstrip("/") for entry in found if entry.type == pyarrow.fs.FileType.File]
    return sorted(join(path, name) for name in files)


def read_bytes(path: str, at_most: int = -1) -> bytes:
    """The whole of a file, or its first `at_most` bytes; raises OSError."""
    if not is_uri(path):
        with open(path, "rb") as stream:
            return stream.read(at_most)
    fs, inner = filesystem(path)
    with fs.open_input_file(inner) as stream:
        return stream.read(None if at_most < 0 else at_most)


def read_json(path: str) -> dict:
    """A JSON file; raises UserError for one that is missing or damaged."""
    try:
        return json.loads(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or no valid JSON.") from error


def publish(path: str, data: bytes) -> None:
    """Write a file so that it is there whole or not at all; the folder is made. Raises OSError (a full disk, say)."""
    fs, inner = filesystem(path)
    parent, name = inner.rsplit("/", 1)
    temporary = f"{parent}/.{name}.{uuid.uuid4().hex[:8]}.part"
    fs.create_dir(parent, recursive=True)
    try:
        with fs.open_output_stream(temporary, compression=None) as stream:
            stream.write(data)
        if is_uri(path):
            # A stream that an exception drops still leaves a visible object, so what arrived is measured first.
            if fs.get_file_info(temporary).size != len(data):
                raise OSError(f"{path} arrived with another size than was sent")
        else:
            _flush_to_disk(temporary)
        fs.move(temporary, inner)
    except BaseException:
        with contextlib.suppress(OSError):
            fs.delete_file(temporary)
        raise


def _flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_json(path: str, value: object) -> None:
    """Write a value as indented JSON with sorted keys, whole or not at all."""
    publish(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """The bytes that `publish_json` writes for a value; raises ValueError for NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def remove(path: str) -> None:
    """Delete a file or a whole folder; nothing happens where there is none."""
    fs, inner = filesystem(path)
    kind = fs.get_file_info(inner).type
    if kind == pyarrow.fs.FileType.Directory:
        fs.delete_dir(inner)
    elif kind != pyarrow.fs.FileType.NotFound:
        fs.delete_file(inner)


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def write_table(path: str, table: pa.Table, **options) -> tuple[int, str]:
    """Publish an Arrow table as Parquet; returns its bytes and SHA-256. `options` go to pyarrow's writer."""
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, **options)
    data = sink.getvalue().to_pybytes()
    publish(path, data)
    return len(data), sha256(data)


def read_table(data: bytes) -> pa.Table:
    """The Arrow table in the bytes of a Parquet file; raises pa.ArrowInvalid or OSError for damaged ones."""
    return pyarrow.parquet.read_table(pa.BufferReader(data))


def read_table_metadata(path: str) -> dict[bytes, bytes]:
    """The schema's key-value metadata of a Parquet file, from its footer alone."""
    fs, inner = filesystem(path)
    return pyarrow.parquet.read_schema(inner, filesystem=fs).metadata or {}


@contextlib.contextmanager
def lock(folder: str) -> Iterator[None]:
    """Hold the only writer's place in a local folder; raises UserError where another process holds it.

    A local lock dies with its process, so a killed job never blocks the next. An object store has no locks: there the
    caller is on its own, which the README says.
    """
    if is_uri(folder):
        yield
        return
    os.makedirs(folder, exist_ok=True)
    holder = filelock.FileLock(os.path.join(folder, LOCK_NAME))
    try:
        holder.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"Another job is writing {folder}: wait for it, or give another folder.") from error
    try:
        yield
    finally:
        holder.release()
