"""A Weights & Biases server on loopback, with what wandb's own client needs: it keeps all data and their times of arrival.

It answers the GraphQL operations that wandb 0.31 was seen to ask (a run, its files, its artifacts), takes the stream of
rows and the uploads, and falls silent or fails on demand.
"""

import contextlib
import gzip
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0123456789" * 4
HISTORY = "wandb-history.jsonl"
PROJECT = {"id": "project-1", "name": "heartseg", "entity": {"id": "entity-1", "name": "tester"}}


@dataclass
class SentRun:
    """The data that a run has sent: its configuration, its rows by line, their times of arrival, and how it ended."""

    config: dict = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    arrivals: dict[int, float] = field(default_factory=dict)
    exit_code: int | None = None
    uploads: set[str] = field(default_factory=set)

    def rows(self) -> list[dict]:
        lines = self.lines.get(HISTORY, {})
        return [json.loads(lines[number]) for number in sorted(lines)]


class Server(ThreadingHTTPServer):
    """`failure` is what happens to a request: None (served), `silent` (never answered), `error` (HTTP 500) or `refusal` (401).

    `fail_after_rows` sets `failure` to `fail_with` as soon as that many rows have arrived.
    """

    daemon_threads = True

    def __init__(self, failure: str | None = None, fail_after_rows: int = 0, fail_with: str = "silent"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failure, self.fail_after_rows, self.fail_with = failure, fail_after_rows, fail_with
        self.runs: dict[str, SentRun] = {}
        self.artifacts: dict[str, dict] = {}
        self.paths: set[str] = set()
        self.failed_requests = 0
        self.closing = threading.Event()
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """The variables that send a run here, with a dummy key."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is not an error here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.paths.add(self.path)
        self.server.failed_requests += bool(self.server.failure)
        if self.server.failure == "silent":
            self.server.closing.wait()
            self.close_connection = True
        elif code := {"error": 500, "refusal": 401}.get(self.server.failure):
            self.reply(code, {"error": "asked to fail"})
        else:
            with self.server.guard:
                self.reply(200, self.answer(body))

    do_GET = do_POST = do_PUT = serve

    def answer(self, body: bytes) -> dict:
        """The JSON answer to a request, after storing its data."""
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = asked.get("operationName") or asked["query"].split("(")[0].split()[1]
            return {"data": getattr(self, operation, lambda _: {})(asked.get("variables") or {})}
        parts = self.path.strip("/").split("/")
        if parts[0] == "files" and parts[-1] == "file_stream":
            self.keep_stream(self.server.runs[parts[-2]], json.loads(body))
        elif parts[0] == "upload":
            self.server.runs.setdefault(parts[1], SentRun()).uploads.add("/".join(parts[2:]))
        return {}

    def reply(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass

    def keep_stream(self, run: SentRun, sent: dict) -> None:
        """Store lines by number, like the real server: a line that is sent again replaces the earlier one."""
        for name, part in (sent.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            lines |= dict(enumerate(part["content"], part["offset"]))
            if name == HISTORY:
                run.arrivals = dict.fromkeys(lines, time.monotonic()) | run.arrivals
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
        if self.server.fail_after_rows and len(run.arrivals) >= self.server.fail_after_rows:
            self.server.failure, self.server.fail_after_rows = self.server.fail_with, 0

    # The GraphQL operations, under their own names.

    def Viewer(self, _: dict) -> dict:  # noqa: N802
        return {"viewer": {"id": "1", "entity": "tester", "username": "tester", "email": "t@example.org", "flags": "{}",
                "teams": {"edges": []}}}  # fmt: skip

    def RunResumeStatus(self, asked: dict) -> dict:  # noqa: N802
        run = self.server.runs.get(asked["name"])
        return {"model": PROJECT | {"bucket": run and resumed(asked["name"], run)}}

    def UpsertBucket(self, asked: dict) -> dict:  # noqa: N802
        name, is_new = asked["name"], asked["name"] not in self.server.runs
        run = self.server.runs.setdefault(name, SentRun())
        run.config |= {key: item["value"] for key, item in json.loads(asked.get("config") or "{}").items()}
        bucket = resumed(name, run) | {"project": PROJECT, "description": None, "sweepName": None}
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def ArtifactType(self, _: dict) -> dict:  # noqa: N802
        return {"project": {"artifact": None}}

    def CreateRunFiles(self, asked: dict) -> dict:  # noqa: N802
        files = [{"name": n, "uploadUrl": f"{self.server.url}/upload/{asked['run']}/{n}"} for n in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def CreateArtifact(self, asked: dict) -> dict:  # noqa: N802
        name, metadata = asked["input"]["artifactCollectionName"], json.loads(asked["input"]["metadata"] or "{}")
        self.server.artifacts[name] = {"metadata": metadata, "files": set(), "is_committed": False}
        artifact = {"id": f"artifact-{name}", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def CreateArtifactManifest(self, asked: dict) -> dict:  # noqa: N802
        file = {"id": "file-1", "name": asked["name"], "displayName": asked["name"], "uploadHeaders": []}
        file["uploadUrl"] = f"{self.server.url}/artifact/{asked['name']}"
        return {"createArtifactManifest": {"artifactManifest": {"id": "manifest-1", "file": file}}}

    def CreateArtifactFiles(self, asked: dict) -> dict:  # noqa: N802
        nodes = []
        for spec in asked.get("artifactFiles") or asked["input"]["artifactFiles"]:
            self.server.artifacts[spec["artifactID"].removeprefix("artifact-")]["files"].add(spec["name"])
            node = {"id": spec["name"], "name": spec["name"], "displayName": spec["name"], "uploadHeaders": []}
            node |= {"storagePath": spec["name"], "uploadUrl": f"{self.server.url}/artifact/{spec['name']}"}
            nodes.append({"node": node | {"artifact": {"id": spec["artifactID"]}, "uploadMultipartUrls": None}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def CommitArtifact(self, asked: dict) -> dict:  # noqa: N802
        name = asked["artifactID"].removeprefix("artifact-")
        self.server.artifacts[name]["is_committed"] = True
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": ""}}}


def resumed(name: str, run: SentRun) -> dict:
    """The reply to the client's query before it resumes a run."""
    lines, events = (run.lines.get(name, {}) for name in (HISTORY, "wandb-events.jsonl"))
    return {
        "id": f"id-{name}", "name": name, "displayName": name, "notes": None, "tags": [],
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "wandbConfig": json.dumps({"t": 1}),
        "summaryMetrics": json.dumps(run.rows()[-1] if lines else {}),
        "historyLineCount": len(lines), "eventsLineCount": len(events), "logLineCount": 0,
        "historyTail": json.dumps([lines[max(lines)]] if lines else []),
        "eventsTail": json.dumps([events[max(events)]] if events else []),
    }  # fmt: skip


@contextlib.contextmanager
def serving(**options) -> Iterator[Server]:
    server = Server(**options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
