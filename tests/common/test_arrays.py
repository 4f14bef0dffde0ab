"""Archives of arrays: what is cut, forged or too large is refused before anything is allocated."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpq_train.common.arrays import Column, check_columns, check_values, read_npz
from cpq_train.common.errors import UserError


def header(shape: Any, descr: str = "<f8", version: bytes = b"\x01\x00", order: bool = False) -> bytes:
    said = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    said += b" " * (-(len(said) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(said).to_bytes(2, "little") + said


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_round_trip(save: Any, tmp_path: Path) -> None:
    arrays = {
        "floats": np.random.default_rng(0).random((3, 4)),
        "whole": np.arange(5, dtype=np.int8),
        "texts": np.array(["", "é", "a longer one"]),
        "none": np.zeros((0, 9), np.float32),
        "text": np.array("token"),
        "number": np.array(1),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "bytes": np.array([b"a", b"bc"]),
    }
    save(tmp_path / "a.npz", **arrays)
    read = read_npz(tmp_path / "a.npz", "archive")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header((2**40,)), r"needs 8796093022208 bytes and holds 0"),
        (header((2**40,)) + bytes(64), r"needs 8796093022208 bytes and holds 64"),
        (header((10**30, 10**30)), "needs 8000000"),
        (header((0, 10**30)), "readable"),
        (header((-1,)) + bytes(8), "lengths from 0 on"),
        (header((3,)) + bytes(16), "needs 24 bytes and holds 16"),
        (header((1,)) + bytes(16), "needs 8 bytes and holds 16"),
        (header((2**40,), "<U0"), "lengths from 0 on"),
        (header((1,), "|O") + bytes(8), "numbers, flags or texts"),
        (header((1,), "<U500000000"), "needs 2000000000 bytes"),
        (header((1,), "<U2000000000"), "lengths from 0 on"),
        (header((1,), "<U1") + b"\xff\xff\xff\x7f", "texts that are none"),
        (header("((" * 3000), "readable header"),
        (header("(" * 9000 + ")" * 9000)[:20000], "readable"),
        (header((1,), version=b"\x09\x00") + bytes(8), "version"),
        (b"", "readable"),
        (b"PK", "readable"),
        (b"\x93NUMPY\x01\x00\xff\xff", "readable"),
    ],
)
def test_arrays_that_are_not_what_they_say(content: bytes, message: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", x=content)
    with pytest.raises(UserError, match=message) as error:
        read_npz(path, "archive")
    assert str(error.value).startswith(f"archive {str(path)!r} is not a readable .npz archive: ")
    assert "\n" not in str(error.value)


def test_bombs_are_not_unpacked(tmp_path: Path) -> None:
    content = header((2**27,), "|i1") + bytes(2**27)
    path = archive(tmp_path / "a.npz", x=content)
    assert path.stat().st_size < 2**18
    with pytest.raises(UserError, match="unpacks to 134217856 bytes; accepted: 67108864 for a file of"):
        read_npz(path, "archive")


def test_a_name_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("x.npy", header((1,)) + bytes(8))
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("x.npy", header((1,)) + bytes(8))
    with pytest.raises(UserError, match="each name once"):
        read_npz(tmp_path / "a.npz", "archive")


def test_what_is_said_of_a_long_name_is_short(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", **{"x" * 9000: header((1,)) + bytes(8)})
    path.write_bytes(path.read_bytes().replace(b"xxx", b"yxx", 1))
    with pytest.raises(UserError, match=r"differ|in header|File name") as error:
        read_npz(path, "archive")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_to_pack(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as file:
        file.writestr("x.npy", header((1,)) + bytes(8))
    with pytest.raises(UserError, match="packed otherwise"):
        read_npz(tmp_path / "a.npz", "archive")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_flipped_byte_and_any_cut(save: Any, tmp_path: Path) -> None:
    """It is refused, or the numbers are the same: names and dates of an archive have no checksum."""
    path, expected = tmp_path / "a.npz", np.arange(40.0)
    save(path, x=expected)
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x41
        path.write_bytes(changed)
        _read_alike(path, expected)
        path.write_bytes(whole[:place])
        _read_alike(path, expected)


def _read_alike(path: Path, expected: np.ndarray[Any, Any]) -> None:
    try:
        read = read_npz(path, "archive")
    except UserError:
        return
    assert [array.tolist() for array in read.values()] in ([expected.tolist()], [])


def test_nothing_but_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    cases = {
        "fifo": "is a FIFO, socket or device",
        "zero": "is a FIFO, socket or device",
        "loop": "is not readable: Too many levels",
        ".": "is a folder: expected a file",
        "absent": "does not exist",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=f"archive '.*' {message}"):
            read_npz(tmp_path / name, "archive")


COLUMNS = {"a": Column("f", ("N", 3)), "b": Column("i", ("N",)), "c": Column("U", ())}
GOOD: dict[str, Any] = {"a": np.zeros((2, 3)), "b": np.zeros(2, np.uint8), "c": np.array("x"), "more": 1}


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("a", None, r"columns \['a'\] are missing; accepted: a, b, c"),
        ("a", np.zeros((2, 4)), r"a has shape \(2, 4\); accepted: \(2, 3\)"),
        ("a", np.zeros(6), r"a has shape \(6,\); accepted: \(N, 3\)"),
        ("b", np.zeros(3, int), r"b has shape \(3,\); accepted: \(2\)"),
        ("b", np.zeros(2), "b holds '<f8'; accepted: whole numbers"),
        ("a", np.zeros((2, 3), np.longdouble), "a holds .*; accepted: floating-point numbers"),
        ("a", np.zeros((2, 3), complex), "a holds '<c16'; accepted: floating-point numbers"),
        ("c", np.array(["x"]), r"c has shape \(1,\); accepted: \(\)"),
    ],
)
def test_columns(name: str, array: Any, message: str) -> None:
    check_columns(GOOD, COLUMNS, "file")
    changed = {key: value for key, value in {**GOOD, name: array}.items() if value is not None}
    with pytest.raises(UserError, match=f"file: .*{message}"):
        check_columns(changed, COLUMNS, "file")


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, np.inf, -np.inf, 1e308])
def test_values(value: float) -> None:
    check_values(np.array([[0.0, 1.0]]), 0, 1, "file: x")
    with pytest.raises(UserError, match=r"file: x\[1, 0\] is .*; accepted: 0 to 1"):
        check_values(np.array([[0.0], [value]]), 0, 1, "file: x")
    check_values(np.array([0.5, np.nan]), 0, 1, "file: x", unknown=True)
