"""Whatever a file is, its frames come out upright and grey with true millimetres, and its masks go back onto its own grid."""

import gzip
import io
import struct
import sys

import av
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from heartseg.datasets import nifti, readers
from heartseg.datasets.dicom import fits, read_dicom
from heartseg.datasets.nifti import DamagedRecording
from heartseg.errors import UserError
from helpers.echo_files import LOOP, dicom, movie

DEPTH, LATERAL, TIME = 7, 5, 3
UPRIGHT = np.random.default_rng(0).integers(2, 250, (TIME, DEPTH, LATERAL)).astype(np.uint8)
SPACING_MM = (10.0, 12.5)  # 70 mm deep
# An array's axes by name; `1` has one element.
AXES = ("LD", "DL", "LD1", "DL1", "LD11", "1LD", "LDT", "DLT", "LDT1", "LD1T", "DL1T", "L1DT")
DTYPES = ("u1", "i2", ">i2", "f4", ">f4", "f8")
SIGNS = ((1, 1), (-1, -1), (-1, 1), (1, -1))


def geometries() -> list[tuple]:
    """Axes, number type, signs of the affine, with or without a slope, suffix: 96 of them, each kind many times."""
    pairs = [(axes, dtype) for axes in AXES for dtype in DTYPES] + [(axes, "u1") for axes in AXES] * 2
    others = ([*SIGNS, SIGNS[0]], [None, (0.5, 10.0)], [".nii.gz", ".nii", ".nii"])
    return [(*pair, *(values[number % len(values)] for values in others)) for number, pair in enumerate(pairs)]


def upright_of(axes: str) -> np.ndarray:
    return UPRIGHT if "T" in axes else UPRIGHT[:1]


def on_disk(values: np.ndarray, axes: str) -> np.ndarray:
    """[T,H,W] in a file's order of axes."""
    order = ["TDL".index(name) for name in axes if name != "1"]
    kept = order + [axis for axis in range(3) if axis not in order]
    return values.transpose(kept).reshape([1 if a == "1" else values.shape["TDL".index(a)] for a in axes])


def affine_of(axes: str, signs: tuple[int, int]) -> np.ndarray:
    """Lateral along the world's x, depth along its y, whichever array axes they are."""
    affine = np.zeros((4, 4))
    sizes = {"L": (0, SPACING_MM[1] * signs[0]), "D": (1, SPACING_MM[0] * signs[1])}
    for axis, name in enumerate(axes[:3].ljust(3, "1")):
        world, size = sizes.get(name, (2, 1.0))
        affine[world, axis] = size
    affine[:, 3] = (-3, 4, 5, 1)
    return affine


def write(path, axes: str, dtype: str, signs: tuple[int, int], slope: tuple[float, float] | None) -> None:
    values = upright_of(axes).astype(float)
    stored = values if slope is None else np.rint((values - slope[1]) / slope[0])
    if dtype == "u1" and slope is not None:
        slope, stored = (1.0, 2.0), values - 2
    array = on_disk(stored, axes).astype(dtype)
    header = nibabel.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(np.dtype(dtype))
    picture = nibabel.Nifti1Image(array, affine_of(axes, signs), header)
    picture.header["descrip"] = b"kept"
    picture.header["cal_max"] = 255
    raw = picture.to_bytes()
    if slope:  # as a scanner's exporter writes them: the stored numbers are not the intensities
        order = ">" if dtype.startswith(">") else "<"
        raw = raw[:112] + struct.pack(f"{order}2f", *slope) + raw[120:]
    path.write_bytes(gzip.compress(raw) if path.name.endswith("gz") else raw)


