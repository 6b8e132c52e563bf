"""The table of ejection fractions compares with the dataset's own, shows who differs, and names a mistake."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.evaluation.ground_truth import TreeTruth
from heartseg.labels import VIEWS, Phase, View
from heartseg.metrics import simpson
from heartseg.storage import filesystem
from jobs import benchmark
from jobs.benchmarks import ef


@pytest.fixture
def source(phantom, tmp_path) -> str:
    return shutil.copytree(phantom, str(tmp_path / "source"))


def write_ef(source: str, patient: str, value: float | None) -> None:
    """Write another EF into both cfg files of a patient."""
    for view in VIEWS:
        camus.write_info(source, patient, view, replace(camus.read_info(source, patient, view), ef=value))


def test_the_phantoms_own_ef_is_found_by_its_own_convention(phantom, tmp_path, capsys):
    found = ef.run(ef.Options(source=phantom, out=str(tmp_path), points=0, limit=2))
    assert sorted(os.listdir(tmp_path)) == ["patient0001.png", "patient0002.png"]
    found = ef.run(ef.Options(source=phantom))
    assert len(found) == 8 and {one.convention for one in found} == {"ase"}
    assert max(abs(one.difference) for one in found) < 3  # at a quarter of the size
    printed = capsys.readouterr().out
    assert "the reference's convention is ase" in printed and "ms a patient" in printed


def test_who_differs_is_named_and_drawn_and_who_has_no_ef_is_named_with_the_reason(source, tmp_path, capsys):
    filesystem.publish(camus.recording_path(source, "patient0002", View.TWO_CHAMBER, Phase.ES, "_gt"), b"not an image")
    ours = ef.run(ef.Options(source=source))[2].row["ef_ase"]
    write_ef(source, "patient0003", ours - 12)
    found = ef.run(ef.Options(source=source, out=str(tmp_path / "out")))
    assert [one.patient for one in ef.shown(found, 5)] == ["patient0003"] and np.isnan(found[1].difference)
    assert os.listdir(tmp_path / "out") == ["patient0003.png"]
    assert Image.open(tmp_path / "out" / "patient0003.png").size[0] > 500
    printed = capsys.readouterr().out
    assert f"patient0003: {ours:.1f} %, reference {ours - 12:.1f} %" in printed
    assert "patient0002: no EF: no 2CH ES mask" in printed


def test_a_reference_file_goes_before_the_cfg_files(source):
    filesystem.publish_json(filesystem.join(source, ef.REFERENCE), {"patient0004": [100, 45, 55.0]})
    (one,) = ef.run(ef.Options(source=source))
    assert (one.patient, one.reference, one.convention) == ("patient0004", 55.0, "camus")


def test_the_drawn_axis_runs_from_the_mitral_plane_to_the_apex(phantom):
    case = TreeTruth(phantom).cases(["patient0001"])[0][2]
    axis = simpson.long_axis(case.truth, case.spacing_mm)
    (base_row, _), (apex_row, apex_column) = axis
    rows, columns = np.nonzero(case.truth == 1)
    assert abs(apex_row - rows.min()) < 4 and columns.min() <= apex_column <= columns.max()
    assert rows.mean() < base_row <= rows.max() + 1
    drawn = ef.drawn(case)
    row, column = ((axis.mean(axis=0) + 0.5) * np.array(drawn.shape[:2]) / case.truth.shape).astype(int)
    assert (drawn[row - 2 : row + 3, column - 2 : column + 3] == 255).all(axis=2).any()


def test_a_mistake_names_the_thing(source):
    with pytest.raises(UserError, match="--source is missing"):
        benchmark.job(["ef"])
    with pytest.raises(UserError, match="--limit and --points must be at least 0"):
        benchmark.job(["ef", "--source", source, "--limit", "-1"])
    info = camus.read_info(source, "patient0001", View.TWO_CHAMBER)
    camus.write_info(source, "patient0001", View.TWO_CHAMBER, replace(info, ef_convention="camus"))
    with pytest.raises(UserError, match="EFConvention ase, camus: give all of them one"):
        ef.run(ef.Options(source=source))
    for patient in camus.find_patients(source):
        write_ef(source, patient, None)
    with pytest.raises(UserError, match="has no reference EF"):
        benchmark.job(["ef", "--source", source])
