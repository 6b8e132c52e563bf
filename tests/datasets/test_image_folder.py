"""Anyone's images and masks in a plain folder become shards, are split by their own file, trained on and scored."""

import gzip
import os

import numpy as np
import pytest

from heartseg.config.experiment import SplitConfig
from heartseg.datasets import camus, nifti, phantom
from heartseg.datasets.image_folder import open_source
from heartseg.errors import UserError
from heartseg.shards import writer
from heartseg.shards.reader import Shards, load_groups, open_shards
from heartseg.storage import filesystem
from helpers.experiments import tiny_experiment
from jobs import preprocess

NAMES = ["anna_2CH_ED", "anna_2CH_ES", "anna_4ch_ed", "bert_visit1", "bert_visit2", "cleo", "dora_4CH_x"]
NAMES += ["emil_1", "finn_1", "gwen_1"]


def picture(name: str) -> tuple[np.ndarray, np.ndarray]:
    """An image and its labels, [H,W], with its own size, different for each name."""
    rng = np.random.default_rng(list(name.encode()))
    height, width = rng.integers(40, 90, 2)
    mask = np.zeros((height, width), np.uint8)
    for label in (1, 2, 3):
        mask[10 * label : 10 * label + 8, 5 : 5 + 10 * label] = label
    return (mask * 60 + rng.integers(0, 70, mask.shape)).astype(np.uint8), mask


def put(folder: str, name: str, ending: str = ".nii.gz") -> None:
    for kind, array in zip(("images", "masks"), picture(name), strict=True):
        path = os.path.join(folder, kind, f"{name}.nii.gz")
        nifti.write_nifti(path, array, (0.5, 0.25))
        if ending == ".nii":
            filesystem.publish(path.removesuffix(".gz"), gzip.decompress(filesystem.read_bytes(path)))
            os.remove(path)


@pytest.fixture
def folder(tmp_path) -> str:
    """Seven patients; Cleo's files are not compressed, and there is a note in the folder."""
    source = str(tmp_path / "own")
    for name in NAMES:
        put(source, name, ".nii" if name == "cleo" else ".nii.gz")
    for kind in ("images", "masks"):
        filesystem.publish(os.path.join(source, kind, "notes.txt"), b"hello")
        filesystem.publish(os.path.join(source, kind, "._anna_2CH_ED.nii.gz"), b"what a Mac leaves")
    return source


def write(folder: str, out, kind: str = "ratio", **options) -> Shards:
    experiment = tiny_experiment(source=folder, out=str(out), split=SplitConfig(kind, test_share=0.3))
    preprocess.run(experiment, preprocess.Options(launcher="plain", **options))
    return open_shards(str(out))


def test_names_show_patient_view_and_phase_and_the_pixels_are_theirs(folder, tmp_path):
    opened = write(folder, tmp_path / "out")
    assert opened.manifest["dataset"] == "other" and opened.manifest["quarantined"] == []
    assert list(opened.manifest["patients"]) == sorted({name.split("_")[0] for name in NAMES})
    found = []
    for frames in load_groups(opened, opened.groups).values():
        for index, row in enumerate(frames.table.to_pylist()):
            found.append((row["patient"], row["view"], row["phase"]))
            assert row["native_spacing_mm"] == [0.5, 0.25] and row["frame"] is None and row["ef"] is None
            fits = [name for name in NAMES if name.split("_")[0] == row["patient"]]
            assert any(np.array_equal(frames.native_mask(index), picture(name)[1]) for name in fits)
    expected = [("anna", "2CH", "ED"), ("anna", "2CH", "ES"), ("anna", "4CH", "ED"), ("dora", "4CH", None)]
    expected += [(name.split("_")[0], None, None) for name in NAMES if name[:4] not in ("anna", "dora")]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_a_groups_file_is_the_official_split_however_it_was_saved(folder):
    text = "patient,group\nanna,train\nbert, train\ncleo,test\ndora,val\n"
    quoted, longer = text.replace("patient,group", '"Patient" ,"Group"'), text.replace("\n", ",\n") + ",,\n\n"
    texts = [text, text.replace(",", ";"), text.replace(",", "\t"), longer, quoted]
    for raw in [text.replace("\n", "\r\n").encode("utf-8-sig"), text.encode("utf-16"), *map(str.encode, texts)]:
        filesystem.publish(os.path.join(folder, "groups.csv"), raw)
        assert open_source(folder).groups() == {"train": ["anna", "bert"], "test": ["cleo"], "val": ["dora"]}


