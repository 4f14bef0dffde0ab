#!/usr/bin/env python
"""What a file of libspconv scores in its engine, as far as that is known, against its checkpoint.

    python scripts/bench/libspconv_emulated.py ptq.ckpt data/quickstart

The sparse part is computed from the numbers of the file, with the roundings of the engine's open rewrite
(`cpq_train/export/libspconv/dialect.py` names it): fp16 voxels; fp16 layers summed in fp32; integer sums,
then `sum * (step_w * step_x / step_y) + bias / step_y` in fp32, where y is what the next layers read. A layer
in fp16 with int8 behind it is taken to round behind its sum. The dense part is the checkpoint's. Ends with an
error where mAP differs by more than `max_difference`.

Letters: V voxels, C channels.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.errors import UserError
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.export.graph import onnx
from cpq_train.export.libspconv.arithmetic import LARGEST_CODE, SMALLEST_CODE, in_half_precision
from cpq_train.export.libspconv.reader import CODES, read_plan
from cpq_train.export.libspconv.refusals import remarks, why_not
from cpq_train.export.libspconv.writer import model_of
from cpq_train.export.plan import Addition, Convolution, Plan
from cpq_train.export.planning import plan_of, refuse
from cpq_train.models import CenterPoint
from cpq_train.quantization.layers import QuantSubMConv3d
from cpq_train.quantization.numerics.exact_sum import exact_sum
from cpq_train.sparse import SparseConv3d, SparseConvTensor, SubMConv3d
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.scoring import score_detector
from cpq_train.verbs.checkpoint_settings import data_settings_of


def main(
    checkpoint: Path,
    root: Path,
    version: str = "v1.0-trainval",
    max_difference: float = 0.005,
    num_workers: int = 1,
) -> None:
    """Score both on the validation samples of a data root.

    Args:
        checkpoint: A PTQ or QAT checkpoint of this project.
        root: A data root in the nuScenes format.
        version: Its folder of tables.
        max_difference: Largest difference of mAP.
        num_workers: Processes that load samples.
    """
    detector = CenterPointDetector.load_from_checkpoint(checkpoint)
    settings = data_settings_of(read_checkpoint(checkpoint, mmap=True), checkpoint, detector.network_config)
    data = NuScenesDataModule(str(root), version, **settings.to_dict(), num_workers=num_workers)
    own = score_detector(detector, data, "checkpoint")
    plan = _plan_of_file(detector.network)
    for note in remarks(plan):
        print(f"note: {note}")
    detector.network.add_module("backbone_3d", Emulation(plan))
    emulated = score_detector(detector, data, "emulated engine")
    for name, score in own.items():
        print(f"{name}: checkpoint {score:.6f}, engine {emulated[name]:.6f}, {emulated[name] - score:+.6f}")
    if abs(emulated["mAP"] - own["mAP"]) > max_difference:
        sys.exit(f"expected a difference of mAP of at most {max_difference:g}")


def _plan_of_file(network: CenterPoint) -> Plan:
    """The plan of a network's sparse part, by way of a file; biases in fp32 are rounded for it."""
    plan = in_half_precision(plan_of(network, "sparse"))
    operations = tuple(
        replace(one, bias=one.bias.astype(np.float16))
        if isinstance(one, Convolution) and one.bias is not None
        else one
        for one in plan.operations
    )
    plan = replace(plan, operations=operations)
    refuse(why_not(plan))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sparse.onnx"
        onnx.save(model_of(plan, "", ""), str(file))
        return read_plan(file)


class Emulation(nn.Module):
    """A plan of libspconv in the place of a network's sparse backbone.

    Between layers go whole codes where int8 does, and numbers that fp16 holds where fp16 does, all in fp32.

    Args:
        plan: A sparse part, read from a file.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.steps = {
            tensor: torch.tensor(chosen.amax) / LARGEST_CODE
            for _, tensor, chosen in plan.reads()
            if chosen is not None
        }
        """Tensor of codes -> the value of one."""

    def forward(self, features_VC: Tensor, coords_V4: Tensor, batch_size: int) -> SparseConvTensor:
        """See `VoxelResBackBone8x.forward`."""
        x = SparseConvTensor(features_VC.half().float(), coords_V4.int(), list(self.plan.grid), batch_size)
        tensors = {self.plan.source: x}
        for operation in self.plan.operations:
            sources = [tensors[name] for name in operation.sources]
            if isinstance(operation, Convolution):
                tensors[operation.name] = self._convolution(operation, sources[0])
            elif isinstance(operation, Addition):
                total = self._addition(operation, *(source.features for source in sources))
                tensors[operation.name] = sources[0].replace_feature(total)
            else:
                (x,) = sources
        return x

    def _convolution(self, layer: Convolution, x: SparseConvTensor) -> SparseConvTensor:
        weight, bias = (torch.from_numpy(values).float() for values in (layer.weight, layer.bias))
        module = _module(layer)
        if layer.weight_step is None:
            out = module.convolve(x, weight)
            return out.replace_feature(self._rounded(layer, out.features + bias))
        outputs: list[SparseConvTensor] = []

        def convolve(codes: Tensor, some_of_weight: Tensor) -> Tensor:
            outputs.append(module.convolve(x.replace_feature(codes), some_of_weight))
            sums: Tensor = outputs[-1].features
            return sums

        total = exact_sum(x.features, weight, CODES, CODES, convolve, QuantSubMConv3d.axes).values
        step = self.steps.get(layer.name, torch.tensor(1.0))
        scale = torch.from_numpy(layer.weight_step) * self.steps[layer.source] / step
        y = total * scale + bias / step
        return outputs[-1].replace_feature(self._rounded(layer, y, is_scaled=True))

    def _addition(self, addition: Addition, branch: Tensor, identity: Tensor) -> Tensor:
        if addition.ranges is None:
            return self._rounded(addition, (branch + identity).half().float())
        steps = [self.steps[name] for name in addition.sources]
        return self._rounded(addition, branch * steps[0] + identity * steps[1])

    def _rounded(self, operation: Convolution | Addition, y: Tensor, is_scaled: bool = False) -> Tensor:
        """What an operation hands on; `is_scaled` where y counts in steps already, if there are any."""
        y = y.relu() if operation.relu else y
        if operation.name not in self.steps:
            return y.half().float()
        y = y if is_scaled else y / self.steps[operation.name]
        return y.round().clamp(SMALLEST_CODE, LARGEST_CODE)


def _module(layer: Convolution) -> SubMConv3d | SparseConv3d:
    kind = SubMConv3d if layer.kind == "SubMConv3d" else SparseConv3d
    num_out, *size, num_in = layer.weight.shape
    geometry = (layer.kernel.stride, layer.kernel.padding, layer.kernel.dilation)
    module: SubMConv3d | SparseConv3d = kind(
        num_in, num_out, tuple(size), *geometry, bias=False, indice_key=layer.name
    )
    return module


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    try:
        auto_cli(main, as_positional=True)
    except UserError as error:
        sys.exit(f"error: {error}")
