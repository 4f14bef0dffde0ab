"""The operators, by name: `torch.ops.cpq_train.encode(...)` and so on; `eager.py` says what each computes.

On CUDA they are Triton's kernels, where Triton can be imported, which comes with PyTorch's CUDA builds;
elsewhere PyTorch's own operators compute them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.library import Library

from cpq_train.quantization.numerics.device import eager

_BY_ROW = "Tensor flat, Tensor starts, int longest"
_RANGE = "Tensor scale, Tensor step, Tensor amax, float smallest, float largest"

SCHEMAS = {
    "encode": "(Tensor x, Tensor scale, float smallest, float largest) -> Tensor",
    "rectify": "(Tensor x, Tensor scale, Tensor amax, float largest, bool has_gradient)"
    " -> (Tensor, Tensor, Tensor)",
    "pass_masked": "(Tensor grad, Tensor mask, int bits) -> Tensor",
    "pass_inside": "(Tensor grad, Tensor x, Tensor amax) -> Tensor",
    "learn": f"(Tensor grad, Tensor x, {_RANGE}, float divisor, bool is_rectified) -> (Tensor, Tensor)",
    "add_rounded": f"(Tensor a, {_RANGE}, Tensor codes_b, Tensor step_b, bool has_gradient)"
    " -> (Tensor, Tensor)",
    "scale_rows_": "(Tensor(a!) sums, Tensor unit, Tensor? before, Tensor? behind, int axis) -> ()",
    "round_rows": f"({_BY_ROW}, Tensor scale, Tensor step, Tensor smallest, Tensor largest, bool has_values,"
    " bool has_sums) -> (Tensor, Tensor, Tensor)",
    "pass_rows": f"(Tensor grad, {_BY_ROW}, Tensor factor, Tensor amax) -> Tensor",
    "learn_rows": f"(Tensor grad, {_BY_ROW}, Tensor factor, Tensor amax, Tensor scale, Tensor step,"
    " Tensor smallest, Tensor largest) -> (Tensor, Tensor)",
}

_library = Library("cpq_train", "DEF")


def _by_kernel(name: str) -> Any:
    def call(*arguments: Any) -> Any:
        kernels: Any = import_module("cpq_train.quantization.numerics.device.triton_kernels")
        with torch.cuda.device(arguments[0].device):  # Triton launches on the current one
            return getattr(kernels, name)(*arguments)

    return call


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(eager, _name), "CompositeExplicitAutograd")
    if find_spec("triton") is not None:
        _library.impl(_name, _by_kernel(_name), "CUDA")

operators: Any = torch.ops.cpq_train
