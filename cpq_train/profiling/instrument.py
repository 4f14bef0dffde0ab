"""Watching a pass from within: an observer is told when each layer, and some functions, begin and end.

Hooks and wrapped functions are there only inside `observing`; outside of it nothing is left to cost anything.
A part is a layer, a container of layers, or a function. Quantizers are no parts: what they do belongs to
their layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from types import MethodType
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
        owner: Where its caller finds it: a Python module, or a class of one as `module:Class`.
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
def observing(
    network: nn.Module,
    observer: Observer,
    functions: Iterable[Function] = (),
    parts: Mapping[str, Part] | None = None,
) -> Iterator[None]:
    """Tell an observer of every call of a module of `network`, and of some functions.

    Several observers may watch at once, and stop in any order.

    Args:
        network: What is observed.
        observer: Who is told.
        functions: Which functions it is told of.
        parts: Name of a module -> the part that it is; None is `parts_of` the network.
    """
    parts = parts_of(network) if parts is None else parts
    listener = _Listener(observer, parts)
    with ExitStack() as stack:
        for name, part in parts.items():
            module = network.get_submodule(name)
            # The first to be told of the beginning, and the last of the end: other hooks belong to the layer.
            before = module.register_forward_pre_hook(partial(listener.before, part=part), prepend=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(listener.after).remove)
        for function in functions:
            stack.enter_context(_listening(function, listener))
        yield


class _Listener:
    """Knows which part is open, and names functions after it."""

    def __init__(self, observer: Observer, parts: Mapping[str, Part]) -> None:
        self._observer, self._parts = observer, parts
        self._open: list[Part] = []

    def before(self, module: nn.Module, inputs: Any, *, part: Part) -> None:
        self._enter(part)

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.leave(output)

    def enter_function(self, kind: str) -> None:
        works_for = self._open[-1].name if self._open else ""
        is_of_module = works_for and works_for in self._parts
        self._enter(Part(f"{works_for}:{kind}" if is_of_module else kind, kind))

    def leave(self, output: Any) -> None:
        self._observer.leave(self._open.pop(), output)

    def _enter(self, part: Part) -> None:
        self._open.append(part)
        self._observer.enter(part)


class _Watched:
    """Stands in for a function while anyone listens."""

    def __init__(self, function: Callable[..., Any], kind: str) -> None:
        self.function, self._kind = function, kind
        self.listeners: list[_Listener] = []

    def __get__(self, instance: object | None, owner: type) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for listener in self.listeners:
            listener.enter_function(self._kind)
        output = self.function(*args, **kwargs)
        for listener in reversed(self.listeners):
            listener.leave(output)
        return output


@contextmanager
def _listening(function: Function, listener: _Listener) -> Iterator[None]:
    owner = resolve_name(function.owner)
    watched = getattr(owner, function.attribute)
    if not isinstance(watched, _Watched):
        watched = _Watched(watched, function.kind)
        setattr(owner, function.attribute, watched)
    watched.listeners.append(listener)
    try:
        yield
    finally:
        watched.listeners.remove(listener)
        if not watched.listeners:
            setattr(owner, function.attribute, watched.function)
