"""The files that bring a cluster up keep their promises: valid, without secrets, run by an ordinary user."""

import copy
import os
import re
import shlex
import subprocess

import pytest
import yaml

from helpers.experiments import ROOT
from helpers.secrets import SECRET_NAME, SECRET_VALUE, secrets_in

LOCAL = ROOT / "cluster" / "local.sh"


def cluster_config() -> dict:
    """ray_cluster.yaml as plain values."""
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions as (KEYWORD, rest), comments dropped and continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def last_stage() -> list[tuple[str, str]]:
    """The instructions after the last FROM: what the image that runs is made of."""
    found = instructions()
    return found[max(place for place, (keyword, _) in enumerate(found) if keyword == "FROM") :]


def local_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """cluster/local.sh with these arguments, in an environment that has nothing of the caller's but PATH."""
    return subprocess.run(
        ["bash", str(LOCAL), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_ray_accepts_the_cluster_file():
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = cluster_config()
    util.validate_config(util.prepare_config(copy.deepcopy(config)))
    config["head_node_typo"] = "head"
    with pytest.raises(Exception, match="head_node_typo"):
        util.validate_config(util.prepare_config(config))


def test_workers_come_and_go_and_the_head_needs_no_gpu():
    config = cluster_config()
    types = config["available_node_types"]
    head, workers = types[config["head_node_type"]], [types[name] for name in types if name != config["head_node_type"]]
    assert not head["resources"].get("GPU")
    assert workers and all(worker["min_workers"] == 0 for worker in workers)
    assert all(worker["max_workers"] <= config["max_workers"] for worker in workers)
    spot = [worker for worker in workers if "InstanceMarketOptions" in worker["node_config"]]
    assert len(spot) == 1 and all(spot[0]["priority"] > other["priority"] for other in workers if other is not spot[0])
    assert config["idle_timeout_minutes"] > 0


def test_the_dashboard_keeps_to_loopback_and_every_node_asks_for_the_token():
    config = cluster_config()
    heads = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    workers = [line for line in config["worker_start_ray_commands"] if "ray start" in line]
    assert heads and workers
    assert all("--dashboard-host 127.0.0.1" in line for line in heads)
    assert all("RAY_AUTH_MODE=token" in line for line in heads + workers)
    assert "0.0.0.0" not in (ROOT / "ray_cluster.yaml").read_text() + LOCAL.read_text()


def test_the_cluster_file_holds_no_secret():
    assert secrets_in(cluster_config()) == []
    assert not SECRET_VALUE.search((ROOT / "ray_cluster.yaml").read_text())  # the comments too
    assert all("IamInstanceProfile" in t["node_config"] for t in cluster_config()["available_node_types"].values())


@pytest.mark.parametrize(
    "secret",
    [
        {"auth": {"ssh_private_key": "~/.ssh/mine.pem"}},
        {"provider": {"aws_credentials": {"aws_access_key_id": "x"}}},
        {"docker": {"run_options": ["-e WANDB_API_KEY=abc"]}},
        {"head_start_ray_commands": ["RAY_AUTH_TOKEN=abc ray start --head"]},
        {"setup_commands": ["login " + "AKIA" + "A" * 16]},
        {"setup_commands": ["wandb login " + "0123456789" * 4]},
    ],
)
def test_the_search_for_secrets_would_find_one(secret):
    assert secrets_in(secret)


def test_every_path_that_the_dockerfile_copies_exists():
    copied = [shlex.split(rest) for keyword, rest in instructions() if keyword in ("COPY", "ADD")]
    sources = [
        path
        for words in copied
        if not any(word.startswith("--from=") for word in words)
        for path in [word for word in words if not word.startswith("--")][:-1]
    ]
    assert {"pyproject.toml", "heartseg/", "jobs/", "cluster/", "ray_cluster.yaml"} <= set(sources)
    assert [path for path in sources if not (ROOT / path).exists()] == []
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {path.rstrip("/") for path in sources} == admitted


def test_the_image_runs_as_an_ordinary_user():
    users = [rest.split(":")[0] for keyword, rest in last_stage() if keyword == "USER"]
    assert users and users[-1] == "1000"
    keywords = [keyword for keyword, _ in last_stage()]
    assert keywords.index("USER") < keywords.index("CMD")
    assert "HEALTHCHECK" in keywords


def test_the_image_has_no_build_tools_and_no_secrets():
    assert sum(keyword == "FROM" for keyword, _ in instructions()) >= 2
    commands = " ".join(rest for keyword, rest in last_stage() if keyword == "RUN")
    tools = {"build-essential", "gcc", "g++", "clang", "make", "cmake", "ninja", "git", "python3-dev", "pip"}
    assert not tools & set(re.findall(r"[\w+-]+", commands))
    given = [name for keyword, rest in instructions() if keyword in ("ENV", "ARG") for name in re.findall(r"(\w+)=?", rest)]
    assert not [name for name in given if SECRET_NAME.search(name)]


def test_local_sh_is_valid_bash_and_executable():
    subprocess.run(["bash", "-n", str(LOCAL)], check=True, timeout=20)
    assert os.access(LOCAL, os.X_OK)


@pytest.mark.parametrize(
    "arguments",
    [
        ("restart",),
        (),
        ("stop", "--force"),
        ("submit", "python"),
        ("submit", "--"),
        ("submit", "--runtime-env", "env.yaml", "--", "true"),  # Ray takes a file or JSON, and JSON is given
        ("submit", "--runtime-env-json", "[1]", "--", "true"),
    ],
)
def test_local_sh_refuses_a_wrong_call_in_one_sentence(arguments, tmp_path):
    done = local_sh(*arguments, HEARTSEG_CLUSTER_DIR=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("cluster/local.sh: ")


def test_local_sh_ends_only_what_it_started(tmp_path):
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "pid").write_text(str(bystander.pid))  # a number that another program was given since
        (tmp_path / "temp_dir").write_text("/tmp/heartseg-ray.abcdef/t")
        done = local_sh("stop", HEARTSEG_CLUSTER_DIR=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, "not running\n")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert re.search(r"(?m)^[^#]*\b(ray|\"\$RAY\") stop\b|pkill|killall", LOCAL.read_text()) is None


def test_local_sh_removes_no_directory_but_its_own(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    state = tmp_path / "state"
    state.mkdir()
    (state / "temp_dir").write_text(str(precious))
    assert local_sh("stop", HEARTSEG_CLUSTER_DIR=str(state)).returncode == 0
    assert precious.is_dir()
