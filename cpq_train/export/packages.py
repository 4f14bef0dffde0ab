"""The packages of the extra `deploy`, which only deployment files need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cpq_train.common.errors import UserError


def require(name: str) -> Any:
    """Import onnx or onnxruntime.

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"deployment files need {name}, which cannot be imported ({error}): pip install cpq_train[deploy]"
        ) from error
