"""What is there already is kept only as it was written and only for the source that it was made from; else it is named."""

import os
import re
import shutil
import uuid
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heartseg.config.experiment import ImageConfig, SplitConfig
from heartseg.datasets import camus
from heartseg.datasets.nifti import write_nifti
from heartseg.errors import UserError
from heartseg.labels import Phase, View
from heartseg.shards import writer
from heartseg.shards.inspection import find_damage
from heartseg.shards.reader import open_shards
from heartseg.shards.writer import MANIFEST, SPLITS, write_part
from heartseg.storage import filesystem
from helpers.experiments import tiny_experiment
from jobs import preprocess

PLAIN = preprocess.Options(launcher="plain")
PART = "part-00000.parquet"
GRID = ImageConfig(32, 32)


@pytest.fixture
def source(phantom, tmp_path) -> str:
    """The phantom's tree, to change; nobody wrote in it lately."""
    copy = shutil.copytree(phantom, str(tmp_path / "source"))
    for path in filesystem.walk(copy):
        os.utime(path, (1e9, 1e9))
    return copy


def run(source: str, out: str, **options) -> None:
    preprocess.run(tiny_experiment(source=source, out=out), preprocess.Options(launcher="plain", **options))


@pytest.fixture
def finished(source, tmp_path) -> str:
    out = str(tmp_path / "out")
    run(source, out)
    return out


@pytest.fixture
def unfinished(finished) -> str:
    """All parts, and no manifest yet."""
    for name in (MANIFEST, SPLITS):
        os.remove(os.path.join(finished, name))
    return finished


def flip(path: str, position: int, by: int = 1) -> None:
    data = bytearray(filesystem.read_bytes(path))
    data[position] ^= by
    filesystem.publish(path, bytes(data))


def still(source: str, patient: str = "patient0003", suffix: str = "") -> str:
    return camus.recording_path(source, patient, View.FOUR_CHAMBER, Phase.ED, suffix)


def change(path: str) -> None:
    """The same picture in a file of other bytes and the same size: the gzip header's operating system."""
    flip(path, 9)


def test_a_part_damaged_before_its_manifest_was_written_gets_into_no_finished_folder(unfinished, source, shards):
    flip(os.path.join(unfinished, PART), 20_000)  # pixels
    with pytest.raises(UserError, match=rf"{PART} is damaged: remove it, and the same command writes it anew"):
        run(source, unfinished)
    os.remove(os.path.join(unfinished, PART))
    run(source, unfinished)
    assert list(find_damage(unfinished)) == []
    assert same(unfinished, shards)


def same(out: str, other: str) -> bool:
    """Whether the parts of two folders are the same files."""
    parts = [[filesystem.read_bytes(path) for path in filesystem.walk(folder) if "part-" in path] for folder in (out, other)]
    return parts[0] == parts[1] and bool(parts[0])


@pytest.fixture(scope="module")
def one_part(phantom, tmp_path_factory) -> tuple[str, bytes]:
    """A folder with a part of two patients, and the part's bytes."""
    out = str(tmp_path_factory.mktemp("part"))
    write_part(phantom, out, PART, camus.find_patients(phantom)[:2], GRID)
    return out, filesystem.read_bytes(os.path.join(out, PART))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), by=st.integers(1, 255), at_the_end=st.booleans())
def test_any_changed_byte_of_such_a_part_is_refused_or_mended(phantom, one_part, where, by, at_the_end):
    out, data = one_part
    path = os.path.join(out, PART)
    footer = 12_000
    flip(path, len(data) - footer + int(where * footer) if at_the_end else int(where * len(data)), by)
    try:
        record = write_part(phantom, out, PART, camus.find_patients(phantom)[:2], GRID)
        assert filesystem.read_bytes(path) == data and record["sha256"] == filesystem.sha256(data)
    except UserError as error:
        assert PART in str(error)
    finally:
        filesystem.publish(path, data)


