"""Finished parts and folders are kept only for the source and settings that they were made from; anything else is named."""

import filecmp
import os
import re
import shutil
import uuid
from dataclasses import replace

import pytest

from heartseg.config.experiment import ImageConfig, SplitConfig
from heartseg.datasets import camus
from heartseg.datasets.camus import CamusTree
from heartseg.errors import StorageError, UserError
from heartseg.labels import Phase, View
from heartseg.shards import preprocessing, reader, writer
from heartseg.shards.inspection import find_damage
from heartseg.shards.reader import open_shards
from heartseg.shards.writer import MANIFEST, SPLITS
from heartseg.storage import filesystem, locks
from helpers.experiments import tiny_experiment
from jobs import preprocess
from jobs.support import ray_preprocessing

PARTS = ["part-00000.parquet", "part-00001.parquet"]
SIDECAR = "part-00000.json"
GRID = ImageConfig(64, 64)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setitem(writer.PATIENTS_PER_PART, "stills", 4)


@pytest.fixture
def source(phantom, tmp_path) -> str:
    """The phantom's tree, to change; its files are old."""
    copy = shutil.copytree(phantom, str(tmp_path / "source"))
    for path in filesystem.walk(copy):
        os.utime(path, (1e9, 1e9))
    return copy


def run(source: str, out: str, image: ImageConfig = GRID, **options) -> None:
    experiment = tiny_experiment(source=source, out=out, image=image)
    preprocess.run(experiment, preprocess.Options(launcher="plain", **options))


@pytest.fixture
def finished(source, tmp_path) -> str:
    out = str(tmp_path / "out")
    run(source, out)
    return out


@pytest.fixture
def unfinished(finished) -> str:
    """All parts, and no manifest yet; what the finished folder held lies beside it."""
    shutil.copytree(finished, finished + "-before")
    for name in (MANIFEST, SPLITS):
        os.remove(os.path.join(finished, name))
    return finished


def assert_as_before(out: str) -> None:
    """The folder is whole and holds the files that it held when it was first finished."""
    assert list(find_damage(out)) == []
    names = [name for name in os.listdir(out + "-before") if name != locks.LOCK_NAME]
    assert filecmp.cmpfiles(out, out + "-before", names, shallow=False) == (names, [], [])


def still(source: str, patient: str = "patient0003", suffix: str = "") -> str:
    return camus.recording_path(source, patient, View.FOUR_CHAMBER, Phase.ED, suffix)


def change(path: str, position: int = 9) -> None:
    """One other byte; in a NIfTI, the gzip header's operating system."""
    data = bytearray(filesystem.read_bytes(path))
    data[position] ^= 1
    filesystem.publish(path, bytes(data))


def test_an_interrupted_job_keeps_its_parts_and_reads_nothing_for_them(unfinished, source, monkeypatch):
    monkeypatch.setattr(writer, "read_patient", lambda *arguments: pytest.fail("a patient was read again"))
    run(source, unfinished)
    assert_as_before(unfinished)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (PARTS[0], lambda path: change(path, 20_000)), (PARTS[0], lambda path: os.truncate(path, 100)), (PARTS[0], os.remove),
        (SIDECAR, lambda path: filesystem.publish(path, b"[]")), (SIDECAR, lambda path: os.truncate(path, 100)),
        (SIDECAR, os.remove),  # killed in between, or written by an older version
    ],
)  # fmt: skip
def test_only_a_part_that_changed_since_it_was_written_is_written_again(file, damage, unfinished, source):
    damage(os.path.join(unfinished, file))
    untouched = os.stat(os.path.join(unfinished, PARTS[1])).st_mtime_ns
    run(source, unfinished)
    assert_as_before(unfinished)
    assert os.stat(os.path.join(unfinished, PARTS[1])).st_mtime_ns == untouched


def test_a_part_of_other_settings_or_of_a_changed_source_is_written_again(unfinished, source):
    os.rename(unfinished + "-before", unfinished + "-old")
    run(source, unfinished, image=ImageConfig(32, 48))
    assert open_shards(unfinished).image == ImageConfig(32, 48) and list(find_damage(unfinished)) == []
    os.remove(os.path.join(unfinished, MANIFEST))
    change(still(source))
    run(source, unfinished)
    old, new = (open_shards(folder).manifest for folder in (unfinished + "-old", unfinished))
    assert old["parts"] == new["parts"]  # the pixels are the same
    changed = [name for name in old["patients"] if old["patients"][name]["sha256"] != new["patients"][name]["sha256"]]
    assert changed == ["patient0003"] and old["source_sha256"] != new["source_sha256"]