def test_a_wrong_groups_file_or_file_name_is_refused_by_what_is_wrong(folder, tmp_path):
    for text, message in (
        (b"anna,train\n", "must begin with the line `patient,group`"),
        (b"patient,group\nanna,training\n", "group 'training': use one of train, val, test"),
        (b"patient,group\nanna,train\nclea,test\n", r"names 'clea', who has no file \(nearest: cleo"),
        (b"patient,group\nd\xf6ra,train\n", "groups.csv cannot be read"),
        (b"patient,group\nanna,train\nanna,test\n", "anna is in both"),
    ):
        filesystem.publish(os.path.join(folder, "groups.csv"), text)
        with pytest.raises(UserError, match=message):
            write(folder, tmp_path / "out", "official")
    os.mkdir(os.fsencode(folder) + b"/images/d\xf6ra_1.nii.gz")
    with pytest.raises(UserError, match=r"holds 'd\\udcf6ra_1\.nii\.gz', a name that is not UTF-8: rename it"):
        write(folder, tmp_path / "out")


def test_half_a_pair_and_a_sequence_among_stills_go_to_quarantine(folder, tmp_path):
    os.remove(os.path.join(folder, "masks", "emil_1.nii.gz"))
    os.remove(os.path.join(folder, "images", "finn_1.nii.gz"))
    nifti.write_nifti(os.path.join(folder, "images", "gwen_1.nii.gz"), np.zeros((3, 9, 9), np.uint8), (1, 1))
    found = {e["patient"]: e for e in write(folder, tmp_path / "out", max_quarantined=0.5).manifest["quarantined"]}
    assert {name: entry["file"] for name, entry in found.items()} == {
        "emil": "masks/emil_1.nii.gz", "finn": "images/finn_1.nii.gz", "gwen": "images/gwen_1.nii.gz",
    }  # fmt: skip
    assert found["emil"]["reason"] == "is missing" and "a still must be one frame" in found["gwen"]["reason"]


def test_the_third_axis_is_time_where_sequences_are_asked_for(folder, tmp_path):
    for kind in ("images", "masks"):
        nifti.write_nifti(os.path.join(folder, kind, "gwen_1.nii.gz"), np.ones((3, 50, 40), np.uint8), (1, 1))
    opened = write(folder, tmp_path / "out", frames="sequence")
    rows = [row for frames in load_groups(opened, opened.groups).values() for row in frames.table.to_pylist()]
    assert [row["frame"] for row in rows if row["patient"] == "gwen"] == [1, 2, 3]
    assert {row["phase"] for row in rows} == {None}


def test_a_folder_of_neither_layout_names_both(tmp_path):
    os.makedirs(tmp_path / "images")
    with pytest.raises(UserError, match=r"holds neither database_nifti/.*images/PATIENT_ANYTHING"):
        open_source(str(tmp_path))
    os.makedirs(tmp_path / "masks")
    with pytest.raises(UserError, match="holds no NIfTI file"):
        open_source(str(tmp_path)).patients()


