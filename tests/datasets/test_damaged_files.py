"""Whatever is wrong with a file of the source has a reason, costs neither memory nor time, and takes no other patient along."""

import gzip
import os
import shutil
import struct
import tracemalloc
import zlib

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heartseg.config.experiment import ImageConfig
from heartseg.datasets import camus
from heartseg.datasets.camus import read_still, recording_path
from heartseg.datasets.nifti import DamagedRecording, read_nifti, write_nifti
from heartseg.labels import Phase, View
from heartseg.shards import writer

PATIENT, VIEW, PHASE = "patient0001", View.TWO_CHAMBER, Phase.ED
DEPTH, LATERAL = 6, 4
IMAGE = np.arange(DEPTH * LATERAL, dtype=np.uint8).reshape(DEPTH, LATERAL) * 10
MASK = (IMAGE // 10 % 4).astype(np.uint8)


def write_tree(source: str, *patients: str) -> str:
    """A tree with the four stills of each patient."""
    for patient in patients:
        for view, phase in camus.stills_of():
            write_nifti(recording_path(source, patient, view, phase), IMAGE, (0.5, 0.25))
            write_nifti(recording_path(source, patient, view, phase, "_gt"), MASK, (0.5, 0.25))
    return source


@pytest.fixture
def tree(tmp_path) -> str:
    return write_tree(str(tmp_path / "camus"), PATIENT)


def image_path(source: str, patient: str = PATIENT) -> str:
    return recording_path(source, patient, VIEW, PHASE)


def mask_path(source: str, patient: str = PATIENT) -> str:
    return recording_path(source, patient, VIEW, PHASE, "_gt")


def cfg_path(source: str, patient: str) -> str:
    return os.path.join(source, camus.IMAGES_FOLDER, patient, f"Info_{VIEW}.cfg")


def header_bytes(path: str) -> bytearray:
    with gzip.open(path) as stream:
        return bytearray(stream.read())


def put(path: str, data: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(data)


def refused(source: str) -> DamagedRecording:
    with pytest.raises(DamagedRecording) as caught:
        read_still(source, PATIENT, VIEW, PHASE)
    return caught.value


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


def truncated(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def instead(make):
    """Damage that puts something else in the file's place."""

    def damage(path: str) -> None:
        os.remove(path)
        make(path)

    return damage


def rgb(path: str) -> None:
    colours = np.zeros((LATERAL, DEPTH), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    put(path, gzip.compress(nibabel.Nifti1Image(colours, np.eye(4)).to_bytes()))


def gzip_bomb(path: str) -> None:
    """A sound picture, and then 128 MB of zeros in 128 kB."""
    packer = zlib.compressobj(level=9, wbits=31)
    parts = [packer.compress(bytes(header_bytes(path))), *(packer.compress(bytes(2**24)) for _ in range(8)), packer.flush()]
    put(path, b"".join(parts))


def many_members(path: str) -> None:
    """A gzip file of very many empty members, slow for a reader that copies the rest at each one."""
    put(path, gzip.compress(b"") * 50_000)


def values(array: np.ndarray):
    return lambda path: put(path, gzip.compress(nibabel.Nifti1Image(array, np.eye(4), dtype=array.dtype).to_bytes()))


IMAGE_DAMAGE = {
    "truncated gzip": (truncated, "gzip stream is cut off"),
    "empty file": (lambda path: put(path, b""), "not a readable NIfTI"),
    "text": (lambda path: put(path, b"hello" * 200), "not a readable NIfTI"),
    "wrong magic": (header_with(344, "4s", b"abc\0"), "not a readable NIfTI"),
    "pixels cut off": (lambda path: put(path, gzip.compress(bytes(header_bytes(path)[:-5]))), "not a readable NIfTI"),
    "NaN pixel": (pixels(changed(np.nan)), "not finite"),
    "infinite pixel": (pixels(changed(np.inf)), "not finite"),
    "above 16 bits": (pixels(changed(70000)), "its grey levels, 0 to 70000, fit no known range"),
    "below 0": (pixels(changed(-1)), "its grey levels, -1 to 0, fit no known range"),
    "four axes": (values(np.zeros((DEPTH, LATERAL, 2, 3), np.uint8)), "neither an image nor a sequence"),
    "absurd sizes": (header_with(40, "<8h", 4, 32767, 32767, 32767, 32767, 1, 1, 1), "header claims shape"),
    "zero size": (header_with(40, "<8h", 2, 0, DEPTH, 1, 1, 1, 1, 1), "not a readable NIfTI"),
    "negative size": (header_with(40, "<8h", 2, -4, DEPTH, 1, 1, 1, 1, 1), "not a readable NIfTI"),
    "NaN spacing": (header_with(80, "<f", float("nan")), "spacing"),
    "folder in its place": (instead(os.mkdir), "cannot be read: Is a directory"),
    "dangling link": (instead(lambda path: os.symlink("/nowhere/at/all", path)), "cannot be read: No such file"),
    "missing": (os.remove, "cannot be read: No such file"),
    "colour pixels": (rgb, "not plain numbers"),
    "complex pixels": (values(np.zeros((LATERAL, DEPTH), np.complex64)), "complex64, not plain numbers"),
    "one axis": (values(np.zeros(DEPTH, np.uint8)), "not a readable NIfTI"),
    "a sequence in a still's place": (pixels(np.zeros((5, DEPTH, LATERAL), np.uint8)), "a still is one frame, this has 5"),
    "sizes of 6 GB": (header_with(40, "<8h", 3, 32767, 32767, 6, 1, 1, 1, 1), "header claims shape"),
    "more than is there": (header_with(40, "<8h", 2, 11000, 11000, 1, 1, 1, 1, 1), "header claims"),
    "pixels far away": (header_with(108, "<f", 1e9), "pixels begin at byte 1000000000"),
    "zero spacing": (header_with(80, "<f", 0.0), "spacing [0.5, 0.0] is not positive"),
    "infinite spacing": (header_with(80, "<f", float("inf")), "spacing"),
    "NaN intercept": (header_with(112, "<ff", 2.0, float("nan")), "not a readable NIfTI"),
    "unknown type": (header_with(70, "<h", 9999), "not a readable NIfTI"),
    "random bytes": (lambda path: put(path, np.random.default_rng(0).bytes(5000)), "not a readable NIfTI"),
    "gzip of nothing": (lambda path: put(path, gzip.compress(b"")), "not a readable NIfTI"),
    "gzip bomb": (gzip_bomb, "many more are there"),
    "gzip of very many members": (many_members, "not a readable NIfTI"),
    "wrong gzip checksum": (
        lambda path: put(path, gzip.compress(bytes(header_bytes(path)))[:-8] + bytes(8)),
        "hecksum",
    ),
    "link to itself": (
        instead(lambda path: os.symlink(os.path.basename(path), path)),
        "cannot be read: Too many levels of symbolic links",
    ),
    "pipe in its place": (instead(os.mkfifo), "cannot be read: not a file"),
}
MASK_DAMAGE = {
    "label 7": (pixels(changed(7).astype(np.uint8)), "has label 7"),
    "label 7 as float": (pixels(changed(7)), "has label 7"),
    "fractional label": (pixels(changed(1.5)), "labels that are not 0 to 3: 1.5"),
    "negative label": (pixels(changed(-1)), "labels that are not 0 to 3: -1"),
    "label 257": (pixels(changed(257).astype(np.int16)), "labels that are not 0 to 3: 257"),
    "NaN label": (pixels(changed(np.nan)), "labels that are not 0 to 3: nan"),
    "other shape": (pixels(np.zeros((LATERAL, DEPTH), np.uint8)), "shape (1, 4, 6) is not the image's (1, 6, 4)"),
    "missing": (os.remove, "cannot be read: No such file"),
}


@pytest.mark.parametrize("name", ["gzip bomb", "sizes of 6 GB", "absurd sizes", "pixels far away", "more than is there"])
def test_a_claim_of_much_memory_costs_little(name, tree):
    IMAGE_DAMAGE[name][0](image_path(tree))
    tracemalloc.start()
    try:
        refused(tree)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_a_file_larger_than_any_may_be_is_not_read(tree):
    os.truncate(image_path(tree), 2**40)  # sparse: it takes no room
    assert "has more than" in refused(tree).reason


def test_every_kind_of_damage_is_quarantined_with_its_reason_and_every_good_still_is_there(tmp_path):
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
    record = writer.write_part(camus.CamusTree(source), str(tmp_path / "out"), "part-00000.parquet", names, ImageConfig(32, 32))
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


def read_or_refuse(path: str) -> None:
    """Read a file as preprocess does; whatever it holds, pixels or a reason come back, in little memory."""
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


VALID = nibabel.Nifti1Image(IMAGE.T.astype(np.float32), np.diag([0.25, 0.5, 1, 1])).to_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8) | st.binary(max_size=600)),
        min_size=1,
        max_size=6,
    ),
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
    read_or_refuse(path)
