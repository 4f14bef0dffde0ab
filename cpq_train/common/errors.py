"""Errors that are the user's to mend; the command line prints them without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave; names the thing, the value seen and the values accepted."""


class OptionError(UserError):
    """A mistake in the options of a verb, which `--help` lists."""


def shown(value: object) -> str:
    """A value in a message; what is long is cut."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
