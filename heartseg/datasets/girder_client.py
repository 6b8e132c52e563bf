"""Lists, downloads (as zips) and unpacks folders of a Girder server, through its REST API (girder.readthedocs.io).

The only file that imports requests. The server creates a zip while sending it, without a checksum to compare and no way to
resume: a damaged zip is downloaded again in full.
"""

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

from heartseg.errors import UserError
from heartseg.storage import filesystem

T = TypeVar("T")
PAGE = 100
CONNECT_TIMEOUT_S = 15
BUSY_STATUSES = (408, 425, 429, *range(500, 600))
MAX_BYTES = 2**30  # of a response or an unpacked zip; a patient's folder has 14 files, some 10 to 100 MB


class FailedDownload(Exception):
    """A download failed; the message follows the name of the server or folder."""


class DamagedDownload(FailedDownload):
    """Nothing arrived, or the download is truncated or damaged: another try may succeed."""


@dataclass(frozen=True)
class Server:
    """A Girder server: the address of its API (`https://…/api/v1`), and the client's timeouts and number of tries."""

    base: str
    tries: int
    wait_s: float  # before the second try; doubles with each further one
    timeout_s: float  # of silence before a connection is dropped

    def list_folders(self, parent: str) -> dict[str, str]:
        """Ids of the folders in a folder, by name; raises FailedDownload."""
        found, before = {}, -1
        while len(found) > before:  # the last page is empty; a server that ignores the offset repeats one
            before = len(found)
            params = {"parentType": "folder", "parentId": parent, "limit": PAGE, "offset": before, "sort": "lowerName"}
            found |= self.fetch("folder", parse_listing, params)
        return found

    def fetch(self, path: str, use: Callable[[bytes], T], params: dict | None = None) -> T:
        """The result of `use` on a response's body; retries after a DamagedDownload, and raises FailedDownload."""
        for wait_s in [self.wait_s * 2**earlier for earlier in range(self.tries - 1)]:
            try:
                return use(self._body(path, params))
            except DamagedDownload:
                time.sleep(wait_s)
        return use(self._body(path, params))

    def _body(self, path: str, params: dict | None) -> bytes:
        body, url = io.BytesIO(), f"{self.base.rstrip('/')}/{path}"
        headers = {"Accept-Encoding": "identity", "User-Agent": "heartseg"}
        timeout = (min(CONNECT_TIMEOUT_S, self.timeout_s), self.timeout_s)
        try:
            with requests.get(url, params, headers=headers, stream=True, timeout=timeout) as answer:
                if answer.status_code != 200:
                    kind = DamagedDownload if answer.status_code in BUSY_STATUSES else FailedDownload
                    raise kind(f"returns {answer.status_code} {answer.reason}")
                for chunk in answer.iter_content(2**18):
                    body.write(chunk)
                    if body.tell() > MAX_BYTES:
                        raise FailedDownload(f"sends more than {MAX_BYTES} bytes")
        except requests.exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" not in str(error):
                raise DamagedDownload(f"drops the encrypted connection ({cause(error)})") from error
            fix = "check the clock and the address, or set REQUESTS_CA_BUNDLE to the file of your network's own certificates"
            raise UserError(f"The certificate of {self.base} was rejected ({cause(error)}): {fix}.") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:  # the second: a malformed host name
            kind = FailedDownload if isinstance(error, ValueError) else DamagedDownload  # retrying does not help a bad address
            what = f"drops the connection after {body.tell()} bytes" if body.tell() else f"cannot be reached ({cause(error)})"
            raise kind(what) from error
        return body.getvalue()


def cause(error: Exception) -> str:
    """Why a request failed, without the wrapping of requests and urllib3."""
    return str(getattr(error.args[0], "reason", error) if error.args else error).rpartition(": ")[2]


def parse_listing(body: bytes) -> dict[str, str]:
    """Ids of the folders on a page, by name; raises DamagedDownload."""
    try:
        return {str(entry["name"]): str(entry["_id"]) for entry in json.loads(body)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedDownload("returns something other than a list of folders") from error


def unpack(packed: bytes, target: str) -> None:
    """Unpack a zip into the folder `target` and flush it to disk; raises DamagedDownload before anything is written."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(packed))
        size, damaged = sum(entry.file_size for entry in archive.infolist()), archive.testzip()
    except Exception as error:  # zipfile raises a dozen exception types for damaged bytes
        raise DamagedDownload(f"sends a damaged zip ({str(error) or type(error).__name__})") from error
    if size > MAX_BYTES:
        raise DamagedDownload(f"sends a zip of more than {MAX_BYTES} bytes")
    if damaged:
        raise DamagedDownload(f"sends a damaged zip (bad checksum of {damaged})")
    archive.extractall(target)
    for path in filesystem.walk(target):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
