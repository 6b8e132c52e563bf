"""`studies.html` beside ef.csv: a table of all studies and, for each, its pictures with the measured disks, and its numbers.

Pictures are the overlays in the same folder; they are embedded in the page if their total size is small enough.
"""

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from heartseg.inference import study_files, study_results
from heartseg.inference.study_results import ClipResult
from heartseg.labels import PHASES, VIEWS
from heartseg.metrics import ed_es_detection
from heartseg.metrics.simpson import Chamber, measure
from heartseg.reporting import contours, overlays, pages
from heartseg.storage import filesystem

PAGE = "studies.html"
MOST_INLINE_BYTES = 14 << 20  # of pictures; base64 makes them a third larger
LANG = "Lang et al. 2015"
# Title, unit, decimals, columns (the first known one is shown), and what is normal in adults; sources are in docs/reference.
MEASURES = (
    ("Ejection fraction", "%", 0, ("ef_ase", "ef_4ch_ase", "ef_2ch_ase"), f"men 52–72, women 54–74 ({LANG})"),
    ("EDV", "ml", 0, ("edv_ml_ase", "edv_ml_4ch_ase", "edv_ml_2ch_ase"), f"men 62–150, women 46–106 ({LANG})"),
    ("ESV", "ml", 0, ("esv_ml_ase", "esv_ml_4ch_ase", "esv_ml_2ch_ase"), f"men 21–61, women 14–42 ({LANG})"),
    ("EF, 4-chamber view alone", "%", 0, ("ef_4ch_ase",), ""),
    ("EF, 2-chamber view alone", "%", 0, ("ef_2ch_ase",), ""),
    ("Left-atrial volume at ES", "ml", 0, ("la_volume_ml_ES",), f"up to 34 ml/m², so divide by the body surface ({LANG})"),
    ("Left-atrial emptying fraction", "%", 0, ("la_emptying_fraction",), "above 48.7 (Sugimoto et al. 2018)"),
    ("Endocardial strain, both views", "%", 1, ("endo_strain",), f"about −20 by speckle tracking ({LANG})"),
    ("Endocardial strain, 4CH", "%", 1, ("endo_strain_4CH",), ""),
    ("Endocardial strain, 2CH", "%", 1, ("endo_strain_2CH",), ""),
    ("Mitral annular excursion (MAPSE), 4CH", "mm", 1, ("mapse_mm_4CH",), "12–15 by M-mode (Hu et al. 2013)"),
    ("Mitral annular excursion (MAPSE), 2CH", "mm", 1, ("mapse_mm_2CH",), "12–15 by M-mode (Hu et al. 2013)"),
    ("LV area change (fractional), 4CH", "%", 0, ("fac_4CH",), "no accepted range"),
    ("LV area change (fractional), 2CH", "%", 0, ("fac_2CH",), "no accepted range"),
    ("Wall thickness at ED, 4CH", "mm", 1, ("wall_thickness_mm_4CH_ED",), f"men 6–10, women 6–9, parasternal ({LANG})"),
    ("Wall thickness at ED, 2CH", "mm", 1, ("wall_thickness_mm_2CH_ED",), f"men 6–10, women 6–9, parasternal ({LANG})"),
    ("LV mass", "g", 0, ("lv_mass_g",), f"men 96–200, women 66–150 ({LANG})"),
    ("Sphericity at ED", "", 2, ("sphericity_ED",), "volume over that of a sphere of the same length; no accepted range"),
    ("EF, CAMUS convention", "%", 0, ("ef_camus",), "some 8 points lower: disks as high at ES as at ED ignore the shortening"),
)
# The columns of the table of studies: positions in MEASURES.
IN_TABLE = (0, 1, 2, 5, 7)
OF_ATRIUM = ("la_volume_ml_ES", "la_emptying_fraction")
METHODS = ("biplane disks, ASE", "disks in 4CH alone, ASE", "disks in 2CH alone, ASE")


def write_page(out: str, studies: Sequence[dict]) -> str:
    """Write the page of studies from `describe_study`'s descriptions, which get an id and their pictures; returns its path."""
    used = [found["path"] for study in studies for found in (*study["figures"], *study["films"])]
    sizes = {path: filesystem.size_or_none(filesystem.join(out, path)) or 0 for path in dict.fromkeys(used)}
    inline = sum(sizes.values()) <= MOST_INLINE_BYTES
    for number, study in enumerate(studies, 1):
        study["id"] = f"study{number}"
        for found in (*study["figures"], *study["films"]):
            found["source"] = data_uri(out, found["path"]) if inline else found["path"]
    headings = [(f"{title}{', ' * bool(unit)}{unit}", at) for at, (title, unit, *_) in enumerate(MEASURES) if at in IN_TABLE]
    environment = pages.environment()
    script, *_ = environment.loader.get_source(environment, "studies.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return pages.write(
        out, PAGE, studies=studies, headings=headings, script=Markup(script), digest=digest, inline=inline,
        intended_use=study_results.INTENDED_USE,
    )  # fmt: skip


