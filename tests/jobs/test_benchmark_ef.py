"""The table of ejection fractions compares with what the dataset says, shows who differs, and names a mistake."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.labels import VIEWS, Phase, View
from heartseg.metrics import simpson
from heartseg.storage import filesystem
from jobs import benchmark
from jobs.benchmarks import ef


@pytest.fixture
def source(phantom, tmp_path) -> str:
    return shutil.copytree(phantom, str(tmp_path / "source"))


def say(source: str, patient: str, value: float | None) -> None:
    """Write another EF into both cfg files of a patient."""
    for view in VIEWS:
        camus.write_info(source, patient, view, replace(camus.read_info(source, patient, view), ef=value))


def test_the_phantoms_own_ef_is_found_by_its_own_convention(phantom, capsys):
    found = ef.run(ef.Options(source=phantom))
    assert len(found) == 8 and {one.convention for one in found} == {"ase"}
    assert max(abs(one.difference) for one in found) < 3  # at a quarter of the size
    printed = capsys.readouterr().out
    assert "the reference's convention is ase" in printed and "ms a patient" in printed


def test_who_differs_is_named_and_drawn(source, tmp_path, capsys):
    found = ef.run(ef.Options(source=source))
    say(source, "patient0003", found[2].row["ef_ase"] - 12)
    again = ef.run(ef.Options(source=source, out=str(tmp_path / "out")))
    assert [one.patient for one in ef.shown(again, 5)] == ["patient0003"]
    assert os.listdir(tmp_path / "out") == ["patient0003.png"]
    assert Image.open(tmp_path / "out" / "patient0003.png").size[0] > 500
    printed = capsys.readouterr().out
    assert f"patient0003: {found[2].row['ef_ase']:.1f} %, reference {found[2].row['ef_ase'] - 12:.1f} %" in printed


def test_the_axis_runs_from_the_mitral_plane_to_the_apex(phantom):
    recording = camus.read_still(phantom, "patient0001", View.FOUR_CHAMBER, Phase.ED)
    (base_row, _), (apex_row, apex_column) = simpson.long_axis(recording.mask, recording.spacing_mm)
    rows, columns = np.nonzero(recording.mask == 1)
    assert abs(apex_row - rows.min()) < 4 and columns.min() <= apex_column <= columns.max()
    assert rows.mean() < base_row <= rows.max() + 1
    drawn = ef.drawn(recording)
    factor = np.array(drawn.shape[:2]) / recording.mask.shape
    middle = ((np.array(simpson.long_axis(recording.mask, recording.spacing_mm)).mean(axis=0) + 0.5) * factor).astype(int)
    assert (drawn[middle[0] - 2 : middle[0] + 3, middle[1] - 2 : middle[1] + 3] == 255).all(axis=2).any()


def test_a_damaged_still_is_a_reason_and_no_number(source, capsys):
    path = camus.recording_path(source, "patient0002", View.TWO_CHAMBER, Phase.ES, "_gt")
    filesystem.publish(path, b"no picture")
    found = {one.patient: one for one in ef.run(ef.Options(source=source))}
    assert np.isnan(found["patient0002"].difference)
    assert "patient0002: no EF: no 2CH ES mask" in capsys.readouterr().out


def test_everybody_is_drawn_where_no_difference_is_too_small(phantom, tmp_path, capsys):
    ef.run(ef.Options(source=phantom, out=str(tmp_path), points=0, limit=2))
    assert sorted(os.listdir(tmp_path)) == ["patient0001.png", "patient0002.png"]
    assert "ase, those within 0 points" in capsys.readouterr().out


def test_conventions_that_differ_are_not_mixed(source):
    info = camus.read_info(source, "patient0001", View.TWO_CHAMBER)
    camus.write_info(source, "patient0001", View.TWO_CHAMBER, replace(info, ef_convention="camus"))
    with pytest.raises(UserError, match="EFConvention ase, camus: give all of them one"):
        ef.references(source)


def test_a_mistake_names_the_thing(source):
    with pytest.raises(UserError, match="--source is missing"):
        benchmark.job(["ef"])
    with pytest.raises(UserError, match="--limit and --points must be at least 0"):
        benchmark.job(["ef", "--source", source, "--limit", "-1"])
    for patient in camus.find_patients(source):
        say(source, patient, None)
    with pytest.raises(UserError, match="says nobody's EF"):
        benchmark.job(["ef", "--source", source])
