"""The image, as far as it can be tested without a Docker engine: its instructions, context, pins and installation.

Not tested: the two apt-get lines, the layers themselves, and anything on a GPU.
"""

import fnmatch
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.version import Version

from helpers.experiments import ROOT

PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([0-9][\w.+!-]*)( ; [^\\]*)? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


# A copy in memory: the parser opens a path for writing.
INSTRUCTIONS = [
    (part["instruction"], part["value"])
    for part in DockerfileParser(fileobj=io.BytesIO((ROOT / "Dockerfile").read_bytes())).structure
]
FIRST, LAST = (place for place, (keyword, _) in enumerate(INSTRUCTIONS) if keyword == "FROM")
BUILDER, IMAGE = INSTRUCTIONS[FIRST:LAST], INSTRUCTIONS[LAST:]


def values(stage: list[tuple[str, str]], keyword: str) -> list[str]:
    return [value for name, value in stage if name == keyword]


def admitted(path: str) -> bool:
    """True if .dockerignore lets a file into the context: the last pattern that matches it or a folder above it decides."""
    is_in, above = True, [path, *[str(parent) for parent in Path(path).parents if str(parent) != "."]]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        names = [Path(p).name for p in above] if "**/" in line else above
        if pattern and line[0] != "#" and any(fnmatch.fnmatch(name, pattern) for name in names):
            is_in = line.startswith("!")
    return is_in


def test_every_tracked_file_that_is_copied_is_in_the_context_and_no_data_results_secrets_or_history():
    outside = [".git/config", ".env", "jobs/.env.local", "cluster/key.pem", "runs/a/model.safetensors"]
    assert [path for path in [*outside, "heartseg/x.parquet", "tests/x.py"] if admitted(path)] == []
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    copies = [shlex.split(value) for value in values(INSTRUCTIONS, "COPY") if not value.startswith("--from")]
    for source in (source for *sources, _ in copies for source in sources):
        files = [name for name in listed if name == source or name.startswith(source.rstrip("/") + "/")]
        assert files, f"{source} is not in the repository"
        assert all(admitted(name) for name in files), source


def test_the_last_stage_has_one_compiler_an_ordinary_user_a_health_check_and_labels_of_origin_and_version():
    keywords = [keyword for keyword, _ in IMAGE]
    assert values(IMAGE, "USER") == ["1000:1000"] and "ADD" not in keywords
    assert keywords.index("USER") < min(keywords.index("CMD"), keywords.index("HEALTHCHECK"))
    commands = " ".join(values(IMAGE, "RUN"))
    tools = {"build-essential", "gcc", "g++", "clang", "make", "cmake", "ninja", "git", "python3-dev", "pip"}
    assert tools & set(re.findall(r"[\w+-]+", commands)) == {"gcc"}
    assert "--no-install-recommends" in commands and "rm -rf /var/lib/apt/lists" in commands
    script = json.loads(values(IMAGE, "HEALTHCHECK")[0].split("CMD ", 1)[1])[1]
    assert (ROOT / script).is_file() and admitted(script)
    assert {base.split(" AS ")[0] for base in values(INSTRUCTIONS, "FROM")} == {"python:3.11-slim"}
    assert "--python-version 3.11" in (ROOT / "Makefile").read_text()
    for name in ("title", "description", "version", "revision", "source", "licenses"):
        assert f"org.opencontainers.image.{name}=" in values(IMAGE, "LABEL")[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"VERSION={project['version']}" in values(IMAGE, "ARG")


def health_check(port: int, monkeypatch) -> Callable[[], int]:
    monkeypatch.setenv("HEARTSEG_CLUSTER_AGENT_PORT", str(port))
    check = runpy.run_path(str(ROOT / "cluster" / "health.py"))["main"]
    check.__globals__["SECONDS"] = 0.3
    return check


@pytest.mark.parametrize(("answer", "code"), [(200, 0), (503, 1), (None, 1)])
def test_a_container_with_a_ray_node_is_as_healthy_as_the_node(answer, code, monkeypatch):
    class Agent(BaseHTTPRequestHandler):
        def do_GET(self):
            if answer is None:
                return time.sleep(1)
            self.send_response(answer if self.path == "/api/healthz" else 404)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Agent) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert health_check(server.server_address[1], monkeypatch)() == code


def test_a_container_without_a_node_is_healthy_if_its_imports_work(monkeypatch):
    check = health_check(9, monkeypatch)
    assert check() == 0
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="torchvision"):
        check()


def test_the_constraints_hold_only_names_versions_and_hashes_and_satisfy_the_projects_requirements():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines[:2] == ["# This file was autogenerated by uv via the following command:", "#    make constraints"]
    assert [line for line in lines[2:] if not (PIN.match(line) or HASH.match(line))] == []
    pins = {match[1]: match[2] for match in map(PIN.match, lines) if match}
    assert len(pins) > 80
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = project["project"]["dependencies"] + extras["cluster"] + extras["formats"] + project["build-system"]["requires"]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(Version(pins[requirement.name])), requirement


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_installation_of_the_builder_works_in_a_clean_environment(tmp_path):
    """The builder's steps, run in a folder of this machine: some 5 GB, deleted afterwards."""
    build, target = tmp_path / "build", tmp_path / "venv"
    build.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{target}/bin:{environment['PATH']}"
    ran = []
    for keyword, value in BUILDER:
        if keyword == "COPY":
            *sources, place = shlex.split(value)
            subprocess.run(["cp", "-r", *sources, build / place], cwd=ROOT, check=True)
        elif keyword == "RUN":
            command = re.sub(r"--mount=\S+\s*", "", value).replace("/opt/venv", str(target))
            command = command.replace("python -m venv", f"{sys.executable} -m venv")
            # uv checks the same hashes, and installs the 5 GB in a third of pip's time.
            command = command.replace("pip install", f"{sys.executable} -m uv pip install --python {target}/bin/python")
            done = subprocess.run(["bash", "-ec", command], cwd=build, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            ran.append(command)
    assert len(ran) == 3
    code = "import heartseg, torch, torchvision, ray, boto3, googleapiclient; print(torch.version.cuda, heartseg.__file__)"
    done = subprocess.run([target / "bin" / "python", "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith("None") and str(target) in done.stdout
