"""Columns, dtypes and file types of clouds: what the network sees of them, counted by hand."""

import io
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_roots import FOUR, SIX, lzf, own_columns, pcd, rewritten, six_columns_in_pcd, write_npy
from own_roots import nuscenes_points as as_nuscenes

from cpq_train.common.errors import UserError
from cpq_train.data.clouds import synthetic_cloud
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.gt_database import build_gt_database, open_gt_database
from cpq_train.data.index import open_index
from cpq_train.data.points.format import PointFormat
from cpq_train.data.points.pcd import PcdError, parse_pcd, unpack_lzf
from cpq_train.data.settings import DataSettings
from cpq_train.data.sweeps import CloudError, load_sweeps, read_cloud, time_lag_s


def table(num_points: int = 7, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.uniform(-50, 50, (num_points, width)).astype(np.float32)
    values[:, 3] = rng.integers(0, 256, num_points)
    return values


@pytest.mark.parametrize(
    ("columns", "features"),
    [
        (("x", "y", "z", "intensity", "ring"), ("x", "y", "z", "intensity", "time_lag")),
        (("x", "y", "z"), ("x", "y", "z", "time_lag")),
        (SIX, ("x", "y", "z", "intensity", "elongation", "time_lag")),
        (
            ("time_lag", "_a", "intensity", "z", "own:int8", "x", "y"),
            ("x", "y", "z", "intensity", "own", "time_lag"),
        ),
    ],
)
def test_features_are_position_others_and_time_lag(
    columns: tuple[str, ...], features: tuple[str, ...]
) -> None:
    assert PointFormat(columns).features == features


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": ("x", "y")}, "[x, y] has no z: expected x, y, z and others, each once"),
        ({"columns": ("x", "y", "z", "x")}, "has x twice"),
        ({"columns": ("x", "y", "z:float128")}, "has z:float128: expected a dtype of float16, float32"),
        ({"columns": ("x", "y", "z", "a b")}, "names 'a b': expected name or name:dtype"),
        ({"columns": ("x", "y", "z", 4)}, "names 4: expected"),
        ({"columns": ("x", "y", "z", *(f"c{i}" for i in range(62)))}, "has 65"),
        ({"intensity_scale": 0.0}, "data.intensity_scale is 0.0: expected a number above 0"),
        ({"intensity_scale": float("nan")}, "data.intensity_scale is nan"),
        ({"columns": ("x", "y", "z"), "intensity_scale": 255.0}, "[x, y, z] has no intensity: expected 1"),
    ],
)
def test_columns_that_are_none_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        PointFormat(**settings)


def test_raw_columns_of_any_dtype_and_order(tmp_path: Path) -> None:
    record = np.dtype([("i", "<u2"), ("z", "<f8"), ("x", "<f4"), ("y", "<f2"), ("s", "u1"), ("t", "<i4")])
    points = np.zeros(3, record)
    points["x"], points["y"], points["z"] = [1.5, 2.5, 3.5], [-1, -2, 0.5], [0.25, 1e-3, 2]
    points["i"], points["s"], points["t"] = [0, 4095, 100], [9, 8, 7], [-2, 0, 3]
    points.tofile(tmp_path / "a.bin")
    columns = ("intensity:uint16", "z:float64", "x", "y:float16", "_skipped:uint8", "own:int32")
    found = read_cloud(tmp_path / "a.bin", points=PointFormat(columns, 255 / 4095))
    expected = [
        [1.5, -1, 0.25, 0, -2, 0],
        [2.5, -2, np.float32(1e-3), 255, 0, 0],
        [3.5, 0.5, 2, np.float32(100) * np.float32(255 / 4095), 3, 0],
    ]
    np.testing.assert_array_equal(found, np.float32(expected))
    assert found.dtype == np.float32


def test_the_default_has_the_bits_of_nuscenes_files(simulated_root: Path) -> None:
    path = next((simulated_root / "samples/LIDAR_TOP").iterdir())
    expected = np.fromfile(path, np.float32).reshape(-1, 5)
    expected[:, 4] = 0
    np.testing.assert_array_equal(read_cloud(path), expected)
    same = PointFormat(("x:float32", "y", "z", "intensity", "ring"))
    np.testing.assert_array_equal(read_cloud(path, points=same), expected)


