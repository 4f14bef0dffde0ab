"""Gradients in bf16: the forward pass of fp32, and gradients as good as those of mixed precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.common.kernels import HAS_BF16
from cpq_train.quantization import switches
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import compute_gradients_in

needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU multiplies no bf16")


def _network(last: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), last())
    x = torch.rand(2, 3, 8, 8)
    prepare(network, Scheme.from_dict({}), x)
    with collecting_ranges(network):
        network(x)
    return network, x


LAYERS = {
    "conv": lambda: nn.Conv2d(16, 16, 3, padding=1),
    "padded unevenly": lambda: nn.Conv2d(16, 16, 2, padding="same"),
    "blocks": lambda: nn.ConvTranspose2d(16, 8, 2, stride=2),
    "overlapping blocks": lambda: nn.ConvTranspose2d(16, 8, 3, stride=2),
}


@needs_bf16
@pytest.mark.parametrize("last", LAYERS)
def test_forward_is_equal_and_gradients_are_close(last: str) -> None:
    network, x = _network(LAYERS[last])
    results = []
    for precision in ("fp32", "bf16"):
        compute_gradients_in(network, precision)
        for _ in range(2):  # the second pass has codes from the ReLU
            leaf = x.clone().requires_grad_()
            y = network(leaf)
            probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            gradients = torch.autograd.grad((y * probe).sum(), [leaf, *network.parameters()])
        results.append((y, gradients))
    (exact, of_fp32), (other, of_bf16) = results
    assert torch.equal(exact, other)
    assert not torch.equal(of_fp32[1], of_bf16[1])
    for wanted, found in zip(of_fp32, of_bf16, strict=True):
        assert found.dtype == torch.float32
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2


def test_a_processor_without_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = _network(LAYERS["conv"])
    monkeypatch.setattr(switches, "HAS_BF16", False)
    with pytest.raises(UserError, match="0 is on a processor with neither AVX512_BF16 nor AMX; accepted"):
        compute_gradients_in(network, "bf16")
    compute_gradients_in(network, "fp32")