@pytest.mark.parametrize(("axes", "dtype", "signs", "slope", "suffix"), geometries())
def test_frames_are_upright_and_masks_return_to_the_very_grid(axes, dtype, signs, slope, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    write(path, axes, dtype, signs, slope)
    found = readers.read(str(path), "nifti")
    np.testing.assert_array_equal(found.pixels, upright_of(axes))
    assert found.pixels.dtype == np.uint8 and found.spacing_mm == pytest.approx(SPACING_MM)
    masks = found.pixels % 4
    nifti.write_frames(str(tmp_path / "mask.nii.gz"), masks, found.place)
    image, mask = nibabel.load(path), nibabel.load(tmp_path / "mask.nii.gz")
    assert mask.shape == image.shape and mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(mask.dataobj), np.rint(np.asanyarray(image.dataobj)).astype(np.uint8) % 4)
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert mask.header.get_zooms() == image.header.get_zooms()
    assert mask.header["descrip"] == b"kept" and mask.header.endianness == image.header.endianness
    assert (mask.dataobj.slope, mask.dataobj.inter) == (1, 0) and mask.header["cal_max"] == 0
    again = readers.decode((tmp_path / "mask.nii.gz").read_bytes(), "nifti")
    np.testing.assert_array_equal(again.pixels, masks)


def test_nifti_2_without_any_transform_is_kept_and_a_dicom_header_in_it_does_not_reach_the_mask(tmp_path):
    array = np.ascontiguousarray(UPRIGHT[0].T)
    image = nibabel.Nifti2Image(array, None)
    image.header.set_zooms((12.5, 10.0))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"DOE^JANE"))  # as some converters do
    raw = image.to_bytes()
    assert b"DOE^JANE" in raw
    found = readers.decode(raw, "nifti")
    nifti.write_frames(str(tmp_path / "mask.nii.gz"), found.pixels % 4, found.place)
    assert b"DOE^JANE" not in gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert type(mask) is nibabel.Nifti2Image and int(mask.header["sform_code"]) == int(mask.header["qform_code"]) == 0
    assert found.spacing_mm == SPACING_MM and (np.asarray(mask.dataobj) == array % 4).all()


def test_a_flip_turns_the_frames_and_not_the_file(tmp_path):
    write(tmp_path / "a.nii", "LDT", "u1", (1, 1), None)
    for flip in ((1,), (2,), (1, 2)):
        found = readers.read(str(tmp_path / "a.nii"), "nifti", flips=flip)
        np.testing.assert_array_equal(found.pixels, np.flip(UPRIGHT, flip))
        assert found.flips == flip


def test_a_nifti_of_one_value_or_not_a_finite_one_is_refused_with_its_reason(tmp_path):
    for value, reason in ((np.nan, "not finite"), (7.0, "the same value")):
        nibabel.save(nibabel.Nifti1Image(np.full((5, 5), value), np.eye(4)), tmp_path / "a.nii")
        with pytest.raises(DamagedRecording, match=reason):
            readers.read(str(tmp_path / "a.nii"), "nifti")


def test_an_implausible_spacing_is_ignored_and_the_given_one_is_used(tmp_path):
    picture = nibabel.Nifti1Image(np.arange(60000, dtype=np.float32).reshape(100, 600), np.eye(4))  # 1 mm: 600 mm deep
    nibabel.save(picture, tmp_path / "a.nii")
    found = readers.read(str(tmp_path / "a.nii"), "nifti")
    assert found.spacing_mm is None and "600 mm deep" in found.notes[-1]
    assert readers.read(str(tmp_path / "a.nii"), "nifti", (0.3, 0.4)).spacing_mm == (0.3, 0.4)


@pytest.mark.parametrize(
    ("unit", "step", "known_ms"), [("sec", 0.02, 20), ("msec", 20, 20), ("unknown", 20, None), ("sec", 1, None)]
)
def test_the_time_between_frames_is_what_a_nifti_or_a_dicom_records_if_an_echo_can_have_it(unit, step, known_ms, tmp_path):
    image = nibabel.Nifti1Image(LOOP.T, np.diag([0.4, 0.3, 1, 1]))
    image.header.set_zooms((0.4, 0.3, step))
    image.header.set_xyzt_units("mm", unit)
    nibabel.save(image, tmp_path / "loop.nii.gz")
    found = readers.read(str(tmp_path / "loop.nii.gz"), "nifti").frame_ms
    assert found == (known_ms and pytest.approx(known_ms))
    (tmp_path / "loop.dcm").write_bytes(dicom(LOOP, **({"FrameTime": step} if unit == "msec" else {})))
    assert readers.read(str(tmp_path / "loop.dcm"), "dicom").frame_ms == (20 if unit == "msec" else None)


