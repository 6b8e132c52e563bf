"""Recordings from a CAMUS tree are upright and exact; damaged ones have a reason, and cost neither memory nor time."""

import functools
import gzip
import os
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heartseg.config.experiment import ImageConfig
from heartseg.datasets import camus
from heartseg.datasets.camus import Info, read_still, recording_path
from heartseg.datasets.nifti import DamagedRecording, read_nifti, write_nifti
from heartseg.errors import UserError
from heartseg.labels import Phase, View
from heartseg.shards import writer

PATIENT, VIEW, PHASE = "patient0001", View.TWO_CHAMBER, Phase.ED
DEPTH, LATERAL = 6, 4
IMAGE = np.arange(DEPTH * LATERAL, dtype=np.uint8).reshape(DEPTH, LATERAL) * 10
MASK = (IMAGE // 10 % 4).astype(np.uint8)


def write_tree(source: str, *patients: str) -> str:
    """A tree with the four stills of each patient, of (depth, lateral) spacing (0.5, 0.25)."""
    for patient in patients:
        for still in camus.stills_of():
            write_nifti(recording_path(source, patient, *still), IMAGE, (0.5, 0.25))
            write_nifti(recording_path(source, patient, *still, "_gt"), MASK, (0.5, 0.25))
    return source


@pytest.fixture
def tree(tmp_path) -> str:
    return write_tree(str(tmp_path / "camus"), PATIENT)


def image_path(source: str, patient: str = PATIENT, suffix: str = "") -> str:
    return recording_path(source, patient, VIEW, PHASE, suffix)


mask_path = functools.partial(image_path, suffix="_gt")


def cfg_path(source: str, patient: str = PATIENT) -> str:
    return os.path.join(source, camus.IMAGES_FOLDER, patient, f"Info_{VIEW}.cfg")


def read(source: str) -> camus.Recording:
    return read_still(source, PATIENT, VIEW, PHASE)


def put(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


def test_on_disk_the_first_axis_is_lateral_with_its_spacing_and_equal_pixels_make_equal_files(tree):
    picture = nibabel.load(image_path(tree))
    assert picture.shape == (LATERAL, DEPTH) and tuple(picture.header.get_zooms()) == (0.25, 0.5)
    np.testing.assert_array_equal(np.asanyarray(picture.dataobj), IMAGE.T)
    assert Path(image_path(tree)).read_bytes() == Path(recording_path(tree, PATIENT, VIEW, Phase.ES)).read_bytes()


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


def test_a_cfg_with_little_or_nonsense_in_it_leaves_fields_none_and_one_that_is_not_text_is_a_reason(tree):
    for text, info in (
        (b"Sex: M\nAge: unknown\nno colon here\nColour: red\nED: nan\n\xff\xfe: 3\n", Info(sex="M")),
        (b"ED: inf\nAge: 1e999\nSex: F\n", Info(sex="F")),
        (b"ED: 1\nAge: 1000000000000\n", Info(ed=1)),  # no column holds it
    ):
        put(cfg_path(tree), text)
        assert read(tree).info == info and read(tree).frame == info.ed
    for raw in (CFG.encode("utf-16-le"), b"\0" * 50):
        put(cfg_path(tree), raw)
        with pytest.raises(DamagedRecording, match="is not text in UTF-8 or UTF-16") as caught:
            read(tree)
        assert caught.value.file == cfg_path(tree)


def test_a_written_cfg_and_written_groups_read_back(tree):
    for convention in ("camus", "ase"):
        info = Info(1, 18, 18, "F", 56, "Poor", 54.0, 48.4, convention)
        camus.write_info(tree, PATIENT, VIEW, info)
        assert camus.read_info(tree, PATIENT, VIEW) == info
    groups = {"train": ["patient0001", "patient0003"], "test": ["patient0002"]}
    camus.write_groups(tree, groups)
    assert camus.CamusTree(tree).groups() == groups


def test_patients_are_found_in_order_and_other_folders_passed_over(tree):
    for name in ("patient0010", "patient0002", "notes", "patientX"):
        os.makedirs(os.path.join(tree, camus.IMAGES_FOLDER, name))
    assert camus.find_patients(tree) == ["patient0001", "patient0002", "patient0010"]
    with pytest.raises(UserError, match="gone does not exist"):
        camus.find_patients(os.path.join(tree, "gone"))
    with pytest.raises(UserError, match="holds no database_nifti"):
        camus.find_patients(os.path.join(tree, camus.IMAGES_FOLDER))


def test_a_split_file_is_read_however_it_was_saved_and_one_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / camus.SPLIT_FOLDER / camus.SPLIT_FILES["test"]
    path.parent.mkdir()
    text, quoted = "patient0001\r\npatient0002 \r\n", b'"patient0001",\n"patient0002";\n'
    for raw in (text.encode("utf-8-sig"), text.encode("utf-16"), quoted, b"patient0001\tpatient0002"):
        path.write_bytes(raw)
        assert camus.CamusTree(str(tmp_path)).groups() == {"test": ["patient0001", "patient0002"]}
    for damage in (text.encode("utf-16-le"), b"d\xf6ra\n", None):
        path.unlink()
        path.write_bytes(damage) if damage else path.mkdir()
        with pytest.raises(UserError, match=r"subgroup_testing\.txt cannot be read .*UTF-8 text"):
            camus.CamusTree(str(tmp_path)).groups()


def test_a_tree_is_private_unless_its_writer_or_its_user_says_what_it_is(phantom, tree):
    assert camus.CamusTree(phantom).dataset_name() == "phantom"
    assert camus.CamusTree(tree).dataset_name() == "other"  # patient0001, as CAMUS and as anyone may name a patient
    assert camus.CamusTree(tree, "camus").dataset_name() == "CAMUS"
    put(os.path.join(tree, camus.DOWNLOAD_NOTE), b"{}")
    assert camus.CamusTree(tree).dataset_name() == "CAMUS"


def header_bytes(path: str) -> bytearray:
    return bytearray(gzip.decompress(Path(path).read_bytes()))


def header_with(offset: int, fmt: str, *values):
    def damage(path: str) -> None:
        raw = header_bytes(path)
        raw[offset : offset + struct.calcsize(fmt)] = struct.pack(fmt, *values)
        put(path, gzip.compress(bytes(raw)))

    return damage


def pixels(array: np.ndarray):
    return lambda path: write_nifti(path, array, (1.0, 1.0))


def changed(value: float) -> np.ndarray:
    array = np.zeros((DEPTH, LATERAL), np.float32)
    array[2, 1] = value
    return array


def instead(make):
    """Damage that replaces the file."""

    def damage(path: str) -> None:
        os.remove(path)
        make(path)

    return damage


def gzip_bomb(path: str) -> None:
    """A valid picture, then 128 MB of zeros in 128 kB."""
    packer = zlib.compressobj(level=9, wbits=31)
    parts = [packer.compress(bytes(header_bytes(path))), *(packer.compress(bytes(2**24)) for _ in range(8)), packer.flush()]
    put(path, b"".join(parts))


def values(array: np.ndarray):
    return lambda path: put(path, gzip.compress(nibabel.Nifti1Image(array, np.eye(4), dtype=array.dtype).to_bytes()))


IMAGE_DAMAGE = {
    "truncated gzip": (lambda path: os.truncate(path, os.path.getsize(path) // 2), "gzip stream is cut off"),
    "empty file": (lambda path: put(path, b""), "not a readable NIfTI"),
    "text": (lambda path: put(path, b"hello" * 200), "not a readable NIfTI"),
    "wrong magic": (header_with(344, "4s", b"abc\0"), "not a readable NIfTI"),
    "pixels cut off": (lambda path: put(path, gzip.compress(bytes(header_bytes(path)[:-5]))), "not a readable NIfTI"),
    "NaN pixel": (pixels(changed(np.nan)), "not finite"),
    "below 0": (pixels(changed(-1)), "its grey levels, -1 to 0, fit no known range"),
    "four axes": (values(np.zeros((DEPTH, LATERAL, 2, 3), np.uint8)), "neither an image nor a sequence"),
    "absurd sizes": (header_with(40, "<8h", 4, 32767, 32767, 32767, 32767, 1, 1, 1), "header claims shape"),
    "zero size": (header_with(40, "<8h", 2, 0, DEPTH, 1, 1, 1, 1, 1), "not a readable NIfTI"),
    "negative size": (header_with(40, "<8h", 2, -4, DEPTH, 1, 1, 1, 1, 1), "not a readable NIfTI"),
    "NaN spacing": (header_with(80, "<f", float("nan")), "spacing"),
    "folder in its place": (instead(os.mkdir), "cannot be read: Is a directory"),
    "dangling link": (instead(lambda path: os.symlink("/nowhere/at/all", path)), "is missing"),
    "missing": (os.remove, "is missing"),
    "colour pixels": (values(np.zeros((LATERAL, DEPTH), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "not plain numbers"),
    "complex pixels": (values(np.zeros((LATERAL, DEPTH), np.complex64)), "complex64, not plain numbers"),
    "one axis": (values(np.zeros(DEPTH, np.uint8)), "not a readable NIfTI"),
    "a sequence in a still's place": (pixels(np.zeros((5, DEPTH, LATERAL), np.uint8)), "a still must be one frame"),
    "sizes of 6 GB": (header_with(40, "<8h", 3, 32767, 32767, 6, 1, 1, 1, 1), "header claims shape"),
    "more than is there": (header_with(40, "<8h", 2, 11000, 11000, 1, 1, 1, 1, 1), "header claims"),
    "pixels far away": (header_with(108, "<f", 1e9), "pixels begin at byte 1000000000"),
    "zero spacing": (header_with(80, "<f", 0.0), "spacing [0.5, 0.0] is not positive"),
    "infinite spacing": (header_with(80, "<f", float("inf")), "spacing"),
    "NaN intercept": (header_with(112, "<ff", 2.0, float("nan")), "not a readable NIfTI"),
    "unknown type": (header_with(70, "<h", 9999), "not a readable NIfTI"),
    "gzip of nothing": (lambda path: put(path, gzip.compress(b"")), "not a readable NIfTI"),
    "gzip bomb": (gzip_bomb, "many more were found"),
    # Slow for a reader that copies the rest at each member.
    "gzip of very many members": (lambda path: put(path, gzip.compress(b"") * 50_000), "not a readable NIfTI"),
    "wrong gzip checksum": (lambda path: put(path, gzip.compress(bytes(header_bytes(path)))[:-8] + bytes(8)), "hecksum"),
    "link to itself": (instead(lambda path: os.symlink(os.path.basename(path), path)), "Too many levels of symbolic links"),
    "pipe in its place": (instead(os.mkfifo), "cannot be read: not a file"),
    "1 TB": (lambda path: os.truncate(path, 2**40), "has more than"),  # sparse: it takes no room
}
MASK_DAMAGE = {
    "label 7": (pixels(changed(7).astype(np.uint8)), "(1 LV cavity, 2 myocardium, 3 left atrium): 7"),
    "label 7 as float": (pixels(changed(7)), "(1 LV cavity, 2 myocardium, 3 left atrium): 7"),
    "fractional label": (pixels(changed(1.5)), "left atrium): 1.5"),
    "negative label": (pixels(changed(-1)), "left atrium): -1"),
    "label 257": (pixels(changed(257).astype(np.int16)), "left atrium): 257"),
    "NaN label": (pixels(changed(np.nan)), "left atrium): nan"),
    "other shape": (pixels(np.zeros((LATERAL, DEPTH), np.uint8)), "shape (1, 4, 6), but the image has (1, 6, 4)"),
    "missing": (os.remove, "is missing"),
}


def test_every_kind_of_damage_is_quarantined_with_its_reason_in_little_memory_and_every_good_still_is_there(tmp_path):
    kinds = [(kind, image_path, damage, reason) for kind, (damage, reason) in IMAGE_DAMAGE.items()]
    kinds += [(kind, mask_path, damage, reason) for kind, (damage, reason) in MASK_DAMAGE.items()]
    names = [f"patient{number:04d}" for number in range(1, len(kinds) + 6)]
    source = write_tree(str(tmp_path / "camus"), *names)
    for patient, (_, place, damage, _) in zip(names, kinds, strict=False):
        damage(place(source, patient))
    garbage, folder, pipe, gone, good = names[-5:]
    put(cfg_path(source, garbage), np.random.default_rng(0).bytes(5000) + b"\nEF: nan")
    os.mkdir(cfg_path(source, folder)), os.mkfifo(cfg_path(source, pipe))
    shutil.rmtree(os.path.dirname(cfg_path(source, gone)))
    put(os.path.dirname(cfg_path(source, gone)), b"a file in the patient's place")
    tracemalloc.start()
    record = writer.write_part(camus.CamusTree(source), str(tmp_path / "out"), "part-00000.parquet", names, ImageConfig(32, 32))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20_000_000  # whatever a header or a gzip stream claims
    found = {}
    for entry in record["quarantined"]:
        found.setdefault(entry["patient"], []).append(entry)
    for patient, (kind, place, _, reason) in zip(names, kinds, strict=False):
        (entry,) = found.pop(patient)
        assert (entry["view"], entry["phase"]) == (VIEW, PHASE) and reason in entry["reason"], kind
        assert os.path.join(source, entry["file"]) == place(source, patient) and record["patients"][patient]["rows"] == 3
    assert {patient: len(entries) for patient, entries in found.items()} == {garbage: 2, folder: 2, pipe: 2, gone: 4}
    assert [record["patients"][patient]["rows"] for patient in (garbage, good)] == [2, 4]
    assert record["rows"] == 4 * len(names) - len(kinds) - 10 and len(kinds) >= 40


VALID = nibabel.Nifti1Image(IMAGE.T.astype(np.float32), np.diag([0.25, 0.5, 1, 1])).to_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=8) | st.binary(max_size=600)), max_size=6),
    start=st.sampled_from([None, 352, 348, 3]),
    cut=st.none() | st.integers(0, len(VALID)),
    packed=st.sampled_from(["no", "after", "before"]),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_changed_bytes_of_a_sound_file_or_random_ones_never_crash_the_reader(changes, start, cut, packed, tmp_path):
    raw = bytearray(gzip.compress(VALID) if packed == "before" else VALID[:start])
    for position, new in changes:
        position %= len(raw)
        raw[position : position + len(new)] = new
    path = str(tmp_path / "a.nii.gz")
    put(path, gzip.compress(bytes(raw[:cut])) if packed == "after" else bytes(raw[:cut]))
    tracemalloc.start()
    try:
        array, spacing_mm, _ = read_nifti(path)
        assert array.ndim == 3 and array.size > 0 and min(spacing_mm) > 0 and np.isfinite(spacing_mm).all()
    except DamagedRecording as error:
        assert error.reason and error.file == path
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 20_000_000
