"""The network without golden data: names, sizes, other grids, empty inputs."""

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import config
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import CLASS_GROUPS, DETECTION_CLASSES
from cpq_train.models import (
    CenterPoint,
    NetworkConfig,
    PostProcessing,
    assign_targets,
    center_loss,
    decode,
)
from cpq_train.models.center_head import HEATMAP_PRIOR
from cpq_train.sparse import SparseConv3d, SubMConv3d

TINY: dict[str, Any] = {
    "point_cloud_range": (-6.4, -3.2, -5.0, 6.4, 3.2, 3.0),
    "backbone_3d_channels": (4, 8, 8, 16),
    "backbone_3d_num_blocks": (1, 1, 2, 1),
    "backbone_3d_out_channels": 8,
    "backbone_2d_num_layers": (1, 2),
    "backbone_2d_channels": (8, 16),
    "upsample_channels": (8, 12),
    "head_channels": 8,
    "class_groups": (("car",), ("motorcycle", "bicycle")),
}
GROUPS = TINY["class_groups"]


def random_voxels(
    network: NetworkConfig, batch_size: int = 2, num_voxels: int = 400
) -> tuple[Tensor, Tensor, int]:
    """Voxels of random places, no place twice."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = network.grid_size
    parts = []
    for sample in range(batch_size):
        cell = torch.randperm(x * y * z, generator=generator)[:num_voxels]
        place = (torch.full_like(cell, sample), cell // (y * x), cell // x % y, cell % x)
        parts.append(torch.stack(place, dim=1))
    coords = torch.cat(parts).int()
    return torch.randn((len(coords), 5), generator=generator), coords, batch_size


def table(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    return [
        (name, () if shape == "scalar" else tuple(map(int, shape.split("x"))), dtype)
        for name, shape, dtype, *_ in rows
        if name != "global_step"
    ]


def test_state_dict_is_openpcdets(reference_dir: Path) -> None:
    model = CenterPoint()
    actual = [(k, tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in model.state_dict().items()]
    assert actual == table(reference_dir / "openpcdet_state_dict.tsv")
    assert len(list(model.parameters())) == 341
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_941_590


def test_a_step_count_in_a_file_is_no_error() -> None:
    state = CenterPoint(**TINY).state_dict()
    given = {"global_step": torch.zeros(1, dtype=torch.int64), **state}
    CenterPoint(**TINY).load_state_dict(given)
    assert "global_step" in given
    wrapped = nn.ModuleDict({"model": CenterPoint(**TINY)})
    wrapped.load_state_dict({f"model.{name}": value for name, value in given.items()})
    with pytest.raises(RuntimeError, match="other"):
        CenterPoint(**TINY).load_state_dict({"other": torch.zeros(1), **state})


def test_initialisation_follows_the_publication() -> None:
    torch.manual_seed(0)
    head = CenterPoint().dense_head.heads_list[1]
    assert torch.equal(head.hm[1].bias, torch.full((2,), HEATMAP_PRIOR))
    assert head.hm[0][0].bias.abs().max() > 0
    for name in ("center", "center_z", "dim", "rot", "vel"):
        branch = head.get_submodule(name)
        assert branch[0][0].bias.abs().max() == 0
        assert branch[1].bias.abs().max() == 0
        assert branch[0][0].weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("kind", [SubMConv3d, SparseConv3d, nn.Conv2d, nn.ConvTranspose2d])
def test_batchnorm_directly_follows_its_convolution(kind: type[nn.Module]) -> None:
    """Folding walks the registration order."""
    pairs = 0
    for parent in CenterPoint(**TINY).modules():
        for child, following in itertools.pairwise(parent.children()):
            if isinstance(child, kind):
                assert isinstance(following, (nn.BatchNorm1d, nn.BatchNorm2d))
                pairs += 1
    assert pairs > 0


def test_convolution_counts() -> None:
    modules = list(CenterPoint().modules())
    assert sum(isinstance(module, (SubMConv3d, SparseConv3d)) for module in modules) == 21
    assert sum(isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) for module in modules) == 87


def test_one_tensor_object_reaches_all_branches_and_the_residual_add() -> None:
    model = CenterPoint(**{**TINY, "class_groups": CLASS_GROUPS}).eval()
    seen: list[int] = []
    for head in model.dense_head.heads_list:
        for name in head.branches:
            head.get_submodule(f"{name}.0.0").register_forward_pre_hook(lambda _m, x: seen.append(id(x[0])))
    block = model.backbone_3d.conv1[0]
    inputs: dict[str, int] = {}
    block.conv1.register_forward_pre_hook(lambda _m, x: inputs.update(conv=id(x[0].features)))
    block.quant_add.register_forward_pre_hook(lambda _m, x: inputs.update(add=id(x[1])))
    model(*random_voxels(model.config))
    assert len(seen) == 36
    assert len(set(seen)) == 1
    assert inputs["conv"] == inputs["add"]


@pytest.mark.parametrize(("upsample_strides", "stride"), [((1, 2), 8), ((2, 4), 4)])
def test_narrow_network_trains(upsample_strides: tuple[int, int], stride: int) -> None:
    model = CenterPoint(**TINY, upsample_strides=upsample_strides, backbone_bn_momentum=0.1)
    geometry = model.geometry
    assert (geometry.stride, geometry.width, geometry.height) == (stride, 128 // stride, 64 // stride)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    inputs = random_voxels(model.config)
    gt_boxes = torch.zeros(2, 3, 10)
    gt_boxes[0, 0] = torch.tensor([1.0, 2.0, 0.0, 4.0, 2.0, 1.5, 0.3, 1.0, 0.0, 1.0])
    gt_boxes[1, 0] = torch.tensor([-4.0, 1.0, 0.0, 1.0, 1.0, 1.5, -2.0, 0.0, 0.0, 8.0])
    targets = assign_targets(gt_boxes, model.config)
    history = []
    for _ in range(8):
        loss = center_loss(model(*inputs), targets)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.6 * history[0]
    heads = model.eval()(*inputs)
    for head, group in zip(heads, GROUPS, strict=True):
        assert head["hm"].shape == (2, len(group), geometry.height, geometry.width)
    assert len(decode(heads, model.config, PostProcessing())) == 2


def test_a_training_step_under_autocast() -> None:
    model = CenterPoint(**TINY)
    targets = assign_targets(torch.zeros(2, 1, 10), model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heads = model(*random_voxels(model.config))
        loss = center_loss(heads, targets)["loss"]
    assert heads[0]["hm"].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    grads = [parameter.grad for parameter in model.backbone_3d.parameters()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)


def test_other_class_groups() -> None:
    groups = (("pedestrian", "car"), ("bus",))
    model = CenterPoint(**{**TINY, "class_groups": groups})
    assert [head["hm"].shape[1] for head in model.eval()(*random_voxels(model.config))] == [2, 1]


def test_a_sample_without_voxels_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    model = CenterPoint(**TINY).eval()
    features, coords, _ = random_voxels(model.config, batch_size=1)
    alone = model(features, coords, 1)
    coords[:, 0] = 1
    between = model(features, coords, 3)
    for one, three in zip(alone, between, strict=True):
        for name in one:
            assert three[name].shape[0] == 3
            torch.testing.assert_close(three[name][1], one[name][0], rtol=1e-4, atol=1e-5)


def test_no_voxels_at_all() -> None:
    model = CenterPoint(**TINY).eval()
    heads = model(torch.zeros(0, 5), torch.zeros((0, 4), dtype=torch.int32), 2)
    assert heads[0]["hm"].shape == (2, 1, 8, 16)
    assert bool(heads[0]["hm"].isfinite().all())
    model.train()(torch.zeros(0, 5), torch.zeros((0, 4), dtype=torch.int32), 2)


def test_train_and_eval_take_one_path_through_the_sparse_backbone() -> None:
    """BatchNorm apart, which is held in eval: biased sparse convolutions on the CPU give the same bits."""
    model = CenterPoint(**TINY)
    inputs = random_voxels(model.config)
    results = []
    for training in (True, False):
        model.train(training)
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.eval()
        results.append(model.backbone_3d(*inputs).features)
    assert torch.equal(*results)


def test_stage_one_shares_one_rulebook() -> None:
    model = CenterPoint(**TINY).eval()
    volume = model.backbone_3d(*random_voxels(model.config))
    expected = {"res1", "spconv2", "res2", "spconv3", "res3", "spconv4", "res4", "spconv_down2"}
    assert set(volume.indice_dict) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"voxel_size": (0.1, 0.3, 0.2)}, r"voxel_size 0.3 m along y"),
        ({"voxel_size": (0.1, 0.1)}, r"voxel_size .* expected 3 values"),
        ({"voxel_size": (0.1, 0.1, 0.4)}, r"20 voxels along z .* 24 or more"),
        ({"voxel_size": (0.0, 0.1, 0.2)}, r"voxel_size 0.0 m along x"),
        ({"point_cloud_range": (0, 0, -5, 10.4, 10.4, 3)}, r"104 voxels along x: expected a multiple of 16"),
        ({"upsample_strides": (1, 4)}, r"head strides \[4.0, 8.0\]"),
        ({"upsample_strides": (3, 6)}, r"head strides"),
        ({"upsample_channels": (8,)}, r"upsample_channels .* expected 2 values"),
        ({"class_groups": (("car",), ("car", "bus"))}, r"no class in two"),
        ({"class_groups": (("car",), ())}, r"non-empty groups"),
        ({"class_groups": (("tram",),)}, r"names tram: accepted are car"),
        ({"class_names": ("tram", "bus")}, r"class_groups names barrier, .*: accepted are tram, bus$"),
        ({"class_names": ("car", "bus", "car")}, r"class_names is \('car', 'bus', 'car'\): .* none twice"),
        ({"class_names": ("car", "")}, r"class_names is \('car', ''\): .* none empty"),
        ({"class_names": ()}, r"class_names is \(\): expected one name or more"),
        ({"width": 3}, r"unknown network field width"),
    ],
)
def test_mistakes_name_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CenterPoint(**fields)


def test_configuration_takes_lists_and_fields_override_it() -> None:
    network = NetworkConfig(voxel_size=[0.2, 0.2, 0.2], class_groups=[["car"]])  # type: ignore[arg-type]
    assert network.class_groups == (("car",),)
    assert network.grid_size == (512, 512, 40)
    assert CenterPoint(config(), **TINY).config == NetworkConfig(**TINY)


def test_class_ids_index_the_class_names() -> None:
    assert NetworkConfig().class_names == DETECTION_CLASSES
    assert NetworkConfig().class_ids == [[0], [1, 2], [3, 4], [5], [6, 7], [8, 9]]
    trams = NetworkConfig(class_names=["bus", "tram", "car"], class_groups=[["car", "bus"], ["tram"]])  # type: ignore[arg-type]
    assert trams.class_ids == [[2, 0], [1]]


def test_fields_of_checkpoints_without_class_names() -> None:
    fields = {name: value for name, value in asdict(NetworkConfig()).items() if name != "class_names"}
    assert NetworkConfig(**fields) == NetworkConfig()


def test_the_075_grid() -> None:
    network = NetworkConfig(voxel_size=(0.075, 0.075, 0.2), point_cloud_range=(-54, -54, -5, 54, 54, 3))
    assert network.grid_size == (1440, 1440, 40)
    assert (network.geometry.width, network.geometry.height, network.geometry.stride) == (180, 180, 8)


@pytest.mark.cuda
def test_cuda_equals_cpu() -> None:
    torch.manual_seed(0)
    model = CenterPoint(**TINY).eval()
    features, coords, batch_size = random_voxels(model.config)
    with torch.no_grad():
        expected = model(features, coords, batch_size)
        actual = model.cuda()(features.cuda(), coords.cuda(), batch_size)
    for one, other in zip(actual, expected, strict=True):
        for name in other:
            torch.testing.assert_close(one[name].cpu(), other[name], rtol=1e-3, atol=1e-3)
