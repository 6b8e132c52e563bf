"""The part of kustomize that cluster/kubernetes uses: resources, JSON patches, copies of a field; it refuses anything more."""

import copy
import json
from pathlib import Path

import jsonpatch
import yaml

KNOWN = {"apiVersion", "kind", "resources", "patches", "replacements"}


def render(folder: Path) -> list[dict]:
    """The patched resources of a folder with a kustomization.yaml; raises ValueError for a patch without a target."""
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := plan.keys() - KNOWN:
        raise ValueError(f"{folder} uses {sorted(unknown)}, which this renderer does not support")
    resources: list[dict] = []
    for name in plan["resources"]:
        path = folder / name
        # Through JSON: a YAML alias is one object, and a patch would change it in both places.
        resources += render(path) if path.is_dir() else json.loads(json.dumps(list(yaml.safe_load_all(path.read_text()))))
    for patch in plan.get("patches", []):
        targets = [place for place, resource in enumerate(resources) if _matches(resource, patch["target"])]
        if not targets:
            raise ValueError(f"{folder}: no resource matches {patch['target']}")
        for place in targets:
            resources[place] = jsonpatch.apply_patch(resources[place], yaml.safe_load(patch["patch"]))
    for replacement in plan.get("replacements", []):
        (source,) = (resource for resource in resources if _matches(resource, replacement["source"]))
        for target in replacement["targets"]:
            for resource in (resource for resource in resources if _matches(resource, target["select"])):
                for parent, field in (path.split(".") for path in target["fieldPaths"]):
                    resource[parent][field] = copy.deepcopy(source[replacement["source"]["fieldPath"]])
    return resources


def _matches(resource: dict, wanted: dict) -> bool:
    return resource["kind"] == wanted["kind"] and wanted.get("name") in (None, resource["metadata"]["name"])
