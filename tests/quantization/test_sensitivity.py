"""Measuring part by part: the switches, what is remembered, and the schemes that are written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cpq_train.arms.structure import build
from cpq_train.common.errors import UserError
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.models.topology import blocks_of
from cpq_train.quantization.bits.bit_plan import FIXED, BitPlan, Option, mixed_scheme, write_scheme
from cpq_train.quantization.bits.sensitivity import MeasurementLog, Scores, alone, cases_of, measure
from cpq_train.quantization.costs import LayerCost
from cpq_train.quantization.prepare import prepare, quantizable_layers
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import only_quantized, quantized_layers, quantizers_off

SMALL = NetworkConfig(
    point_cloud_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0),
    backbone_3d_channels=(16, 16, 16, 16),
    backbone_3d_out_channels=16,
    backbone_2d_channels=(16, 16),
    backbone_2d_num_layers=(1, 1),
    upsample_channels=(16, 16),
    head_channels=16,
)
INT8 = Scheme.from_file("configs/schemes/int8.yaml")
OPTIONS = (Option(8), Option(4, 6))


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    torch.manual_seed(0)
    network = build(SMALL, "ptq", INT8).network
    with collecting_ranges(network):
        network(*_voxels())
    return network.eval()


def _voxels() -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    coords = torch.stack([torch.randint(0, n, (600,), generator=generator) for n in (1, 40, 128, 128)], 1)
    coords = torch.unique(coords, dim=0).int()
    return torch.randn(len(coords), 5, generator=generator), coords, 1


@torch.no_grad()
def _outputs(network: nn.Module) -> Tensor:
    return torch.cat([t.flatten() for head in network(*_voxels()) for t in head.values()])


def test_none_quantized_is_float_and_all_is_the_whole(calibrated: nn.Module) -> None:
    with quantizers_off(calibrated):
        float_ = _outputs(calibrated)
    whole = _outputs(calibrated)
    assert not torch.equal(float_, whole)
    with only_quantized(calibrated, ()):
        assert torch.equal(_outputs(calibrated), float_)
    with only_quantized(calibrated, tuple(quantized_layers(calibrated))):
        assert torch.equal(_outputs(calibrated), whole)
    assert torch.equal(_outputs(calibrated), whole)


def test_one_layer_alone_is_the_scheme_of_that_layer(calibrated: nn.Module) -> None:
    """Layers that share its quantizer stay float."""
    name = "dense_head.heads_list.0.hm.0.0"
    with only_quantized(calibrated, [name]):
        bypassed = _outputs(calibrated)
    torch.manual_seed(0)
    network = CenterPoint(SMALL)
    off = {"weight": "off", "input": "off"}
    content = {
        **INT8.to_dict(),
        "rules": [{"layers": "*", **off}, {"layers": name, "weight": {"mode": "static"}}],
    }
    content["rules"][1]["input"] = {"mode": "static"}
    prepare(network, Scheme.from_dict(content), network.example_input())
    with collecting_ranges(network):
        network(*_voxels())
    assert torch.equal(bypassed, _outputs(network.eval()))


def test_blocks_hold_every_layer_once() -> None:
    network = CenterPoint(SMALL)
    blocks = blocks_of(network)
    assert [layer for layers in blocks.values() for layer in layers] == list(quantizable_layers(network))
    assert len(blocks) == 1 + 8 + 3 + 1 + 2 + 2 + 1 + 6
    assert blocks["backbone_3d.conv2.1"] == [
        f"backbone_3d.conv2.1.{n}" for n in ("conv1", "conv2", "quant_add")
    ]
    assert len(blocks["dense_head.heads_list.0"]) == 12
    assert blocks_of(build(SMALL, "ptq", INT8).network) == blocks


def _plan(by: str = "block", base: Scheme = INT8) -> BitPlan:
    network = CenterPoint(SMALL)
    kinds = quantizable_layers(network)
    sizes = {n: getattr(network.get_submodule(n), "weight", torch.empty(0)).numel() for n in kinds}
    costs = {name: LayerCost(size, 10.0 * size) for name, size in sizes.items()}
    groups = blocks_of(network) if by == "block" else {name: [name] for name in kinds}
    return BitPlan(base, kinds, costs, groups, OPTIONS)


@pytest.mark.parametrize("by", ["block", "layer"])
def test_written_scheme_resolves_to_the_assignment(by: str, tmp_path: Path) -> None:
    plan = _plan(by)
    names = ["float", "W8", "W4A6"]
    assignment = {unit.name: names[i % 3] for i, unit in enumerate(plan.units)}
    write_scheme(
        tmp_path / "s.yaml", mixed_scheme(plan.base, plan.units, plan.options, assignment), "comment"
    )
    scheme = Scheme.from_file(tmp_path / "s.yaml")
    resolved = scheme.resolve(plan.kinds)
    for unit in plan.units:
        for layer in unit.layers:
            chosen = resolved[layer]
            if assignment[unit.name] == "float":
                assert chosen.is_float
            else:
                assert chosen.input.bits == {"W8": 8, "W4A6": 6}[assignment[unit.name]]
                assert (
                    chosen.weight.is_off or chosen.weight.bits == {"W8": 8, "W4A6": 4}[assignment[unit.name]]
                )
    assert resolved["backbone_3d.conv_input.0"].is_float
    choices = plan.choices({u.name: {"W8": 0.1, "W4A6": 0.2} for u in plan.units}, "mib")
    if by == "block":
        cost = sum(choices[u][o].cost for u, o in {**assignment, FIXED: "float"}.items())
        assert plan.size(scheme)["mib"] == pytest.approx(cost, rel=1e-12)
    else:
        assert "float" not in choices["backbone_3d.conv1.0.quant_add"]


def test_sizes_of_uniform_schemes() -> None:
    plan = _plan()
    num_float = plan.costs["backbone_3d.conv_input.0"].num_weights
    num_all = sum(cost.num_weights for cost in plan.costs.values())
    size = plan.size(plan.uniform["W4A6"])
    assert size["mib"] == pytest.approx((num_float * 32 + (num_all - num_float) * 4) / 8 / 2**20, rel=1e-12)
    share = (num_float * 32 * 32 + (num_all - num_float) * 4 * 6) / (num_all * 32 * 32)
    assert size["bit_macs"] == pytest.approx(share, rel=1e-12)


class _Interrupted(Exception):
    pass


def _toy(
    stop_after: int | None = None,
) -> tuple[Callable[..., tuple[nn.Module, Callable[[], Scores]]], list[str]]:
    """Scores that count the quantized layers; the list says what was prepared or measured."""
    done: list[str] = []

    def prepare_(scheme: Scheme) -> tuple[nn.Module, Callable[[], Scores]]:
        network = CenterPoint(SMALL)
        prepare(network, scheme, network.example_input())
        done.append(scheme.name)

        def score() -> Scores:
            if done.count("score") == stop_after:
                raise _Interrupted
            done.append("score")
            return {"loss": float(sum(not m.is_bypassed for m in quantized_layers(network).values()))}

        return network, score

    return prepare_, done


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    plan, path = _plan(), tmp_path / "log.jsonl"
    cases = [c for name, scheme in plan.uniform.items() for c in cases_of(scheme, name, plan.units)]
    per_scheme = 2 + 2 * len(plan.units)
    assert len(cases) == 2 * per_scheme
    prepare_, _ = _toy(stop_after=per_scheme + 5)
    with pytest.raises(_Interrupted):
        measure(cases, prepare_, MeasurementLog(path), {"sha": 1})
    with path.open("a") as file:
        file.write('{"key": "torn')
    prepare_, done = _toy()
    records = measure(cases, prepare_, MeasurementLog(path), {"sha": 1})
    assert done == ["int8_W4A6", *["score"] * (per_scheme - 5)]
    prepare_, done = _toy()
    assert measure(cases, prepare_, MeasurementLog(path), {"sha": 1}) == records
    assert done == []
    assert [r["loss"] for r in records] == [len(c.quantized) for c in cases]
    assert alone(records)["backbone_3d.conv1.0"] == {"W8": 3.0, "W4A6": 3.0}
    measure(cases[:3], prepare_, MeasurementLog(path), {"sha": 2})
    assert done.count("score") == 3


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[" * 50_000,
        "[]",
        "1",
        '{"key": []}',
        '{"key": "b"}',
        '{"key": "b", "scores": []}',
        '{"key": "b", "scores": {"loss": "low"}}',
        '{"key": "b", "scores": {"loss": null}}',
    ],
)
def test_a_foreign_line_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = json.dumps({"key": "a", "scores": {"loss": 1.0, "sqnr_db": float("inf")}})
    path.write_text(f"{good}\n{good}\n")
    assert "a" in MeasurementLog(path)
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=r"log\.jsonl, line 2: no measurement") as error:
        MeasurementLog(path)
    assert len(str(error.value)) < 600


def test_bits_that_do_not_exist() -> None:
    plan = replace(_plan(), options=(Option(1),))
    with pytest.raises(UserError, match="bits: got 1, accepted: whole numbers from 2 to 16"):
        _ = plan.uniform
