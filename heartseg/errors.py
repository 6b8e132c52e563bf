"""The errors that a user is to read, not a programmer."""

import errno

# A full disk, a used-up quota, a read-only or forbidden folder: the user's to mend, and no fault of ours.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


class UserError(Exception):
    """Something that the user can mend; the message is one sentence that names the thing and says how."""


class StorageError(UserError):
    """An object store that cannot be reached or that refuses; unlike a mistake, it may work at the next try."""


class OutOfMemory(UserError):
    """Memory ran out on one rank; the other ranks do not know."""


def require(condition: bool, sentence: str) -> None:
    """Raise UserError with a sentence where a condition does not hold."""
    if not condition:
        raise UserError(sentence)