def test_a_malformed_frame_time_is_unknown_and_does_not_spoil_the_loop(tmp_path):
    raw = dicom(LOOP, FrameTime="23.456")
    assert raw.count(b"23.456") == 1
    (tmp_path / "loop.dcm").write_bytes(raw.replace(b"23.456", b"23 4x6"))
    found = readers.read(str(tmp_path / "loop.dcm"), "dicom")
    assert found.frame_ms is None and len(found.pixels) == len(LOOP)


def test_a_png_of_any_mode_is_grey_and_upright(tmp_path):
    for mode in ("L", "RGB", "RGBA", "P"):
        Image.fromarray(UPRIGHT[0]).convert(mode).save(tmp_path / "a.png")
        found = readers.read(str(tmp_path / "a.png"), "picture")
        assert found.pixels.shape == (1, DEPTH, LATERAL) and found.spacing_mm is None
        np.testing.assert_allclose(found.pixels[0], UPRIGHT[0], atol=1)


def test_a_png_of_16_bit_colours_is_its_grey_or_refused_if_the_picture_is_in_the_lower_bits():
    coder = av.CodecContext.create("png", "w")
    coder.width, coder.height, coder.pix_fmt, coder.time_base = 80, 100, "rgb48be", 1
    for factor in (257, 16):
        colours = np.repeat(LOOP[0, ..., None], 3, axis=2).astype(np.uint16) * factor
        (packet,) = coder.encode(av.VideoFrame.from_ndarray(colours, "rgb48be"))
        if factor == 257:
            np.testing.assert_array_equal(readers.decode(bytes(packet), "picture").pixels[0], LOOP[0])
    with pytest.raises(readers.Unreadable, match="save it as 16-bit grey"):
        readers.decode(bytes(packet), "picture")


@pytest.mark.parametrize("kind", ["nifti", "dicom", "video", "picture"])
def test_damaged_bytes_of_any_kind_are_a_reason_that_quotes_no_tag(kind, tmp_path, capfd):
    named = dicom(LOOP, PatientName="DOE^JANE", PatientID="JANE " * 20, StudyDate="JANE")
    for raw in (b"", b"hello", named[:600], named[:3000], named.replace(b"MONOCHROME2", b"MONOJANE   ")):
        (tmp_path / "a").write_bytes(raw)
        with pytest.raises(DamagedRecording) as caught:
            readers.read(str(tmp_path / "a"), kind)
        assert "is not a readable" in caught.value.reason and "JANE" not in caught.value.reason
    printed = capfd.readouterr()
    assert "JANE" not in printed.out + printed.err


