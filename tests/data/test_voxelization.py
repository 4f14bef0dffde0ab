from pathlib import Path

import numpy as np
import pytest
import torch

from cpq_train.common.errors import UserError
from cpq_train.data.voxelization import Voxelizer, grid_cells

SIZE = (0.1, 0.1, 0.2)
RANGE = (-12.8, -12.8, -5.0, 12.8, 12.8, 3.0)


@pytest.fixture
def golden(golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "golden_voxelize.npz"))


def means_of(voxels: np.ndarray, num_points: np.ndarray) -> np.ndarray:
    """OpenPCDet's MeanVFE of (V, T, 5) slots, those behind a voxel's last point zero."""
    return (torch.from_numpy(voxels).sum(1) / torch.from_numpy(num_points)[:, None].float()).numpy()


@pytest.mark.parametrize("sample", [0, 1])
def test_voxels_equal_golden(golden: dict[str, np.ndarray], golden_dir: Path, sample: int) -> None:
    evaluation = np.load(golden_dir / "golden_eval.npz")
    is_sample = evaluation["voxel_coords_bzyx"][:, 0] == sample
    points = golden[f"raw_points_{sample}"][golden[f"range_mask_{sample}"]]
    features, cells, num_points = Voxelizer(SIZE, RANGE, 10, 20000)(points)
    np.testing.assert_array_equal(cells.numpy(), golden[f"coords_zyx_{sample}"])
    np.testing.assert_array_equal(num_points.numpy(), golden[f"num_points_{sample}"])
    np.testing.assert_array_equal(features.numpy(), evaluation["voxel_features_mean"][is_sample])


@pytest.mark.parametrize("sample", [0, 1])
def test_points_out_of_range_need_no_mask(golden: dict[str, np.ndarray], sample: int) -> None:
    """OpenPCDet masks points by x and y before; the grid does the same."""
    voxelizer = Voxelizer(SIZE, RANGE, 10, 20000)
    points, is_inside = golden[f"raw_points_{sample}"], golden[f"range_mask_{sample}"]
    assert not is_inside.all()
    for masked, unmasked in zip(voxelizer(points[is_inside]), voxelizer(points), strict=True):
        assert torch.equal(masked, unmasked)


@pytest.mark.parametrize("sample", [0, 1])
def test_limits_equal_golden(golden: dict[str, np.ndarray], sample: int) -> None:
    points = golden[f"raw_points_{sample}"][golden[f"range_mask_{sample}"]]
    features, cells, num_points = Voxelizer(SIZE, RANGE, 3, 500)(points)
    np.testing.assert_array_equal(cells.numpy(), golden[f"lim_coords_zyx_{sample}"])
    np.testing.assert_array_equal(num_points.numpy(), golden[f"lim_num_points_{sample}"])
    means = means_of(golden[f"lim_voxels_{sample}"], golden[f"lim_num_points_{sample}"])
    np.testing.assert_array_equal(features.numpy(), means)


def test_boundary_points_equal_golden(golden: dict[str, np.ndarray]) -> None:
    points = golden["edge_points"][golden["edge_range_mask"]]
    features, cells, num_points = Voxelizer(SIZE, RANGE, 2, 100)(points)
    np.testing.assert_array_equal(cells.numpy(), golden["edge_coords_zyx"])
    np.testing.assert_array_equal(num_points.numpy(), golden["edge_num_points"])
    np.testing.assert_array_equal(
        features.numpy(), means_of(golden["edge_voxels"], golden["edge_num_points"])
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limits", [(10, 60000), (3, 700)])
@pytest.mark.parametrize(
    ("size", "extent"),
    [((0.1, 0.1, 0.2), RANGE), ((0.075, 0.075, 0.2), (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0))],
)
def test_equals_spconv_on_grid_aligned_points(
    size: tuple[float, float, float], extent: tuple[float, ...], limits: tuple[int, int]
) -> None:
    """Points on the faces of cells fall where float32 division puts them, not exact arithmetic."""
    from spconv.pytorch.utils import PointToVoxel

    rng = np.random.default_rng(1)
    low, high = np.array(extent[:3]), np.array(extent[3:])
    points = rng.normal(0, 1, (20000, 5)).astype(np.float32)
    steps = rng.integers(-3, np.round((high - low) / size / 8) + 4, (20000, 3))
    points[:, :3] = low + steps * np.array(size)
    points[:40, :3] = high
    order = rng.permutation(len(points))
    shuffled = torch.from_numpy(points[order])
    voxels, cells, num_points = PointToVoxel(list(size), list(extent), 5, limits[1], limits[0])(shuffled)
    theirs = torch.from_numpy(means_of(voxels.numpy(), num_points.numpy())), cells, num_points
    for layout in (points, np.asfortranarray(points)):
        for our, their in zip(Voxelizer(size, extent, *limits)(layout, order), theirs, strict=True):
            assert our.dtype == their.dtype
            assert torch.equal(our, their)


@pytest.mark.parametrize("points", [np.zeros((0, 5), np.float32), np.full((4, 5), 99, np.float32)])
def test_no_point_in_the_grid(points: np.ndarray) -> None:
    features, cells, num_points = Voxelizer(SIZE, RANGE, 10, 100)(points)
    assert features.shape == (0, 5)
    assert cells.shape == (0, 3)
    assert num_points.shape == (0,)


def test_grids() -> None:
    assert grid_cells(SIZE, RANGE) == (256, 256, 40)
    assert grid_cells((0.075, 0.075, 0.2), (-54, -54, -5, 54, 54, 3)) == (1440, 1440, 40)
    with pytest.raises(UserError, match=r"in y is 98\.4615 voxels of 0\.26 m: expected a whole number"):
        grid_cells((0.1, 0.26, 0.2), RANGE)
    with pytest.raises(UserError, match="in x is 0 voxels"):
        grid_cells((0.0, 0.1, 0.2), RANGE)
    with pytest.raises(UserError, match="expected 3 and 6 numbers"):
        grid_cells((0.1, 0.1), RANGE)
    with pytest.raises(UserError, match=r"expected fewer than 2\^31"):
        grid_cells((0.001, 0.001, 0.2), RANGE)
    with pytest.raises(UserError, match="max_num_voxels is 0"):
        Voxelizer(SIZE, RANGE, 10, 0)