@pytest.mark.parametrize("data", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize("ending", [".pcd", ".PCD"])
def test_pcd_files_hold_what_raw_ones_do(tmp_path: Path, data: str, ending: str) -> None:
    values = table(500)
    (tmp_path / f"a{ending}").write_bytes(pcd(values, SIX, data))
    found = read_cloud(tmp_path / f"a{ending}", points=PointFormat(SIX))
    np.testing.assert_array_equal(found, np.c_[values[:, :4], values[:, 5], np.zeros(500)].astype(np.float32))


def test_pcd_with_padding_and_other_types(tmp_path: Path) -> None:
    """As ROS writes clouds: fields of several types, gaps between them."""
    record = np.dtype(
        [("x", "<f4"), ("y", "<f4"), ("z", "<f8"), ("_", "u1", 4), ("i", "<u2"), ("r", "i1"), ("__", "u1", 9)]
    )
    points = np.zeros(5, record)
    points["x"], points["z"], points["i"], points["r"] = np.arange(5), 2, [0, 1, 2, 254, 255], 3
    header = (
        "VERSION .7\nFIELDS x y z _ intensity ring _\nSIZE 4 4 8 1 2 1 1\nTYPE F F F U U I U\n"
        "COUNT 1 1 1 4 1 1 9\nWIDTH 5\nHEIGHT 1\nPOINTS 5\nDATA binary\n"
    )
    (tmp_path / "a.pcd").write_bytes(header.encode() + points.tobytes())
    found = read_cloud(tmp_path / "a.pcd")
    np.testing.assert_array_equal(found[:, [0, 2, 3]], np.c_[np.arange(5), [2] * 5, [0, 1, 2, 254, 255]])
    assert not found[:, 4].any()


def test_npy_files_of_numbers_and_of_records(tmp_path: Path) -> None:
    values = table(50, 4)
    expected = np.c_[values, np.zeros(50)].astype(np.float32)
    four = PointFormat(FOUR)
    for number, array in enumerate([values, np.asfortranarray(values), values.astype(np.float64)]):
        np.save(tmp_path / f"{number}.npy", array)
        np.testing.assert_array_equal(read_cloud(tmp_path / f"{number}.npy", points=four), expected)
    records = np.zeros(50, [("x", "f4"), ("y", ">f4"), ("z", "f8"), ("i", "u1")])
    for name, column in zip("xyzi", values.T, strict=True):
        records[name] = column
    np.save(tmp_path / "records.npy", records)
    np.testing.assert_array_equal(read_cloud(tmp_path / "records.npy", points=four), expected)


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "npy of five columns": (".npy", npy(table(9, 5)), "has 5 columns; data.point_columns is [x, y, z, inten"),
    "npy of a row": (".npy", npy(np.zeros(4)), "shape (4,) and dtype float64; accepted: (points, columns)"),
    "npy of texts": (".npy", npy(np.array([["a"] * 4])), "accepted: (points, columns) of numbers"),
    "npy of objects": (".npy", npy(np.array([[{}] * 4]), allow_pickle=True), "shape (1, 4) and dtype '|O'"),
    "npy that is cut": (".npy", npy(table(9, 4))[:-1], "needs 144 bytes and holds 143"),
    "npy without points": (".npy", npy(np.zeros((0, 4))), "is empty: no points"),
    "no npy": (".npy", b"\0" * 64, "is not a readable .npy array"),
    "records in another order": (
        ".npy",
        npy(np.zeros(3, [("y", "f4"), ("x", "f4"), ("z", "f4"), ("i", "f4")])),
        "has [y, x, z, i]; data.point_columns is [x, y, z, intensity]: expected the same",
    ),
    "pcd of other fields": (
        ".pcd",
        pcd(table(9, 4), ("x", "y", "intensity", "z")),
        "has [x, y, intensity, z]; data.point_columns is [x, y, z, intensity]",
    ),
    "pcd of five": (".pcd", pcd(table(9, 5), "xyzit"), "has [x, y, z, i, t]; data.point_columns"),
    "no pcd": (".pcd", b"\0" * 64, "has no header that ends with DATA"),
    "pcd that is cut": (
        ".pcd",
        pcd(table(9, 4), FOUR)[:-1],
        "it is truncated: 143 bytes of points; accepted: 144",
    ),
    "pcd without points": (".pcd", pcd(table(0, 4), FOUR), "is empty: no points"),
    "ascii that is cut": (".pcd", pcd(table(9, 4), FOUR, "ascii").rpartition(b" ")[0], "it holds 35 numbers"),
    "ascii of words": (".pcd", pcd(table(1, 4), FOUR, "ascii") + b"a", "it holds what is no number"),
    "lzf that is cut": (".pcd", pcd(table(99, 4), FOUR, "binary_compressed")[:-1], "its points are"),
    "lzf of garbage": (
        ".pcd",
        pcd(table(99, 4), FOUR, "binary_compressed", lambda raw: b"\xff" * 999),
        "its packed points are damaged: they point before their start",
    ),
    "another DATA": (".pcd", pcd(table(9, 4), FOUR).replace(b"DATA binary", b"DATA zip"), "DATA is 'zip'"),
    "raw bytes": (
        ".bin",
        b"\0" * 60,
        "is truncated: 60 bytes, expected a multiple of 16, or has other columns than data.point_columns "
        "[x, y, z, intensity]; 3, 5 columns of float32 would divide it",
    ),
    "nothing": (".bin", b"", "is empty: 0 bytes"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_of_other_columns_are_refused(tmp_path: Path, name: str) -> None:
    ending, content, words = BAD_FILES[name]
    (tmp_path / f"a{ending}").write_bytes(content)
    with pytest.raises(CloudError, match=re.escape(words)):
        read_cloud(tmp_path / f"a{ending}", points=PointFormat(FOUR))


HEADER = (
    "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 1\nHEIGHT 1\nPOINTS 1\nDATA binary\n"
    + "\0" * 12
)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("SIZE 4 4 4\n", "", "its header has no SIZE"),
        ("SIZE 4 4 4", "SIZE 4 4", "name different numbers of fields"),
        ("SIZE 4 4 4", "SIZE 4 4 2", "is of TYPE F and SIZE 2"),
        ("TYPE F F F", "TYPE F F X", "is of TYPE X and SIZE 4"),
        ("COUNT 1 1 1", "COUNT 1 1 3", "field 'z' has 3 values a point"),
        ("COUNT 1 1 1", "COUNT 1 1 0", "field 'z' has 0 values a point"),
        ("COUNT 1 1 1", "COUNT 1 1 -1", "COUNT of its header is '-1'"),
        ("FIELDS x y z", "FIELDS x y y", "comes twice"),
        ("POINTS 1", "POINTS 999999999999", "POINTS is 999999999999, WIDTH x HEIGHT 1 x 1"),
        ("WIDTH 1", "WIDTH 1e3", "WIDTH of its header is '1e3'"),
    ],
)
def test_pcd_headers_that_are_none(old: str, new: str, words: str) -> None:
    assert len(parse_pcd(HEADER.encode())["x"]) == 1
    with pytest.raises(PcdError, match=re.escape(words)):
        parse_pcd(HEADER.replace(old, new).encode())


