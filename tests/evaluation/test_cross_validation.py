"""Evaluations that share no patient, pooled: the same numbers as one evaluation of everybody, and refusals."""

import io
import os
import shutil

import numpy as np
import pytest

from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.evaluation import cross_validation
from heartseg.evaluation.scoring import EXAMPLES
from heartseg.metrics.segmentation import SCORES
from heartseg.storage import filesystem
from jobs import evaluate


def score(masks: str, truth: str, out: str) -> str:
    return evaluate.run(evaluate.Options(predictions=masks, truth=truth, out=out, launcher="plain"))


@pytest.fixture(scope="module")
def halves(phantom, tmp_path_factory) -> tuple[list[str], str]:
    """Evaluations of patients 1 to 4 and of 5 to 8, whose masks are the other phase's, and one of all of them."""
    folder = tmp_path_factory.mktemp("halves")
    images = os.path.join(phantom, camus.IMAGES_FOLDER)
    names = sorted(os.listdir(images))
    for place, name in enumerate(names):
        for part in ("all", "half1" if place < 4 else "half2"):
            os.makedirs(folder / part / name)
            for view in ("2CH", "4CH"):  # the masks of the other phase: not perfect, and different from patient to patient
                for taken, given in (("ED", "ES"), ("ES", "ED")):
                    source = os.path.join(images, name, f"{name}_{view}_{taken}_gt.nii.gz")
                    shutil.copy(source, folder / part / name / f"{name}_{view}_{given}_gt.nii.gz")
    made = {part: score(str(folder / part), phantom, str(folder / f"out-{part}")) for part in ("half1", "half2", "all")}
    return [made["half1"], made["half2"]], made["all"]


def test_pooled_scores_are_those_of_one_evaluation_of_everybody(halves, tmp_path):
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


def test_the_pictures_are_the_worst_and_the_best_of_all_parts(halves, tmp_path):
    parts, whole = halves
    cross_validation.pool(parts, str(tmp_path))
    shown = []
    for path in (str(tmp_path), whole):
        with np.load(io.BytesIO(filesystem.read_bytes(filesystem.join(path, EXAMPLES)))) as arrays:
            shown.append({name: arrays[name] for name in arrays.files})
    assert shown[0].keys() == shown[1].keys()
    assert all(np.array_equal(shown[0][name], shown[1][name]) for name in shown[0])


def test_what_cannot_be_one_evaluation_is_refused(halves, tmp_path):
    parts, whole = halves
    with pytest.raises(UserError, match="patient0001 is scored in"):
        cross_validation.pool([parts[0], whole], str(tmp_path))
    with pytest.raises(UserError, match="is not an evaluation"):
        cross_validation.pool([parts[0], str(tmp_path)], str(tmp_path / "out"))
    with pytest.raises(UserError, match="pooled once"):
        cross_validation.pool([parts[0], parts[0]], str(tmp_path))
    with pytest.raises(UserError, match="none is written over"):
        cross_validation.pool(parts, parts[0])
    with pytest.raises(UserError, match="and nothing else"):
        evaluate.run(evaluate.Options(pool=tuple(parts), checkpoint="run", out=str(tmp_path)))
    trained = str(shutil.copytree(parts[0], tmp_path / "trained"))
    summary = filesystem.read_json(filesystem.join(trained, "summary.json"))
    filesystem.publish_json(filesystem.join(trained, "summary.json"), summary | {"group": "train"})
    with pytest.raises(UserError, match="was trained on"):
        cross_validation.pool([trained, parts[1]], str(tmp_path / "out"))
    with pytest.raises(UserError, match="--out"):
        evaluate.run(evaluate.Options(pool=tuple(parts)))


def test_images_are_divided_into_thirds_by_the_share_that_the_experts_heart_fills(halves):
    summary = filesystem.read_json(filesystem.join(halves[1], "summary.json"))
    thirds = summary["by"]["size"]
    assert [part["images"] for part in thirds.values()] == [11, 10, 11] and [name[0] for name in thirds] == ["1", "2", "3"]
    whole = sum(part["images"] * part["dice"] for part in thirds.values()) / 32
    assert whole == pytest.approx(summary["scores"]["dice"]["mean"])