@pytest.mark.parametrize(("kind", "package"), [("dicom", "pydicom"), ("video", "av")])
def test_a_missing_package_is_reported_with_the_command_that_installs_it(kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    with pytest.raises(UserError, match=r"pip install 'heartseg\[formats\]'"):
        readers.import_package(kind)
    readers.import_package("nifti")


SMOOTH = (3 * np.arange(48)[:, None] + np.arange(64) + 20 * np.arange(3)[:, None, None]).astype(np.uint8)  # up to 244


def test_a_video_gives_every_frame_in_grey(tmp_path):
    (tmp_path / "a.avi").write_bytes(movie(".avi", "mjpeg", SMOOTH))
    found = readers.read(str(tmp_path / "a.avi"), "video")
    assert found.pixels.shape == SMOOTH.shape and found.spacing_mm is None
    assert np.abs(found.pixels.astype(int) - SMOOTH).mean() < 4


def region(top: int, left: int, bottom: int, right: int) -> dict:
    """A tissue region, its last row and column included."""
    names = ("RegionLocationMinY0", "RegionLocationMinX0", "RegionLocationMaxY1", "RegionLocationMaxX1")
    return dict(zip(names, (top, left, bottom, right), strict=True))


def written(data: pydicom.Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, data)
    return buffer.getvalue()


def packed(pixels: np.ndarray, frame: bytes, syntax: str) -> pydicom.Dataset:
    """A data set whose only frame is compressed."""
    data = pydicom.dcmread(io.BytesIO(dicom(pixels)))
    data.PixelData = pydicom.encaps.encapsulate([frame])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = syntax
    return data


SYNTAXES = "ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian", "RLELossless"
LEVELS = ("u1", 0, 255), ("u2", 0, 255), ("u2", 0, 4095), ("u2", 0, 65535), ("i2", -2048, 2047), ("i2", -32768, 32767)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(("kind", "first", "last"), LEVELS)
def test_one_loop_in_any_type_range_byte_order_and_lossless_compression_is_the_same_loop(kind, first, last, syntax):
    stored = np.rint(LOOP * ((last - first) / 255) + first).astype((">" if "Big" in syntax else "<") + kind)
    is_packed, signed = syntax == "RLELossless", {"PixelRepresentation": int(first < 0)}
    raw = dicom(stored, syntax="" if is_packed else getattr(pydicom.uid, syntax), **signed)
    if is_packed:
        data = pydicom.dcmread(io.BytesIO(raw))
        data.compress(pydicom.uid.RLELossless)
        raw = written(data)
    np.testing.assert_array_equal(read_dicom(raw).pixels, LOOP)


def test_a_dicom_loop_is_cut_to_its_region_and_has_its_spacing():
    found = read_dicom(dicom(LOOP, region=region(20, 10, 94, 69)))
    np.testing.assert_array_equal(found.pixels, LOOP[:, 20:95, 10:70])
    assert found.spacing_mm == pytest.approx((0.4, 0.5)) and found.box == (20, 10, 100, 80)


def test_a_region_in_other_units_or_of_no_tissue_gives_no_spacing():
    tags = {"PhysicalUnitsXDirection": 4, "PhysicalDeltaX": 0, "RegionDataType": 2, "RegionSpatialFormat": 5}
    for tag, value in tags.items():
        found = read_dicom(dicom(LOOP, region={"RegionLocationMinX0": 10, tag: value}))
        assert found.spacing_mm is None and (found.box is not None) == tag.startswith("Physical")


def test_colours_of_every_kind_are_the_grey_they_show():
    from pydicom.pixels import convert_color_space

    colours = np.repeat(LOOP[..., None], 3, axis=3)
    np.testing.assert_array_equal(read_dicom(dicom(colours, "RGB")).pixels, LOOP)
    yellow = convert_color_space(colours, "RGB", "YBR_FULL")
    assert np.abs(read_dicom(dicom(yellow, "YBR_FULL")).pixels.astype(int) - LOOP).max() <= 2
    np.testing.assert_array_equal(read_dicom(dicom(255 - LOOP, "MONOCHROME1")).pixels, LOOP)
    red = np.zeros((1, 4, 4, 3), np.uint8)
    red[..., 0] = np.arange(16).reshape(4, 4) * 10
    np.testing.assert_allclose(read_dicom(dicom(red, "RGB")).pixels[0], red[0, ..., 0] * 0.299, atol=0.51)
    pairs = LOOP.reshape(3, 100, 40, 2)  # uncompressed colours at half the width
    data = pydicom.dcmread(io.BytesIO(dicom(colours, "YBR_FULL_422")))
    data.PixelData = np.concatenate([pairs, np.full_like(pairs, 128)], axis=3).tobytes()
    np.testing.assert_array_equal(read_dicom(written(data)).pixels, LOOP)


def test_a_jpeg_dicom_is_read():
    frame = io.BytesIO()
    Image.fromarray(SMOOTH[0]).save(frame, "JPEG", quality=95)
    found = read_dicom(written(packed(SMOOTH[:1], frame.getvalue(), pydicom.uid.JPEGBaseline8Bit)))
    assert np.abs(found.pixels.astype(int) - SMOOTH[:1]).max() < 8


def test_dicom_is_known_by_what_is_in_it_where_the_name_does_not_say(tmp_path):
    (tmp_path / "IM_0001").write_bytes(dicom(LOOP))
    (tmp_path / "1.2.840.113619").write_bytes(dicom(LOOP))
    (tmp_path / "README").write_text("hello")
    kinds = {name: readers.kind_of(str(tmp_path / name)) for name in ("IM_0001", "1.2.840.113619", "README")}
    assert kinds == {"IM_0001": "dicom", "1.2.840.113619": "dicom", "README": None}
    assert readers.kind_of("a.txt") is None and readers.kind_of("a.NII.GZ") == "nifti"


def test_a_frame_shows_no_name_only_if_it_was_cut_and_the_file_does_not_object():
    part, whole = region(10, 10, 70, 60), region(0, 0, 99, 79)
    for where, burned_in, may_show in ((part, "NO", False), (whole, "NO", True), (part, "YES", True), (None, "NO", True)):
        assert read_dicom(dicom(LOOP, region=where, BurnedInAnnotation=burned_in)).may_show_text == may_show


def test_only_a_region_that_fits_its_picture_or_a_cropped_one_is_believed():
    rounded, cropped_below, cropped_at_the_right = (10, 10, 101, 81), (10, 10, 150, 80), (10, 10, 100, 150)
    for corners in ((0, 0, 100, 80), rounded, cropped_below, cropped_at_the_right):
        assert fits(corners, 100, 80)
    made_smaller, perhaps, beside, inverted = (0, 0, 200, 160), (10, 10, 150, 60), (110, 0, 200, 80), (50, 0, 40, 80)
    for corners in (made_smaller, perhaps, beside, inverted):
        assert not fits(corners, 100, 80)


def test_pydicoms_own_examples_are_whole_and_without_millimetres_if_scaled_and_cut_if_cropped():
    found = readers.read(get_testdata_file("examples_ybr_color.dcm"), "dicom")
    assert found.pixels.shape == (30, 240, 320) and found.spacing_mm is None and "does not fit" in found.notes[0]
    found = readers.read(get_testdata_file("examples_palette.dcm"), "dicom")
    assert found.pixels.shape == (1, 290, 680) and not found.notes and found.may_show_text  # within the region, in this one
    assert found.spacing_mm == pytest.approx((0.2623, 0.2623), abs=1e-4)


def test_a_second_plane_beside_the_first_is_noted():
    data = pydicom.dcmread(io.BytesIO(dicom(LOOP, region=region(0, 0, 99, 39))))
    second = pydicom.Dataset()
    second.update(data.SequenceOfUltrasoundRegions[0])
    second.RegionLocationMinX0, second.RegionLocationMaxX1 = 40, 79
    data.SequenceOfUltrasoundRegions.append(second)
    found = read_dicom(written(data))
    assert found.pixels.shape == (3, 100, 40) and "2 planes at once; only the one in columns 0 to 39" in found.notes[0]
    second.RegionLocationMinX0 = 20  # over the first: one plane
    assert read_dicom(written(data)).notes == ()


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.2"}, "slices of a 3-D volume"),
        ({"DimensionOrganizationType": "3D"}, "slices of a 3-D volume"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "not an ultrasound image"),
        ({"region": {"RegionSpatialFormat": 2}}, "M-mode or Doppler"),
        ({"region": {"RegionSpatialFormat": 3}}, "M-mode or Doppler"),
    ],
)
def test_files_other_than_a_loop_of_one_plane_are_refused(tags, reason):
    with pytest.raises(readers.Unreadable, match=reason):
        read_dicom(dicom(LOOP, **tags))


