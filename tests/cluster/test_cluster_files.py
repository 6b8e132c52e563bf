"""What `ray up` makes of its two files, asked of Ray's own code: which nodes come, who may reach them, and where secrets are.

AWS's side is moto's, in this process. Of Google's there is none offline: gcp.yaml is read by Ray's schema and its autoscaler.
The shell scripts and the README, which names all ways to a cluster, come last.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.experiments import ROOT
from helpers.secrets import SECRET_VALUE, secrets_in
from jobs.support import ray_runtime

CLOUDS = {"aws": "ray_cluster.yaml", "gcp": "cluster/gcp.yaml"}


def prepared(path: str) -> dict:
    """The file as Ray reads it: its defaults filled in, checked against its schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / path).read_text()))
    validate_config(config)
    return config


def launched(path: str, gpu_workers: int, failed_lately: tuple[str, ...] = ()) -> dict[str, int]:
    """The nodes that Ray's autoscaler starts for a training of so many workers, with a head that is up."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.schema import AutoscalerInstance
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    autoscaler_pb2 = ray_runtime.ray_private("ray.core.generated.autoscaler_pb2")
    instance_manager_pb2 = ray_runtime.ray_private("ray.core.generated.instance_manager_pb2")
    config = AutoscalingConfig(yaml.safe_load((ROOT / path).read_text()), skip_content_hash=True)
    node_types, head_type = config.get_node_type_configs(), config.get_head_node_type()
    head_resources = dict(node_types[head_type].resources)
    head = AutoscalerInstance(
        cloud_instance_id="head",
        ray_node=autoscaler_pb2.NodeState(
            node_id=b"head",
            instance_id="head",
            ray_node_type_name=head_type,
            available_resources=head_resources,
            total_resources=head_resources,
            status=autoscaler_pb2.NodeStatus.RUNNING,
        ),
        im_instance=instance_manager_pb2.Instance(
            instance_id="head",
            instance_type=head_type,
            status=instance_manager_pb2.Instance.RAY_RUNNING,
            node_kind=instance_manager_pb2.NodeKind.HEAD,
        ),
    )
    workers = [ResourceRequestUtil.make({"GPU": 1, "CPU": 1}) for _ in range(gpu_workers)]
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=node_types,
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(workers),
            current_instances=[head],
            recoverable_resource_availabilities={name: 0.0 for name in failed_lately},
        )
    )
    return {request.instance_type: request.count for request in reply.to_launch}


@pytest.mark.parametrize("path", CLOUDS.values())
def test_ray_accepts_the_file_and_would_refuse_a_slip(path):
    config = prepared(path)
    assert config["available_node_types"]["gpu_spot"]["resources"]["GPU"] == 1
    from ray.autoscaler._private.util import validate_config

    slipped = copy.deepcopy(config)
    slipped["available_node_types"]["gpu_spot"]["max_wrkers"] = 4
    with pytest.raises(Exception, match="max_wrkers"):
        validate_config(slipped)


@pytest.mark.parametrize("path", CLOUDS.values())
def test_gpu_workers_come_for_a_job_as_spot_nodes(path):
    assert launched(path, gpu_workers=0) == {}
    assert launched(path, gpu_workers=4) == {"gpu_spot": 4}


@pytest.mark.parametrize("path", CLOUDS.values())
def test_where_spot_nodes_are_not_to_be_had_on_demand_ones_come(path):
    assert launched(path, gpu_workers=2, failed_lately=("gpu_spot",)) == {"gpu_on_demand": 2}


@pytest.mark.parametrize("path", CLOUDS.values())
def test_no_more_nodes_than_allowed_whatever_is_asked_for(path):
    assert sum(launched(path, gpu_workers=50).values()) == prepared(path)["max_workers"] == 4


@pytest.mark.parametrize("path", CLOUDS.values())
def test_every_node_asks_for_the_token_and_the_dashboard_keeps_to_loopback(path):
    config = prepared(path)
    starts = [
        line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in config[key] if "ray start" in line
    ]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host 127.0.0.1" in starts[0] and "0.0.0.0" not in str(config)
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]


@pytest.mark.parametrize("path", CLOUDS.values())
def test_nothing_secret_stands_in_the_file_and_nodes_get_their_rights_from_a_role(path):
    text = (ROOT / path).read_text()
    assert secrets_in(yaml.safe_load(text)) == [] and not SECRET_VALUE.search(text)
    for kind in prepared(path)["available_node_types"].values():
        node = kind["node_config"]
        assert node.get("IamInstanceProfile") or node.get("serviceAccounts")
        assert node.get("labels") or {tag["Key"] for tag in node["TagSpecifications"][0]["Tags"]} >= {"project", "owner"}


@pytest.mark.parametrize("path", CLOUDS.values())
def test_shards_and_results_are_on_an_object_store(path):
    options = prepared(path)["docker"]["run_options"]
    places = dict(option.removeprefix("-e ").split("=", 1) for option in options if option.startswith("-e HEARTSEG_"))
    assert places.keys() == {"HEARTSEG_DATA", "HEARTSEG_RUNS"}
    assert all(place.startswith(("s3://your-bucket/", "gs://your-bucket/")) for place in places.values())


@pytest.fixture()
def aws(tmp_path, monkeypatch):
    """AWS as moto plays it, a home directory for the key pair that `ray up` makes, and no one's credentials."""
    moto = pytest.importorskip("moto")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    with moto.mock_aws():
        yield tmp_path
    from ray.autoscaler._private.aws import utils

    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()


