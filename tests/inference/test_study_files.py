"""Files are found and named so that none is used twice or overwritten, and a patient's indices come from the right ones."""

import csv
import io
import itertools
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from heartseg.datasets import nifti, readers
from heartseg.datasets.phantom import patient_info, write_phantom
from heartseg.datasets.readers import Frames
from heartseg.errors import UserError
from heartseg.inference import segmenter, study_files, study_results
from heartseg.inference.study_files import Clip, find_clips
from heartseg.labels import CLASS_COLOURS, LA, PHASES, VIEWS, Phase
from heartseg.metrics import ed_es_detection
from heartseg.reporting import contours, overlays
from helpers.echo_files import LOOP, dicom
from helpers.studies import finished, put, truth_of

TWO, FOUR = VIEWS


@pytest.fixture(scope="module")
def hearts(tmp_path_factory) -> str:
    """Two patients with stills and half sequences, and the truth beside each."""
    folder = str(tmp_path_factory.mktemp("hearts"))
    write_phantom(folder, patients=2, scale=0.3, sequences=True)
    return folder


@pytest.fixture(scope="module")
def stills(hearts, tmp_path_factory) -> list[study_results.ClipResult]:
    """The first patient's four stills, with the truth in place of a model's masks."""
    found = finished(hearts, str(tmp_path_factory.mktemp("stills")), lambda clip: clip.phase is not None)
    return found["patient0001"]


def named(clips: list[Clip]) -> list[tuple]:
    return [(clip.patient, clip.stem, clip.view, clip.phase) for clip in clips]


def test_a_camus_tree_gives_each_still_and_sequence_once_and_no_mask_and_so_does_an_object_stores(hearts):
    clips = find_clips(hearts)
    assert len(clips) == 2 * 6
    assert named(clips[:3]) == [
        ("patient0001", "patient0001_2CH_ED", TWO, Phase.ED),
        ("patient0001", "patient0001_2CH_ES", TWO, Phase.ES),
        ("patient0001", "patient0001_2CH_half_sequence", TWO, None),
    ]
    folder = f"{hearts}/database_nifti/patient0002"
    assert named(find_clips(folder)) == named(clips[6:])
    assert named(find_clips(f"{folder}/patient0002_4CH_ES.nii.gz")) == [named(clips)[10]]
    found = find_clips(f"file://{hearts}")
    assert named(found) == named(clips) and readers.read(found[0].path, "nifti").pixels.any()
    assert found[0].path.startswith("file://")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ann_A4C_ED.nii.gz", ("ann", FOUR, Phase.ED)),
        ("ann-ap2-es.nii", ("ann", TWO, Phase.ES)),
        ("ann_apical2CH.nii.gz", ("ann", TWO, None)),
        ("4ch.nii.gz", ("in", FOUR, None)),
        ("heart.v2.nii.gz", ("heart.v2", None, None)),
        ("EDDY_14CHANNELS.nii.gz", ("EDDY_14CHANNELS", None, None)),
    ],
)
def test_patient_view_and_phase_are_read_off_a_name(name, expected, tmp_path):
    put(tmp_path / "in", name)
    (clip,) = find_clips(str(tmp_path))
    assert (clip.patient, clip.view, clip.phase) == expected and name.startswith(clip.stem)


def test_links_to_folders_are_followed_and_a_circle_of_them_ends(tmp_path):
    put(tmp_path / "elsewhere", "a_2CH.nii.gz")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ann").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    assert [clip.stem for clip in find_clips(str(tmp_path / "in"))] == ["a_2CH"]


