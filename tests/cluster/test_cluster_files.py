"""The cluster files keep their promises: which nodes `ray up` starts, who may reach them, no secrets, clean shell scripts.

Ray's own code answers for `ray up`, with moto as AWS in this process. Google has no offline stand-in: Ray's schema and its
autoscaler read gcp.yaml.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import boto3
import moto
import pytest
import yaml
from ray.autoscaler._private.aws import utils
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from helpers.experiments import ROOT

SECRET_NAME = r"(?:[\w-]*[_-])?(?:secret|password|passwd|token|api_?key|access_?key(?:_id)?|private_?key)"
SECRET = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\b(?:gh[opsu]_|github_pat_|hf_|xox[abp]-)\w{20,}"  # GitHub, Hugging Face, Slack
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?<![\w./-])[0-9a-fA-F]{40,}(?![\w./-])"  # a Ray token or W&B key: long, hexadecimal, not part of a path
    # A value that follows such a name, and is not a path or a variable.
    rf"|(?im:(?:(?<![\w/-]){SECRET_NAME}=|^[\s{{-]*{SECRET_NAME}[\"']?:\s+)[\"']?[^\s\"'$/~{{])"
    rf"|(?im:^(?:ARG|ENV)\s+{SECRET_NAME}\b)"
)
CLOUDS = {"aws": "ray_cluster.yaml", "gcp": "cluster/gcp.yaml"}


def prepared(path: str) -> dict:
    """The file as Ray reads it: its defaults filled in, checked against its schema."""
    config = prepare_config(yaml.safe_load((ROOT / path).read_text()))
    validate_config(config)
    return config


def launched(cluster: dict, gpu_workers: int, failed_lately: tuple[str, ...] = ()) -> dict[str, int]:
    """The nodes that Ray's autoscaler starts for a training of so many workers, beside the head."""
    config = AutoscalingConfig(cluster, skip_content_hash=True)
    workers = [ResourceRequestUtil.make({"GPU": 1, "CPU": 1}) for _ in range(gpu_workers)]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes() - 1,
        resource_requests=ResourceRequestUtil.group_by_count(workers),
        recoverable_resource_availabilities={name: 0.0 for name in failed_lately},
    )
    return {node.instance_type: node.count for node in ResourceDemandScheduler(None).schedule(request).to_launch}


@pytest.mark.parametrize("path", CLOUDS.values())
@pytest.mark.parametrize(
    ("gpu_workers", "failed_lately", "nodes"),  # max_workers is 4
    [(0, (), {}), (50, (), {"gpu_spot": 4}), (2, ("gpu_spot",), {"gpu_on_demand": 2})],
)
def test_a_job_starts_spot_nodes_up_to_the_limit_or_on_demand_ones_in_their_place(path, gpu_workers, failed_lately, nodes):
    assert launched(yaml.safe_load((ROOT / path).read_text()), gpu_workers, failed_lately) == nodes


def test_eight_workers_start_one_machine_of_eight_gpus_where_only_such_machines_are_allowed():
    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    types = cluster["available_node_types"]
    for name, most in (("gpu_spot", 0), ("gpu_on_demand", 0), ("gpu_machine_of_8", 1)):
        types[name]["max_workers"] = most
    assert launched(cluster, 8) == {"gpu_machine_of_8": 1}
    assert types["gpu_machine_of_8"]["node_config"]["IamInstanceProfile"] == {"Name": "heartseg-worker"}


@pytest.mark.parametrize("path", CLOUDS.values())
def test_ray_accepts_the_file_whose_nodes_require_the_token_and_have_a_role_owners_labels_and_an_object_store(path):
    config = prepared(path)
    lines = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [line for line in lines if "ray start" in line]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host 127.0.0.1" in starts[0] and "0.0.0.0" not in str(config)
    options = config["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options
    for place in ("HEARTSEG_DATA", "HEARTSEG_RUNS"):
        assert any(re.match(rf"-e {place}=(s3|gs)://your-bucket/", option) for option in options)
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        assert node.get("IamInstanceProfile") or node.get("serviceAccounts")
        assert node.get("labels") or {tag["Key"] for tag in node["TagSpecifications"][0]["Tags"]} >= {"project", "owner"}
    kind["max_wrkers"] = 4  # a misspelt key is refused
    with pytest.raises(Exception, match="max_wrkers"):
        validate_config(config)


@pytest.fixture()
def aws(tmp_path, monkeypatch):
    """moto in AWS's place, a home directory for the key pair that `ray up` creates, and no credentials; returns the home."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    with moto.mock_aws():
        yield tmp_path
    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()


def test_on_aws_nodes_open_only_ssh_and_ray_grants_no_rights_and_keeps_its_key_at_home(aws):
    config = bootstrap_aws(prepared(CLOUDS["aws"]))
    nodes = {name: kind["node_config"] for name, kind in config["available_node_types"].items()}
    (group,) = {group for node in nodes.values() for group in node["SecurityGroupIds"]}
    rules = boto3.resource("ec2", region_name=config["provider"]["region"]).SecurityGroup(group).ip_permissions
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules if rule["IpRanges"] or rule["Ipv6Ranges"]] == [(22, 22)]
    assert nodes["head"]["IamInstanceProfile"] == {"Name": "heartseg-head"}
    assert nodes["gpu_spot"]["IamInstanceProfile"] == {"Name": "heartseg-worker"}
    assert boto3.client("iam", region_name="us-east-1").list_roles()["Roles"] == []
    key = config["auth"]["ssh_private_key"]
    assert key.startswith(str(aws)) and os.stat(key).st_mode & 0o077 == 0
    assert nodes["gpu_spot"].pop("InstanceMarketOptions")["MarketType"] == "spot"
    assert nodes["gpu_spot"] == nodes["gpu_on_demand"]


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if (ROOT / name).is_file()]


def test_no_cluster_file_holds_a_secret_and_the_search_would_find_one():
    names = [name for name in tracked_files() if re.fullmatch(r"Dockerfile|ray_cluster\.yaml|cluster/.*(?<!\.md)", name)]
    secrets = ["  ssh_private_key: mine", "- aws_access_key_id: x", "- -e WANDB_API_KEY=abc", "ARG WANDB_API_KEY"]
    secrets += ["- RAY_AUTH_TOKEN=abc ray start --head", "login " + "AKIA" + "A" * 16, "wandb login " + "0123456789" * 4]
    assert len(names) > 10 and all(SECRET.search(f"image: x\n{secret}\n") for secret in secrets)
    assert [match for name in names if (match := SECRET.search((ROOT / name).read_text()))] == []


def test_every_shell_script_passes_shellcheck():
    scripts = [name for name in tracked_files() if re.match(rb"#!.*\b(ba)?sh\b", (ROOT / name).read_bytes()[:64])]
    assert {"cluster/local.sh", "cluster/slurm.sbatch"} <= set(scripts)
    checker = str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([checker, *scripts], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_readme_names_every_way_to_a_cluster_and_only_files_that_exist():
    text = (ROOT / "cluster" / "README.md").read_text()
    ways = ("ray_cluster.yaml", "cluster/gcp.yaml", "cluster/slurm.sbatch", "cluster/local.sh")
    overlays = ("cluster/kubernetes/overlays/gpu", "cluster/kubernetes/overlays/gpu/kustomization.yaml")
    assert [way for way in ways + overlays if way not in text] == []
    named = set(re.findall(r"(?<![\w/])(?:cluster|jobs)/[\w./-]*\w", text))
    assert [name for name in named if not (ROOT / name).exists()] == []