def describe_study(out: str, row: Mapping, results: Sequence[ClipResult]) -> dict:
    """A study for the page, from its `study_results.study_row` and results: measures as text, doubts, figures and films."""
    measures = []
    for title, unit, digits, columns, normal in MEASURES:
        known = next((column for column in columns if math.isfinite(row[column])), columns[0])
        texts = {"text": pages.show_number(row[known], digits), "interval": study_results.show_interval(row, known)}
        if known in OF_ATRIUM and row["la_cut_off"] and math.isfinite(row[known]):
            normal = f"not reliable: the atrium is cut off at the image's edge in {row['la_cut_off']}"
            texts["text"] = f"≥ {texts['text']}" if known == OF_ATRIUM[0] else f"({texts['text']})"
        measures.append({"title": title, "unit": unit, "value": row[known], "normal": normal} | texts)
    methods = zip(MEASURES[0][3], METHODS, strict=True)
    method = next((title for column, title in methods if math.isfinite(row[column])), "")
    figures = [found for result in results for found in describe_figures(out, result)]
    order = [f"{view} {phase}" for view in reversed(VIEWS) for phase in PHASES]
    return {
        "patient": row["patient"], "measures": measures, "method": method,
        "doubts": [text for text in str(row["doubts"]).split("; ") if text],
        "reasons": [text for text in str(row["reason"]).split("; ") if text],
        "notes": [f"{result.clip.stem}: {note}" for result in results for note in result.notes],
        "figures": sorted(figures, key=lambda found: order.index(found["title"]) if found["title"] in order else len(order)),
        "films": [film for result in results for film in describe_film(out, result)],
    }  # fmt: skip


def describe_figures(out: str, result: ClipResult) -> Iterator[dict]:
    """The pictures of a clip's ED and ES with the disks that were measured; none without overlays."""
    clip, ending = result.clip, "_overlay.png" if result.frames == 1 else "_phases.png"
    if not result.phases or not filesystem.exists(study_files.output(out, clip, ending)):
        return
    rows, spacing_mm = overlays.rows_of(result.frames), result.spacing_mm or (1.0, 1.0)
    for place, (phase, (_, mask)) in enumerate(result.phases.items()):
        width = contours.overlay_width(mask.shape, result.spacing_mm, rows)
        ventricle = measure(mask, spacing_mm).ventricle
        is_measured = isinstance(ventricle, Chamber)
        scale = np.array([rows / mask.shape[0], width / mask.shape[1]])
        yield {
            "path": f"{clip.patient}/{clip.stem}{ending}", "title": f"{clip.view or '?'} {phase}", "clip": clip.stem,
            "width": width, "height": rows + overlays.STRIP_ROWS, "place": place, "count": len(result.phases),
            "disks": draw_disks(ventricle, np.array(spacing_mm), scale) if is_measured else "",
            "length": f"{ventricle.length_mm:.0f}" if is_measured and result.spacing_mm else "",
        }  # fmt: skip


def draw_disks(ventricle: Chamber, spacing_mm: np.ndarray, scale: np.ndarray) -> str:
    """The path of the 20 disks' middle lines, of the long axis and of the mitral plane in a picture's pixels, for SVG."""
    base = ventricle.hinges_mm.mean(axis=0)
    axis = (ventricle.far_mm - base) / ventricle.length_mm
    half = np.array([-axis[1], axis[0]])[None] * ventricle.widths_mm[:, None] / 2
    lines = [*zip(ventricle.centres_mm - half, ventricle.centres_mm + half, strict=True), (base, ventricle.far_mm)]
    points = [[(point / spacing_mm + 0.5) * scale for point in line] for line in [*lines, tuple(ventricle.hinges_mm)]]
    return " ".join(f"M{a[1]:.1f} {a[0]:.1f}L{b[1]:.1f} {b[0]:.1f}" for a, b in points)


def describe_film(out: str, result: ClipResult) -> Iterator[dict]:
    """The film of a sequence above its volume curve; none for a still, or without overlays."""
    clip = result.clip
    if result.frames == 1 or not filesystem.exists(study_files.output(out, clip, "_film.jpg")):
        return
    marked = [at for at, _ in result.phases.values()]
    shown = overlays.film_frames(result.frames, marked)
    mask_shape = next(iter(result.phases.values()))[1].shape if result.phases else None
    if mask_shape is None:
        return
    curve, places = ed_es_detection.plausible(result.volumes_ml), np.linspace(0, 100, result.frames)
    curves = [("volume", draw_curve(places, 40 - 38 * curve / np.nanmax(curve)))]
    if peak := result.peak_strain:
        strongest = min(-1.0, peak["peak_strain"])  # a heart that does not move has a flat line
        curves.append(("strain", draw_curve(places, 2 + 38 * result.strain / strongest)))
    yield {
        "path": f"{clip.patient}/{clip.stem}_film.jpg", "clip": clip.stem, "view": clip.view or "?",
        "frames": len(shown), "all": result.frames, "first": shown.index(min(marked, default=0)),
        "width": contours.overlay_width(mask_shape, result.spacing_mm, overlays.GIF_ROWS) // 2,
        "height": (overlays.GIF_ROWS + overlays.STRIP_ROWS) // 2, "curves": curves, "peak": peak,
        "places": [round(float(places[at]), 1) for at in shown],
        "marks": [{"name": str(p), "frame": at + 1, "x": round(float(places[at]), 1)} for p, (at, _) in result.phases.items()],
    }  # fmt: skip


def draw_curve(places: np.ndarray, heights: np.ndarray) -> str:
    """The points of a curve for SVG, without frames that are NaN."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(places, heights, strict=True) if math.isfinite(y))


def data_uri(out: str, path: str) -> str:
    """A picture beside the page as a data URI."""
    kind = "jpeg" if path.endswith(".jpg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(filesystem.read_bytes(filesystem.join(out, path))).decode()}"