def test_a_pcd_header_that_promises_much_allocates_nothing() -> None:
    header = HEADER.replace("WIDTH 1", "WIDTH 99999999999").replace("POINTS 1", "POINTS 99999999999")
    for data in ("binary", "ascii", "binary_compressed"):
        with pytest.raises(PcdError):
            parse_pcd(header.replace("DATA binary", f"DATA {data}").encode())


def test_lzf_of_made_up_bytes() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 3, 5000), rng.integers(0, 256, 700), np.zeros(9000), np.arange(90)):
        raw = values.astype(np.uint8).tobytes()
        packed = lzf(raw)
        assert unpack_lzf(packed, len(raw)) == raw
        for wrong in (len(raw) - 1, len(raw) + 1):
            with pytest.raises(PcdError, match="damaged"):
                unpack_lzf(packed, wrong)
    with pytest.raises(PcdError, match="end within a run"):
        unpack_lzf(b"\x00a\xe0", 9)


def test_damaged_pcd_files_raise_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for data in ("ascii", "binary", "binary_compressed"):
        whole = pcd(table(40), SIX, data)
        for _ in range(300):
            content = bytearray(whole)
            for at in rng.integers(0, len(content), 3):
                content[at] = rng.integers(0, 256)
            with suppress(PcdError):
                parse_pcd(bytes(content[: rng.integers(1, len(content) + 1)]))


