"""Errors meant for users, not programmers: mistakes (UserError) and outages (StorageError)."""

import contextlib
import errno
import os
from collections.abc import Iterator

# A full disk, an exceeded quota, a read-only or forbidden folder: the user can fix these; they are not bugs.
USER_FIXABLE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
# A disk or network file system that does not respond.
OUTAGE_ERRNOS = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENXIO, errno.ENODEV,
}  # fmt: skip


class UserError(Exception):
    """A mistake that the user can fix; the message is one line: what is wrong, with its value, and what to do."""


class OneRankError(UserError):
    """A UserError on one rank only, such as running out of memory; the other ranks do not notice it."""


class StorageError(Exception):
    """Storage did not respond: files do not count as missing or damaged, and another attempt may succeed. One line."""


class StorageRefused(StorageError):
    """Storage rejected the request: the user must fix the credentials or the bucket."""


def format_write_error(error: OSError, path: str) -> str:
    """The one-line message for a failed write, such as on a full disk or in a read-only folder."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    fix = "free up space or fix the permissions, then rerun the same command to resume; or start over in another folder"
    return f"{path} cannot be written ({reason}): {fix}."


def outage(error: OSError, path: str) -> StorageError:
    """The StorageError for an OSError with one of OUTAGE_ERRNOS."""
    fix = "check its disk or network, then rerun the same command to resume"
    return StorageError(f"{path} cannot be reached ({os.strerror(error.errno)}): {fix}.")


@contextlib.contextmanager
def io_errors_as_user_errors(path: str = "A file") -> Iterator[None]:
    """Turn OSErrors of USER_FIXABLE_ERRNOS into UserErrors, and those of OUTAGE_ERRNOS into StorageErrors, naming the file."""
    try:
        yield
    except OSError as error:
        if error.errno in OUTAGE_ERRNOS:
            raise outage(error, error.filename or path) from error
        if error.errno not in USER_FIXABLE_ERRNOS:
            raise
        raise UserError(format_write_error(error, error.filename or path)) from error


def require(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