def test_masks_pictures_of_masks_and_hidden_files_are_not_inputs_and_view_and_phase_apply_to_names_without_them(tmp_path):
    put(tmp_path, "a_gt.nii.gz", "a_pred.nii.gz", ".a.nii.gz", "a.nii.gz", "b_2CH_ES.nii.gz", "c_overlay.nii.gz")
    (tmp_path / "a_overlay.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    found = find_clips(str(tmp_path), FOUR, Phase.ED)
    others = [("b", "b_2CH_ES", TWO, Phase.ES), ("c_overlay", "c_overlay", FOUR, Phase.ED)]  # not a picture of a mask
    assert named(found) == [("a", "a", FOUR, Phase.ED), *others]


@pytest.mark.parametrize(
    "files", [("ann/rest_2CH", "ann/rest_4CH", "bob/rest_2CH"), ("ann/visit1/4CH_a", "bob/visit1/2CH_b", "bob/visit1/4CH_c")]
)
def test_patients_of_one_name_in_two_folders_are_named_by_the_folders(files, tmp_path):
    put(tmp_path, *(f"{file}.nii.gz" for file in files))
    expected = [(file.rpartition("/")[0].replace("/", "_"), file.replace("/", "_")) for file in files]
    assert [(clip.patient, clip.stem) for clip in find_clips(str(tmp_path))] == expected


def test_files_of_one_stem_have_distinct_names(tmp_path):
    put(tmp_path, "a_2CH.nii.gz", "a_2CH.nii", "a_2CH_nii.nii", "b_2CH.nii")
    for name in ("a_2CH.png", "b_2CH.AVI"):
        (tmp_path / name).write_bytes(b"")
    clips = find_clips(str(tmp_path))
    expected = ["a_2CH_nii", "a_2CH_nii_2", "a_2CH_nii_gz", "a_2CH_png", "b_2CH_avi", "b_2CH_nii"]
    assert [clip.stem for clip in clips] == expected and {clip.view for clip in clips} == {TWO}
    assert {clip.patient for clip in clips} == {"a", "b"}


def test_an_output_among_the_inputs_is_refused(tmp_path):
    put(tmp_path / "tree", "tree_2CH.nii.gz")
    source, clips = str(tmp_path / "tree"), find_clips(str(tmp_path / "tree"))
    for out in ("tree", "tree/out", "."):  # the last would put the patient's results into tree/
        with pytest.raises(UserError, match="outside it"):
            study_files.check_out(str(tmp_path / out), source, clips)
    for out in ("out", "tree2"):
        study_files.check_out(str(tmp_path / out), source, clips)


LONG = "1.2.826.0.1.3680043.8.498.100200300"  # a UID as a generator makes it


def studies(folder, files: dict[str, dict]) -> dict[str, Clip]:
    """Clips by path of DICOM files with some tags."""
    for path, tags in files.items():
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
        (folder / path).write_bytes(dicom(LOOP[:1] + len(path), **tags))
    return {os.path.relpath(clip.path, folder): clip for clip in find_clips(str(folder), FOUR)}


def test_dicoms_are_named_by_digests_that_show_nothing_and_stay_the_same_whatever_lies_beside_them(tmp_path, monkeypatch):
    mine = {"PatientID": "DOE", "StudyInstanceUID": LONG + "1"}
    first = studies(tmp_path, {"DOE_JANE/1_A4C": mine, "DOE_JANE/22_A2C.dcm": mine})
    names = {clip.stem for clip in first.values()}
    assert all(re.fullmatch(r"study[0-9a-f]{12}_[24]CH_clip[0-9a-f]{6}", name) for name in names) and len(names) == 2
    assert [clip.view for clip in first.values()] == [FOUR, TWO]
    assert all(clip.shown == clip.stem and clip.patient == clip.stem[:17] for clip in first.values())
    more = studies(tmp_path, {"A/1": mine | {"StudyInstanceUID": LONG + "2"}, "DOE_JANE/0": mine, "DOE_JANE/copy/1_A4C": mine})
    assert {path: more[path].stem for path in first} == {path: clip.stem for path, clip in first.items()}
    assert len({clip.patient for clip in more.values()}) == 3 and len({clip.stem for clip in more.values()}) == 5
    monkeypatch.setenv("HEARTSEG_NAME_KEY", "another")
    assert not names & {clip.stem for clip in find_clips(str(tmp_path), FOUR)}


def test_two_copies_of_a_dicom_in_one_study_are_numbered_and_a_dead_link_is_not_a_file(tmp_path):
    for name in ("IM_0001", "b.dcm"):
        (tmp_path / name).write_bytes(dicom(LOOP, StudyInstanceUID=LONG))
    (tmp_path / "IM_0002").symlink_to(tmp_path / "nowhere")
    one, two = find_clips(str(tmp_path))
    assert two.stem == two.shown == f"{one.stem}_2" and one.patient == two.patient


PERSON = {"PatientID": "ANON", "StudyInstanceUID": LONG}
BORN = PERSON | {"PatientBirthDate": "19500101"}


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ({"PatientID": "ANON"}, {"PatientID": "ANON"}, "same PatientID but a different folder"),
        (*[PERSON | {"StudyInstanceUID": "1.2.3"}] * 2, "same StudyInstanceUID but a different folder"),
        (PERSON, PERSON, "same StudyInstanceUID but a different folder"),
        (PERSON | {"SeriesInstanceUID": "1"}, PERSON | {"SeriesInstanceUID": "1"}, "but a different folder"),
        (PERSON | {"SeriesInstanceUID": "1"}, PERSON | {"SeriesInstanceUID": "2"}, "several folders"),
        (BORN | {"SeriesInstanceUID": "1"}, BORN | {"SeriesInstanceUID": "2"}, ""),
        (BORN | {"PatientSex": "F", "SeriesInstanceUID": "1"}, BORN | {"SeriesInstanceUID": "2"}, "PatientSex"),
        (PERSON | {"SeriesInstanceUID": "1"}, PERSON | {"PatientID": "2", "SeriesInstanceUID": "2"}, "different PatientID"),
        (PERSON | {"SeriesInstanceUID": "1"}, PERSON | {"StudyInstanceUID": LONG + "2", "SeriesInstanceUID": "2"}, None),
    ],
)
def test_files_of_two_folders_are_one_study_only_if_their_identifiers_can_be_trusted_and_agree(first, second, why, tmp_path):
    one, two = studies(tmp_path, {"person_a/4CH": first, "person_bb/2CH": second}).values()
    is_one = why in ("", "several folders")
    assert (one.patient == two.patient) == is_one
    assert (why or "") in one.remark and bool(one.remark) == bool(why)
    assert not why or is_one or two.patient in one.remark