@pytest.mark.parametrize("how", ["cut short", "label 7 in its place"])
def test_a_damaged_file_that_was_mended_is_taken_by_the_same_command(how, source, shards, tmp_path):
    path, out = still(source, suffix="_gt"), str(tmp_path / "out")
    good = filesystem.read_bytes(path)
    filesystem.publish(path, good[:100] if how == "cut short" else b"x" * len(good))
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 32 recordings are damaged"):
            run(source, out)
    filesystem.publish(path, good)
    run(source, out)
    assert open_shards(out).manifest["quarantined"] == [] and same(out, shards)


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_a_source_file_with_other_bytes_of_the_same_number_is_named(state, source, request):
    out = request.getfixturevalue(state)
    change(still(source))
    with pytest.raises(UserError, match=r"patient0003_4CH_ED\.nii\.gz has other bytes than it had\): give --overwrite"):
        run(source, out)
    run(source, out, overwrite=True)
    run(source, out)


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_a_source_file_that_came_went_or_grew_is_named(state, source, request):
    out, path = request.getfixturevalue(state), still(source)
    data = filesystem.read_bytes(path)
    filesystem.publish(path, data + b"\0")
    with pytest.raises(UserError, match=rf"_4CH_ED.nii.gz of patient0003: {len(data)} bytes then, {len(data) + 1} now"):
        run(source, out)
    filesystem.publish(path, data)
    filesystem.publish(path + ".old", data)
    with pytest.raises(UserError, match=r"_4CH_ED.nii.gz.old of patient0003 is new"):
        run(source, out)
    os.remove(path + ".old")
    shutil.rmtree(os.path.dirname(still(source, "patient0008")))
    with pytest.raises(UserError, match="patient0008 is gone"):
        run(source, out)


def test_a_finished_folder_of_an_untouched_source_reads_none_of_its_files(finished, source):
    shutil.copytree(finished, finished + "-before")
    for path in filesystem.walk(source):
        if path.endswith(".gz"):
            flip(path, 9)
            os.utime(path, (1e9, 1e9))
    run(source, finished)  # the price of not reading: what was given an old time is not seen
    assert same(finished, finished + "-before")


def test_a_changed_file_is_named_on_an_object_store_too(source, s3):
    folder = f"s3://bucket/{uuid.uuid4().hex[:8]}"
    for path in filesystem.walk(source):
        if "patient0001" in path or "patient0002" in path:
            filesystem.publish(filesystem.join(folder, "in", os.path.relpath(path, source)), filesystem.read_bytes(path))
    experiment = tiny_experiment(source=folder + "/in", out=folder + "/out", split=SplitConfig("ratio", 0.5))
    preprocess.run(experiment, PLAIN)
    preprocess.run(experiment, PLAIN)
    change(still(folder + "/in", "patient0002"))
    with pytest.raises(UserError, match=r"patient0002_4CH_ED\.nii\.gz has other bytes"):
        preprocess.run(experiment, PLAIN)


def test_overwrite_begins_anew_and_touches_nothing_but_shards(finished, source, shards):
    filesystem.publish(os.path.join(finished, "notes.txt"), b"mine")
    flip(os.path.join(finished, PART), 20_000)
    filesystem.publish(os.path.join(finished, "part-00009.parquet"), b"of another time")
    os.utime(os.path.join(finished, MANIFEST), (1, 1))
    run(source, finished, overwrite=True)
    assert same(finished, shards) and os.path.getmtime(os.path.join(finished, MANIFEST)) > 1
    assert list(find_damage(finished)) == [] and filesystem.read_bytes(os.path.join(finished, "notes.txt")) == b"mine"


def test_parts_that_another_node_wrote_to_a_folder_of_its_own_make_no_complete_folder(source, tmp_path, monkeypatch):
    """What a node that does not share --out does: its parts are finished, and are not here."""
    plainly = preprocess.map_plainly
    there = str(tmp_path / "the other node's disk")
    monkeypatch.setattr(preprocess, "map_plainly", lambda tasks: plainly([(task[0], there, *task[2:]) for task in tasks]))
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=rf"out/{PART} is not there as it was written: every node must see --out"):
        run(source, out)
    assert PART in os.listdir(there) and not os.path.exists(os.path.join(out, MANIFEST))


