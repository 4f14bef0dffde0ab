"""The dense part of a QAT step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from results import Row
from steps import computing
from torch import Tensor

from cpq_train.models import CenterPoint
from gpu_checking.guard import Found, NotApplicable
from gpu_checking.numbers import inputs_of
from gpu_checking.setting import Setting

NUM_WARM_UP = 3
"""As torch asks for before a capture."""


def capture_dense(setting: Setting) -> Found:
    """Capture forward and backward of BEV backbone and head, replay on other maps, compare with eager.

    Raises:
        NotApplicable: There is no stream.
    """
    if setting.device == "cpu":
        raise NotApplicable("no stream to capture")
    network = setting.work.networks["qat"].train()
    with torch.no_grad():
        volume = network.backbone_3d(*inputs_of(setting.work.batch))
        bev = network.map_to_bev_module(volume)
    first, second = bev.clone().requires_grad_(), (0.5 * bev).requires_grad_()
    with torch.no_grad(), computing(network):
        gradients = [torch.ones_like(out) for out in _outputs(network, first)]
    with _deterministic():
        expected = [t.clone() for t in _step(network, second, gradients)]
        graph, captured = _captured(network, first, gradients)
        with torch.no_grad():
            first.copy_(second)
        graph.replay()
        torch.cuda.synchronize()
    num_outputs = len(gradients)
    parts = {"outputs": slice(num_outputs), "gradients": slice(num_outputs, None)}
    rows = [_compared(name, captured[part], expected[part]) for name, part in parts.items()]
    wrong = [f"{row['differing']} of {row['numbers']} {row['of']} differ" for row in rows if row["differing"]]
    return Found(rows, wrong)


def _outputs(network: CenterPoint, bev: Tensor) -> list[Tensor]:
    return [out for head in network.dense_head(network.backbone_2d(bev)) for out in head.values()]


def _dense_part(network: CenterPoint, bev: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of the map and of all parameters."""
    outputs = _outputs(network, bev)
    dense = [*network.backbone_2d.parameters(), *network.dense_head.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, [bev, *dense], gradients)]


def _step(network: CenterPoint, bev: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    with computing(network):
        return _dense_part(network, bev, gradients)


def _captured(
    network: CenterPoint, bev: Tensor, gradients: Sequence[Tensor]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """As a step does it: weights of the whole network are rounded when it begins, before this part of it.

    All on one stream, because a backward pass runs where its forward pass ran.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(NUM_WARM_UP):
            _step(network, bev, gradients)
        with computing(network), torch.cuda.graph(graph, stream=side):
            found = _dense_part(network, bev, gradients)
    torch.cuda.current_stream().wait_stream(side)
    return graph, found


@contextmanager
def _deterministic() -> Iterator[None]:
    """While open, cuDNN adds in one order: the graph and eager may not differ by that."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _compared(of: str, ours: Sequence[Tensor], others: Sequence[Tensor]) -> Row:
    pairs = list(zip(ours, others, strict=True))
    return {
        "of": of,
        "tensors": len(pairs),
        "numbers": sum(a.numel() for a, _ in pairs),
        "differing": sum(int((a != b).sum()) for a, b in pairs),
    }
