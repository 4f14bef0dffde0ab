"""Checkpoints of other projects: written by independent code, converted, run, and compared."""

import csv
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import fails
from foreign_networks import (
    MMDET3D,
    OPENPCDET,
    TIANWEIY,
    TINY,
    ForeignNetwork,
    cloud,
    foreign_network,
)
from torch import Tensor

from cpq_train.arms.loading import from_weights
from cpq_train.arms.structure import build
from cpq_train.common.checkpoint import NOT_TRAINED
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.interop import conventions
from cpq_train.interop.conversion import DROPPED, FILLED, to_ours
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.quantization.scheme import Scheme
from cpq_train.verbs.cli import main
from cpq_train.verbs.convert import convert

DIALECTS = {"openpcdet": OPENPCDET, "tianweiy": TIANWEIY, "mmdet3d": MMDET3D}
WRAPPED = {"openpcdet": "model_state", "tianweiy": "state_dict", "mmdet3d": "state_dict"}
FORMATS = [
    ("openpcdet", None, "krsc"),
    ("openpcdet", None, "rsck"),
    ("openpcdet", None, "rskc"),
    ("tianweiy", None, "rsck"),
    ("tianweiy", None, "krsc"),
    ("mmdet3d", 0, "rsck"),
    ("mmdet3d", 1, "rsck"),
    ("mmdet3d", 1, "krsc"),
]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    network = {k: list(map(list, v)) if k == "class_groups" else v for k, v in asdict(TINY).items()}
    network = {k: list(v) if isinstance(v, tuple) else v for k, v in network.items()}
    path.write_text(yaml.safe_dump({"model": {"network": network}}))
    return path


