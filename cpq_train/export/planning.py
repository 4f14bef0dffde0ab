"""From a quantized CenterPoint to its plan, or a refusal that names every layer that has no place in one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpq_train.common.errors import UserError
from cpq_train.export.parts import dense_part, sparse_part
from cpq_train.export.plan import (
    FEATURES,
    Addition,
    Concatenation,
    Convolution,
    Float32,
    HeightMap,
    InputRange,
    Operation,
    Plan,
)
from cpq_train.models import CenterPoint
from cpq_train.models.backbone_3d import SparseBasicBlock
from cpq_train.models.topology import names_of
from cpq_train.quantization.layers import QuantAdd, QuantizedConvolution
from cpq_train.quantization.numerics.biases import bias_codes
from cpq_train.quantization.numerics.fake_quant import SMALLEST_AMAX, round_to_codes
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.ranges.bias_steps import bias_problems
from cpq_train.quantization.reference.rulebook import Kernel
from cpq_train.sparse import ResidualAdd, SparseConv3d, SubMConv3d

Part = Literal["whole", "sparse", "dense"]
"""What a file holds of a network: all, what works on voxels up to their map, or what works on maps."""

SPARSE_PREFIX = "backbone_3d."
"""What the names of layers that work on voxels start with."""

MAX_WEIGHT_BITS = 8
"""Wider codes fit no engine's integer weights."""

CONVOLUTIONS = (SubMConv3d, SparseConv3d, nn.Conv2d, nn.ConvTranspose2d)


def output_name(head: int, branch: str) -> str:
    """Name of an output: `head<i>.<branch>`, i being the index of the class group."""
    return f"head{head}.{branch}"


@torch.no_grad()
def plan_of(network: CenterPoint, part: Part = "whole") -> Plan:
    """What a deployment file of a network says.

    Args:
        network: Quantized and calibrated, BatchNorm folded.
        part: How much of it.

    Raises:
        UserError: Layers cannot be exported; names each and says why.
    """
    refuse(why_not(network, part))
    plan = _whole_plan(network, part)
    return plan if part == "whole" else sparse_part(plan) if part == "sparse" else dense_part(plan)


def _whole_plan(network: CenterPoint, part: Part) -> Plan:
    """All operations; outside the part, which is cut off it, layers stand for their geometry alone."""
    walk = _Walk(names_of(network), part)
    sparse, bev, head = network.backbone_3d, network.backbone_2d, network.dense_head
    stages = (sparse.conv_input, sparse.conv1, sparse.conv2, sparse.conv3, sparse.conv4, sparse.conv_out)
    volume = walk.through(stages, FEATURES)
    x = walk.add(HeightMap(walk.names[network.map_to_bev_module], (volume,)))
    maps = []
    for level, upsampling in zip(bev.blocks, bev.deblocks, strict=True):
        x = walk.through([level], x)
        maps.append(walk.through([upsampling], x))
    joined = walk.add(Concatenation(walk.names[bev.concatenation], tuple(maps)))
    shared = walk.through([head.shared_conv], joined)
    outputs = {
        output_name(number, branch): walk.through([group.get_submodule(branch)], shared)
        for number, group in enumerate(head.heads_list)
        for branch in cast(Any, group).branches
    }
    grid = cast(tuple[int, int, int], tuple(sparse.sparse_shape))
    return Plan(network.config.num_point_features, grid, tuple(walk.operations), outputs)


