"""Errors that are the user's to mend; the command line prints them without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave; names the thing, the value seen and the values accepted."""
