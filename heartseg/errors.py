"""The errors that a user is to read, not a programmer."""

import contextlib
import errno
import os
from collections.abc import Iterator

# A full disk, a used-up quota, a read-only or forbidden folder: the user can fix these; they are no bug of ours.
USER_FIXABLE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


class UserError(Exception):
    """Something that the user can fix; the message is one line: what is wrong, with its value, and what to do."""


class StorageError(UserError):
    """An object store that cannot be reached or that refuses; unlike a user's mistake, the next attempt may succeed."""


class OutOfMemory(UserError):
    """Memory ran out on one rank; the other ranks do not know."""


def format_write_error(error: OSError, path: str) -> str:
    """The one-line message for a full disk or a storage that refuses a write."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"{path} cannot be written ({reason}): make room or give another folder, then rerun the same command to resume."


@contextlib.contextmanager
def io_errors_as_user_errors(path: str = "A file") -> Iterator[None]:
    """Turn an OSError of USER_FIXABLE_ERRNOS into a UserError that names its file, or `path` if it has none."""
    try:
        yield
    except OSError as error:
        if error.errno not in USER_FIXABLE_ERRNOS:
            raise
        raise UserError(format_write_error(error, error.filename or path)) from error


def require(condition: bool, message: str) -> None:
    """Raise UserError with a message unless a condition holds."""
    if not condition:
        raise UserError(message)
