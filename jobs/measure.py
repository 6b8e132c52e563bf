"""Measures anyone's masks, without a network: `python jobs/measure.py --masks FOLDER --out OUT`.

The masks may be ours, corrected by hand, nnU-Net's or experts'; the tables are those of predict.
"""

import csv
import io
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
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
from heartseg.storage import filesystem, locks
from jobs.support import command_line, study_output
from jobs.support.command_line import counted

Images = dict[tuple[str, str], str]  # paths by patient and clip
NAMES = {"cavity": ENDO, "wall": MYO, "atrium": LA}
COMPARISON = "comparison.csv"
READERS = 4


@dataclass(frozen=True)
class Options:
    """The masks to measure, and the folder of the results."""

    masks: str = ""
    """Folder of NIfTI label maps, a file or a tree; those named _gt or _pred if there are any, otherwise all."""
    out: str = ""
    """Folder for ef.csv, studies.json and, with --compare, comparison.csv."""
    labels: str = ""
    """Values of cavity, wall and atrium if they are not 1, 2, 3: `1=cavity,2=wall,3=atrium`; others become background."""
    images: str = ""
    """The images, if not beside the masks under the same name; a mask that has no affine is oriented like its image."""
    compare: str = ""
    """A second reading of the same images to compare with: Dice, and the change of each ejection fraction."""
    view: Literal["2CH", "4CH"] | None = None
    """Apical view of the masks whose names do not show it (2CH, A2C, AP2 …)."""
    phase: Literal["ED", "ES"] | None = None
    """Phase of the stills whose names do not show it."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One reader's masks of some studies: results by (patient, clip), and what could not be read."""

    results: dict[tuple[str, str], ClipResult]
    masks: dict[tuple[str, str], np.ndarray]
    damaged: list[dict]

    def rows(self) -> dict[str, dict]:
        """A row of indices for each patient."""
        grouped = study_results.by_patient(self.results.values())
        return {patient: study_results.study_row(patient, found) for patient, found in grouped.items()}


def parse_labels(text: str) -> dict[int, int]:
    """Our label by value in the files, from `1=cavity,2=wall,3=atrium`; raises UserError."""
    found = {}
    for part in filter(None, text.split(",")):
        value, _, name = part.partition("=")
        is_valid = re.fullmatch(r"\d{1,9}", value.strip()) and name.strip() in NAMES
        require(bool(is_valid), f"--labels {part!r} must be VALUE=NAME, with a name of {', '.join(NAMES)}.")
        found[int(value)] = NAMES[name.strip()]
    require(not found or set(found.values()) == set(NAMES.values()), f"--labels must name {', '.join(NAMES)}.")
    return found


def read_masks(clip: Clip, image: str | None, labels: dict[int, int]) -> tuple[np.ndarray, readers.Spacing | None, tuple]:
    """A clip's masks uint8 [T,H,W], their (depth, lateral) spacing in mm if plausible, and notes; raises DamagedRecording."""
    onto = nifti.read_place(image) if image else None
    values, spacing_mm, _ = nifti.read_nifti(clip.path, onto=onto)
    if labels:
        mapped = np.zeros(values.shape, np.uint8)
        for value, label in labels.items():
            mapped[values == value] = label
        values = mapped
    masks = np.stack([nifti.as_labels(frame, clip.path) for frame in values])
    return masks, *readers.plausible_spacing(spacing_mm, masks.shape[1])


def read_all(clips: Sequence[Clip], images: Images, labels: dict[int, int], title: str, keep: bool) -> Reading:
    """Read and measure all clips; `keep` keeps their masks for a comparison."""
    reading = Reading({}, {}, [])

    def measure(clip: Clip) -> tuple[Clip, np.ndarray | None, ClipResult | DamagedRecording]:
        try:
            masks, spacing_mm, notes = read_masks(clip, images.get((clip.patient, clip.stem)), labels)
        except DamagedRecording as damage:
            return clip, None, damage
        result = study_results.measure_clip(clip, masks, spacing_mm, notes, [float("nan")] * len(masks))
        return clip, masks if keep else None, result

    with ThreadPoolExecutor(READERS) as pool:
        for clip, masks, result in tqdm(pool.map(measure, clips), total=len(clips), desc=title, unit=" files", disable=None):
            if isinstance(result, DamagedRecording):
                reading.damaged.append({"input": clip.shown, "reason": result.reason})
                continue
            reading.results[clip.patient, clip.stem] = result
            if masks is not None:
                reading.masks[clip.patient, clip.stem] = masks
    if not reading.results:
        first = reading.damaged[0]
        raise UserError(f"No mask could be read ({counted(len(clips), 'file')}); first: {first['input']} {first['reason']}.")
    return reading


