"""The Kubernetes manifests, rendered: valid by KubeRay's and Kubernetes' schemas, locked down, and gone when idle."""

import copy
import re
import shutil
import subprocess

import jsonschema
import kubernetes_validate
import pytest
import yaml

from helpers import kustomize
from helpers.experiments import ROOT
from helpers.kuberay_schema import SCHEMAS
from helpers.secrets import SECRET_VALUE, secrets_in
from jobs.support import ray_runtime

FOLDER = ROOT / "cluster" / "kubernetes"
RENDERED = {name: kustomize.render(FOLDER / name) for name in ("base", "overlays/local", "overlays/gpu")}
VERSION = "1.31"  # of Kubernetes


def check(resource: dict) -> None:
    """Raise a ValidationError for a resource that Kubernetes or KubeRay would not take as it is."""
    if resource["kind"] not in SCHEMAS:
        kubernetes_validate.validate(resource, VERSION, strict=True)
        return
    jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    for template in templates(resource):
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(wrapped, VERSION, strict=True)
    options = dict(cluster_spec(resource)["autoscalerOptions"])
    for ours in ("idleTimeoutSeconds", "upscalingMode", "version"):
        options.pop(ours, None)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [options | {"name": "x"}]}}
    kubernetes_validate.validate(pod, VERSION, strict=True)


def cluster_spec(resource: dict) -> dict:
    """The description of a cluster in a RayCluster or a RayJob."""
    return resource["spec"] if resource["kind"] == "RayCluster" else resource["spec"]["rayClusterSpec"]


def templates(resource: dict) -> list[dict]:
    """The pod templates of a RayCluster or a RayJob."""
    spec = cluster_spec(resource)
    submitter = [resource["spec"]["submitterPodTemplate"]] if resource["kind"] == "RayJob" else []
    return [spec["headGroupSpec"]["template"], *[group["template"] for group in spec["workerGroupSpecs"]], *submitter]


def of_kind(name: str, *kinds: str) -> list[dict]:
    """The rendered resources of these kinds."""
    return [resource for resource in RENDERED[name] if resource["kind"] in kinds]


def rays(name: str) -> list[dict]:
    """The RayCluster and the RayJob."""
    found = of_kind(name, "RayCluster", "RayJob")
    assert len(found) == 2
    return found


@pytest.fixture(params=RENDERED)
def name(request) -> str:
    """Base and overlays, one at a time."""
    return request.param


def test_every_manifest_is_valid(name):
    for resource in RENDERED[name]:
        check(resource)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "authOption"), {"mode": "token"}),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "workerGroupSpecs", 0, "maxReplica"), 3),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "imagePolicy"), "Never"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "livenessProbe", "httpGet", "port"), None),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "autoscalerOptions", "securityContext", "readonly"), True),
    ],
)
def test_a_slip_would_be_found(path, value):
    resource = copy.deepcopy(of_kind("base", "RayCluster")[0])
    inner = resource
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(resource)


def test_the_jobs_cluster_is_the_standing_one(name):
    cluster, job = rays(name)
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] and cluster["spec"]["enableInTreeAutoscaling"]


def test_workers_come_with_a_job_and_go_when_idle(name):
    for group in (group for ray in rays(name) for group in cluster_spec(ray)["workerGroupSpecs"]):
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    assert all(cluster_spec(ray)["autoscalerOptions"]["idleTimeoutSeconds"] <= 900 for ray in rays(name))


