"""The phantom keeps its promises: known volumes, exact labels, the release's layout, pictures like the real ones."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from scipy import ndimage

from heartseg.datasets import camus, nifti, phantom
from heartseg.errors import UserError
from heartseg.labels import BACKGROUND, ENDO, LA, MYO, PHASES, VIEWS, Phase, View
from heartseg.storage import filesystem

# The 10 and 90 % quantiles of `picture_statistics` over the 200 stills of 50 CAMUS patients drawn at random, from a
# copy of the data at 224 x 224 whose depth is nominally 145 mm.
REAL_RANGES = {
    "sector_share": (0.534, 0.542), "wall_to_cavity_contrast": (0.162, 0.342),
    "axial_correlation_mm": (1.24, 2.35), "lateral_correlation_mm": (2.42, 3.68),
    "cavity_grey": (52.4, 96.5), "wall_grey": (94.3, 143.0), "sector_grey": (78.5, 125.3), "sector_grey_spread": (34.6, 54.0),
    "endo_share": (0.049, 0.145), "myo_share": (0.064, 0.151), "la_share": (0.026, 0.074),
}  # fmt: skip
GRID = 224


def files_of(folder) -> dict[str, str]:
    paths = filesystem.walk(str(folder))
    return {os.path.relpath(path, folder): filesystem.sha256(filesystem.read_bytes(path)) for path in paths}


def on_common_grid(recording: camus.Recording) -> camus.Recording:
    """The recording on 224 x 224 pixels: image antialiased, labels by nearest neighbour, spacing to match."""
    shape = recording.image.shape
    rows, columns = ((np.arange(GRID) + 0.5) * size / GRID - 0.5 for size in shape)
    smooth = ndimage.gaussian_filter(recording.image.astype(float), [max(0, (size / GRID - 1) / 2) for size in shape])
    image = ndimage.map_coordinates(smooth, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest")
    mask = recording.mask[np.ix_(np.rint(rows).astype(int), np.rint(columns).astype(int))]
    spacing_mm = tuple(value * size / GRID for value, size in zip(recording.spacing_mm, shape, strict=True))
    return replace(recording, image=np.rint(image).astype(np.uint8), mask=mask, spacing_mm=spacing_mm)


def sector_of(image: np.ndarray) -> np.ndarray:
    """The part of the image that the probe sees: the largest bright region, closed and filled."""
    seen = ndimage.binary_closing(np.pad(image > 12, 12), iterations=10)[12:-12, 12:-12]
    regions, _ = ndimage.label(seen)
    return ndimage.binary_fill_holes(regions == 1 + np.argmax(np.bincount(regions.ravel())[1:]))


def correlation_length_mm(image: np.ndarray, region: np.ndarray, axis: int, spacing_mm: float) -> float:
    """Shift at which the autocorrelation of the high-passed image inside `region` falls to 1/e."""
    weight = region.astype(float)
    local_mean = ndimage.gaussian_filter(image * weight, 6) / np.maximum(ndimage.gaussian_filter(weight, 6), 1e-6)
    residual, before = (image - local_mean) * weight, 1.0
    variance, size = (residual**2).sum() / weight.sum(), image.shape[axis]
    for shift in range(1, 20):
        here, there = range(size - shift), range(shift, size)
        both = np.take(weight, here, axis) * np.take(weight, there, axis)
        now = (np.take(residual, here, axis) * np.take(residual, there, axis)).sum() / both.sum() / variance
        if now < np.exp(-1):
            return (shift - 1 + (before - np.exp(-1)) / (before - now)) * spacing_mm
        before = now
    return np.nan


def picture_statistics(recording: camus.Recording) -> dict[str, float]:
    """What makes a still look real, measured on the common grid; the shares are of all pixels."""
    still = on_common_grid(recording)
    image, mask, sector = still.image.astype(float), still.mask, sector_of(still.image)
    cavity, wall = image[(mask == ENDO) & sector].mean(), image[(mask == MYO) & sector].mean()
    # The central columns, where rows run along the beam and columns across it.
    central = np.abs(np.arange(GRID) - GRID / 2) < GRID / 5
    eroded, rows = ndimage.binary_erosion(sector, iterations=6), np.arange(GRID)[:, None]
    inner = eroded & central & (rows > 30)
    near, far = (correlation_length_mm(image, eroded & part, 1, still.spacing_mm[1]) for part in (rows < 90, rows > 150))
    return {
        "sector_share": sector.mean(), "wall_to_cavity_contrast": (wall - cavity) / (wall + cavity),
        "axial_correlation_mm": correlation_length_mm(image, inner, 0, still.spacing_mm[0]),
        "lateral_correlation_mm": correlation_length_mm(image, inner, 1, still.spacing_mm[1]), "lateral_growth": far / near,
        "cavity_grey": cavity, "wall_grey": wall,
        "sector_grey": image[sector].mean(), "sector_grey_spread": image[sector].std(),
        "endo_share": (mask == ENDO).mean(), "myo_share": (mask == MYO).mean(), "la_share": (mask == LA).mean(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> str:
    source = str(tmp_path_factory.mktemp("phantom"))
    phantom.write_phantom(source, patients=6, seed=3)
    return source


@pytest.fixture(scope="module")
def stills(tree) -> dict:
    return {
        (patient, view, phase): camus.read_still(tree, patient, view, phase)
        for patient in camus.find_patients(tree)
        for view, phase in camus.stills_of()
    }


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_workers_and_of_patients(tmp_path):
    command = [sys.executable, "-m", "heartseg.datasets.phantom", str(tmp_path / "two"), "--scale", "0.1", "--sequences"]
    subprocess.run([*command, "--patients", "2", "--workers", "2", "--seed", "7"], check=True, capture_output=True)
    for name, patients, seed in (("one", 2, 7), ("few", 1, 7), ("other", 2, 8)):
        phantom.write_phantom(str(tmp_path / name), patients, seed, sequences=True, scale=0.1)
    one, two, few, other = (files_of(tmp_path / name) for name in ("one", "two", "few", "other"))
    assert one == two
    assert [name for name in few if "patient0001" in name and one[name] != few[name]] == []
    images = [name for name in one if name.endswith(".nii.gz") and "_gt" not in name]
    assert len(images) == 2 * 6 and not any(one[name] == other[name] for name in images)


def test_both_views_and_phases_cfg_and_split_files_are_there(tree, stills):
    assert camus.find_patients(tree) == [f"patient{number:04d}" for number in range(1, 7)]
    assert camus.CamusTree(tree).groups() == phantom.split_patients(camus.find_patients(tree), seed=3)
    for (patient, view, phase), still in stills.items():
        assert still.info == camus.read_info(tree, patient, view) == phantom.patient_info(int(patient[7:]), seed=3)
        assert still.info.ef_convention == "ase" and still.frame == getattr(still.info, phase.lower())
        assert set(np.unique(still.mask)) == {BACKGROUND, ENDO, MYO, LA}
        assert still.image[0, 0] == still.image[0, -1] == still.image[-1, 0] == still.image[-1, -1] == 0
    assert not any("half_sequence" in name for name in files_of(tree))


def test_groups_are_disjoint_and_none_is_empty_from_three_patients_on():
    for patients, sizes in ((1, [1, 0, 0]), (2, [2, 0, 0]), (3, [1, 1, 1]), (50, [40, 5, 5])):
        names = [f"patient{number:04d}" for number in range(1, patients + 1)]
        groups = phantom.split_patients(names, seed=0)
        assert [len(groups[group]) for group in ("train", "val", "test")] == sizes
        assert sorted(chain(*groups.values())) == names


def test_spacing_size_and_type_vary_as_in_the_release(tree, stills):
    spacings = {still.spacing_mm for still in stills.values()}
    assert any(np.allclose(spacing, (0.308, 0.308)) for spacing in spacings)
    assert any(np.isclose(2 * depth, lateral) for depth, lateral in spacings)
    assert len(spacings) >= 4 and len({still.image.shape for still in stills.values()}) >= 6
    raw = [nifti.read_nifti(camus.recording_path(tree, *still))[0] for still in stills]
    assert {array.dtype for array in raw} == {np.dtype(np.float32), np.dtype(np.uint8)}
    assert all((array == np.rint(array)).all() and array.max() > 150 for array in raw)


def test_scale_shrinks_the_grid_and_not_the_heart():
    full, small = (phantom.Scanner(1, 0, View.TWO_CHAMBER, scale) for scale in (1.0, 0.25))
    assert np.allclose(np.array(small.spacing_mm), 4 * np.array(full.spacing_mm))
    for label in (ENDO, MYO, LA):
        areas = [(scanner.mask(0.0) == label).sum() * np.prod(scanner.spacing_mm) for scanner in (full, small)]
        assert areas[1] == pytest.approx(areas[0], rel=0.02)


def test_closed_form_matches_counted_voxels_and_the_whole_ellipsoid():
    geometry = phantom.patient_geometry(5)
    (a, b), c = geometry.radii_mm, geometry.half_length_mm
    x, y, z = np.ogrid[-40:40:161j, -40:40:161j, -60:60:241j]
    inside = (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 <= 1
    counted_ml = (inside & (z <= geometry.truncation * c)).sum() * 0.5**3 / 1000
    assert phantom.volume_ml(geometry, Phase.ED) == pytest.approx(counted_ml, rel=0.005)
    whole = phantom.volume_ml(replace(geometry, truncation=1.0), Phase.ED)
    assert whole == pytest.approx(4 / 3 * np.pi * a * b * c / 1000)


def test_ejection_fraction_of_the_closed_form_is_the_cfgs_and_some_hearts_are_poor():
    fractions = []
    for number in range(1, 51):
        geometry = phantom.patient_geometry(number)
        edv, esv = (phantom.volume_ml(geometry, phase) for phase in PHASES)
        fractions.append(100 * (edv - esv) / edv)
        assert fractions[-1] == pytest.approx(phantom.patient_info(number).ef)
    assert 25 <= min(fractions) < 35 and 60 < max(fractions) <= 70
    assert 5 <= sum(fraction < 40 for fraction in fractions) <= 25


def test_cavity_lies_within_the_image_and_nearly_all_within_the_sector():
    for number in range(1, 16):
        for view in VIEWS:
            scanner = phantom.Scanner(number, 0, view, scale=0.1)
            for contraction in (0.0, 1.0):
                cavity = scanner.mask(contraction) == ENDO
                assert not (cavity[0] | cavity[-1]).any() and not (cavity[:, 0] | cavity[:, -1]).any()
                assert (cavity & ~scanner.in_sector).sum() < 0.05 * cavity.sum()


def test_wall_is_closed_at_the_apex_open_at_the_mitral_plane_and_thickens():
    geometry = phantom.patient_geometry(2)
    thickness = {}
    for phase, contraction in phantom.CONTRACTION.items():
        heart = phantom.geometry_at(geometry, contraction)
        line = np.arange(-60, 150, 0.1)
        column = phantom.labels_at(heart, View.FOUR_CHAMBER, line, np.zeros_like(line))
        row = phantom.labels_at(heart, View.FOUR_CHAMBER, np.full_like(line, heart.half_length_mm), line)
        for labels, last in ((column, LA), (row, MYO)):
            changes = labels[np.flatnonzero(np.diff(labels, prepend=labels[0] + 1))]
            assert changes.tolist() == [BACKGROUND, MYO, ENDO, last, BACKGROUND]
        thickness[phase] = [0.1 * (row == MYO).sum() / 2, 0.1 * (column == MYO).sum()]
        assert thickness[phase] == pytest.approx([heart.wall_mm, heart.wall_mm], abs=0.2)
    assert thickness[Phase.ES][0] > 1.05 * thickness[Phase.ED][0]


def test_pictures_look_like_the_real_ones_and_their_speckle_widens_with_depth(stills):
    measured = [picture_statistics(still) for still in stills.values()]
    for name, (low, high) in REAL_RANGES.items():
        values = np.array([row[name] for row in measured])
        assert low <= np.median(values) <= high, f"{name}: median {np.median(values):.3g}"
        inside = ((values >= low) & (values <= high)).mean()
        assert inside >= 0.6, f"{name}: only {inside:.0%} of the pictures lie in the real range"
    assert np.median([row["lateral_growth"] for row in measured]) > 1.2


def test_a_folder_with_other_patients_is_never_written_into_and_the_same_phantom_may_be_written_again(tmp_path):
    for _ in range(2):
        phantom.write_phantom(str(tmp_path / "own"), patients=1, scale=0.1)
    with pytest.raises(UserError, match="other settings"):
        phantom.write_phantom(str(tmp_path / "own"), patients=2, scale=0.1)
    theirs = tmp_path / "database_nifti" / "patient0001" / "patient0001_2CH_ED.nii.gz"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"somebody's heart")
    with pytest.raises(UserError, match="not synthetic"):
        phantom.write_phantom(str(tmp_path), patients=1, scale=0.1)
    assert theirs.read_bytes() == b"somebody's heart" and {*os.listdir(tmp_path)} == {"own", "database_nifti"}


def test_an_impossible_number_is_refused_before_anything_is_written_and_on_the_command_line_in_one_line(tmp_path):
    for wrong in ({"patients": 0}, {"scale": 0.0}, {"scale": 2.0}, {"seed": -1}, {"workers": 0}):
        with pytest.raises(UserError, match="A phantom needs"):
            phantom.write_phantom(str(tmp_path / "out"), **wrong)
    command = [sys.executable, "-m", "heartseg.datasets.phantom", str(tmp_path / "out"), "--scale", "7"]
    bad = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "Traceback" not in bad.stderr
    assert not (tmp_path / "out").exists()
