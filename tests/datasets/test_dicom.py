"""DICOM and video come out upright and grey with true millimetres; what is not a loop of one plane is refused or noted."""

import io
import struct

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from heartseg.datasets import readers
from heartseg.datasets.dicom import fits, read_dicom
from heartseg.datasets.nifti import DamagedRecording
from helpers.echo_files import LOOP, dicom, movie

SMOOTH = (np.mgrid[:48, :64] * [[[3]], [[1]]]).sum(axis=0) + 20 * np.arange(3)[:, None, None]
SMOOTH = SMOOTH.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("suffix", "codec"), [(".avi", "mjpeg"), (".mp4", "mpeg4")])
def test_a_video_gives_every_frame_in_grey(suffix, codec, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(movie(suffix, codec, SMOOTH))
    found = readers.read(str(tmp_path / f"a{suffix}"), "video")
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


def test_a_jpeg_dicom_is_read():
    rows, columns = np.mgrid[:64, :64]
    smooth = (rows * 2 + columns).astype(np.uint8)[None]
    frame = io.BytesIO()
    Image.fromarray(smooth[0]).save(frame, "JPEG", quality=95)
    found = read_dicom(written(packed(smooth, frame.getvalue(), pydicom.uid.JPEGBaseline8Bit)))
    assert np.abs(found.pixels.astype(int) - smooth).max() < 8


def test_dicom_is_known_by_what_is_in_it_where_the_name_does_not_say(tmp_path):
    (tmp_path / "IM_0001").write_bytes(dicom(LOOP))
    (tmp_path / "1.2.840.113619").write_bytes(dicom(LOOP))
    (tmp_path / "README").write_text("hello")
    kinds = {name: readers.kind_of(str(tmp_path / name)) for name in ("IM_0001", "1.2.840.113619", "README")}
    assert kinds == {"IM_0001": "dicom", "1.2.840.113619": "dicom", "README": None}
    assert readers.kind_of("a.txt") is None and readers.kind_of("a.NII.GZ") == "nifti"


@pytest.mark.parametrize(
    ("corners", "burned_in", "may_show"),
    [((10, 10, 70, 60), "NO", False), ((0, 0, 99, 79), "NO", True), ((10, 10, 70, 60), "YES", True), (None, "NO", True)],
)
def test_a_frame_shows_no_name_only_if_it_was_cut_and_the_file_does_not_object(corners, burned_in, may_show):
    frames = read_dicom(dicom(LOOP, region=corners and region(*corners), BurnedInAnnotation=burned_in))
    assert frames.may_show_text == may_show


@pytest.mark.parametrize(
    ("corners", "is_believed"),
    [
        ((0, 0, 100, 80), True),
        ((10, 10, 101, 81), True),  # rounded
        ((10, 10, 150, 80), True),  # cropped below: the other side is as it was
        ((10, 10, 100, 150), True),  # cropped at the right
        ((0, 0, 200, 160), False),  # made smaller
        ((10, 10, 150, 60), False),  # made smaller, perhaps
        ((110, 0, 200, 80), False),  # beside the picture
        ((50, 0, 40, 80), False),
    ],
)
def test_only_a_region_that_fits_its_picture_or_a_cropped_one_is_believed(corners, is_believed):
    assert fits(corners, 100, 80) == is_believed


def test_a_picture_made_smaller_without_its_regions_is_whole_and_has_no_millimetres():
    found = read_dicom(dicom(LOOP[:, ::2, ::2], region=region(0, 0, 99, 79)))
    assert found.spacing_mm is None and found.pixels.shape == (3, 50, 40) and "does not fit" in found.notes[0]
    assert found.may_show_text


@pytest.mark.parametrize(
    ("name", "shape", "spacing_mm"),
    [("examples_ybr_color.dcm", (30, 240, 320), None), ("examples_palette.dcm", (1, 290, 680), (0.2623, 0.2623))],
)
def test_pydicoms_own_examples_are_whole_if_scaled_and_cut_if_cropped(name, shape, spacing_mm):
    found = readers.read(get_testdata_file(name), "dicom")
    assert found.pixels.shape == shape and found.spacing_mm == (spacing_mm and pytest.approx(spacing_mm, abs=1e-4))
    assert bool(found.notes) == (spacing_mm is None)


def test_a_second_plane_beside_the_first_is_noted():
    data = pydicom.dcmread(io.BytesIO(dicom(LOOP, region=region(0, 0, 99, 39))))
    second = pydicom.Dataset()
    second.update(data.SequenceOfUltrasoundRegions[0])
    second.RegionLocationMinX0, second.RegionLocationMaxX1 = 40, 79
    data.SequenceOfUltrasoundRegions.append(second)
    found = read_dicom(written(data))
    assert found.pixels.shape == (3, 100, 40) and "2 planes at once, and only that of columns 0 to 39" in found.notes[0]
    second.RegionLocationMinX0 = 20  # over the first: one plane
    assert read_dicom(written(data)).notes == ()


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.2"}, "planes of a volume"),
        ({"DimensionOrganizationType": "3D"}, "planes of a volume"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "not an ultrasound picture"),
        ({"region": {"RegionSpatialFormat": 2}}, "M-mode or Doppler"),
        ({"region": {"RegionSpatialFormat": 3}}, "M-mode or Doppler"),
    ],
)
def test_what_is_not_a_loop_of_one_plane_is_refused(tags, reason, tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom(LOOP, **tags))
    with pytest.raises(DamagedRecording, match=reason):
        readers.read(str(tmp_path / "a.dcm"), "dicom")


