"""Outlines new echocardiograms and tabulates EF: `python jobs/predict.py --checkpoint RUN --input STUDY --out OUT`."""

import csv
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Set before torch is imported: otherwise its idle threads spin on the cores that read and write files.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from tqdm import tqdm

from heartseg import __version__
from heartseg.config.experiment import PredictConfig, to_json
from heartseg.datasets import readers
from heartseg.datasets.nifti import DamagedRecording
from heartseg.errors import UserError, require
from heartseg.inference import study_files, study_results
from heartseg.inference.batch_inference import outline
from heartseg.inference.segmenter import Ensemble, Segmenter, load_all
from heartseg.labels import PHASES, Phase, View
from heartseg.metrics import ed_es_detection, ef_intervals
from heartseg.reporting import plots, studies_page
from heartseg.reporting.overlays import write_overlays
from heartseg.storage import filesystem, locks
from jobs.support import command_line, study_output
from jobs.support.command_line import counted

# Axes of [T,H,W].
FLIPS = {"none": (), "depth": (1,), "lateral": (2,), "both": (1, 2)}


@dataclass(frozen=True)
class Options:
    """The inputs to outline, the models, and the folder of the results."""

    checkpoint: str = ""
    """Folder of a trained run, or of one of its checkpoints."""
    input: str = ""
    """NIfTI, DICOM, AVI, MP4 or PNG: a file, a patient's folder or a tree (CAMUS, say). _gt and _pred files are skipped."""
    out: str = ""
    """Folder for PATIENT/NAME_pred.nii.gz (1 LV cavity, 2 myocardium, 3 left atrium), overlays, curves, ef.csv,
    studies.json and studies.html."""
    view: Literal["2CH", "4CH"] | None = None
    """Apical view of the files whose names do not show it (2CH, A2C, AP2 …)."""
    phase: Literal["ED", "ES"] | None = None
    """Phase of the stills whose names do not show it."""
    spacing_mm: tuple[float, float] | None = None
    """Pixel size in mm, DEPTH LATERAL, for files that do not record it; without it, EF is computed but volumes are not."""
    flip: Literal["none", "depth", "lateral", "both"] = "none"
    """Flip pictures that are stored upside down (the probe belongs at the top) or mirrored."""
    ensemble: tuple[str, ...] = ()
    """Further runs on the same grid, whose class probabilities are averaged with the checkpoint's."""
    post: Annotated[PredictConfig, command_line.FLAT] = field(default_factory=PredictConfig)
    overlays: Literal["auto", "on", "off"] = "auto"
    """Write a PNG per still and a GIF per sequence. `auto`: except for DICOM files whose frames may show a patient's name."""
    page: Literal["on", "off"] = "on"
    """Write studies.html: a table of all studies, and the images, measured disks and numbers of each."""
    which: Literal["last", "best"] = "last"
    """`last` needs no val group; `best` has the highest Dice on val, and is what evaluate scores on test."""
    calibration: str = ""
    """Folder of an evaluation of this model on patients it has not seen (RUN/evaluation-val), or of a pooled evaluation; adds
    80 % prediction intervals to EF."""
    key: str = ""
    """CSV file to write that maps output names to input paths; not written by default, since DICOM paths may name patients."""
    batch_size: int = 8
    """Frames in a batch; results do not depend on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses the GPU if there is one."""


def run(options: Options) -> str:
    """Outline every input; returns the folder of the results. Raises UserError if no file could be read."""
    paths = [command_line.required_path(options.checkpoint, "checkpoint", "the folder of a run")]
    paths += [command_line.absolute(path, "ensemble") for path in options.ensemble]
    source = command_line.required_path(options.input, "input", "a file or a folder")
    out = command_line.required_path(options.out, "out", "a folder for the results")
    is_size = all(0 < value < 100 for value in options.spacing_mm or ())
    require(is_size, "--spacing-mm must be two pixel sizes in mm, above 0 and below 100: depth, then lateral.")
    require(options.batch_size >= 1, f"--batch-size must be at least 1, not {options.batch_size}.")
    has_device = options.device != "cuda" or torch.cuda.is_available()
    require(has_device, "--device cuda: torch found no GPU here; use cpu or auto.")
    clips = study_files.find_clips(source, options.view and View(options.view), options.phase and Phase(options.phase))
    study_files.check_out(out, source, clips)
    segmenter = load_all(paths, options.which, None if options.device == "auto" else options.device)
    evaluation = command_line.absolute(options.calibration, "calibration") if options.calibration else ""
    calibrations = read_calibrations(evaluation, segmenter, options.post) if evaluation else {}
    with locks.lock(out):
        outline_all(options, segmenter, clips, out, calibrations)
    return out


