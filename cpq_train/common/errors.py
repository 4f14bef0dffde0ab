"""Errors that are the user's to mend; the command line prints them without a traceback."""

from pathlib import Path
from reprlib import Repr


class UserError(ValueError):
    """A mistake in what the user gave; names the thing, the value seen and the values accepted."""


class LoadingError(UserError):
    """A file that cannot be used, found where samples are loaded.

    A data loader's worker hands exceptions over as the text of their traceback; this one keeps only its own
    message of it, so that the user reads the same whether a worker found it or not.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class OptionError(UserError):
    """A mistake in the options of a verb, which `--help` lists."""


class ForeignCheckpointError(UserError):
    """A file that is no checkpoint of this project; another may have written it.

    Attributes:
        path: The file.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class CheckFailed(Exception):
    """A score is not as `compare --fail_if` was told that it has to be; what it is was printed."""


def shown(value: object) -> str:
    """A value in a message; what is long or nested deep is cut."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes no whole number of more than some 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


_SHORT = Repr()
_SHORT.maxlevel = 4
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 20
