"""The report's promises: one file without network, honest about synthetic hearts, and complete with whatever data exist."""

import functools
import io
import itertools
import re
import shutil

import numpy as np
import pandas
import pyarrow
import pytest

from heartseg.config import recipes
from heartseg.config.experiment import identity, to_json
from heartseg.errors import UserError
from heartseg.evaluation import scoring
from heartseg.evaluation.ground_truth import Case
from heartseg.inference.segmenter import Segmented
from heartseg.labels import ENDO, LA, MYO, PHASES, VIEWS
from heartseg.metrics.agreement import agree
from heartseg.metrics.cardiac_indices import INDICES
from heartseg.metrics.segmentation import DISTANCES, SCORES
from heartseg.reporting import contours, pages, plots, published_results, report, text_tables
from heartseg.storage import filesystem
from heartseg.training import run_directory
from helpers.pages import Reader, look_at, outside_links

SIDE = 48
# Options of `write_run`, and of `write_evaluation`, for the pages that tests share: each takes seconds.
PAGES = {
    "camus": {},
    "phantom": {"dataset": "phantom", "recipe": "seed", "epochs": 1},
    "other": {"dataset": "other", "epochs": 1, "evaluation_options": {"patient": "<script>alert({})</script>", "with_ef": 2}},
}


def fake_mask(shift: int = 0) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[6:28, 12 + shift : 34 + shift] = MYO
    mask[10:28, 16 + shift : 30 + shift] = ENDO
    mask[28:42, 16 + shift : 32 + shift] = LA
    return mask


def write_run(run: str, recipe: str = "quick", dataset: str = "CAMUS", epochs: int = 3, samples: bool = True) -> None:
    experiment = recipes.RECIPES[recipe]()
    description = {
        "identity": identity(experiment), "data_fingerprint": "f" * 64, "experiment": to_json(experiment),
        "dataset": dataset, "split": {"kind": "official"},
        "groups": {"train": {"patients": 8, "images": 32}, "val": {"patients": 5, "images": 20}},
        "source_sha256": "a" * 64, "code": "git 0123abcd", "wandb_id": "wandb0123456",
    }  # fmt: skip
    filesystem.publish_json(filesystem.join(run, run_directory.DESCRIPTION), description)
    record = []
    for epoch in range(1, epochs + 1):
        scores = {f"{g}/{s}": 1 - 0.5 / epoch for g in ("train", "val") for s in ("loss", *SCORES)}
        record.append({"epoch": epoch, "lr": 0.01 / epoch, "seconds": 1.0, "images_per_s": 9.0, **scores})
    run_directory.write_record(run, record)
    shown = {"images": np.random.default_rng(0).integers(0, 255, (2, SIDE, SIDE), dtype=np.uint8)}
    shown |= {"masks": np.stack([fake_mask()] * 2), "names": np.array(["patient0001 2CH ED", "patient0002 4CH ES"])}
    for name, epoch, shift in (("first", 1, 4), ("last", epochs, 1)) if samples else ():
        np.savez(buffer := io.BytesIO(), **shown, predictions=np.stack([fake_mask(shift)] * 2), epoch=np.array(epoch))
        filesystem.publish(filesystem.join(run, "samples", f"{name}.npz"), buffer.getvalue())


