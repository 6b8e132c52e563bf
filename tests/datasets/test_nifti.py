"""Any plain NIfTI reads as nibabel reads it: whole and broken numbers, both byte orders, scaled or not, packed or not."""

import functools
import gzip
import os
import struct

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heartseg.datasets import nifti
from heartseg.datasets.nifti import DamagedRecording, as_labels, decode_nifti, read_nifti
from heartseg.storage import filesystem

KINDS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


def file_bytes(array: np.ndarray, order: str, zooms, slope=None, inter=None, kind=nibabel.Nifti1Image, unit="mm") -> bytes:
    """A NIfTI file that nibabel writes, of one byte order, with scaling put into its header."""
    dtype = array.dtype.newbyteorder(order)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    picture = kind(array.astype(dtype), None, header)
    picture.header.set_zooms(zooms)
    picture.header.set_xyzt_units(unit)
    raw = bytearray(picture.to_bytes())
    if slope is not None:
        place, fmt = (112, "ff") if kind is nibabel.Nifti1Image else (176, "dd")
        raw[place : place + struct.calcsize(fmt)] = struct.pack(order + fmt, slope, inter)
    return bytes(raw)


@given(
    shape=st.lists(st.integers(2, 7), min_size=2, max_size=3),
    dtype=st.sampled_from(KINDS),
    order=st.sampled_from("<>"),
    zooms=st.tuples(st.floats(0.0625, 3, width=32), st.floats(0.0625, 3, width=32)),
    scaling=st.sampled_from([None, (1, 0), (0, 5), (0.5, 3), (2, -1), (float("nan"), 0)]),
    kind=st.sampled_from([nibabel.Nifti1Image, nibabel.Nifti2Image]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_kind_of_file_reads_as_nibabel_reads_it(shape, dtype, order, zooms, scaling, kind, packed, seed):
    array = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    raw = file_bytes(array, order, (*zooms, *[1.0] * (len(shape) - 2)), *(scaling or (None, None)), kind)
    found, spacing_mm, _ = decode_nifti(gzip.compress(raw) if packed else raw)
    theirs = np.atleast_3d(np.asanyarray(kind.from_bytes(raw).dataobj)).T
    assert found.shape == theirs.shape and spacing_mm == pytest.approx((zooms[1], zooms[0]))
    np.testing.assert_array_equal(found, theirs)
    if scaling in (None, (1, 0)):
        labels = as_labels(found % 4, "p")
        np.testing.assert_array_equal(labels, found % 4)
        assert labels.flags.writeable and labels.flags.c_contiguous


def test_labels_that_a_resampling_left_next_to_whole_numbers_are_rounded_and_others_are_named():
    whole = np.arange(4, dtype=np.uint8).repeat(6).reshape(4, 6)
    for error in (-1e-4, 1e-4, 9e-4):
        labels = as_labels(whole.astype(np.float32) + np.float32(error), "p")
        assert labels.dtype == np.uint8 and np.array_equal(labels, whole)
    with pytest.raises(DamagedRecording, match=r"labels other than 0 to 3 .*: 0\.002, 1\.002, 2\.002, 3\.002"):
        as_labels(whole + 0.002, "p")


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_spacing_is_in_mm_whatever_unit_the_header_names_and_its_sign_is_a_direction(unit, scale):
    raw = bytearray(file_bytes(np.zeros((3, 4), np.uint8), "<", (0.25, 0.5), unit=unit))
    raw[80:84] = struct.pack("<f", -0.25)
    assert decode_nifti(bytes(raw))[1] == pytest.approx((0.5 * scale, 0.25 * scale))


def test_an_uncompressed_file_is_read_only_without_a_compressed_one_beside_it(tmp_path):
    path = str(tmp_path / "a.nii.gz")
    for name, value in (("a.nii", 1), ("b.nii.gz", 2)):
        filesystem.publish(str(tmp_path / name), file_bytes(np.full((2, 2), value, np.uint8), "<", (1, 1)))
    assert read_nifti(path)[0].max() == 1
    os.rename(tmp_path / "b.nii.gz", path)
    assert read_nifti(path)[0].max() == 2


inflate = functools.partial(nifti.unpack, most=2**24)


@given(data=st.data(), size=st.integers(0, 5000), members=st.integers(1, 3), padding=st.integers(0, 20))
def test_what_was_packed_is_unpacked_and_a_changed_or_cut_stream_never_is(data, size, members, padding):
    content = np.random.default_rng(size).integers(0, 9, size, dtype=np.uint8).tobytes()
    packed = b"".join(gzip.compress(content, mtime=0) for _ in range(members))
    assert inflate(packed + b"\0" * padding) == content * members
    with pytest.raises(Exception):  # noqa: B017  whatever is raised becomes the reason of a quarantine
        inflate(packed[: data.draw(st.integers(1, len(packed) - 1).filter(lambda n: n % (len(packed) // members)))])
    damaged = bytearray(packed)
    damaged[-data.draw(st.integers(1, 8))] ^= data.draw(st.integers(1, 255))  # the last member's checksum and length
    with pytest.raises(Exception):  # noqa: B017
        inflate(bytes(damaged))


def test_what_follows_the_last_member_is_ignored_and_very_many_such_as_bgzip_writes_are_read():
    packed = gzip.compress(b"frames" * 1000)
    for junk in (b"junk", b"\0\0junk", b"x"):
        assert inflate(packed * 2 + junk) == b"frames" * 2000
    content = bytes(range(250)) * 4000
    blocks = b"".join(gzip.compress(content[start : start + 1000]) for start in range(0, len(content), 1000))
    assert inflate(blocks + gzip.compress(b"") * 900) == content
