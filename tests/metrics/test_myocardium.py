"""Strain, excursion, thickness, mass and shape of hearts whose geometry is known in closed form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ellipeinc

from heartseg.datasets import phantom
from heartseg.labels import ENDO, LA, MYO, VIEWS, Phase
from heartseg.metrics.cardiac_indices import STILLS, patient_indices
from heartseg.metrics.myocardium import Grid, contour, length, measure_myocardium, without_mitral_plane
from heartseg.metrics.simpson import measure
from helpers.hearts import phantom_masks


def arc_mm(radius_mm: float, half_length_mm: float, truncation: float) -> float:
    """Length of an ellipse from the plane `truncation` half lengths below its centre, by way of its upper end, and back."""
    squared = 1 - (radius_mm / half_length_mm) ** 2
    return 2 * half_length_mm * (ellipeinc(np.arcsin(truncation), squared) + ellipeinc(np.pi / 2, squared))


def hearts(number: int) -> dict[Phase, phantom.Geometry]:
    geometry = phantom.patient_geometry(number)
    return {phase: phantom.geometry_at(geometry, moment) for phase, moment in phantom.CONTRACTION.items()}


@pytest.mark.parametrize(("number", "scale"), [*((number, 1.0) for number in range(1, 9)), (1, 0.5), (2, 0.5)])
def test_a_phantoms_strain_is_within_a_point_of_the_closed_form_and_its_excursion_within_a_millimetre(number, scale):
    row, heart = patient_indices(phantom_masks(number, scale)), hearts(number)
    for at, view in enumerate(VIEWS):
        before, after = (arc_mm(one.radii_mm[at], one.half_length_mm, one.truncation) for one in heart.values())
        assert row[f"endo_strain_{view}"] == pytest.approx(100 * (after / before - 1), abs=1.0)
        moved_mm = heart[Phase.ED].length_mm - heart[Phase.ES].length_mm  # the apex is fixed
        assert row[f"mapse_mm_{view}"] == pytest.approx(moved_mm, abs=1.0)
    assert row["endo_strain"] == pytest.approx(np.mean([row[f"endo_strain_{view}"] for view in VIEWS]))


@pytest.mark.parametrize("number", range(1, 7))
def test_a_phantoms_wall_mass_sphericity_and_area_change_are_those_of_its_geometry(number):
    row, heart = patient_indices(phantom_masks(number)), hearts(number)
    ml = {phase: phantom.volume_ml(heart[Phase.ED], phase) for phase in heart}
    for phase, one in heart.items():
        sphere_ml = np.pi / 6 * one.length_mm**3 / 1000
        assert row[f"sphericity_{phase}"] == pytest.approx(ml[phase] / sphere_ml, rel=0.02)
        for view in VIEWS:
            assert row[f"wall_thickness_mm_{view}_{phase}"] == pytest.approx(one.wall_mm, rel=0.05)
    one = heart[Phase.ED]
    long, plane = one.half_length_mm + one.wall_mm, one.half_length_mm * one.truncation
    along = np.linspace(-long, plane, 100_001)
    a, b = (radius + one.wall_mm for radius in one.radii_mm)
    outer_ml = np.trapezoid(np.pi * a * b * (1 - (along / long) ** 2), along) / 1000
    assert row["lv_mass_g"] == pytest.approx(1.05 * (outer_ml - ml[Phase.ED]), rel=0.03)
    for at, view in enumerate(VIEWS):
        # Both phases are cut at the same share of their ellipse.
        areas = [each.radii_mm[at] * each.half_length_mm for each in heart.values()]
        assert row[f"fac_{view}"] == pytest.approx(100 * (1 - areas[1] / areas[0]), abs=0.5)


@given(radius=st.floats(20, 60), ratio=st.floats(0.5, 2), sigma=st.floats(0, 1.5), row_mm=st.floats(0.2, 1.0))
def test_the_contour_of_a_circle_has_its_circumference_on_any_grid(radius, ratio, sigma, row_mm):
    spacing_mm = (row_mm, row_mm * ratio)
    shape = tuple(int(2 * radius / mm) + 8 for mm in spacing_mm)
    position = (np.indices(shape) - np.reshape(shape, (2, 1, 1)) / 2) * np.reshape(spacing_mm, (2, 1, 1))
    grid = Grid.of(spacing_mm, sigma)
    found = grid.to_mm(contour(grid.smooth(np.hypot(*position) < radius)))
    assert length(found) == pytest.approx(2 * np.pi * radius, rel=0.02)
    # The points are unevenly spaced along the contour: the mean weighs each piece between two by its length.
    centre = np.average((found[1:] + found[:-1]) / 2, axis=0, weights=np.hypot(*np.diff(found, axis=0).T))
    assert np.hypot(*(centre - np.multiply(shape, spacing_mm) / 2)) < max(spacing_mm)


@pytest.mark.parametrize("seed", range(5))
def test_a_pixel_of_noise_along_every_border_moves_strain_by_less_than_two_points(seed):
    masks, rng, noisy = phantom_masks(3), np.random.default_rng(seed), {}
    for still, (mask, spacing_mm) in masks.items():
        neighbours = np.stack([np.roll(mask, shift, axis) for axis in (0, 1) for shift in (-1, 1)])
        noisy[still] = np.take_along_axis(neighbours, rng.integers(4, size=(1, *mask.shape)), axis=0)[0], spacing_mm
    before, after = patient_indices(masks), patient_indices(noisy)
    assert after["endo_strain"] == pytest.approx(before["endo_strain"], abs=2.0)
    assert after["endo_strain"] != before["endo_strain"]


def test_without_a_wall_there_is_strain_and_no_thickness_and_on_different_grids_no_excursion():
    masks = phantom_masks(2, 0.5)
    bare = {still: (np.where(mask == MYO, 0, mask).astype(np.uint8), spacing_mm) for still, (mask, spacing_mm) in masks.items()}
    row = patient_indices(bare)
    assert np.isfinite(row["endo_strain"]) and np.isnan(row["lv_mass_g"]) and np.isnan(row["wall_thickness_mm_4CH_ED"])
    view, phase = STILLS[0]
    padded = masks | {(view, phase): (np.pad(masks[view, phase][0], 3), masks[view, phase][1])}
    row = patient_indices(padded)
    assert np.isnan(row[f"mapse_mm_{view}"]) and np.isfinite(row[f"endo_strain_{view}"])


def test_the_epicardium_begins_at_the_cavitys_own_mitral_plane():
    mask, spacing_mm = phantom_masks(4)[STILLS[0]]
    ventricle = measure(mask, spacing_mm).ventricle
    found = measure_myocardium(mask, spacing_mm, ventricle)
    assert found.epicardium.hinges_mm == pytest.approx(ventricle.hinges_mm)
    assert found.epicardium.length_mm > ventricle.length_mm and found.epicardium.area_mm2 > ventricle.area_mm2


def test_a_bare_cavity_that_bulges_into_its_atrium_is_measured_from_hinge_to_hinge_by_way_of_its_apex():
    row, column = np.indices((280, 200))
    depth, lateral = (row + 0.5) * 0.5 - 62, (column + 0.5) * 0.5 - 50
    atrium = (np.hypot(lateral, depth - 40) < 30) & (depth > 27)
    mask = np.where(np.hypot(lateral / 24, depth / 45) < 1, ENDO, np.where(atrium, LA, 0)).astype(np.uint8)
    found = measure_myocardium(mask, (0.5, 0.5), measure(mask, (0.5, 0.5)).ventricle)
    assert found.endo_length_mm == pytest.approx(arc_mm(24, 45, 27 / 45), rel=0.02)


@pytest.mark.parametrize("begin", [0, 3, 12, 25])
@pytest.mark.parametrize("has_wall", [True, False])
def test_what_runs_along_the_wall_is_every_point_from_hinge_to_hinge_wherever_the_contour_begins(begin, has_wall):
    angles = np.deg2rad(np.arange(0, 360, 10))
    ring = np.roll(np.stack([-np.cos(angles), np.sin(angles)], axis=1), -begin, axis=0)  # the apex has a depth of -1
    at_wall, hinges = (ring[:, 0] < 0.6) & has_wall, np.array([[0.5, -(0.75**0.5)], [0.5, 0.75**0.5]])
    closed = [np.concatenate([values, values[:1]]) for values in (ring, at_wall)]
    found = without_mitral_plane(*closed, hinges)
    wanted = ring[ring[:, 0] < 0.51]  # at a hinge, depth is 0.5
    assert len(found) == len(wanted) == 25 and {*map(tuple, found)} == {*map(tuple, wanted)}


def test_a_speck_of_wall_on_the_mitral_plane_does_not_shut_it():
    mask, spacing_mm = phantom_masks(4)[STILLS[0]]
    middle = measure(mask, spacing_mm).ventricle.hinges_mm.mean(axis=0)
    offset = np.indices(mask.shape) * np.reshape(spacing_mm, (2, 1, 1)) - np.reshape(middle, (2, 1, 1))
    spotted = np.where((np.hypot(*offset) < 2) & (mask == LA), MYO, mask).astype(np.uint8)
    assert (spotted != mask).any()
    before, after = (measure_myocardium(m, spacing_mm, measure(m, spacing_mm).ventricle) for m in (mask, spotted))
    assert after.endo_length_mm == pytest.approx(before.endo_length_mm, rel=0.01)
