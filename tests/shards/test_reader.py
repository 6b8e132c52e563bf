"""Shards hold exactly what was read, and nothing that reads them trusts what is there."""

import gzip
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from heartseg.config.experiment import ImageConfig, SplitConfig
from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.labels import Phase, View
from heartseg.shards import reader, writer
from heartseg.storage import filesystem
from heartseg.training import run_directory
from helpers.experiments import tiny_experiment

GRID = ImageConfig(height=48, width=40)


def write(source: str, out: str, patients: list[str]) -> None:
    """Shards of some patients in parts of three, with manifest and split."""
    tree, chunks = camus.CamusTree(source), enumerate([patients[:3], patients[3:]])
    parts = [writer.write_part(tree, out, f"part-{i:05d}.parquet", chunk, GRID) for i, chunk in chunks]
    manifest = writer.write_manifest(out, tree.dataset_name(), GRID, parts, {})
    writer.write_splits(out, SplitConfig(kind="ratio", test_share=0.34), manifest["patients"], {})


@pytest.fixture(scope="module")
def patients(phantom) -> list[str]:
    return camus.find_patients(phantom)[:6]


@pytest.fixture(scope="module")
def written(phantom, patients, tmp_path_factory) -> str:
    """Shards of six phantom patients in two parts: four to train, two to test."""
    folder = str(tmp_path_factory.mktemp("written"))
    write(phantom, folder, patients)
    return folder


@pytest.fixture
def copied(written, tmp_path) -> str:
    """The same shards, to damage."""
    return shutil.copytree(written, str(tmp_path / "shards"))


def part_path(folder: str, number: int) -> str:
    return os.path.join(folder, f"part-{number:05d}.parquet")


def rows_of(folder: str, groups: tuple[str, ...] = ("train", "test")):
    """(frames, index, row of the table) for every row of a folder's groups."""
    for frames in reader.load_groups(reader.open_shards(folder), groups).values():
        for index, row in enumerate(frames.table.to_pylist()):
            yield frames, index, row


def test_rows_read_back_exactly_as_the_tree_has_them(phantom, patients, written):
    seen = set()
    for frames, index, row in rows_of(written):
        still = camus.read_still(phantom, row["patient"], View(row["view"]), Phase(row["phase"]))
        seen.add((row["patient"], row["view"], row["phase"]))
        image, mask = writer.resize_image(still.image, 48, 40), writer.resize_mask(still.mask, 48, 40)
        np.testing.assert_array_equal(frames.images[index, 0].numpy(), image)
        np.testing.assert_array_equal(frames.masks[index].numpy(), mask)
        np.testing.assert_array_equal(frames.native_mask(index), still.mask)
        assert row["native_spacing_mm"] == list(still.spacing_mm) and row["native_shape"] == list(still.image.shape)
        size_mm = np.multiply(row["native_spacing_mm"], row["native_shape"])
        np.testing.assert_allclose(np.multiply(row["spacing_mm"], [48, 40]), size_mm)
        assert (row["frame"], row["ef"], row["sex"]) == (still.frame, still.info.ef, still.info.sex)
        assert row["ef_convention"] == still.info.ef_convention
    assert seen == {(p, view, phase) for p in patients for view, phase in camus.stills_of()}


def test_groups_are_by_patient_every_row_is_in_one_and_intensity_is_that_of_the_training_pixels(written):
    opened = reader.open_shards(written)
    found = {group: {row["patient"] for _, _, row in rows_of(written, (group,))} for group in opened.groups}
    assert found == {group: set(names) for group, names in opened.groups.items()}
    assert (opened.num_rows("train"), opened.num_rows("test")) == (16, 8) and opened.image == GRID
    pixels = reader.load_groups(opened, ("train",))["train"].images.numpy() / 255.0
    assert opened.intensity == pytest.approx((pixels.mean(), pixels.std()), rel=1e-9)


@given(mask=st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda s: arrays("uint8", s, elements=st.integers(0, 3))))
def test_resized_masks_hold_only_labels_at_pixel_centres_and_equal_size_changes_nothing(mask):
    height, width = mask.shape
    np.testing.assert_array_equal(writer.resize_mask(mask, height, width), mask)
    rows = ((np.arange(7) + 0.5) * height / 7).astype(int)
    columns = ((np.arange(5) + 0.5) * width / 5).astype(int)
    np.testing.assert_array_equal(writer.resize_mask(mask, 7, 5), mask[np.ix_(rows, columns)])


def test_a_resized_image_is_antialiased():
    stripes = np.tile(np.array([0, 200, 200, 0], np.uint8), (64, 16))  # every fourth point alone would see 200 only
    np.testing.assert_allclose(writer.resize_image(stripes, 16, 16)[:, 2:-2], 100, atol=1)
    np.testing.assert_array_equal(writer.resize_image(stripes, 64, 64), stripes)


