"""Which layers read one tensor, and which BatchNorm folds into which layer: seen by running the network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.quantization.coverage import coverage
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import quantizers_off
from cpq_train.quantization.trace import trace
from cpq_train.quantization.wiring import NEVER_CALLED, Wiring
from cpq_train.sparse import ResidualAdd, SparseConvTensor, SparseSequential, SubMConv3d

INT8 = Scheme.from_dict({"name": "int8"})


class Net(nn.Module):
    """A network of the layers it is given, run by a function."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)
        generator = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.uniform_(-1, 1, generator=generator)
                module.running_var.uniform_(0.3, 2, generator=generator)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def _conv(channels: int = 4, **settings: Any) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(channels, channels, 3, padding=1, **settings)


def _x() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def _folded(network: nn.Module, x: Any) -> tuple[Wiring, Tensor, Tensor]:
    """What is seen, and the float outputs before and behind folding."""
    network.eval()
    with torch.no_grad():
        before = network(x)
        prepared = prepare(network, Scheme.from_dict({"on_reuse": "one_range"}), x)
        with collecting_ranges(network):
            network(x)
        with quantizers_off(network):
            after = network(x)
    assert prepared.wiring is not None
    return prepared.wiring, before, after


FOLDS: dict[str, tuple[Callable[[], nn.Module], dict[str, str], dict[str, str]]] = {
    "a pre-activation block": (
        lambda: Net(
            lambda n, x: n.conv2(torch.relu(n.bn2(n.conv1(torch.relu(n.bn1(x)))))) + x,
            conv1=_conv(), bn1=nn.BatchNorm2d(4), conv2=_conv(), bn2=nn.BatchNorm2d(4),
        ),
        {"bn2": "conv1"},
        {"bn1": "it reads no layer's output"},
    ),
    "registered in another order": (
        lambda: Net(
            lambda n, x: n.bn2(n.conv2(n.bn1(n.conv1(x)))),
            bn2=nn.BatchNorm2d(4), bn1=nn.BatchNorm2d(4), conv2=_conv(), conv1=_conv(),
        ),
        {"bn2": "conv2", "bn1": "conv1"},
        {},
    ),
    "one convolution in front of two BatchNorms": (
        lambda: Net(
            lambda n, x: torch.cat(((y := n.conv(x)) * 0, n.bn1(y), n.bn2(y)), 1)[:, 4:],
            conv=_conv(), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4),
        ),
        {},
        {
            "bn1": "the output of conv is also read by bn2, the operation aten.mul.Tensor",
            "bn2": "the output of conv is also read by bn1, the operation aten.mul.Tensor",
        },
    ),
    "a convolution used twice, with a BatchNorm each": (
        lambda: Net(
            lambda n, x: n.bn2(n.conv(n.bn1(n.conv(x)))),
            conv=_conv(), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4),
        ),
        {},
        dict.fromkeys(("bn1", "bn2"), "it does not read all outputs of conv and nothing else"),
    ),
    "the network's output": (
        lambda: Net(lambda n, x: [y := n.conv(x), n.bn(y)][1], conv=_conv(), bn=nn.BatchNorm2d(4)),
        {"bn": "conv"},
        {},
    ),
    "changed in place in between": (
        lambda: Net(lambda n, x: n.bn(n.conv(x).relu_()), conv=_conv(), bn=nn.BatchNorm2d(4)),
        {},
        {"bn": "it reads no layer's output"},
    ),
    "no statistics": (
        lambda: Net(
            lambda n, x: n.bn(n.conv(x)), conv=_conv(), bn=nn.BatchNorm2d(4, track_running_stats=False)
        ),
        {},
        {"bn": "it has no running statistics and normalises by each batch"},
    ),
    "no affine": (
        lambda: Net(lambda n, x: n.bn(n.conv(x)), conv=_conv(), bn=nn.BatchNorm2d(4, affine=False)),
        {"bn": "conv"},
        {},
    ),
    "one weight of two layers": (
        lambda: _tied(Net(lambda n, x: n.bn(n.a(n.b(x))), a=_conv(), b=_conv(), bn=nn.BatchNorm2d(4))),
        {},
        {"bn": "a cannot take it up: a and b have one weight"},
    ),
    "dropout in between": (
        lambda: Net(
            lambda n, x: n.bn(n.drop(n.conv(x))), conv=_conv(), bn=nn.BatchNorm2d(4), drop=nn.Dropout()
        ),
        {},
        {"bn": "the output of conv is also read by drop"},
    ),
    "functional dropout in between": (
        lambda: Net(
            lambda n, x: n.bn(nn.functional.dropout(n.conv(x), training=n.training)),
            conv=_conv(), bn=nn.BatchNorm2d(4),
        ),
        {},
        {"bn": "the output of conv is also read by the function dropout"},
    ),
    "a weight that is used elsewhere": (
        lambda: Net(
            lambda n, x: nn.functional.conv_transpose2d(n.bn(n.conv(x)), n.conv.weight, padding=1),
            conv=_conv(), bn=nn.BatchNorm2d(4),
        ),
        {},
        {
            "bn": "conv cannot take it up: its weight is also read by the operation aten.convolution.default"
        },
    ),
    "behind a sum": (
        lambda: Net(lambda n, x: n.bn(n.add(x, x)), add=ResidualAdd(), bn=nn.BatchNorm2d(4), conv=_conv()),
        {},
        {"bn": "add cannot take it up: it has no weight"},
    ),
    "changed by a hook": (
        lambda: _hooked(Net(lambda n, x: n.bn(n.conv(x)), conv=_conv(), bn=nn.BatchNorm2d(4))),
        {},
        {"bn": "it reads no layer's output"},
    ),
    "never called": (
        lambda: Net(lambda n, x: n.conv(x), conv=_conv(), bn=nn.BatchNorm2d(4)),
        {},
        {"bn": NEVER_CALLED},
    ),
    "under two names": (
        lambda: _twice(Net(lambda n, x: n.again(n.conv(x)), conv=_conv(), bn=nn.BatchNorm2d(4))),
        {"bn": "conv"},
        {},
    ),
}  # fmt: skip


