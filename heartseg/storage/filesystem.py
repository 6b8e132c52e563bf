"""A local path or an object-store URI, one way for both: read, list, publish whole.

The only file that knows pyarrow's file systems and its Parquet. A path is a `str` everywhere (`pathlib` turns
`s3://b/x` into `s3:/b/x`); whatever is published appears complete or not at all. A store that cannot be reached or that
refuses is a StorageError; a file that is not there is a FileNotFoundError.
"""

import contextlib
import datetime
import errno
import functools
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from heartseg.errors import StorageError, UserError

# What an object store that does not answer costs: about a minute where it is silent, 3 s where it refuses connections.
TRIES, CONNECT_S, REQUEST_S = 4, 5, 15
READS = 5  # of a file on an object store that is replaced while it is read
CHUNK_BYTES = 8 << 20


def is_uri(path: str) -> bool:
    """True for `s3://…` and its like, False for a local path."""
    return "://" in path


def filesystem(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system that a path lives on, and the path as that file system spells it.

    S3 credentials, region and endpoint are those of the AWS_* variables (AWS_ENDPOINT_URL for any other store than
    Amazon's) or of the AWS profile. Raises UserError for a path that cannot be one and for a bucket that is not there.
    """
    if not is_uri(path):
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(path)
    with _explained(path):
        if path.startswith("s3://"):
            inner = path.removeprefix("s3://").rstrip("/")
            if not inner or inner.startswith("/"):
                raise UserError(f"The path {path} names no bucket: give it as s3://bucket/folder.")
            settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
            return _s3(inner.partition("/")[0], settings), inner
        return pyarrow.fs.FileSystem.from_uri(path)


@functools.lru_cache(maxsize=8)
def _s3(bucket: str, settings: tuple[tuple[str, str], ...]) -> pyarrow.fs.S3FileSystem:
    """The client of a bucket, one for as long as the AWS_* variables stay the same: a new one costs new connections."""
    aws = dict(settings)
    endpoint = aws.get("AWS_ENDPOINT_URL_S3") or aws.get("AWS_ENDPOINT_URL")
    client = pyarrow.fs.S3FileSystem(
        # Only Amazon's buckets tell their region, and only there does it decide who answers.
        region=None if endpoint else pyarrow.fs.resolve_s3_region(bucket),
        endpoint_override=endpoint,
        connect_timeout=CONNECT_S,
        request_timeout=REQUEST_S,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        allow_delayed_open=True,  # a small file is one request and not three
    )
    try:
        found = client.get_file_info(bucket).type
    except OSError as error:
        if "ACCESS_DENIED" not in str(error):
            raise
        return client  # some may use folders of a bucket and not ask for the bucket itself
    if found == pyarrow.fs.FileType.NotFound:
        raise OSError("NO_SUCH_BUCKET")  # reading would go on as if the bucket were empty
    return client


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what an object store answers into one sentence; local errors and FileNotFoundError pass as they are."""
    try:
        yield
    except FileNotFoundError as error:
        if not is_uri(path):
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except (OSError, pa.ArrowInvalid) as error:
        if not is_uri(path):
            raise
        raise StorageError(f"{path} {_explain(str(error))}.") from error


def _explain(answer: str) -> str:
    """What an object store's answer means and how to mend it, as the rest of a sentence that begins with the path."""
    if "NO_SUCH_BUCKET" in answer or ("Bucket" in answer and "not found" in answer):
        return "is in a bucket that does not exist: make it, or check its name and AWS_ENDPOINT_URL"
    if "NETWORK_CONNECTION" in answer:
        reason = answer.rpartition("Details: ")[2] if "Details: " in answer else "no answer"
        return f"cannot be reached ({reason.strip(' .')}): check the network and AWS_ENDPOINT_URL; the same command goes on"
    refusals = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN", "HTTP status 403")
    if any(refusal in answer for refusal in refusals):
        return "is refused by its store: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ask for access to the bucket"
    return "cannot be used: " + answer.partition(" (Request ID")[0].partition("\n")[0].rstrip(". ")


def join(base: str, *parts: str) -> str:
    """`base` with parts added, for a path or a URI."""
    return "/".join([base.rstrip("/"), *parts]) if is_uri(base) else os.path.join(base, *parts)


def last_part(path: str) -> str:
    """The name of a file or folder: what stands behind the last slash of its path or URI."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def absolute(path: str) -> str:
    """A local path made absolute; a URI as it is. Ray workers have a working directory of their own."""
    return path if is_uri(path) else os.path.abspath(path)


def exists(path: str) -> bool:
    """True where a file or a folder is there."""
    return _info(path).type != pyarrow.fs.FileType.NotFound if is_uri(path) else os.path.exists(path)


def _info(path: str) -> pyarrow.fs.FileInfo:
    fs, inner = filesystem(path)
    with _explained(path):
        return fs.get_file_info(inner)


def list_names(path: str) -> list[str]:
    """Sorted names of the entries of a folder; empty where there is no folder."""
    if not is_uri(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    return sorted(entry.base_name for entry in _entries(path))


def list_files(path: str) -> list[tuple[str, int | None, int | None]]:
    """Sorted names of a folder's entries with size and modification time (ns), None for what is not a file.

    An object store needs one request.
    """
    if is_uri(path):
        return sorted((entry.base_name, entry.size, entry.mtime_ns if entry.is_file else None) for entry in _entries(path))
    paths = {name: join(path, name) for name in list_names(path)}
    stats = {name: os.stat(file) if os.path.isfile(file) else None for name, file in paths.items()}
    return [(name, stat and stat.st_size, stat and stat.st_mtime_ns) for name, stat in stats.items()]


def _entries(path: str, recursive: bool = False) -> list[pyarrow.fs.FileInfo]:
    """What is in a folder, by one listing; nothing where there is no folder."""
    fs, inner = filesystem(path)
    with _explained(path):
        return fs.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True, recursive=recursive))


def size_or_none(path: str) -> int | None:
    """Size of a file in bytes; None where the path is no file."""
    return _info(path).size if is_uri(path) else os.path.getsize(path) if os.path.isfile(path) else None


def modification_times(path: str) -> dict[str, datetime.datetime]:
    """When each file of a folder was last written, by the clock of its file system; empty where there is no folder."""
    return {entry.base_name: entry.mtime for entry in _entries(path) if entry.is_file}


def sizes(path: str) -> dict[str, int]:
    """Bytes of each file of a folder, by one listing; empty where there is no folder."""
    return {entry.base_name: entry.size for entry in _entries(path) if entry.is_file}


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
    inner = filesystem(path)[1]
    files = (entry.path for entry in _entries(path, recursive=True) if entry.is_file)
    return sorted(join(path, name.removeprefix(inner).lstrip("/")) for name in files)


def read_bytes(path: str, at_most: int = -1) -> bytes:
    """The whole of a file, or its first `at_most` bytes; raises OSError, FileNotFoundError among them, and StorageError."""
    if not is_uri(path):
        with open(path, "rb") as stream:
            return stream.read(at_most)
    fs, inner = filesystem(path)
    with _explained(path):
        for _ in range(READS):
            # Opening asks for the size, reading for that many bytes: of a file replaced in between they are no whole.
            with fs.open_input_file(inner) as stream:
                data = stream.read(None if at_most < 0 else at_most)
            size = fs.get_file_info(inner).size or 0
            if len(data) == (size if at_most < 0 else min(size, at_most)):
                return data
        raise OSError("changes whenever it is read")


def read_json(path: str) -> dict:
    """A JSON file; raises UserError for one that is missing or damaged."""
    try:
        return json.loads(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or no valid JSON.") from error


def publish(path: str, data: bytes) -> None:
    """Write a file so that it is there whole or not at all; the folder is made.

    Raises OSError (a full disk, say), StorageError where an object store refuses.
    """
    fs, inner = filesystem(path)
    parent, name = inner.rsplit("/", 1)
    temporary = f"{parent}/.{name}.{uuid.uuid4().hex[:8]}.part"
    with _explained(path):
        if not isinstance(fs, pyarrow.fs.S3FileSystem):
            fs.create_dir(parent, recursive=True)
        try:
            with fs.open_output_stream(temporary, compression=None) as stream:
                stream.write(data)
            if is_uri(path):
                # A stream that an exception drops still leaves a visible object, so what arrived is read again first.
                _check_arrived(fs, temporary, data)
            else:
                with open(temporary, "rb") as stream:
                    os.fsync(stream.fileno())
            fs.move(temporary, inner)
        except BaseException:
            with contextlib.suppress(OSError):
                fs.delete_file(temporary)
            raise


def _check_arrived(fs: pyarrow.fs.FileSystem, path: str, data: bytes) -> None:
    """Raise OSError where a file has another size or another SHA-256 than `data`."""
    digest = hashlib.sha256()
    with fs.open_input_file(path) as stream:
        same = stream.size() == len(data)
        while same and (chunk := stream.read(CHUNK_BYTES)):
            digest.update(chunk)
    if not same or digest.digest() != hashlib.sha256(data).digest():
        raise OSError("what arrived are not the bytes that were sent")


def publish_json(path: str, value: object) -> None:
    """Write a value as indented JSON with sorted keys, whole or not at all."""
    publish(path, json_bytes(value))


def none_if_nan(value: object) -> object:
    """A value as JSON can hold it: None for NaN and infinity, a Python float for NumPy's; anything else as it is."""
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def json_bytes(value: object) -> bytes:
    """The bytes that `publish_json` writes for a value; raises ValueError for NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def remove(path: str) -> None:
    """Delete a file or a whole folder; nothing happens where there is none."""
    fs, inner = filesystem(path)
    with _explained(path), contextlib.suppress(FileNotFoundError):
        if fs.get_file_info(inner).type == pyarrow.fs.FileType.Directory:
            fs.delete_dir(inner)
        else:
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


def read_table(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table in a Parquet file's bytes; raises ArrowInvalid or OSError for a damaged one."""
    return pyarrow.parquet.read_table(pa.BufferReader(data), columns=columns)
