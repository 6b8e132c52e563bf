"""Folders of a Girder server (the REST interface of girder.readthedocs.io): listed, fetched as zips, unpacked without trust.

The only file that knows requests. Such a zip is made while it is sent, so it has neither a fixed checksum nor a part to
resume from: whoever fetches one opens what arrived, and asks again for the whole of it.
"""

import io
import json
import os
import random
import re
import stat
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

import requests
from urllib3.exceptions import LocationValueError

from heartseg.errors import UserError

T = TypeVar("T")
PAGE = 100
CONNECT_TIMEOUT_S, MAX_RETRY_AFTER_S = 15, 120
MAX_LIST_BYTES = 2**26
# A patient's folder has 14 files and some 10 to 100 MB; what claims more than this is an attack or an accident.
MAX_ZIP_BYTES = MAX_UNPACKED_BYTES = 2**30
MAX_ENTRIES = 1000
ID = re.compile(r"[0-9A-Za-z]{1,64}")


class FailedDownload(Exception):
    """A download that did not arrive; the message is the reason, `passing` says that another try may mend it."""

    def __init__(self, reason: str, passing: bool = True, wait_s: float = 0.0):
        super().__init__(reason)
        self.passing, self.wait_s = passing, wait_s


@dataclass(frozen=True)
class Server:
    """A Girder server by the address of its interface (`https://…/api/v1`)."""

    base: str
    tries: int = 5
    wait_s: float = 2.0
    """Seconds before the second try; twice as many before each one after it."""
    timeout_s: float = 60.0
    """Seconds of silence after which a connection is given up."""
    session: requests.Session = field(default_factory=requests.Session, repr=False, compare=False)

    def __post_init__(self):
        if not re.fullmatch(r"https?://[^/\s]+.*", self.base):
            raise UserError(f"The server {self.base!r} is no address: give one that begins with https://.")

    def patiently(self, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, tried again after a growing pause while its failures are passing ones."""
        for trial in range(1, self.tries + 1):
            try:
                return attempt()
            except FailedDownload as error:
                if not error.passing or trial == self.tries:
                    raise
                time.sleep(max(error.wait_s, self.wait_s * 2 ** (trial - 1) * random.uniform(0.75, 1.25)))
        raise UserError("A download needs at least one try.")

    def list_folders(self, parent: str) -> dict[str, str]:
        """Name to id of the folders in a folder, page by page; raises FailedDownload."""
        found: dict[str, str] = {}
        offset = 0
        while page := self.patiently(lambda: self._page(parent, offset)):  # noqa: B023 (called before offset moves on)
            new = {name: identity for name, identity in page if name not in found}
            if not new:  # a server that knows no offset would go on for ever
                break
            found |= new
            offset += len(page)
        return found

    def _page(self, parent: str, offset: int) -> list[tuple[str, str]]:
        params = {"parentType": "folder", "parentId": parent, "limit": PAGE, "offset": offset, "sort": "lowerName"}
        body = io.BytesIO()
        self.fetch("folder", body, params, MAX_LIST_BYTES)
        try:
            page = [(str(entry["name"]), str(entry["_id"])) for entry in json.loads(body.getvalue())]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FailedDownload("answers with something else than a list of folders") from error
        if not all(ID.fullmatch(identity) for _, identity in page):
            raise FailedDownload("answers with folder ids that are none", passing=False)
        return page

    def fetch(self, path: str, out: BinaryIO, params: dict | None = None, max_bytes: int = MAX_ZIP_BYTES) -> int:
        """Write the body of one answer to `out`; returns its bytes.

        Raises FailedDownload for whatever the network or the server did, UserError for a certificate that is refused,
        and OSError where `out` cannot be written.
        """
        num_bytes = 0
        headers = {"Accept-Encoding": "identity", "User-Agent": "heartseg"}
        timeout = (min(CONNECT_TIMEOUT_S, self.timeout_s), self.timeout_s)
        url = f"{self.base.rstrip('/')}/{path}"
        try:
            with self.session.get(url, params=params, headers=headers, stream=True, timeout=timeout) as answer:
                check_status(answer)
                for chunk in answer.iter_content(2**18):
                    num_bytes += len(chunk)
                    if num_bytes > max_bytes:
                        raise FailedDownload(f"sends more than {max_bytes} bytes", passing=False)
                    out.write(chunk)
        except requests.exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" not in str(error):
                raise FailedDownload(f"breaks off the encrypted connection ({innermost(error)})") from error
            raise UserError(
                f"The certificate of {self.base} is refused ({innermost(error)}): check the clock and the address, or name "
                "your network's own certificates in REQUESTS_CA_BUNDLE."
            ) from error
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError) as error:
            raise FailedDownload(f"breaks off after {num_bytes} bytes") from error
        except (requests.RequestException, LocationValueError) as error:  # the second for a host name that can be none
            raise FailedDownload(f"cannot be reached ({innermost(error)})") from error
        return num_bytes


def check_status(answer: requests.Response) -> None:
    """Raise FailedDownload for an answer that is no success; a busy or failing server may do better later."""
    if answer.status_code == 200:
        return
    later = answer.headers.get("Retry-After", "")
    wait_s = min(float(later), MAX_RETRY_AFTER_S) if later.isdecimal() else 0.0
    passing = answer.status_code in (408, 425, 429) or answer.status_code >= 500
    raise FailedDownload(f"answers {answer.status_code} {answer.reason}", passing, wait_s)


def innermost(error: BaseException) -> str:
    """The last cause of an error, without the addresses of objects that its wrappers add."""
    while True:
        inner = getattr(error, "reason", None)
        inner = inner if isinstance(inner, BaseException) else next(
            (arg for arg in error.args if isinstance(arg, BaseException)), None
        )  # fmt: skip
        if inner is None:
            return re.sub(r"^<.*?>: |^HTTPS?Connection\(.*?\): ", "", str(error)) or type(error).__name__
        error = inner


def unpack(path: str, target: str, top: str) -> None:
    """Unpack a zip into the folder `target`, without the folder `top` that its entries begin with.

    Nothing is written outside `target`: an entry that is absolute, climbs, is a link or a device, or stands there twice
    refuses the zip, and so do sizes that are absurd. Raises FailedDownload, or OSError where `target` cannot be written.
    """
    with open(path, "rb") as stream:
        try:
            archive = zipfile.ZipFile(stream)
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        except Exception as error:  # zipfile raises a dozen kinds for damaged bytes
            raise FailedDownload(f"sends no readable zip ({str(error) or type(error).__name__})") from error
        total = sum(entry.file_size for entry in entries)
        if total > MAX_UNPACKED_BYTES or len(entries) > MAX_ENTRIES:
            raise FailedDownload(f"sends a zip that claims {len(entries)} files of {total} bytes", passing=False)
        places = {safe_parts(entry, top): entry for entry in entries}
        if len(places) < len(entries):
            raise FailedDownload("sends a zip with the same file twice", passing=False)
        for parts, entry in places.items():
            write_entry(archive, entry, os.path.join(target, *parts))


def safe_parts(entry: zipfile.ZipInfo, top: str) -> tuple[str, ...]:
    """The path of a zip entry below `top`, in parts; raises FailedDownload for one that is no plain file inside."""
    mode = entry.external_attr >> 16
    parts = entry.filename.split("/")
    plain = stat.S_IFMT(mode) in (0, stat.S_IFREG) and all(part not in ("", ".", "..") for part in parts)
    plain = plain and not re.search(r"[\\:\x00-\x1f]", entry.orig_filename) and len(entry.orig_filename.encode()) <= 200
    if not plain:
        raise FailedDownload(
            f"sends a zip with the entry {entry.orig_filename[:80]!r}, which is no plain file inside", passing=False
        )
    return tuple(parts[1:] if parts[0] == top and len(parts) > 1 else parts)


def write_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: str) -> None:
    """Write one entry to a new file, flushed to the disk; raises FailedDownload where it is not what the zip says."""

    def damaged(error: object) -> FailedDownload:
        return FailedDownload(f"sends a damaged zip ({entry.filename}: {error})")

    try:
        content = archive.open(entry)
    except Exception as error:
        raise damaged(error) from error
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise FailedDownload(f"sends a zip where {entry.filename} is a file and a folder", passing=False) from error
    with content, os.fdopen(descriptor, "wb") as stream:
        while True:
            try:
                chunk = content.read(2**20)  # zipfile checks length and CRC-32, and reads no more than the zip claims
            except Exception as error:
                raise damaged(str(error) or type(error).__name__) from error
            if not chunk:
                break
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
