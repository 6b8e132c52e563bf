"""Writes a synthetic CAMUS tree with known geometry, to run and test everything without the real data.

The ventricle is a truncated ellipsoid, and images are speckle made in beam space: `python -m heartseg.datasets.phantom OUT`.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import tyro
from scipy.ndimage import gaussian_filter, map_coordinates
from tqdm import tqdm

from heartseg.datasets import camus, nifti
from heartseg.datasets.splits import QUALITIES
from heartseg.errors import StorageError, UserError, require
from heartseg.labels import BACKGROUND, ENDO, LA, MYO, VIEWS, Phase, View
from heartseg.storage import filesystem

CONTRACTION = {Phase.ED: 0.0, Phase.ES: 1.0}
# (depth, lateral) mm: the current release's isotropic 0.308, the older one's 1:2, others; mostly coarse, for speed.
SPACINGS_MM = ((0.308, 0.308), (0.154, 0.308), (0.308, 0.308), (0.22, 0.22), (0.308, 0.308), (0.24, 0.26))

# Effect of full contraction, per ejection fraction: in real stills the wall's area is the same in both phases and the
# length shrinks by an eighth. The atrium grows by a fixed share; its centre is 0.75 half lengths below the plane.
SHORTENING, THICKENING, ATRIAL_FILLING, ATRIUM_TRUNCATION = 0.30, 0.40, 0.20, 0.75

# Beam space: samples along a beam, beams across the sector, and the widths (sigma) of pulse and beam.
SAMPLES, BEAMS, PULSE_MM, BEAM_RAD = 416, 192, 0.42, 0.0105
# Grey of tissue, and the power of noise; grey is the fourth root of power, whose skew matches real speckle's.
TISSUE_GREY, HISS = 109, 0.01


@dataclass(frozen=True)
class Geometry:
    """A heart and its probe. `radii_mm`, `tilt_deg` and `apex_lateral_mm` have a value per view, in the order of `VIEWS`;
    `atrium_mm` is (lateral, long) half axes. The mitral plane is `truncation` half lengths below the centre.
    """

    patient: str
    ef: float
    radii_mm: tuple[float, float]
    half_length_mm: float
    truncation: float
    wall_mm: float
    atrium_mm: tuple[float, float]
    tilt_deg: tuple[float, float]
    apex_lateral_mm: tuple[float, float]
    apex_depth_mm: float
    depth_mm: float
    half_angle_rad: float
    probe_offset_mm: float
    spacing_mm: tuple[float, float]

    @property
    def length_mm(self) -> float:
        """Distance from the cavity's apex to the mitral plane."""
        return self.half_length_mm * (1 + self.truncation)


def patient_geometry(patient_index: int, seed: int = 0) -> Geometry:
    """The end-diastolic heart and probe of patient `patient_index` (from 1), determined by the two arguments."""
    rng = np.random.default_rng([seed, patient_index])

    def bell(mean, spread, low, high):
        return float(np.clip(rng.normal(mean, spread), low, high))

    poor = rng.random() < 0.3  # weak hearts are dilated
    half_length, radius = bell(46, 4.5, 37, 56), bell(27 if poor else 23.5, 2.5, 18, 32)
    length = half_length * (1 + (truncation := rng.uniform(0.55, 0.75)))
    apex_depth = length * rng.uniform(0.28, 0.46)
    tilt_deg = (bell(9, 7, -6, 22), bell(9, 7, -6, 22))
    return Geometry(
        patient=f"patient{patient_index:04d}", ef=round(rng.uniform(25, 42) if poor else rng.uniform(45, 70), 1),
        radii_mm=(radius, radius * rng.uniform(0.88, 1.12)), half_length_mm=half_length, truncation=truncation,
        wall_mm=rng.uniform(9.5, 15), atrium_mm=(rng.uniform(16, 22), rng.uniform(16, 23)), tilt_deg=tilt_deg,
        apex_lateral_mm=tuple(bell(3, 4, -5, 10) - length / 2 * float(np.sin(np.radians(tilt))) for tilt in tilt_deg),
        apex_depth_mm=apex_depth, depth_mm=max(120.0, (apex_depth + length) * rng.uniform(1.25, 1.45)),
        half_angle_rad=float(np.radians(bell(37.8, 1.2, 35, 44))), probe_offset_mm=rng.uniform(-2, 2),
        spacing_mm=SPACINGS_MM[patient_index % len(SPACINGS_MM)],
    )  # fmt: skip


