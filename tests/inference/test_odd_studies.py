"""Studies as people keep them: clips that show no beat, pictures of two scales, two of one kind, folders of one name.

Each of these once gave a wrong ejection fraction without a warning.
"""

from dataclasses import replace

import numpy as np
import pytest

from heartseg.datasets import readers
from heartseg.datasets.phantom import patient_info, write_phantom
from heartseg.inference import segmenter, study_results
from heartseg.inference.study_files import find_clips
from heartseg.labels import PHASES, VIEWS, Phase
from helpers.echo_files import dicom
from helpers.studies import finished

TWO, FOUR = VIEWS


@pytest.fixture(scope="module")
def stills(tmp_path_factory) -> list[study_results.ClipResult]:
    """A patient's four stills, the truth in the place of a model's masks."""
    folder = tmp_path_factory.mktemp("odd")
    write_phantom(str(folder / "hearts"), patients=1, scale=0.3)
    (found,) = finished(str(folder / "hearts"), str(folder / "out")).values()
    return found


def test_a_clip_that_shows_no_beat_is_named_only_where_its_view_is_wanting(stills):
    still_clip = replace(stills[0].clip, view=FOUR, phase=None, stem="frozen_4CH")
    frozen = replace(stills[0], clip=still_clip, frames=9, phases={}, volumes_ml=np.full(9, 80.0))
    row = study_results.study_row("p", [*(one for one in stills if one.clip.view == TWO), frozen])
    assert "frozen_4CH shows no beat" in row["reason"] and np.isfinite(row["ef_2ch_ase"])
    assert study_results.study_row("p", [*stills, frozen])["reason"] == ""


def changed(stills: list[study_results.ClipResult], view, phase, change) -> list[study_results.ClipResult]:
    """The stills with one of them changed."""
    return [change(one) if (one.clip.view, one.clip.phase) == (view, phase) else one for one in stills]


def test_pictures_of_two_scales_are_not_compared_where_no_spacing_tells_them_apart(stills):
    bare = [replace(one, spacing_mm=None) for one in stills]
    assert study_results.study_row("p", bare)["ef_ase"] == pytest.approx(patient_info(1).ef, abs=3)

    def halved(one: study_results.ClipResult) -> study_results.ClipResult:
        return replace(one, phases={phase: (at, mask[::2, ::2]) for phase, (at, mask) in one.phases.items()})

    row = study_results.study_row("p", changed(bare, FOUR, Phase.ES, halved))
    assert np.isnan(row["ef_ase"]) and np.isnan(row["ef_4ch_ase"]) and np.isfinite(row["ef_2ch_ase"])
    assert "4CH ED and ES have different scales" in row["reason"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_spacing_of_one_phase_alone_is_not_mixed_with_pixels(phase, stills):
    row = study_results.study_row("p", changed(stills, TWO, phase, lambda one: replace(one, spacing_mm=None)))
    assert np.isnan(row["ef_ase"]) and np.isnan(row["ef_2ch_ase"]) and np.isfinite(row["ef_4ch_ase"])
    assert "2CH ED and ES have different scales" in row["reason"]


def test_a_view_without_spacing_or_without_masks_does_not_spoil_the_other(stills):
    bare = [replace(one, spacing_mm=None) if one.clip.view == TWO else one for one in stills]
    assert study_results.study_row("p", bare)["ef_ase"] == pytest.approx(patient_info(1).ef, abs=3)
    row = study_results.study_row("p", [one for one in bare if one.clip.view == TWO])
    assert np.isfinite(row["ef_2ch_ase"]) and "no 4CH ED mask" in row["reason"] and "different scales" not in row["reason"]


def test_of_two_stills_of_one_view_and_phase_none_is_taken_and_both_are_named(stills):
    (es,) = [one for one in stills if (one.clip.view, one.clip.phase) == (FOUR, Phase.ES)]
    (ed,) = [one for one in stills if (one.clip.view, one.clip.phase) == (FOUR, Phase.ED)]
    other = replace(es, clip=replace(es.clip, stem="again_4CH_ES"), phases={Phase.ES: ed.phases[Phase.ED]})
    row = study_results.study_row("p", [*stills, other])
    assert np.isnan(row["ef_ase"]) and np.isnan(row["ef_4ch_ase"]) and np.isfinite(row["ef_2ch_ase"])
    assert f"{es.clip.stem} and again_4CH_ES all show 4CH ES" in row["reason"]


def test_a_mask_under_the_review_threshold_is_a_doubt(stills):
    (clip, mask) = (stills[0].clip, stills[0].phases[stills[0].clip.phase][1])
    frames = readers.read(clip.path, "nifti")
    for confidence, is_doubted in ((segmenter.REVIEW_THRESHOLD - 0.01, True), (segmenter.REVIEW_THRESHOLD, False)):
        found = study_results.finish(clip.path.rpartition("/")[0], clip, frames, mask[None], [confidence])
        assert ("the network is unsure of it" in "".join(found.doubts)) == is_doubted
        assert ("the network is unsure of it" in study_results.study_row("p", [found])["doubts"]) == is_doubted


def test_a_dead_link_among_dicoms_is_no_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 80, 70), dtype=np.uint8)
    (tmp_path / "IM_0001").write_bytes(dicom(pixels))
    (tmp_path / "IM_0002").symlink_to(tmp_path / "nowhere")
    assert [clip.path for clip in find_clips(str(tmp_path))] == [str(tmp_path / "IM_0001")]