def test_in_one_folder_contradicting_identifiers_give_two_studies_and_the_folder_alone_is_a_doubt(tmp_path):
    one, two = studies(tmp_path / "a", {"4CH": BORN, "x2CH": BORN | {"PatientBirthDate": "19600101"}}).values()
    assert one.patient != two.patient and "different PatientBirthDate" in one.remark
    one, two = studies(tmp_path / "b", {"4CH": {"PatientID": "ANON"}, "x2CH": {"PatientID": "ANON"}}).values()
    assert one.patient == two.patient and "only their folder" in one.remark


def test_the_secret_of_the_names_is_the_users_own_file_and_one_line_if_it_cannot_be_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("HEARTSEG_NAME_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    first = study_files.name_secret()
    path = tmp_path / "heartseg" / "name_key"
    assert len(first) == 64 and study_files.name_secret() == first and path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["name_key"]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(path))
    with pytest.raises(UserError, match="set HEARTSEG_NAME_KEY"):
        study_files.name_secret()


def test_a_cropped_and_turned_picture_has_its_mask_where_the_file_has_the_heart(tmp_path):
    masks = np.zeros((1, 4, 3), np.uint8)
    masks[0, 0, 0] = 1  # upper left of what was turned round: lower right of the region in the file
    frames = Frames(masks * 9, (0.5, 0.25), box=(2, 1, 10, 8), flips=(1, 2))
    study_files.write_masks(str(tmp_path / "a.nii.gz"), masks, frames)
    (found,), spacing_mm, _ = nifti.read_nifti(str(tmp_path / "a.nii.gz"))
    assert found.shape == (10, 8) and np.argwhere(found).tolist() == [[5, 3]] and spacing_mm == (0.5, 0.25)


