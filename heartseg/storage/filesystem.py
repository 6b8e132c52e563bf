"""Reads, lists and publishes files on local paths and object-store URIs; the only file that uses pyarrow's file systems.

Paths are `str` everywhere (`pathlib` turns `s3://b/x` into `s3:/b/x`). Storage that does not respond raises StorageError.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from heartseg.errors import OUTAGE_ERRNOS, StorageError, StorageRefused, UserError, outage

TRIES, CONNECT_S, REQUEST_S = 4, 5, 15  # give up on an unresponsive object store after about a minute
READS = 5  # attempts to read a file on an object store that is replaced during the read


def is_uri(path: str) -> bool:
    """True for a URI such as s3://bucket/folder, False for a local path."""
    return "://" in path


def resolve(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A URI's file system, and the path within it; raises UserError for an invalid URI.

    S3 credentials, region and endpoint come from the AWS_* variables or from the AWS profile.
    """
    with _storage_errors(path):
        if path.startswith("s3://"):
            inner = path.removeprefix("s3://").rstrip("/")
            if not inner or inner.startswith("/"):
                raise UserError(f"The path {path} names no bucket: write it as s3://bucket/folder.")
            settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
            return _s3(inner.partition("/")[0], settings), inner
        try:
            return pyarrow.fs.FileSystem.from_uri(path)
        except pa.ArrowInvalid as error:
            fix = "use a local path or s3://bucket/folder"
            raise UserError(f"The path {path} cannot be used ({str(error).rstrip('.')}): {fix}.") from error


@functools.lru_cache(maxsize=8)
def _s3(bucket: str, settings: tuple[tuple[str, str], ...]) -> pyarrow.fs.S3FileSystem:
    """A bucket's client, cached while the AWS_* variables are unchanged: a new client opens new connections."""
    aws = {name: value.strip() for name, value in settings}
    os.environ.update(aws)  # for the client: a secret mounted as a file may end with a newline
    endpoint = aws.get("AWS_ENDPOINT_URL_S3") or aws.get("AWS_ENDPOINT_URL")
    client = pyarrow.fs.S3FileSystem(
        # Only Amazon's buckets report their region, and only there does it decide which server answers.
        region=None if endpoint else pyarrow.fs.resolve_s3_region(bucket),
        endpoint_override=endpoint,
        connect_timeout=CONNECT_S,
        request_timeout=REQUEST_S,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        allow_delayed_open=True,  # a small file takes one request, not three
    )
    try:
        found = client.get_file_info(bucket).type
    except OSError as error:
        if "ACCESS_DENIED" not in str(error):
            raise
        return client  # a key may have access to a bucket's folders but not to the bucket
    if found == pyarrow.fs.FileType.NotFound:
        raise OSError("NO_SUCH_BUCKET")  # otherwise it would look like an empty bucket
    return client


@contextlib.contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """Turn failed requests to an object store, and outages of a disk, into StorageErrors; missing files and other local
    errors pass unchanged."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        if is_uri(path):
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
            raise _store_error(path, str(error)) from error
        if isinstance(error, OSError) and error.errno in OUTAGE_ERRNOS:
            raise outage(error, path) from error
        raise


def _store_error(path: str, answer: str) -> StorageError:
    if "NO_SUCH_BUCKET" in answer or ("Bucket" in answer and "not found" in answer):
        return StorageRefused(f"{path} is in a bucket that does not exist: create it, or check its name and AWS_ENDPOINT_URL.")
    if "NETWORK_CONNECTION" in answer:
        reason = answer.rpartition("Details: ")[2].strip(" .") if "Details: " in answer else "no response"
        fix = "check the network and AWS_ENDPOINT_URL, then rerun the same command to resume"
        return StorageError(f"{path} cannot be reached ({reason}): {fix}.")
    refusals = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN", "HTTP status 403")
    if any(refusal in answer for refusal in refusals):
        fix = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ask for access to the bucket"
        return StorageRefused(f"The object store refused access to {path}: {fix}.")
    return StorageError(f"{path} cannot be used: {answer.partition(' (Request ID')[0].partition(chr(10))[0].rstrip('. ')}.")


def join(base: str, *parts: str) -> str:
    """`base` with parts added, for a path or a URI."""
    return "/".join([base.rstrip("/"), *parts]) if is_uri(base) else os.path.join(base, *parts)


def last_part(path: str) -> str:
    """The name of a file or folder: the part of its path or URI after the last slash."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def printable(name: str) -> str:
    """The name as valid UTF-8: any other byte is escaped, as in %E9."""
    return re.sub("[\udc80-\udcff]", lambda found: f"%{ord(found[0]) - 0xDC00:02X}", name)


def absolute(path: str) -> str:
    """A local path made absolute, since Ray workers have a working directory of their own; a URI unchanged."""
    return path if is_uri(path) else os.path.abspath(path)


def exists(path: str) -> bool:
    """True if a file or a folder exists."""
    return _ask_store(path).type != pyarrow.fs.FileType.NotFound if is_uri(path) else _stat(path) is not None


def _stat(path: str) -> os.stat_result | None:
    """A local path's stat; None if it does not exist or is a dead link; os.path.exists would also be False in an outage."""
    try:
        return os.stat(path)  # without _storage_errors, which costs more than the call: reading asks once a file
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in OUTAGE_ERRNOS:
            raise outage(error, path) from error
        return None


def list_names(path: str) -> list[str]:
    """Sorted names of the entries of a folder; empty if it does not exist."""
    if is_uri(path):
        return sorted(entry.base_name for entry in _ask_store(path, recursive=False))
    try:
        with _storage_errors(path):
            return sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_files(path: str) -> list[tuple[str, int | None, int | None]]:
    """Sorted (name, size, modification time in ns) of a folder's entries, the last two None unless a file; one request."""
    if is_uri(path):
        entries = _ask_store(path, recursive=False)
        return sorted((entry.base_name, entry.size, entry.mtime_ns if entry.is_file else None) for entry in entries)
    stats = {name: _stat(join(path, name)) for name in list_names(path)}
    return [(n, s.st_size, s.st_mtime_ns) if s and stat.S_ISREG(s.st_mode) else (n, None, None) for n, s in stats.items()]


def _ask_store(path: str, **below):
    """The FileInfo of a path on an object store, or of the entries below it if `recursive` is given."""
    fs, inner = resolve(path)
    with _storage_errors(path):
        return fs.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True, **below) if below else inner)