def test_a_folder_is_listed_as_often_however_many_parts_it_makes(folder, tmp_path, monkeypatch):
    calls, list_files = [], filesystem.list_files
    monkeypatch.setattr(filesystem, "list_files", lambda path: calls.append(path) or list_files(path))
    write(folder, tmp_path / "16")
    at_once = len(calls)
    monkeypatch.setitem(writer.PATIENTS_PER_PART, "stills", 1)
    write(folder, tmp_path / "1")
    assert len(calls) == 2 * at_once
    put(folder, "hugo_1")
    with pytest.raises(UserError, match=r"other shards \(images/hugo_1.nii.gz of hugo is new\)"):
        write(folder, tmp_path / "1")


HYPHENS = [f"p{number:02d}-{view}-{phase}" for number in range(6) for view in ("2CH", "4CH") for phase in ("ED", "ES")]


@pytest.mark.parametrize(
    ("names", "pattern", "patients"),
    [
        (HYPHENS, "", None), (HYPHENS, "[^-]+", 6), (HYPHENS, "p([0-9]+)", 6),
        (["ann.1", "ann.2", "bob.1", "bob.2"], "", None), (["2CH_ann", "2CH_bob"], "", None),
        (["2CH_ann", "2CH_bob"], "2CH_(.+)", 2),
        (["s-01", "s-02", "s-03"], "", 3), (["a-01_1", "a-01_2", "b-01_1", "b-02_1"], "", 3), (["ann", "bob"], "b.*", None),
        (["ann", "bob"], "(", None),
    ],
)  # fmt: skip
def test_names_that_may_count_one_person_as_several_are_refused_before_any_writing(names, pattern, patients, tmp_path):
    source, out = str(tmp_path / "own"), str(tmp_path / "out")
    for name in names:
        put(source, name)
    if patients is None:
        with pytest.raises(UserError, match="--patient-pattern"):
            write(source, out, patient_pattern=pattern)
        assert not os.path.exists(out)
    else:
        assert len(open_source(source, pattern).patients()) == patients


def test_every_file_is_used_or_in_quarantine_or_counted_as_ignored(tmp_path, capsys):
    source, out = str(tmp_path / "tree"), str(tmp_path / "out")
    phantom.write_phantom(source, patients=3, scale=0.1, sequences=True)
    images = os.path.join(source, "database_nifti")
    os.rename(os.path.join(images, "patient0001"), os.path.join(images, "Patient_one"))
    folder = os.path.join(images, "patient0002")
    for name in os.listdir(folder):  # as an old file server hands them out
        os.rename(os.path.join(folder, name), os.path.join(folder, name.upper().replace("PATIENT", "patient")))
    folder = os.path.join(images, "patient0003")
    os.rename(os.path.join(folder, "patient0003_2CH_ED.nii.gz"), os.path.join(folder, "2ch.nii.gz"))
    patients = write(source, out, max_quarantined=0.5).manifest["patients"]
    shown = capsys.readouterr().out
    assert "ignored  8 half-sequence files" in shown and "ignored  1 patients' other files, such as 2ch.nii.gz" in shown
    assert "ignored  1 other entries, such as Patient_one" in shown and "quarantined  patient0003 2CH ED" in shown
    assert {name: record["rows"] for name, record in patients.items()} == {"patient0002": 4, "patient0003": 3}
    assert all(record["ef"] for record in patients.values())


def test_a_split_that_names_a_stranger_is_refused_with_the_nearest_name_and_a_part_of_camus_is_not(tmp_path):
    source, out = str(tmp_path / "tree"), str(tmp_path / "out")
    phantom.write_phantom(source, patients=3, scale=0.05)
    for train in (["patient4", "patient0001"], ["patient0001", "patient4", "patient0003"]):
        camus.write_groups(source, {"train": train, "val": [], "test": ["patient0002"]})
        with pytest.raises(UserError, match=r"names 'patient4', who has no file \(nearest: patient000"):
            write(source, out, "official")
    camus.write_groups(source, {"train": ["patient0001", "patient0004", "patient0003"], "val": [], "test": ["patient0002"]})
    write(source, out, "official")
