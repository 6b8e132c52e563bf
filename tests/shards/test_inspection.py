"""Inspection shows exactly what shards hold, and names every file that is not what was written."""

import os
import shutil
import weakref

import numpy as np
import pandas
import pyarrow as pa
import pytest

from heartseg.config.experiment import ImageConfig, SplitConfig
from heartseg.datasets import camus
from heartseg.errors import UserError
from heartseg.shards import inspection, reader, writer
from heartseg.storage import filesystem
from jobs import inspect_shards

GRID = ImageConfig(height=48, width=40)
PARTS = ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


@pytest.fixture(scope="module")
def written(phantom, tmp_path_factory) -> str:
    """Shards of six phantom patients in three parts; one of them has a still in quarantine."""
    out = str(tmp_path_factory.mktemp("inspected"))
    source = shutil.copytree(phantom, str(tmp_path_factory.mktemp("source") / "tree"))
    patients = camus.find_patients(source)[:6]
    os.remove(camus.recording_path(source, patients[0], "2CH", "ES"))
    chunks = [patients[start : start + 2] for start in (0, 2, 4)]
    tree = camus.CamusTree(source)
    parts = [writer.write_part(tree, out, name, chunk, GRID) for name, chunk in zip(PARTS, chunks, strict=True)]
    manifest = writer.write_manifest(out, "phantom", GRID, parts, {})
    writer.write_splits(out, SplitConfig(kind="ratio", test_share=0.34), manifest["patients"], {})
    return out


@pytest.fixture
def copied(written, tmp_path) -> str:
    return shutil.copytree(written, str(tmp_path / "shards"))


def damaged(path: str) -> list[str]:
    return sorted(file for file, _ in inspection.find_damage(path))


def test_numbers_equal_a_direct_computation(phantom, written):
    opened = reader.open_shards(written)
    found, _ = inspection.survey(opened)
    frames = reader.load_groups(opened, opened.groups).values()
    images = np.concatenate([group.images.numpy() for group in frames]) + 0.0
    masks = np.concatenate([group.masks.numpy() for group in frames])
    assert len(found.frames) == len(images) == 23
    expected = {name: getattr(images, name)() for name in ("min", "max", "mean", "std")}
    assert found.intensity == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(found.labels, [(masks == label).sum() for label in range(4)])
    tables = {title.split(" in %")[0]: rows for title, _, rows in inspect_shards.survey_tables(opened, found)}
    stills = {"2CH ED": "6", "2CH ES": "5", "4CH ED": "6", "4CH ES": "6"}
    assert {name: count for name, count, _ in tables["Views and phases"]} == stills
    infos = [camus.read_info(phantom, row["patient"], row["view"]) for row in rows_of(opened)]
    qualities = [info.quality for info in infos]
    assert [row[:2] for row in tables["Image quality"]] == [(q, str(qualities.count(q))) for q in sorted({*qualities})]
    assert found.frames.ef.tolist() == [info.ef for info in infos]
    assert sum(int(row[1]) for row in tables["Ejection fraction"]) == 6


def rows_of(opened: reader.Shards) -> list[dict]:
    return [row for part in opened.manifest["parts"] for row in reader.read_part(opened, part).to_pylist()]


def test_ejection_fractions_fall_into_their_bins_and_every_patient_into_one():
    assert inspection.ef_counts(pandas.Series([29.9, 30.0, 55.5, None, 70.0, 99.0])) == {
        "below 30": 1, "30 to 40": 1, "40 to 50": 0, "50 to 60": 1, "60 to 70": 0, "70 and above": 2, "not known": 1,
    }  # fmt: skip


def test_groups_and_patients_in_none_are_counted(copied):
    split = filesystem.read_json(os.path.join(copied, writer.SPLITS))
    left = split["groups"]["test"].pop()
    filesystem.publish_json(os.path.join(copied, writer.SPLITS), split)
    opened = reader.open_shards(copied)
    _, heading, rows = inspect_shards.survey_tables(opened, inspection.survey(opened)[0])[0]
    rows_left = opened.manifest["patients"][left]["rows"]
    assert heading == ("group", "patients", "images") and ("in no group", "1", str(rows_left)) in rows
    assert sum(int(row[2]) for row in rows) == 23 and sum(int(row[1]) for row in rows) == 6


