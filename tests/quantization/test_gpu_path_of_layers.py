"""The path that layers take on a GPU, taken by the CPU: bits, what is learned late, what nothing waits for.

What only a GPU can show (a capture, TF32, its kernels) runs where there is one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from networks_of_kinds import NETWORKS, SCHEMES, Inputs, network_of, prepared, random_numbers, step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from cpq_train.common.kernels import as_on_gpu
from cpq_train.common.late import Mailbox
from cpq_train.common.proofs import Proofs
from cpq_train.profiling.operator_count import counting_operators
from cpq_train.quantization.numerics import int8_kernel, tensor_cores
from cpq_train.quantization.numerics.dense_convolution import DenseConvolution
from cpq_train.quantization.numerics.int8_kernel import Geometry
from cpq_train.quantization.prepared import frozen
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import QuantizerScheme
from cpq_train.sparse import codes as sparse_codes

DENSE = [kind for kind in NETWORKS if kind != "sparse"]
CODES_OF_8_BITS = [name for name in SCHEMES if name != "mixed"]
AMAX = pytest.mark.parametrize("amax", ["frozen", "learned"])


@pytest.fixture(autouse=True)
def proofs(monkeypatch: pytest.MonkeyPatch) -> Proofs:
    """That no other test has filled."""
    found = Proofs("cuDNN's sums of codes")
    monkeypatch.setattr(tensor_cores, "_proofs", found)
    return found


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(not exact|2.24)")
        yield


# Bits


@AMAX
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_outputs_are_those_of_the_cpu(kind: str, scheme: str, amax: str, no_warning: None) -> None:
    network, inputs = network_of(kind, scheme, amax)
    twin = copy.deepcopy(network)
    for _ in range(2):  # in the second pass ReLUs make codes, and sums of wide codes are known
        here, there = _step(network, inputs), _step_on_gpu(twin, inputs)
        assert torch.equal(here.pop("output"), there.pop("output"))
        for name, expected in here.items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(there[name], expected, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["maps", "sparse"])
def test_outputs_without_gradients(kind: str, mode: Callable[[], Any]) -> None:
    network, inputs = network_of(kind)
    network.eval()
    with mode():
        expected = network(*inputs)
        with as_on_gpu(), frozen(network):
            for _ in range(3):
                assert torch.equal(network(*inputs), expected)


def test_a_pixel_with_a_nan_shows() -> None:
    """Integers have none: the product of pixels would hide it."""
    x, w = torch.randint(-8, 8, (2, 8, 5, 4)).float(), torch.randint(-8, 8, (16, 8, 1, 1)).float()
    assert torch.equal(int8_kernel.product_of_pixels(x, w), nn.functional.conv2d(x, w))
    x[1, 3, 2, 2] = torch.nan
    found = int8_kernel.product_of_pixels(x, w).isnan()
    assert found.sum() == 16
    assert found[1, :, 2, 2].all()


def test_a_nan_goes_through_every_layer() -> None:
    network = prepared(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1)), (X8,))
    x = X8.clone()
    x[0, 0, 0, 0] = torch.nan
    with as_on_gpu():
        for _ in range(2):
            assert network(x)[0, :, 0, 0].isnan().all()


X8 = random_numbers(2, 8, 5, 4)


@pytest.mark.parametrize("where", [nullcontext, as_on_gpu])
def test_a_rounded_tensor_has_second_derivatives(where: Callable[[], AbstractContextManager[None]]) -> None:
    """The operators of a GPU have none, so that they are not called where one may be asked for."""
    quantizer, x = Quantizer(QuantizerScheme()), X8.clone().requires_grad_()
    quantizer.set_amax(torch.tensor(1.0))
    with where(), warnings.catch_warnings():
        warnings.simplefilter("error")
        (gradient,) = torch.autograd.grad(quantizer(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()
    assert torch.equal(x.grad, 2.0 * (X8.abs() <= 1))


# Sums that could pass 2^24


class Wide:
    """A layer of 1,800 products to a sum, and how often it convolves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, amax: str = "frozen") -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 200, 3, padding=1), nn.ReLU(), nn.Conv2d(200, 4, 3))
        self.x = random_numbers(2, 3, 6, 6)
        self.network = prepared(network, (self.x,), amax=amax)
        self.num_convolutions = 0
        real = DenseConvolution.of_codes

        def counted(convolution: DenseConvolution, x: Tensor, weight: Tensor) -> Tensor:
            self.num_convolutions += len(weight) == 4
            return real(convolution, x, weight)

        monkeypatch.setattr(DenseConvolution, "of_codes", counted)

    def parts_of_a_pass(self) -> int:
        """Its output is that of the CPU."""
        expected = copy.deepcopy(self.network)(self.x)
        self.num_convolutions = 0
        with as_on_gpu():
            assert torch.equal(self.network(self.x), expected)
        return self.num_convolutions

    @torch.no_grad()
    def make_all_codes_the_largest(self) -> None:
        layer = self.network[2]
        layer.weight.copy_(layer._weight_quantizer.amax.expand_as(layer.weight))