def beat(frames: int, ed: int = 0) -> np.ndarray:
    """A whole cycle in ml, end-diastole at `ed`, end-systole half a cycle later."""
    return 90 + 40 * np.cos(2 * np.pi * (np.arange(frames) - ed) / frames)


def test_ed_and_es_are_the_largest_and_the_smallest():
    for ed in (0, 3, 10, 19):
        assert ed_es_detection.find_ed_es(beat(20, ed)) == (ed, (ed + 10) % 20)
    for volumes in ([100.0, 70.0], [70.0, 100.0]):
        assert ed_es_detection.find_ed_es(np.array(volumes)) == (np.argmax(volumes), np.argmin(volumes))


@pytest.mark.parametrize("spoilt", itertools.combinations(range(0, 20, 4), 2))
@pytest.mark.parametrize("value", [0.0, np.nan, 30.0, 400.0])
def test_frames_whose_outline_failed_are_neither(spoilt, value):
    volumes = beat(20, ed=2)
    volumes[list(spoilt)] = value
    found = ed_es_detection.find_ed_es(volumes)
    assert found is not None and abs(found[0] - 2) <= 1 and abs(found[1] - 12) <= 1
    assert set(np.flatnonzero(np.isnan(ed_es_detection.plausible(volumes)))) == set(spoilt)


def test_noise_of_a_few_percent_moves_ed_and_es_by_few_frames():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ed, es = ed_es_detection.find_ed_es(beat(40, ed=10) * rng.normal(1, 0.03, 40))
        assert abs(ed - 10) <= 5 and abs(es - 30) <= 5


@pytest.mark.parametrize("volumes", [[], [80.0], [np.nan] * 5, [0.0] * 5, [100.0] * 10, [80.0, 80.0]])
def test_a_sequence_that_shows_no_beat_has_no_ed_and_no_es(volumes):
    assert ed_es_detection.find_ed_es(np.array(volumes)) is None


@pytest.mark.parametrize("kind", ["stills", "sequences"])
def test_ef_of_the_truth_is_the_closed_forms_from_stills_and_from_sequences(kind, hearts, tmp_path):
    found = finished(hearts, str(tmp_path), lambda clip: ("sequence" in clip.stem) == (kind == "sequences"))
    for number, (patient, results) in enumerate(found.items(), start=1):
        row = study_results.study_row(patient, results)
        assert row["ef_ase"] == pytest.approx(patient_info(number).ef, abs=2)
        assert row["from_4CH"] == ("stills" if kind == "stills" else f"{patient}_4CH_half_sequence")
        assert row["edv_ml_ase"] > row["esv_ml_ase"] > 10 and not row["reason"]
        info = patient_info(number)
        for one in results if kind == "sequences" else ():  # whichever way they run
            assert {p: at + 1 for p, (at, _) in one.phases.items()} == {Phase.ED: info.ed, Phase.ES: info.es}
            assert one.ef_single_plane == pytest.approx(info.ef, abs=12)
            # The two frames' own strain, of which the curve is the average over neighbours; ED begins the beat.
            expected = row[f"endo_strain_{one.clip.view}"]
            assert one.strain[info.ed - 1] == 0 and one.strain[info.es - 1] == pytest.approx(expected, abs=1)
            assert one.peak_strain["peak_strain"] == pytest.approx(expected, abs=1)
            assert abs(one.peak_strain["peak_strain_frame"] - info.es) <= 1 and "peak_strain_ms" not in one.peak_strain
            timed = replace(one, frame_ms=20.0).peak_strain
            frames = timed["peak_strain_frame"] - info.ed
            assert timed.get("peak_strain_ms") == (20 * frames if frames > 0 else None)


def changed(stills: list[study_results.ClipResult], view, phase, change) -> list[study_results.ClipResult]:
    return [change(one) if (one.clip.view, one.clip.phase) == (view, phase) else one for one in stills]


def bare(one: study_results.ClipResult) -> study_results.ClipResult:
    return replace(one, spacing_mm=None)


