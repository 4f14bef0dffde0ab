"""What the reader of any target does: open a file, and compare it with what its writer makes of the plan."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.export.graph import onnx
from cpq_train.export.plan import Plan


def open_model(
    file: Path, check: Callable[[Any], None] = onnx.checker.check_model
) -> tuple[Any, dict[str, NDArray[Any]]]:
    """An ONNX file, and its numbers by name.

    Args:
        file: The file.
        check: Looks at its form.

    Raises:
        UserError: It is none, or `check` says so.
    """
    try:
        model = onnx.load(str(file))
        check(model)
        numbers = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    except UserError:
        raise
    except Exception as error:  # protobuf's own, and whatever a damaged file makes of it
        raise UserError(f"{file}: no ONNX file ({first_line(error)})") from error
    return model, numbers


def check_form(model: Any, plan: Plan, write: Callable[[Plan], Any], where: str) -> None:
    """Whether a file is, node by node and number by number, what a writer makes of a plan.

    Args:
        model: Content of the file.
        plan: What was read from it.
        write: The writer, which makes the content of a file.
        where: What to call the file in messages.

    Raises:
        UserError: It is not; names the first tensor that differs.
    """
    try:
        expected = write(plan)
    except Exception as error:  # whatever numbers that fit no network make of the writer
        raise UserError(f"{where}: its numbers make no network ({first_line(error)})") from error
    for kind in ("node", "initializer", "input", "output"):
        for found, wanted in zip_longest(getattr(model.graph, kind), getattr(expected.graph, kind)):
            if found != wanted:
                one = wanted if found is None else found
                name = one.output[0] if kind == "node" else one.name
                raise UserError(f"{where}: {kind} {name!r} is not what the writer makes of the rest")
    if model != expected:
        raise UserError(f"{where}: has more than nodes and numbers, or another version of the operators")


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error) or type(error).__name__).splitlines()[0]


def attributes_of(node: Any) -> dict[str, Any]:
    """Name -> value of every attribute of a node; texts as such."""
    values = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
