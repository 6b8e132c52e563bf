"""Measures masks from any source, without a network: `python jobs/measure.py --masks FOLDER --out OUT`.

The masks may be heartseg's, hand-corrected, nnU-Net's or experts'; the tables are the same as those of predict.
"""

import contextlib
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas
import torch
from tqdm import tqdm

from heartseg import __version__
from heartseg.datasets import nifti, readers
from heartseg.datasets.nifti import DamagedRecording
from heartseg.errors import UserError, require
from heartseg.inference import study_files, study_results
from heartseg.inference.study_files import Clip
from heartseg.inference.study_results import ClipResult
from heartseg.labels import ENDO, LA, MYO, STRUCTURES, Phase, View
from heartseg.metrics import agreement
from heartseg.metrics.segmentation import confusion, image_scores
from heartseg.reporting import studies_page
from heartseg.reporting.overlays import write_overlays
from heartseg.storage import filesystem, locks
from jobs.support import command_line, study_output
from jobs.support.command_line import counted

Images = dict[tuple[str, str], str]  # paths by patient and clip
NAMES = {"cavity": ENDO, "wall": MYO, "myocardium": MYO, "atrium": LA}
COMPARISON, COMPARED, SIDES = "comparison.csv", ("ef_ase", "edv_ml_ase", "esv_ml_ase"), ("masks", "compare")
READERS = 4


@dataclass(frozen=True)
class Options:
    """The masks to measure, and the folder of the results."""

    masks: str = ""
    """NIfTI masks: a file, a folder or a tree. Uses the files named _gt or _pred if there are any, otherwise all files. Save a
    corrected mask under the name of the one it replaces, in a copy of the folder."""
    out: str = ""
    """Folder for ef.csv, studies.json, studies.html and, with --compare, comparison.csv."""
    labels: str = ""
    """What the files' values mean, if not `1=cavity,2=myocardium,3=atrium`; values that you do not name become background."""
    images: str = ""
    """Folder of the images, if they are not beside the masks; a mask and its image share a name. A mask without an affine is
    oriented like its image."""
    compare: str = ""
    """Masks of a second reading of the same images, to compare with: Dice, and the change in each ejection fraction."""
    view: Literal["2CH", "4CH"] | None = None
    """Apical view of the masks whose names do not show it (2CH, A2C, AP2 …)."""
    phase: Literal["ED", "ES"] | None = None
    """Phase of the stills whose names do not show it."""
    page: Literal["on", "off"] = "on"
    """Write studies.html, and an overlay of each mask whose image is found."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One reader's studies, the masks to compare by (patient, clip), and what could not be read."""

    studies: study_output.Studies
    masks: dict[tuple[str, str], np.ndarray]
    damaged: list[dict]


def parse_labels(text: str) -> dict[int, int]:
    """Parse `1=cavity,2=wall,3=atrium`; returns heartseg's label by value in the files, and raises UserError for a mistake."""
    found = {}
    for part in filter(None, text.split(",")):
        value, _, name = part.partition("=")
        is_valid = re.fullmatch(r"\d{1,9}", value.strip()) and name.strip() in NAMES
        require(bool(is_valid), f"--labels {part!r} must be VALUE=NAME, where NAME is one of {', '.join(NAMES)}.")
        found[int(value)] = NAMES[name.strip()]
    message = f"--labels {text} must include the cavity, such as 1=cavity: volumes and EF need it."
    require(not found or ENDO in found.values(), message)
    return found


def read_masks(clip: Clip, image: str | None, labels: dict[int, int]) -> tuple[np.ndarray, readers.Spacing | None, tuple]:
    """A clip's masks uint8 [T,H,W], their (depth, lateral) spacing in mm if plausible, and notes; raises DamagedRecording."""
    onto = nifti.read_place(image) if image else None
    values, spacing_mm, _ = nifti.read_nifti(clip.path, onto=onto)
    if onto and values.shape[1:] != (whole := tuple(onto.header.get_data_shape()[axis] for axis in onto.axes)):
        sizes = " x ".join(map(str, values.shape[1:])), " x ".join(map(str, whole))
        raise DamagedRecording("the mask is {}, but its image is {}".format(*sizes), clip.path)
    if labels:
        mapped = np.zeros(values.shape, np.uint8)
        for value, label in labels.items():
            mapped[values == value] = label
        values = mapped
    try:
        masks = np.stack([nifti.as_labels(frame, clip.path) for frame in values])
    except DamagedRecording as damage:
        raise DamagedRecording(f"{damage.reason}: name the values with --labels", clip.path) from damage
    known_mm, notes = readers.plausible_spacing(spacing_mm, masks.shape[1])
    if onto and not known_mm:  # written by a tool that drops the spacing
        known_mm, _ = readers.plausible_spacing(nifti.read_spacing(onto.header, onto.axes), masks.shape[1])
    return masks, known_mm, () if known_mm else notes