def find_images(clips: Sequence[Clip], folder: str) -> Images:
    """The image of each clip that has one: beside its mask, or by the same name in a folder."""
    if not folder:
        beside = ((clip, study_files.MARK.sub("", clip.path)) for clip in clips)
        return {(c.patient, c.stem): path for c, path in beside if path != c.path and filesystem.exists(path)}
    known = {(found.patient, found.stem.removesuffix("_0000")): found.path for found in study_files.find_clips(folder)}
    return {(c.patient, c.stem): known[c.patient, c.stem] for c in clips if (c.patient, c.stem) in known}


def compare(out: str, first: Reading, second: Reading) -> str:
    """Write `comparison.csv`, a row per patient, and return a summary of two readings of the same images."""
    shared = [key for key in first.masks if key in second.masks]
    require(bool(shared), "--masks and --compare have no mask of the same name: give two readings of the same images.")
    dices: dict[str, list[np.ndarray]] = {}
    for key in shared:
        one, other = first.masks[key], second.masks[key]
        if one.shape != other.shape:
            shapes = f"shape {one.shape} in --masks and {other.shape} in --compare"
            raise UserError(f"{'/'.join(key)} has {shapes}: give two readings on the same grid.")
        scores = image_scores(confusion(torch.from_numpy(one), torch.from_numpy(other)))
        found = np.array([scores[f"dice_{name}"].numpy() for name in STRUCTURES]).mean(axis=1)
        dices.setdefault(key[0], []).append(np.array([*found, np.count_nonzero(one != other)]))
    rows = [first.rows(), second.rows()]
    columns = ["patient", "clips", *(f"dice_{name}" for name in STRUCTURES), "pixels_changed"]
    columns += [f"{name}_{which}" for name in ("ef_ase", "edv_ml_ase", "esv_ml_ase") for which in ("masks", "compare")]
    table = []
    for patient, found in dices.items():
        *dice, changed = *np.nanmean(found, axis=0)[:-1], np.sum(found, axis=0)[-1]
        both = [row[patient][name] for name in ("ef_ase", "edv_ml_ase", "esv_ml_ase") for row in rows]
        table.append([patient, len(found), *(f"{value:.4f}" for value in dice), int(changed), *(f"{v:.2f}" for v in both)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *table])
    filesystem.publish(filesystem.join(out, COMPARISON), text.getvalue().encode())
    ef = agreement.agree(*([row[patient]["ef_ase"] for patient in dices] for row in rows))
    means = np.nanmean(np.concatenate([*dices.values()]), axis=0)
    lines = [f"{counted(len(shared), 'mask')} of {counted(len(dices), 'patient')} in both readings"]
    lines += ["Dice: " + ", ".join(f"{name} {value:.3f}" for name, value in zip(NAMES, means, strict=False))]
    if ef["r"] is not None:
        lines += ["EF (ase), --masks minus --compare: bias {bias:.1f} points, sd {sd:.1f}, r {r:.2f}, n {n}".format(**ef)]
    changed = [row[0] for row in table if row[columns.index("pixels_changed")]]
    some = ", ".join(changed[:10]) + (", …" if len(changed) > 10 else "")
    return "\n".join([*lines, f"{counted(len(changed), 'patient')} changed{': ' * bool(changed)}{some}"])


def run(options: Options) -> str:
    """Measure every mask; returns the folder of the results. Raises UserError if none could be read."""
    source = command_line.required_path(options.masks, "masks", "a folder of NIfTI masks")
    out = command_line.required_path(options.out, "out", "a folder for the results")
    require(out != source, f"--out {out} is the folder of the masks: give another.")
    labels, shown = parse_labels(options.labels), (options.view and View(options.view), options.phase and Phase(options.phase))
    folders = [source, *([command_line.absolute(options.compare, "compare")] if options.compare else [])]
    clips = [study_files.find_masks(folder, *shown) for folder in folders]
    images = command_line.absolute(options.images, "images") if options.images else ""
    titles = ("masks", "compare")
    with locks.lock(out):
        readings = [
            read_all(found, find_images(found, images), labels, title, keep=bool(options.compare))
            for found, title in zip(clips, titles, strict=False)
        ]
        first, rows = readings[0], readings[0].rows()
        places = {clip.stem: clip.path for clip in clips[0]}
        records = [study_results.clip_record(found) | {"mask": places[found.clip.stem]} for found in first.results.values()]
        record = {"made_with": {"heartseg": __version__, "masks": source}, "clips": records, "damaged": first.damaged}
        study_results.write_tables(out, [*rows.values()], record)
        study_output.print_results([*rows.values()], [*first.results.values()], first.damaged)
        if options.compare:
            print(compare(out, *readings))
    return out


def job(argv: list[str]) -> None:
    about = "Measure label maps: volumes, ejection fraction, strain and more, and compare two readings."
    print(run(command_line.parse_line(Options, argv, "python jobs/measure.py", about)))


if __name__ == "__main__":
    command_line.main(job)
