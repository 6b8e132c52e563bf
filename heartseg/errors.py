"""The one exception that a user is meant to read: jobs print it as a sentence, without a traceback, and exit with code 2."""


class UserError(Exception):
    """A mistake that the user can mend; the message is one sentence that names the thing and the mend."""