def draw(out: str, image: str, masks: np.ndarray, result: ClipResult) -> None:
    """Write the overlays of a clip on its image, unless that is damaged or has another size."""
    with contextlib.suppress(DamagedRecording):
        frames = readers.read(image, readers.kind_of(image) or "nifti")
        if frames.pixels.shape == masks.shape:
            write_overlays(out, result.clip, replace(frames, spacing_mm=result.spacing_mm), masks, result.marked)


def read_all(clips: Sequence[Clip], images: Images, labels: dict[int, int], title: str, out: str, keep: bool) -> Reading:
    """Read and measure all clips; draws overlays into `out` unless it is empty, and keeps the masks to compare if `keep`."""
    reading = Reading(study_output.Studies(out, bool(out)), {}, [])

    def measure(clip: Clip) -> tuple[Clip, np.ndarray | None, ClipResult | DamagedRecording]:
        image = images.get((clip.patient, clip.stem))
        try:
            masks, spacing_mm, notes = read_masks(clip, image, labels)
        except DamagedRecording as damage:
            return clip, None, damage
        result = study_results.measure_clip(clip, masks, spacing_mm, notes, [float("nan")] * len(masks))
        if out and image:
            draw(out, image, masks, result)
        return clip, masks if keep else None, result

    with ThreadPoolExecutor(READERS) as pool:
        measured = bounded_map(pool, measure, clips)
        for clip, masks, result in tqdm(measured, total=len(clips), desc=title, unit=" files", disable=None):
            if isinstance(result, DamagedRecording):
                reading.damaged.append({"input": clip.shown, "reason": result.reason})
                continue
            reading.studies.add(result)
            if masks is not None:
                reading.masks[clip.patient, clip.stem] = masks
    reading.studies.close()
    if not reading.studies.done:
        first = reading.damaged[0]
        problem = f"No mask of --{title} could be read ({counted(len(clips), 'file')})"
        raise UserError(f"{problem}; first: {first['input']} {first['reason']}.")
    return reading