@given(number=st.integers(0, 1), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_one_changed_byte_anywhere_is_refused_by_the_name_of_its_part(written, number, where, flip, tmp_path_factory):
    folder = shutil.copytree(written, str(tmp_path_factory.mktemp("flip") / "s"))
    data = bytearray(filesystem.read_bytes(part_path(folder, number)))
    data[int(where * len(data))] ^= flip
    filesystem.publish(part_path(folder, number), bytes(data))
    with pytest.raises(UserError, match=rf"part-0000{number}\.parquet is damaged"):
        list(rows_of(folder))


def test_damaged_recordings_go_to_quarantine_and_the_good_ones_stay(phantom, patients, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    for patient in patients[:4]:
        shutil.copytree(os.path.join(phantom, "database_nifti", patient), os.path.join(source, "database_nifti", patient))
    first, second = patients[:2]
    os.truncate(camus.recording_path(source, first, View.FOUR_CHAMBER, Phase.ES), 50)
    for view, phase in camus.stills_of():
        os.remove(camus.recording_path(source, second, view, phase, "_gt"))
    write(source, out, patients[:4])
    opened = reader.open_shards(out)
    quarantined = opened.manifest["quarantined"]
    assert {(e["patient"], e["view"], e["phase"]) for e in quarantined} == {(first, "4CH", "ES")} | {
        (second, str(view), str(phase)) for view, phase in camus.stills_of()
    }
    by_patient = {e["patient"]: e for e in quarantined}
    assert "gzip" in by_patient[first]["reason"] and "cannot be read" in by_patient[second]["reason"]
    assert by_patient[first]["file"] == f"database_nifti/{first}/{first}_4CH_ES.nii.gz"
    assert all(second not in names for names in opened.groups.values())
    there = [(row["patient"], row["view"], row["phase"]) for _, _, row in rows_of(out)]
    expected = {(p, str(v), str(f)) for p in patients[:4] for v, f in camus.stills_of()}
    assert set(there) == expected - {(e["patient"], e["view"], e["phase"]) for e in quarantined}
    assert len(there) == opened.manifest["rows"] == 11


def change_json(path: str, change) -> None:
    value = filesystem.read_json(path)
    change(value)
    filesystem.publish_json(path, value)


def name_a_part(name: str):
    return writer.MANIFEST, lambda manifest: manifest["parts"][0].update(file=name), "names a part .*, which is not one"


CHANGES = {
    "no patients": (writer.MANIFEST, lambda manifest: manifest.pop("patients"), "has no patients"),
    "patients of another type": (writer.MANIFEST, lambda manifest: manifest.update(patients=[]), "is not a manifest"),
    "format": (writer.MANIFEST, lambda manifest: manifest.update(format=99), "format 99"),
    "a stranger": (writer.SPLITS, lambda split: split["groups"]["test"].append("patient9999"), "patient9999"),
    "a patient twice": (writer.SPLITS, lambda split: split["groups"].update(test=split["groups"]["train"][:1]), "is in both"),
} | {name: name_a_part(name) for name in ("../x", "/etc/passwd", "part-00000.parquet/../../x", "part-0.parquet", "")}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_manifest_or_split_that_cannot_be_ours_is_refused(kind, copied):
    file, change, message = CHANGES[kind]
    change_json(os.path.join(copied, file), change)
    with pytest.raises(UserError, match=message):
        reader.open_shards(copied)


def test_a_folder_without_a_part_or_a_manifest_or_with_a_truncated_one_is_refused(copied):
    os.remove(part_path(copied, 1))
    with pytest.raises(UserError, match=r"part-00001\.parquet cannot be read \(No such file"):
        list(rows_of(copied))
    os.truncate(os.path.join(copied, writer.MANIFEST), 20)
    with pytest.raises(UserError, match=r"manifest\.json is missing or not valid JSON"):
        reader.open_shards(copied)
    os.remove(os.path.join(copied, writer.MANIFEST))
    with pytest.raises(UserError, match="holds no finished shards"):
        reader.open_shards(copied)


def test_the_fingerprint_follows_pixels_and_groups_and_no_compression_of_the_source(phantom, patients, copied, tmp_path):
    source = shutil.copytree(phantom, str(tmp_path / "source"))
    path = camus.recording_path(source, patients[0], View.FOUR_CHAMBER, Phase.ED)
    packed = filesystem.read_bytes(path)
    filesystem.publish(path, gzip.compress(gzip.decompress(packed), 1))
    assert filesystem.read_bytes(path) != packed
    write(source, str(tmp_path / "again"), patients)
    original, again = reader.open_shards(copied), reader.open_shards(str(tmp_path / "again"))
    assert again.fingerprint == original.fingerprint
    assert run_directory.run_name(tiny_experiment(), again) == run_directory.run_name(tiny_experiment(), original)
    change_json(os.path.join(copied, writer.SPLITS), lambda v: v["groups"]["test"].pop())
    assert reader.open_shards(copied).fingerprint != original.fingerprint
