"""Shards hold exactly what was read; nothing that reads them trusts what is there, and inspection names what is damaged."""

import gzip
import os
import shutil
import weakref

import numpy as np
import pandas
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from heartseg.config.experiment import ImageConfig, SplitConfig
from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.labels import Phase, View
from heartseg.shards import inspection, reader, writer
from heartseg.storage import filesystem
from heartseg.training import run_directory
from helpers.experiments import tiny_experiment
from jobs import inspect_shards

GRID = ImageConfig(height=48, width=40)
PARTS = ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


def write(source: str, out: str, patients: list[str]) -> None:
    """Shards of some patients in three parts, with manifest and split."""
    tree, chunks = camus.CamusTree(source), (patients[:2], patients[2:4], patients[4:])
    parts = [writer.write_part(tree, out, name, chunk, GRID) for name, chunk in zip(PARTS, chunks, strict=True)]
    manifest = writer.write_manifest(out, tree.dataset_name(), GRID, parts, {})
    writer.write_splits(out, SplitConfig(kind="ratio", test_share=0.34), manifest["patients"], {})


@pytest.fixture(scope="module")
def patients(phantom) -> list[str]:
    return camus.find_patients(phantom)[:6]


@pytest.fixture(scope="module")
def written(phantom, patients, tmp_path_factory) -> str:
    """Shards of six phantom patients: four to train, two to test."""
    folder = str(tmp_path_factory.mktemp("written"))
    write(phantom, folder, patients)
    return folder


@pytest.fixture
def copied(written, tmp_path) -> str:
    return shutil.copytree(written, str(tmp_path / "shards"))


def rows_of(folder: str, groups: tuple[str, ...] = ("train", "test")):
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
    np.testing.assert_allclose(writer.resize_image(stripes[:16], 32, 16)[:, 2:-2], 100, atol=1)  # one side grows
    np.testing.assert_allclose(writer.resize_image(stripes[:16].T.copy(), 16, 32)[2:-2], 100, atol=1)
    np.testing.assert_array_equal(writer.resize_image(stripes, 64, 64), stripes)


