"""The import of spconv, which costs more than all else that a command does before it starts.

spconv 2.3 makes some 10 million objects for its tables of kernels. Hardly any is garbage, and Python looks
for garbage among them again and again; and deep inside other imports its many small calls may lie across the
end of a piece of Python's stack, which is then got and given back at each of them. So the command line
imports `cpq_train.sparse` first, and this pauses the search for garbage (`docs/performance.md`).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_spconv() -> Iterator[None]:
    """While open, no garbage is collected, and spconv's warnings of its own old names are not shown."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            # It decorates its kernels with torch.cuda.amp's old names: nine warnings on import.
            warnings.filterwarnings("ignore", message=".*torch.cuda.amp.custom_", category=FutureWarning)
            yield
    finally:
        if is_collecting:
            gc.enable()
