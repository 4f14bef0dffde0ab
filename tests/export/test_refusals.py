"""Networks that no plan can hold, and places where no file may be written: each is said by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_networks import (
    A8,
    CONV_INPUT,
    W8,
    assert_equal,
    calibrate,
    calibrated,
    features_of,
    float_network,
    model_of,
    run_file,
    run_network,
    session_of,
    subject_of,
    voxels,
    write,
)
from torch import nn

from cpq_train.arms.structure import restructure
from cpq_train.common.errors import UserError
from cpq_train.export.plan import differences
from cpq_train.export.planning import plan_of, why_not
from cpq_train.export.sidecar import sidecar_path
from cpq_train.export.writing import check_place
from cpq_train.models import CenterPoint
from cpq_train.quantization.layers import quantize_layer, unquantize_layer
from cpq_train.quantization.ranges.bias_steps import widen_steps
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme, Scheme

DENSE = "backbone_2d.blocks.1.4"
UPSAMPLING = "backbone_2d.deblocks.1.0"
SPARSE = "backbone_3d.conv2.1.conv1"
STRIDED = "backbone_3d.conv3.0.0"
ADD = "backbone_3d.conv2.1.quant_add"

DENSE_KINDS, SPARSE_KINDS = ["Conv2d", "ConvTranspose2d"], ["SubMConv3d", "SparseConv3d"]
FLOAT_DENSE = "a float dense layer: its fp32 sums are rounded in another order by every library; quantize it"
TINIEST = 2.0**-24


def _prepared(scheme: Scheme | dict[str, Any], batchnorm: Any = "folded") -> CenterPoint:
    """A quantized network, calibrated."""
    scheme = Scheme.from_dict(scheme) if isinstance(scheme, dict) else scheme
    network = restructure(float_network(), "qat", scheme, batchnorm).network
    calibrate(network)
    return network


def _layers_of(network: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, kinds)]


def _refused(network: CenterPoint) -> str:
    with pytest.raises(UserError) as error:
        plan_of(network)
    return str(error.value)


def _with_rule(rule: dict[str, Any], **further: Any) -> CenterPoint:
    rules = [CONV_INPUT, rule]
    return _prepared({"defaults": {"weight": W8, "input": A8}, "rules": rules, **further})


def _off(name: str) -> dict[str, Any]:
    return {"layers": name, "weight": "off", "input": "off"}


@pytest.mark.parametrize("name", [DENSE, UPSAMPLING, "dense_head.heads_list.1.hm.1"])
def test_a_float_dense_layer(name: str) -> None:
    assert why_not(_with_rule(_off(name))) == {name: FLOAT_DENSE}


@pytest.mark.parametrize("name", [SPARSE, STRIDED, ADD])
def test_a_float_sparse_layer_is_accepted(name: str) -> None:
    network = _with_rule(_off(name))
    assert why_not(network) == {}
    assert getattr(plan_of(network)[name], "input_range", None) is None


def test_the_sparse_recipe_is_refused_for_its_dense_layers() -> None:
    network = _prepared(Scheme.from_file("configs/schemes/nvidia_sparse.yaml"))
    dense = _layers_of(network, nn.Conv2d, nn.ConvTranspose2d)
    assert why_not(network) == dict.fromkeys(dense, FLOAT_DENSE)
    assert len(dense) == 5 + 2 + 1 + 2 * 12
    message = _refused(network)
    assert message.startswith(f"{len(dense)} layers cannot be exported:\n  {FLOAT_DENSE}: {dense[0]}, ")
    assert message.count("\n") == 1
    assert message.endswith(", ".join(dense))


def test_dynamic_ranges() -> None:
    network = _prepared(Scheme.from_file("configs/schemes/conv2d_int8_dynamic.yaml"))
    convolutions = _layers_of(network, nn.Conv2d)
    assert why_not(network) == {
        **dict.fromkeys(convolutions, "the range of its input is dynamic: a file holds static ones"),
        **dict.fromkeys(_layers_of(network, nn.ConvTranspose2d), FLOAT_DENSE),
    }


@pytest.mark.parametrize("name", [ADD, SPARSE])
def test_one_dynamic_range(name: str) -> None:
    network = _with_rule({"layers": name, "input": {"mode": "dynamic"}}, share_residual=False)
    assert why_not(network) == {name: "the range of its input is dynamic: a file holds static ones"}


def test_fp8() -> None:
    network = _prepared(Scheme.from_file("configs/schemes/fp8.yaml"))
    quantized = [name for name, module in network.named_modules() if hasattr(module, "why_simulated")]
    assert why_not(network) == dict.fromkeys(quantized, "simulated (FP8 numbers are no integers)")
    assert ADD in quantized
    assert len(quantized) == 5 * 3 + 4 + 32


@pytest.mark.parametrize("name", [DENSE, UPSAMPLING, SPARSE, STRIDED])
@pytest.mark.parametrize(
    ("off", "reason"),
    [
        ("input", "simulated (its input is not quantized)"),
        ("weight", "simulated (its weight is not quantized)"),
    ],
)
def test_only_the_weight_or_only_the_input_quantized(name: str, off: str, reason: str) -> None:
    assert why_not(_with_rule({"layers": name, off: "off"})) == {name: reason}


def test_weight_scales_of_summed_channels() -> None:
    network = _with_rule({"layers": DENSE}, tensorrt_conv_transpose=True)
    reason = "simulated (weight scales sit on the summed channels (axis 0))"
    assert why_not(network) == dict.fromkeys(_layers_of(network, nn.ConvTranspose2d), reason)


@pytest.mark.parametrize("name", [DENSE, UPSAMPLING, SPARSE, STRIDED])
@pytest.mark.parametrize("bits", [2, 8, 9, 16])
def test_bits_of_weights(name: str, bits: int) -> None:
    reasons = why_not(_with_rule({"layers": name, "weight": {"bits": bits}}))
    assert reasons == ({name: f"weights of {bits} bits: accepted are 2 to 8"} if bits > 8 else {})


@pytest.mark.parametrize("name", [DENSE, UPSAMPLING, SPARSE, STRIDED, ADD])
@pytest.mark.parametrize("amax", [TINIEST, TINIEST / 3, 0.0])
def test_ranges_of_nothing(name: str, amax: float) -> None:
    network = calibrated("narrow")  # no shared residual: each of these has a quantizer of its own
    network.get_submodule(name)._input_quantizer.set_amax(torch.tensor(amax))
    shared = {n for n, m in network.named_modules() if _reads_with(m, network.get_submodule(name))}
    assert why_not(network) == dict.fromkeys(
        shared, f"the amax of its input is {amax:g}: its codes are all 0"
    )
    assert name in shared


@pytest.mark.parametrize("amax", [float("nan"), float("inf")])
def test_ranges_that_were_never_found(amax: float) -> None:
    network = calibrated("narrow")
    network.get_submodule(STRIDED)._input_quantizer.set_amax(torch.tensor(amax))
    assert why_not(network)[STRIDED] == f"the amax of its input is {amax:g}: it was never calibrated"


def test_padding_as_wide_as_the_kernel() -> None:
    network = calibrated("int8")
    network.get_submodule(STRIDED).padding = [1, 3, 1]
    reason = "padding [1, 3, 1] for kernel [3, 3, 3]: smaller than the kernel"
    assert why_not(network) == {STRIDED: reason}


def _reads_with(module: nn.Module, layer: nn.Module) -> bool:
    return getattr(module, "_input_quantizer", None) is layer._input_quantizer


def test_a_range_of_nothing_of_an_identity() -> None:
    network = calibrated("int8")
    add = network.get_submodule(ADD)
    assert add._residual_quantizer is network.get_submodule(SPARSE)._input_quantizer
    add._residual_quantizer.set_amax(torch.tensor(TINIEST))
    reason = "the amax of its input is 5.96046e-08: its codes are all 0"
    assert why_not(network) == {SPARSE: reason, ADD: reason}


def test_the_smallest_range_there_is() -> None:
    network = calibrated("int8")
    amax = torch.nextafter(torch.tensor(TINIEST), torch.tensor(1.0))
    for name in (DENSE, SPARSE, ADD):
        network.get_submodule(name)._input_quantizer.set_amax(amax)
    widen_steps(network)
    session = session_of(model_of(plan_of(network)).SerializeToString())
    coords = voxels(500)
    features = features_of(coords)
    assert_equal(run_file(session, features, coords), run_network(network, features, coords))


@pytest.mark.parametrize("batchnorm", ["frozen", "trained"])
def test_a_batchnorm_that_was_kept(batchnorm: str) -> None:
    scheme = {"defaults": {"weight": W8, "input": A8}, "rules": [CONV_INPUT]}
    network = _prepared(scheme, batchnorm)
    norms = _layers_of(network, nn.BatchNorm1d, nn.BatchNorm2d)
    reason = "its BatchNorm was kept in training: export folded.ckpt, which fit writes beside last.ckpt"
    assert why_not(network) == dict.fromkeys(norms, reason)
    assert norms[0] == "backbone_3d.conv_input.1"
    assert f"{reason}: backbone_3d.conv_input.1, " in _refused(network)


@pytest.mark.parametrize("name", [DENSE, UPSAMPLING, SPARSE, STRIDED, "backbone_3d.conv_input.0"])
def test_groups(name: str) -> None:
    network = calibrated("int8")
    network.get_submodule(name).groups = 2
    assert why_not(network) == {name: "a convolution in 2 groups"}


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": (3, 3)},
        {"stride": (1, 1)},
        {"padding": (1, 1)},
        {"padding": (0, 1)},
        {"output_padding": (1, 0)},
        {"kernel_size": (2, 3), "stride": (2, 3)},
        {"dilation": (2, 2)},
        {"dilation": (1, 2)},
    ],
)
def test_upsampling_that_is_no_1x1_convolution(geometry: dict[str, Any]) -> None:
    network = calibrated("int8")
    layer = network.get_submodule(UPSAMPLING)
    for name, value in geometry.items():
        setattr(layer, name, value)
    ((name, reason),) = why_not(network).items()
    assert name == UPSAMPLING
    assert reason == (
        f"kernel {layer.kernel_size}, stride {layer.stride}: only equal square ones, without padding or "
        "dilation"
    )


def test_every_reason_is_listed_with_its_layers() -> None:
    network = calibrated("int8")
    network.get_submodule(STRIDED).groups = 4
    for name in (DENSE, "backbone_2d.blocks.0.4"):
        unquantize_layer(network.get_submodule(name))
    layer = network.get_submodule("dense_head.heads_list.0.hm.1")
    unquantize_layer(layer)
    quantize_layer(layer, LayerScheme(QuantizerScheme(bits=12), QuantizerScheme()))
    network.get_submodule("dense_head.heads_list.1.hm.1")._input_quantizer.set_amax(torch.tensor(0.0))
    assert _refused(network) == (
        "5 layers cannot be exported:\n"
        f"  a convolution in 4 groups: {STRIDED}\n"
        f"  {FLOAT_DENSE}: backbone_2d.blocks.0.4, {DENSE}\n"
        "  weights of 12 bits: accepted are 2 to 8: dense_head.heads_list.0.hm.1\n"
        "  the amax of its input is 0: its codes are all 0: dense_head.heads_list.1.hm.1"
    )


def test_a_network_without_a_reason_has_none() -> None:
    assert why_not(subject_of("int8").network) == {}


@pytest.mark.parametrize("arm", ["float", "float_tuned"])
def test_arms_without_quantizers(arm: Any, tmp_path: Path) -> None:
    subject = restructure(float_network(), arm, None, None)
    with pytest.raises(UserError, match=f"of arm '{arm}', whose layers are float ones; accepted: ptq and"):
        write(subject, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_refused_network_leaves_no_file(tmp_path: Path) -> None:
    scheme = {"defaults": {"weight": W8, "input": A8}, "rules": [CONV_INPUT, _off(DENSE)]}
    subject = restructure(float_network(), "ptq", Scheme.from_dict(scheme), None)
    calibrate(subject.network)
    with pytest.raises(UserError, match=f"{FLOAT_DENSE}: {DENSE}$"):
        write(subject, tmp_path, "new/net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


# Places


@pytest.mark.parametrize("name", ["net", "net.json", "net.onnx.gz", "net.ONNX", ".onnx"])
def test_a_file_that_does_not_end_in_onnx(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a file that ends in \.onnx") as error:
        check_place(tmp_path / name)
    assert repr(str(tmp_path / name)) in str(error.value)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(UserError, match=r"net\.onnx' is a folder; accepted: a file"):
        check_place(tmp_path / "net.onnx")


FOREIGN = {
    "a mapping": json.dumps({"target": "portable", "file": {}}),
    "a list": json.dumps(["target", "file", "checkpoint"]),
    "a text": json.dumps("target file checkpoint"),
    "no JSON": "{",
    "nothing": "",
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", FOREIGN)
def test_something_else_in_the_sidecars_place(content: str, tmp_path: Path) -> None:
    written = FOREIGN[content]
    before = written if isinstance(written, bytes) else written.encode()
    (tmp_path / "net.json").write_bytes(before)
    with pytest.raises(UserError, match=r"its sidecar would replace '.*net\.json', which is something"):
        write(subject_of("int8"), tmp_path)
    assert (tmp_path / "net.json").read_bytes() == before
    assert not (tmp_path / "net.onnx").exists()


def test_a_folder_in_the_sidecars_place(tmp_path: Path) -> None:
    (tmp_path / "net.json").mkdir()
    with pytest.raises(UserError, match="which is something else"):
        check_place(tmp_path / "net.onnx")


def _nothing(folder: Path) -> None:
    pass


def _old_pair(folder: Path) -> None:
    (folder / "net.onnx").write_text("an older file")
    sidecar = {"target": "portable", "file": {}, "checkpoint": {}}
    (folder / "net.json").write_text(json.dumps(sidecar))


@pytest.mark.parametrize("before", [_nothing, _old_pair])
def test_a_place_that_is_good(before: Callable[[Path], None], tmp_path: Path) -> None:
    before(tmp_path)
    check_place(tmp_path / "net.onnx")
    path, sidecar = write(subject_of("int8"), tmp_path)
    assert json.loads(sidecar_path(path).read_text())["file"] == sidecar.file
    assert sidecar.file["num_bytes"] == path.stat().st_size
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.ckpt", "net.json", "net.onnx"]


ODD = {
    "dynamic": {"input": {"mode": "dynamic"}},
    "weights alone": {"input": "off"},
    "inputs alone": {"weight": "off"},
    "FP8": {"weight": {"format": "fp8_e4m3"}, "input": {"format": "fp8_e4m3"}},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("part", "other"), [("sparse", DENSE_KINDS), ("dense", SPARSE_KINDS)])
def test_a_part_does_not_ask_what_the_other_is(part: Any, other: list[str], odd: str) -> None:
    network = _with_rule({"layers": "*", "kinds": other, **ODD[odd]})
    whole = calibrated("float biases")
    assert differences(plan_of(network, part), plan_of(whole, part)) == []
    with pytest.raises(UserError, match="layers cannot be exported"):
        plan_of(network)
