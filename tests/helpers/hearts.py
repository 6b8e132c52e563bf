"""Label maps of the phantom's hearts, whose geometry is known, without files."""

import itertools

from heartseg.datasets import phantom
from heartseg.labels import VIEWS


def phantom_masks(number: int, scale: float = 1.0) -> dict:
    """A patient's four label maps with their spacing, by (view, phase)."""
    scanners = {view: phantom.Scanner(number, 0, view, scale) for view in VIEWS}
    moments = itertools.product(VIEWS, phantom.CONTRACTION.items())
    return {(view, phase): (scanners[view].mask(moment), scanners[view].spacing_mm) for view, (phase, moment) in moments}