def test_on_aws_the_nodes_open_nothing_but_ssh_and_themselves(aws):
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws

    config = bootstrap_aws(prepared(CLOUDS["aws"]))
    groups = {group for kind in config["available_node_types"].values() for group in kind["node_config"]["SecurityGroupIds"]}
    assert len(groups) == 1
    rules = boto3.resource("ec2", region_name=config["provider"]["region"]).SecurityGroup(groups.pop()).ip_permissions
    open_to_others = [(rule["FromPort"], rule["ToPort"]) for rule in rules if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert open_to_others == [(22, 22)]


def test_on_aws_ray_adds_no_right_to_the_roles_and_the_key_stays_at_home(aws):
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws

    config = bootstrap_aws(prepared(CLOUDS["aws"]))
    types = config["available_node_types"]
    assert types["head"]["node_config"]["IamInstanceProfile"] == {"Name": "heartseg-head"}
    assert types["gpu_spot"]["node_config"]["IamInstanceProfile"] == {"Name": "heartseg-worker"}
    assert boto3.client("iam", region_name="us-east-1").list_roles()["Roles"] == []
    key = config["auth"]["ssh_private_key"]
    assert key.startswith(str(aws)) and os.stat(key).st_mode & 0o077 == 0


def test_on_aws_spot_is_asked_of_the_spot_market_and_the_other_is_not(aws):
    config = prepared(CLOUDS["aws"])
    spot, fallback = (config["available_node_types"][name]["node_config"] for name in ("gpu_spot", "gpu_on_demand"))
    assert spot.pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot == fallback


def shell_scripts() -> list[str]:
    """The tracked files that a shell runs."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [name for name in listed if (ROOT / name).is_file()]
    return [name for name in files if re.match(rb"#!.*\b(ba)?sh\b", (ROOT / name).read_bytes()[:64])]


def test_every_shell_script_passes_shellcheck():
    found = shell_scripts()
    assert {"cluster/local.sh", "cluster/slurm.sbatch"} <= set(found)
    checker = str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([checker, *found], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_readme_tells_of_every_way_to_a_cluster_and_names_only_files_that_are_there():
    text = (ROOT / "cluster" / "README.md").read_text()
    files = ("ray_cluster.yaml", "cluster/gcp.yaml", "cluster/slurm.sbatch", "cluster/local.sh")
    ways = (*files, "cluster/kubernetes/overlays/gpu", "cluster/kubernetes/overlays/gpu/kustomization.yaml")
    assert [way for way in ways if way not in text] == []
    named = set(re.findall(r"(?<![\w/])(?:cluster|jobs)/[\w./-]*\w", text))
    assert [name for name in named if not (ROOT / name).exists()] == []