def _save(content: Any, path: Path, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def _file(network: ForeignNetwork, source: str, path: Path, **more: Any) -> Path:
    """As each project saves it: OpenPCDet in the old format with its step, tianweiy's from several GPUs."""
    state: dict[str, Any] = dict(network.state)
    if source == "openpcdet":
        state["global_step"] = torch.tensor([11])
    if source == "tianweiy":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    return _save({WRAPPED[source]: state, "epoch": 20, **more}, path, legacy=source == "openpcdet")


def _options(path: Path, source: str, version: int | None, config_file: Path) -> list[str]:
    options = ["convert", "--input", str(path), "--source", source, "--config", str(config_file)]
    options += ["--output", str(path.with_suffix(".ckpt"))]
    return options if version is None else [*options, "--mmdet3d_version", str(version)]


def _ours(heads: list[dict[str, Tensor]], source: str, version: int | None) -> list[dict[str, Tensor]]:
    """Raw outputs of another project, as ours would be, by what they mean."""
    converted = []
    for head in heads:
        head = dict(head)
        log_a, log_b, log_height = head["dim"].split(1, dim=1)
        first, second = head["rot"].split(1, dim=1)
        old = source == "tianweiy" or version == 0
        if old:
            # Width, length. (sin y', cos y') with y' = -y - pi/2 is (-cos y, -sin y).
            head["dim"] = torch.cat([log_b, log_a, log_height], 1)
            head["rot"] = torch.cat([-first, -second], 1)
            yaw = -torch.atan2(first, second) - math.pi / 2
            cosine, sine = head["rot"].split(1, dim=1)
            turn = (torch.atan2(sine, cosine) - yaw) / (2 * math.pi)
            torch.testing.assert_close(turn, turn.round(), rtol=0, atol=1e-5)
        elif version == 1:
            head["rot"] = torch.cat([second, first], 1)
        converted.append(head)
    return converted


@pytest.mark.parametrize(("source", "version", "layout"), FORMATS)
def test_heads_are_those_of_the_other_network(
    source: str,
    version: int | None,
    layout: str,
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = foreign_network(DIALECTS[source], layout)
    path = _file(theirs, source, tmp_path / "theirs.pth")
    main(_options(path, source, version, config_file))
    ours = from_weights(TINY, tmp_path / "theirs.ckpt", None, None)
    features, coords = cloud()
    with torch.no_grad():
        expected = _ours(theirs(features, coords), source, version)
        actual = ours.network.eval()(features, coords, 1)
    for got, wanted in zip(actual, expected, strict=True):
        assert list(got) == list(wanted)
        for name, value in wanted.items():
            assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    printed = capsys.readouterr().out
    counts = [int(n) for n in re.findall(r"^│\s+(\d+) │", printed, re.MULTILINE)]
    assert sum(counts) == len(ours.network.state_dict()) + (source == "openpcdet")
    assert f"sparse weights were {layout}" in printed
    assert "every output finite" in printed


def test_what_a_converted_file_says_of_itself(config_file: Path, tmp_path: Path) -> None:
    path = _file(foreign_network(TIANWEIY, "rsck"), "tianweiy", tmp_path / "theirs.pth")
    main(_options(path, "tianweiy", None, config_file))
    content = torch.load(tmp_path / "theirs.ckpt", weights_only=True)
    assert content["conversion"] == {
        "source": "tianweiy",
        "sparse_layout": "rsck",
        "weights": None,
        "input_sha256": sha256_of(path),
    }
    assert NOT_TRAINED.items() <= content.items()
    assert content["quantization"]["arm"] == "float"
    assert content["quantization"]["parents"] == {"tianweiy": sha256_of(path)}
    ptq = from_weights(TINY, tmp_path / "theirs.ckpt", "ptq", Scheme.from_dict({"name": "int8"}))
    assert ptq.parents == {"tianweiy": sha256_of(path), "float": sha256_of(tmp_path / "theirs.ckpt")}
    assert not list(tmp_path.glob("*.part"))
    main(["describe", str(tmp_path / "theirs.ckpt")])


FULL_WIDTHS = replace(NetworkConfig(), point_cloud_range=TINY.point_cloud_range)


@pytest.mark.parametrize(
    ("source", "table", "number"),
    [
        ("openpcdet", "openpcdet_state_dict.tsv", 558),
        ("tianweiy", "centerpoint_tianweiy_state_dict.tsv", 557),
    ],
)
def test_every_name_of_the_published_networks(
    source: str, table: str, number: int, reference_dir: Path, tmp_path: Path
) -> None:
    """The writer of these tests has the names and shapes of the tables, and all of them convert."""
    with (reference_dir / table).open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert len(rows) == number
    state = foreign_network(DIALECTS[source], "krsc", FULL_WIDTHS).state
    if source == "openpcdet":
        state["global_step"] = torch.tensor([1])
    shapes = {name: "x".join(map(str, t.shape)) or "scalar" for name, t in state.items()}
    assert shapes == {name: row["shape"] for name, row in rows.items()}
    convert(_save(state, tmp_path / "f.pth"), tmp_path / "f.ckpt", source)  # type: ignore[arg-type]
    for size_m in (0.1, 0.075):
        sizes = (size_m, size_m, 0.2)
        range_m = 720 * size_m if size_m == 0.075 else 51.2
        config = NetworkConfig(sizes, (-range_m, -range_m, -5.0, range_m, range_m, 3.0))
        assert from_weights(config, tmp_path / "f.ckpt", None, None).parents[source]
    if source == "tianweiy":
        for name, row in rows.items():
            assert conventions.TIANWEIY.our_name(name) == row["openpcdet_name"]


def test_names_of_mmdetection3d() -> None:
    """Against the description, as no table of its names is published."""
    renamed = {
        "pts_middle_encoder.conv_input.1.bias": "backbone_3d.conv_input.1.bias",
        "pts_middle_encoder.encoder_layers.encoder_layer1.1.bn2.weight": "backbone_3d.conv1.1.bn2.weight",
        "pts_middle_encoder.encoder_layers.encoder_layer1.2.0.weight": "backbone_3d.conv2.0.0.weight",
        "pts_middle_encoder.encoder_layers.encoder_layer3.0.conv1.weight": "backbone_3d.conv3.1.conv1.weight",
        "pts_middle_encoder.encoder_layers.encoder_layer3.2.1.bias": "backbone_3d.conv4.0.1.bias",
        "pts_middle_encoder.encoder_layers.encoder_layer4.1.conv2.weight": "backbone_3d.conv4.2.conv2.weight",
        "pts_middle_encoder.conv_out.0.weight": "backbone_3d.conv_out.0.weight",
        "pts_backbone.blocks.1.15.weight": "backbone_2d.blocks.1.16.weight",
        "pts_neck.deblocks.0.0.weight": "backbone_2d.deblocks.0.0.weight",
        "pts_bbox_head.shared_conv.bn.weight": "dense_head.shared_conv.1.weight",
        "pts_bbox_head.task_heads.5.reg.0.conv.weight": "dense_head.heads_list.5.center.0.0.weight",
        "pts_bbox_head.task_heads.5.height.0.bn.bias": "dense_head.heads_list.5.center_z.0.1.bias",
        "pts_bbox_head.task_heads.5.heatmap.1.bias": "dense_head.heads_list.5.hm.1.bias",
    }
    published = CenterPoint(TINY_SHAPES).state_dict()
    for theirs, ours in renamed.items():
        assert conventions.MMDET3D_1.our_name(theirs) == ours
        assert ours in published


TINY_SHAPES = replace(TINY, backbone_2d_num_layers=(5, 5))


def test_what_is_filled_and_what_is_dropped() -> None:
    state = dict(foreign_network(MMDET3D, "rsck").state)
    lost = [name for name in state if name.endswith("num_batches_tracked")]
    for name in lost:
        del state[name]
    state["global_step"] = torch.tensor([3])
    own = CenterPoint(TINY).state_dict()
    converted = to_ours(state, conventions.MMDET3D_1, own)
    assert list(converted.state) == list(own)
    filled = converted.changes[FILLED]
    assert converted.changes[DROPPED] == ["global_step"]
    # 16 residual convolutions, the shared one and six of each of six heads.
    assert sum(name.endswith(".bias") for name in filled) == 16 + 1 + 36
    assert len(filled) == 16 + 1 + 36 + len(lost)
    assert all(not converted.state[name].any() for name in filled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_become_single(dtype: torch.dtype) -> None:
    theirs = foreign_network(TIANWEIY, "krsc").state
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in theirs.items()}
    converted = to_ours(state, conventions.TIANWEIY, CenterPoint(TINY).state_dict())
    assert {t.dtype for t in converted.state.values()} == {torch.float32, torch.int64}


# --- layouts of sparse weights

SQUARE = replace(TINY, num_point_features=4, backbone_3d_channels=(4,) * 4, backbone_3d_out_channels=4)
CUBES = replace(TINY, num_point_features=3, backbone_3d_channels=(3,) * 4, backbone_3d_out_channels=3)


def _convert_in_memory(layout: str, config: NetworkConfig, asked: Any) -> Any:
    state = foreign_network(OPENPCDET, layout, config).state
    return to_ours(state, conventions.OPENPCDET, CenterPoint(config).state_dict(), asked), state


@pytest.mark.parametrize("layout", ["rsck", "rskc"])
def test_an_ambiguous_layout_wants_an_option(layout: str) -> None:
    with pytest.raises(UserError, match=r"fit the layouts rsck, rskc: say which with sparse_layout"):
        _convert_in_memory(layout, SQUARE, None)
    converted, state = _convert_in_memory(layout, SQUARE, layout)
    name = "backbone_3d.conv1.0.conv1.weight"
    # Entry (z, y, x) of the kernel, from input channel 1 to output channel 3.
    row = state[name][0, 1, 2, 1, 3] if layout == "rsck" else state[name][0, 1, 2, 3, 1]
    assert converted.state[name][3, 0, 1, 2, 1] == row
    # krsc is told from both by the kernel size, which is no channel count here.
    assert _convert_in_memory("krsc", SQUARE, None)[0].layout == "krsc"


def test_one_layer_that_tells_decides_for_all() -> None:
    """Only conv_out has a kernel that is no cube; krsc fits every other shape, and is out."""
    with pytest.raises(UserError, match="fit the layouts rsck, rskc"):
        _convert_in_memory("rsck", CUBES, None)
    assert _convert_in_memory("krsc", CUBES, None)[0].layout == "krsc"


def test_an_option_that_contradicts_the_shapes() -> None:
    with pytest.raises(
        UserError,
        match=r"sparse_layout 'krsc' contradicts the shapes: backbone_3d.conv_input.0.weight is "
        r"\(3, 3, 3, 5, 4\) in the file, \(4, 3, 3, 3, 5\) .* they fit rsck",
    ):
        _convert_in_memory("rsck", TINY, "krsc")


def test_two_layouts_in_one_file() -> None:
    state = dict(foreign_network(OPENPCDET, "rsck").state)
    name = "backbone_3d.conv3.0.0.weight"
    state[name] = state[name].permute(4, 0, 1, 2, 3)
    with pytest.raises(UserError, match=r"conv3.0.0.weight is \(12, 3, 3, 3, 8\)"):
        to_ours(state, conventions.OPENPCDET, CenterPoint(TINY).state_dict())


# --- files of other networks


def _refusal(tmp_path: Path, content: Any, source: str, config_file: Path, **options: Any) -> str:
    path = _save(content, tmp_path / "theirs.pth")
    with pytest.raises(UserError) as caught:
        convert(path, tmp_path / "out.ckpt", source, config=config_file, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out.ckpt").exists()
    assert "theirs.pth" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("written", DIALECTS)
@pytest.mark.parametrize("said", DIALECTS)
def test_the_wrong_source(written: str, said: str, config_file: Path, tmp_path: Path) -> None:
    if written == said:
        return
    state = foreign_network(DIALECTS[written], "rsck").state
    version = {"mmdet3d_version": 1} if said == "mmdet3d" else {}
    text = _refusal(tmp_path, {WRAPPED[said]: state}, said, config_file, **version)
    assert f"source is '{said}', but the names are those of {written}" in text


def _without_residual_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"(conv1\.\d)\.conv1\.", r"\1.0.", n): t for n, t in state.items() if ".conv2." not in n}


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (_without_residual_blocks, r"conv1\.0\.conv2\.weight.*conv1\.0\.0\.weight.*VoxelBackBone8x"),
        (lambda s: s | {"vfe.pfn_layers.0.linear.weight": torch.ones(64, 10)}, "PointPillars"),
        (lambda s: s | {"dense_head.heads_list.0.conv_offset.weight": torch.ones(2)}, "DCN"),
        (lambda s: s | {"backbone_3d.conv1.0.conv1._input_quantizer._amax": torch.ones(())}, "--ranges_file"),
        (lambda s: {n: s[n] for n in s if n != "dense_head.shared_conv.0.bias"}, "missing here: dense_"),
        (lambda s: s | {"dense_head.shared_conv.0.bias": torch.ones(9)}, r"\(9,\), here \(8,\)"),
        (lambda s: s | {"dense_head.heads_list.0.dim.1.bias": torch.ones(())}, r"\(\), here \(3,\)"),
        (lambda s: s | {"backbone_3d.conv1.0.bn1.bias": torch.full((4,), math.nan)}, "not finite: back"),
        (lambda s: s | {"backbone_3d.conv1.0.bn1.running_var": -torch.ones(4)}, "not all finite"),
        *(
            (
                lambda s, kind=kind: s | {"backbone_3d.conv1.0.bn1.bias": torch.ones(4, dtype=kind)},
                f"numbers of other kinds: backbone_3d.conv1.0.bn1.bias is {kind}, here torch.float32",
            )
            for kind in (torch.bool, torch.int64, torch.complex64)
        ),
        (lambda s: s | {"module.backbone_3d.conv1.0.bn1.bias": torch.ones(4)}, "both stand for"),
    ],
)
def test_other_networks(change: Any, pattern: str, config_file: Path, tmp_path: Path) -> None:
    state = change(dict(foreign_network(OPENPCDET, "krsc").state))
    if pattern == "not all finite":  # found by the forward pass, which knows no file
        path = _save(state, tmp_path / "theirs.pth")
        with pytest.raises(UserError, match=pattern):
            convert(path, tmp_path / "out.ckpt", "openpcdet", config=config_file)
        assert not list(tmp_path.glob("out.ckpt*"))
    else:
        assert re.search(pattern, _refusal(tmp_path, state, "openpcdet", config_file), re.DOTALL)


