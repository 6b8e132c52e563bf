"""Whatever a NIfTI's encoding, training, evaluation and prediction see one picture of it, with its mask on it, or refuse it."""

import gzip
import io
import itertools
import os
import re

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from heartseg.datasets import camus, nifti, readers
from heartseg.datasets.grey import BYTE, Unreadable, as_grey
from heartseg.datasets.image_folder import ImageFolder
from heartseg.evaluation.ground_truth import FilePredictions, TreeTruth
from heartseg.labels import Phase, View
from heartseg.shards.reader import load_groups, open_shards
from heartseg.storage import filesystem
from helpers.experiments import tiny_experiment
from jobs import inspect_shards, preprocess

HEIGHT, WIDTH, MM = 9, 7, 8.0
IMAGE = np.random.default_rng(0).permutation(255)[: HEIGHT * WIDTH].reshape(HEIGHT, WIDTH).astype(np.uint8)
IMAGE[0, :2] = 0, 255
MASK = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) // 3 % 4).astype(np.uint8)  # no mirror image of it is the same
STILL = "patient0001", View.FOUR_CHAMBER, Phase.ED
RANGES = [
    ((0, 255), ("u1", "i2", "u2", "f4", "f8")), ((-128, 127), ("i1", "i2")), ((0, 4095), ("u2", "f4")),
    ((0, 65535), ("u2", "i4", "f8")), ((-2048, 2047), ("i2",)), ((-32768, 32767), ("i2", "f4")), ((0, 1), ("f4", "f8")),
    ((-1, 1), ("f4",)), ((0, 100), ("f4", "f8")),
]  # fmt: skip
# How a file may lie in the world: the array's axes reversed, and the axes exchanged (lateral and depth).
TURNS = st.tuples(st.booleans(), st.booleans(), st.booleans())


def disk_array(upright: np.ndarray, turn: tuple[bool, bool, bool]) -> tuple[np.ndarray, np.ndarray]:
    """The array of a file that is turned in the world, and its affine."""
    array, affine = upright.T, np.diag([MM, MM, 1.0, 1.0])
    for axis in (axis for axis in (0, 1) if turn[axis]):
        affine[:, 3] += affine[:, axis] * (array.shape[axis] - 1)
        affine[:, axis] *= -1
        array = np.flip(array, axis)
    return (array.T, affine[:, [1, 0, 2, 3]]) if turn[2] else (array, affine)


def save(path: str, array: np.ndarray, affine: np.ndarray | None, order: str = "<") -> None:
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(array.dtype.newbyteorder(order))
    raw = nibabel.Nifti1Image(array.astype(array.dtype.newbyteorder(order)), affine, header).to_bytes()
    filesystem.publish(path, gzip.compress(raw) if path.lower().endswith("gz") else raw)


@settings(max_examples=60)  # of 10,000 combinations
@given(
    levels=st.sampled_from(RANGES).flatmap(lambda pair: st.tuples(st.just(pair[0]), st.sampled_from(pair[1]))),
    order=st.sampled_from("<>"),
    turn=TURNS,
    mask_turn=st.none() | TURNS,  # without an affine it lies as its image does
    suffix=st.sampled_from([".nii.gz", ".nii", ".NII.GZ", ".Nii"]),
)
def test_every_reader_sees_one_picture_and_the_mask_on_it(levels, order, turn, mask_turn, suffix, tmp_path_factory):
    (low, high), kind = levels
    source, folder = (str(tmp_path_factory.mktemp(name)) for name in ("camus", "folder"))
    stored = IMAGE * ((high - low) / 255) + low
    image, affine = disk_array((stored if kind[0] == "f" else np.rint(stored)).astype(kind), turn)
    mask, mask_affine = disk_array(MASK, mask_turn or turn)
    name = "_".join(STILL)
    paths = [camus.recording_path(source, *STILL, end).removesuffix(".nii.gz") for end in ("", "_gt")]
    for path in (paths[0], os.path.join(folder, "images", name)):
        save(path + suffix, image, affine, order)
    for path in (paths[1], os.path.join(folder, "masks", name), os.path.join(folder, "predictions", name + "_pred")):
        save(path + suffix, mask, mask_turn and mask_affine, order)

    seen = np.flip(IMAGE, [axis for axis in (0, 1) if turn[1 - axis]])  # signs are not undone; the order of axes is
    truth = np.flip(MASK, [axis for axis in (0, 1) if turn[1 - axis]])
    still = camus.read_still(source, *STILL)
    own = ImageFolder(folder)
    ((_, _, read),) = own.recordings(STILL[0], [file for file, *_ in own.list_files(own.patients())[STILL[0]]], "stills", {})
    ((case,), _) = TreeTruth(source).cases(STILL[:1])
    for found in (still.image, read()[0].image, case.image, *readers.read(paths[0] + suffix, "nifti").pixels):
        np.testing.assert_array_equal(found, seen)
    ((bare,), _) = TreeTruth(source, images=False).cases(STILL[:1])
    predicted, _ = FilePredictions.open(os.path.join(folder, "predictions")).masks([case, bare])
    for found in (still.mask, read()[0].mask, case.truth, bare.truth, *(one.mask for one in predicted)):
        np.testing.assert_array_equal(found, truth)


