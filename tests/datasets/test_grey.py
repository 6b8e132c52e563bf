"""One rule turns grey values of every type into bytes, and refuses what may be several things."""

import numpy as np
import pytest

from heartseg.datasets.grey import BYTE, Unreadable, as_grey

PICTURE = np.random.default_rng(0).permutation(256).astype(np.uint8).reshape(16, 16)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(
    ("first", "last", "kinds"),
    [
        (0, 255, ("u1", "i2", ">f4")), (0, 4095, ("u2", ">i2", "f8")), (0, 65535, ("u2", "i4", "f4")),
        (-128, 127, ("i1", "f4")), (-2048, 2047, ("i2",)), (-32768, 32767, ("i2", "f4")),
        (0, 1, ("f4", ">f8")), (-1, 1, ("f4",)), (0, 100, ("f4", "f8")),
    ],
)  # fmt: skip
def test_one_picture_in_any_range_and_type_is_the_same_picture(first, last, kinds, dark):
    expected = PICTURE // 2 if dark and last != 100 else PICTURE  # a picture need not reach the end of its range
    for kind in kinds:
        stored = expected * ((last - first) / 255) + first
        grey, found = as_grey((stored if kind[-2] == "f" else np.rint(stored)).astype(kind))
        assert grey.dtype == np.uint8 and found == (first, last) and grey.flags.c_contiguous and grey.flags.writeable
        np.testing.assert_array_equal(grey, expected)


@pytest.mark.parametrize(
    "values",
    [
        [0.0, np.nan], [0.0, np.inf], [0.0, 70000.0], [-1.0, 0.0], [-3.0, 250.0], [-60.5, 0.0], [-2.1, 3.3], [0.5, 43.2],
        [0.0, 1.0], [0.0, 100.0], [-0.1, 0.9],
    ],
)  # fmt: skip
def test_grey_levels_that_may_be_several_things_are_refused_with_their_range(values):
    with pytest.raises(Unreadable, match="not finite" if not np.isfinite(values).all() else f"{values[0]:g} to {values[1]:g}"):
        as_grey(np.array(values))


def test_bytes_and_averages_of_bytes_stay():
    assert as_grey(np.array([0, 1], np.uint8))[1] == as_grey(np.array([0.4, 7.6, 254.6]))[1] == BYTE
    assert as_grey(np.array([0.4, 7.6, 200.0]))[0].tolist() == [0, 8, 200]