def test_other_widths_name_layer_and_shapes(tmp_path: Path) -> None:
    narrow = replace(TINY, backbone_2d_num_layers=(5, 5))
    path = _save(foreign_network(OPENPCDET, "krsc", narrow).state, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match=r"conv_input.0.weight is \(4, 3, .* in the file, \(16, 3, 3, 3, 5\)"):
        convert(path, tmp_path / "out.ckpt", "openpcdet")


def test_a_torn_state(config_file: Path, tmp_path: Path) -> None:
    state = foreign_network(OPENPCDET, "krsc").state
    both = {"model_state": state, "state_dict": state}
    assert "model_state and state_dict: expected one" in _refusal(tmp_path, both, "openpcdet", config_file)
    plain = {**state, "lr": 0.1}
    assert "'lr' is a float; expected tensors" in _refusal(tmp_path, plain, "openpcdet", config_file)
    kinds = {"a list": [1], "an empty dictionary": {}, "a NoneType": {"model_state": None}}
    for kind, content in kinds.items():
        assert f"holds {kind}; expected" in _refusal(tmp_path, content, "openpcdet", config_file)
    ours = {"state_dict": state, "quantization": {}}
    assert "is of this project" in _refusal(tmp_path, ours, "openpcdet", config_file)


@pytest.mark.parametrize(
    ("meta", "version", "text"),
    [
        ({"mmdet3d_version": "0.17.1"}, 1, "0.x wrote it"),
        ({"mmdet3d_version": "1.0.0rc3"}, 0, "1.x wrote it"),
        ({"mmengine_version": "0.10.4"}, 0, "1.x wrote it"),
    ],
)
def test_the_version_that_a_file_states(
    meta: dict[str, str], version: int, text: str, config_file: Path, tmp_path: Path
) -> None:
    content = {"meta": meta, "state_dict": foreign_network(MMDET3D, "rsck").state}
    path = _save(content, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match=text):
        convert(path, tmp_path / "a.ckpt", "mmdet3d", mmdet3d_version=version, config=config_file)  # type: ignore[arg-type]
    convert(path, tmp_path / "a.ckpt", "mmdet3d", mmdet3d_version=1 - version, config=config_file)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "source is None, target is None"),
        ({"source": "openpcdet", "target": "openpcdet"}, "expected one of the two"),
        ({"source": "mmdet3d"}, "expected 0 or 1 with source mmdet3d"),
        ({"source": "openpcdet", "mmdet3d_version": 1}, "mmdet3d_version is 1 with source openpcdet"),
        ({"target": "openpcdet", "sparse_layout": "krsc"}, "target needs neither"),
        ({"target": "openpcdet", "weights": "ema"}, "weights 'ema': both say how to read"),
        ({"source": "openpcdet", "output": Path("in.pth")}, "is the input"),
        ({"source": "openpcdet", "output": Path()}, "output '.' is a folder"),
        ({"source": "openpcdet", "config": Path("none.yaml")}, "config 'none.yaml' does not exist"),
        ({"source": "openpcdet"}, "'in.pth' does not exist"),
        ({"target": "openpcdet"}, "'in.pth' does not exist"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)):
        convert(**{"input": Path("in.pth"), "output": Path("out.ckpt"), **options})


