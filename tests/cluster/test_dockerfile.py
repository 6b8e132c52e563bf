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
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.version import Version

from helpers.experiments import ROOT

PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([0-9][\w.+!-]*)( ; [^\\]*)? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def parse() -> list[list[tuple[str, str]]]:
    """The Dockerfile's stages, each as its instructions."""
    # A copy in memory: the parser opens a path for writing.
    parser = DockerfileParser(fileobj=io.BytesIO((ROOT / "Dockerfile").read_bytes()))
    found: list[list[tuple[str, str]]] = []
    for part in parser.structure:
        if part["instruction"] == "FROM":
            found.append([])
        if found and part["instruction"] != "COMMENT":
            found[-1].append((part["instruction"], part["value"]))
    return found


STAGES = parse()


def copies(stage: list[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """(sources, target) of what a stage copies from the context."""
    lines = [shlex.split(value) for keyword, value in stage if keyword == "COPY"]
    return [(words[:-1], words[-1]) for words in lines if not any(word.startswith("--from") for word in words)]


def admitted(path: str) -> bool:
    """True if .dockerignore lets a file into the context: the last pattern that matches it or a folder above it decides."""
    taken = True
    above = [path, *[str(parent) for parent in Path(path).parents if str(parent) != "."]]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not pattern or line.startswith("#"):
            continue
        names = [Path(p).name for p in above] if "**/" in line else above
        if any(fnmatch.fnmatch(name, pattern) for name in names):
            taken = line.startswith("!")
    return taken


def pins() -> dict[str, str]:
    """Name -> version in constraints.txt."""
    found = (PIN.match(line) for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {match[1]: match[2] for match in found if match}


def test_every_tracked_file_that_is_copied_is_in_the_context():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for sources, _ in (copy for stage in STAGES for copy in copies(stage)):
        for source in sources:
            files = [name for name in listed if name == source or name.startswith(source.rstrip("/") + "/")]
            assert files, f"{source} is not in the repository"
            assert all(admitted(name) for name in files), source


def test_data_results_secrets_and_history_stay_out_of_the_context():
    outside = [".git/config", ".env", "jobs/.env.local", "cluster/key.pem", "runs/a/model.safetensors"]
    assert [path for path in [*outside, "heartseg/x.parquet", "tests/x.py"] if admitted(path)] == []


def test_the_last_stage_has_no_build_tools_and_runs_as_an_ordinary_user():
    keywords = [keyword for keyword, _ in STAGES[-1]]
    assert [value for keyword, value in STAGES[-1] if keyword == "USER"] == ["1000:1000"]
    assert keywords.index("USER") < min(keywords.index("CMD"), keywords.index("HEALTHCHECK")) and "ADD" not in keywords
    commands = " ".join(value for keyword, value in STAGES[-1] if keyword == "RUN")
    tools = {"build-essential", "gcc", "g++", "clang", "make", "cmake", "ninja", "git", "python3-dev", "pip"}
    assert not tools & set(re.findall(r"[\w+-]+", commands))
    assert "--no-install-recommends" in commands and "rm -rf /var/lib/apt/lists" in commands


def test_both_stages_have_one_base_with_its_version():
    bases = {next(value for keyword, value in stage if keyword == "FROM").split(" AS ")[0] for stage in STAGES}
    assert len(STAGES) == 2 and bases == {"python:3.11-slim"}
    assert "--python-version 3.11" in (ROOT / "Makefile").read_text()


def test_the_image_is_labelled_with_its_origin_and_version():
    labels = " ".join(value for keyword, value in STAGES[-1] if keyword == "LABEL")
    for name in ("title", "description", "version", "revision", "source", "licenses"):
        assert f"org.opencontainers.image.{name}=" in labels
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ARG VERSION={project['version']}" in (ROOT / "Dockerfile").read_text()


def test_the_health_check_is_in_the_image():
    (health,) = [value for keyword, value in STAGES[-1] if keyword == "HEALTHCHECK"]
    script = json.loads(health.split("CMD ", 1)[1])[1]
    assert (ROOT / script).is_file() and admitted(script)


def health(port: int, *folders: str) -> int:
    """The health check's exit code, with Ray's agent expected on this port."""
    environment = os.environ | {"PYTHONPATH": ":".join([*folders, str(ROOT)]), "HEARTSEG_CLUSTER_AGENT_PORT": str(port)}
    command = [sys.executable, str(ROOT / "cluster" / "health.py")]
    return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode


@pytest.mark.parametrize(("answer", "code"), [(200, 0), (503, 1)])
def test_a_container_with_a_ray_node_is_as_healthy_as_the_node(answer, code):
    class Agent(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer if self.path == "/api/healthz" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Agent) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert health(server.server_address[1]) == code


def test_a_container_whose_node_accepts_the_request_and_never_answers_is_unhealthy(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HEARTSEG_CLUSTER_AGENT_PORT", str(silent.getsockname()[1]))
        check = runpy.run_path(str(ROOT / "cluster" / "health.py"))["main"]
        check.__globals__["SECONDS"] = 0.3
        assert check() == 1


@pytest.mark.slow
def test_a_container_without_a_node_is_healthy_if_its_imports_work(tmp_path):
    assert health(9) == 0
    (tmp_path / "torchvision.py").write_text("raise ImportError('broken')\n")
    assert health(9, str(tmp_path)) == 1


def test_the_constraints_hold_only_names_versions_and_hashes():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines[:2] == ["# This file was autogenerated by uv via the following command:", "#    make constraints"]
    assert [line for line in lines[2:] if not (PIN.match(line) or HASH.match(line))] == []
    assert len(pins()) > 80


def test_the_constraints_satisfy_the_project_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = project["project"]["dependencies"] + extras["cluster"] + extras["formats"] + project["build-system"]["requires"]
    found = pins()
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(Version(found[requirement.name])), requirement


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_installation_of_the_builder_works_in_a_clean_environment(tmp_path):
    """The builder's steps, run in a folder of this machine: some 5 GB, deleted afterwards."""
    build, target = tmp_path / "build", tmp_path / "venv"
    build.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{target}/bin:{environment['PATH']}"
    environment["PIP_CONSTRAINT"] = os.devnull  # the constraints of this machine's pip are not the image's
    ran = []
    for keyword, value in STAGES[0]:
        if keyword == "COPY":
            *sources, place = shlex.split(value)
            for source in sources:
                if source.endswith("/"):
                    shutil.copytree(ROOT / source, build / place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, build / place)
        elif keyword == "RUN":
            command = re.sub(r"--mount=\S+\s*", "", value).replace("/opt/venv", str(target))
            command = command.replace("python -m venv", f"{sys.executable} -m venv")
            done = subprocess.run(["bash", "-ec", command], cwd=build, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            ran.append(command)
    assert len(ran) == 3
    code = "import heartseg, torch, torchvision, ray, boto3, googleapiclient; print(torch.version.cuda, heartseg.__file__)"
    done = subprocess.run([target / "bin" / "python", "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith("None") and str(target) in done.stdout
