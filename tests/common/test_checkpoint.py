"""Checkpoints are read from local regular files, whole, within bounds, as tensors and plain values."""

import os
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from old_files import CHECKPOINTS

from cpq_train.common.archive import check_archive
from cpq_train.common.bounds import MAX_DEPTH, MAX_VALUES, check_bounds
from cpq_train.common.checkpoint import read_checkpoint, read_plain
from cpq_train.common.errors import UserError

OLD = CHECKPOINTS["float"]


class Call:
    """Unpickles as the result of a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("name", ["http://127.0.0.1:1/x.ckpt", "s3://x/y.ckpt", "none.ckpt", "a\0b"])
def test_no_local_file(name: str) -> None:
    with pytest.raises(UserError, match=r"^checkpoint '.*' (does not exist|is not readable: embedded null)"):
        read_plain(name)


def test_no_regular_file(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    for make, said in (
        (lambda: os.mkfifo(path), "is a FIFO, socket or device"),
        (lambda: path.symlink_to("/dev/zero"), "is a FIFO, socket or device"),
        (lambda: path.symlink_to(path), "Too many levels of symbolic links"),
    ):
        make()
        with pytest.raises(UserError, match=said):
            read_plain(path)
        path.unlink()
    with pytest.raises(UserError, match="is a folder: expected a file"):
        read_plain(tmp_path)


def test_every_flipped_bit_of_its_numbers_is_found(tmp_path: Path) -> None:
    whole, path = OLD.read_bytes(), tmp_path / "x.ckpt"
    expected = torch.load(OLD, weights_only=True)["state_dict"]
    for place in torch.randint(len(whole), (60,), generator=torch.Generator().manual_seed(0)).tolist():
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        with suppress(UserError):  # or it was between the members
            read = read_checkpoint(path)["state_dict"]
            assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_a_file_without_checksums_is_said_to_be_unchecked(tmp_path: Path) -> None:
    content, path = torch.load(OLD, weights_only=True), tmp_path / "x.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match=r"x\.ckpt' has no checksums"):
        read_checkpoint(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.warns(UserWarning, match=r"x\.ckpt' has no checksums"):
        read_checkpoint(path)


def _nested(depth: int, width: int) -> list[Any]:
    values: list[Any] = [1]
    for _ in range(depth):
        values = [values] * width
    return values


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_nested(30, 9), f"holds more than {MAX_VALUES:,} values"),
        (_nested(300, 1), f"is nested deeper than {MAX_DEPTH} levels"),
        ({"x": torch.zeros(1).expand(1 << 40)}, "a tensor of shape .* does not fit into"),
        ({"x": torch.empty(1 << 40, device="meta")}, "a tensor of shape .* does not fit into"),
        (Call(torch.Tensor, 1 << 30, 1 << 20), "is corrupt"),
    ],
)
def test_few_bytes_that_stand_for_many(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    began_s = time.monotonic()
    with pytest.raises(UserError, match=said):
        read_plain(tmp_path / "x.ckpt")
    assert time.monotonic() - began_s < 20


@pytest.mark.parametrize("is_archive", [True, False])
def test_bytes_are_not_made(is_archive: bool, tmp_path: Path) -> None:
    torch.save(
        {"x": Call(bytearray, 1 << 45)}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=is_archive
    )
    with pytest.raises(UserError, match="makes bytes as it is read"):
        read_plain(tmp_path / "x.ckpt")


def _pickled_tuples(path: Path, tuples: bytes) -> None:
    """A checkpoint whose pickle has a tuple as a key."""
    torch.save({"x": 1}, path)
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, b"\x80\x02}" + tuples + b"K\x01s." if name.endswith("data.pkl") else data)


@pytest.mark.parametrize(
    "tuples",
    [b")" + 1_000_000 * b"\x85", b")q\x00" + 40 * b"h\x00\x86q\x00"],
    ids=["nested deep", "doubled"],
)
def test_a_key_whose_hash_does_not_end(tuples: bytes, tmp_path: Path) -> None:
    _pickled_tuples(tmp_path / "x.ckpt", tuples)
    with pytest.raises(UserError, match=r"x\.ckpt' holds a tuple of .* deep; accepted: up to"):
        read_plain(tmp_path / "x.ckpt")


def test_names_in_other_letters(tmp_path: Path) -> None:
    """Torch finds its members in any case of letters."""
    path = tmp_path / "x.ckpt"
    torch.save({"x": Call(bytearray, 1 << 45)}, path)
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name.replace("data.pkl", "DATA.PKL"), data)
    with pytest.raises(UserError, match="makes bytes as it is read"):
        read_plain(path)


def test_two_files_in_one(tmp_path: Path) -> None:
    """What torch reads stands in front, what has checksums behind."""
    torch.save({"x": 1}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"x": 2}, tmp_path / "new.ckpt")
    (tmp_path / "x.ckpt").write_bytes(
        (tmp_path / "old.ckpt").read_bytes() + (tmp_path / "new.ckpt").read_bytes()
    )
    with pytest.raises(UserError, match=r"x\.ckpt' is two files in one"):
        read_plain(tmp_path / "x.ckpt")


def test_a_real_checkpoint_is_within_bounds() -> None:
    content = torch.load(OLD, weights_only=True)
    check_bounds(content, OLD.stat().st_size, "it")
    assert check_archive(OLD)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("state_dict", None, "state_dict: got None, accepted: a mapping"),
        ("state_dict", {"network.x": [1.0]}, r"state_dict, network.x: got \[1.0\], accepted: a dense tensor"),
        ("state_dict", {7: torch.zeros(1)}, "state_dict.*got 7, accepted: a text"),
        ("quantization", [], r"quantization: got \[\], accepted: a mapping"),
        ("epoch", -1, "epoch: got -1, accepted: a count"),
        ("global_step", "7", "global_step: got '7', accepted: a count"),
    ],
)
def test_entries_of_other_types(name: str, value: Any, said: str, tmp_path: Path) -> None:
    torch.save({**torch.load(OLD, weights_only=True), name: value}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=said):
        read_checkpoint(tmp_path / "x.ckpt")
