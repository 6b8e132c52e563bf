"""As much of kustomize as cluster/kubernetes uses, for machines without it: resources, JSON patches by kind and name, and
one field of a resource put into another. What it does not know it refuses.
"""

import copy
import json
from pathlib import Path

import jsonpatch
import yaml

KNOWN = {"apiVersion", "kind", "resources", "patches", "replacements"}


def render(folder: Path) -> list[dict]:
    """The resources of a folder with a kustomization.yaml, patched."""
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if plan.keys() - KNOWN:
        raise ValueError(f"{folder} uses {sorted(plan.keys() - KNOWN)}, which this renderer does not know")
    found: list[dict] = []
    for name in plan["resources"]:
        path = folder / name
        # Through JSON, since YAML's aliases are one object, which a patch would change in both places.
        found += render(path) if path.is_dir() else json.loads(json.dumps(list(yaml.safe_load_all(path.read_text()))))
    for patch in plan.get("patches", []):
        targets = [place for place, resource in enumerate(found) if _is(resource, patch["target"])]
        if not targets:
            raise ValueError(f"{folder}: nothing is {patch['target']}")
        for place in targets:
            found[place] = jsonpatch.apply_patch(found[place], yaml.safe_load(patch["patch"]))
    for replacement in plan.get("replacements", []):
        source = next(resource for resource in found if _is(resource, replacement["source"]))
        value = copy.deepcopy(_field(source, replacement["source"]["fieldPath"]))
        for target in replacement["targets"]:
            for path in target["fieldPaths"]:
                parent, _, last = path.rpartition(".")
                for resource in found:
                    if _is(resource, target["select"]):
                        _field(resource, parent)[last] = value
    return found


def _is(resource: dict, wanted: dict) -> bool:
    return resource["kind"] == wanted["kind"] and wanted.get("name") in (None, resource["metadata"]["name"])


def _field(resource: dict, path: str):
    value = resource
    for name in path.split("."):
        value = value[name]
    return value
