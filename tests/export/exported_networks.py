"""Small quantized CenterPoints with their calibration, clouds for them, and their files in onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cpq_train.arms.structure import restructure
from cpq_train.arms.subject import Subject
from cpq_train.data.settings import DataSettings
from cpq_train.export.plan import Plan
from cpq_train.export.planning import plan_of
from cpq_train.export.portable.writer import portable_graph
from cpq_train.export.sidecar import Sidecar
from cpq_train.export.writing import write_deployment
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.models.decode import PostProcessing
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme

SMALL = NetworkConfig(
    voxel_size=(0.2, 0.2, 0.2),
    point_cloud_range=(-1.6, -3.2, -5.0, 1.6, 3.2, 3.0),
    class_names=("car", "bus", "barrier"),
    class_groups=(("car",), ("barrier", "bus")),
    backbone_3d_channels=(6, 8, 14, 16),
    backbone_3d_num_blocks=(2, 1, 1, 1),
    backbone_3d_out_channels=15,
    backbone_2d_num_layers=(1, 2),
    backbone_2d_channels=(8, 10),
    upsample_channels=(6, 9),
    head_channels=7,
)
"""16 by 32 by 40 voxels, a map of two levels of height; nearly every two sizes to be confused differ."""

GRID = (41, 32, 16)
"""Cells along z, y, x."""

CONV_INPUT = {"layers": "backbone_3d.conv_input.0", "weight": "off", "input": "off"}
CONVOLUTIONS = ["SubMConv3d", "SparseConv3d", "Conv2d", "ConvTranspose2d"]
SPARSE = ["SubMConv3d", "SparseConv3d", "ResidualAdd"]

W8, A8 = {"bits": 8, "granularity": "per_channel"}, {"bits": 8}


def _scheme(
    *rules: dict[str, Any], weight: Any = W8, input: Any = A8, bias: str = "float", **further: Any
) -> dict[str, Any]:
    return {"defaults": {"weight": weight, "input": input, "bias": bias}, "rules": list(rules), **further}


SCHEMES: dict[str, str | dict[str, Any]] = {
    **{name: f"configs/schemes/{name}.yaml" for name in ("int8", "w4a8", "w4a4", "mixed")},
    "whole": _scheme(),
    "float sparse": _scheme({"layers": "*", "kinds": SPARSE, "weight": "off", "input": "off"}),
    "per tensor": _scheme(CONV_INPUT, weight={"bits": 8, "granularity": "per_tensor"}),
    "unsigned": _scheme(
        {"layers": "*", "kinds": ["ResidualAdd"], "input": {"signed": True}},
        CONV_INPUT,
        input={"bits": 8, "signed": False},
    ),
    "sixteen": _scheme(input={"bits": 16}),
    "float biases": _scheme(CONV_INPUT),
    "accumulator": _scheme(CONV_INPUT, bias="accumulator"),
    "accumulator 16": _scheme(input={"bits": 16}, bias="accumulator"),
    "accumulator w4": _scheme(CONV_INPUT, weight={"bits": 4, "method": "mse"}, bias="accumulator"),
    "fp16 biases": _scheme({"layers": "backbone_2d.*", "bias": "accumulator"}, CONV_INPUT, bias="fp16"),
    "narrow": _scheme(
        weight={**W8, "narrow_range": True}, input={"bits": 8, "narrow_range": True}, share_residual=False
    ),
    "dynamic weights": _scheme(CONV_INPUT, weight={**W8, "mode": "dynamic"}),
    "several widths": _scheme(
        {"layers": "dense_head.heads_list.0.hm.0.0", "weight": {"bits": 2, "method": "mse"}},
        {"layers": "dense_head.heads_list.1.*", "input": {"bits": 12}},
        {"layers": "backbone_3d.conv2.1.conv1", "input": {"bits": 5}},
        {"layers": "backbone_3d.conv3.1.quant_add", "input": {"bits": 9}},
        input={"bits": 16},
    ),
}
"""Name -> a scheme file or its content."""


def scheme_of(name: str) -> Scheme:
    chosen = SCHEMES[name]
    return Scheme.from_file(chosen) if isinstance(chosen, str) else Scheme.from_dict(chosen)


def voxels(num: int, seed: int = 0, grid: Sequence[int] = GRID) -> Tensor:
    """(V, 3) cells z, y, x in a random order."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(math.prod(grid), generator=generator)[:num]
    return torch.stack(torch.unravel_index(cells, tuple(grid)), 1).int()


