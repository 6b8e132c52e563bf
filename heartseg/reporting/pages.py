"""Shared by all pages: templates, numbers as text, inline figures and pictures, and writing a page."""

import base64
import functools
import math

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from heartseg.reporting import contours, plots
from heartseg.storage import filesystem


def write(out: str, page: str, /, **values: object) -> str:
    """Render the template of this name into a page in a folder, and return its path."""
    path = filesystem.join(out, page)
    filesystem.publish(path, environment().get_template(page).render(**values).encode())
    return path


def environment() -> jinja2.Environment:
    """The environment of the page templates, with the filters `score`, `interval` and `number`; a missing value is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("heartseg.reporting"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"score": functools.partial(show_number, digits=3), "interval": show_interval, "number": show_number}
    return made


def show_number(value: float | None, digits: int = 1) -> str:
    """A number with `digits` decimals, or a dash if it is missing."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def show_interval(score: dict | None, digits: int = 3) -> str:
    """The 95 % interval of a score's mean, or a dash without one."""
    ends = [show_number((score or {}).get(end), digits) for end in ("low", "high")]
    return "–" if "–" in ends else " to ".join(ends)


def figure(drawn: Figure, name: str, alt: str) -> dict:
    """A figure for a template: its SVG, whose identifiers begin with `name`, and its alternative text."""
    return {"svg": Markup(plots.save_svg(drawn, name)), "alt": alt}


def picture(positions: np.ndarray, caption: str, alt: str) -> dict:
    """A picture of palette positions [h,w] for a template: its PNG as a data URI, its size, caption and alt text."""
    height, width = positions.shape
    encoded = base64.b64encode(contours.encode_png(positions)).decode()
    return {"source": f"data:image/png;base64,{encoded}", "width": width, "height": height, "caption": caption, "alt": alt}