@pytest.mark.parametrize(
    ("syntax", "bits", "reason"),
    [
        ("1.2.840.10008.1.2.4.70", 8, r"JPEG Lossless.*`pip install pylibjpeg pylibjpeg-libjpeg`"),
        ("1.2.840.10008.1.2.4.80", 8, "JPEG-LS.*`pip install pyjpegls`"),
        ("1.2.840.10008.1.2.4.51", 12, "12-bit JPEG.*`pip install pylibjpeg pylibjpeg-libjpeg`"),
        ("1.2.840.10008.1.2.4.102", 8, "a video"),
        ("1.2.840.10008.1.2.4.94", 8, "its compression is not supported"),
        ("1.2.840.10008.1.2.4.50", 8, "it is damaged"),
    ],
)
def test_a_compression_that_is_not_decoded_is_named_with_what_to_do(syntax, bits, reason, tmp_path):
    data = packed(LOOP[:1], b"no JPEG ", syntax)
    data.BitsStored = bits
    (tmp_path / "a.dcm").write_bytes(written(data))
    with pytest.raises(DamagedRecording, match=reason) as caught:
        readers.read(str(tmp_path / "a.dcm"), "dicom")
    assert "Error" not in caught.value.reason and "0x" not in caught.value.reason


def test_a_file_without_pixels_holds_no_picture_or_is_cut_off():
    data = pydicom.dcmread(io.BytesIO(dicom(LOOP)))
    del data.PixelData
    with pytest.raises(readers.Unreadable, match="cut off before its pixels"):
        read_dicom(written(data))
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.33"
    del data.Rows
    with pytest.raises(readers.Unreadable, match=readers.NO_PICTURE):
        read_dicom(written(data))