def put_pair(source: str, affine: np.ndarray | None, mask_affine: np.ndarray | None) -> None:
    save(camus.recording_path(source, *STILL), IMAGE.T, affine)
    save(camus.recording_path(source, *STILL, "_gt"), MASK.T, mask_affine)


PLAIN, ITK = (np.diag([sign * MM, sign * MM, 1.0, 1.0]) for sign in (1, -1))
REAL = np.array([[-MM, 0, 0, 30.0], [0, MM, 0, -20.0], [0, 0, 1, 5.0], [0, 0, 0, 1]])


def test_an_affine_that_a_tool_invents_turns_nothing_and_two_real_ones_that_disagree_are_a_reason(tmp_path):
    for pair in ((PLAIN, ITK), (ITK, PLAIN), (REAL, PLAIN), (PLAIN, REAL), (REAL, None), (None, None), (REAL, REAL)):
        put_pair(str(tmp_path), *pair)
        np.testing.assert_array_equal(camus.read_still(str(tmp_path), *STILL).mask, MASK)
    put_pair(str(tmp_path), REAL, REAL @ np.diag([1, -1, 1, 1]))
    with pytest.raises(nifti.DamagedRecording, match="disagree in direction") as caught:
        camus.read_still(str(tmp_path), *STILL)
    assert caught.value.file.endswith("_gt.nii.gz")


def test_the_manifest_names_the_grey_levels_of_the_files_and_inspect_shows_them(tmp_path, capsys):
    for patient in range(1, 4):
        for view, phase in camus.stills_of():
            still = f"patient{patient:04d}", view, phase
            image = IMAGE.T if patient == 1 else IMAGE.T.astype(np.float32) / 255
            save(camus.recording_path(str(tmp_path), *still), image, PLAIN)
            save(camus.recording_path(str(tmp_path), *still, "_gt"), MASK.T, PLAIN)
    out = str(tmp_path / "shards")
    preprocess.run(tiny_experiment(source=str(tmp_path), out=out), preprocess.Options(launcher="plain"))
    patients = open_shards(out).manifest["patients"]
    assert patients["patient0002"]["grey_levels"] == {"0 to 1, times 255": 4}
    inspect_shards.run(inspect_shards.Options(data=out))
    shown = capsys.readouterr().out
    assert re.search(r"0 to 1, times 255 +8\n", shown) and re.search(r"0 to 255, times 1 +4\n", shown)
    groups = load_groups(open_shards(out), ["train", "test"])
    stored = {tuple(image.ravel().tolist()) for frames in groups.values() for image in frames.images}
    assert len(stored) == 1


PICTURE = np.random.default_rng(0).permutation(256).astype(np.uint8).reshape(16, 16)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("levels", "kinds"), RANGES)
def test_one_picture_in_any_range_and_type_is_the_same_picture(levels, kinds, dark):
    first, last = levels
    expected = PICTURE // 2 if dark and last != 100 else PICTURE  # a picture need not reach the end of its range
    for order, kind in itertools.product("<>", kinds):
        stored = expected * ((last - first) / 255) + first
        grey, found = as_grey((stored if kind[0] == "f" else np.rint(stored)).astype(order + kind))
        assert grey.dtype == np.uint8 and found == levels and grey.flags.c_contiguous and grey.flags.writeable
        np.testing.assert_array_equal(grey, expected)
        if kind in ("u1", "u2"):  # what PNGs hold
            Image.fromarray(np.rint(stored).astype(kind)).save(png := io.BytesIO(), "PNG")
            np.testing.assert_array_equal(readers.decode(png.getvalue(), "picture").pixels[0], expected)


def test_grey_levels_that_may_be_several_things_are_refused_with_their_range():
    ranges = [(0, 70000), (-1, 0), (-3, 250), (-60.5, 0), (-2.1, 3.3), (0.5, 43.2), (0, 1), (0, 100), (-0.1, 0.9)]
    for low, high in [*ranges, (0, np.nan), (0, np.inf)]:
        with pytest.raises(Unreadable, match=f"{low:g} to {high:g}" if np.isfinite(high) else "not finite"):
            as_grey(np.array([low, high], float))


def test_bytes_and_averages_of_bytes_stay():
    assert as_grey(np.array([0, 1], np.uint8))[1] == as_grey(np.array([0.4, 7.6, 254.6]))[1] == BYTE
    assert as_grey(np.array([0.4, 7.6, 200.0]))[0].tolist() == [0, 8, 200]
