"""What is read from a CAMUS tree is upright and exact, and what is damaged says why."""

import os

import nibabel
import numpy as np
import pytest

from heartseg.datasets import camus
from heartseg.datasets.camus import Info, read_still, recording_path
from heartseg.datasets.nifti import DamagedRecording, read_nifti, write_nifti
from heartseg.errors import UserError
from heartseg.labels import Phase, View

PATIENT, VIEW, PHASE = "patient0001", View.TWO_CHAMBER, Phase.ED
DEPTH, LATERAL = 6, 4
IMAGE = np.arange(DEPTH * LATERAL, dtype=np.uint8).reshape(DEPTH, LATERAL) * 10
MASK = (IMAGE // 10 % 4).astype(np.uint8)


@pytest.fixture
def tree(tmp_path) -> str:
    """A tree with one still, (depth, lateral) spacing (0.5, 0.25), and its mask."""
    source = str(tmp_path / "camus")
    write_nifti(image_path(source), IMAGE, (0.5, 0.25))
    write_nifti(mask_path(source), MASK, (0.5, 0.25))
    return source


def image_path(source: str) -> str:
    return recording_path(source, PATIENT, VIEW, PHASE)


def mask_path(source: str) -> str:
    return recording_path(source, PATIENT, VIEW, PHASE, "_gt")


def cfg_path(source: str) -> str:
    return os.path.join(source, camus.IMAGES_FOLDER, PATIENT, f"Info_{VIEW}.cfg")


def read(source: str) -> camus.Recording:
    return read_still(source, PATIENT, VIEW, PHASE)


def put(path: str, data: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(data)


def test_on_disk_the_first_axis_is_lateral_and_has_the_lateral_spacing(tree):
    picture = nibabel.load(image_path(tree))
    assert picture.shape == (LATERAL, DEPTH) and tuple(picture.header.get_zooms()) == (0.25, 0.5)
    np.testing.assert_array_equal(np.asanyarray(picture.dataobj), IMAGE.T)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])  # as in the release
def test_a_still_is_upright_uint8_with_its_spacing_and_mask(kind, tree):
    for path, array in ((image_path(tree), IMAGE), (mask_path(tree), MASK)):
        write_nifti(path, array.astype(kind), (0.5, 0.25))
        assert read_nifti(path)[0].dtype == kind
    still = read(tree)
    assert still.image.dtype == still.mask.dtype == np.uint8 and still.spacing_mm == (0.5, 0.25)
    assert (still.patient, still.view, still.phase, still.frame, still.info) == (PATIENT, VIEW, PHASE, None, None)
    np.testing.assert_array_equal(still.image, IMAGE)
    np.testing.assert_array_equal(still.mask, MASK)


def test_equal_pixels_make_equal_files(tree, tmp_path):
    write_nifti(str(tmp_path / "again.nii.gz"), IMAGE, (0.5, 0.25))
    with open(image_path(tree), "rb") as first:
        assert first.read() == (tmp_path / "again.nii.gz").read_bytes()


CFG = "ED: 3\nES: 18\nNbFrame: 20\nSex: F\nAge: 56\nImageQuality: Good\nEF: 54.5\nFrameRate: 48.4\n"
SAVED = {
    "as it is": CFG.encode(),
    "by Notepad": CFG.replace("\n", "\r\n").encode("utf-8-sig"),
    "as Unicode": CFG.replace("\n", "\r\n").encode("utf-16"),
    "in big-endian Unicode": b"\xfe\xff" + CFG.encode("utf-16-be"),
    "with blanks and tabs": CFG.replace(": ", "\t : ").replace("\n", " \t\n").encode(),
    "by a spreadsheet": "".join(f'"{line}",,\r\n' for line in CFG.splitlines()).encode(),
    "by a German spreadsheet": CFG.replace(".", ",").replace("\n", ";;\r\n").encode("cp1252"),
    "by an old Mac, in small letters": CFG.lower().replace("f\n", "F\n").replace("good", "Good").replace("\n", "\r").encode(),
    "with a remark in Latin-1": CFG.encode() + "Reader: Müller\n".encode("latin-1"),
}