def bounded_map(pool: ThreadPoolExecutor, action: Callable, items: Iterable) -> Iterator:
    """The results of `pool.map`, in order, but only a few are ahead of the one that is needed: their masks take memory."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(action, item))
        if len(waiting) > 2 * READERS:
            yield waiting.popleft().result()
    yield from (future.result() for future in waiting)


def find_images(clips: Sequence[Clip], folder: str) -> Images:
    """The image of each clip that has one: beside its mask, or by the same name in a folder."""
    if not folder:
        beside = ((clip, study_files.MARK.sub("", clip.path)) for clip in clips)
        return {(c.patient, c.stem): path for c, path in beside if path != c.path and filesystem.exists(path)}
    known = {(found.patient, found.stem.removesuffix("_0000")): found.path for found in study_files.find_clips(folder)}
    return {(c.patient, c.stem): known[c.patient, c.stem] for c in clips if (c.patient, c.stem) in known}


def compare(out: str, first: Reading, second: Reading) -> str:
    """Write `comparison.csv`, a row per patient, and return a summary of two readings of the same images."""
    shared = [key for key in first.masks if key in second.masks and first.masks[key].shape == second.masks[key].shape]
    fix = "give two readings of the same images"
    require(bool(shared), f"--masks and --compare have no masks with the same name and size: {fix}.")
    scores: dict[str, list[list[float]]] = {}
    changed: dict[str, list[str]] = {}
    for key in shared:
        one, other = first.masks[key], second.masks[key]
        found = image_scores(confusion(torch.from_numpy(one), torch.from_numpy(other)))
        dice = [float(found[f"dice_{name}"].mean()) for name in STRUCTURES]
        pixels = np.count_nonzero(one != other)
        scores.setdefault(key[0], []).append([*dice, pixels])
        changed.setdefault(key[0], []).extend([key[1]] if pixels else [])
    rows = [{row["patient"]: row for row in reading.studies.rows} for reading in (first, second)]
    table = []
    for patient, found in scores.items():
        both = {f"{name}_{side}": row[patient][name] for name in COMPARED for side, row in zip(SIDES, rows, strict=True)}
        dice = dict(zip((f"dice_{name}" for name in STRUCTURES), np.nanmean(found, axis=0), strict=False))
        changes = {"pixels_changed": int(sum(pixels for *_, pixels in found)), "masks_changed": " ".join(changed[patient])}
        table.append({"patient": patient, "clips": len(found)} | dice | changes | both)
    frame = pandas.DataFrame(table)
    filesystem.publish(filesystem.join(out, COMPARISON), frame.to_csv(index=False, float_format="%.4f").encode())
    means = np.nanmean(np.concatenate([*scores.values()]), axis=0)
    lines = [f"{counted(len(shared), 'mask')} of {counted(len(scores), 'patient')} in both readings"]
    lines += [
        "Dice: "
        + ", ".join(f"{name} {mean:.3f}" for name, mean in zip(("LV cavity", "myocardium", "left atrium"), means, strict=False))
    ]
    ef = agreement.agree(frame["ef_ase_masks"], frame["ef_ase_compare"])
    if ef["r"] is not None:
        lines += ["EF (ase), --masks minus --compare: bias {bias:.1f} points, sd {sd:.1f}, r {r:.2f}, n {n}".format(**ef)]
    differs = frame["pixels_changed"] > 0
    for one, other in ((frame[f"{name}_{side}"] for side in SIDES) for name in COMPARED):
        differs |= (one != other) & ~(one.isna() & other.isna())
    about = []
    for one in frame[differs].itertuples():
        names = one.masks_changed or "a mask is missing"
        about.append(f"{one.patient} ({names}: EF {one.ef_ase_masks:.0f} %, --compare {one.ef_ase_compare:.0f} %)")
    lines.append(listed(counted(int(differs.sum()), "patient") + " changed", about))
    for title, masks, others in (("--masks", first.masks, second.masks), ("--compare", second.masks, first.masks)):
        if alone := [stem for patient, stem in masks if (patient, stem) not in others]:
            lines.append(listed(f"{counted(len(alone), 'mask')} only in {title}, not compared", alone))
    if sizes := [stem for patient, stem in first.masks if (patient, stem) in second.masks and (patient, stem) not in shared]:
        lines.append(listed(f"{counted(len(sizes), 'mask')} of a different size in --compare, not compared", sizes))
    return "\n".join([*lines, *(f"left out of --compare: {one['input']} {one['reason']}" for one in second.damaged)])


def listed(title: str, names: Iterable[str], most: int = 10) -> str:
    """A title and the first `most` names, as one line."""
    names = [*names]
    return title + ": " * bool(names) + ", ".join(names[:most]) + ", …" * (len(names) > most)


def run(options: Options) -> str:
    """Measure every mask; returns the folder of the results. Raises UserError if none could be read."""
    source = command_line.required_path(options.masks, "masks", "a folder of NIfTI masks")
    out = command_line.required_path(options.out, "out", "a folder for the results")
    folders = [source, *([command_line.absolute(options.compare, "compare")] if options.compare else [])]
    require(out not in folders, f"--out {out} is a folder of masks: give another.")
    labels, shown = parse_labels(options.labels), (options.view and View(options.view), options.phase and Phase(options.phase))
    found = [study_files.find_masks(folder, *shown) for folder in folders]
    clips, unused = [masks for masks, _ in found], found[0][1]
    images = command_line.absolute(options.images, "images") if options.images else ""
    require(not images or filesystem.exists(images), f"--images {images} does not exist: give the folder of the images.")
    with locks.lock(out):
        readings = [
            read_all(found, find_images(found, images), labels, title, drawn, keep=bool(options.compare))
            for found, title, drawn in zip(clips, SIDES, (out if options.page == "on" else "", ""), strict=False)
        ]
        first, studies = readings[0], readings[0].studies
        places = {clip.stem: clip.path for clip in clips[0]}
        records = [study_results.clip_record(found) | {"mask": places[found.clip.stem]} for found in studies.done]
        record = {"made_with": {"heartseg": __version__, "masks": source}, "clips": records, "damaged": first.damaged}
        study_results.write_tables(out, studies.rows, record)
        study_output.print_results(studies.rows, studies.done, first.damaged)
        if unused:
            title = f"{counted(len(unused), 'file')} without a mask (images, or masks not named _gt or _pred)"
            print(listed(title, map(filesystem.last_part, unused)))
        if options.compare:
            print(compare(out, *readings))
        if options.page == "on":
            print(f"For a browser: {filesystem.printable(studies_page.write_page(out, studies.described))}")
    return out


def job(argv: list[str]) -> None:
    about = "Measure masks: volumes, ejection fraction, strain and more; compare two readings of the same images."
    print(run(command_line.parse_line(Options, argv, "python jobs/measure.py", about)))


if __name__ == "__main__":
    command_line.main(job)
