"""The structure holds: which package may import which, and the one home of each library that has one."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What each package of the library may import beside itself; everybody may import errors, labels and config.
BASE = {"errors", "labels", "config"}
MAY_IMPORT = {
    "storage": set(),
    "metrics": set(),
    "datasets": {"storage", "metrics"},
    "models": {"storage"},
    "shards": {"storage", "datasets"},
    "training": {"storage", "metrics", "datasets", "models", "shards"},
    "tuning": {"storage", "shards", "training"},
    "inference": {"storage", "metrics", "datasets", "models", "shards", "training"},
    "evaluation": {"storage", "metrics", "datasets", "models", "shards", "training", "inference"},
    "reporting": {"storage", "metrics", "datasets", "models", "shards", "training", "tuning", "inference", "evaluation"},
}
# Library -> the only places that may import it: files, or folders that end in a slash.
HOMES = {
    "nibabel": {"heartseg/datasets/nifti.py", "jobs/benchmarks/"},  # the benchmarks' baselines read with it
    "isal": {"heartseg/datasets/nifti.py"},
    "skimage": {"jobs/benchmarks/"},
    "monai": {"jobs/benchmarks/"},
    "PIL": {"heartseg/reporting/", "heartseg/datasets/readers.py"},
    "matplotlib": {"heartseg/reporting/"},
    "jinja2": {"heartseg/reporting/"},
    "requests": {"heartseg/datasets/girder_client.py"},
    "wandb": {"heartseg/training/wandb_logger.py"},
    "pyarrow.fs": {"heartseg/storage/filesystem.py"},
    "pyarrow.parquet": {"heartseg/storage/filesystem.py"},
    "ray": {"jobs/"},
    "jobs": {"jobs/"},
}
# Modules of Ray that may move without notice: jobs/support/ray_runtime.py has the table of all that we use.
RAY_PRIVATE = re.compile(r"ray\._private|ray\._raylet|ray\.train\.v2\._internal|ray\.core\.generated")
SOURCES = [path.relative_to(ROOT).as_posix() for top in ("heartseg", "jobs") for path in sorted((ROOT / top).rglob("*.py"))]


def imports(file: str) -> set[str]:
    """Full names of what a file imports, inside functions too: modules, and names taken from them."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_import_is_in_the_table():
    forbidden = []
    for file in (file for file in SOURCES if file.startswith("heartseg/") and file != "heartseg/__init__.py"):
        own = file.split("/")[1].removesuffix(".py")
        allowed = BASE | {own} if own in BASE else BASE | {own} | MAY_IMPORT[own]
        taken = {name.split(".")[1] for name in imports(file) if name.startswith("heartseg.")}
        forbidden += [f"{file} imports heartseg.{name}" for name in sorted(taken - allowed)]
    assert not forbidden


def test_a_library_with_a_home_is_imported_only_there():
    strays = [
        f"{file} imports {name}"
        for file in SOURCES
        for name in imports(file)
        for library, homes in HOMES.items()
        if f"{name}.".startswith(f"{library}.")
        and not any(file == home or (home[-1] == "/" and file.startswith(home)) for home in homes)
    ]
    assert not strays


def test_a_verb_is_imported_by_no_other_file():
    verbs = {file.removesuffix(".py").replace("/", ".") for file in SOURCES if re.fullmatch(r"jobs/[a-z]\w+\.py", file)}
    assert "jobs.train" in verbs
    taken = [f"{file} imports {name}" for file in SOURCES for name in imports(file) if ".".join(name.split(".")[:2]) in verbs]
    assert not taken


def test_private_modules_of_ray_are_named_in_one_file_alone():
    files = [path for top in ("heartseg", "jobs", "cluster") for path in (ROOT / top).rglob("*") if path.suffix != ".pyc"]
    spelled = [path for path in files if path.is_file() and RAY_PRIVATE.search(path.read_text(errors="ignore"))]
    assert spelled == [ROOT / "jobs" / "support" / "ray_runtime.py"]
    tests = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")]
    assert not [f"{file} imports {name}" for file in tests for name in imports(file) if RAY_PRIVATE.match(name)]


def test_the_picture_of_the_packages_is_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "docs" / "draw_rooms.py", "--check"])
    assert done.returncode == 0, "run `make architecture`"


def test_every_file_opens_with_what_it_is_for():
    assert not [file for file in SOURCES if not ast.get_docstring(ast.parse((ROOT / file).read_text()))]