def geometry_at(geometry: Geometry, contraction: float) -> Geometry:
    """An end-diastolic heart contracted by `contraction`, 0 to 1 (end-systole), to a volume of EDV (1 - EF contraction)."""
    emptied = geometry.ef / 100 * contraction
    along = 1 - SHORTENING * emptied  # the long axis shortens by this factor; the short axes account for the rest
    radii = tuple(radius * ((1 - emptied) / along) ** 0.5 for radius in geometry.radii_mm)
    atrium = tuple(size * (1 + ATRIAL_FILLING * contraction) for size in geometry.atrium_mm)
    wall, long = geometry.wall_mm * (1 + THICKENING * emptied), geometry.half_length_mm * along
    return replace(geometry, radii_mm=radii, half_length_mm=long, wall_mm=wall, atrium_mm=atrium)


def volume_ml(geometry: Geometry, phase: Phase) -> float:
    """Volume of a patient's cavity in ml: ellipses pi a b (1 - z^2 / c^2), integrated from the apex -c to the plane t c."""
    heart = geometry_at(geometry, CONTRACTION[phase])
    (a, b), c, t = heart.radii_mm, heart.half_length_mm, heart.truncation
    return float(np.pi * a * b * c * (2 / 3 + t - t**3 / 3) / 1000)


def patient_info(patient_index: int, seed: int = 0) -> camus.Info:
    """The patient's cfg, the same in both views; its EF is the closed form, in the `ase` convention."""
    rng = np.random.default_rng([seed, patient_index, 1])
    frames = int(rng.integers(10, 31))
    ed, es = (frames, 1) if rng.random() < 0.25 else (1, frames)  # some half sequences run from ES to ED
    sex, quality = str(rng.choice(["F", "M"])), str(rng.choice(QUALITIES, p=(0.5, 0.35, 0.15)))
    age, frame_rate = int(rng.integers(30, 90)), round(rng.uniform(40, 70), 1)
    return camus.Info(ed, es, frames, sex, age, quality, patient_geometry(patient_index, seed).ef, frame_rate, "ase")


def heart_coordinates(heart: Geometry, view: View, depth_mm, lateral_mm):
    """Convert image coordinates (lateral from the middle) to mm along and across the heart's axis from its fixed apex."""
    index = VIEWS.index(view)
    sine, cosine = np.sin(np.radians(heart.tilt_deg[index])), np.cos(np.radians(heart.tilt_deg[index]))
    down, right = depth_mm - heart.apex_depth_mm, lateral_mm - heart.apex_lateral_mm[index]
    return down * cosine + right * sine, right * cosine - down * sine


def labels_at(heart: Geometry, view: View, along, across) -> np.ndarray:
    """Labels 0-3, uint8, at heart coordinates in mm."""
    radius, half_length, wall_mm = heart.radii_mm[VIEWS.index(view)], heart.half_length_mm, heart.wall_mm
    from_centre, from_plane, (wide, long) = along - half_length, along - heart.length_mm, heart.atrium_mm
    cavity = (across / radius) ** 2 + (from_centre / half_length) ** 2 <= 1
    wall = (across / (radius + wall_mm)) ** 2 + (from_centre / (half_length + wall_mm)) ** 2 <= 1
    atrium = (across / wide) ** 2 + (from_plane / long - ATRIUM_TRUNCATION) ** 2 <= 1
    above = np.where(cavity, ENDO, np.where(wall, MYO, BACKGROUND))
    return np.where(from_plane <= 0, above, np.where(atrium, LA, BACKGROUND)).astype(np.uint8)


