"""Volumes and EF of real hearts against those of the CAMUS authors' own script, on the same label maps."""

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest

from heartseg.datasets import camus
from heartseg.labels import PHASES, VIEWS
from heartseg.metrics import cardiac_indices
from heartseg.metrics.agreement import agree
from helpers.experiments import CAMUS, skip_or_fail

# Why the authors' script differs on 224 rows, where its 8 pixels are 5.2 mm. On the same label maps with the release's
# pixels of 0.308 mm it returns 60.2, 21.6 and 50.0 instead of 54.8, 27.3 and 38.5; ours are 60.3, 21.8 and 58.4.
# patient0001 differs as much, unexplained.
EXPLAINED = {
    "patient0033": "2CH ES: the base runs up the side wall, which is within 8 pixels of it, so the axis is 3 mm short",
    "patient0034": "2CH ED: the same, 8 mm short",
    "patient0039": "a ventricle 33 mm long at ES: disks at apex and base are narrower than the 16 pixels it starts with",
}


@pytest.mark.real_data
def test_the_camus_convention_agrees_with_the_authors_script_and_ase_is_about_nine_points_above(measurement):
    if not (path := Path(CAMUS, "ef_reference.json")).exists():
        skip_or_fail(f"{path} does not exist")
    reference, masks = json.loads(path.read_text()), {}  # [EDV, ESV, EF] of 40 patients
    for patient in reference:
        stills = {still: camus.read_still(CAMUS, patient, *still) for still in itertools.product(VIEWS, PHASES)}
        masks[patient] = {still: (recording.mask, recording.spacing_mm) for still, recording in stills.items()}
    start = time.process_time()
    rows = {patient: cardiac_indices.patient_indices(pairs) for patient, pairs in masks.items()}
    ms, patients = 1000 * (time.process_time() - start) / len(rows), list(reference)
    ef, expected = (np.array(v) for v in ([rows[p]["ef_camus"] for p in patients], [reference[p][2] for p in patients]))
    kept = np.array([patient not in EXPLAINED for patient in patients])
    both = {"all": agree(ef, expected), "kept": agree(ef[kept], expected[kept])}
    measurement(f"EF of {len(ef)} real patients, {ms:.1f} ms each: {both['all']}, median {np.median(abs(ef - expected)):.2f}")
    assert not any(row["reason"] for row in rows.values())
    assert np.median(abs(ef - expected)) <= 1.2
    assert kept.sum() >= len(patients) - 3 and both["kept"]["mae"] <= 1.5 and both["kept"]["r"] >= 0.98
    for position, name in enumerate(("edv_ml_camus", "esv_ml_camus")):
        volumes = agree([rows[p][name] for p in patients], [reference[p][position] for p in patients])
        assert volumes["r"] > 0.995 and abs(volumes["bias"]) < 1.5
    found = agree([rows[p]["ef_ase"] for p in patients], expected)
    assert found["r"] >= 0.94 and 8 < found["bias"] < 11