def read_calibrations(path: str, segmenter: Segmenter | Ensemble, post: PredictConfig) -> dict[str, dict]:
    """The calibrations of EF intervals in an evaluation; raises UserError if they are not for this model and `post`."""
    from heartseg.evaluation.scoring import SUMMARY  # imports pandas, which predictions without intervals do not need

    summary, fix = filesystem.read_json(filesystem.join(path, SUMMARY)), "evaluate this model on patients it has not seen."
    found = summary.get("clinical", {}).get("ef_intervals")
    require(summary.get("group") != "train", f"--calibration {path} scores the patients that the model was trained on: {fix}")
    is_pooled = summary.get("group") == "out-of-fold"  # other models of the same recipe
    hashes = {one.card["weights_sha256"] for one in segmenter.members}
    require(is_pooled or {*summary.get("weights_sha256", ())} == hashes, f"--calibration {path} scores another model: {fix}")
    is_alike = summary.get("post") == to_json(post)
    same = "evaluate with --tta and the other postprocessing flags given here."
    require(is_alike, f"--calibration {path} was postprocessed differently: {same}")
    fix = f"evaluate again, with at least {ef_intervals.MIN_PATIENTS} patients that have an EF."
    require(bool(found and found.get("ef_ase")), f"--calibration {path} has no EF intervals: {fix}")
    return found


def outline_all(
    options: Options, segmenter: Segmenter | Ensemble, clips: list[study_files.Clip], out: str, calibrations: dict[str, dict]
) -> None:
    """Write each clip's masks and pictures, then the tables of all clips."""
    studies = study_output.Studies(out, options.page == "on", calibrations)
    damaged, without_picture, without_overlay = [], [], []
    if others := study_files.clear(out, clips):
        print(f"Removed earlier results of {counted(others, 'file')} that are not in --input (under the same name).")

    def read(clip: study_files.Clip, admit: Callable[[int], None]) -> readers.Frames:
        return readers.read(clip.path, clip.kind, options.spacing_mm, FLIPS[options.flip], admit)

    def finish(clip, frames, masks, confidences) -> study_results.ClipResult:
        result = study_results.finish(out, clip, frames, masks, confidences)
        if options.overlays == "on" or (options.overlays == "auto" and not frames.may_show_text):
            write_overlays(out, clip, frames, masks, result.marked)
        elif options.overlays == "auto":
            without_overlay.append(clip)
        return result

    results = outline(segmenter, clips, read, finish, options.batch_size, options.post)
    for clip, result in tqdm(results, total=len(clips), desc="outline", unit=" files", disable=None):
        if not isinstance(result, DamagedRecording):
            studies.add(result)
            if options.overlays != "off" and result.frames > 1 and len(result.phases) == 2:
                write_curve(out, result)
        elif result.reason.endswith(readers.NO_PICTURE):
            without_picture.append(clip.shown)
        else:
            damaged.append({"input": clip.shown, "reason": result.reason})
    studies.close()
    if options.key:
        names, text = [(clip.stem, filesystem.printable(clip.path)) for clip in clips], io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("name", "path"), *names])
        filesystem.publish(command_line.absolute(options.key, "key"), text.getvalue().encode())
    if not studies.done:
        first = f"{damaged[0]['input']} {damaged[0]['reason']}" if damaged else readers.NO_PICTURE
        raise UserError(f"No file could be read ({counted(len(clips), 'file')}); first: {first}.")
    weights = [{name: one.card[name] for name in ("epoch", "weights_sha256")} for one in segmenter.members]
    made_with = {"heartseg": __version__, "checkpoints": weights, **to_json(options.post)}
    record = {"made_with": made_with, "clips": [study_results.clip_record(found) for found in studies.done]}
    study_results.write_tables(out, studies.rows, record | {"damaged": damaged, "without_picture": without_picture})
    study_results.write_label_names(out)
    study_output.print_results(studies.rows, studies.done, damaged)
    if without_overlay:
        print(f"No overlay for {counted(len(without_overlay), 'DICOM file')} that may show a name: --overlays on draws it.")
    if without_picture:
        print(f"{counted(len(without_picture), 'DICOM file')} without a picture (reports, measurements): see studies.json.")
    if options.page == "on":
        print(f"For a browser: {filesystem.printable(studies_page.write_page(out, studies.described))}")


def write_curve(out: str, found: study_results.ClipResult) -> None:
    """Plot a sequence's volume by frame, in ml or in % of ED, without frames whose outline failed."""
    ed, es = (found.phases[phase][0] for phase in PHASES)
    curve = ed_es_detection.plausible(found.volumes_ml)
    shown = (curve, ed, es, "ml") if found.spacing_mm else (100 * curve / curve[ed], ed, es, "%")
    figure = plots.volume_curve(range(1, found.frames + 1), *shown)
    filesystem.publish(study_files.output(out, found.clip, "_curve.png"), plots.save_png(figure))


def job(argv: list[str]) -> None:
    about = "Outline LV cavity, myocardium and left atrium in new echocardiograms, and tabulate ejection fractions."
    print(run(command_line.parse_line(Options, argv, "python jobs/predict.py", about)))


if __name__ == "__main__":
    command_line.main(job)