@dataclass
class _Walk:
    """The operations on the way of a tensor through modules."""

    names: dict[nn.Module, str]
    part: Part
    operations: list[Operation] = field(default_factory=list)

    def add(self, operation: Operation) -> str:
        self.operations.append(operation)
        return operation.name

    def through(self, modules: Iterable[nn.Module], x: str) -> str:
        """The tensor behind modules that follow one another."""
        padding = (0, 0)
        for module in modules:
            if isinstance(module, CONVOLUTIONS):
                name = self.names[module]
                x = self.add(_convolution(name, module, x, padding, is_said=_is_in(self.part, name)))
                padding = (0, 0)
            elif isinstance(module, nn.ReLU):
                last = self.operations[-1]
                assert isinstance(last, Convolution | Addition)
                self.operations[-1] = replace(last, relu=True)
            elif isinstance(module, nn.ZeroPad2d):
                left, _, top, _ = module.padding  # the same on both sides
                padding = (top, left)
            elif isinstance(module, SparseBasicBlock):
                x = self._residual_block(module, x)
            elif not isinstance(module, nn.Identity):  # a folded BatchNorm
                x = self.through(module.children(), x)
        return x

    def _residual_block(self, block: SparseBasicBlock, x: str) -> str:
        branch = self.through([block.conv1, block.relu, block.conv2], x)
        name = self.names[block.quant_add]
        self.add(_addition(name, block.quant_add, branch, x, is_said=_is_in(self.part, name)))
        return self.through([block.relu], self.operations[-1].name)


def _is_in(part: Part, layer: str) -> bool:
    return part == "whole" or layer.startswith(SPARSE_PREFIX) == (part == "sparse")


def _convolution(name: str, layer: Any, source: str, padding: tuple[int, int], is_said: bool) -> Convolution:
    weight, weight_step, input_range, bias = layer.weight.numpy(), None, None, None
    if is_said:
        weight, bias = weight.copy(), _bias(layer)
    if is_said and isinstance(layer, QuantizedConvolution):
        weight, weight_step = _weight_codes(layer)
        input_range = _range(layer._input_quantizer)
    return Convolution(
        name, _kind(layer), source, weight, weight_step, bias, input_range, _kernel(layer, padding)
    )


def _bias(layer: Any) -> NDArray[Any] | None:
    """A bias in the type that says what it is."""
    if layer.bias is None:
        return None
    bias: Tensor = layer.bias
    if isinstance(layer, QuantizedConvolution) and layer.bias_kind == "accumulator":
        bias = bias_codes(bias, layer.unit()).int()
    elif isinstance(layer, QuantizedConvolution) and layer.bias_kind == "fp16":
        bias = bias.half()
    return bias.numpy().copy()


def _kind(layer: nn.Module) -> str:
    return next(kind.__name__ for kind in CONVOLUTIONS if isinstance(layer, kind))


