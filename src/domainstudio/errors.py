"""Mistakes of the user, told in one message: what was given, what is allowed, what to do."""


class UserError(ValueError):
    """Something the user gave cannot be used; the command line prints the message and exits with 2."""


class MissingWeights(UserError):
    """The weights of a metric network are not on this machine; the message says how to get them."""