def _tied(network: Net) -> Net:
    network.a.weight = network.b.weight
    return network


def _hooked(network: Net) -> Net:
    network.conv.register_forward_hook(lambda module, args, output: output.clamp(-0.3, 0.3))
    return network


def _twice(network: Net) -> Net:
    network.again = network.bn
    return network


@pytest.mark.parametrize("case", FOLDS)
def test_what_folds_and_what_does_not(case: str) -> None:
    new, folds, unfolded = FOLDS[case]
    network = new()
    wiring, before, after = _folded(network, _x())
    assert wiring.folds == folds
    assert wiring.unfolded == unfolded
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))
    assert {n: w for n, w in coverage(network).left_in_float.items() if n in unfolded} == {
        name: f"cannot be folded: {why}" for name, why in unfolded.items()
    }


def test_an_output_of_the_network_is_not_folded_into() -> None:
    network = Net(lambda n, x: {"raw": (y := n.conv(x)), "norm": n.bn(y)}, conv=_conv(), bn=nn.BatchNorm2d(4))
    assert trace(network, _x()).unfolded == {
        "bn": "the output of conv is also read by what the network returns or keeps"
    }


@dataclass
class Outputs:
    raw: Tensor
    norm: Tensor


def _kept(network: Any, x: Tensor) -> Tensor:
    network.features = network.conv(x)
    return network.bn(network.features)


@pytest.mark.parametrize("run", [lambda n, x: Outputs(y := n.conv(x), n.bn(y)), _kept])
def test_an_output_that_outlives_the_run_is_not_folded_into(run: Callable[[Any, Tensor], Any]) -> None:
    network = Net(run, conv=_conv(), bn=nn.BatchNorm2d(4))
    assert "returns or keeps" in trace(network, _x()).unfolded["bn"]


def test_folding_does_not_unfreeze() -> None:
    network = Net(lambda n, x: n.bn(n.conv(x)), conv=_conv(bias=False), bn=nn.BatchNorm2d(4))
    network.requires_grad_(False)
    prepare(network, INT8, _x())
    assert not network.conv.bias.requires_grad


@pytest.mark.parametrize(
    ("layer", "content"),
    [
        (_conv, {"defaults": {"weight": {"granularity": "per_tensor"}}}),
        (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2), {}),
    ],
)
def test_batchnorm_that_could_not_be_folded_afterwards_is_not_kept(
    layer: Callable[[], nn.Module], content: dict[str, Any]
) -> None:
    network = Net(lambda n, x: n.bn(n.conv(x)), conv=layer(), bn=nn.BatchNorm2d(4))
    with pytest.raises(UserError, match=r"conv: its weight is quantized per .*, and bn folded into it would"):
        prepare(network, Scheme.from_dict(content), _x(), fold=False)
    assert type(network.conv) in (nn.Conv2d, nn.ConvTranspose2d)
    prepare(network, Scheme.from_dict(content), _x())


def test_a_transformer_layer_is_quantized_in_evaluation_too() -> None:
    """PyTorch's fast path, which takes the weights past the layers, is off."""
    torch.manual_seed(0)
    network = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = network(x)
        prepare(network, Scheme.from_dict({"defaults": {"weight": {"bits": 2}}}), x)
        with collecting_ranges(network):
            network(x)
        assert (network(x) - expected).abs().max() > 0.1
    assert coverage(network).counts["Linear"] == (2, 3)
    assert coverage(network).left_in_float["self_attn.out_proj"] == NEVER_CALLED


