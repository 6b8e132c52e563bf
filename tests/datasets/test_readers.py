"""Whatever a file is, its frames come out upright and grey, and its masks go back onto its own grid."""

import gzip
import struct

import nibabel
import numpy as np
import pytest
from PIL import Image

from heartseg.datasets import nifti, readers
from heartseg.datasets.nifti import DamagedRecording
from heartseg.errors import UserError
from helpers.echo_files import LOOP, dicom

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
        world, affine_size = sizes.get(name, (2, 1.0))
        affine[world, axis] = affine_size
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


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((5, 5), np.nan), "not finite"),
        (np.full((5, 5), 7.0), "one value"),
        (np.zeros((4, 4, 3, 3)), "neither an image nor a sequence"),
        (np.arange(6.0), "neither an image nor a sequence"),
    ],
)
def test_a_nifti_without_frames_is_refused_with_its_reason(values, reason, tmp_path):
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(DamagedRecording, match=reason):
        readers.read(str(tmp_path / "a.nii"), "nifti")


def test_a_spacing_that_no_scanner_has_is_not_used_and_the_one_asked_for_is(tmp_path):
    picture = nibabel.Nifti1Image(np.arange(60000, dtype=np.float32).reshape(100, 600), np.eye(4))  # 1 mm: 600 mm deep
    nibabel.save(picture, tmp_path / "a.nii")
    found = readers.read(str(tmp_path / "a.nii"), "nifti")
    assert found.spacing_mm is None and "600 mm deep" in found.notes[-1]
    assert readers.read(str(tmp_path / "a.nii"), "nifti", (0.3, 0.4)).spacing_mm == (0.3, 0.4)


def test_a_png_of_any_mode_is_grey_and_upright(tmp_path):
    for mode in ("L", "RGB", "RGBA", "P", "I;16"):
        grey = Image.fromarray(UPRIGHT[0])
        picture = Image.fromarray(UPRIGHT[0].astype(np.uint16) * 256) if mode == "I;16" else grey.convert(mode)
        picture.save(tmp_path / "a.png")
        found = readers.read(str(tmp_path / "a.png"), "picture")
        assert found.pixels.shape == (1, DEPTH, LATERAL) and found.spacing_mm is None
        if mode != "I;16":  # whose range is stretched
            np.testing.assert_allclose(found.pixels[0], UPRIGHT[0], atol=1)
        assert np.corrcoef(found.pixels.ravel(), UPRIGHT[0].ravel())[0, 1] > 0.999


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
    real = readers.importlib.import_module

    def missing(name, *rest):
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(readers.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'heartseg\[formats\]'"):
        readers.import_package(kind)
    readers.import_package("nifti")
