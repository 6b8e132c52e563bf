"""The documentation: links lead somewhere, commands run, and the reference names every flag, file, column and variable."""

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import tyro

from heartseg.config.experiment import ImageConfig
from heartseg.datasets.phantom import write_phantom
from heartseg.inference.segmenter import load
from heartseg.inference.study_files import Clip
from heartseg.inference.study_results import ClipResult, clip_record
from heartseg.labels import Phase, View
from heartseg.shards.reader import load_groups, open_shards
from heartseg.shards.writer import schema
from heartseg.tuning import sweep as sweeps
from helpers.experiments import ROOT, tiny_experiment
from jobs import export
from jobs.support import command_line

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("cluster/**/*.md")]
REFERENCE = ROOT / "docs" / "reference"
FILES = (REFERENCE / "files.md").read_text() + (REFERENCE / "shard-format.md").read_text()
LESSON = ROOT / "docs" / "getting-started" / "first-report.md"


SPEC = importlib.util.spec_from_file_location("list_flags", ROOT / "docs" / "list_flags.py")
list_flags = sys.modules["list_flags"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(list_flags)


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as a repository browser makes them."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}


def test_every_link_leads_to_a_file_and_a_heading_of_it_and_the_design_names_files_that_exist():
    links = [(page, *link.partition("#")) for page in PAGES for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text())]
    assert len(links) > 20
    for page, path, _, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {path}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page}: {path}#{anchor}"
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", (ROOT / "docs" / "explanation" / "architecture.md").read_text())
    assert len(named) > 25
    assert not [name for name in named if not any((ROOT / top / name).exists() for top in ("", "heartseg"))]


def test_the_list_of_flags_is_up_to_date():
    assert list_flags.PAGE.read_text() == list_flags.render(), "run `make reference`"


@pytest.mark.parametrize("name", list_flags.COMMANDS)
def test_the_list_has_the_flags_that_help_shows(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"jobs.{name.split()[0]}").job([*list_flags.COMMANDS[name], "--help"])
    shown = set(re.findall(r"^\W{2}(--[a-z][\w.-]*)", capsys.readouterr().out, re.MULTILINE))
    page = list_flags.PAGE.read_text()
    listed = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
    if "[the experiment](#the-experiment)" in listed:
        listed += page.split("\n## The experiment\n")[1]
    assert shown == set(re.findall(r"^\| `(--[a-z][\w.-]*)`", listed, re.MULTILINE))


class Parsed(Exception):
    """A command line is valid; nothing is run."""


def documented_commands() -> list[str]:
    """Every command line of a job in the documentation, without those that leave something out."""
    texts = [re.sub(r" \\\n +", " ", page.read_text()) for page in PAGES if page.name != "CHANGELOG.md"]
    lines = dict.fromkeys(line.strip() for text in texts for line in re.findall(r"python (jobs/\w+\.py[^\n`#]*)", text))
    return [line for line in lines if not re.search(r"[…\[]", line)]


def test_every_documented_command_line_is_valid(monkeypatch):
    parse_line = command_line.parse_line

    def parse(kind, *arguments, **default):
        parsed = parse_line(kind, *arguments, **default)
        if kind.__name__ == "Command":
            return parsed  # of a job with an experiment, which checks it before it asks the environment for paths
        raise Parsed

    def stop(experiment):
        raise Parsed

    monkeypatch.setattr(command_line, "parse_line", parse)
    monkeypatch.setattr(command_line, "with_environment", stop)
    monkeypatch.setattr(command_line, "read_config", lambda path: tiny_experiment())
    lines = documented_commands()
    assert len(lines) > 40
    for line in lines:
        script, *words = shlex.split(line)
        with pytest.raises(Parsed):
            importlib.import_module(f"jobs.{Path(script).stem}").job(words)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory) -> Path:
    """The folder where the lesson's commands on synthetic hearts ran, with half of the hearts, small images and one epoch."""
    folder, smaller = tmp_path_factory.mktemp("lesson"), {"--train.epochs 8": "--train.epochs 1"}
    smaller |= {"--patients 16": "--patients 8", "quick": "quick --image.height 64 --image.width 64"}
    lines = re.findall(r"^    python (.*lesson/.*)$", LESSON.read_text(), re.MULTILINE)
    assert len(lines) == 8
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("WANDB_MODE", "disabled")
        for line in lines:
            first, *words = shlex.split(re.sub("|".join(smaller), lambda found: smaller[found[0]], line))
            if first == "-m":
                command_line.parse_line(write_phantom, words[1:], "phantom", config=(tyro.conf.PositionalRequiredArgs,))
            else:
                importlib.import_module(f"jobs.{Path(first).stem}").job(words)
    return folder / "lesson"


