"""How fast NIfTI becomes shards, against the plain way: `python jobs/benchmark.py data --source CAMUS`.

The plain way is one process: nibabel's get_fdata, scikit-image's resize of image and label, np.save. Both sides take turns
over the same patients in one process with one thread each, and are compared by the CPU time that they use, which other
programs on the machine disturb least. A section is a function of the options that returns the lines of its table.
"""

import multiprocessing
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from heartseg.config.experiment import ImageConfig
from heartseg.datasets import camus, nifti, phantom
from heartseg.errors import UserError
from heartseg.shards import writer
from heartseg.storage import filesystem
from jobs.benchmarks.data_loader import loader_lines
from jobs.support import command_line, ray_preprocessing, ray_runtime

GRID = ImageConfig(256, 256)
# Patients of the phantom whose stills are float32, as the release's are: 389 x 549 pixels and more.
FLOAT_PATIENTS = (1, 4, 5, 8, 9, 12, 13, 16)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    source: str = ""
    """Folder of the CAMUS release, or of a phantom."""
    sections: tuple[str, ...] = ("plain", "workers", "memory", "loader")
    """Which parts of the table: plain (against the plain way), workers (two against one under Ray), memory (by patients),
    loader (batches from memory and streamed, of a phantom)."""
    patients: int = 48
    """Patients of the source that the plain way is timed on; the phantoms of release size are eight more."""
    repeats: int = 3
    """Times that each side does the same; the best time counts."""
    frames: int = 20000
    """Images of a run of one worker or of two: the source's, as often as that takes."""
    few: int = 50
    """Patients of the smaller run whose memory is measured."""
    many: int = 450
    """Patients of the larger run whose memory is measured."""
    rows: int = 1800
    """Images of the training group in section loader, which is also streamed at ten times the size."""
    pairs: int = 6
    """Training steps on each side in section loader."""


def run(options: Options) -> list[str]:
    """Measure the sections asked for and print their tables; returns the lines."""
    unknown = sorted(set(options.sections) - SECTIONS.keys())
    if unknown:
        raise UserError(f"There is no section {unknown[0]!r}: take some of {', '.join(SECTIONS)}.")
    if set(options.sections) != {"loader"}:
        command_line.require_flag(options.source, "--source", "the folder of the CAMUS release")
    lines = []
    for name in options.sections:
        found = ["", *SECTIONS[name](options)]
        print("\n".join(found), flush=True)
        lines += found
    return lines


# plain: against nibabel, scikit-image and np.save


@dataclass(frozen=True)
class Cost:
    """CPU and wall-clock seconds of something."""

    cpu_s: float
    wall_s: float