@pytest.mark.parametrize("bad", [b"", b"x" * 5000])
def test_a_damaged_file_that_was_repaired_is_read_by_the_same_command(bad, source, tmp_path):
    path, out = still(source, suffix="_gt"), str(tmp_path / "out")
    good = filesystem.read_bytes(path)
    for data in (bad, bad.ljust(len(good), b"x")[: len(good)]):
        filesystem.publish(path, data)
        os.utime(path, (1e9, 1e9))
        with pytest.raises(UserError, match="1 of 32 recordings cannot be used"):
            run(source, out)
    filesystem.publish(path, good)
    os.utime(path, (1e9, 1e9))  # as where only its permissions were wrong
    run(source, out)
    assert open_shards(out).manifest["quarantined"] == []


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda source: change(still(source)), r"patient0003_4CH_ED\.nii\.gz of patient0003 has changed"),
        (lambda source: os.utime(still(source), (2e9, 2e9)), r"patient0003_4CH_ED\.nii\.gz of patient0003 has changed"),
        (lambda source: filesystem.publish(still(source) + ".old", b"x"), r"patient0003_4CH_ED\.nii\.gz\.old of \w+ is new"),
        (lambda source: os.remove(still(source)), r"patient0003_4CH_ED\.nii\.gz of patient0003 is gone"),
        (lambda source: shutil.rmtree(os.path.dirname(still(source, "patient0008"))), "[\\w.]+ of patient0008 is gone"),
    ],
)
def test_a_finished_folder_names_the_file_of_its_source_that_changed(edit, named, finished, source):
    run(source, finished)
    edit(source)
    with pytest.raises(UserError, match=rf"holds other shards \({named}\): give --overwrite"):
        run(source, finished)
    run(source, finished, overwrite=True, max_quarantined=0.1)
    run(source, finished)


def test_a_changed_file_is_named_on_an_object_store_too(source, s3):
    folder = f"s3://bucket/{uuid.uuid4().hex[:8]}"
    for path in filesystem.walk(source):
        if re.search("patient000[1-4]", path):
            filesystem.publish(filesystem.join(folder, "in", os.path.relpath(path, source)), filesystem.read_bytes(path))
    for _ in range(2):
        run(folder + "/in", folder + "/out")
    path = still(folder + "/in")
    filesystem.publish(path, filesystem.read_bytes(path) + b"\0")
    with pytest.raises(UserError, match=r"patient0003_4CH_ED\.nii\.gz of patient0003 has changed"):
        run(folder + "/in", folder + "/out")


def test_shards_from_before_there_were_sidecars_are_complete_until_a_size_changes(finished, source):
    for name in (SIDECAR, "part-00001.json"):
        os.remove(os.path.join(finished, name))
    path = os.path.join(finished, MANIFEST)
    filesystem.publish_json(path, filesystem.read_json(path) | {"seal": "0" * 64})
    run(source, finished)
    assert list(find_damage(finished)) == []
    filesystem.publish(still(source), filesystem.read_bytes(still(source)) + b"\0")
    with pytest.raises(UserError, match=r"files of the source were added, removed or changed in size\): give --overwrite"):
        run(source, finished)


def test_an_unreachable_store_is_not_mistaken_for_damage(unfinished, source, monkeypatch):
    before, read_bytes = filesystem.read_bytes(os.path.join(unfinished, PARTS[0])), filesystem.read_bytes

    def unreachable(path: str, *arguments) -> bytes:
        if path.endswith(".parquet"):
            raise StorageError("cannot be reached")
        return read_bytes(path, *arguments)

    monkeypatch.setattr(filesystem, "read_bytes", unreachable)
    with pytest.raises(StorageError):
        run(source, unfinished)
    with pytest.raises(StorageError):
        list(find_damage(unfinished + "-before"))
    assert read_bytes(os.path.join(unfinished, PARTS[0])) == before