@pytest.mark.parametrize("ending", [".bin", ".npy"])
def test_sweeps_of_four_columns_are_those_of_five(simulated_root: Path, tmp_path: Path, ending: str) -> None:
    write = {".bin": {}, ".npy": {"write": write_npy}}[ending]
    root = rewritten(simulated_root, tmp_path / "root", FOUR, ending, **write)
    index, own = (open_index(one, "v1.0-trainval", tmp_path / "cache") for one in (simulated_root, root))
    row = int(index.sample_rows("val")[1])
    expected = load_sweeps(index, row, 4)
    found = load_sweeps(own, row, 4, PointFormat(FOUR))
    np.testing.assert_array_equal(found, expected)
    assert found.flags.f_contiguous
    bare = load_sweeps(own, row, 4, PointFormat(("x", "y", "z", "_intensity")))
    np.testing.assert_array_equal(bare, expected[:, [0, 1, 2, 4]])


def test_own_time_lags_are_added(simulated_root: Path, tmp_path: Path) -> None:
    columns = ("x", "y", "z", "intensity", "time_lag")
    root = tmp_path / "root"

    def change(points: np.ndarray) -> np.ndarray:
        points[:, 4] = 0.125
        return points

    rewritten(simulated_root, root, ("x", "y", "z", "intensity", "ring"), change=change)
    index = open_index(root, "v1.0-trainval", tmp_path / "cache")
    row = int(index.sample_rows("val")[1])
    found = load_sweeps(index, row, 2, PointFormat(columns))
    previous = int(index.frame_previous[index.sample_frames[row]])
    lag = np.float32(0.125) + np.float32(time_lag_s(index, row, previous))
    np.testing.assert_array_equal(np.unique(found[:, 4]), [np.float32(0.125), lag])


def test_points_that_are_not_finite_may_be_dropped(tmp_path: Path) -> None:
    points = table(10, 5)
    points[:, 4] = 1
    points[3, 1], points[7, 3] = np.nan, np.inf
    points.tofile(tmp_path / "a.bin")
    with pytest.raises(CloudError, match=r"in 2 of 10 points, first in point 3: .*drop_nonfinite_points"):
        read_cloud(tmp_path / "a.bin")
    left = np.delete(points, [3, 7], axis=0)[:, :4]
    found = read_cloud(tmp_path / "a.bin", points=PointFormat(drop_nonfinite=True))
    np.testing.assert_array_equal(found, np.c_[left, np.zeros(8)].astype(np.float32))
    six = PointFormat(("x", "y", "z", "intensity", "own"), drop_nonfinite=True)
    assert read_cloud(tmp_path / "a.bin", points=six).shape == (8, 6)
    past = PointFormat(("x", "_y", "z", "_i", "y"))
    assert len(read_cloud(tmp_path / "a.bin", points=past)) == 10  # what is read past may be anything


def test_numbers_beyond_float32_are_not_finite(tmp_path: Path) -> None:
    np.array([[1, 2, 3], [1e300, 2, 3]]).tofile(tmp_path / "a.bin")
    points = PointFormat(("x:float64", "y:float64", "z:float64"))
    with pytest.raises(CloudError, match="in 1 of 2 points, first in point 1"):
        read_cloud(tmp_path / "a.bin", points=points)