@pytest.mark.parametrize(
    ("syntax", "bits", "reason"),
    [
        ("1.2.840.10008.1.2.4.70", 8, r"JPEG Lossless.*`pip install pylibjpeg pylibjpeg-libjpeg`"),
        ("1.2.840.10008.1.2.4.80", 8, "JPEG-LS.*`pip install pyjpegls`"),
        ("1.2.840.10008.1.2.4.51", 12, "12-bit JPEG.*`pip install pylibjpeg pylibjpeg-libjpeg`"),
        ("1.2.840.10008.1.2.4.102", 8, "a video"),
        ("1.2.840.10008.1.2.4.94", 8, "not known here"),
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


def test_uncompressed_colours_at_half_the_width_are_the_grey_they_show():
    pairs = LOOP.reshape(3, 100, 40, 2)
    data = pydicom.dcmread(io.BytesIO(dicom(LOOP)))
    data.PixelData = np.concatenate([pairs, np.full_like(pairs, 128)], axis=3).tobytes()
    data.SamplesPerPixel, data.PlanarConfiguration, data.PhotometricInterpretation = 3, 0, "YBR_FULL_422"
    np.testing.assert_array_equal(read_dicom(written(data)).pixels, LOOP)


# The display matrices of ISO 14496-12 and what a player makes of a picture.
ONE = 1 << 16
SHOWN = {
    (ONE, 0, 0, ONE): lambda picture: picture,
    (0, ONE, -ONE, 0): lambda picture: np.rot90(picture, -1),
    (-ONE, 0, 0, -ONE): lambda picture: np.rot90(picture, 2),
    (0, -ONE, ONE, 0): lambda picture: np.rot90(picture),
    (-ONE, 0, 0, ONE): np.fliplr,
}


@pytest.mark.parametrize("matrix", SHOWN)
def test_an_mp4_is_read_as_players_show_it(matrix, tmp_path):
    data = bytearray(movie(".mp4", "mpeg4", SMOOTH))
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data)
    found = readers.read(str(tmp_path / "a.mp4"), "video").pixels
    expected = np.stack([SHOWN[matrix](picture) for picture in SMOOTH])
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 4


def test_a_video_of_oblique_or_oblong_pixels_is_refused_or_noted():
    with pytest.raises(readers.Unreadable, match="multiple of 90 degrees"):
        readers.upright(LOOP[0], struct.pack("=9i", ONE, ONE, 0, -ONE, ONE, 0, 0, 0, 1 << 30))
    assert "not square" in readers.read_video(movie(".mp4", "mpeg4", LOOP[:, :48, :64], aspect=2)).notes[0]
    assert readers.read_video(movie(".mp4", "mpeg4", LOOP[:, :48, :64])).notes == ()
