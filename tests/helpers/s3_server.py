"""An S3 server on loopback, and a proxy in front of it that cuts connections, holds them, or answers in its place."""

import contextlib
import logging
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
CHANGES = (b"PUT ", b"POST ", b"DELETE ")


def start_server() -> str:
    """Start moto's S3 in this process; returns its URL, with a bucket `bucket`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    make_bucket(url, "bucket")
    return url


def make_bucket(url: str, name: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT"), timeout=30).close()


@contextlib.contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Replace all AWS_* variables for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


class Proxy:
    """Relays connections to a server until the `cut_at`-th request that changes something, which it cuts.

    Half of that request's body arrives; if it has none, only the answer is lost. Then `for_good` closes every connection, and
    `hold` keeps the cut one open and silent. `answer(head)` may return a complete answer.
    """

    def __init__(self, url: str, cut_at=0, for_good=True, hold=False, answer: Callable[[bytes], bytes | None] | None = None):
        self.server = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.cut_at, self.for_good, self.hold, self.answer = cut_at, for_good, hold, answer
        self.changes, self.was_cut = 0, threading.Event()
        self.lock, self.listener = threading.Lock(), socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self.server) as server:
            if self.was_cut.is_set() and self.for_good:
                return
            threading.Thread(target=_relay, args=(server, client), daemon=True).start()
            while data := client.recv(1 << 16):
                is_head = re.match(rb"[A-Z]+ /", data)
                answer = self.answer(data) if self.answer and is_head else None
                if answer is not None:
                    client.sendall(answer)
                    return client.shutdown(socket.SHUT_RDWR)
                if self._is_to_be_cut(data):
                    self._send_half(client, server, data)
                    self.was_cut.set()
                    if self.hold:
                        threading.Event().wait()
                    for end in (server, client):
                        end.shutdown(socket.SHUT_RDWR)
                    return
                server.sendall(data)

    def _is_to_be_cut(self, data: bytes) -> bool:
        if not data.startswith(CHANGES):
            return False
        with self.lock:
            self.changes += 1
            return self.changes == self.cut_at

    def _send_half(self, client: socket.socket, server: socket.socket, data: bytes) -> None:
        head, _, body = data.partition(b"\r\n\r\n")
        if not body and int((re.search(rb"(?i)content-length: *(\d+)", head) or [0, 0])[1]):
            server.sendall(data)
            body, head = client.recv(1 << 16), b""
            server.sendall(body[: len(body) // 2])
        else:
            server.sendall(data[: len(data) - len(body) // 2 if body else None])


def _relay(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