def measure(work: Callable[[], object]) -> Cost:
    """What a call costs this process, all its threads together."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall)


def plain_section(options: Options) -> list[str]:
    """Images per second of one core, ours and the plain way's, with the floors that inflating the files sets."""
    torch.set_num_threads(1)
    source = command_line.absolute(options.source, "source")
    lines = [f"{'to ' + str(GRID.height) + ' x ' + str(GRID.width) + ', images/s of one core':<34}{'images':>7}"
             f"{'plain':>9}{'ours':>9}{'ratio':>8}{'zlib alone':>12}{'of ours':>9}{'isal alone':>12}{'of ours':>9}"
             f"{'wall ratio':>12}"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        lines.append(plain_row(source, camus.find_patients(source)[: options.patients], folder, options.repeats))
        large = os.path.join(folder, "phantom")
        for number in FLOAT_PATIENTS:
            phantom.write_patient(large, 0, False, 1.0, number)
        lines.append(plain_row(large, camus.find_patients(large), folder, options.repeats))
    return lines


def plain_row(source: str, patients: list[str], folder: str, repeats: int) -> str:
    """One source's line; both sides and the floors take turns, part by part."""
    sides = {"plain": plain_way, "ours": our_way, "zlib": zlib_alone, "isal": isal_alone}
    parts = [chunk for _, chunk in writer.part_names(patients)]
    best: dict[str, list[Cost]] = {name: [] for name in sides}
    for number, chunk in enumerate(parts):
        costs: dict[str, list[Cost]] = {name: [] for name in sides}
        for repeat in range(repeats):
            for name, side in sides.items():
                out = os.path.join(folder, f"{name}-{len(source)}-{number}-{repeat}")
                os.makedirs(out)
                costs[name].append(measure(lambda side=side, chunk=chunk, out=out: side(source, chunk, out)))
        for name, found in costs.items():
            best[name].append(Cost(min(c.cpu_s for c in found), min(c.wall_s for c in found)))
    images = 4 * len(patients)
    cpu, wall = ({name: sum(getattr(c, kind) for c in found) for name, found in best.items()} for kind in ("cpu_s", "wall_s"))
    ratio, wall_ratio = cpu["plain"] / cpu["ours"], wall["plain"] / wall["ours"]
    rates = f"{images / cpu['plain']:>9.0f}{images / cpu['ours']:>9.0f}{ratio:>7.1f}x"
    for floor in ("zlib", "isal"):
        rates += f"{images / cpu[floor]:>12.0f}{100 * cpu[floor] / cpu['ours']:>8.0f}%"
    return f"{about_source(source, patients):<34}{images:>7}{rates}{wall_ratio:>11.1f}x"


def about_source(source: str, patients: list[str]) -> str:
    """Sizes and kind of the pixels of a source's first patients, from their headers."""
    import nibabel

    pictures = [nibabel.load(path) for patient in patients[:8] for path in still_paths(source, patient)[::2]]
    sizes = sorted({picture.shape[::-1] for picture in pictures}, key=np.prod)
    low, high = (" x ".join(map(str, size)) for size in (sizes[0], sizes[-1]))
    return f"{pictures[0].get_data_dtype()} {low}" + (f" to {high}" if low != high else "")


def still_paths(source: str, patient: str) -> list[str]:
    """Image, mask, image, mask … of a patient's stills."""
    return [camus.recording_path(source, patient, *still, end) for still in camus.stills_of() for end in ("", "_gt")]


def plain_way(source: str, patients: list[str], out: str) -> None:
    """One file after the other by the tools that everybody knows."""
    try:
        import nibabel
        from skimage.transform import resize
    except ImportError as error:
        raise UserError("scikit-image, which this table compares with, is missing: pip install 'heartseg[dev]'.") from error
    size = (GRID.width, GRID.height)
    for patient in patients:
        paths = still_paths(source, patient)
        for image_path, mask_path in zip(paths[::2], paths[1::2], strict=True):
            image, mask = nibabel.load(image_path).get_fdata(), nibabel.load(mask_path).get_fdata()
            image = resize(image, size, preserve_range=True).astype(np.uint8)  # bilinear, antialiased where it shrinks
            mask = resize(mask, size, order=0, anti_aliasing=False, preserve_range=True).astype(np.uint8)
            name = os.path.basename(image_path).removesuffix(".nii.gz")
            np.save(os.path.join(out, f"{name}.npy"), image)
            np.save(os.path.join(out, f"{name}_gt.npy"), mask)


def our_way(source: str, patients: list[str], out: str) -> None:
    """A shard with native masks, checked labels and hashes."""
    writer.write_part(camus.CamusTree(source), out, "part-00000.parquet", patients, GRID)


def zlib_alone(source: str, patients: list[str], out: str) -> None:
    """What no reader that inflates with zlib can go below."""
    for patient in patients:
        for path in still_paths(source, patient):
            zlib.decompress(filesystem.read_bytes(path), wbits=31)


def isal_alone(source: str, patients: list[str], out: str) -> None:
    """The floor of our own reader, which inflates with ISA-L."""
    for patient in patients:
        for path in still_paths(source, patient):
            nifti.inflate(filesystem.read_bytes(path))


# workers: two against one under Ray


def workers_section(options: Options) -> list[str]:
    """Images per second under Ray with one worker and with two, each from its first finished part to its last.

    The two take turns, and the best of each counts: what else runs on the machine only ever slows them.
    """
    source = command_line.absolute(options.source, "source")
    ray_runtime.start_ray(2)
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        timed_run(source, folder, "warm-up", 2, 4000)
        for repeat in range(options.repeats):
            for workers, found in rates.items():
                images, seconds = timed_run(source, folder, f"{workers}-{repeat}", workers, options.frames)
                found.append(images / seconds)
    lines = [f"{'under Ray, steady state':<34}{'images':>8}{'images/s':>10}{'speed-up':>10}   all runs"]
    for workers, found in rates.items():
        named = f"{workers} worker{'s' * (workers > 1)}"
        speed_up, runs = max(found) / max(rates[1]), " ".join(f"{rate:.0f}" for rate in found)
        lines.append(f"{named:<34}{images:>8}{max(found):>10.0f}{speed_up:>9.2f}x   {runs}")
    return lines


def timed_run(source: str, folder: str, name: str, workers: int, frames: int) -> tuple[int, float]:
    """Images and seconds between the first and the last finished part of the source, taken as often as `frames` needs."""
    patients = camus.find_patients(source)
    times = max(1, round(frames / (4 * len(patients))))
    tasks = []
    for number in range(times):
        out = os.path.join(folder, name, str(number))
        tasks += [(camus.CamusTree(source), out, part, chunk, GRID) for part, chunk in writer.part_names(patients)]
    rows, finished = [], []
    for record in ray_preprocessing.write_parts_with_ray(tasks, workers):
        rows.append(record["rows"])
        finished.append(time.perf_counter())
    return sum(rows[workers:]), finished[-1] - finished[workers - 1]


# memory: of a worker, by the number of patients


def memory_section(options: Options) -> list[str]:
    """The largest resident memory of a process of its own that writes the shards of few and of many patients."""
    source = command_line.absolute(options.source, "source")
    patients = camus.find_patients(source)
    lines = [f"{'peak memory of a worker':<34}{'images':>8}{'MiB':>8}{'of it imports':>15}"]
    peaks = []
    for number in (options.few, options.many):
        if number > len(patients):
            raise UserError(f"{source} has {len(patients)} patients: lower --few and --many.")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            before, after = pool.apply(peak_of, (source, patients[:number]))
        peaks.append(after)
        lines.append(f"{f'{number} patients':<34}{4 * number:>8}{after:>8.0f}{before:>15.0f}")
    return [*lines, f"{f'{options.many} against {options.few} patients':<34}{'':>8}{100 * (peaks[1] / peaks[0] - 1):>+7.1f}%"]


def peak_of(source: str, patients: list[str]) -> tuple[float, float]:
    """Largest resident memory in MiB before and after this process writes the shards of some patients."""
    torch.set_num_threads(1)
    before = peak_mib()
    with tempfile.TemporaryDirectory() as out:
        for name, chunk in writer.part_names(patients):
            writer.write_part(camus.CamusTree(source), out, name, chunk, GRID)
    return before, peak_mib()


def peak_mib() -> float:
    """Largest resident memory of this process so far (getrusage also counts the process that started it)."""
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("VmHWM")) / 1024


# loader: batches from memory and from a stream


def loader_section(options: Options) -> list[str]:
    """How fast the shards' images come to training, and at what memory."""
    return loader_lines(options.rows, options.repeats, options.pairs)


SECTIONS: dict[str, Callable[[Options], list[str]]] = {
    "plain": plain_section,
    "workers": workers_section,
    "memory": memory_section,
    "loader": loader_section,
}


def job(argv: Sequence[str]) -> None:
    """The command line."""
    run(command_line.parse_line(Options, argv, "python jobs/benchmark.py data", "Time the way from NIfTI files to shards."))
