"""A person's mistakes that a library or the system finds, told in a line as our own errors are."""

from __future__ import annotations

import errno
import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from cpq_train.common.errors import UserError
from cpq_train.common.files import FULL, cannot_write

_LIBRARIES = ("lightning.", "jsonargparse.", "wandb.", "mlflow.")
"""Packages whose own `raise` is addressed to whoever configured them."""

_OF_FILES = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, *FULL),
)
"""What a person does something about; any other error of the system is told as it is."""


@contextmanager
def naming_mistakes() -> Iterator[None]:
    """Turn what a library refuses with a message of its own, and files that cannot be used, into `UserError`.

    Raises:
        UserError: In their place.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno not in _OF_FILES or (error.filename is None and error.errno not in FULL):
            raise
        if error.errno in FULL and error.filename is not None:
            raise UserError(cannot_write(Path(str(error.filename)), None, error)) from error
        name = "a file" if error.filename is None else repr(str(error.filename))
        raise UserError(f"{name} cannot be used: {error.strerror}") from error
    except Exception as error:
        found = _said_to_a_person(error)
        if found is None:
            raise
        raise UserError(_in_a_line(found)) from error


def _said_to_a_person(error: BaseException | None) -> BaseException | None:
    """The first cause of an error, if it is one that a library raises itself."""
    said = None
    while error is not None:
        if isinstance(error, UserError) or _is_raised_by_a_library(error.__traceback__):
            said = error
        error = error.__cause__
    return said


def _is_raised_by_a_library(trace: TracebackType | None) -> bool:
    """Whether its last frame is a `raise` of one of the libraries, and not a mistake that they made."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code, name = trace.tb_frame.f_code, str(trace.tb_frame.f_globals.get("__name__"))
    line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
    return name.startswith(_LIBRARIES) and line.startswith("raise")


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())
