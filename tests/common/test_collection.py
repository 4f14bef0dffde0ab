"""Importing without a search for garbage."""

import gc
import sys
from types import ModuleType

import pytest

from cpq_train.common.collection import collection_paused, importing_for_good


def test_paused_and_taken_up_again() -> None:
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), collection_paused():
        raise ImportError
    assert gc.isenabled()


def test_only_what_was_imported_is_kept_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called again in one process, a verb leaves no garbage of the verb before."""
    before = gc.get_freeze_count()
    try:
        with importing_for_good():
            pass
        assert gc.get_freeze_count() == before
        with importing_for_good():
            monkeypatch.setitem(sys.modules, "made_up", ModuleType("made_up"))
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