def borders(grid: Sequence[int] = GRID) -> Tensor:
    """Every corner of the grid, and a cell amid each of its edges and faces."""
    sides = [(0, size // 2, size - 1) for size in grid]
    cells = torch.cartesian_prod(*map(torch.tensor, sides)).int()
    return cells[(cells != torch.tensor([size // 2 for size in grid])).any(1)]


CLOUDS: dict[str, Callable[[Sequence[int]], Tensor]] = {
    "none": lambda grid: voxels(0, grid=grid),
    "one": lambda grid: voxels(1, grid=grid),
    "borders": borders,
    "some": lambda grid: voxels(1500, grid=grid),
    "all": lambda grid: torch.cartesian_prod(*map(torch.arange, grid)).int(),
}
"""Name -> the voxels of a grid."""


def features_of(coords: Tensor, seed: int = 0, size: float = 20) -> Tensor:
    """Random numbers of about a size."""
    return torch.randn(len(coords), 5, generator=torch.Generator().manual_seed(seed)) * size


def run_network(network: CenterPoint, features: Tensor, coords: Tensor) -> dict[str, Tensor]:
    """Name of an output of the file -> the network's."""
    with torch.no_grad():
        heads = network(features, nn.functional.pad(coords, (1, 0)), 1)
    return {
        f"head{number}.{branch}": values
        for number, head in enumerate(heads)
        for branch, values in head.items()
    }


def float_network(config: NetworkConfig = SMALL) -> CenterPoint:
    """Random weights and statistics, such that signals neither die nor grow."""
    torch.manual_seed(0)
    network = CenterPoint(config)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.1, 0.4)
            for values in (module.running_mean, module.weight, module.bias):
                nn.init.uniform_(values, -0.2, 0.4)
            module.weight.data += 0.8
    return network.eval()


def calibrate(network: CenterPoint) -> None:
    with collecting_ranges(network, on_unfit=lambda problems: None):
        coords = voxels(1500, 9, network.backbone_3d.sparse_shape)
        run_network(network, features_of(coords, seed=9), coords)


def new_subject(scheme: Scheme, network: CenterPoint | None = None) -> Subject:
    subject = restructure(network or float_network(), "ptq", scheme, None)
    calibrate(subject.network)
    return subject


@cache
def subject_of(name: str) -> Subject:
    """A calibrated network of a scheme; shared, so leave it as it is."""
    return new_subject(scheme_of(name))


def calibrated(name: str) -> CenterPoint:
    """A calibrated network of a scheme that may be changed."""
    return new_subject(scheme_of(name)).network


def model_of(plan: Plan) -> onnx.ModelProto:
    model: onnx.ModelProto = portable_graph(plan).model("centerpoint", "0", "")
    return model


@cache
def content_of(name: str) -> bytes:
    """The file of the network of a scheme."""
    content: bytes = model_of(plan_of(subject_of(name).network)).SerializeToString()
    return content


def session_of(content: bytes, num_threads: int = 1, level: str = "ORT_ENABLE_ALL") -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run_file(session: Any, features: Tensor, coords: Tensor) -> dict[str, Tensor]:
    """Name of an output -> the file's."""
    feed = {"voxel_features": features.numpy(), "voxel_coords": coords.numpy()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, feed)), strict=True))


def tensor_of(model: onnx.ModelProto, name: str, features: Tensor, coords: Tensor) -> Tensor:
    """A tensor within a file."""
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    probed.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return run_file(session_of(probed.SerializeToString()), features, coords)[name]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, dtypes, shapes and all numbers."""
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        assert torch.equal(found[name], values), name


def write(subject: Subject, folder: Path, name: str = "net.onnx") -> tuple[Path, Sidecar]:
    """The file and its sidecar, from a checkpoint that is none."""
    checkpoint = folder / "a.ckpt"
    checkpoint.write_bytes(b"weights")
    data = DataSettings(point_cloud_range=SMALL.point_cloud_range)
    sidecar, _ = write_deployment("portable", subject, PostProcessing(), data, checkpoint, folder / name)
    return folder / name, sidecar


def run_nodes(
    graph: Any, feed: dict[str, NDArray[Any]], outputs: Sequence[str], level: str = "ORT_ENABLE_ALL"
) -> list[NDArray[Any]]:
    """Tensors of any types of a graph in the making, as onnxruntime has them."""
    model = graph.model("nodes", "0", "")
    for name in outputs:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    found: list[NDArray[Any]] = session_of(model.SerializeToString(), level=level).run(list(outputs), feed)
    return found
