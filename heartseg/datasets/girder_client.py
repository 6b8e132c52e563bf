"""Folders of a Girder server (the REST interface of girder.readthedocs.io): listed, fetched as zips, unpacked.

The only file that imports requests. Such a zip is made while it is sent, so it has neither a fixed checksum nor a part to
resume from: whoever fetches one opens what arrived, and fetches the whole of it again if it is damaged.
"""

import errno
import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import requests
import urllib3
from requests.adapters import HTTPAdapter

from heartseg.errors import UserError

T = TypeVar("T")
PAGE = 100
CONNECT_TIMEOUT_S = 15
BUSY_STATUSES = (408, 425, 429, *range(500, 600))
MAX_WAIT_S = 120  # that a server may ask for (Retry-After)
# Errors of names in a zip, and of its bytes; every other OSError is the disk's.
OF_THE_ZIP = (None, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
# A patient's folder has 14 files and some 10 to 100 MB; an answer or a zip that claims more than this is not one.
MAX_BYTES = 2**30


class FailedDownload(Exception):
    """The server cannot be reached, or refuses; the message continues a sentence that begins with a name."""


class DamagedDownload(FailedDownload):
    """What arrived is cut off or damaged: another try may bring it whole."""


@dataclass(frozen=True)
class Server:
    """A Girder server by the address of its interface (`https://…/api/v1`)."""

    base: str
    tries: int = 5
    wait_s: float = 2.0
    """Seconds between two tries; while the server is busy or cannot be reached, the first at once, then twice as long each."""
    timeout_s: float = 60.0
    """Seconds of silence after which a connection is given up."""

    def list_folders(self, parent: str) -> dict[str, str]:
        """Name to id of the folders in a folder, page by page; raises FailedDownload."""
        found: dict[str, str] = {}
        while True:
            params = {"parentType": "folder", "parentId": parent, "limit": PAGE, "offset": len(found), "sort": "lowerName"}
            before = len(found)
            found |= self.fetch("folder", parse_listing, params)
            if len(found) == before:  # the last page is empty; a server that ignores the offset repeats one
                return found

    def fetch(self, path: str, use: Callable[[bytes], T], params: dict | None = None) -> T:
        """`use` of the body of an answer, fetched again while `use` raises DamagedDownload and tries are left.

        Raises FailedDownload for whatever the network or the server did, and UserError for a certificate that is refused.
        """
        tries_left = self.tries
        while True:
            try:
                return use(self._body(path, params))
            except DamagedDownload:
                tries_left -= 1
                if tries_left < 1:
                    raise
            time.sleep(self.wait_s)

    def _body(self, path: str, params: dict | None) -> bytes:
        """The body of one answer; urllib3 repeats the request while the server cannot be reached or is busy."""
        body = io.BytesIO()
        retry = urllib3.Retry(
            self.tries - 1,
            other=0,
            status_forcelist=BUSY_STATUSES,
            backoff_factor=self.wait_s,
            raise_on_status=False,
            retry_after_max=MAX_WAIT_S,
        )
        with requests.Session() as session:
            for scheme in ("https://", "http://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            try:
                answer = session.get(
                    f"{self.base.rstrip('/')}/{path}",
                    params=params,
                    headers={"Accept-Encoding": "identity", "User-Agent": "heartseg"},
                    stream=True,
                    timeout=(min(CONNECT_TIMEOUT_S, self.timeout_s), self.timeout_s),
                )
            except requests.exceptions.SSLError as error:
                if "CERTIFICATE_VERIFY_FAILED" not in str(error):
                    raise DamagedDownload(f"breaks off the encrypted connection ({cause(error)})") from error
                raise UserError(
                    f"The certificate of {self.base} is refused ({cause(error)}): check the clock and the address, or name "
                    "your network's own certificates in REQUESTS_CA_BUNDLE."
                ) from error
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:  # the second for an odd host name
                raise FailedDownload(f"cannot be reached ({cause(error)})") from error
            if answer.status_code != 200:
                raise FailedDownload(f"answers {answer.status_code} {answer.reason}")
            try:
                for chunk in answer.iter_content(2**18):
                    body.write(chunk)
                    if body.tell() > MAX_BYTES:
                        raise FailedDownload(f"sends more than {MAX_BYTES} bytes")
            except requests.RequestException as error:
                raise DamagedDownload(f"breaks off after {body.tell()} bytes") from error
        return body.getvalue()


def cause(error: Exception) -> str:
    """What a failed request failed of, without the wrappers that requests and urllib3 put around it."""
    return str(getattr(error.args[0], "reason", error) if error.args else error).rpartition(": ")[2]


def parse_listing(body: bytes) -> dict[str, str]:
    """Name to id of the folders in a page; raises DamagedDownload."""
    try:
        return {str(entry["name"]): str(entry["_id"]) for entry in json.loads(body)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedDownload("answers with something other than a list of folders") from error


def unpack(packed: bytes, target: str) -> None:
    """Unpack a zip into the folder `target` and flush it to the disk; zipfile writes nothing outside that folder.

    Raises DamagedDownload, or OSError if `target` cannot be written.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise DamagedDownload(f"sends a zip of more than {MAX_BYTES} bytes")
            for entry in archive.infolist():
                path = archive.extract(entry, target)  # checks the length and the CRC-32, and writes no more than claimed
                if not entry.is_dir():
                    with open(path, "rb") as stream:
                        os.fsync(stream.fileno())
    except DamagedDownload:
        raise
    except Exception as error:  # zipfile raises a dozen kinds for damaged bytes, OSErrors of names and of bz2 among them
        if isinstance(error, OSError) and error.errno not in OF_THE_ZIP:
            raise  # of the disk
        raise DamagedDownload(f"sends a damaged zip ({str(error) or type(error).__name__})") from error