def test_a_view_without_spacing_or_without_masks_does_not_spoil_the_other(stills):
    results = [bare(one) if one.clip.view == TWO else one for one in stills]
    assert study_results.study_row("p", results)["ef_ase"] == pytest.approx(patient_info(1).ef, abs=3)
    row = study_results.study_row("p", [one for one in results if one.clip.view == TWO])
    assert np.isfinite(row["ef_2ch_ase"]) and np.isnan(row["ef_ase"]) and "2CH alone" in study_results.headline(row)
    assert "no 4CH ED mask" in row["reason"] and "different scales" not in row["reason"]


def test_without_spacing_there_is_an_ef_and_no_volume_unless_the_pictures_have_two_scales_or_one_has_a_spacing(stills):
    row = study_results.study_row("p", list(map(bare, stills)))
    assert row["ef_ase"] == pytest.approx(patient_info(1).ef, abs=3) and np.isnan(row["edv_ml_ase"])
    assert "EF" in study_results.headline(row) and "ml" not in study_results.headline(row)

    def halved(one: study_results.ClipResult) -> study_results.ClipResult:
        return replace(one, phases={phase: (at, mask[::2, ::2]) for phase, (at, mask) in one.phases.items()})

    one_phase_alone = [changed(stills, FOUR, phase, bare) for phase in PHASES]
    for results in (changed(list(map(bare, stills)), FOUR, Phase.ES, halved), *one_phase_alone):
        row = study_results.study_row("p", results)
        assert np.isnan(row["ef_ase"]) and np.isnan(row["ef_4ch_ase"]) and np.isfinite(row["ef_2ch_ase"])
        assert "4CH ED and ES have different scales" in row["reason"]


def test_views_that_disagree_are_a_doubt_and_names_without_a_phase_have_advice(stills):
    row = study_results.study_row("patient0001", stills)
    assert row["doubts"] == "" and row["confidence"] == 1 and "disagree" not in study_results.headline(row)
    # The four-chamber view's end-systole in the place of its end-diastole: a ventricle that does not move.
    (still,) = [one for one in stills if (one.clip.view, one.clip.phase) == (FOUR, Phase.ES)]
    frozen = replace(still, phases={Phase.ED: still.phases[Phase.ES]})
    row = study_results.study_row("patient0001", changed(stills, FOUR, Phase.ED, lambda _: frozen))
    assert "the views disagree by" in row["doubts"] and "the views disagree by" in study_results.headline(row)
    unnamed = replace(still, clip=replace(still.clip, phase=None), phases={})
    assert "give --phase" in study_results.study_row("patient0001", [unnamed])["reason"]


def test_long_axes_that_differ_are_a_doubt_that_names_the_foreshortened_view(stills):
    def of_height(share: float) -> list[study_results.ClipResult]:
        def squeeze(one: study_results.ClipResult) -> study_results.ClipResult:
            return replace(one, spacing_mm=(one.spacing_mm[0] * share, one.spacing_mm[1]))

        return changed(changed(stills, FOUR, Phase.ED, squeeze), FOUR, Phase.ES, squeeze)

    assert study_results.study_row("p", of_height(0.95))["doubts"] == ""
    doubts = study_results.study_row("p", of_height(0.75))["doubts"]
    assert re.search(r"the long axes at ED differ \(\d+ mm in 4CH, \d+ mm in 2CH\): 4CH may be foreshortened", doubts)
    assert "2CH may be foreshortened" in study_results.study_row("p", of_height(1.4))["doubts"]


def test_an_atrium_that_continues_outside_the_picture_is_named_with_its_view_and_phase(stills):
    def cut(one: study_results.ClipResult) -> study_results.ClipResult:
        (phase, (at, mask)), *_ = one.phases.items()
        return replace(one, phases={phase: (at, mask[: int(np.argwhere(mask == LA)[:, 0].mean())])})

    assert study_results.study_row("p", stills)["la_cut_off"] == ""
    assert study_results.study_row("p", changed(stills, FOUR, Phase.ES, cut))["la_cut_off"] == "4CH ES"