def test_the_lesson_ends_with_a_report_a_comparison_and_an_ejection_fraction_table(lesson):
    pages = ("runs/first/evaluation-test/report.html", "runs/comparison/compare.html", "check/shards.html")
    for name in (*pages, "outlined/ef.csv"):
        assert (lesson / name).stat().st_size > 300, name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_ends_with_the_path_of_a_report(tmp_path):
    smaller = {"--patients 40": "--patients 8", "--train.epochs 20": "--train.epochs 1"}
    smaller |= {"$(BIN)/python": sys.executable, "jobs/": f"{ROOT}/jobs/"}
    recipe = (ROOT / "Makefile").read_text().split("\ndemo: ")[1].split("\n\n")[0].splitlines()[1:]
    for line in recipe:
        for written, run in smaller.items():
            line = line.replace(written, run)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(shlex.split(line), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    report = Path(done.stdout.splitlines()[-1])
    state = json.loads((tmp_path / "demo" / "pipeline.json").read_text())
    assert not undescribed([*state, *state["stages"]["train"], *state["stages"]["train"]["attempts"][0]])
    assert report.name == "report.html" and report.is_relative_to(tmp_path) and report.stat().st_size > 100_000


def columns_of(path: Path) -> list[str]:
    """The columns of a table, the keys of a JSON object; none of other files."""
    if path.suffix == ".parquet":
        return list(pandas.read_parquet(path).columns)
    if path.suffix == ".csv":
        return path.read_text().splitlines()[0].split(",")
    return list(json.loads(path.read_text())) if path.suffix == ".json" else []


def undescribed(names) -> set[str]:
    """The names that the reference does not have, groups and sides of an index as it writes them."""
    general = {re.sub(r"^(train|val|test)/", "GROUP/", re.sub(r"_(prediction|truth)$", "", name)) for name in names}
    return {name for name in general if f"`{name}`" not in FILES}


def test_every_file_and_column_that_the_lesson_writes_is_described(lesson):
    skipped = ("hearts/", "wandb/", ".heartseg.lock")
    paths = [path for path in lesson.rglob("*") if path.is_file() and not any(part in str(path) for part in skipped)]
    assert len(paths) > 30
    for path in paths:
        name = re.sub(r"^patient.*_(?=pred|overlay)", "NAME_", re.sub(r"part-\d+", "part-00000", path.name))
        assert re.search(rf"[`/]{re.escape(name)}`", FILES), path
        if not path.name.startswith("part-") or path.suffix == ".parquet":
            assert not undescribed(columns_of(path)), path
    note = export.note(load(str(lesson / "runs" / "first")), str(lesson / "runs" / "first"), {}, {})
    assert not undescribed(note)


def test_the_columns_of_a_sweep_and_the_record_of_a_sequence_are_described(shards, tmp_path):
    sweep = sweeps.open_sweep(tiny_experiment(runs=str(tmp_path)), open_shards(shards), sweeps.SweepPlan())
    assert not undescribed(sweeps.tabulate(sweep).columns)
    mask = np.ones((4, 4), np.uint8)
    phases = {Phase.ED: (0, mask), Phase.ES: (2, mask)}
    clip = Clip("x.avi", "video", "x", "x", View.FOUR_CHAMBER, None, "x")
    curves = [np.array([3.0, 2.0, 1.0]), np.array([30.0, 20.0, 10.0]), np.array([0.0, -9.0, -18.0])]
    record = clip_record(ClipResult(clip, 3, (1.0, 1.0), phases, curves[0], (), (), 0.9, *curves[1:], frame_ms=20.0))
    assert {"ed_frame", "volumes_ml"} <= record.keys() and not undescribed(record)


def test_the_page_of_the_shards_names_every_column_in_order():
    table = (REFERENCE / "shard-format.md").read_text().split("| column |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == schema(ImageConfig(64, 64)).names


def test_the_lines_of_pandas_read_what_we_read(shards):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/read-the-shards.md").read_text(), re.DOTALL)
    found = {}
    exec(lines.replace('"shards"', repr(shards)), found)
    ours = load_groups(open_shards(shards), ["train"])["train"]
    assert np.array_equal(found["images"], ours.images[:, 0].numpy())
    assert np.array_equal(found["native"], ours.native_mask(0)) and found["cavity_mm2"] > 100


def test_every_variable_of_ours_is_described():
    files = [path for top in ("heartseg", "jobs", "cluster") for path in (ROOT / top).rglob("*") if path.suffix != ".pyc"]
    found = {name for path in files if path.is_file() for name in re.findall(r"HEARTSEG_[A-Z_]*[A-Z]\b", path.read_text())}
    page = (REFERENCE / "environment.md").read_text()
    assert len(found) > 10 and not {name for name in found if f"`{name}`" not in page}


def test_every_public_name_of_the_library_has_a_docstring():
    # A class above states the meaning of these: torch's modules, and the loaders' protocol.
    documented_above = {"forward", "order", "batches"}
    bare, found = [], [(path, ast.parse(path.read_text())) for path in (ROOT / "heartseg").rglob("*.py")]
    while found:
        path, outer = found.pop()
        for node in outer.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                if not (node.name in documented_above or ast.get_docstring(node)):
                    bare.append(f"{path.name}: {node.name}")
                found += [(path, node)] * isinstance(node, ast.ClassDef)
    assert not bare
