"""The page of studies: every study with its numbers, pictures and disks, without network, and without what it must not show."""

import base64
import hashlib
import re
import weakref
from dataclasses import replace

import numpy as np
import pytest

from heartseg.datasets import phantom, readers
from heartseg.inference import study_files, study_results
from heartseg.reporting import studies_page
from heartseg.reporting.overlays import film_frames, write_overlays
from helpers.studies import by_patient, truth_of
from jobs.support import study_output


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A folder of results with overlays, and the results by patient: stills of two patients, and sequences of one of them."""
    tree, out = str(tmp_path_factory.mktemp("tree")), str(tmp_path_factory.mktemp("out"))
    for number in (1, 2):
        phantom.write_patient(tree, 0, number == 2, 0.25, number)
    results = []
    for clip in study_files.find_clips(tree):
        frames, masks = readers.read(clip.path, "nifti"), truth_of(clip)
        result = study_results.finish(out, clip, frames, masks, [1.0] * len(masks))
        write_overlays(out, clip, frames, masks, result.marked)
        results.append(result)
    return out, by_patient(results)


def write(studies, calibrations: dict | None = None) -> tuple[str, list[dict]]:
    out, results = studies
    rows = [study_results.study_row(patient, found, calibrations) for patient, found in results.items()]
    described = [studies_page.describe_study(out, row, results[row["patient"]]) for row in rows]
    with open(studies_page.write_page(out, described)) as page:
        return page.read(), rows


def test_every_study_is_in_the_table_and_below_with_its_ef_its_four_stills_and_their_disks(studies):
    page, rows = write(studies)
    for number, row in enumerate(rows, 1):
        assert f'<a href="#study{number}">{row["patient"]}</a>' in page and f'id="study{number}"' in page
        assert f"EF {row['ef_ase']:.0f} % (biplane disks, ASE)" in page
        assert f'data-value="{row["endo_strain"]}"' in page
    disks = re.findall(r'class="disks" d="([^"]+)"', page)
    assert len(disks) >= 8 and all(path.count("M") == 22 for path in disks)  # 20 disks, the long axis, the mitral plane
    assert page.count("esearch use only, not a medical device") == 3 + len(rows)  # also in the margin of every sheet of paper


def test_an_interval_of_ef_is_in_the_table_in_the_study_and_in_the_line_of_the_terminal(studies):
    text, rows = write(studies, {"ef_ase": {"base": 4.0, "slope": 0.0, "factor": 1.5}})
    for row in rows:
        interval = f"{row['ef_ase'] - 6:.0f} to {row['ef_ase'] + 6:.0f}"
        assert (
            text.count(f"({interval})") == 2
            and f"EF {row['ef_ase']:.0f} %, 80 % interval {interval} (biplane disks, ASE)" in text
        )
        assert f"EF {row['ef_ase']:.0f} % (80 % interval {interval}; biplane, ase)" in study_results.headline(row)
    assert "In brackets: the interval" in text and "In brackets" not in write(studies)[0]


def test_the_volume_of_an_atrium_that_is_cut_off_is_a_lower_limit_without_a_normal_range(studies):
    out, results = studies
    patient, found = next(iter(results.items()))
    row = study_results.study_row(patient, found)
    volume = f"{row['la_volume_ml_ES']:.0f}"
    whole, cut = (studies_page.describe_study(out, row | {"la_cut_off": where}, found)["measures"] for where in ("", "4CH ES"))
    (before,), (after,) = ([one for one in measures if one["title"].startswith("Left-atrial vol")] for measures in (whole, cut))
    assert before["text"] == volume and "34 ml/m²" in before["normal"]
    assert after["text"] == f"≥ {volume}" and after["normal"].endswith("the atrium is cut off at the image's edge in 4CH ES")


def test_the_disks_lie_on_the_cavity(studies):
    _, results = studies
    result = next(one for found in results.values() for one in found if one.frames == 1)
    (_, mask), spacing_mm = next(iter(result.phases.values())), np.array(result.spacing_mm)
    ventricle = studies_page.measure(mask, result.spacing_mm).ventricle
    path = studies_page.draw_disks(ventricle, spacing_mm, np.array([1.0, 1.0]))
    ends = np.array(re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path), float).reshape(-1, 2, 2)
    middles = (ends.mean(axis=1)[:20] - 0.5).round().astype(int)
    assert (mask[middles[:, 1], middles[:, 0]] == 1).all()
    lengths_mm = np.hypot(*((ends[:20, 1] - ends[:20, 0]) * spacing_mm[::-1]).T)
    assert lengths_mm == pytest.approx(ventricle.widths_mm, abs=0.5)


def test_a_sequence_has_a_film_that_shows_ed_and_es_and_a_place_on_the_curve_for_each_frame(studies):
    page, _ = write(studies)
    out, results = studies
    films = re.findall(r'class="film" data-places="([^"]+)"', page)
    sequences = [one for found in results.values() for one in found if one.frames > 1]
    assert len(films) == len(sequences) == 2
    for places, one in zip(films, sequences, strict=True):
        marked = [at for at, _ in one.phases.values()]
        shown = film_frames(one.frames, marked)
        assert set(marked) <= set(shown) and len(places.split()) == len(shown)


def test_the_page_needs_no_network_and_runs_no_script_but_its_own(studies):
    page, _ = write(studies)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "img-src data:" in policy
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_pictures_that_are_too_many_for_one_file_stay_beside_it(studies, monkeypatch):
    monkeypatch.setattr(studies_page, "MOST_INLINE_BYTES", 1000)
    page, rows = write(studies)
    assert "data:image" not in page
    assert f'src="{rows[0]["patient"]}/{rows[0]["patient"]}_4CH_ED_overlay.png"' in page


def test_text_from_files_is_escaped_and_a_study_without_pictures_or_ef_says_why(studies, tmp_path):
    _, results = studies
    (first, *_), *_ = results.values()
    clip = replace(first.clip, patient="<b>x</b>", stem="bare")
    bare = replace(first, clip=clip, phases={}, notes=("<script>alert(1)</script>",))
    page, _ = write((str(tmp_path), {"<b>x</b>": [bare]}))
    assert "<b>x</b>" not in page and "<script>alert" not in page and "no EF" in page and "no 2CH ED mask" in page
    assert "<img" not in page


def test_only_the_masks_of_one_patient_are_in_memory_however_many_studies_there_are(studies, tmp_path):
    _, results = studies
    collected, alive = study_output.Studies(str(tmp_path), True), []
    for number in range(5):
        for result in (one for found in results.values() for one in found):
            masks = {phase: (at, mask.copy()) for phase, (at, mask) in result.phases.items()}
            alive += [(number, weakref.ref(mask)) for _, mask in masks.values()]
            clip = replace(result.clip, patient=f"{number} {result.clip.patient}")
            collected.add(replace(result, clip=clip, phases=masks))
        assert {of for of, mask in alive if mask() is not None} == {number}
    del masks
    collected.close()
    assert len(collected.rows) == len(collected.described) == 5 * len(results) and not any(mask() for _, mask in alive)
    sequences = [one for found in results.values() for one in found if one.frames > 1]
    assert all(
        mask.base is None for one in sequences for _, mask in one.phases.values()
    )  # of its own, not a part of the clip's
