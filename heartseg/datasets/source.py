"""Whatever shards are made from, the CAMUS tree or a plain folder of pairs, behind one door."""

from heartseg.datasets.camus import IMAGES_FOLDER, CamusTree
from heartseg.datasets.image_folder import LAYOUT, ImageFolder
from heartseg.errors import UserError
from heartseg.storage import filesystem


def open_source(path: str) -> CamusTree | ImageFolder:
    """The source at a path; both kinds have the same methods. Raises UserError if neither is there."""
    for source in (CamusTree(path), ImageFolder(path)):
        if source.is_there():
            return source
    if not filesystem.exists(path):
        raise UserError(f"The source {path} does not exist: give the folder that holds {IMAGES_FOLDER}/ or {LAYOUT}.")
    raise UserError(f"{path} holds no {IMAGES_FOLDER}/ (the CAMUS release), and no {LAYOUT} either.")