@AMAX
def test_sums_are_split_until_their_codes_are_known(
    monkeypatch: pytest.MonkeyPatch, no_warning: None, amax: str
) -> None:
    wide = Wide(monkeypatch, amax)
    assert [wide.parts_of_a_pass() for _ in range(3)] == [2, 1, 1]


def test_sums_that_grow_past_the_limit_are_told_of_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Wide(monkeypatch)
    assert [wide.parts_of_a_pass() for _ in range(2)] == [2, 1]
    wide.make_all_codes_the_largest()
    with as_on_gpu():
        wide.network(wide.x)  # relies on the step before
        with pytest.warns(UserWarning, match=r"weights of 2 changed so much .* 2\^24"):
            wide.network(wide.x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wide.parts_of_a_pass() == 2


def test_sums_that_were_never_known_to_be_small_are_no_surprise(
    monkeypatch: pytest.MonkeyPatch, no_warning: None
) -> None:
    wide = Wide(monkeypatch)
    wide.make_all_codes_the_largest()
    assert [wide.parts_of_a_pass() for _ in range(3)] == [2, 2, 2]


def test_sums_that_are_near_the_limit_are_split(monkeypatch: pytest.MonkeyPatch, no_warning: None) -> None:
    """An eighth of it is left free, for what a step may add."""
    wide = Wide(monkeypatch)
    wide.make_all_codes_the_largest()
    layer = wide.network[2]
    most = 2**24 / 127 / 127
    with torch.no_grad():
        layer.weight.view(4, -1)[:, int(0.9 * most) :] = 0
    assert [wide.parts_of_a_pass() for _ in range(2)] == [2, 2]
    with torch.no_grad():
        layer.weight.view(4, -1)[:, int(0.8 * most) :] = 0
    assert [wide.parts_of_a_pass() for _ in range(2)] == [2, 1]


def test_a_copy_knows_nothing_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Wide(monkeypatch)
    wide.parts_of_a_pass()
    wide.network = copy.deepcopy(wide.network)
    assert [wide.parts_of_a_pass() for _ in range(2)] == [2, 1]


# Ways that are not exact


def test_a_kernel_that_rounds_is_found_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = network_of("maps")
    expected = network(*inputs)
    real = DenseConvolution.__call__

    def rounding(convolution: DenseConvolution, x: Tensor, weight: Tensor) -> Tensor:
        y = real(convolution, x, weight)
        return y + 2000 if x.dtype == torch.float32 and convolution.geometry.transposed else y

    monkeypatch.setattr(DenseConvolution, "__call__", rounding)
    with as_on_gpu():
        with pytest.warns(UserWarning, match=r"cuDNN's sums of codes are not exact .*transposed=True"):
            assert not torch.equal(network(*inputs), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                assert torch.equal(network(*inputs), expected)


def test_every_way_is_looked_at_once(proofs: Proofs) -> None:
    looked: list[Hashable] = []
    for _ in range(2):
        for way in "ab":
            assert proofs.trusts(way)
            proofs.look(way, torch.ones(2), lambda way=way: looked.append(way) or torch.ones(2))  # type: ignore[misc]
    assert looked == ["a", "b"]


def test_letters_are_what_was_sent() -> None:
    mailbox, values, found = Mailbox(), torch.zeros(2), list[list[float]]()
    mailbox.send(values, lambda array: found.append(array.tolist()))
    values += 1
    assert len(mailbox) == 1
    assert found == []
    mailbox.receive()
    mailbox.receive()
    assert found == [[0, 0]]
    assert len(mailbox) == 0


def test_a_letter_may_be_sent_while_one_is_read() -> None:
    mailbox, found = Mailbox(), list[float]()

    def read(array: Any) -> None:
        found.append(float(array))
        if len(found) < 3:
            mailbox.send(torch.tensor(found[-1] + 1), read)

    mailbox.send(torch.tensor(1.0), read)
    for take in (mailbox.receive, mailbox.take_arrived, mailbox.take_arrived):
        take()
    assert found == [1, 2, 3]


# What nothing waits for


@AMAX
@pytest.mark.parametrize("scheme", CODES_OF_8_BITS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_nothing_is_waited_for(kind: str, scheme: str, amax: str) -> None:
    network, inputs = network_of(kind, scheme, amax)
    with as_on_gpu():
        _step(network, inputs)  # makes tables, and looks at every shape
        with counting_operators() as count:
            _step(network, inputs)
    assert dict(count.waits) == {}


@AMAX
def test_nothing_is_waited_for_where_sums_are_wide(monkeypatch: pytest.MonkeyPatch, amax: str) -> None:
    wide = Wide(monkeypatch, amax)
    with as_on_gpu():
        _step(wide.network, (wide.x,))
        with counting_operators() as count:
            _step(wide.network, (wide.x,))
    assert dict(count.waits) == {}


@AMAX
@pytest.mark.parametrize("scheme", CODES_OF_8_BITS)
@pytest.mark.parametrize("kind", DENSE)
def test_a_step_without_numbers(monkeypatch: pytest.MonkeyPatch, kind: str, scheme: str, amax: str) -> None:
    """Its shapes follow from shapes, so that a CUDA graph can hold it: fake tensors have nothing else."""
    monkeypatch.setattr(Proofs, "look", lambda *_: None)  # a graph has none either
    network, inputs = network_of(kind, scheme, amax)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(network)
    with mode, as_on_gpu():
        x = [mode.from_tensor(tensor) for tensor in inputs]
        found = [_step(fake, tuple(x)) for _ in range(3)]
    expected = _step(network, inputs)
    assert {name: t.shape for name, t in found[-1].items()} == {n: t.shape for n, t in expected.items()}


# On a GPU


def _on(device: str, network: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    return network.to(device), tuple(t.to(device) if isinstance(t, Tensor) else t for t in inputs)


@pytest.mark.cuda
@AMAX
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_outputs_of_a_gpu_are_those_of_the_cpu(kind: str, scheme: str, amax: str, no_warning: None) -> None:
    network, inputs = network_of(kind, scheme, amax)
    twin, theirs = _on("cuda", copy.deepcopy(network), inputs)
    for _ in range(3):
        here, there = _step(network, inputs), _step(twin, theirs)
        assert torch.equal(here.pop("output"), there.pop("output").cpu())
        for name, expected in here.items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(there[name].cpu(), expected, rtol=1e-2, atol=1e-3 * scale, msg=name)


@pytest.mark.cuda(num_devices=2)
@AMAX
def test_a_network_on_another_gpu_than_the_current_one(
    monkeypatch: pytest.MonkeyPatch, no_warning: None, amax: str
) -> None:
    wide = Wide(monkeypatch, amax)
    expected = _step(wide.network, (wide.x,))
    network, inputs = _on("cuda:1", copy.deepcopy(wide.network), (wide.x,))
    for _ in range(3):
        assert torch.equal(_step(network, inputs)["output"].cpu(), expected["output"])
    assert torch.cuda.current_device() == 0


@pytest.mark.cuda
@AMAX
@pytest.mark.parametrize("kind", ["maps", "channels_last", "groups"])
def test_a_step_is_captured(kind: str, amax: str) -> None:
    network, inputs = network_of(kind, amax=amax)
    network, (given,) = _on("cuda", network, inputs)
    first, second = given.clone().requires_grad_(), (0.5 * given).requires_grad_()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def work(x: Tensor) -> list[Tensor]:
        y = network(x)
        return [y, *torch.autograd.grad(y, [x, *network.parameters()], torch.ones_like(y))]

    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work(first)
            expected = [t.clone() for t in work(second)]
            with torch.cuda.graph(graph, stream=side):
                found = work(first)
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            first.copy_(second)
        graph.replay()
        torch.cuda.synchronize()
    finally:
        torch.backends.cudnn.deterministic = before
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
    assert torch.equal(found[0], expected[0])


@pytest.mark.cuda
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(64, 3), (128, 3), (64, 1), (64, 5)])
def test_sums_of_codes_on_tensor_cores_are_exact(
    memory_format: torch.memory_format, benchmark: bool, channels: int, size: int, proofs: Proofs
) -> None:
    """Whatever cuDNN chooses: not Winograd's way, which would round."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 128, (2, channels, 64, 64), generator=generator).float().cuda()
    most = (2**24 - 1) // (127 * channels * size**2)
    w = torch.randint(
        -min(most, 127), min(most, 127) + 1, (channels, channels, size, size), generator=generator
    )
    w = w.float().cuda().contiguous(memory_format=memory_format)
    x = x.contiguous(memory_format=memory_format)
    convolution = DenseConvolution(Geometry((1, 1), (size // 2,) * 2, (1, 1), False, (0, 0), 1))
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, deterministic=False):
        found = convolution.of_codes(x, w)
    assert torch.equal(found.double(), convolution(x.double(), w.double()))
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(convolution.of_codes(x, w), found)


@pytest.mark.cuda
def test_products_of_pixels_are_exact_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (2, 64, 9, 7), generator=generator).float().cuda()
    w = torch.randint(-128, 128, (32, 64, 1, 1), generator=generator).float().cuda()
    assert int8_kernel.takes_pixels(x, w, 128, 128, int8_kernel.OF_A_PIXEL)
    assert torch.equal(
        int8_kernel.product_of_pixels(x, w).double(), nn.functional.conv2d(x.double(), w.double())
    )
    x[0, 0, 0, 0] = torch.nan
    assert int8_kernel.product_of_pixels(x, w).isnan().sum() == 32


@pytest.mark.cuda
def test_settings_of_torch_and_spconv_are_as_they_were() -> None:
    def settings() -> list[Any]:
        return [
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            sparse_codes.constants.SPCONV_ALLOW_TF32,
            sparse_codes.ops.CONV_CPP,
        ]

    before = settings()
    for kind in ("maps", "sparse"):
        _step(*_on("cuda", *network_of(kind)))
    assert settings() == before


def _step(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """With gradients of this pass alone."""
    network.zero_grad()
    return {name: tensor for name, tensor in step(network, inputs).items() if tensor is not None}


def _step_on_gpu(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    with as_on_gpu():
        return _step(network, inputs)