def test_one_part_is_in_memory_at_a_time(written, monkeypatch):
    opened, alive, most = reader.open_shards(written), [], []
    real = reader.as_frames

    def watched(table, image):
        frames = real(table, image)
        alive.append(weakref.ref(frames.images))
        most.append(sum(reference() is not None for reference in alive))
        return frames

    monkeypatch.setattr(reader, "as_frames", watched)
    _, kept = inspection.survey(opened, range(23))
    assert len(most) == 3 and max(most) <= 2 and len(kept) == 23  # the last part goes when the next one has come


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"{}", b'{"format": 3}', b'{"groups": {"train": 3}}'])
@pytest.mark.parametrize("file", [writer.MANIFEST, writer.SPLITS])
def test_a_manifest_or_split_that_is_not_json_of_ours_is_named(file, text, copied):
    filesystem.publish(os.path.join(copied, file), text)
    assert damaged(copied) == [file]


def test_a_manifest_with_a_wrong_list_of_parts_is_damage_and_not_a_crash(copied):
    path = os.path.join(copied, writer.MANIFEST)
    for parts in (7, ["x"], [{"file": 3}]):
        filesystem.publish_json(path, filesystem.read_json(path) | {"parts": parts})
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
    path, manifest_path = os.path.join(folder, PARTS[0]), os.path.join(folder, writer.MANIFEST)
    num_bytes, digest = filesystem.write_table(path, change(filesystem.read_table(filesystem.read_bytes(path))))
    manifest = filesystem.read_json(manifest_path)
    manifest["parts"][0] |= {"bytes": num_bytes, "sha256": digest}
    filesystem.publish_json(manifest_path, manifest)


def with_column(table: pa.Table, name: str, change) -> pa.Table:
    values, kind = table[name].to_pylist(), table.schema.field(name)
    values[1] = change(values[1])
    return table.set_column(table.column_names.index(name), kind, pa.array(values, kind.type))


ROW_DAMAGE = {
    "label 7": (lambda t: with_column(t, "mask", lambda raw: b"\7" + raw[1:]), "row 1 has labels above 3"),
    "native mask cut off": (lambda t: with_column(t, "native_mask", lambda raw: raw[:9]), "rows that the manifest describes"),
    "native shape": (lambda t: with_column(t, "native_shape", lambda _: [3, 3]), "rows that the manifest describes"),
    "spacing": (lambda t: with_column(t, "spacing_mm", lambda _: [0.0, 1.0]), "row 1 has a spacing"),
    "no mask": (lambda t: t.drop_columns(["mask"]), "the columns differ"),
    "a row less": (lambda t: t.slice(1), "6 rows instead of 7"),
    "a stranger": (lambda t: with_column(t, "patient", lambda _: "patient9999"), "patient9999 is not in the manifest"),
}


@pytest.mark.parametrize("kind", ROW_DAMAGE)
def test_invalid_rows_are_found_although_the_hash_is_right(kind, copied):
    change, reason = ROW_DAMAGE[kind]
    rewrite(copied, lambda table: table)
    assert damaged(copied) == []
    rewrite(copied, change)
    ((file, found),) = inspection.find_damage(copied)
    assert file == PARTS[0] and reason in found


def test_the_page_and_the_sheet_show_the_drawn_images_and_the_seed_draws_them_again(written, tmp_path, capsys):
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
    said = capsys.readouterr().out
    assert "23 images of 6 patients" in said and "is intact" in said and "Left atrium" in said


def test_drawn_rows_are_the_rows_at_their_positions(written):
    opened = reader.open_shards(written)
    picked = inspection.draw_rows(23, 6, seed=3)
    assert len(set(picked)) == 6 and inspection.draw_rows(23, 99, seed=3) == list(range(23))
    _, kept = inspection.survey(opened, picked)
    for place, row in zip(picked, kept, strict=True):
        expected = rows_of(opened)[place]
        assert (row["patient"], row["view"], row["phase"]) == (expected["patient"], expected["view"], expected["phase"])
        assert row["image"].flags.owndata and row["mask"].flags.owndata  # a view would keep its part in memory
        assert row["image"].tobytes() == expected["image"] and row["mask"].tobytes() == expected["mask"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--data is missing"),
        (["--data", "/nowhere"], "holds no finished shards"),
        (["--data", "/nowhere", "--verify"], "holds no finished shards"),
        (["--data", "/nowhere", "--images", "0"], "--images must be"),
    ],
)
def test_a_mistake_is_named_in_one_line(arguments, said, monkeypatch):
    monkeypatch.delenv("HEARTSEG_DATA", raising=False)
    with pytest.raises(UserError, match=said):
        inspect_shards.job(arguments)