@pytest.mark.parametrize("content", ["model: {network: {width: 3}}", "model: 3", "a: [", "3"])
def test_a_config_without_sizes(content: str, tmp_path: Path) -> None:
    (tmp_path / "in.pth").touch()
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=r"c.yaml' (has no readable model.network|is no YAML: line 1)"):
        convert(tmp_path / "in.pth", tmp_path / "out.ckpt", "openpcdet", config=tmp_path / "c.yaml")


@pytest.mark.parametrize("verb", ["describe", "verify", "validate"])
def test_a_foreign_file_in_place_of_a_checkpoint(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _file(foreign_network(TIANWEIY, "rsck"), "tianweiy", tmp_path / "theirs.pth")
    said = fails([verb, *(("--model.weights",) if verb == "validate" else ()), str(path)], capsys)
    assert "theirs.pth' is none of this project's: it holds state_dict, epoch;" in said
    assert said.endswith(f"convert --source tianweiy --input {path} --output {path.with_suffix('.ckpt')}")


def test_what_is_left_out_and_what_was_another_precision(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {
        n: t.half() if t.is_floating_point() else t
        for n, t in foreign_network(OPENPCDET, "krsc").state.items()
    }
    path = _file(ForeignNetwork(OPENPCDET, "krsc", state=state), "openpcdet", tmp_path / "theirs.pth", it=3)
    main(_options(path, "openpcdet", None, config_file))
    printed = capsys.readouterr().out
    assert "taken as they are, float16 to float32" in printed
    sums = (
        f"in the file {len(state) + 1} tensors: {len(state)} taken, 1 left out; in the network {len(state)}: "
    )
    assert (
        f"{sums}{len(state)} taken, 0 filled with zero; beside them in the file, left out: epoch, it"
        in printed
    )


# --- and back


def _our_checkpoint(path: Path, arm: Any = "float", scheme: Scheme | None = None) -> dict[str, Tensor]:
    torch.manual_seed(2)
    subject = build(TINY, arm, scheme)
    subject.network.dense_channels_last()
    state = subject.network.state_dict()
    content: dict[str, Any] = {"quantization": subject.describe(), "epoch": 19, "global_step": 77}
    content["hyper_parameters"] = {"network": asdict(TINY)}
    torch.save({**content, "state_dict": {f"network.{n}": t for n, t in state.items()}}, path)
    return state


def test_to_openpcdet_and_back(config_file: Path, reference_dir: Path, tmp_path: Path) -> None:
    state = _our_checkpoint(tmp_path / "ours.ckpt")
    pth = tmp_path / "pcdet.pth"
    main(["convert", "--input", str(tmp_path / "ours.ckpt"), "--target", "openpcdet", "--output", str(pth)])
    content = torch.load(pth, weights_only=True)
    assert list(content) == ["epoch", "it", "model_state", "optimizer_state", "version"]
    assert (content["epoch"], content["it"], content["optimizer_state"]) == (19, 77, None)
    assert content["model_state"]["global_step"].tolist() == [77]
    assert pth.read_bytes()[:2] != b"PK"  # as OpenPCDet writes it
    with (reference_dir / "openpcdet_state_dict.tsv").open() as file:
        names = [row["name"] for row in csv.DictReader(file, delimiter="\t")]
    written = list(content["model_state"])
    assert [name for name in names if name in set(written)] == written
    main(_options(pth, "openpcdet", None, config_file))
    returned = from_weights(TINY, pth.with_suffix(".ckpt"), None, None).network.state_dict()
    assert list(returned) == list(state)
    assert all(torch.equal(tensor, returned[name]) for name, tensor in state.items())


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.complex64])
def test_only_real_numbers_go_back(kind: torch.dtype, tmp_path: Path) -> None:
    _our_checkpoint(tmp_path / "ours.ckpt")
    content = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    name = "network.dense_head.heads_list.0.hm.1.bias"
    content["state_dict"][name] = content["state_dict"][name].to(kind)
    torch.save(content, tmp_path / "ours.ckpt")
    with pytest.raises(UserError, match=rf"1 tensors hold other numbers .*{kind} instead of torch.float32"):
        convert(tmp_path / "ours.ckpt", tmp_path / "pcdet.pth", target="openpcdet")
    assert not (tmp_path / "pcdet.pth").exists()


@pytest.mark.parametrize(("arm", "name"), [("ptq", "int8"), ("float_tuned", None)])
def test_folded_and_quantized_networks_do_not_go_back(arm: str, name: str | None, tmp_path: Path) -> None:
    scheme = Scheme.from_dict({"name": name}) if name else None
    _our_checkpoint(tmp_path / "ours.ckpt", arm, scheme)
    with pytest.raises(UserError, match=f"is '{arm}' with BatchNorm folded"):
        convert(tmp_path / "ours.ckpt", tmp_path / "pcdet.pth", target="openpcdet")
    assert not (tmp_path / "pcdet.pth").exists()
