"""Whatever shards are made from: the CAMUS tree or a plain folder of pairs, its stills or its sequences, read one way."""

from collections.abc import Callable, Iterator
from functools import partial

from heartseg.datasets import camus, image_folder
from heartseg.datasets.camus import Recording
from heartseg.errors import UserError
from heartseg.labels import VIEWS, Phase, View
from heartseg.storage import filesystem

FRAMES = ("stills", "sequence")


def find_patients(source: str) -> list[str]:
    """Names of the patients of a source, sorted; raises UserError where it holds none."""
    if image_folder.is_plain_folder(source):
        return list(image_folder.list_files(source))
    if filesystem.exists(source) and not filesystem.exists(filesystem.join(source, camus.IMAGES_FOLDER)):
        raise UserError(f"{source} holds no {camus.IMAGES_FOLDER}/ (the CAMUS release), and no {image_folder.LAYOUT} either.")
    return camus.find_patients(source)


def is_there(source: str) -> bool:
    """True where a source is what it was, as far as its own folders tell: a disk that is not mounted is an empty folder."""
    return image_folder.is_plain_folder(source) or filesystem.exists(filesystem.join(source, camus.IMAGES_FOLDER))


def read_groups(source: str) -> dict[str, list[str]]:
    """The split that a source comes with, group to patients; empty where it comes with none."""
    if image_folder.is_plain_folder(source):
        return image_folder.read_groups(source, list(image_folder.list_files(source)))
    return camus.read_groups(source)


def dataset_name(source: str, patients: list[str]) -> str:
    """`phantom`, `CAMUS`, or `other` for anybody else's."""
    return "other" if image_folder.is_plain_folder(source) else camus.dataset_name(source, patients)


def list_files(source: str, patients: list[str]) -> dict[str, list[list]]:
    """Names and sizes of the files of some patients: what tells a changed source without reading it."""
    if image_folder.is_plain_folder(source):
        found = image_folder.list_files(source)
        return {patient: found.get(patient, []) for patient in patients}
    return {patient: camus.list_files(source, patient) for patient in patients}


def file_paths(source: str, listing: dict[str, list[list]]) -> dict[str, list[str]]:
    """The paths below `source` of the files that `list_files` names, by patient."""
    plain = image_folder.is_plain_folder(source)
    return {
        patient: [name if plain else "/".join((camus.IMAGES_FOLDER, patient, name)) for name, _ in files]
        for patient, files in listing.items()
    }


def check_frames(source: str, patients: list[str], frames: str) -> None:
    """Raise UserError where sequences are asked for and nobody has one."""
    if frames == "sequence" and not image_folder.is_plain_folder(source):
        named = (name for patient in patients for name, _ in camus.list_files(source, patient))
        if not any(camus.HALF_SEQUENCE in name for name in named):
            raise UserError(f"{source} holds no *_{camus.HALF_SEQUENCE}.nii.gz: take --frames stills.")


def recordings(
    source: str, patient: str, files: list[str], frames: str, hashes: dict[str, str] | None = None
) -> Iterator[tuple[View | None, Phase | None, Callable[[], list[Recording]]]]:
    """(view, phase, a function that reads the frames) for each still, or each sequence, that a patient should have.

    The function raises DamagedRecording; the SHA-256 of each file that it reads goes into `hashes`, by path.
    """
    if image_folder.is_plain_folder(source):
        yield from image_folder.recordings(source, patient, files, frames, hashes)
    elif frames == "sequence":
        for view in VIEWS:
            yield view, None, partial(camus.read_half_sequence, source, patient, view, hashes)
    else:
        for view, phase in camus.stills_of():
            yield view, phase, partial(read_one, source, patient, view, phase, hashes)


def read_one(source: str, patient: str, view: View, phase: Phase, hashes: dict | None) -> list[Recording]:
    """A still as a list of one frame; raises DamagedRecording."""
    return [camus.read_still(source, patient, view, phase, hashes)]
