"""Volumes and EF from label maps: right on shapes with a closed form, and never a crash or a wrong number."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from heartseg.datasets import phantom
from heartseg.inference.segmenter import largest_components
from heartseg.labels import ENDO, LA, MYO, PHASES, VIEWS, Phase, View
from heartseg.metrics import simpson
from heartseg.metrics.cardiac_indices import INDICES, ejection_fraction, frame_measures, patient_indices
from helpers.hearts import phantom_masks

STILLS = [(view, phase) for view in VIEWS for phase in PHASES]
RATIOS = ("ef_", "fac_", "endo_strain", "la_emptying")  # in percent: compared in points
SPACING_MM = (0.5, 0.7)


def ellipsoid_mask(shape=(280, 180), spacing_mm=SPACING_MM, radius_mm=24.0, half_length_mm=45.0, tilt_deg=0.0, cut=1.0):
    """A cavity in its wall above an atrium: an ellipse, cut across `cut` half lengths below its centre."""
    row, column = np.indices(shape)
    depth, lateral = (row + 0.5) * spacing_mm[0] - 62, (column + 0.5) * spacing_mm[1] - shape[1] * spacing_mm[1] / 2
    sine, cosine = np.sin(np.radians(tilt_deg)), np.cos(np.radians(tilt_deg))
    along, across = depth * cosine + lateral * sine, lateral * cosine - depth * sine
    mask = np.zeros(shape, np.uint8)
    mask[np.hypot(across / 18, (along - cut * half_length_mm - 15) / 22) < 1] = LA
    above = along < cut * half_length_mm
    mask[(np.hypot(across / (radius_mm + 9), along / (half_length_mm + 9)) < 1) & above] = MYO
    mask[(np.hypot(across / radius_mm, along / half_length_mm) < 1) & above] = ENDO
    return mask


def length_mm(mask: np.ndarray, spacing_mm: tuple[float, float]) -> float:
    return simpson.measure(mask, spacing_mm).ventricle.length_mm


@pytest.fixture(scope="module")
def heart() -> dict:
    return phantom_masks(3)


def of_all_stills(mask: np.ndarray) -> dict:
    return patient_indices({still: (mask, SPACING_MM) for still in STILLS})


def assert_same(one: dict, other: dict, rel: float, names=INDICES):
    """Two rows agree; what is in percent within `rel` of 100 points."""
    assert one["reason"] == other["reason"]
    for name in names:
        assert one[name] == pytest.approx(other[name], rel=rel, abs=100 * rel if name.startswith(RATIOS) else 0), name


@pytest.mark.parametrize(
    ("number", "scale", "rel", "points"), [*((number, 1.0, 0.005, 0.3) for number in range(1, 7)), (1, 0.25, 0.03, 1.5)]
)
def test_the_phantoms_volumes_and_its_ef_are_measured_also_at_a_quarter_of_the_size(number, scale, rel, points):
    geometry, row = phantom.patient_geometry(number), patient_indices(phantom_masks(number, scale))
    assert row["reason"] == ""
    volumes_ml = [phantom.volume_ml(geometry, phase) for phase in PHASES]
    assert [row["edv_ml_ase"], row["esv_ml_ase"]] == pytest.approx(volumes_ml, rel=rel)
    assert row["ef_ase"] == pytest.approx(geometry.ef, abs=points)


def test_one_height_for_both_phases_leaves_the_shortening_out(heart):
    """The two conventions by hand: the sums of disks are the same, the heights are not."""
    row = patient_indices(heart)
    lengths = {still: length_mm(*heart[still]) for still in STILLS}
    by_phase = {phase: max(lengths[view, phase] for view in VIEWS) for phase in PHASES}
    assert by_phase[Phase.ES] < 0.95 * by_phase[Phase.ED]
    assert row["edv_ml_camus"] == row["edv_ml_ase"]
    assert row["esv_ml_camus"] == pytest.approx(row["esv_ml_ase"] * by_phase[Phase.ED] / by_phase[Phase.ES])
    assert row["ef_camus"] == pytest.approx(100 * (1 - row["esv_ml_camus"] / row["edv_ml_camus"]))
    assert row["ef_camus"] < row["ef_ase"] - 2


@pytest.mark.parametrize(("radius_mm", "half_length_mm", "tilt_deg"), [(24, 45, 0), (20, 40, 12), (28, 42, -15)])
def test_a_known_ellipsoid_has_its_volume_by_disks_and_by_area_and_length(radius_mm, half_length_mm, tilt_deg):
    shape = {"radius_mm": radius_mm, "half_length_mm": half_length_mm, "tilt_deg": tilt_deg}
    mask, cut = ellipsoid_mask(cut=0.9, **shape), 0.9
    expected_ml = np.pi * radius_mm**2 * half_length_mm * (2 / 3 + cut - cut**3 / 3) / 1000
    (volume_ml, area_cm2, _), area_mm2 = frame_measures(mask, SPACING_MM), (mask == ENDO).sum() * 0.35
    assert area_cm2 == pytest.approx(area_mm2 / 100)
    assert volume_ml == pytest.approx(expected_ml, rel=0.01)
    assert length_mm(mask, SPACING_MM) == pytest.approx(half_length_mm * (1 + cut), rel=0.01)
    row = of_all_stills(mask)
    assert row["edv_ml_4ch_ase"] == row["edv_ml_ase"] == pytest.approx(volume_ml) and row["ef_ase"] == 0
    # Of an ellipse with a = A / (pi c): 8 A^2 / (3 pi 2 c) = 4/3 pi a^2 c.
    assert row["edv_ml_area_length"] == pytest.approx(8 * area_mm2**2 / (3 * np.pi * half_length_mm * 1900), rel=0.01)
    assert row["wall_area_cm2_2CH_ED"] == pytest.approx((mask == MYO).sum() * 0.35 / 100)
    assert row["la_area_cm2_4CH_ES"] == pytest.approx((mask == LA).sum() * 0.35 / 100)


def test_an_elliptic_ventricle_needs_both_views_and_the_atrium_has_its_volume_by_disks():
    by_view = {view: ellipsoid_mask(radius_mm=radius_mm, cut=0.6) for view, radius_mm in zip(VIEWS, (20, 28), strict=True)}
    row = patient_indices({(view, phase): (by_view[view], SPACING_MM) for view, phase in STILLS})
    assert row["edv_ml_ase"] == pytest.approx(np.pi * 20 * 28 * 45 * (2 / 3 + 0.6 - 0.6**3 / 3) / 1000, rel=0.01)
    assert row["edv_ml_2ch_ase"] == pytest.approx(20 / 28 * row["edv_ml_ase"], rel=0.01)
    assert row["edv_ml_4ch_ase"] == pytest.approx(28 / 20 * row["edv_ml_ase"], rel=0.01)
    # An ellipsoid 18 x 18 x 22 mm whose centre is 15 mm below the mitral plane that cuts it.
    expected_ml = np.pi * 18**2 * 22 * (2 / 3 + 15 / 22 - (15 / 22) ** 3 / 3) / 1000
    assert row["la_volume_ml_ED"] == row["la_volume_ml_ES"] == pytest.approx(expected_ml, rel=0.02)


@given(rows=st.integers(2, 4), columns=st.integers(1, 3), number=st.integers(1, 4))
def test_a_finer_grid_changes_little(rows, columns, number):
    masks, block = phantom_masks(number, scale=0.4), np.ones((rows, columns), np.uint8)
    finer = {still: (np.kron(mask, block), (s[0] / rows, s[1] / columns)) for still, (mask, s) in masks.items()}
    one, other = patient_indices(masks), patient_indices(finer)
    subtle = [name for name in INDICES if name.startswith(("wall_thickness", "mapse", "lv_mass"))]  # fractions of a pixel count
    assert_same(one, other, rel=0.015, names=[name for name in INDICES if name not in subtle])
    assert all(one[name] == pytest.approx(other[name], rel=0.04, abs=0.3) for name in subtle)


@given(factor=st.floats(0.05, 20))
def test_volumes_grow_with_the_cube_of_the_spacing_areas_with_its_square_and_ef_not_at_all(heart, factor):
    row = patient_indices(heart)
    scaled = patient_indices({still: (m, (s[0] * factor, s[1] * factor)) for still, (m, s) in heart.items()})
    for name in INDICES:
        power = 3 if "_ml" in name or name == "lv_mass_g" else 2 if "cm2" in name else 1 if "_mm_" in name else 0
        rel = 2e-3 if power == 1 else 2e-4  # a pixel on a disk's edge
        assert scaled[name] == pytest.approx(row[name] * factor**power, rel=rel), name


@given(top=st.integers(0, 40), left=st.integers(0, 40), mirrored=st.booleans())
def test_where_the_heart_lies_and_which_way_it_faces_does_not_matter(heart, top, left, mirrored):
    way, padding = -1 if mirrored else 1, ((top, 3), (left, 0))
    moved = {still: (np.pad(mask[:, ::way], padding), spacing) for still, (mask, spacing) in heart.items()}
    assert_same(patient_indices(heart), patient_indices(moved), rel=0.003 if mirrored else 2e-4)


def test_the_cavity_alone_or_without_its_atrium_still_has_volumes_and_specks_elsewhere_do_not_count(heart):
    row = patient_indices(heart)
    names = [name for name in INDICES if name.startswith(("edv", "esv", "ef"))]
    for hidden, rel, missing in (((LA,), 0.01, 4), ((MYO, LA), 0.03, 8)):
        bare = {still: (np.where(np.isin(mask, hidden), 0, mask), spacing) for still, (mask, spacing) in heart.items()}
        found = patient_indices(bare)
        assert len(found["reason"].split("; ")) == missing and "no left atrium in 2CH ED" in found["reason"]
        assert_same(row, found | {"reason": ""}, rel, names)
        assert math.isnan(found["la_volume_ml_ED"])
    dirty = {}
    for still, (mask, spacing) in heart.items():
        mask = mask.copy()
        mask[2:8, 2:8], mask[2:8, -8:-2] = ENDO, LA
        apex = np.argwhere(mask == ENDO)[40]
        mask[apex[0] : apex[0] + 2, apex[1] : apex[1] + 2] = LA  # an atrium in the ventricle's tip
        dirty[still] = (mask, spacing)
    assert_same(row, patient_indices(dirty), rel=0.01)


def test_an_oblique_mitral_plane_leaves_the_disks_as_wide_as_the_ventricle():
    """A ventricle 40 mm wide with parallel walls, cut at 30 degrees: its basal disks are 40 mm wide all the same."""
    row, column = np.indices((280, 180))
    depth, across = row * 0.5 - 45, column * 0.7 - 63
    inside = (np.abs(across) < 20) & (np.hypot(across / 20, np.minimum(depth, 0) / 25) < 1)
    mask = np.where(inside, np.where(depth < 50 + across * np.tan(np.radians(30)), ENDO, LA), 0).astype(np.uint8)
    ventricle = simpson.measure(mask, SPACING_MM).ventricle
    assert ventricle.length_mm == pytest.approx(75, rel=0.01)
    assert ventricle.widths_mm[:10] == pytest.approx(np.full(10, 40), rel=0.05)


def test_a_hole_in_the_wall_and_an_atrium_that_touches_at_a_corner_do_not_move_the_mitral_plane():
    mask = ellipsoid_mask(cut=0.6)
    bare = np.where(mask == LA, 0, mask)
    torn = bare.copy()
    torn[30:90, :90][bare[30:90, :90] == MYO] = 0
    torn[:18] = 0
    assert length_mm(torn, SPACING_MM) == pytest.approx(length_mm(bare, SPACING_MM), rel=0.02)
    base = np.flatnonzero((mask == ENDO).any(axis=1)).max() + 1
    apart = mask.copy()
    apart[base : base + 3][mask[base : base + 3] == LA] = 0
    touching = apart.copy()
    touching[base : base + 8, 63:71] = LA
    assert (apart[base - 1, 63:71] == ENDO).all()
    assert length_mm(touching, SPACING_MM) == pytest.approx(length_mm(mask, SPACING_MM), rel=0.01)


@given(seed=st.integers(0, 10**6), share=st.floats(0.4, 0.95))
def test_the_area_of_what_cleaning_keeps_is_the_area_that_is_measured_whatever_touches_at_corners_alone(seed, share):
    mask = ellipsoid_mask((70, 45), (2.0, 2.8))
    mask[np.random.default_rng(seed).random(mask.shape) > share] = 0
    kept, frame = largest_components(mask), simpson.measure(mask, (2.0, 2.8))
    assert frame.ventricle.area_mm2 == pytest.approx((kept == ENDO).sum() * 5.6)
    assert frame.atrium_area_mm2 == pytest.approx((kept == LA).sum() * 5.6)


@pytest.mark.parametrize("falls", [False, True])
def test_a_diagonal_cut_of_one_pixel_does_not_halve_the_ventricle(falls):
    whole, cut, steps = ellipsoid_mask(cut=0.6), ellipsoid_mask(cut=0.6), np.arange(180)
    cut[40 + steps, steps[::-1] if falls else steps] = 0
    area_mm2, whole_mm2 = simpson.measure(cut, SPACING_MM).ventricle.area_mm2, (whole == ENDO).sum() * 0.35
    assert 0.97 * whole_mm2 < area_mm2 < whole_mm2  # the cut runs through it
    assert frame_measures(cut, SPACING_MM)[0] == pytest.approx(frame_measures(whole, SPACING_MM)[0], rel=0.05)


def test_disks_use_the_longer_of_two_lengths_and_area_length_the_shorter():
    row = of_all_stills(mask := ellipsoid_mask(cut=0.6))
    larger = tuple(1.1 * mm for mm in SPACING_MM)  # a view 1.1 times as large, so wider and longer
    spacings = dict(zip(VIEWS, (larger, SPACING_MM), strict=True))
    found = patient_indices({(view, phase): (mask, spacings[view]) for view, phase in STILLS})
    for name, factor in (("edv_ml_ase", 1.1 * 1.1), ("la_volume_ml_ED", 1.1 * 1.1), ("edv_ml_area_length", 1.1**2)):
        assert found[name] == pytest.approx(row[name] * factor, rel=1e-3), name


def test_a_chamber_of_twice_the_size_is_twice_as_long_and_has_four_times_the_area(heart):
    chamber = simpson.measure(*heart["4CH", "ED"]).ventricle
    large = chamber.scaled(2.0)
    assert large.area_mm2 == pytest.approx(4 * chamber.area_mm2) and large.length_mm == pytest.approx(2 * chamber.length_mm)
    np.testing.assert_allclose(large.widths_mm, 2 * chamber.widths_mm)


def test_a_chamber_of_30_pixels_is_measured_and_one_of_29_is_not():
    mask = np.pad(np.full((5, 6), ENDO, np.uint8), 3)
    assert simpson.measure(mask, (1.0, 1.0)).ventricle.area_mm2 == 30
    mask[3, 3] = 0
    assert simpson.measure(mask, (1.0, 1.0)).ventricle == "a left ventricle of only 29 px"


def test_without_pixel_spacing_there_is_ef_and_nothing_with_a_unit(heart):
    known = patient_indices(heart)
    relative, factors = {}, dict(zip(VIEWS, (3, 1), strict=True))  # the views' scales are unknown, and not the same
    for (view, phase), (mask, spacing) in heart.items():
        relative[view, phase] = (mask, (spacing[0] * factors[view], spacing[1] * factors[view]))
    row = patient_indices(relative, spacing_known=False)
    assert row["reason"] == "no pixel spacing, so no volumes or areas"
    for name in INDICES:
        is_ratio = name.startswith(("ef_", "fac_", "endo_strain"))
        expected = pytest.approx(known[name], abs=0.5) if is_ratio else pytest.approx(math.nan, nan_ok=True)
        assert row[name] == expected, name
    other = patient_indices(heart, spacing_known=False)
    assert all(row[name] == pytest.approx(other[name], abs=0.01) for name in INDICES if name.startswith("ef_"))
    square = {still: (mask, None) for still, (mask, _) in heart.items()}
    assert patient_indices(square, spacing_known=False)["ef_camus"] > 0
    assert "no pixel spacing in 2CH ED" in patient_indices(square)["reason"]


def test_what_is_missing_has_a_reason_and_the_rest_is_there(heart):
    row = patient_indices(heart)
    partial = {still: pair for still, pair in heart.items() if still != (View.TWO_CHAMBER, Phase.ES)}
    found = patient_indices(partial)
    assert found["reason"] == "no 2CH ES mask"
    unknown = {name for name in INDICES if math.isnan(found[name])}
    assert unknown == {
        *("esv_ml_ase", "ef_ase", "esv_ml_area_length", "ef_area_length", "esv_ml_2ch_ase", "ef_2ch_ase"),
        *("edv_ml_camus", "esv_ml_camus", "ef_camus", "wall_area_cm2_2CH_ES", "la_area_cm2_2CH_ES", "la_volume_ml_ES"),
        *("la_emptying_fraction", "fac_2CH", "endo_strain_2CH", "endo_strain", "mapse_mm_2CH", "sphericity_ES"),
        *("wall_thickness_mm_2CH_ES", "lv_length_mm_2CH_ES"),
    }
    assert all(found[name] == row[name] for name in INDICES if name not in unknown)
    alone = {still: pair for still, pair in heart.items() if still[0] == View.FOUR_CHAMBER}
    assert patient_indices(alone)["ef_4ch_ase"] == row["ef_4ch_ase"]


def test_a_ventricle_that_grows_has_volumes_and_no_ef(heart):
    row = patient_indices({(view, PHASES[1 - PHASES.index(phase)]): pair for (view, phase), pair in heart.items()})
    assert row["esv_ml_ase"] > row["edv_ml_ase"] and math.isnan(row["ef_ase"]) and math.isnan(row["ef_camus"])
    assert "ES volume above ED volume (ase)" in row["reason"]
    assert math.isnan(ejection_fraction(0.0, 0.0)) and ejection_fraction(100.0, 40.0) == 60


ELLIPSOID = ellipsoid_mask()


@pytest.mark.parametrize(
    ("mask", "spacing_mm", "reason"),
    [
        *((np.zeros(shape, np.uint8), (0.3, 0.3), "no left ventricle in 4CH ES") for shape in ((64, 64), (0, 0))),
        (np.pad(np.full((1, 1), ENDO, np.uint8), 30), (0.3, 0.3), "a left ventricle of only 1 px in 4CH ES"),
        (np.full((64, 64), LA, np.uint8), (0.3, 0.3), "no left ventricle in 4CH ES"),
        (np.zeros((4, 64, 64), np.uint8), (0.3, 0.3), "4CH ES mask is not two-dimensional"),
        (None, (0.3, 0.3), "no 4CH ES mask"),
        *(
            (ELLIPSOID, spacing_mm, "no pixel spacing in 4CH ES")
            for spacing_mm in ((0, 0.3), (0.3, math.nan), (0.3, math.inf), (-1, 1), None)
        ),
    ],
)
def test_a_mask_that_cannot_be_measured_has_a_reason(heart, mask, spacing_mm, reason):
    row = patient_indices(heart | {(View.FOUR_CHAMBER, Phase.ES): (mask, spacing_mm)})
    assert reason in row["reason"]
    assert math.isnan(row["ef_ase"]) and math.isnan(row["esv_ml_4ch_ase"]) and not math.isnan(row["edv_ml_ase"])
    if mask is not None and mask.ndim == 2 and mask is not ELLIPSOID:
        assert math.isnan(frame_measures(mask, (0.3, 0.3))[0])


@given(seed=st.integers(0, 10**6), sigma=st.floats(0.3, 8), known=st.booleans())
def test_blobs_of_noise_have_a_row_with_every_column_a_value_or_a_reason_and_an_ef_of_0_to_100(seed, sigma, known):
    rng, masks = np.random.default_rng(seed), {}
    for still in STILLS:
        noise = ndimage.gaussian_filter(rng.normal(size=(4, *rng.integers(1, 50, 2))), (0, sigma, sigma))
        masks[still] = (noise.argmax(axis=0).astype(np.uint8), tuple(rng.uniform(0.1, 2, 2)))
    row = patient_indices(masks, spacing_known=known)
    assert set(row) == {*INDICES, "reason"}
    values = np.array([row[name] for name in INDICES])
    may_fall = np.array([name.startswith(("fac", "endo_strain", "la_emptying", "mapse", "lv_mass")) for name in INDICES])
    assert (np.isnan(values) | (values >= 0) | may_fall).all() and not np.isinf(values).any()
    assert row["reason"] or not np.isnan(values).any()
    assert all(not row[name] > 100 for name in INDICES if name.startswith("ef"))


@pytest.mark.parametrize(
    ("wall", "atrium", "cavity", "hinges"),
    [
        ((8, 92, 28, 92), (51, 69), (20, 80, 40, 80), [[79.5, 51], [79.5, 68]]),
        ((8, 92, 28, 92), (54, 66), (20, 80, 40, 80), [[79.5, 39.5], [79.5, 79.5]]),  # too narrow for a mitral plane
        ((0, 0, 0, 0), (0, 0), (20, 60, 8, 52), [[59.5, 7.5], [59.5, 51.5]]),  # bare, and wider than long
    ],
)
def test_the_hinges_are_the_ends_of_a_wide_enough_base_and_otherwise_of_the_lowest_part(wall, atrium, cavity, hinges):
    mask = np.zeros((120, 120), np.uint8)
    mask[wall[0] : wall[1], wall[2] : wall[3]] = MYO
    mask[80:104, atrium[0] : atrium[1]] = LA
    mask[cavity[0] : cavity[1], cavity[2] : cavity[3]] = ENDO
    found = simpson.measure(mask, (1.0, 1.0)).ventricle.hinges_mm
    assert np.array(sorted(found.tolist(), key=lambda point: point[1])) == pytest.approx(np.array(hinges), abs=1e-6)


@pytest.mark.parametrize("tilt_deg", [-15, 12])
def test_the_mitral_plane_of_a_bare_tilted_cavity_is_at_right_angles_to_its_axis(tilt_deg):
    mask = ellipsoid_mask(tilt_deg=tilt_deg, cut=0.6)
    one, other = simpson.measure(np.where(mask == ENDO, ENDO, 0).astype(np.uint8), SPACING_MM).ventricle.hinges_mm
    assert abs((other - one) @ (np.cos(np.radians(tilt_deg)), np.sin(np.radians(tilt_deg)))) < 4
