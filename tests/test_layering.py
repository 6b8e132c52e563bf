"""The structure holds: who imports whom, what is imported where, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A file of the library imports only files above it.
LAYERS = [
    *(
        "errors",
        "girder",
        "labels",
        "strict",
        "training_config",
        "config",
        "recipes",
        "storage",
        "locks",
        "figures",
        "overlays",
        "nifti",
    ),
    *("formats", "camus", "pairs", "sources", "phantom", "agreement", "splits", "resume", "shard_writer"),
    *("shards", "survey"),
    *("batches", "stream", "augment", "convolutions", "model", "losses", "schedules", "optim", "metrics"),
    *("disks", "clinical", "postprocess"),
    *("distributed", "ingest", "checkpoint", "engine", "predict", "outline", "cycle", "studies", "outcome", "cases"),
    *("evaluation", "runs", "finetune", "tracking", "keeper", "profiling", "training", "published", "sections", "report"),
    *("folds", "search_space", "sweeps", "sweep_figures", "sweep_page", "comparison", "comparison_page"),
]
# Package -> the only files that may import it.
ONLY = {
    "nibabel": {"heartseg/nifti.py", "jobs/benchmarks/train_plain.py", "jobs/benchmarks/data.py"},  # what plain ways read with
    "skimage": {"jobs/benchmarks/data.py"},
    "isal": {"heartseg/nifti.py"},
    "PIL": {"heartseg/overlays.py", "heartseg/formats.py"},
    "matplotlib": {"heartseg/figures.py", "heartseg/sweep_figures.py"},
    "requests": {"heartseg/girder.py"},
    "wandb": {"heartseg/tracking.py"},
    "monai": {"jobs/benchmarks/scores.py"},
    "pyarrow.fs": {"heartseg/storage.py"},
    "pyarrow.parquet": {"heartseg/storage.py"},
}
LIBRARY = sorted((ROOT / "heartseg").glob("*.py"))
SOURCES = LIBRARY + sorted((ROOT / "jobs").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_the_library_never_imports_ray_or_jobs(path):
    assert not [name for name in imported(path) if name.split(".")[0] in ("ray", "jobs")]


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.stem != "__init__"], ids=lambda path: path.stem)
def test_a_file_imports_only_files_above_it(path):
    above = set(LAYERS[: LAYERS.index(path.stem)])
    used = {name.split(".")[1] for name in imported(path) if name.startswith("heartseg.")}
    assert used & set(LAYERS) <= above


@pytest.mark.parametrize("package", ONLY)
def test_a_package_has_one_home(package):
    homes = {str(p.relative_to(ROOT)) for p in SOURCES if any((n + ".").startswith(package + ".") for n in imported(p))}
    assert homes == ONLY[package]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_file_says_what_it_is_for_and_stays_under_300_lines(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 300
