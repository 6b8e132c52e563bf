"""The errors that a user is to read, not a programmer."""

import contextlib
import errno
import os
from collections.abc import Iterator

# A full disk, a used-up quota, a read-only or forbidden folder: the user's to mend, and no fault of ours.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


class UserError(Exception):
    """Something that the user can mend; the message is one sentence that names the thing and says how."""


class StorageError(UserError):
    """An object store that cannot be reached or that refuses; unlike a mistake, it may work at the next try."""


class OutOfMemory(UserError):
    """Memory ran out on one rank; the other ranks do not know."""


def say_refused(error: OSError, path: str) -> str:
    """The sentence for a disk that is full or a storage that refuses a write."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"{path} cannot be written ({reason}): make room or give another folder, then the same command goes on."


@contextlib.contextmanager
def refusals_told(path: str = "A file") -> Iterator[None]:
    """Make an OSError that is one of REFUSALS a UserError that names its file, or `path` where it has none; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise UserError(say_refused(error, error.filename or path)) from error


def require(condition: bool, sentence: str) -> None:
    """Raise UserError with a sentence where a condition does not hold."""
    if not condition:
        raise UserError(sentence)