def test_two_stills_of_one_view_and_phase_are_both_named_and_neither_is_used(stills):
    (es,) = [one for one in stills if (one.clip.view, one.clip.phase) == (FOUR, Phase.ES)]
    row = study_results.study_row("p", [*stills, replace(es, clip=replace(es.clip, stem="again_4CH_ES"))])
    assert np.isnan(row["ef_ase"]) and np.isnan(row["ef_4ch_ase"]) and np.isfinite(row["ef_2ch_ase"])
    assert f"{es.clip.stem} and again_4CH_ES show the same view and phase (4CH ES)" in row["reason"]


def test_a_clip_that_shows_no_beat_is_named_only_if_its_view_is_missing(stills):
    clip = replace(stills[0].clip, view=FOUR, phase=None, stem="frozen_4CH")
    frozen = replace(stills[0], clip=clip, frames=9, phases={}, volumes_ml=np.full(9, 80.0))
    row = study_results.study_row("p", [*(one for one in stills if one.clip.view == TWO), frozen])
    assert "frozen_4CH shows no beat" in row["reason"] and np.isfinite(row["ef_2ch_ase"])
    assert study_results.study_row("p", [*stills, frozen])["reason"] == ""


def test_a_sequence_of_an_unknown_view_is_measured_and_its_row_says_what_to_do(hearts, tmp_path):
    (results, _) = finished(hearts, str(tmp_path), lambda clip: clip.stem.endswith("2CH_half_sequence")).values()
    nameless = replace(results[0], clip=replace(results[0].clip, view=None))
    assert "--view" in study_results.study_row("patient0001", [nameless])["reason"]
    assert study_results.clip_record(nameless)["ef_single_plane"] > 0


def test_a_remark_on_a_study_is_a_doubt_or_why_it_has_no_ef(stills):
    results = [replace(one, clip=replace(one.clip, remark="only their folder")) for one in stills]
    row = study_results.study_row("p", results)
    assert row["doubts"] == "only their folder" and row["reason"] == ""
    row = study_results.study_row("p", [one for one in results if one.clip.view == FOUR])
    assert row["doubts"] == "" and row["reason"].endswith("only their folder")


def test_a_mask_under_the_review_threshold_is_a_doubt(stills, tmp_path):
    clip, (_, mask) = stills[0].clip, stills[0].phases[stills[0].clip.phase]
    frames = readers.read(clip.path, "nifti")
    for confidence, is_doubted in ((segmenter.REVIEW_THRESHOLD - 0.01, True), (segmenter.REVIEW_THRESHOLD, False)):
        found = study_results.finish(str(tmp_path), clip, frames, mask[None], [confidence])
        assert ("the network is unsure of it" in "".join(found.doubts)) == is_doubted
        assert ("the network is unsure of it" in study_results.study_row("p", [found])["doubts"]) == is_doubted


def test_a_clip_that_fails_is_named_by_ranges_of_frames_and_cut_to_a_cell(hearts, tmp_path):
    clip = next(clip for clip in find_clips(hearts) if clip.stem.endswith("4CH_half_sequence"))
    frames = Frames(np.zeros((60, 40, 30), np.uint8), None)
    masks = np.zeros(frames.pixels.shape, np.uint8)
    masks[7, 5:9, 5:9] = 3
    result = study_results.finish(str(tmp_path), clip, frames, masks, [0.5] * 60)
    assert "frames 1-60: the cavity is missing" in result.doubts[0]
    assert any(doubt.startswith("frames 1-7, 9-60: the atrium is missing") for doubt in result.doubts)
    assert len("; ".join(result.doubts)) < 400 and study_results.ranges([7]) == "frame 7"
    row = study_results.study_row("p", [result] * 20)
    study_results.write_tables(str(tmp_path), [row], {})
    with open(tmp_path / "ef.csv") as stream:
        (line,) = csv.DictReader(stream)
    assert len(line["doubts"]) <= 200 and line["doubts"].endswith("(more in studies.json)") and len(line["reason"]) <= 200
    (whole,) = json.loads((tmp_path / "studies.json").read_text())["patients"]
    assert whole["doubts"] == row["doubts"] and len(study_results.headline(row)) < 230