def test_readers_of_one_tensor() -> None:
    network = Net(
        lambda n, x: n.add(n.b(y := n.relu(n.a(x))), y) + n.c(nn.functional.pad(y, [0, 1]))[..., :8],
        a=_conv(), c=_conv(), b=_conv(), add=ResidualAdd(), relu=nn.ReLU(inplace=True),
    )  # fmt: skip
    assert trace(network, _x()).one_tensor == (("c", "b", "add:residual"),)


def test_an_in_place_change_makes_another_tensor() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        before = n.a(x)
        x.relu_()
        return before + n.b(x) + n.c(x)

    network = Net(run, a=_conv(), b=_conv(), c=_conv())
    assert trace(network, _x()).one_tensor == (("b", "c"),)


def test_padding_with_other_numbers_makes_another_tensor() -> None:
    network = Net(
        lambda n, x: n.a(x) + n.b(nn.functional.pad(x, (1, 1, 1, 1), value=9.0))[..., 1:-1, 1:-1],
        a=_conv(),
        b=_conv(),
    )
    assert trace(network, _x()).one_tensor == ()


def test_a_sparse_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = SparseSequential(SubMConv3d(4, 4, 3, indice_key="k"), nn.BatchNorm1d(4), nn.ReLU())
            self.bn = nn.BatchNorm1d(4)
            self.conv = SubMConv3d(4, 4, 3, indice_key="k")
            self.add = ResidualAdd()

        def forward(self, x: SparseConvTensor) -> Tensor:
            x = self.first(x)
            return self.add(branch=self.bn(self.conv(x).features), identity=x.features)

    coords = torch.tensor([[0, 0, 0, i] for i in range(4)]).int()
    found = trace(Block(), SparseConvTensor(torch.randn(4, 4), coords, [4, 4, 4], 1))
    assert found.folds == {"first.1": "first.0", "bn": "conv"}
    assert found.one_tensor == (("conv", "add:residual"),)


def test_modes_and_hooks_are_what_they_were() -> None:
    network = Net(lambda n, x: n.bn(n.a(x)), a=_conv(), bn=nn.BatchNorm2d(4))
    network.train()
    network.bn.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trace(network, _x())
    assert [m.training for m in network.modules()] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_a_run_that_fails_leaves_the_network_as_it_was() -> None:
    network = Net(lambda n, x: n.a(n.a(x)[:, :1]), a=_conv())
    network.train()
    with pytest.raises(RuntimeError, match="channels"):
        prepare(network, INT8, _x())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(m.training for m in network.modules())
    assert type(network.a) is nn.Conv2d


# What cannot be quantized right


def _reused() -> Net:
    return Net(lambda n, x: n.conv(3 * n.conv(x)), conv=_conv())


def test_a_layer_on_tensors_of_different_ranges_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"conv \(Conv2d\): it is used 2 times on tensors of different ranges"
    ):
        prepare(_reused(), INT8, _x())


@pytest.mark.parametrize(
    "content",
    [{"on_reuse": "one_range"}, {"defaults": {"input": {"mode": "dynamic"}}}, {"defaults": {"input": "off"}}],
)
def test_unless_the_scheme_says_what_becomes_of_them(content: dict[str, Any]) -> None:
    network = _reused()
    prepare(network, Scheme.from_dict(content), _x())
    with collecting_ranges(network):
        network(_x())
    quantizer = network.conv._input_quantizer
    if content.get("on_reuse"):
        with quantizers_off(network), torch.no_grad():
            largest = max(float(t.abs().max()) for t in (_x(), 3 * network.conv(_x())))
        assert float(quantizer.amax) == largest


def test_a_layer_on_one_tensor_twice_is_fine() -> None:
    network = Net(lambda n, x: n.conv(x) + n.conv(x), conv=_conv())
    assert trace(network, _x()).reused == {}
    prepare(network, INT8, _x())


def _around_a_reused_layer() -> Net:
    return Net(lambda n, x: n.conv(y := n.conv(x)) + n.a(x) + n.b(y), a=_conv(), b=_conv(), conv=_conv())


def test_readers_of_any_tensor_of_a_reused_layer_share() -> None:
    network = _around_a_reused_layer()
    prepared = prepare(network, Scheme.from_dict({"on_reuse": "one_range"}), _x())
    assert prepared.wiring is not None
    assert prepared.wiring.one_tensor == (("a", "conv"), ("b", "conv"))
    assert prepared.shares_input_with == {"b": "a", "conv": "a"}
    assert network.a._input_quantizer is network.b._input_quantizer is network.conv._input_quantizer
    assert not network.a._input_quantizer.is_shared  # what it rounded last need not be this tensor