def test_a_finished_folder_that_lost_a_part_is_not_called_complete(finished, source):
    os.remove(os.path.join(finished, PART))
    with pytest.raises(UserError, match=rf"{PART} is missing"):
        run(source, finished)


def test_a_node_that_does_not_see_the_source_quarantines_nobody(source, tmp_path):
    (tmp_path / "not mounted").mkdir()
    for gone in ("gone", "not mounted"):
        said = preprocess._write_part(str(tmp_path / gone), str(tmp_path / "out"), PART, ["patient0001"], GRID)
        assert re.search("is not there on .*: every node must see --source", str(said["error"]))
    assert not os.path.exists(tmp_path / "out")
    assert preprocess._write_part(source, str(tmp_path / "out"), PART, ["patient0001"], GRID)["rows"] == 4


def test_a_part_that_no_manifest_would_list_is_refused_by_name(unfinished, source):
    stray = os.path.join(unfinished, "part-00007.parquet")
    filesystem.publish(stray, b"of another time")
    with pytest.raises(UserError, match=r"part-00007\.parquet is a part of other shards: remove it"):
        run(source, unfinished)
    os.remove(stray)
    run(source, unfinished)
    assert list(find_damage(unfinished)) == []


@pytest.mark.parametrize("share", ["-0.1", "5", "nan"])
def test_a_share_that_is_none_is_refused(share, tmp_path):
    with pytest.raises(UserError, match="is no share: give one from 0 to 1, as 0.05 for 5 %"):
        preprocess.job(["seed", "--source", str(tmp_path), "--out", str(tmp_path / "o"), "--max-quarantined", share])


def test_an_edited_split_file_changes_no_finished_split_unasked(source, tmp_path):
    experiment = tiny_experiment(source=source, out=str(tmp_path / "out"), split=SplitConfig("official"))
    preprocess.run(experiment, PLAIN)
    path = os.path.join(source, camus.SPLIT_FOLDER, camus.SPLIT_FILES["train"])
    before, first = filesystem.read_bytes(os.path.join(experiment.out, SPLITS)), filesystem.read_bytes(path).decode().split()[0]
    filesystem.publish(path, filesystem.read_bytes(path).replace(first.encode(), b""))
    with pytest.raises(UserError, match=rf"{first}: train there, None by the source\): give --resplit"):
        preprocess.run(experiment, PLAIN)
    assert filesystem.read_bytes(os.path.join(experiment.out, SPLITS)) == before
    preprocess.run(experiment, preprocess.Options(launcher="plain", resplit=True))
    assert first not in open_shards(experiment.out).groups["train"]
    preprocess.run(experiment, PLAIN)
    preprocess.run(replace(experiment, source=""), preprocess.Options(launcher="plain", resplit=True))
    assert first not in open_shards(experiment.out).groups["train"]


def test_a_plain_folder_is_listed_once_however_many_parts_it_makes(tmp_path, monkeypatch):
    monkeypatch.setitem(writer.PATIENTS_PER_PART, "stills", 1)
    monkeypatch.setattr(filesystem, "sizes", counted := Counted(filesystem.sizes))
    counts = []
    for patients in (3, 9):
        source = str(tmp_path / str(patients))
        for number in range(patients):
            for folder in ("images", "masks"):
                write_picture(os.path.join(source, folder, f"p{number}.nii.gz"))
        counted.calls = 0
        run(source, str(tmp_path / f"out{patients}"))
        counts.append(counted.calls)
    assert counts[0] == counts[1]


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def write_picture(path: str) -> None:
    write_nifti(path, np.ones((8, 8), np.uint8), (1.0, 1.0))