def test_a_second_writer_or_another_grid_is_refused_and_changes_nothing(finished, source):
    with locks.lock(finished), pytest.raises(UserError, match="Another job is writing"):
        run(source, finished, overwrite=True)
    with pytest.raises(UserError, match=r"image\.height: 64 there, 80 requested"):
        run(source, finished, image=ImageConfig(80, 64))
    assert list(find_damage(finished)) == []
    os.remove(os.path.join(finished, PARTS[0]))
    with pytest.raises(UserError, match=rf"{PARTS[0]} is missing"):
        run(source, finished)


def test_stray_parts_are_refused_by_name_and_overwrite_starts_over_and_touches_nothing_but_shards(unfinished, source):
    filesystem.publish(os.path.join(unfinished, "notes.txt"), b"mine")
    change(os.path.join(unfinished, PARTS[0]), 20_000)
    for stray in ("part-00009.parquet", "part-00009.json"):
        filesystem.publish(os.path.join(unfinished, stray), b"of another time")
    with pytest.raises(UserError, match=r"part-00009\.parquet belongs to other shards: remove it"):
        run(source, unfinished)
    assert filesystem.read_bytes(os.path.join(unfinished, "part-00009.parquet")) == b"of another time"
    run(source, unfinished, overwrite=True)
    assert_as_before(unfinished)
    assert {*os.listdir(unfinished)} - {*os.listdir(unfinished + "-before")} == {"notes.txt"}


def test_parts_that_another_node_wrote_to_a_folder_of_its_own_make_no_complete_folder(source, tmp_path):
    there, out, experiment = str(tmp_path / "there"), str(tmp_path / "out"), tiny_experiment()

    def write_elsewhere(tasks: list[tuple]):
        return preprocessing.write_parts_here([(task[0], there, *task[2:]) for task in tasks])

    with pytest.raises(UserError, match=rf"out/{PARTS[0]} is missing or incomplete: every node must see --out"):
        preprocessing.write_shards(CamusTree(source), out, experiment.image, experiment.split, map_parts=write_elsewhere)
    assert PARTS[0] in os.listdir(there) and not os.path.exists(os.path.join(out, MANIFEST))


def test_a_node_that_does_not_see_the_source_quarantines_no_patient(source, tmp_path):
    (tmp_path / "not mounted").mkdir()
    out, image = str(tmp_path / "out"), tiny_experiment().image
    for gone in ("gone", "not mounted"):
        result = ray_preprocessing._write_part(CamusTree(str(tmp_path / gone)), out, PARTS[0], ["patient0001"], image)
        assert re.search("is missing on .*: every node must see --source", str(result["error"]))
    assert not os.path.exists(out)
    assert ray_preprocessing._write_part(CamusTree(source), out, PARTS[0], ["patient0001"], image)["rows"] == 4


def test_a_share_outside_0_to_1_is_refused(tmp_path):
    for share in (-0.1, 5, float("nan")):
        with pytest.raises(UserError, match="is not a share: give one from 0 to 1, such as 0.05 for 5 %"):
            run(str(tmp_path), str(tmp_path / "o"), max_quarantined=share)


def test_an_edited_split_file_changes_a_finished_split_only_when_asked(source, tmp_path):
    experiment = tiny_experiment(source=source, out=str(tmp_path / "out"), split=SplitConfig("official"))
    plain, resplit = (preprocess.Options(launcher="plain", resplit=asked) for asked in (False, True))
    preprocess.run(experiment, plain)
    path = os.path.join(source, camus.SPLIT_FOLDER, camus.SPLIT_FILES["train"])
    before, first = filesystem.read_bytes(os.path.join(experiment.out, SPLITS)), filesystem.read_bytes(path).decode().split()[0]
    filesystem.publish(path, filesystem.read_bytes(path).replace(first.encode(), b""))
    with pytest.raises(UserError, match=rf"{first}: train there, None in the source\): give --resplit"):
        preprocess.run(experiment, plain)
    assert filesystem.read_bytes(os.path.join(experiment.out, SPLITS)) == before
    preprocess.run(experiment, resplit)
    assert first not in open_shards(experiment.out).groups["train"]
    preprocess.run(experiment, plain)
    preprocess.run(replace(experiment, source=""), resplit)  # by the manifest's copy of the source's split
    assert first not in reader.read_split(experiment.out)["groups"]["train"]