@pytest.mark.parametrize("way", SAVED)
def test_a_cfg_gives_every_field_and_the_frame_of_the_phase_however_it_was_saved(way, tree):
    put(cfg_path(tree), SAVED[way])
    still = read(tree)
    assert still.info == Info(3, 18, 20, "F", 56, "Good", 54.5, 48.4, "camus") and still.frame == 3


def test_a_cfg_that_is_no_text_is_a_reason(tree):
    for raw in (CFG.encode("utf-16-le"), b"\0" * 50):
        put(cfg_path(tree), raw)
        with pytest.raises(DamagedRecording, match="is not text in UTF-8 or UTF-16") as caught:
            read(tree)
        assert caught.value.file == cfg_path(tree)


@pytest.mark.parametrize(
    ("text", "info"),
    [
        (b"Sex: M\nAge: unknown\nno colon here\nColour: red\nED: nan\n\xff\xfe: 3\n", Info(sex="M")),
        (b"ED: inf\nAge: 1e999\nSex: F\n", Info(sex="F")),
        (b"ED: 1\nAge: 1000000000000\n", Info(ed=1)),  # no column holds it
    ],
)
def test_a_cfg_with_little_or_nonsense_in_it_leaves_fields_none(text, info, tree):
    put(cfg_path(tree), text)
    assert read(tree).info == info and read(tree).frame == info.ed


@pytest.mark.parametrize("convention", ["camus", "ase"])
def test_a_written_cfg_reads_back(tree, convention):
    info = Info(1, 18, 18, "F", 56, "Poor", 54.0, 48.4, convention)
    camus.write_info(tree, PATIENT, VIEW, info)
    assert camus.read_info(tree, PATIENT, VIEW) == info


def test_patients_are_found_in_order_and_other_folders_passed_over(tree):
    for name in ("patient0010", "patient0002", "notes", "patientX"):
        os.makedirs(os.path.join(tree, camus.IMAGES_FOLDER, name))
    assert camus.find_patients(tree) == ["patient0001", "patient0002", "patient0010"]
    with pytest.raises(UserError, match="gone does not exist"):
        camus.find_patients(os.path.join(tree, "gone"))
    with pytest.raises(UserError, match="holds no database_nifti"):
        camus.find_patients(os.path.join(tree, camus.IMAGES_FOLDER))


def test_groups_read_back_and_a_group_without_a_file_is_absent(tmp_path):
    camus.write_groups(str(tmp_path), {"train": ["patient0001", "patient0003"], "test": ["patient0002"]})
    assert camus.CamusTree(str(tmp_path)).groups() == {"train": ["patient0001", "patient0003"], "test": ["patient0002"]}


def test_a_split_file_is_read_however_it_was_saved_and_one_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / camus.SPLIT_FOLDER / camus.SPLIT_FILES["test"]
    path.parent.mkdir()
    text = "patient0001\r\npatient0002 \r\n"
    quoted = b'"patient0001",\n"patient0002";\n'
    for raw in (text.encode("utf-8-sig"), text.encode("utf-16"), quoted, b"patient0001\tpatient0002"):
        path.write_bytes(raw)
        assert camus.CamusTree(str(tmp_path)).groups() == {"test": ["patient0001", "patient0002"]}
    for damage in (text.encode("utf-16-le"), b"d\xf6ra\n", None):
        path.unlink()
        path.write_bytes(damage) if damage else path.mkdir()
        with pytest.raises(UserError, match=r"subgroup_testing\.txt cannot be read as UTF-8 text"):
            camus.CamusTree(str(tmp_path)).groups()


def test_a_tree_is_private_unless_its_writer_or_its_user_says_what_it_is(phantom, tree):
    assert camus.CamusTree(phantom).dataset_name() == "phantom"
    assert camus.CamusTree(tree).dataset_name() == "other"  # patient0001, as CAMUS and as anyone may name a patient
    assert camus.CamusTree(tree, "camus").dataset_name() == "CAMUS"
    put(os.path.join(tree, camus.DOWNLOAD_NOTE), b"{}")
    assert camus.CamusTree(tree).dataset_name() == "CAMUS"
