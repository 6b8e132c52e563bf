"""Downloads CAMUS from its authors' server, by patient: `python jobs/download.py --out /data/CAMUS --accept-licence`."""

import contextlib
import itertools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from heartseg.datasets import camus, girder_client, nifti
from heartseg.datasets.girder_client import DamagedDownload, FailedDownload
from heartseg.errors import UserError, format_write_error, require
from heartseg.storage import filesystem, locks
from jobs.support import command_line

SERVER = "https://humanheart-project.creatis.insa-lyon.fr/database/api/v1"
IMAGES_ID, SPLIT_ID = "63fde55f73e9f004868fb7ac", "66e27d12961576b1bad4e4e1"
# Folders are unpacked and checked in this one, on the same disk as the finished patients, but never mistaken for one of them.
UNFINISHED = ".download"
# If this many folders fail in a row, the server or the network is down.
MAX_FAILED_IN_A_ROW = 5
TERMS = """CAMUS (Cardiac Acquisitions for Multi-structure Ultrasound Segmentation), Creatis, Lyon. Its terms:
  - CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): non-commercial scientific research only;
    anything made from it, including models trained on it, keeps this licence.
  - Publications cite S. Leclerc, E. Smistad, J. Pedrosa, A. Ostvik et al., "Deep Learning for Segmentation using an Open
    Large-Scale Dataset in 2D Echocardiography", IEEE Transactions on Medical Imaging 38(9), 2198-2210, 2019,
    doi:10.1109/TMI.2019.2900516.
  - The authors' own wording is what counts: https://www.creatis.insa-lyon.fr/Challenge/camus/databases.html
"""


@dataclass(frozen=True)
class Options:
    """What to download, and to which folder."""

    out: str = ""
    """Local folder for the tree, which is the `--source` of preprocess.py."""
    accept_licence: bool = False
    """Confirm that you have read the terms shown and will comply with them."""
    patients: str = ""
    """Numbers of the patients to fetch, such as 1-10,42; all if not given."""
    server: str = SERVER
    """URL of the Girder API: the authors', or of a mirror with the same folders."""
    tries: int = 5
    """Number of tries for each download before its patient is skipped."""
    wait_s: float = 2.0
    """Seconds before the second try; doubles with each further try."""
    timeout_s: float = 60.0
    """Seconds of silence before a connection is dropped."""


def run(options: Options) -> str:
    """Fetch what is missing; returns the folder. Raises UserError naming the patients that could not be fetched."""
    out = command_line.required_path(options.out, "out", "a local folder")
    require(not filesystem.is_uri(out), f"--out {out} is not a local folder: download to one, then copy the tree there.")
    tries, wait_s, timeout_s = options.tries, options.wait_s, options.timeout_s
    message = f"--tries ({tries}) must be at least 1, --wait-s ({wait_s:g}) at least 0 and --timeout-s ({timeout_s:g}) above 0."
    require(tries >= 1 and wait_s >= 0 and timeout_s > 0, message)
    numbers = parse_numbers(options.patients)
    server = girder_client.Server(options.server, tries, wait_s, timeout_s)
    print(TERMS)
    require(options.accept_licence, "The terms above must be accepted first: add --accept-licence.")
    try:
        with locks.lock(out), contextlib.ExitStack() as at_end:
            at_end.callback(filesystem.remove, filesystem.join(out, UNFINISHED))
            ids = list_patients(server, numbers)
            if not filesystem.exists(filesystem.join(out, camus.IMAGES_FOLDER)):  # an existing tree may be a hospital's
                filesystem.publish_json(filesystem.join(out, camus.DOWNLOAD_NOTE), {"server": server.base})
            failed = fetch_all(server, out, ids)
    except OSError as error:
        raise UserError(format_write_error(error, out)) from error
    problem = f"{len(failed)} of {len(ids) + 1} folders could not be fetched ({', '.join(failed)})"
    require(not failed, f"{problem}: rerun the same command to try them again.")
    print(f"{len(ids)} patients: {out}")
    return out


def parse_numbers(text: str) -> set[int]:
    """The numbers in `1-10,42`; raises UserError."""
    numbers: set[int] = set()
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        require(bool(found), f"--patients {text} is not a list of numbers: give one such as 1-10,42.")
        numbers |= set(found)
    return numbers


def list_patients(server: girder_client.Server, numbers: set[int]) -> dict[str, str]:
    """Names and folder ids of the patients with these numbers, or of all; raises UserError for an unknown number."""
    try:
        folders = server.list_folders(IMAGES_ID)
    except FailedDownload as error:
        raise UserError(f"The server {server.base} {error}: check the network and --server, then try again.") from error
    names = {int(name.removeprefix("patient")): name for name in folders if camus.PATIENT_PATTERN.fullmatch(name)}
    require(bool(names), f"The server {server.base} lists no patients: check --server.")
    if unknown := numbers - names.keys():
        known = f"choose from its {len(names)} patients, {names[min(names)]} to {names[max(names)]}"
        raise UserError(f"The server has no patient {min(unknown)}: {known}.")
    return {names[number]: folders[names[number]] for number in sorted(numbers or names)}