def write_evaluation(evaluation: str, patient: str = "patient{:04d}", quality: bool = True, with_ef: int = 4) -> None:
    """An evaluation of 20 images of 5 patients; one score has no value, one image has no atrium, `with_ef` patients an EF."""
    rng = np.random.default_rng(0)
    rows = pandas.DataFrame({score: rng.uniform(0.7, 0.95, 20).round(4) for score in SCORES})
    rows = rows.assign(**{distance: rng.uniform(1, 9, 20).round(4) for distance in DISTANCES})
    rows["patient"] = [patient.format(1 + i // 4) for i in range(20)]
    rows["confidence"], rows["implausible"] = rng.uniform(0.7, 0.95, 20), ["the cavity is missing"] + [""] * 19
    rows["view"], rows["phase"] = ["2CH", "2CH", "4CH", "4CH"] * 5, ["ED", "ES"] * 10
    rows["quality"] = ["Good", "Good", "Poor", None] * 5 if quality else None
    rows.loc[7, "dice"], rows.loc[7, "dice_la"], rows["iou_la"] = 0.1234, np.nan, np.nan
    images = rows.assign(confusion=[np.eye(4, dtype=int).ravel().tolist()] * 20)
    reason = [""] * with_ef + ["no 2CH ES mask"] * (5 - with_ef)
    indices = {f"{n}_{k}": rng.uniform(30, 70, 5).round(3) for n in INDICES for k in ("prediction", "truth")}
    patients = pandas.DataFrame({"patient": rows["patient"].unique(), "ef_reference": None, "ef_convention": None, **indices})
    patients = patients.assign(reason_prediction=reason, reason_truth="")
    patients.loc[with_ef:, [f"{name}_prediction" for name in INDICES]] = np.nan
    for name, table in ((scoring.IMAGES, rows), (scoring.PATIENTS, patients)):
        filesystem.write_table(filesystem.join(evaluation, name), pyarrow.Table.from_pandas(table, preserve_index=False))
    missing = {"patient": "patient0009", "view": "2CH", "phase": "ED", "file": "f", "reason": "the gzip is cut off"}
    summary = scoring.summarise(images, patients, [missing])
    summary |= {"group": "val", "checkpoint": "checkpoints/epoch_0003", "epoch": 3, "which": "last", "seconds": 1.5}
    filesystem.publish_json(filesystem.join(evaluation, scoring.SUMMARY), summary)


def make_page(folder: str, evaluation_options: dict | None = None, **options) -> str:
    """Writes inputs and returns the report's text; `options` are those of `write_run`."""
    run, evaluation = filesystem.join(folder, "run"), filesystem.join(folder, "run", "evaluation-val")
    write_run(run, **options)
    write_evaluation(evaluation, **(evaluation_options or {}))
    assert report.write_report(evaluation, run) == filesystem.join(evaluation, "report.html")
    return filesystem.read_bytes(filesystem.join(evaluation, "report.html")).decode()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return functools.cache(lambda name="camus": make_page(str(tmp_path_factory.mktemp("report")), **PAGES[name]))


def test_report_is_one_file_without_network_and_every_page_forbids_the_browser_to_fetch_anything(page):
    assert outside_links(page()) == {"https://doi.org/10.1109/TMI.2019.2900516"}  # the citation, a plain link
    loader, policy = pages.environment().loader, "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in loader.get_source(None, "head.html")[0]
    for name in ("report.html", "compare.html", "sweep.html", "shards.html"):
        assert '{% include "head.html" %}' in loader.get_source(None, name)[0]


def test_references_lead_somewhere_and_screen_readers_get_text_for_every_picture_and_scope_for_every_header(page):
    text = page()
    tags = Reader(text).tags
    names = [a["id"] for _, a in tags if "id" in a]
    wanted = set(re.findall(r"url\(#([^)]+)\)", text)) | {a["href"][1:] for _, a in tags if a.get("href", "").startswith("#")}
    assert wanted <= set(names) and len(names) == len(set(names))
    assert all(a.get("alt") for tag, a in tags if tag == "img")
    assert all(a.get("scope") in ("row", "col") for tag, a in tags if tag == "th")
    assert sum(a.get("role") == "img" and bool(a.get("aria-label")) for _, a in tags) == sum(t == "svg" for t, _ in tags) == 9
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in tags}
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_a_phantom_of_one_epoch_is_never_presented_as_accuracy_and_the_seed_recipe_lists_our_choices(page):
    text = page("phantom")
    words = Reader(text).words
    assert words.index("but say nothing about its accuracy on patients") < words.index("Mean Dice of LV")
    assert "Overlap with the synthetic truth" in words and "10.1109/TMI.2019.2900516" not in words
    assert words.startswith("Synthetic hearts: ")  # the tab's title, which is what a bookmark keeps
    assert all(choice in words for choice in recipes.SEED_CHOICES) and "Our choices" not in page()
    # One epoch has one prediction, and points for curves: one value has no line to show it.
    assert words.count("Image Truth Prediction after epoch 1 ") == 2
    assert "Loss by epoch, to epoch 1: training 0.5, validation 0.5." in text
    lines = [plots.curve(range(n), {"train": [0.5] * n}, "Loss").axes[0].lines[0] for n in (1, 9)]
    assert [line.get_marker() for line in lines] == ["o", "None"]


def test_scores_and_agreement_are_shown_as_they_were_summarised(page, tmp_path):
    assert set(report.SCORE_TITLES) == set(SCORES)
    words = Reader(page()).words
    write_evaluation(str(tmp_path))
    summary = filesystem.read_json(str(tmp_path / scoring.SUMMARY))
    for name in SCORES:
        if (score := summary["scores"][name])["mean"] is not None:
            row = f"{report.SCORE_TITLES[name]}{score['mean']:.3f}{score['low']:.3f} to {score['high']:.3f}"
            assert row + f"{summary['pooled'][name]:.3f}" in words
    assert "Left atrium (la): IoU––1.000" in words
    ef = summary["clinical"]["agreement"]["ef_camus"]
    assert f"EF, one disk height for both phases (camus), %4{ef['r']:.3f}{ef['bias']:.1f}" in words
    assert all(f"By {title}" in words for title in ("phase", "view", "image quality"))


def test_images_of_lowest_dice_come_lowest_first_and_ten_at_most_and_configuration_lineage_and_all_pictures_are_there(page):
    rows = re.findall(r'<tr><th scope="row">(patient\d+)</th>(.*?)</tr>', page(), flags=re.DOTALL)
    values = [float(re.findall(r"<td>(0\.\d{3})</td>", cells)[0]) for _, cells in rows]
    assert len(rows) == 10 and values == sorted(values) and rows[0][0] == "patient0002" and values[0] == 0.123
    words = Reader(page()).words
    assert words.count("Image Truth Prediction after epoch 1 Prediction after epoch 3") == 2
    assert words.count("four single-class channels") == 2
    for fact in ("train.epochs", "optim.kind", "git 0123abcd", "f" * 64, "a" * 64, "kind official", "wandb0123456"):
        assert fact in words
    assert "patients: 8, images: 32" in words


def test_missing_samples_rows_and_epochs_leave_their_sections_out_and_a_missing_summary_is_named(tmp_path):
    run, evaluation = str(tmp_path / "run"), str(tmp_path / "evaluation")
    write_run(run, epochs=1, samples=False)
    filesystem.remove(filesystem.join(run, run_directory.RECORD))
    write_evaluation(evaluation, quality=False)
    filesystem.remove(filesystem.join(evaluation, scoring.IMAGES))
    text = filesystem.read_bytes(report.write_report(evaluation, run)).decode()
    assert not any(f'id="{section}"' in text for section in ("pictures", "curves", "lowest"))
    assert "By image quality" not in text
    filesystem.remove(filesystem.join(evaluation, scoring.SUMMARY))
    with pytest.raises(UserError, match=r"summary\.json"):
        report.write_report(evaluation, run)


def test_same_inputs_make_the_same_bytes(page, tmp_path):
    # The run's path is a fact of its lineage.
    fresh = make_page(str(tmp_path))
    assert re.sub(r">/[^<]*/run<", "><", fresh) == re.sub(r">/[^<]*/run<", "><", page())


def test_the_border_of_two_structures_is_drawn_once_also_thick_and_channels_show_each_pixel_in_one_class():
    mask = np.repeat(np.array([0, 0, MYO, MYO, MYO, MYO, ENDO, ENDO, ENDO, ENDO], np.uint8)[None], 3, axis=0)
    assert contours.contours(mask)[1].tolist() == [0, 0, MYO, 0, 0, 0, ENDO, 0, 0, 0]
    assert contours.thicken(contours.contours(mask))[1].tolist() == [0, MYO, MYO, MYO, 0, ENDO, ENDO, ENDO, 0, 0]
    lit = [picture != contours.CHANNEL_OFF for picture in contours.channels(fake_mask())]
    assert (np.sum(lit, axis=0) == 1).all()


def test_camus_is_cited_and_stands_beside_the_published_rows_and_what_is_missing_has_its_reasons(page):
    words = Reader(page()).words
    assert "38(9), 2198–2210, 2019" in words and "CC BY-NC-SA 4.0" in words and "ynthetic" not in words
    assert "This model, val group" in words
    rows = (*published_results.CHALLENGE, *published_results.OFFICIAL_SPLIT, *published_results.CLINICAL)
    assert all(row["name"] in words for row in rows)
    assert "0.936 / 0.912" in words and "0.845, 0.1, 7.3" in words
    assert not any('id="published"' in page(other) for other in ("phantom", "other"))
    # Missing images and indices have their reasons, and warnings their worth.
    assert "patient0009 2CH EDthe gzip is cut off" in words and "patient0005: no 2CH ES mask" in words
    assert "1 of 20 masks cannot be a whole left heart" in words and "Most often: the cavity is missing (1)." in words
    assert "a Spearman correlation of" in words and "with an AUC of" in words


def test_too_few_patients_for_agreement_still_show_why_they_have_no_ejection_fraction_and_names_stay_text(page):
    text = page("other")
    assert "<script" not in text and "&lt;script&gt;alert(2)" in text
    few = Reader(text)
    assert "Research use only, not a medical device." in few.words
    assert "<script>alert(3)</script>: no 2CH ES mask" in few.words and "Fewer than three patients" in few.words
    assert "limits of agreement" not in few.words and "EF, mean absolute error" not in few.words


def test_predictions_that_lie_on_their_side_are_named_although_their_shape_and_ejection_fraction_fit():
    cases = [Case("p", view, phase, fake_mask(), (2.5, 2.5)) for view in VIEWS for phase in PHASES]
    predictions = [Segmented(np.ascontiguousarray(case.truth.T), 0.9) for case in cases]
    summary = scoring.summarise(*map(pandas.DataFrame, scoring.score_patients(cases, predictions)))
    printed = text_tables.summary_text(summary)
    assert "4 of 4 masks cannot be a whole left heart; most often: the atrium lies beside the cavity" in printed


def test_a_bland_altman_plot_shows_the_bias_and_limits_of_agree():
    rng = np.random.default_rng(0)
    estimate = (reference := rng.normal(50, 10, 40)) + rng.normal(2, 4, 40)
    estimate[3] = np.nan
    found = agree(estimate, reference)
    axes = plots.bland_altman(estimate, reference, found, "Ejection fraction", "%").axes[0]
    heights = sorted(line.get_ydata()[0] for line in axes.lines)
    assert heights == pytest.approx(sorted([0, found["loa_low"], found["bias"], found["loa_high"]]))
    points = np.asarray(axes.collections[0].get_offsets())
    assert len(points) == 39 and points[0] == pytest.approx([(estimate[0] + reference[0]) / 2, estimate[0] - reference[0]])
    low, high = axes.get_ylim()
    assert low < points[:, 1].min() and points[:, 1].max() < high and low < found["loa_low"] < found["loa_high"] < high


def test_a_scatter_has_equal_axes_the_identity_and_r_and_a_volume_curve_marks_ed_and_es_and_leaves_gaps():
    pair = [50.0, 60, np.nan, 70], [40.0, 62, 50, 71]
    axes = plots.agreement_scatter(*pair, agree(*pair), "Ejection fraction", "%").axes[0]
    assert axes.get_xlim() == axes.get_ylim() and axes.get_aspect() == 1
    assert (axes.lines[0].get_xdata() == axes.lines[0].get_ydata()).all()
    assert axes.collections[0].get_offsets()[0].tolist() == [40, 50]  # the reference is across
    assert "r = 0.972" in axes.texts[0].get_text() and "n = 3" in axes.texts[0].get_text()
    axes = plots.volume_curve([1, 2, 3, 4], [120.0, np.nan, 60.0, 90.0], 0, 2, "ml").axes[0]
    assert [text.get_text() for text in axes.texts] == ["ED  120 ml", "ES  60 ml"]
    assert [line.get_xdata() for line in axes.lines[1:]] == [[1], [3]] and np.isnan(axes.lines[0].get_ydata()[1])


@pytest.mark.parametrize("values", [[], [50.0], [50.0, 50.0, 50.0], [np.nan, np.nan], [1.0, 2.0]])
def test_figures_of_few_values_or_none_are_drawn(values):
    for draw in (plots.bland_altman, plots.agreement_scatter):
        assert plots.save_svg(draw(values, values, agree(values, values), "EF", "%"), "few").startswith("<svg")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look with")
@pytest.mark.parametrize("width", [420, 1280])
def test_a_browser_shows_the_page_in_light_and_in_dark(page, tmp_path, width):
    (tmp_path / "report.html").write_text(page())
    look_at(tmp_path / "report.html", tmp_path, width)
