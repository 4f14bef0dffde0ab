"""Watching a pass from within: an observer is told when each layer, and some functions, begin and end.

Hooks and wrapped functions are there only inside `observing`; outside of it nothing is left to cost anything.
A part is a layer, a container of layers, or a function. Quantizers are no parts: what they do belongs to
their layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from typing import Any, Protocol

from torch import nn

from cpq_train.quantization.quantizer import Quantizer


@dataclass(frozen=True)
class Part:
    """Something that a pass spends time and memory in.

    Attributes:
        name: Dotted name of the module; for a function that of the module it works for, a colon and what it
            does, or only what it does where it works for none.
        kind: Class of the module, or what the function does.
        is_layer: Whether it has a row of its own; a container has none.
    """

    name: str
    kind: str
    is_layer: bool = True


@dataclass(frozen=True)
class Function:
    """A function to watch: `owner.attribute`, looked up there by whoever calls it.

    Attributes:
        owner: Name of the Python module that its caller finds it in.
        attribute: Its name there.
        kind: What it does.
    """

    owner: str
    attribute: str
    kind: str


class Observer(Protocol):
    """What is told of a pass; parts are nested properly."""

    def enter(self, part: Part) -> None:
        """A part begins."""

    def leave(self, part: Part, output: Any) -> None:
        """The part entered last ends with this output."""


def parts_of(network: nn.Module) -> dict[str, Part]:
    """Name -> part of every module but quantizers; the network itself is a container named ''.

    A layer has no modules inside, or parameters of its own.
    """
    parts = {}
    for name, module in network.named_modules():
        if not isinstance(module, Quantizer):
            inner = [child for child in module.children() if not isinstance(child, Quantizer)]
            has_own = any(True for _ in module.parameters(recurse=False))
            is_layer = bool(name) and (not inner or has_own)
            parts[name] = Part(name, type(module).__name__, is_layer)
    return parts


@contextmanager
def observing(network: nn.Module, observer: Observer, functions: Iterable[Function] = ()) -> Iterator[None]:
    """Tell an observer of every call of a module of `network`, and of some functions."""
    open_parts: list[Part] = []

    def enter(part: Part) -> None:
        open_parts.append(part)
        observer.enter(part)

    def leave(output: Any) -> None:
        observer.leave(open_parts.pop(), output)

    def before(module: nn.Module, inputs: Any, *, part: Part) -> None:
        enter(part)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        leave(output)

    def wrap(function: Any, kind: str) -> Any:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            works_for = open_parts[-1].name if open_parts else ""
            is_of_module = works_for in parts and works_for
            enter(Part(f"{works_for}:{kind}" if is_of_module else kind, kind))
            output = function(*args, **kwargs)
            leave(output)
            return output

        return watched

    parts = parts_of(network)
    with ExitStack() as stack:
        for name, part in parts.items():
            module = network.get_submodule(name)
            # The first to be told of the beginning, and the last of the end: other hooks belong to the layer.
            first = module.register_forward_pre_hook(partial(before, part=part), prepend=True)
            stack.callback(first.remove)
            stack.callback(module.register_forward_hook(after).remove)
        for function in functions:
            owner = import_module(function.owner)
            original = getattr(owner, function.attribute)
            setattr(owner, function.attribute, wrap(original, function.kind))
            stack.callback(setattr, owner, function.attribute, original)
        yield
