"""What a network remembers of its preparation: the layers, what was chosen for them, and how they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from cpq_train.common.errors import UserError
from cpq_train.quantization.scheme import LayerScheme, Scheme
from cpq_train.quantization.scope import Scope, frozen_scope
from cpq_train.quantization.switches import quantized_layers, quantizers
from cpq_train.quantization.wiring import Wiring

ATTRIBUTE = "_cpq_prepared"
"""Where a network keeps it; a copy of the network has its own."""


@dataclass
class Prepared:
    """What `prepare` made of a network.

    Args:
        layers: Name -> kind of every layer that can be quantized.
        schemes: Name -> what was chosen for it.
        unknown: Name -> type of every other module with parameters of its own, but BatchNorm.
        scheme: What the network was prepared with; None where nothing is quantized.
        wiring: How its layers are connected; None where nobody looked.
        shares_input_with: Name -> the first consumer whose input quantizer it shares.
        provenance: What a checkpoint says of how the network came about: calibration, parents, trained_on.
        left_in_float: Names of the layers that `leave_in_float` took the quantizers out of.
        scope: What the network's quantizers remember while it computes.
        hooks: What opens and closes that around each forward pass.
    """

    layers: dict[str, str]
    schemes: dict[str, LayerScheme]
    unknown: dict[str, str] = field(default_factory=dict)
    scheme: Scheme | None = None
    wiring: Wiring | None = None
    shares_input_with: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    left_in_float: list[str] = field(default_factory=list)
    scope: Scope = field(default_factory=Scope)
    hooks: tuple[RemovableHandle, ...] = ()
    _untuned: int | None = None

    @property
    def folds(self) -> dict[str, str]:
        """BatchNorm -> the layer that takes it up; nothing where nobody looked."""
        return {} if self.wiring is None else dict(self.wiring.folds)

    def remember_weights(self, network: nn.Module) -> None:
        """Take what the network has now for what no training has changed."""
        self._untuned = _checksum(network)

    def is_tuned(self, network: nn.Module) -> bool:
        """Whether what training changes is no longer what was remembered, or nothing was."""
        return self._untuned != _checksum(network)


def _checksum(network: nn.Module) -> int:
    """CRC-32 of all values that training changes, whatever their memory format."""
    found = 0
    for tensor in _trained(network):
        # A tensor of one value or one pixel may have any strides and count as contiguous.
        plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1)
        found = crc32(plain.view(torch.uint8).numpy().data, found)
    return found


def _trained(network: nn.Module) -> Iterator[Tensor]:
    """Parameters, learned ranges among them, and the statistics of normalisations."""
    yield from network.parameters()
    for module in network.modules():
        if isinstance(module, _NormBase):
            yield from module.buffers(recurse=False)


def prepared_of(network: nn.Module) -> Prepared:
    """What `prepare` made of a network.

    Raises:
        UserError: It was not prepared.
    """
    found = network.__dict__.get(ATTRIBUTE)
    if found is None:
        inner = next((name for name, m in network.named_modules() if ATTRIBUTE in m.__dict__), None)
        hint = f"its .{inner} is" if inner else "first: prepare(network, scheme, example_input)"
        raise UserError(f"this {type(network).__name__} is not prepared; {hint}")
    return cast(Prepared, found)


def is_prepared(network: nn.Module) -> bool:
    """Whether a network has quantizers of ours, or remembers a preparation."""
    return ATTRIBUTE in network.__dict__ or bool(quantizers(network))


def frozen(network: nn.Module) -> AbstractContextManager[None]:
    """A block in which neither weights nor ranges change, so that ranges are worked out once.

        with frozen(network):
            for batch in loader:
                network(batch)

    A write that torch counts (an optimizer's step, `copy_`, `load_state_dict`) is an error of the next
    forward pass, and of leaving the block; behind one that it does not (`.data.copy_`), results are
    undefined. Nothing happens to a network that is not prepared.

    Raises:
        UserError: See above.
    """
    if ATTRIBUTE not in network.__dict__:
        return nullcontext()
    return frozen_scope(prepared_of(network).scope, _tensors_at_rest(network))


def _tensors_at_rest(network: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name -> module and attribute of every weight, bias and range of the quantized layers."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, quantizer in quantizers(network).items():
        if quantizer.scheme.mode == "static":
            attribute = "_amax" if quantizer._log_amax is None else "_log_amax"
            found[f"{name}.{attribute}"] = (quantizer, attribute)
    for name, layer in quantized_layers(network).items():
        for attribute in ("weight", "bias"):
            if hasattr(layer, attribute):
                found[f"{name}.{attribute}"] = (cast(Any, layer), attribute)
    return found
