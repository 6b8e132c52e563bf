"""Studies on disk and their results, with the truth in place of a model's masks."""

from collections.abc import Iterable

import numpy as np

from heartseg.datasets import nifti, readers
from heartseg.inference import study_results
from heartseg.inference.study_files import Clip, find_clips
from heartseg.inference.study_results import ClipResult
from heartseg.storage import filesystem

IMAGE = np.arange(40 * 30, dtype=np.uint8).reshape(40, 30)


def put(folder, *names: str) -> None:
    for name in names:
        nifti.write_nifti(str(folder / name), IMAGE, (2.0, 2.0))


def truth_of(clip: Clip) -> np.ndarray:
    path = clip.path.replace(".nii.gz", "_gt.nii.gz")
    return readers.decode(filesystem.read_bytes(path), "nifti").pixels


def by_patient(results: Iterable[ClipResult]) -> dict[str, list[ClipResult]]:
    """Results by patient, in their order."""
    found = {}
    for result in results:
        found.setdefault(result.clip.patient, []).append(result)
    return found


def finished(hearts: str, out: str, keep=lambda clip: True) -> dict[str, list[ClipResult]]:
    """Results by patient with the truth in place of a model's masks."""
    clips = [clip for clip in find_clips(hearts) if keep(clip)]
    return by_patient(
        study_results.finish(out, clip, readers.read(clip.path, "nifti"), truth_of(clip), [1.0] * 99) for clip in clips
    )
