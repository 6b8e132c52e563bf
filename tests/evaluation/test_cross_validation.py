"""Pooled evaluations without a common patient: the same numbers as one evaluation of all patients, and refusals."""

import itertools
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.evaluation import cross_validation, scoring
from heartseg.evaluation.scoring import EXAMPLES
from heartseg.metrics.segmentation import SCORES
from heartseg.storage import filesystem
from jobs import evaluate


@pytest.fixture(scope="module")
def halves(phantom, tmp_path_factory) -> tuple[list[str], str]:
    """Evaluations of patients 1 to 4, of 5 to 8 and of all, with the other phase's masks as predictions."""
    folder = tmp_path_factory.mktemp("halves")
    images = os.path.join(phantom, camus.IMAGES_FOLDER)
    names = sorted(os.listdir(images))
    for place, name in enumerate(names):
        for part in ("all", "half1" if place < 4 else "half2"):
            os.makedirs(folder / part / name)
            # The masks of the other phase: not perfect, and different from patient to patient.
            for view, (taken, given) in itertools.product(("2CH", "4CH"), (("ED", "ES"), ("ES", "ED"))):
                source = os.path.join(images, name, f"{name}_{view}_{taken}_gt.nii.gz")
                shutil.copy(source, folder / part / name / f"{name}_{view}_{given}_gt.nii.gz")
    options, parts = evaluate.Options(truth=phantom, launcher="plain"), ("half1", "half2", "all")
    made = [evaluate.run(replace(options, predictions=f"{folder}/{part}", out=f"{folder}/out-{part}")) for part in parts]
    return made[:2], made[2]


def test_pooled_scores_and_pictures_are_those_of_one_evaluation_of_everybody_and_thirds_by_size_hold_all(halves, tmp_path):
    parts, whole = halves
    out = evaluate.run(evaluate.Options(pool=tuple(parts), out=str(tmp_path)))
    pooled, expected = (filesystem.read_json(filesystem.join(path, "summary.json")) for path in (out, whole))
    assert pooled["patients"] == 8 and pooled["group"] == "out-of-fold" and 0 < pooled["scores"]["dice"]["mean"] < 1
    for name in SCORES:
        assert pooled["scores"][name] == pytest.approx(expected["scores"][name])
        assert pooled["pooled"][name] == pytest.approx(expected["pooled"][name])
    assert pooled["clinical"]["agreement"] == expected["clinical"]["agreement"]
    page = filesystem.read_bytes(filesystem.join(out, "report.html")).decode()
    assert "masks of 2 folders" in page and parts[1] in page
    np.testing.assert_equal(*(dict(np.load(os.path.join(path, EXAMPLES))) for path in (out, whole)))
    # Thirds by the share that the experts' heart fills.
    thirds = expected["by"]["size"]
    assert [part["images"] for part in thirds.values()] == [11, 10, 11] and [name[0] for name in thirds] == ["1", "2", "3"]
    mean = sum(part["images"] * part["dice"] for part in thirds.values()) / 32
    assert mean == pytest.approx(expected["scores"]["dice"]["mean"])


def test_evaluations_that_cannot_be_pooled_are_refused(halves, tmp_path):
    parts, whole = halves
    out, refused = str(tmp_path / "out"), {}
    for key, value in {"group": "train", "dataset": "other", "post": {"tta": True}}.items():
        refused[key] = str(shutil.copytree(parts[0], tmp_path / key))
        summary = filesystem.read_json(filesystem.join(refused[key], "summary.json"))
        filesystem.publish_json(filesystem.join(refused[key], "summary.json"), summary | {key: value})
    for evaluations, to, said in (
        ([parts[0], whole], out, "patient0001 is scored in"),
        ([parts[0], str(tmp_path)], out, "is not an evaluation"),
        ([parts[0], parts[0]], out, "--pool lists a folder twice"),
        (parts, parts[0], "is one of its folders"),
        ([refused["group"], parts[1]], out, "was trained on"),
        ([parts[1], refused["dataset"]], out, "is on other, but "),
        ([parts[1], refused["post"]], out, "were postprocessed differently"),
    ):
        with pytest.raises(UserError, match=said):
            cross_validation.pool(evaluations, to)
    for options, said in (({"checkpoint": "run", "out": out}, "takes only finished evaluations"), ({}, "--out")):
        with pytest.raises(UserError, match=said):
            evaluate.run(evaluate.Options(pool=tuple(parts), **options))


def test_evaluations_from_before_an_index_was_measured_are_pooled_without_it(halves, tmp_path):
    older = [str(shutil.copytree(part, tmp_path / str(number))) for number, part in enumerate(halves[0])]
    for path in older:
        rows = scoring.read_rows(path, scoring.PATIENTS).drop(columns=["endo_strain_prediction", "endo_strain_truth"])
        filesystem.write_table(f"{path}/{scoring.PATIENTS}", pa.Table.from_pandas(rows, preserve_index=False))
    agreement = cross_validation.pool(older, str(tmp_path / "out"))["clinical"]["agreement"]
    assert "endo_strain" not in agreement and agreement["lv_mass_g"]["n"] == 8
