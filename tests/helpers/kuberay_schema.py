"""What KubeRay's `ray.io/v1` RayCluster and RayJob may hold, as JSON Schema.

Written from KubeRay's API reference (1.5 to 1.7): the definitions' own OpenAPI schema is in no package of PyPI, npm or
Debian that was found. Unknown fields are refused, as the API server would drop or refuse them. What a pod or a container
may hold is Kubernetes' to say: here it is any object, and the tests ask Kubernetes' own schemas.
"""

TEXT, FLAG, ANYTHING = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
METADATA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string", "maxLength": 47}}}


def fields(required: tuple[str, ...] = (), **properties) -> dict:
    """An object of these fields and no others."""
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def listed(schema: dict, at_least: int = 0) -> dict:
    """A list of such values."""
    return {"type": "array", "items": schema, "minItems": at_least}


AUTOSCALER = fields(
    env=listed(ANYTHING),
    envFrom=listed(ANYTHING),
    idleTimeoutSeconds=COUNT,
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    resources=ANYTHING,
    securityContext=ANYTHING,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    version={"enum": ["v1", "v2"]},
    volumeMounts=listed(ANYTHING),
)
HEAD = fields(
    ("template", "rayStartParams"),
    enableIngress=FLAG,
    headService=ANYTHING,
    labels=TEXTS,
    rayStartParams=TEXTS,
    resources=TEXTS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    template=ANYTHING,
)
WORKERS = fields(
    ("groupName", "template", "rayStartParams", "maxReplicas", "minReplicas"),
    groupName={"type": "string", "minLength": 1},
    idleTimeoutSeconds=COUNT,
    labels=TEXTS,
    maxReplicas=COUNT,
    minReplicas=COUNT,
    numOfHosts={"type": "integer", "minimum": 1},
    priority={"type": "integer"},
    rayStartParams=TEXTS,
    replicas=COUNT,
    resources=TEXTS,
    scaleStrategy=fields(workersToDelete=listed(TEXT)),
    suspend=FLAG,
    template=ANYTHING,
)
CLUSTER = fields(
    ("headGroupSpec",),
    authOptions=fields(("mode",), mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    autoscalerOptions=AUTOSCALER,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=ANYTHING,
    headGroupSpec=HEAD,
    headServiceAnnotations=TEXTS,
    managedBy=TEXT,
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    suspend=FLAG,
    upgradeStrategy=ANYTHING,
    workerGroupSpecs=listed(WORKERS),
)
JOB = fields(
    ("entrypoint",),
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit=COUNT,
    clusterSelector=TEXTS,
    deletionStrategy=ANYTHING,
    entrypoint={"type": "string", "minLength": 1},
    entrypointNumCpus={"type": "number", "minimum": 0},
    entrypointNumGpus={"type": "number", "minimum": 0},
    entrypointResources=TEXT,
    jobId=TEXT,
    managedBy=TEXT,
    metadata=TEXTS,
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    rayClusterSpec=CLUSTER,
    runtimeEnvYAML=TEXT,
    shutdownAfterJobFinishes=FLAG,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
    submitterConfig=fields(backoffLimit=COUNT),
    submitterPodTemplate=ANYTHING,
    suspend=FLAG,
    ttlSecondsAfterFinished=COUNT,
)


def resource(kind: str, spec: dict) -> dict:
    """The schema of a whole resource."""
    return fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


SCHEMAS = {"RayCluster": resource("RayCluster", CLUSTER), "RayJob": resource("RayJob", JOB)}