def test_the_tables_hold_every_patient_and_the_intended_use(hearts, tmp_path):
    rows = [study_results.study_row(patient, found) for patient, found in finished(hearts, str(tmp_path)).items()]
    study_results.write_tables(str(tmp_path), rows, {"damaged": [{"input": "x", "reason": "is empty"}]})
    with open(tmp_path / "ef.csv") as stream:
        table = list(csv.DictReader(stream))
    assert [line["patient"] for line in table] == ["patient0001", "patient0002"]
    assert all("not a medical device" in line["intended_use"] and 5 < float(line["ef_ase"]) < 90 for line in table)
    whole = json.loads((tmp_path / "studies.json").read_text())
    assert whole["patients"][0]["ef_ase"] == pytest.approx(rows[0]["ef_ase"]) and whole["damaged"][0]["input"] == "x"


def test_an_overlay_has_square_pixels_smooth_rims_in_the_classes_colours_and_names_them():
    rows, columns = np.mgrid[:100, :50]
    mask = (np.hypot(rows - 50, 2 * (columns - 25)) < 30).astype(np.uint8)  # a circle on pixels twice as wide as high
    picture = overlays.outlined(np.full((100, 50), 90, np.uint8), mask, (0.5, 1.0), "4CH ED")
    assert picture.shape == (contours.ROWS + overlays.STRIP_ROWS, contours.ROWS)
    rim = np.argwhere(picture[: contours.ROWS] == contours.GREYS + 1)
    radius = np.hypot(*(rim - contours.ROWS / 2).T) / contours.ROWS * 100
    assert radius.min() > 27.3 and radius.max() < 32
    with Image.open(io.BytesIO(contours.encode_png(picture))) as back:
        colours = {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in back.convert("RGB").getcolors(1 << 20)}
    assert set(CLASS_COLOURS[1:]) <= colours  # the legend names all three


def test_a_sequence_becomes_an_endless_gif_with_every_frame_and_few_of_a_long_one(hearts, tmp_path):
    clip = next(clip for clip in find_clips(hearts) if clip.stem.endswith("2CH_half_sequence"))
    frames, masks = readers.read(clip.path, "nifti"), truth_of(clip)
    overlays.write_overlays(str(tmp_path), clip, frames, masks, {0: "ED"})
    with Image.open(tmp_path / "patient0001" / "patient0001_2CH_half_sequence_overlay.gif") as gif:
        assert gif.n_frames == len(masks) and gif.info["loop"] == 0
    shown = overlays.shown_frames(500, always=[7])
    assert len(shown) <= overlays.MAX_GIF_FRAMES + 1 and 7 in shown and shown[0] == 0


def test_both_label_files_name_every_label_with_its_colour(tmp_path):
    study_results.write_label_names(str(tmp_path))
    snap = [line.split(maxsplit=7) for line in (tmp_path / "labels.txt").read_text().splitlines() if not line.startswith("#")]
    slicer = [line.split() for line in (tmp_path / "labels.ctbl").read_text().splitlines() if not line.startswith("#")]
    assert [int(row[0]) for row in snap] == [int(row[0]) for row in slicer] == [0, 1, 2, 3]
    assert all(one[1:4] == other[2:5] for one, other in zip(snap, slicer, strict=True))
    assert snap[1] == ["1", "86", "180", "233", "1", "1", "1", '"Left-ventricular cavity"']


def test_smoothing_is_the_mean_of_three_frames_and_a_frame_a_quarter_off_the_median_of_five_is_the_last_plausible_one():
    found = ed_es_detection.smooth(np.array([10.0, 20, 60, np.nan, 30]))
    np.testing.assert_allclose(found, [15, 30, 40, np.nan, 30])
    for volumes, failed in (([100, 100, 125, 100, 100], []), ([100, 100, 125.5, 100, 100], [2]), ([100] * 3 + [50] * 3, [])):
        assert np.flatnonzero(np.isnan(ed_es_detection.plausible(np.array(volumes, float)))).tolist() == failed
