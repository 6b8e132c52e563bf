"""Reads a page as a browser would: its tags, its text, and its links to anything outside itself."""

import html.parser
import re
import subprocess

import numpy as np
from PIL import Image


class Reader(html.parser.HTMLParser):
    """Keeps every start tag with its attributes, and the text that a reader sees."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.hidden = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.hidden = tag == "style"

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        self.text += "" if self.hidden else data

    @property
    def words(self) -> str:
        """The visible text with single spaces."""
        return " ".join(self.text.split())


def outside_links(text: str) -> set[str]:
    """Addresses outside a page that it links to; fails if the page would fetch anything."""
    tags = Reader(text).tags
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe", "object", "embed", "base")]
    assert not re.search(r"url\((?!['\"]?#)|@import", text)
    links = {a.get(key) for _, a in tags for key in ("src", "href", "xlink:href", "srcset") if a.get(key)}
    return {link for link in links if not link.startswith(("#", "data:image/png;base64,"))}


def look_at(page, folder, width: int) -> None:
    """Take a browser's screenshots of a page in light and dark mode, and check that the contents are readable and fit."""
    for scheme, ground in ((1, (0xF4, 0xF6, 0xF8)), (0, (0x11, 0x15, 0x1A))):
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={width},1500", f"--blink-settings=preferredColorScheme={scheme}"]
        command += [f"--screenshot={folder}/{scheme}.png"]
        subprocess.run([*command, f"file://{page}"], check=True, capture_output=True, timeout=120)
        shown = np.asarray(Image.open(folder / f"{scheme}.png").convert("RGB"))
        assert shown.shape[1] == width and tuple(shown[2, 2]) == ground
        # Words and lines stand out against the ground, and no part of the page reaches over the right edge.
        contrast = np.abs(shown.astype(int) - ground).sum(axis=2)
        assert (contrast > 300).sum() > 2000 and (contrast[:, -4:] == 0).all()