def test_every_container_is_locked_down(name):
    autoscalers = [cluster_spec(ray)["autoscalerOptions"] for ray in rays(name)]
    pods = [template["spec"] for ray in rays(name) for template in templates(ray)]
    containers = [c for pod in pods for c in pod["containers"] + pod.get("initContainers", [])]
    for context in (container["securityContext"] for container in containers + autoscalers):
        assert context["runAsNonRoot"] and context["runAsUser"] == 1000 and context["readOnlyRootFilesystem"]
        assert context["privileged"] is False and context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]} and context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers + autoscalers:
        assert container["resources"]["requests"].keys() <= container["resources"]["limits"].keys() >= {"cpu", "memory"}
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert {"name": "HOME", "value": "/tmp"} in container["env"]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] and not pod.get("hostNetwork") and not pod.get("hostPID")
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_ray_nodes_have_probes_and_shared_memory(name):
    for template in (template for ray in rays(name) for template in templates(ray)[:2]):
        container = template["spec"]["containers"][0]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        shared = next(volume for volume in template["spec"]["volumes"] if volume["name"] == "dshm")["emptyDir"]
        assert shared["medium"] == "Memory"
        assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_rays_health_needs_no_token():
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    port = ray_runtime.ray_private("ray._private.ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT")
    assert "/api/healthz" in PUBLIC_EXACT_PATHS and port == 52365


def test_every_cluster_asks_for_the_token_and_only_its_own_pods_reach_it(name):
    assert all(cluster_spec(ray)["authOptions"] == {"mode": "token"} for ray in rays(name))
    assert all(cluster_spec(ray)["headGroupSpec"]["serviceType"] == "ClusterIP" for ray in rays(name))
    (policy,) = of_kind(name, "NetworkPolicy")
    label = policy["spec"]["podSelector"]["matchLabels"]
    assert all(label.items() <= t["metadata"]["labels"].items() for ray in rays(name) for t in templates(ray))
    own, operator = policy["spec"]["ingress"]
    assert own["from"] == [{"podSelector": {"matchLabels": label}}]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}] and "podSelector" in operator["from"][0]


def test_secrets_come_from_a_secret_and_none_is_in_the_files(name):
    assert not of_kind(name, "Secret")
    for ray in rays(name):
        for template in templates(ray)[:2]:
            assert {"secretRef": {"name": "heartseg-secrets", "optional": True}} in template["spec"]["containers"][0]["envFrom"]
    assert [found for resource in RENDERED[name] for found in secrets_in(resource)] == []
    assert not any(SECRET_VALUE.search(path.read_text()) for path in FOLDER.rglob("*.yaml"))


def test_only_the_head_may_ask_kubernetes_and_it_runs_nothing_of_ours(name):
    accounts = {account["metadata"]["name"]: account for account in of_kind(name, "ServiceAccount")}
    for ray in rays(name):
        head, *others = [template["spec"] for template in templates(ray)]
        assert head["serviceAccountName"] in accounts
        assert all(pod["automountServiceAccountToken"] is False for pod in others)
        assert all(pod["serviceAccountName"] in accounts for pod in others)
        assert cluster_spec(ray)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_gpu_overlay_asks_for_gpus_and_an_object_store_and_the_local_one_for_neither():
    def limits(name: str) -> dict:
        return of_kind(name, "RayCluster")[0]["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]

    assert limits("overlays/gpu")["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits("overlays/local")["limits"]
    (settings,) = of_kind("overlays/gpu", "ConfigMap")
    assert settings["data"]["HEARTSEG_DATA"].startswith("s3://")
    (settings,) = of_kind("overlays/local", "ConfigMap")
    assert settings["data"]["HEARTSEG_DATA"] == "/data/shards"


def test_the_manifests_name_the_installed_ray_and_a_job_that_is_in_the_image(name):
    import ray

    assert all(cluster_spec(found)["rayVersion"] == ray.__version__ for found in rays(name))
    script = re.search(r"/home/heartseg/app/(\S+)", rays(name)[1]["spec"]["entrypoint"])[1]
    assert (ROOT / script).is_file() and "COPY jobs/ jobs/" in (ROOT / "Dockerfile").read_text()


def test_kustomize_itself_renders_the_same(name, told):
    """Where kubectl is installed; the renderer of tests/kustomize.py stands for it elsewhere."""
    if not shutil.which("kubectl"):
        told(f"no kubectl here: cluster/kubernetes/{name} was rendered by tests/kustomize.py alone")
        return
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER / name)], capture_output=True, text=True, timeout=60, check=True)
    theirs = {(r["kind"], r["metadata"]["name"]): r for r in yaml.safe_load_all(done.stdout)}
    assert theirs == {(r["kind"], r["metadata"]["name"]): r for r in RENDERED[name]}
