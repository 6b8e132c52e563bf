"""docs/shards.md: what it promises to readers other than ours."""

import re

import numpy as np

from heartseg.config.experiment import ImageConfig
from heartseg.shards.reader import load_groups, open_shards
from heartseg.shards.writer import schema
from helpers.experiments import ROOT

PAGE = (ROOT / "docs" / "shards.md").read_text()


def test_the_page_names_every_column_in_order():
    table = PAGE.split("| column |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == schema(ImageConfig(64, 64)).names


def test_its_lines_of_pandas_read_what_we_read(shards):
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    found = {}
    exec(lines.replace('"shards"', repr(shards)), found)
    ours = load_groups(open_shards(shards), ["train"])["train"]
    assert np.array_equal(found["images"], ours.images[:, 0].numpy())
    assert np.array_equal(found["native"], ours.native_mask(0)) and found["cavity_mm2"] > 100
