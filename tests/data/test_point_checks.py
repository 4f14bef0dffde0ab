"""Clouds that are read by a wrong format are refused, and no others."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_roots import FOUR, pcd, rewritten

from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.gt_database import build_gt_database
from cpq_train.data.index import open_index
from cpq_train.data.points.checks import check_cloud, check_files
from cpq_train.data.points.format import PointFormat
from cpq_train.data.points.layout import MIN_BYTES
from cpq_train.data.sweeps import CloudError

NAMES = ("x", "y", "z", "intensity", "ring", "f6", "f7", "f8")
WIDTHS = range(3, 9)
KINDS = [(width, dtype) for width in WIDTHS for dtype in ("float32", "float64")]
LEAST_COMMON = 840
"""Points whose bytes all widths divide."""


def of_width(width: int, dtype: str) -> PointFormat:
    return PointFormat(tuple(f"{name}:{dtype}" for name in NAMES[:width]))


def widened(points: np.ndarray) -> np.ndarray:
    """Eight columns: a time, noise, and a flag beside those of nuScenes."""
    rng = np.random.default_rng(0)
    further = (rng.uniform(0, 0.1, len(points)), rng.normal(0, 1, len(points)), np.arange(len(points)) % 2)
    return np.column_stack([points, *further]).astype(np.float32)


@pytest.fixture(scope="module")
def simulated_points(simulated_root: Path) -> np.ndarray:
    path = next((simulated_root / "samples/LIDAR_TOP").iterdir())
    return np.fromfile(path, np.float32).reshape(-1, 5)


@pytest.fixture(scope="module")
def real_clouds(realdata_dir: Path) -> list[Path]:
    return sorted(realdata_dir.glob("*/*/LIDAR_TOP/*.pcd.bin")) + sorted(realdata_dir.glob("lidar/*.pcd.bin"))


def refused(path: Path, points: PointFormat) -> str:
    try:
        check_cloud(path, points)
    except CloudError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("is_shuffled", [False, True])
@pytest.mark.parametrize(("width", "dtype"), KINDS)
def test_every_wrong_width_is_refused_and_the_true_one_is_not(
    simulated_points: np.ndarray, tmp_path: Path, width: int, dtype: str, is_shuffled: bool
) -> None:
    rows = np.arange(len(simulated_points))
    if is_shuffled:
        rows = np.random.default_rng(0).permutation(rows)
    rows = rows[: len(rows) // LEAST_COMMON * LEAST_COMMON]
    path = tmp_path / "a.bin"
    widened(simulated_points)[rows, :width].astype(dtype).tofile(path)
    found = {kind: refused(path, of_width(*kind)) for kind in KINDS}
    assert not found.pop((width, dtype))
    assert [kind for kind, message in found.items() if not message] == []
    usual = [message for message in found.values() if "truncated" not in message]
    assert all("would fit" in message for message in usual)
    named = {re.search(r"; data\.point_columns (\[.*?\])", message)[1] for message in usual}  # type: ignore[index]
    fits = [PointFormat(tuple(text[1:-1].split(", "))) for text in named]
    assert {fit.record.itemsize for fit in fits} == {width * int(dtype[5:]) // 8}


def test_real_clouds_are_accepted_as_what_they_are(real_clouds: list[Path], tmp_path: Path) -> None:
    assert len(real_clouds) == 4
    for cloud in real_clouds:
        check_cloud(cloud, PointFormat())
        points = widened(np.fromfile(cloud, np.float32).reshape(-1, 5))
        points = points[: len(points) // LEAST_COMMON * LEAST_COMMON]
        for width in WIDTHS:
            points[:, :width].tofile(tmp_path / "a.bin")
            accepted = [kind for kind in KINDS if not refused(tmp_path / "a.bin", of_width(*kind))]
            assert accepted == [(width, "float32")]


def _phased(points: np.ndarray) -> np.ndarray:
    """Beams that look down and up fire in turn, as those of a VLP-16."""
    low, high = points[points[:, 2] < -1.2], points[points[:, 2] > -1.2]
    number = min(len(low), len(high))
    return np.stack([low[:number], high[:number]], axis=1).reshape(-1, 5)


STRANGE: dict[str, Any] = {
    "as it is": lambda p: p,
    "one ring": lambda p: p[p[:, 4] == 10],
    "four rings": lambda p: p[p[:, 4] % 8 == 0],
    "two returns": lambda p: (
        np.repeat(p, 2, axis=0) + np.tile([[0.0] * 5, [0.01, 0.01, 0, 1, 0]], (len(p), 1))
    ),
    "sorted by x": lambda p: p[np.argsort(p[:, 0])],
    "sorted by ring": lambda p: p[np.argsort(p[:, 4], kind="stable")],
    "beams in turn": _phased,
    "no intensity": lambda p: p * [1, 1, 1, 0, 1],
    "whole centimetres": lambda p: np.c_[p[:, :3].round(2), p[:, 3:]],
    "a wall": lambda p: np.c_[np.full(len(p), 5.0), p[:, 1:]],
    "a few points": lambda p: p[:50],
    "one point": lambda p: p[:1],
    "odd points": lambda p: np.r_[p, np.repeat([[9e4, 0, 0, 999, -7]], len(p) // 100, axis=0)],
    "intensities with fractions": lambda p: p * [1, 1, 1, 0.917, 1],
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("width", [3, 4, 5, 6])
def test_unusual_clouds_are_accepted(
    simulated_points: np.ndarray, tmp_path: Path, name: str, width: int
) -> None:
    points = np.asarray(STRANGE[name](simulated_points), np.float32)
    widened(points)[:, :width].tofile(tmp_path / "a.bin")
    check_cloud(tmp_path / "a.bin", of_width(width, "float32"))


def test_columns_of_mixed_dtypes_are_accepted(simulated_points: np.ndarray, tmp_path: Path) -> None:
    points = PointFormat(("x", "y", "z", "intensity:uint8", "ring:uint16"))
    table = np.zeros(len(simulated_points), points.record)
    for name, column in zip(points.names, simulated_points.T, strict=True):
        table[name] = column
    table.tofile(tmp_path / "a.bin")
    assert table.nbytes > MIN_BYTES
    check_cloud(tmp_path / "a.bin", points)
    table.view(np.uint8)[: len(table) * 15 // 20 * 20].tofile(tmp_path / "a.bin")
    assert "holds points beyond 1000 m" in refused(tmp_path / "a.bin", PointFormat())


ODD: dict[str, tuple[Any, str]] = {
    "rings are times": (
        lambda p: p * [1, 1, 1, 1, 0.013],
        "holds rings that are no whole numbers from 0 to 255 (such as",
    ),
    "millimetres": (lambda p: p * [1000, 1000, 1000, 1, 1], "holds points beyond 1000 m, "),
    "one place": (lambda p: p * [0, 0, 0, 1, 1] + [1, 2, 3, 0, 0], "holds points that all lie at 1, 2, 3 m"),
    "0 to 1": (
        lambda p: p * [1, 1, 1, 1 / 255, 1],
        "holds no intensity above 1 where the network expects 0 to 255, read by data.point_columns "
        "[x, y, z, intensity, ring]; data.intensity_scale 255 would fit",
    ),
    "16 bits": (
        lambda p: p * [1, 1, 1, 257, 1],
        "data.intensity_scale 0.00389105 would fit",
    ),
    "negative": (lambda p: p * [1, 1, 1, -1, 1], "holds intensities outside 0 to 255 (such as -"),
    "half is nothing": (
        lambda p: np.where(np.arange(len(p))[:, None] % 2, np.nan, p),
        "holds NaN or infinite values in 50 % of its points, read by data.point_columns [x, y, z, intensity, "
        "ring]; data.drop_nonfinite_points true would leave such points out",
    ),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("ending", [".bin", ".pcd"])
def test_values_that_cannot_be_are_refused(
    simulated_points: np.ndarray, tmp_path: Path, name: str, ending: str
) -> None:
    change, words = ODD[name]
    points = np.asarray(change(simulated_points.astype(np.float64)), np.float32)
    path = tmp_path / f"a{ending}"
    path.write_bytes(points.tobytes() if ending == ".bin" else pcd(points, NAMES[:5]))
    assert words in refused(path, PointFormat())


@pytest.mark.parametrize("ending", [".bin", ".pcd"])
@pytest.mark.parametrize(("factor", "start"), [(1, 1.6e9), (1e6, 0), (1e9, 1.6e18)])
def test_times_that_are_no_lags_are_refused(
    simulated_points: np.ndarray, tmp_path: Path, ending: str, factor: float, start: float
) -> None:
    """What LiDARs call a timestamp: since 1970, or in other units than seconds."""
    times = np.linspace(-0.05, 0.05, len(simulated_points))
    names = (*FOUR, "time_lag")
    points, past = PointFormat(names), PointFormat((*FOUR, "_time_lag"))
    path = tmp_path / f"a{ending}"

    def write(lag_s: np.ndarray) -> None:
        table = np.column_stack([simulated_points[:, :4], lag_s]).astype(np.float32)
        path.write_bytes(table.tobytes() if ending == ".bin" else pcd(table, names))

    write(times)
    check_cloud(path, points)
    write(np.where(np.arange(len(times)) % 60, times, 1e9))  # single odd points are no error
    check_cloud(path, points)
    write(start + factor * times)
    message = refused(path, points)
    assert "holds time lags beyond 60 s (such as " in message
    assert (
        "seconds to the file's own time are expected (under a name that begins with _ a column is" in message
    )
    if ending == ".bin":
        assert message.endswith("; data.point_columns [x, y, z, intensity, _5] would fit")
        check_cloud(path, past)


def test_a_scale_is_part_of_what_would_fit(simulated_points: np.ndarray, tmp_path: Path) -> None:
    """KITTI's files: four columns, intensities from 0 to 1."""
    points = simulated_points[: len(simulated_points) // LEAST_COMMON * LEAST_COMMON, :4] * [1, 1, 1, 1 / 255]
    points.astype(np.float32).tofile(tmp_path / "a.bin")
    assert refused(tmp_path / "a.bin", PointFormat()).endswith(
        "; data.point_columns [x, y, z, intensity] with data.intensity_scale 255 would fit"
    )
    check_cloud(tmp_path / "a.bin", PointFormat(FOUR, 255.0))


@pytest.mark.parametrize("width", WIDTHS)
def test_bytes_of_other_columns_warn_of_nothing(
    simulated_points: np.ndarray, tmp_path: Path, width: int
) -> None:
    """Half of a float64 number, read as float32, may be a signaling NaN."""
    points = simulated_points[: len(simulated_points) // LEAST_COMMON * LEAST_COMMON]
    noise = np.random.default_rng(0).normal(0, 1e-3, (len(points), 8))
    (widened(points) + noise)[:, :width].tofile(tmp_path / "a.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [refused(tmp_path / "a.bin", of_width(other, "float32")) for other in WIDTHS]
    assert all(found)


def test_dropped_points_may_be_many_and_not_all(simulated_points: np.ndarray, tmp_path: Path) -> None:
    points = simulated_points.copy()
    points[100:, 2] = np.nan
    points[: len(points) // 3].tofile(tmp_path / "a.bin")
    drop = PointFormat(drop_nonfinite=True)
    assert "NaN" in refused(tmp_path / "a.bin", drop)
    points[:3000] = simulated_points[:3000]
    points[:9000].tofile(tmp_path / "a.bin")
    assert not refused(tmp_path / "a.bin", drop)


def test_a_root_of_other_columns_is_found_out_when_it_is_opened(simulated_root: Path, tmp_path: Path) -> None:
    root = rewritten(simulated_root, tmp_path / "root")
    for cloud in root.glob("s*/LIDAR_TOP/*"):  # every file is a multiple of 20 bytes, too
        with cloud.open("r+b") as file:
            file.truncate(cloud.stat().st_size // 80 * 80)
    words = (
        r"holds mixed columns in points of 20 bytes.*; data.point_columns \[x, y, z, intensity\] would fit"
    )
    with pytest.raises(CloudError, match=words):
        _ = NuScenesDataModule(str(root)).index
    with pytest.raises(CloudError, match=words):
        NuScenesDataModule(str(root)).prepare_data()
    with pytest.raises(CloudError, match=words):
        build_gt_database(root, num_workers=0)
    assert len(NuScenesDataModule(str(root), point_columns=FOUR).index)


def test_a_few_files_are_looked_at_and_absent_ones_passed_over(
    simulated_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = rewritten(simulated_root, tmp_path / "root", ("x", "y", "z", "intensity", "ring"))
    index = open_index(root, "v1.0-trainval")
    seen: list[Path] = []
    monkeypatch.setattr("cpq_train.data.points.checks.check_cloud", lambda path, *_: seen.append(path))
    check_files(index, PointFormat())
    assert len(set(seen)) == 3
    for cloud in root.glob("s*/LIDAR_TOP/*"):
        cloud.unlink()
    check_files(index, PointFormat())
    assert len(seen) == 3


def test_a_damaged_file_is_passed_over_where_some_may_be_bad(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"123")
    with pytest.raises(CloudError, match="truncated"):
        check_cloud(tmp_path / "a.bin", PointFormat())
    error = check_cloud(tmp_path / "a.bin", PointFormat(), skips_bad=True)
    assert "truncated" in str(error)