class Scanner:
    """Renders one view of a patient; speckle, texture, gain and dropouts are drawn once, from the seed."""

    def __init__(self, patient_index: int, seed: int, view: View, scale: float = 1.0):
        self.geometry, self.view = patient_geometry(patient_index, seed), view
        rng = np.random.default_rng([seed, patient_index, 2 + VIEWS.index(view)])
        reach, half_angle = self.geometry.depth_mm, self.geometry.half_angle_rad
        self.spacing_mm = row_mm, column_mm = tuple(value / scale for value in self.geometry.spacing_mm)
        # The grid fits the sector, with a narrow margin; the probe stands at its top, a little off the middle.
        height, width = int(1.006 * reach / row_mm), int(2.012 * reach * np.sin(half_angle) / column_mm)
        self.depth = (np.arange(height)[:, None] + 0.5) * row_mm
        self.lateral = (np.arange(width)[None] - (width - 1) / 2) * column_mm
        sideways = self.lateral - self.geometry.probe_offset_mm
        radius, angle = np.hypot(self.depth, sideways), np.arctan2(sideways, self.depth)
        self.in_sector = (radius <= reach) & (np.abs(angle) <= half_angle)
        beams, samples = (angle / half_angle + 1) / 2 * (BEAMS - 1), radius / reach * (SAMPLES - 1)
        self.at = np.stack([samples[self.in_sector], beams[self.in_sector]])
        self.radius = np.linspace(0, reach, SAMPLES, dtype=np.float32)[:, None]
        self.angle = np.linspace(-half_angle, half_angle, BEAMS, dtype=np.float32)[None]
        self.sigmas = (PULSE_MM / reach * (SAMPLES - 1), BEAM_RAD / (2 * half_angle) * (BEAMS - 1))
        self.noise = rng.standard_normal((2, 2, SAMPLES, BEAMS), dtype=np.float32)
        # Variation between images, in dB: gain, blood, texture, attenuation, dropouts, clutter.
        worse = QUALITIES.index(patient_info(patient_index, seed).quality)
        white = rng.standard_normal((2, SAMPLES, BEAMS), dtype=np.float32)
        # Interfaces across the beam are bright: thin along it, long across it.
        coarse, streaks = gaussian_filter(white[0], (30, 18)), gaussian_filter(white[1], (4, 11))
        self.coarse_db, self.streaks_db = 4.5 * coarse / coarse.std(), 2.7 * streaks / streaks.std()
        self.blood_db = rng.uniform(-12.5, -6) + 1.0 * worse
        # Walls along the beam fade, the lateral wall (right) most; the time-gain compensation is not quite right.
        tilt_db, slope_db = rng.uniform(0, 6), rng.uniform(-0.03, 0.03)
        self.gain_db = rng.normal(0, 2) - tilt_db * self.angle / self.angle.max() - slope_db * self.radius
        for _ in range(rng.integers(1, 3 + worse)):
            centre, width = rng.uniform(-1, 1) * self.angle.max(), rng.uniform(0.04, 0.11)
            shadow = np.exp(-(((self.angle - centre) / width) ** 2)) * np.clip(self.radius / 40, 0, 1)
            self.gain_db = self.gain_db - rng.uniform(2, 7 + 2 * worse) * shadow
        # Near the probe: clutter from the chest wall, and its reverberation rings.
        rings = np.cos(2 * np.pi * self.radius / rng.uniform(3, 5)) * np.exp(-self.radius / 8)
        self.gain_db = self.gain_db + rng.uniform(2, 6) * np.exp(-self.radius / rng.uniform(10, 18)) + 4 * rings

    def echo_db(self, contraction: float) -> np.ndarray:
        """Strength of the echo in dB in beam space [SAMPLES, BEAMS], before gain."""
        heart = geometry_at(self.geometry, contraction)
        radius, length = heart.radii_mm[VIEWS.index(self.view)], heart.length_mm
        depth, lateral = self.radius * np.cos(self.angle), self.radius * np.sin(self.angle) + heart.probe_offset_mm
        along, across = heart_coordinates(heart, self.view, depth, lateral)
        labels = labels_at(heart, self.view, along, across)
        outer, outer_half_length = radius + heart.wall_mm, heart.half_length_mm + heart.wall_mm
        from_edge = np.hypot(across / outer, (along - heart.half_length_mm) / outer_half_length) - 1
        tissue = self.coarse_db + self.streaks_db
        # The pericardium is bright, most of all at depth.
        outside = tissue + 6 * np.exp(-((from_edge / 0.08) ** 2)) * depth / heart.depth_mm
        # Trabeculae: the brightest streaks continue into the cavity's rim.
        haze = self.blood_db + 0.8 * self.coarse_db + 0.5 * self.streaks_db
        blood = haze + 2 * np.clip(self.streaks_db - 3, 0, 4) * (from_edge > -0.6)
        if self.view == View.FOUR_CHAMBER:  # the right heart, dark and unlabelled, lies to the left of the septum
            right_ventricle = np.hypot((across + outer + 14) / 16, (along / length - 0.66) / 0.36)
            right_atrium = np.hypot((across + heart.atrium_mm[0] + 26) / 18, (along - length - 19) / 17)
            dark = (1.15 - np.minimum(right_ventricle, right_atrium) + 0.03 * self.coarse_db) / 0.3
            outside = outside + np.clip(dark, 0, 1) * (haze - outside)
        echo = np.select([labels == MYO, labels == BACKGROUND], [tissue + 1.5, outside], blood)
        # Mitral leaflets: a thin bright curve that sags towards the ventricle while the valve closes.
        base = radius * (1 - heart.truncation**2) ** 0.5
        curve = along - length + (1 - contraction) * 5 * (1 - np.abs(across / base)) - 1
        return np.where((np.abs(curve) < 1) & (np.abs(across) < base), np.maximum(echo, 2 + self.streaks_db), echo)

    def picture(self, contraction: float) -> np.ndarray:
        """The image, uint8 [H,W]: the envelope of filtered complex noise, smoothed, compressed and scan-converted.

        A constant width in beam space makes the lateral correlation grow with depth (Wagner et al. 1983, IEEE Trans.
        Sonics Ultrason. 30(3)). Over the beat, the noise blends from one draw into another, so neighbours are alike.
        """
        noise = np.cos(np.pi / 2 * contraction) * self.noise[0] + np.sin(np.pi / 2 * contraction) * self.noise[1]
        amplitude = 10 ** ((self.echo_db(contraction) + self.gain_db) / 20)
        real, imaginary = (gaussian_filter(part * amplitude, self.sigmas) for part in noise)
        # Filtering white noise of unit power with sigmas s and t leaves 1 / (4 pi s t) of it, in each of the two parts.
        power = 2 * np.pi * np.prod(self.sigmas) * gaussian_filter(real**2 + imaginary**2, self.sigmas)
        grey = TISSUE_GREY * (power + HISS * noise[0] ** 2).astype(np.float32) ** 0.25
        image = np.zeros(self.in_sector.shape, np.uint8)
        image[self.in_sector] = np.rint(map_coordinates(grey, self.at, order=1, mode="nearest").clip(1, 255))
        return image

    def mask(self, contraction: float) -> np.ndarray:
        """The labels, uint8 [H,W]; like the experts' contours they continue outside the sector."""
        heart = geometry_at(self.geometry, contraction)
        return labels_at(heart, self.view, *heart_coordinates(heart, self.view, self.depth, self.lateral))


