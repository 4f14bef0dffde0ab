"""Runs a network once to see how its layers are connected.

Names and the order of registration say nothing for sure: a block may normalise before it convolves, one
convolution may feed two normalisations, two branches may read one tensor. So the network runs on an example,
and every reading of a tensor is noted, whether by a layer or by an operation between layers. Two readings are
of one tensor if object and version agree: an in-place ReLU in between makes it another, padding with zeros,
whose codes are 0, does not.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import count
from typing import Any, TypeAlias
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from cpq_train.quantization.layers.kinds import kind_of, why_refused
from cpq_train.quantization.scope import version_of
from cpq_train.quantization.switches import evaluating
from cpq_train.quantization.wiring import NEVER_CALLED, RESIDUAL, Wiring, arguments_of
from cpq_train.sparse import ResidualAdd, SparseConvTensor

_Key: TypeAlias = tuple[int, int]
"""Object and version of a tensor."""

DIMS_OF_OUTPUT = {"Conv1d": 3, "Conv2d": 4, "Conv3d": 5, "ConvTranspose2d": 4}
"""Dimensions of an output whose channels are on axis 1; features, sparse ones and those of Linear, have 2."""


def trace(network: nn.Module, example_input: Any) -> Wiring:
    """Run a float network once, in evaluation mode, and see how its layers are connected.

    Args:
        network: Any; its modes are afterwards what they were.
        example_input: Arguments of its forward pass, see `arguments_of`; every layer that will be used has to
            see a tensor with at least one element.
    """
    run = _Run(network)
    with (
        evaluating(network),
        torch.inference_mode(False),
        torch.no_grad(),
        run.watching(),
        run,
        _Dropout(run),
    ):
        kept = network(*arguments_of(example_input))
    run.note_what_is_left()
    del kept
    return run.wiring()


class _Run(TorchDispatchMode):
    """Notes who reads which tensor, and which layer made it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in network.named_modules()}
        self._layers = {n: m for m, n in self._names.items() if kind_of(m) is not None}
        self._norms = {n: m for m, n in self._names.items() if isinstance(m, _BatchNorm)}
        self._owners: dict[int, list[str]] = defaultdict(list)
        for module, name in self._names.items():
            for parameter in module._parameters.values():
                self._owners[id(parameter)].append(name)
        self._numbers, self._counter = WeakIdKeyDictionary(), count()  # an id() may be given out again
        self._padded: dict[_Key, _Key] = {}
        self._readers: dict[_Key, dict[str, None]] = {}
        self._inputs: dict[str, dict[_Key, float]] = {}  # with the largest magnitude of what a layer reads
        self._outputs: dict[str, dict[_Key, int]] = {}  # with the number of dimensions
        self._made: list[tuple[_Key, ref[Tensor]]] = []
        self._running: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.read_by_running((args, kwargs), f"the operation {func}")
        out = func(*args, **kwargs)
        if func is torch.ops.aten.constant_pad_nd.default and not any(args[2:]) and min(args[1]) >= 0:
            self._padded[self._key(out)] = self._source(args[0])
        return out

    def _is_layer(self, name: str) -> bool:
        return name in self._layers or name in self._norms

    def read(self, values: Any, reader: str) -> None:
        """Note that somebody reads the tensors among some values."""
        for tensor in _tensors(values):
            self._readers.setdefault(self._key(tensor), {})[reader] = None

    def read_by_running(self, values: Any, otherwise: str) -> None:
        """Note that the module that runs reads something, or, between modules, `otherwise`."""
        reader = self._running[-1] if self._running else otherwise
        if not self._is_layer(reader):  # a layer reads what it is given
            self.read(values, reader)

    def _key(self, tensor: Tensor) -> _Key:
        if tensor not in self._numbers:
            self._numbers[tensor] = next(self._counter)
        return self._numbers[tensor], version_of(tensor)

    def _source(self, tensor: Tensor) -> _Key:
        """A tensor without the zeros that pad it: their code is 0 whatever the range."""
        key = self._key(tensor)
        return self._padded.get(key, key)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, calls of layers, normalisations and all other modules without children are noted."""
        handles: list[RemovableHandle] = []
        for module, name in self._names.items():
            if self._is_layer(name) or not (isinstance(module, nn.Identity) or any(module.children())):
                begin, end = partial(self._begin, name), partial(self._end, name)
                handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                # First of all hooks: what another one makes of the output is not the layer's.
                handles.append(module.register_forward_hook(end, prepend=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(name)
        self.read((args, kwargs), name)
        if self._is_layer(name):
            given = _tensors(tuple(signature(module.forward).bind(*args, **kwargs).arguments.values()))
            members = (name, name + RESIDUAL) if isinstance(module, ResidualAdd) else (name,)
            for member, tensor in zip(members, given, strict=False):
                largest = float(tensor.abs().max()) if tensor.numel() else 0.0
                key = self._source(tensor) if name in self._layers else self._key(tensor)
                self._inputs.setdefault(member, {})[key] = largest

    def _end(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._running.pop()
        if name in self._layers:
            for tensor in _tensors(output):
                self._outputs.setdefault(name, {})[self._key(tensor)] = tensor.dim()
                self._made.append((self._key(tensor), ref(tensor)))

    def note_what_is_left(self) -> None:
        """What a normalisation read and outlives the run is read by whoever has it: returned, or kept."""
        normalised = {key for norm in self._norms for key in self._inputs.get(norm, ())}
        made = [(key, tensor) for key, tensor in self._made if key in normalised and tensor() is not None]
        if made:
            gc.collect()
        for key, tensor in made:
            if tensor() is not None:
                self._readers.setdefault(key, {})["what the network returns or keeps"] = None

    def wiring(self) -> Wiring:
        """What the run showed."""
        why_unfolded = {name: self._why_unfolded(name) for name in self._norms}
        reused = {m: tuple(seen.values()) for m, seen in self._inputs.items() if len(seen) > 1}
        return Wiring(
            one_tensor=self._groups(),
            folds={name: self._makers(name)[0] for name, why in why_unfolded.items() if not why},
            unfolded={name: why for name, why in why_unfolded.items() if why},
            never_called=tuple(n for n in (*self._layers, *self._norms) if n not in self._inputs),
            reused={m: seen for m, seen in reused.items() if m not in self._norms},
        )

    def _groups(self) -> tuple[tuple[str, ...], ...]:
        """The layers that read one tensor, in the order of the network."""
        readers: dict[_Key, dict[str, None]] = {}
        for member in (m for n in self._layers for m in (n, n + RESIDUAL) if m in self._inputs):
            for key in self._inputs[member]:
                readers.setdefault(key, {})[member] = None
        return tuple(dict.fromkeys(tuple(group) for group in readers.values() if len(group) > 1))

    def _makers(self, norm: str) -> list[str]:
        """The layers of whose outputs a normalisation reads any."""
        read = self._inputs[norm].keys()
        return [name for name, made in self._outputs.items() if made.keys() & read]

    def _why_unfolded(self, name: str) -> str:
        norm = self._norms[name]
        if name not in self._inputs:
            return NEVER_CALLED
        if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            return f"{type(norm).__name__} has a forward of its own"
        if norm.running_mean is None or norm.running_var is None:
            return "it has no running statistics and normalises by each batch"
        makers = self._makers(name)
        if len(makers) != 1:
            return f"it reads the outputs of {', '.join(makers)}" if makers else "it reads no layer's output"
        return self._why_not_into(makers[0], name)

    def _why_not_into(self, layer: str, norm: str) -> str:
        made = self._outputs[layer]
        if made.keys() != self._inputs[norm].keys():
            return f"it does not read all outputs of {layer} and nothing else"
        if others := {reader for key in made for reader in self._readers[key]} - {norm}:
            return f"the output of {layer} is also read by {', '.join(sorted(others))}"
        if why := why_refused(self._layers[layer]) or self._why_weight_stays(layer):
            return f"{layer} cannot take it up: {why}"
        dims = DIMS_OF_OUTPUT.get(str(kind_of(self._layers[layer])), 2)
        if set(made.values()) != {dims}:
            return f"{layer} has its channels on another axis than the one that is normalised"
        return ""

    def _why_weight_stays(self, layer: str) -> str:
        weight = getattr(self._layers[layer], "weight", None)
        if weight is None:
            return "it has no weight"
        owners = self._owners[id(weight)]
        if len(owners) > 1:
            return f"{' and '.join(owners)} have one weight"
        readers = self._readers.get(self._key(weight), {})
        return f"its weight is also read by {', '.join(sorted(readers))}" if readers else ""


class _Dropout(TorchFunctionMode):
    """Notes dropout, which in evaluation is no operation at all."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "dropout" in getattr(func, "__name__", ""):
            self._run.read_by_running((args, kwargs), f"the function {func.__name__}")
        return func(*args, **kwargs)


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among some values, those of a sparse tensor being its features."""
    leaves = (v.features if isinstance(v, SparseConvTensor) else v for v in tree_leaves(values))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