def test_batches_of_other_features(simulated_root: Path, tmp_path: Path) -> None:
    """Four columns give the voxels of five; six give one feature more."""
    five = NuScenesDataModule(str(simulated_root), num_sweeps=2, num_workers=0, cache_dir=str(tmp_path))
    four_root = rewritten(simulated_root, tmp_path / "four")
    four = NuScenesDataModule(str(four_root), num_sweeps=2, num_workers=0, point_columns=FOUR)
    six_root = six_columns_in_pcd(simulated_root, tmp_path / "six")
    six = NuScenesDataModule(str(six_root), num_sweeps=2, num_workers=0, point_columns=SIX)
    for loader in ("train_dataloader", "evaluation_dataloader", "calibration_dataloader"):
        for data in (five, four, six):
            data.num_calibration_samples = 2
        of_five, of_four, of_six = (next(iter(getattr(data, loader)())) for data in (five, four, six))
        assert of_five.keys() == of_four.keys()
        for name in ("voxel_features", "voxel_coords", "gt_boxes"):
            assert of_five[name].equal(of_four[name]), (loader, name)
        assert of_six["voxel_features"].shape == (len(of_five["voxel_features"]), 6)
        assert of_six["voxel_features"][:, [0, 1, 2, 3, 5]].equal(of_five["voxel_features"])
        assert of_six["voxel_features"][:, 4].gt(0).any()


def test_gt_databases_of_other_columns_are_others(simulated_root: Path, tmp_path: Path) -> None:
    root = rewritten(simulated_root, tmp_path / "root", ("x", "y", "z"))
    cache, three = tmp_path / "cache", PointFormat(("x", "y", "z"))
    build_gt_database(root, num_sweeps=2, num_workers=0, cache_dir=cache, point_columns=("x", "y", "z"))
    index = open_index(root, "v1.0-trainval", cache)
    database = open_gt_database(index, "train", 2, cache, three)
    assert database.points.shape[1] == 4
    build_gt_database(simulated_root, num_sweeps=2, num_workers=0, cache_dir=cache)
    usual = open_gt_database(open_index(simulated_root, "v1.0-trainval", cache), "train", 2, cache)
    for row in range(len(usual)):
        np.testing.assert_array_equal(database.points_of(row), usual.points_of(row)[:, [0, 1, 2, 4]])
    with pytest.raises(
        UserError, match=r"--num_sweeps 2 --cache_dir \S+ --point_columns '\[x, y, z, intensity\]'"
    ):
        open_gt_database(index, "train", 2, cache, PointFormat(FOUR))
    with pytest.raises(UserError, match=r"--intensity_scale 255\.0"):
        open_gt_database(index, "train", 2, cache, PointFormat(FOUR, 255.0))


def test_settings_of_checkpoints_hold_the_columns() -> None:
    old = {
        name: value
        for name, value in DataSettings().to_dict().items()
        if name not in ("point_columns", "intensity_scale")
    }
    assert DataSettings.of({"data": old}, "a.ckpt") == DataSettings()
    new = {**old, "point_columns": ["x", "y", "z", "intensity:uint8"], "intensity_scale": 2}
    found = DataSettings.of({"data": new}, "a.ckpt")
    assert found is not None
    assert found.points.features == ("x", "y", "z", "intensity", "time_lag")
    assert found.to_dict()["point_columns"] == ("x", "y", "z", "intensity:uint8")
    for name, value in (("point_columns", "xyz"), ("point_columns", ["x", "y"]), ("intensity_scale", "1")):
        with pytest.raises(UserError, match=rf"'a\.ckpt', data.*{name}"):
            DataSettings.of({"data": {**new, name: value}}, "a.ckpt")


def test_made_up_clouds_have_the_features() -> None:
    cloud = synthetic_cloud(2, 0)
    own = synthetic_cloud(2, 0, PointFormat(("x", "y", "z", "own", "intensity")))
    assert own.shape[1] == 6
    assert 0 <= own[:, 3].min() < own[:, 3].max() <= 1 < own[:, 4].max()
    np.testing.assert_array_equal(cloud[:1085, :3], own[:1085, :3])


def test_own_columns_of_the_helper(simulated_root: Path) -> None:
    points = as_nuscenes(next((simulated_root / "samples/LIDAR_TOP").iterdir()))
    np.testing.assert_array_equal(own_columns(points, SIX)[:, :5], points)