@given(part=st.sampled_from(PARTS), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_one_changed_byte_anywhere_is_refused_by_the_name_of_its_part(written, part, where, flip, tmp_path_factory):
    folder = shutil.copytree(written, str(tmp_path_factory.mktemp("flip") / "s"))
    data = bytearray(filesystem.read_bytes(os.path.join(folder, part)))
    data[int(where * len(data))] ^= flip
    filesystem.publish(os.path.join(folder, part), bytes(data))
    with pytest.raises(UserError, match=f"{part} is damaged"):
        list(rows_of(folder))


def test_damaged_recordings_go_to_quarantine_and_the_good_ones_stay(phantom, patients, tmp_path):
    source, out = shutil.copytree(phantom, str(tmp_path / "source")), str(tmp_path / "out")
    first, second = patients[:2]
    os.truncate(camus.recording_path(source, first, View.FOUR_CHAMBER, Phase.ES), 50)
    for view, phase in camus.stills_of():
        os.remove(camus.recording_path(source, second, view, phase, "_gt"))
    write(source, out, patients)
    opened = reader.open_shards(out)
    named = {(entry["patient"], entry["view"], entry["phase"]) for entry in opened.manifest["quarantined"]}
    assert named == {(first, "4CH", "ES"), *((second, *still) for still in camus.stills_of())}
    assert all(second not in names for names in opened.groups.values())
    there = [(row["patient"], row["view"], row["phase"]) for _, _, row in rows_of(out)]
    assert {*there} == {(p, *still) for p in patients for still in camus.stills_of()} - named
    assert len(there) == opened.manifest["rows"] == 19


def change_json(path: str, change) -> None:
    value = filesystem.read_json(path)
    change(value)
    filesystem.publish_json(path, value)


CHANGES = {
    "no patients": (writer.MANIFEST, lambda manifest: manifest.pop("patients"), "lacks the key 'patients'"),
    "patients of another type": (writer.MANIFEST, lambda manifest: manifest.update(patients=[]), "is not a manifest"),
    "format": (writer.MANIFEST, lambda manifest: manifest.update(format=99), "format 99"),
    "a stranger": (writer.SPLITS, lambda split: split["groups"]["test"].append("patient9999"), "patient9999"),
    "a patient twice": (writer.SPLITS, lambda split: split["groups"].update(test=split["groups"]["train"][:1]), "is in both"),
}
for name in ("../x", "/etc/passwd", "part-00000.parquet/../../x", "part-0.parquet", ""):
    CHANGES[name] = (writer.MANIFEST, lambda m, name=name: m["parts"][0].update(file=name), "names .*, which is not a part")


@pytest.mark.parametrize(("file", "change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_manifest_or_split_that_cannot_be_ours_is_refused(file, change, message, copied):
    change_json(os.path.join(copied, file), change)
    with pytest.raises(UserError, match=message):
        reader.open_shards(copied)


def test_a_folder_without_a_part_or_a_manifest_or_with_a_truncated_one_is_refused(copied):
    os.remove(os.path.join(copied, PARTS[1]))
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


def damaged(path: str) -> list[str]:
    return sorted(file for file, _ in inspection.find_damage(path))


def test_numbers_equal_a_direct_computation(phantom, written):
    opened = reader.open_shards(written)
    found, _ = inspection.survey(opened)
    frames = reader.load_groups(opened, opened.groups).values()
    images = np.concatenate([group.images.numpy() for group in frames]) + 0.0
    masks = np.concatenate([group.masks.numpy() for group in frames])
    assert len(found.frames) == len(images) == 24
    expected = {name: getattr(images, name)() for name in ("min", "max", "mean", "std")}
    assert found.intensity == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(found.labels, [(masks == label).sum() for label in range(4)])
    tables = {title.split(" in %")[0]: rows for title, _, rows in inspect_shards.survey_tables(opened, found)}
    stills = {"2CH ED": "6", "2CH ES": "6", "4CH ED": "6", "4CH ES": "6"}
    assert {name: count for name, count, _ in tables["Views and phases"]} == stills
    infos = [camus.read_info(phantom, row["patient"], row["view"]) for row in table_rows(opened)]
    qualities = [info.quality for info in infos]
    assert [row[:2] for row in tables["Image quality"]] == [(q, str(qualities.count(q))) for q in sorted({*qualities})]
    assert found.frames.ef.tolist() == [info.ef for info in infos]
    assert sum(int(row[1]) for row in tables["Ejection fraction"]) == 6


def table_rows(opened: reader.Shards) -> list[dict]:
    return [row for part in opened.manifest["parts"] for row in reader.read_part(opened, part).to_pylist()]


def test_ejection_fractions_fall_into_their_bins_and_every_patient_into_one():
    assert inspection.ef_counts(pandas.Series([29.9, 30.0, 55.5, None, 70.0, 99.0])) == {
        "below 30": 1, "30 to 40": 1, "40 to 50": 0, "50 to 60": 1, "60 to 70": 0, "70 and above": 2, "not known": 1,
    }  # fmt: skip


def test_groups_and_patients_in_none_are_counted(copied):
    left = reader.open_shards(copied).groups["test"][-1]
    change_json(os.path.join(copied, writer.SPLITS), lambda split: split["groups"]["test"].pop())
    opened = reader.open_shards(copied)
    _, heading, rows = inspect_shards.survey_tables(opened, inspection.survey(opened)[0])[0]
    rows_left = opened.manifest["patients"][left]["rows"]
    assert heading == ("group", "patients", "images") and ("in no group", "1", str(rows_left)) in rows
    assert sum(int(row[2]) for row in rows) == 24 and sum(int(row[1]) for row in rows) == 6


def test_one_part_is_in_memory_at_a_time(written, monkeypatch):
    opened, alive, most = reader.open_shards(written), [], []
    real = reader.as_frames

    def watched(table, image):
        frames = real(table, image)
        alive.append(weakref.ref(frames.images))
        most.append(sum(reference() is not None for reference in alive))
        return frames

    monkeypatch.setattr(reader, "as_frames", watched)
    _, kept = inspection.survey(opened, range(24))
    assert len(most) == 3 and max(most) <= 2 and len(kept) == 24  # the last part goes when the next one has come


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"{}", b'{"format": 3}', b'{"groups": {"train": 3}}', b'{"groups": {"test": []}}']
)
@pytest.mark.parametrize("file", [writer.MANIFEST, writer.SPLITS])
def test_a_manifest_or_split_that_is_not_json_of_ours_is_named(file, text, copied):
    filesystem.publish(os.path.join(copied, file), text)
    assert damaged(copied) == [file]


def test_a_manifest_with_a_wrong_list_of_parts_is_damage_and_not_a_crash(copied):
    for parts in (7, ["x"], [{"file": 3}]):
        change_json(os.path.join(copied, writer.MANIFEST), lambda manifest, parts=parts: manifest.update(parts=parts))
        assert damaged(copied)


def test_every_damaged_part_is_named_and_not_only_the_first(copied, capsys):
    os.truncate(os.path.join(copied, PARTS[0]), 100)
    os.remove(os.path.join(copied, PARTS[1]))
    shutil.copy(os.path.join(copied, PARTS[2]), os.path.join(copied, "part-00009.parquet"))
    os.remove(os.path.join(copied, writer.SPLITS))
    assert damaged(copied) == [PARTS[0], PARTS[1], "part-00009.parquet", writer.SPLITS]
    with pytest.raises(UserError, match=f"4 damaged files: {PARTS[0]}, {PARTS[1]}, .*; preprocess again with --overwrite"):
        inspect_shards.job(["--data", copied, "--verify"])
    assert f"damaged  {PARTS[1]}: " in capsys.readouterr().out


def rewrite(folder: str, change) -> None:
    """Change the first part's table, and put its new hash into the manifest: what only the rows themselves show."""
    path = os.path.join(folder, PARTS[0])
    num_bytes, digest = filesystem.write_table(path, change(filesystem.read_table(filesystem.read_bytes(path))))
    new = {"bytes": num_bytes, "sha256": digest}
    change_json(os.path.join(folder, writer.MANIFEST), lambda manifest: manifest["parts"][0].update(new))


def with_column(table: pa.Table, name: str, change) -> pa.Table:
    values, kind = table[name].to_pylist(), table.schema.field(name)
    values[1] = change(values[1])
    return table.set_column(table.column_names.index(name), kind, pa.array(values, kind.type))


ROW_DAMAGE = {
    "label 7": (lambda t: with_column(t, "mask", lambda raw: b"\7" + raw[1:]), "row 1 has labels above 3"),
    "label 4": (lambda t: with_column(t, "mask", lambda raw: b"\4" + raw[1:]), "row 1 has labels above 3"),
    "native mask cut off": (lambda t: with_column(t, "native_mask", lambda raw: raw[:9]), "rows that the manifest describes"),
    "native shape": (lambda t: with_column(t, "native_shape", lambda _: [3, 3]), "rows that the manifest describes"),
    "spacing": (lambda t: with_column(t, "spacing_mm", lambda _: [0.0, 1.0]), "row 1 has a spacing"),
    "no mask": (lambda t: t.drop_columns(["mask"]), "the columns differ"),
    "a row less": (lambda t: t.slice(1), "7 rows instead of 8"),
    "a stranger": (lambda t: with_column(t, "patient", lambda _: "patient9999"), "patient9999 is not in the manifest"),
}


@pytest.mark.parametrize(("change", "reason"), ROW_DAMAGE.values(), ids=ROW_DAMAGE)
def test_invalid_rows_are_found_although_the_hash_is_right(change, reason, copied):
    rewrite(copied, lambda table: table)
    assert damaged(copied) == []
    rewrite(copied, change)
    ((file, found),) = inspection.find_damage(copied)
    assert file == PARTS[0] and reason in found


def test_the_page_and_the_sheet_show_the_drawn_images_and_the_seed_draws_them_again(phantom, patients, tmp_path, capsys):
    source, written = shutil.copytree(phantom, str(tmp_path / "source")), str(tmp_path / "written")
    os.remove(camus.recording_path(source, patients[0], "2CH", "ES"))
    write(source, written, patients)
    before = sorted(os.listdir(written))
    assert inspect_shards.run(inspect_shards.Options(written)) is None and sorted(os.listdir(written)) == before
    outs = [str(tmp_path / name) for name in "abc"]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        inspect_shards.run(inspect_shards.Options(written, out, verify=True, images=5, seed=seed))
    sheets = [filesystem.read_bytes(os.path.join(out, inspect_shards.SHEET)) for out in outs]
    assert sheets[0][:8] == b"\x89PNG\r\n\x1a\n" and sheets[0] == sheets[1] != sheets[2]
    page = filesystem.read_bytes(os.path.join(outs[0], inspect_shards.PAGE)).decode()
    assert "http" not in page.replace("http-equiv", "") and page.count("<img") == 1 and "5 images drawn" in page
    assert "_2CH_ES.nii.gz" in page  # what is in quarantine
    shown = capsys.readouterr().out
    assert "23 images of 6 patients" in shown and "is intact" in shown and "Left atrium" in shown


def test_drawn_rows_are_the_rows_at_their_positions(written):
    opened = reader.open_shards(written)
    picked = inspection.draw_rows(24, 6, seed=3)
    assert len(set(picked)) == 6 and inspection.draw_rows(24, 99, seed=3) == list(range(24))
    _, kept = inspection.survey(opened, picked)
    for place, row in zip(picked, kept, strict=True):
        expected = table_rows(opened)[place]
        assert (row["patient"], row["view"], row["phase"]) == (expected["patient"], expected["view"], expected["phase"])
        assert row["image"].flags.owndata and row["mask"].flags.owndata  # a view would keep its part in memory
        assert row["image"].tobytes() == expected["image"] and row["mask"].tobytes() == expected["mask"]


def test_a_mistake_is_named_in_one_line(monkeypatch):
    monkeypatch.delenv("HEARTSEG_DATA", raising=False)
    with pytest.raises(UserError, match="--data is missing"):
        inspect_shards.job([])
    for more, message in (([], "no finished"), (["--verify"], "no finished shards"), (["--images", "0"], "--images .0. must")):
        with pytest.raises(UserError, match=message):
            inspect_shards.job(["--data", "/nowhere", *more])
