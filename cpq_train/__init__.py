"""Quantization-aware training of sparse and dense networks: any of PyTorch and spconv, CenterPoint above all.

What is listed here is the library; each name is imported when it is first used, so that a program that needs
no torch does not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cpq_train.common.errors import UserError
    from cpq_train.library.calibration import calibrate, fold
    from cpq_train.library.checkpoints import load, save
    from cpq_train.library.verification import verify
    from cpq_train.models import CenterPoint, NetworkConfig
    from cpq_train.quantization.coverage import coverage
    from cpq_train.quantization.prepare import prepare
    from cpq_train.quantization.prepared import frozen
    from cpq_train.quantization.scheme import Scheme
    from cpq_train.report.compare import compare
    from cpq_train.sparse import ResidualAdd
    from cpq_train.training.detector import CenterPointDetector

_HOME = {
    "CenterPoint": "models",
    "CenterPointDetector": "training.detector",
    "NetworkConfig": "models",
    "ResidualAdd": "sparse",
    "Scheme": "quantization.scheme",
    "UserError": "common.errors",
    "calibrate": "library.calibration",
    "compare": "report.compare",
    "coverage": "quantization.coverage",
    "fold": "library.calibration",
    "frozen": "quantization.prepared",
    "load": "library.checkpoints",
    "prepare": "quantization.prepare",
    "save": "library.checkpoints",
    "verify": "library.verification",
}
"""Name -> the module that defines it."""

__all__ = [
    "CenterPoint",
    "CenterPointDetector",
    "NetworkConfig",
    "ResidualAdd",
    "Scheme",
    "UserError",
    "calibrate",
    "compare",
    "coverage",
    "fold",
    "frozen",
    "load",
    "prepare",
    "save",
    "verify",
]


if not TYPE_CHECKING:  # to mypy it would be every name there is

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