@pytest.mark.parametrize("implicit", [True, False])
def test_a_bare_data_set_without_preamble_is_known_and_read(implicit, tmp_path):
    data = pydicom.dcmread(io.BytesIO(dicom(LOOP)))
    with open(tmp_path / "IM_0001", "wb") as stream:
        file = pydicom.filebase.DicomFileLike(stream)
        file.is_little_endian, file.is_implicit_VR = True, implicit
        pydicom.filewriter.write_dataset(file, pydicom.Dataset({e.tag: e for e in data}))
    assert readers.kind_of(str(tmp_path / "IM_0001")) == "dicom"
    np.testing.assert_array_equal(readers.read(str(tmp_path / "IM_0001"), "dicom").pixels, LOOP)


# The display matrices of ISO 14496-12 and what a player makes of a picture.
ONE = 1 << 16
SHOWN = {
    (ONE, 0, 0, ONE): lambda picture: picture,
    (0, ONE, -ONE, 0): lambda picture: np.rot90(picture, -1),
    (-ONE, 0, 0, -ONE): lambda picture: np.rot90(picture, 2),
    (0, -ONE, ONE, 0): lambda picture: np.rot90(picture),
    (-ONE, 0, 0, ONE): np.fliplr,
}


@pytest.mark.parametrize(("matrix", "shown"), SHOWN.items())
def test_an_mp4_is_read_as_players_show_it(matrix, shown, tmp_path):
    data = bytearray(movie(".mp4", "mpeg4", SMOOTH))
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data)
    found = readers.read(str(tmp_path / "a.mp4"), "video").pixels
    expected = np.stack(list(map(shown, SMOOTH)))
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 4


def test_a_video_of_oblique_or_oblong_pixels_is_refused_or_noted():
    with pytest.raises(readers.Unreadable, match="multiple of 90 degrees"):
        readers.upright(LOOP[0], struct.pack("=9i", ONE, ONE, 0, -ONE, ONE, 0, 0, 0, 1 << 30))
    assert "not square" in readers.read_video(movie(".mp4", "mpeg4", LOOP[:, :48, :64], aspect=2)).notes[0]
    assert readers.read_video(movie(".mp4", "mpeg4", LOOP[:, :48, :64])).notes == ()