@pytest.mark.parametrize("input_", ["off", {"mode": "dynamic"}, {"bits": 16}])
def test_a_reused_layer_with_a_range_of_another_kind_joins_nobody(input_: Any) -> None:
    network = _around_a_reused_layer()
    rules = [{"layers": "conv", "input": input_}]
    prepared = prepare(network, Scheme.from_dict({"on_reuse": "one_range", "rules": rules}), _x())
    assert prepared.shares_input_with == {}


@pytest.mark.parametrize(
    "content", [{"share_residual": False}, {"rules": [{"layers": "add", "input": "off"}]}]
)
def test_one_add_for_all_blocks_joins_no_blocks(content: dict[str, Any]) -> None:
    """With the adds on ranges of their own, or float, the blocks' ranges are their own too."""
    network = Net(
        lambda n, x: n.add(n.b(y := 9 * n.add(n.a(x), x)), y), a=_conv(), b=_conv(), add=ResidualAdd()
    )
    with pytest.raises(UserError, match=r"add \(ResidualAdd\): it is used 2 times"):
        prepare(network, INT8, _x())
    prepared = prepare(network, Scheme.from_dict({**content, "on_reuse": "one_range"}), _x())
    assert prepared.shares_input_with == {}


def test_an_add_that_is_registered_first_owns_nothing() -> None:
    """Its own quantizer is that of its branch, which is another tensor."""
    network = Net(lambda n, x: n.add(n.a(x), x), add=ResidualAdd(), a=_conv())
    assert prepare(network, INT8, _x()).shares_input_with == {"add:residual": "a"}
    assert network.add._residual_quantizer is network.a._input_quantizer is not network.add._input_quantizer


def test_two_adds_of_one_identity_share_it() -> None:
    network = Net(lambda n, x: n.add1(9 * x, x) + n.add2(x.relu(), x), add1=ResidualAdd(), add2=ResidualAdd())
    assert prepare(network, INT8, _x()).shares_input_with == {"add2:residual": "add1:residual"}
    assert network.add1._residual_quantizer is network.add2._residual_quantizer
    with collecting_ranges(network):
        network(_x())
    assert float(network.add1._residual_quantizer.amax) == float(_x().abs().max())
    assert float(network.add1._input_quantizer.amax) == float((9 * _x()).abs().max())


def test_prepared_twice() -> None:
    network = Net(lambda n, x: n.a(x), a=_conv())
    prepare(network, INT8, _x())
    with pytest.raises(UserError, match="this Net is prepared already, 1 layers are quantized"):
        prepare(network, INT8, _x())


def test_nothing_that_a_scheme_quantizes_is_called() -> None:
    network = Net(lambda n, x: n.a(x), a=_conv(), b=_conv())
    scheme = Scheme.from_dict({"rules": [{"layers": "a", "weight": "off", "input": "off"}]})
    with pytest.raises(UserError, match="all layers that it quantizes were never called"):
        prepare(network, scheme, _x())


def test_coverage_has_every_layer_with_its_reason() -> None:
    network = Net(
        lambda n, x: n.norm(n.b(torch.relu(n.a(x)))),
        a=_conv(), b=_conv(), unused=_conv(), norm=nn.GroupNorm(2, 4), bn=nn.BatchNorm2d(4),
    )  # fmt: skip
    network.scale = nn.Parameter(torch.ones(1))
    prepare(network, Scheme.from_dict({"rules": [{"layers": "b", "weight": "off", "input": "off"}]}), _x())
    found = coverage(network)
    assert found.counts == {"Conv2d": (1, 3), "Net": (0, 1), "GroupNorm": (0, 1), "BatchNorm": (0, 1)}
    assert found.left_in_float == {
        "b": "rule 1 (b)",
        "unused": NEVER_CALLED,
        "": "this kind of layer is not quantized",
        "norm": "this kind of layer is not quantized",
        "bn": f"cannot be folded: {NEVER_CALLED}",
    }
    assert "(the network itself): this kind of layer is not quantized" in str(found)


# CenterPoint

BRANCHES = ("center", "center_z", "dim", "rot", "vel", "hm")


def test_centerpoint() -> None:
    """The hidden convolutions of the head, the residual blocks, and the levels of the BEV backbone."""
    network = CenterPoint(NetworkConfig(point_cloud_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0)))
    found = trace(network, network.example_input())
    blocks = [f"backbone_3d.conv{stage}.{i + (stage > 1)}" for stage in (1, 2, 3, 4) for i in range(2)]
    assert found.one_tensor == (
        *((f"{block}.conv1", f"{block}.quant_add:residual") for block in blocks),
        ("backbone_2d.blocks.1.1", "backbone_2d.deblocks.0.0"),
        tuple(f"dense_head.heads_list.{i}.{branch}.0.0" for i in range(6) for branch in BRANCHES),
    )
    assert len(found.folds) == 72
    assert (found.unfolded, found.never_called, found.reused) == ({}, (), {})
    assert Wiring.from_dict(found.to_dict()) == found
