"""Numbers and bytes that a model stores, as a tree of its modules; for any PyTorch model.

The tree has the form of fvcore's `parameter_count_table`: modules by their dotted names down to a depth,
parameters that lie above it by their shapes, counts in units of 1000 from 100 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from cpq_train.quantization.quantizer import Quantizer

UNITS = ((1e8, 1e9, "G"), (1e5, 1e6, "M"), (1e2, 1e3, "K"))
"""Numbers above the first are given in the second, with one decimal."""

BITS_PER_BYTE = 8
MAX_DEPTH = 3
"""Levels of the tree below the whole."""


@dataclass(frozen=True)
class StorageRow:
    """A module or parameter of the tree.

    Attributes:
        name: Dotted name; "model" for the whole.
        level: Depth in the tree, 0 for the whole.
        shape: Of a parameter; None for a module.
        num_elements: Numbers in its parameters.
        float_bytes: Bytes of them as they are held in training.
        stored_bytes: Bytes of them at the bits that they are stored with, with the ranges of quantizers.
    """

    name: str
    level: int
    shape: tuple[int, ...] | None
    num_elements: int
    float_bytes: int
    stored_bytes: float

    def cells(self) -> tuple[str, str]:
        """Name and count, indented, as the tree shows them."""
        indent = " " * self.level
        return indent + self.name, indent + (format_count(self.num_elements) if self.shape is None else
                                             str(self.shape))  # fmt: skip


def format_count(count: int) -> str:
    """A count as fvcore writes it: 99, 0.1K, 27.8K, 0.1M, 8.9M."""
    for above, unit, letter in UNITS:
        if count > above:
            return f"{count / unit:.1f}{letter}"
    return str(count)


def storage_rows(model: nn.Module) -> list[StorageRow]:
    """The tree of a model's parameters.

    A quantized layer's weight has the bits of its scheme, every other parameter those of its dtype. Learned
    ranges are no parameters here: like all ranges they count as stored, in fp32.

    Args:
        model: Any model; modules without parameters are left out.

    Returns:
        Rows from the top down, members in the order of the model.
    """
    parameters = {name: p for name, p in model.named_parameters() if not name.endswith("_log_amax")}
    stored = _stored_bytes(model, parameters)
    names: dict[str, list[str]] = {"": list(parameters)}
    for name in parameters:
        parts = name.split(".")
        for depth in range(1, min(len(parts), MAX_DEPTH) + 1):
            names.setdefault(".".join(parts[:depth]), []).append(name)

    def row(prefix: str) -> StorageRow:
        members = [parameters[name] for name in names[prefix]]
        mine = [num for name, num in stored.items() if not prefix or f"{name}.".startswith(f"{prefix}.")]
        return StorageRow(
            prefix or "model",
            prefix.count(".") + 1 if prefix else 0,
            tuple(parameters[prefix].shape) if prefix in parameters else None,
            sum(p.numel() for p in members),
            sum(p.nbytes for p in members),
            sum(mine),
        )

    return [row(prefix) for prefix in names]


def _stored_bytes(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> bytes of every parameter and range."""
    bits = weight_bits(model)
    stored = {
        n: p.numel() * bits[n] / BITS_PER_BYTE if n in bits else p.nbytes for n, p in parameters.items()
    }
    return stored | {name: b.nbytes for name, b in model.named_buffers() if name.endswith("_amax")}


def weight_bits(model: nn.Module) -> dict[str, int]:
    """Name -> bits of every quantized weight."""
    found = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "_weight_quantizer", None)
        if isinstance(quantizer, Quantizer):
            found[f"{name}.weight"] = quantizer.format.bits
    return found