def _kernel(layer: Any, padding: tuple[int, int]) -> Kernel:
    size, stride, own, dilation = (
        tuple(map(int, part)) for part in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    if isinstance(layer, SubMConv3d):
        stride, own = (1, 1, 1), tuple(d * (k // 2) for d, k in zip(dilation, size, strict=True))
    if len(own) == 2:
        own = tuple(a + b for a, b in zip(own, padding, strict=True))
    return Kernel(size, stride, own, dilation)


def _weight_codes(layer: QuantizedConvolution) -> tuple[np.ndarray[Any, Any], Float32]:
    """Codes, and the value of one for each output channel."""
    quantizer = cast(Quantizer, layer._weight_quantizer)
    chosen = quantizer.range_of(layer.weight)
    codes = round_to_codes(layer.weight, chosen.scale, quantizer.format).contiguous()
    num_channels = layer.weight.shape[layer.axes.output]
    return codes.to(torch.int8).numpy(), chosen.step.reshape(-1).expand(num_channels).numpy().copy()


def _addition(name: str, layer: ResidualAdd, branch: str, identity: str, is_said: bool) -> Addition:
    if not (is_said and isinstance(layer, QuantAdd)):
        return Addition(name, (branch, identity), None)
    both = layer._input_quantizer, layer._residual_quantizer or layer._input_quantizer
    return Addition(name, (branch, identity), (_range(both[0]), _range(both[1])))


def _range(quantizer: Quantizer | None) -> InputRange:
    assert quantizer is not None
    chosen = cast(IntegerFormat, quantizer.format)
    if not chosen.signed:  # no code is left out of a narrow range from 0
        chosen = replace(chosen, narrow_range=False)
    return InputRange(_amax(quantizer), chosen)


def _amax(quantizer: Quantizer) -> float:
    """The static amax that the network rounds with; a learned one follows from its logarithm."""
    return float(quantizer.range_of(cast(Tensor, quantizer.amax)).amax)


def why_not(network: nn.Module, part: Part = "whole") -> dict[str, str]:
    """Name -> reason of every layer of a part that no plan of it can hold."""
    reasons = {
        name: _why_not(module) or (_why_not_exact(module) if part == "whole" else "")
        for name, module in network.named_modules()
        if _is_in(part, name)
    }
    for problem in bias_problems(network):
        layer = problem.quantizer.rpartition(".")[0]
        if reasons.get(layer) == "":
            reasons[layer] = f"{problem.problem} ({problem.affected})"
    return {name: reason for name, reason in reasons.items() if reason}


def _why_not_exact(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not isinstance(module, QuantizedConvolution):
        return "a float dense layer: its fp32 sums are rounded in another order by every library; quantize it"
    return ""


def _why_not(module: nn.Module) -> str:
    if isinstance(module, _BatchNorm):
        return "its BatchNorm was kept in training: export folded.ckpt, which fit writes beside last.ckpt"
    if isinstance(module, QuantAdd):
        return (module.why_simulated and f"simulated ({module.why_simulated})") or _why_no_range(
            module._input_quantizer, module._residual_quantizer
        )
    if isinstance(module, QuantizedConvolution):
        return _why_not_quantized(module) or _why_no_geometry(module)
    return _why_no_geometry(module) if isinstance(module, CONVOLUTIONS) else ""


def _why_not_quantized(layer: QuantizedConvolution) -> str:
    if layer.why_simulated:
        return f"simulated ({layer.why_simulated})"
    assert layer._weight_quantizer is not None
    bits = layer._weight_quantizer.format.bits
    if bits > MAX_WEIGHT_BITS:
        return f"weights of {bits} bits: accepted are 2 to {MAX_WEIGHT_BITS}"
    return _why_no_range(layer._input_quantizer)


def _why_no_range(*quantizers: Quantizer | None) -> str:
    for quantizer in filter(None, quantizers):
        if quantizer.scheme.mode != "static":
            return f"the range of its input is {quantizer.scheme.mode}: a file holds static ones"
        amax = _amax(quantizer)
        if not math.isfinite(amax):
            return f"the amax of its input is {amax:g}: it was never calibrated"
        if amax <= SMALLEST_AMAX:
            return f"the amax of its input is {amax:g}: its codes are all 0"
    return ""


def _why_no_geometry(layer: Any) -> str:
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups"
    if isinstance(layer, nn.ConvTranspose2d) and not _tiles(layer):
        return (
            f"kernel {layer.kernel_size}, stride {layer.stride}: only equal square ones, without padding or "
            "dilation"
        )
    pairs = zip(layer.padding, layer.kernel_size, strict=True)
    if isinstance(layer, SparseConv3d) and any(padding >= size for padding, size in pairs):
        return f"padding {layer.padding} for kernel {layer.kernel_size}: smaller than the kernel"
    return ""


def _tiles(layer: nn.ConvTranspose2d) -> bool:
    """Whether each input cell makes a square of output cells of its own."""
    is_square = len({*layer.kernel_size, *layer.stride}) == 1
    return is_square and not any((*layer.padding, *layer.output_padding)) and set(layer.dilation) == {1}


def refuse(reasons: Mapping[str, str]) -> None:
    """End with the layers that cannot be exported, by reason, if there are any.

    Args:
        reasons: Name -> reason.

    Raises:
        UserError: There is one.
    """
    if reasons:
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).append(name)
        lines = "".join(f"\n  {reason}: {', '.join(names)}" for reason, names in by_reason.items())
        raise UserError(f"{len(reasons)} layers cannot be exported:{lines}")
