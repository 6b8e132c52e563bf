"""The documentation: every link leads somewhere, and what the reference promises to readers of shards holds."""

import re

import numpy as np

from heartseg.config.experiment import ImageConfig
from heartseg.shards.reader import load_groups, open_shards
from heartseg.shards.writer import schema
from helpers.experiments import ROOT

SHARDS_PAGE = (ROOT / "docs" / "reference" / "shard-format.md").read_text()


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as a repository browser makes them."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}


def test_every_link_leads_to_a_file_and_a_heading_of_it():
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("cluster/**/*.md")]
    links = [(page, *link.partition("#")) for page in pages for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text())]
    assert len(links) > 20
    for page, path, _, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {path}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page}: {path}#{anchor}"


def test_the_page_of_the_shards_names_every_column_in_order():
    table = SHARDS_PAGE.split("| column |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == schema(ImageConfig(64, 64)).names


def test_its_lines_of_pandas_read_what_we_read(shards):
    (lines,) = re.findall(r"```python\n(.*?)```", SHARDS_PAGE, re.DOTALL)
    found = {}
    exec(lines.replace('"shards"', repr(shards)), found)
    ours = load_groups(open_shards(shards), ["train"])["train"]
    assert np.array_equal(found["images"], ours.images[:, 0].numpy())
    assert np.array_equal(found["native"], ours.native_mask(0)) and found["cavity_mm2"] > 100
