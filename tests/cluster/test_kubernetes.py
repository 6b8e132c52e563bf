"""The rendered Kubernetes manifests: valid by Kubernetes' own schemas, locked down, and without workers when idle."""

import copy
import json
import re
from pathlib import Path

import jsonpatch
import kubernetes_validate
import pytest
import ray
import yaml
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

from helpers.experiments import ROOT
from jobs.support import ray_runtime

FOLDER = ROOT / "cluster" / "kubernetes"
KUBERNETES_VERSION = "1.31"


def matches(resource: dict, wanted: dict) -> bool:
    return resource["kind"] == wanted["kind"] and wanted.get("name") in (None, resource["metadata"]["name"])


def render(folder: Path) -> list[dict]:
    """The patched resources of a folder, rendered by the part of kustomize that they use."""
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := plan.keys() - {"apiVersion", "kind", "resources", "patches", "replacements"}:
        raise ValueError(f"{folder} uses {sorted(unknown)}, which this renderer does not support")
    resources: list[dict] = []
    for name in plan["resources"]:
        path = folder / name
        # Through JSON: a YAML alias is one object, and a patch would change it in both places.
        resources += render(path) if path.is_dir() else json.loads(json.dumps(list(yaml.safe_load_all(path.read_text()))))
    for patch in plan.get("patches", []):
        targets = [place for place, resource in enumerate(resources) if matches(resource, patch["target"])]
        if not targets:
            raise ValueError(f"{folder}: no resource matches {patch['target']}")
        for place in targets:
            resources[place] = jsonpatch.apply_patch(resources[place], yaml.safe_load(patch["patch"]))
    for replacement in plan.get("replacements", []):
        (source,) = (resource for resource in resources if matches(resource, replacement["source"]))
        for target in replacement["targets"]:
            for resource in (resource for resource in resources if matches(resource, target["select"])):
                for parent, field in (path.split(".") for path in target["fieldPaths"]):
                    resource[parent][field] = copy.deepcopy(source[replacement["source"]["fieldPath"]])
    return resources


RENDERED = {name: render(FOLDER / name) for name in ("base", "overlays/local", "overlays/gpu", "overlays/gpu8")}


@pytest.fixture(params=RENDERED)
def resources(request) -> list[dict]:
    return RENDERED[request.param]


def of_kind(resources: list[dict], kind: str) -> list[dict]:
    return [resource for resource in resources if resource["kind"] == kind]


def spec_of(resources: list[dict], kind: str) -> dict:
    (resource,) = of_kind(resources, kind)
    return resource["spec"]


def node_templates(resources: list[dict]) -> list[dict]:
    cluster = spec_of(resources, "RayCluster")
    return [cluster["headGroupSpec"]["template"], *[group["template"] for group in cluster["workerGroupSpecs"]]]


def pod_templates(resources: list[dict]) -> list[dict]:
    """All pod templates: the head's, the workers' and the job submitter's."""
    return [*node_templates(resources), spec_of(resources, "RayJob")["submitterPodTemplate"]]


def test_kubernetes_accepts_every_resource_and_every_pod(resources):
    of_kubernetes = [resource for resource in resources if not resource["apiVersion"].startswith("ray.io/")]
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
    for resource in of_kubernetes + [pod | {"template": template} for template in pod_templates(resources)]:
        kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)


def test_a_job_has_a_cluster_like_the_standing_one_with_the_installed_ray_whose_workers_stop_when_idle(resources):
    cluster, job = spec_of(resources, "RayCluster"), spec_of(resources, "RayJob")
    assert job["rayClusterSpec"] == cluster and job["shutdownAfterJobFinishes"]
    assert cluster["rayVersion"] == ray.__version__
    script = re.search(r"/home/heartseg/app/(\S+)", job["entrypoint"])[1]
    assert (ROOT / script).is_file() and "COPY jobs/ jobs/" in (ROOT / "Dockerfile").read_text()
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 900


def test_every_container_is_locked_down(resources):
    pods = [template["spec"] for template in pod_templates(resources)]
    containers = [container for pod in pods for container in pod["containers"] + pod.get("initContainers", [])]
    for container in [*containers, spec_of(resources, "RayCluster")["autoscalerOptions"]]:
        context = container["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == 1000 and context["readOnlyRootFilesystem"]
        assert context["privileged"] is False and context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]} and context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["resources"]["requests"].keys() <= container["resources"]["limits"].keys() >= {"cpu", "memory"}
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert {"name": "HOME", "value": "/tmp"} in container["env"]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] and not pod.get("hostNetwork") and not pod.get("hostPID")
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_ray_nodes_have_shared_memory_probes_without_a_token_and_secrets_that_no_file_holds(resources):
    assert not of_kind(resources, "Secret")
    for template in node_templates(resources):
        container = template["spec"]["containers"][0]
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[name]["httpGet"]
            port = ray_runtime.ray_private("ray._private.ray_constants").DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
            assert probe["path"] in PUBLIC_EXACT_PATHS and probe["port"] == port
        (shared,) = (volume for volume in template["spec"]["volumes"] if volume["name"] == "dshm")
        assert shared["emptyDir"]["medium"] == "Memory"
        assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert {"secretRef": {"name": "heartseg-secrets", "optional": True}} in container["envFrom"]


def test_every_cluster_requires_the_token_only_its_own_pods_reach_it_and_its_head_alone_calls_kubernetes(resources):
    cluster, policy = spec_of(resources, "RayCluster"), spec_of(resources, "NetworkPolicy")
    assert cluster["authOptions"] == {"mode": "token"} and cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    label = policy["podSelector"]["matchLabels"]
    assert all(label.items() <= template["metadata"]["labels"].items() for template in pod_templates(resources))
    own, operator = policy["ingress"]
    assert own["from"] == [{"podSelector": {"matchLabels": label}}]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}] and "podSelector" in operator["from"][0]
    accounts = {account["metadata"]["name"] for account in of_kind(resources, "ServiceAccount")}
    head, *others = [template["spec"] for template in pod_templates(resources)]
    assert {pod["serviceAccountName"] for pod in (head, *others)} <= accounts
    assert all(pod["automountServiceAccountToken"] is False for pod in others)
    # KubeRay takes these values as text only.
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize(
    ("name", "gpus", "data"), [("gpu", "1", "s3://bucket/"), ("gpu8", "8", "s3://bucket/"), ("local", None, "/data/shards")]
)
def test_the_gpu_overlays_request_gpus_and_an_object_store_and_the_local_one_neither(name, gpus, data):
    _, workers = node_templates(RENDERED[f"overlays/{name}"])
    assert workers["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") == gpus
    (settings,) = of_kind(RENDERED[f"overlays/{name}"], "ConfigMap")
    assert settings["data"]["HEARTSEG_DATA"].replace("your-", "").startswith(data)