def size_or_none(path: str) -> int | None:
    """Size of a file in bytes; None if the path is not a file."""
    if is_uri(path):
        return _ask_store(path).size
    found = _stat(path)
    return found.st_size if found and stat.S_ISREG(found.st_mode) else None


def walk(path: str) -> list[str]:
    """Sorted paths of all files below a folder; follows links but visits each folder once. Empty if it does not exist."""
    if is_uri(path):
        inner = resolve(path)[1]
        files = (entry.path for entry in _ask_store(path, recursive=True) if entry.is_file)
        return sorted(join(path, name.removeprefix(inner).lstrip("/")) for name in files)

    def raise_outage(error: OSError) -> None:
        if error.errno in OUTAGE_ERRNOS:
            raise outage(error, error.filename)

    found, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=raise_outage):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [os.path.join(folder, name) for name in names]
    return sorted(found)


def read_bytes(path: str, at_most: int = -1) -> bytes:
    """A file's bytes, or its first `at_most`; raises StorageError and OSError, such as FileNotFoundError."""
    if not is_uri(path):
        with _storage_errors(path), open(path, "rb") as stream:
            return stream.read(at_most)
    fs, inner = resolve(path)
    with _storage_errors(path):
        for _ in range(READS):
            # Opening requests the size, reading requests that many bytes: a file replaced in between would be truncated.
            with fs.open_input_file(inner) as stream:
                data = stream.read(None if at_most < 0 else at_most)
            size = fs.get_file_info(inner).size or 0
            if len(data) == (size if at_most < 0 else min(size, at_most)):
                return data
        raise OSError(f"it was replaced during each of {READS} attempts to read it")


def read_json(path: str) -> dict:
    """The value in a JSON file; raises UserError if it is missing or damaged, and StorageError if it cannot be read."""
    try:
        return json.loads(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise UserError(f"{path} is missing or not valid JSON: check the path, or restore the file.") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error}): check the path and its permissions.") from error


def publish(path: str, data: bytes) -> None:
    """Write a file, creating its folder, completely or not at all. Raises OSError (a full disk, say) and StorageError."""
    with _storage_errors(path):
        (_publish_on_store if is_uri(path) else _publish_locally)(path, data)


def _publish_locally(path: str, data: bytes) -> None:
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.part")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError):
            error.filename = path  # not the temporary file's, or none
        raise


def _publish_on_store(path: str, data: bytes) -> None:
    fs, inner = resolve(path)
    parent, name = inner.rsplit("/", 1)
    temporary = f"{parent}/.{name}.{uuid.uuid4().hex[:8]}.part"
    if not isinstance(fs, pyarrow.fs.S3FileSystem):
        fs.create_dir(parent, recursive=True)
    try:
        with fs.open_output_stream(temporary, compression=None) as stream:
            stream.write(data)
        # A stream dropped by an exception still leaves a visible object, so read it back before renaming it.
        with fs.open_input_file(temporary) as stream:
            if stream.read() != data:
                raise OSError("the bytes that arrived are not those that were sent")
        fs.move(temporary, inner)
    except BaseException:
        with contextlib.suppress(OSError):
            fs.delete_file(temporary)
        raise


def publish_json(path: str, value: object) -> None:
    """Write a value as indented JSON with sorted keys, complete or not at all."""
    publish(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Indented JSON with sorted keys; raises ValueError for NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def remove(path: str) -> None:
    """Delete a file or folder if it exists."""
    with _storage_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not is_uri(path):
            (shutil.rmtree if os.path.isdir(path) and not os.path.islink(path) else os.remove)(path)
            return
        fs, inner = resolve(path)
        (fs.delete_dir if fs.get_file_info(inner).type == pyarrow.fs.FileType.Directory else fs.delete_file)(inner)


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def write_table(path: str, table: pa.Table, **options) -> tuple[int, str]:
    """Publish a table as Parquet, with pyarrow's `options`; returns size and SHA-256 of the file."""
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, **options)
    data = sink.getvalue().to_pybytes()
    publish(path, data)
    return len(data), sha256(data)


def read_table(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table in a Parquet file's bytes; raises ArrowInvalid or OSError for a damaged one."""
    # On this thread alone: if a pyarrow thread drops the last reference to `data`, a process about to exit aborts.
    return pyarrow.parquet.ParquetFile(pa.BufferReader(data)).read(columns=columns, use_threads=False)
