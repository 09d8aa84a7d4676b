"""Mistakes of the user, told in one message: what was given, what is allowed, what to do."""


class UserError(ValueError):
    """Something the user gave cannot be used; the command line prints the message and exits with 2."""


class MissingWeights(UserError):
    """The weights of a metric network are not on this machine; the message says how to get them."""


def message_of(error: UserError | OSError) -> str:
    """The mistake in one message: of a file, its name and what is wrong with it."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
