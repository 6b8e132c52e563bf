"""A run's directory: its description, its record of epochs, and how the same command finds it again."""

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

import pandas

from heartseg.config.experiment import Experiment, ModelConfig, canonical, first_difference, identity, none_if_nan, to_json
from heartseg.errors import UserError, require
from heartseg.models import checkpoint
from heartseg.shards.reader import Shards
from heartseg.storage import filesystem

DESCRIPTION, RECORD, RECORD_CSV = "experiment.json", "metrics.jsonl", "metrics.csv"
MODEL_CARD, SWEEP = "MODEL_CARD.md", "sweep.json"


@dataclass(frozen=True)
class Run:
    """A run's directory and the content of its `experiment.json`."""

    path: str
    description: dict

    @property
    def name(self) -> str:
        """The last part of its path."""
        return filesystem.last_part(self.path)


def run_name(experiment: Experiment, shards: Shards, initial: dict | None = None) -> str:
    """The recipe and a short hash of configuration, data and initial weights, so that the same command finds the same run."""
    parts = [identity(experiment), shards.fingerprint, *([initial["weights_sha256"]] if initial else [])]
    return f"{experiment.name}-{filesystem.sha256(canonical(parts))[:8]}"


def generation_name(runs: str, name: str, fresh: bool) -> str:
    """The newest of `name`, `name-2`, `name-3` …, or with `fresh` the next one, so that nothing is overwritten."""
    found = [re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", entry) for entry in filesystem.list_names(runs)]
    newest = max((int(match[1] or 1) for match in found if match), default=0)
    wanted = newest + 1 if fresh else max(newest, 1)
    return name if wanted == 1 else f"{name}-{wanted}"


def choose_name(runs: str, asked: str, default: str, fresh: bool, kind: str) -> str:
    """The name of a run or sweep: as `asked`, otherwise the newest generation, or with `fresh` the next. Raises UserError."""
    is_name = not asked or re.fullmatch(r"\w[\w.-]*", asked)
    fix = "use letters, digits, `_`, `-` and `.`, and start with a letter, a digit or `_`"
    require(is_name, f"--{kind}-name {asked!r} is not a valid folder name: {fix}.")
    return asked if asked and not fresh else generation_name(runs, asked or default, fresh)


def read_matching(path: str, asked: dict, kind: str) -> dict | None:
    """The description of a run or sweep in `path`, or None without one; raises UserError if it differs from `asked`."""
    folder, other = path.rpartition("/")[0], SWEEP if kind == "run" else DESCRIPTION
    if not filesystem.exists(path):
        is_free = not filesystem.exists(filesystem.join(folder, other))
        require(is_free, f"{folder} is not a {kind}'s folder (it has {other}): give another --{kind}-name.")
        return None
    there = filesystem.read_json(path)
    if difference := first_difference({key: there.get(key) for key in asked}, asked):
        field = difference.removeprefix("identity.")
        raise UserError(f"{folder} holds another {kind} ({field}): give another --{kind}-name, or --fresh for a new one.")
    return there


def open_run(experiment: Experiment, shards: Shards, name: str = "", fresh: bool = False, initial: dict | None = None) -> Run:
    """Create a run, or find the one that the same command created; raises UserError if its folder holds something else."""
    name = choose_name(experiment.runs, name, run_name(experiment, shards, initial), fresh, "run")
    path = filesystem.join(experiment.runs, name)
    asked = {"identity": identity(experiment), "data_fingerprint": shards.fingerprint}
    asked["initial_weights_sha256"] = initial["weights_sha256"] if initial else None
    described = filesystem.join(path, DESCRIPTION)
    if there := read_matching(described, asked, "run"):
        return Run(path, there)
    description = asked | {
        "experiment": to_json(experiment),
        "dataset": shards.manifest["dataset"],
        "split": filesystem.read_json(filesystem.join(shards.path, "splits.json"))["config"],
        "groups": {g: {"patients": len(p), "images": shards.num_rows(g)} for g, p in shards.groups.items()},
        "initial": initial,
        # So that no training patient is ever scored, however the shards are divided later.
        "val_patients": shards.groups.get("val", []),
        "train_patients": sorted({*shards.groups["train"], *(initial["train_patients"] if initial else ())}),
        "source_sha256": shards.manifest["source_sha256"],
        "code": code_revision(),
        "wandb_id": uuid.uuid4().hex[:12],
    }
    filesystem.publish_json(described, description)
    return Run(path, description)


def record_choices(run: Run, choices: dict[str, str], is_main: bool) -> Run:
    """Record on the first rank what `auto` chose, so that the run resumes the same way on any machine; returns the run."""
    recorded = Run(run.path, run.description | choices)
    if is_main and recorded != run:
        filesystem.publish_json(filesystem.join(run.path, DESCRIPTION), recorded.description)
    return recorded


def find_run(path: str) -> Run:
    """The run in a directory, or the run that a checkpoint's directory belongs to; raises UserError."""
    inner = re.sub(rf"/{checkpoint.FOLDER}/epoch_\d+/?$", "", filesystem.absolute(path))
    is_run = filesystem.exists(filesystem.join(inner, DESCRIPTION))
    require(is_run, f"{path} is not a run (no {DESCRIPTION}): give a folder that jobs/train.py wrote.")
    return Run(inner, filesystem.read_json(filesystem.join(inner, DESCRIPTION)))


def read_record(run: str) -> list[dict]:
    """A run's epochs so far, each a dict of metrics; NaN for a metric without a value."""
    path = filesystem.join(run, RECORD)
    if not filesystem.exists(path):
        return []
    epochs = [json.loads(line) for line in filesystem.read_bytes(path).decode().splitlines() if line]
    return [{name: math.nan if value is None else value for name, value in epoch.items()} for epoch in epochs]


def write_record(run: str, record: list[dict]) -> None:
    """Write the record, one JSON line per epoch (null for NaN), and a CSV beside it, each complete or not at all."""
    epochs = ({name: none_if_nan(value) for name, value in epoch.items()} for epoch in record)
    lines = "".join(json.dumps(epoch, allow_nan=False) + "\n" for epoch in epochs)
    filesystem.publish(filesystem.join(run, RECORD), lines.encode())
    filesystem.publish(filesystem.join(run, RECORD_CSV), pandas.DataFrame(record).to_csv(index=False).encode())


@functools.cache
def code_revision() -> str:
    """The git revision of the code; without git (a submitted job) a SHA-256 over heartseg/ and jobs/."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return "git " + subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    files = sorted(path for folder in ("heartseg", "jobs") for path in (root / folder).rglob("*.py"))
    return "sha256 " + filesystem.sha256(b"".join(os.fsencode(f.relative_to(root)) + f.read_bytes() for f in files))


TERMS = {
    "CAMUS": "CAMUS (Leclerc et al., IEEE TMI 38(9), 2198-2210, 2019, doi:10.1109/TMI.2019.2900516), CC BY-NC-SA 4.0: "
    "non-commercial scientific research only. A model trained on it carries these terms.",
    "phantom": "synthetic hearts made by heartseg.datasets.phantom: scores on them say nothing about patients.",
    "other": "the user's own dataset: ask its owner for its terms.",
}


def model_card(run: Run, metrics: dict[str, float]) -> str:
    """The model card of a finished run as Markdown."""
    facts, initial, model = run.description, run.description.get("initial"), ModelConfig(**run.description["identity"]["model"])
    groups = "".join(f"| {g} | {n['patients']} | {n['images']} |\n" for g, n in facts["groups"].items())
    shown = [name for name in metrics if "/dice" in name or name.endswith(("/iou", "/accuracy"))]
    scores = "".join(f"| {name} | {metrics[name]:.4f} |\n" for name in shown)
    terms = TERMS.get(facts["dataset"], TERMS["other"])
    weights = f", initial weights {initial['checkpoint']} ({initial['weights_sha256']})" if initial else ""
    return (
        f"# {run.name}\n\nResearch use only, not a medical device.\n\n"
        f"{model.title} that outlines the LV cavity, the myocardium and the left atrium in apical "
        f"2- and 4-chamber echocardiograms.\n\n"
        f"## Data\n\n{terms}\n\nSplit by patient ({facts['split']['kind']}):\n\n"
        f"| group | patients | images |\n|---|---|---|\n{groups}\n"
        f"## Scores after epoch {metrics['epoch']}\n\nPer image on the training grid, then averaged; jobs/evaluate.py "
        f"scores on the native grid.\n\n| score | value |\n|---|---|\n{scores}\n"
        f"## Intended use\n\nResearch on images like the training data. Not for diagnosis; not tested on other scanners.\n\n"
        f"## Lineage\n\ncode {facts['code']}, data {facts['data_fingerprint']} (from {facts.get('ingest') or 'memory'}), "
        f"source {facts['source_sha256']}{weights}\n"
    )