def fetch_all(server: girder_client.Server, out: str, ids: dict[str, str]) -> list[str]:
    """Fetch the split and the patients that are missing; returns the names of the folders that failed."""
    folders = {camus.SPLIT_FOLDER: SPLIT_ID}
    folders |= {filesystem.join(camus.IMAGES_FOLDER, patient): identity for patient, identity in ids.items()}
    failed, in_a_row = [], 0
    with tqdm(folders.items(), unit=" folders", desc="download", file=sys.stdout, mininterval=1, disable=None) as bar:
        for place, identity in bar:
            name = os.path.basename(place)
            try:
                for note in fetch_folder(server, out, place, identity):
                    bar.write(f"{name} {note}", file=sys.stdout)
                in_a_row = 0
            except FailedDownload as error:
                bar.write(f"failed  {name}: {error}", file=sys.stdout)
                failed.append(name)
                in_a_row += 1
            message = f"{in_a_row} folders in a row failed, the last being {name}: rerun the same command later."
            require(in_a_row < MAX_FAILED_IN_A_ROW, message)
    return failed


def fetch_folder(server: girder_client.Server, out: str, place: str, identity: str) -> list[str]:
    """Fetch one folder to `out/place`, complete and checked or not at all; returns notes for the user.

    An existing folder is left unchanged; raises FailedDownload, also if an existing folder is incomplete.
    """
    finished, name, unfinished = os.path.join(out, place), os.path.basename(place), os.path.join(out, UNFINISHED)
    if os.path.lexists(finished):
        # Never overwritten: it was complete when it arrived, so someone has changed it since, or it is not ours.
        if missing := missing_files(out, name):
            raise FailedDownload(f"{finished} already exists but lacks {missing[0]}: move it away")
        return []

    def unpack_and_check(packed: bytes) -> list[str]:
        filesystem.remove(unfinished)
        girder_client.unpack(packed, os.path.dirname(os.path.join(unfinished, place)))
        if missing := missing_files(unfinished, name):
            raise DamagedDownload(f"arrives without {missing[0]}")
        notes = (check_split if name == camus.SPLIT_FOLDER else check_patient)(unfinished, name)
        os.makedirs(os.path.dirname(finished), exist_ok=True)
        os.rename(os.path.join(unfinished, place), finished)
        return notes

    return server.fetch(f"folder/{identity}/download", unpack_and_check)


def missing_files(source: str, name: str) -> list[str]:
    """The required files that a patient's folder, or the split's, lacks."""
    wanted = [camus.recording_path(source, name, *still, suffix) for still in camus.stills_of() for suffix in ("", "_gt")]
    if name == camus.SPLIT_FOLDER:
        wanted = [filesystem.join(source, name, file) for file in camus.SPLIT_FILES.values()]
    return [os.path.basename(path) for path in wanted if not filesystem.size_or_none(path)]


def check_split(source: str, name: str) -> list[str]:
    """Raise DamagedDownload if a split file lists anything but patients; returns no notes."""
    try:
        groups = camus.CamusTree(source).groups()
    except UserError as error:
        raise DamagedDownload("arrives with split files that are not text") from error
    for entry in itertools.chain(*groups.values()):
        if not camus.PATIENT_PATTERN.fullmatch(entry):
            raise DamagedDownload(f"arrives with {entry[:40]!r} in place of a patient")
    return []


def check_patient(source: str, patient: str) -> list[str]:
    """A message for each cfg or half sequence that a patient lacks; raises DamagedDownload if a NIfTI file is not readable."""
    folder = os.path.join(source, camus.IMAGES_FOLDER, patient)
    names = filesystem.list_names(folder)
    for name in names:
        if name.endswith((".nii", ".nii.gz")):
            try:
                nifti.read_nifti(os.path.join(folder, name))
            except nifti.DamagedRecording as error:
                raise DamagedDownload(f"arrives with {name}, which {error.reason}") from error
    extras = [f"Info_{view}.cfg" for view in camus.VIEWS]
    extras += [f"{patient}_{view}_half_sequence{suffix}.nii.gz" for view in camus.VIEWS for suffix in ("", "_gt")]
    return [f"has no {name} on the server" for name in extras if name not in names]


def job(argv: list[str]) -> None:
    out = run(command_line.parse_line(Options, argv, "python jobs/download.py", "Fetch CAMUS from its authors' server."))
    print(f"next: python jobs/preprocess.py camus --source {out} --out SHARDS")


if __name__ == "__main__":
    command_line.main(job)