def write_patient(source: str, seed: int, sequences: bool, scale: float, patient_index: int) -> None:
    """Write one patient's folder: four stills with masks, two cfg files and, on request, two half sequences."""
    info = patient_info(patient_index, seed)
    dtype = (np.float32, np.uint8)[patient_index // 2 % 2]  # the release has both; here, each occurs at every spacing
    for view in VIEWS:
        scanner = Scanner(patient_index, seed, view, scale)
        patient = scanner.geometry.patient
        camus.write_info(source, patient, view, info)
        for suffix, draw in (("", scanner.picture), ("_gt", scanner.mask)):
            for phase, contraction in CONTRACTION.items():
                path = camus.recording_path(source, patient, view, phase, suffix)
                nifti.write_nifti(path, draw(contraction).astype(dtype), scanner.spacing_mm)
            if sequences:
                beat = np.abs(np.linspace(0, 1, info.num_frames) - (info.es == 1))
                path = camus.recording_path(source, patient, view, "half_sequence", suffix)  # in place of a phase
                nifti.write_nifti(path, np.stack([draw(moment) for moment in beat]), scanner.spacing_mm)


def split_patients(patients: list[str], seed: int) -> dict[str, list[str]]:
    """Patients by group, about 80:10:10; with three or more patients, no group is empty."""
    held_out = max(1, round(len(patients) / 10)) if len(patients) >= 3 else 0
    shuffled = np.random.default_rng(seed).permutation(patients).tolist()
    val, test, train = shuffled[:held_out], shuffled[held_out : 2 * held_out], shuffled[2 * held_out :]
    return {"train": sorted(train), "val": sorted(val), "test": sorted(test)}


def write_phantom(
    source: str, patients: int = 50, seed: int = 0, sequences: bool = False, scale: float = 1.0, workers: int = 1
) -> None:
    """Write a synthetic CAMUS tree; the same seed produces the same bytes, whatever the number of workers.

    Args:
        source: The folder to write: empty, or with this same phantom in it.
        patients: Number of patients.
        seed: Seed of every heart and every image.
        sequences: Also write the half sequences between the two stills.
        scale: Rows and columns as a share of full size; the spacing grows as they shrink.
        workers: Processes that render patients in parallel.
    """
    if patients < 1 or workers < 1 or seed < 0 or not 0.05 <= scale <= 1:
        given = f"not --patients {patients} --workers {workers} --seed {seed} --scale {scale:g}"
        limits = "at least 1 patient and 1 worker, a seed of at least 0 and a scale of 0.05 to 1"
        raise UserError(f"A phantom needs {limits}, {given}.")
    marker = filesystem.join(source, camus.PHANTOM_NOTE)
    made_with = {"patients": patients, "seed": seed, "sequences": sequences, "scale": scale}
    if filesystem.exists(marker):
        require(filesystem.read_json(marker) == made_with, f"{source} holds a phantom with other settings: remove it first.")
    elif filesystem.list_names(filesystem.join(source, camus.IMAGES_FOLDER)):
        raise UserError(f"{source} holds patients that are not synthetic: give an empty folder.")
    filesystem.publish_json(marker, made_with)
    job, numbers = partial(write_patient, source, seed, sequences, scale), range(1, patients + 1)
    # Spawned, since a forked child would inherit the locks of pyarrow's threads; one worker needs no process of its own.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        written = (pool.map if workers > 1 else map)(job, numbers)
        list(tqdm(written, total=patients, desc="phantom", unit=" patients", disable=None))
    # Written last, so that a tree with split files is complete.
    camus.write_groups(source, split_patients([patient_geometry(number, seed).patient for number in numbers], seed))


if __name__ == "__main__":
    try:
        tyro.cli(write_phantom, prog="python -m heartseg.datasets.phantom", config=(tyro.conf.PositionalRequiredArgs,))
    except (UserError, StorageError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
