"""A Girder-like server on loopback for the download's tests: it serves a CAMUS tree, and misbehaves on demand."""

import io
import json
import os
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

from jobs import download

FOLDERS = {download.IMAGES_ID: "database_nifti", download.SPLIT_ID: "database_split"}


def zip_of(files: dict[str, bytes]) -> bytes:
    """A zip with these entries, stored as Girder stores them."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return packed.getvalue()


class GirderServer(ThreadingHTTPServer):
    """Serves `tree`; `faults` holds, by folder name, the faults of the next requests; `requests` are their names.

    A fault is a status code, `cut`, `long`, `short`, `silent`, or the bytes to send instead; a fault that is not in a list
    stays for ever.
    """

    daemon_threads = True
    page_size = 2
    pause_s = 0.0

    def __init__(self, tree: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tree, self.faults, self.requests = tree, {}, []
        names = sorted(os.listdir(os.path.join(tree, "database_nifti")))
        self.ids = {f"{number:024x}": name for number, name in enumerate(names)}
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/database/api/v1"

    def files_of(self, name: str) -> dict[str, bytes]:
        folder = Path(self.tree, name if name == "database_split" else f"database_nifti/{name}")
        return {f"{name}/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}

    def count(self, name: str) -> int:
        return self.requests.count(name)


class Handler(BaseHTTPRequestHandler):
    """Two routes of Girder's: a folder's folders, and a folder as a zip."""

    protocol_version = "HTTP/1.1"
    server: GirderServer

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        url = urlparse(self.path)
        identity = url.path.removeprefix("/database/api/v1/folder").strip("/").removesuffix("/download")
        if identity:
            name = FOLDERS.get(identity) or self.server.ids[identity]
            body = zip_of(self.server.files_of(name))
        else:
            name, body = "list", self.page({key: values[0] for key, values in parse_qs(url.query).items()})
        self.server.requests.append(name)
        planned = self.server.faults.get(name)
        self.answer(body, (planned.pop(0) if planned else None) if isinstance(planned, list) else planned)

    def page(self, query: dict[str, str]) -> bytes:
        """A page of the image folder, never longer than the server allows."""
        assert query["parentType"] == "folder" and query["parentId"] == download.IMAGES_ID
        start = int(query["offset"])
        entries = [{"_id": i, "name": name, "_modelType": "folder"} for i, name in self.server.ids.items()]
        return json.dumps(entries[start : start + min(int(query["limit"]), self.server.page_size)]).encode()

    def answer(self, body: bytes, fault=None) -> None:
        """Send a body in chunks, like Girder, or with the fault."""
        if isinstance(fault, bytes):
            body = fault
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.close_connection = fault in ("silent", "long", "short", "cut")
        if fault == "silent":
            return time.sleep(3)
        self.send_response(200)
        if fault in ("long", "short"):
            self.send_header("Content-Length", str(len(body) * 2 if fault == "long" else len(body) // 2))
            self.end_headers()
            return self.wfile.write(body)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        parts = [body[start : start + 2**16] for start in range(0, len(body), 2**16)]
        for part in parts[: len(parts) // 2] if fault == "cut" else [*parts, b""]:
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            time.sleep(self.server.pause_s)
        return None
