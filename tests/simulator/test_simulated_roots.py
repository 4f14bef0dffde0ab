"""Whole or not at all, and the same whoever makes it."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import fails
from limits import files_of_at_most

from cpq_train.common.errors import UserError
from cpq_train.common.folders import LOCK_FILE, locked
from cpq_train.simulator import simulate


def _hashes(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_workers_write_the_same_bits(mini_root: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    simulate(again, num_scenes=3, num_val_scenes=1, num_samples_per_scene=3, seed=5, num_workers=2)
    assert _hashes(again) == _hashes(mini_root)


def test_a_scene_does_not_depend_on_the_others(mini_root: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    simulate(alone, num_scenes=1, num_val_scenes=1, num_samples_per_scene=3, seed=5, num_workers=1)
    clouds = {name: code for name, code in _hashes(alone).items() if name.endswith(".bin")}
    assert len(clouds) == 31
    assert clouds.items() <= _hashes(mini_root).items()


def test_another_seed_is_another_set(mini_root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    simulate(other, num_scenes=1, num_val_scenes=1, num_samples_per_scene=1, seed=6, num_workers=1)
    clouds = {code for name, code in _hashes(other).items() if name.endswith(".bin")}
    assert not clouds & set(_hashes(mini_root).values())


def test_a_half_written_root_never_gets_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cpq_train.simulator.scene as scene

    original, taken = scene.scan, []

    def failing_scan(*args: object, **kwargs: object) -> object:
        taken.append(1)
        if len(taken) > 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(scene, "scan", failing_scan)
    with pytest.raises(UserError, match=r"No space left.*nothing is left behind"):
        simulate(tmp_path / "root", num_scenes=2, num_samples_per_scene=1, num_workers=1)
    assert len(taken) == 16
    assert not list(tmp_path.iterdir())


def test_not_every_error_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cpq_train.simulator.scene as scene

    def failing_scan(*args: object, **kwargs: object) -> object:
        raise OSError("a library is missing")

    monkeypatch.setattr(scene, "scan", failing_scan)
    with pytest.raises(OSError, match=r"^a library is missing$"):
        simulate(tmp_path / "root", num_scenes=1, num_samples_per_scene=1, num_workers=1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path: Path) -> None:
    for num_bytes in (0, 100, 500_000):
        with files_of_at_most(num_bytes), pytest.raises(UserError) as error:
            simulate(tmp_path / "root", num_scenes=2, num_samples_per_scene=1, num_workers=1)
        assert re.fullmatch(
            r"cannot write the data set to '.*/root': it needs 15,400,000 bytes, [\d,]+ bytes are free "
            r"\(.*\); nothing is left behind",
            str(error.value),
        )
        assert not list(tmp_path.iterdir())


def test_a_full_disk_in_a_worker(tmp_path: Path) -> None:
    with files_of_at_most(500_000), pytest.raises(UserError, match="it needs 15,400,000 bytes"):
        simulate(tmp_path / "root", num_scenes=2, num_samples_per_scene=1, num_workers=2)
    assert not list(tmp_path.iterdir())


def test_the_second_of_two_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = tmp_path / ".root.partial"
    partial.mkdir()
    (partial / "cloud.bin").write_text("of the first")
    with locked(partial):
        said = fails(["simulate", "--output", str(tmp_path / "root"), "--num_scenes", "1"], capsys)
    assert f"is being written by process {os.getpid()} on " in said
    assert (partial / "cloud.bin").read_text() == "of the first"


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_simulation_leaves_no_process_and_is_cleared_away(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cpq_train", "simulate", "--output", str(tmp_path / "root")]
    command += ["--num_scenes", "4", "--num_samples_per_scene", "40", "--num_workers", "2"]
    with subprocess.Popen(command) as process:
        partial = tmp_path / ".root.partial"
        wait_for(lambda: len(list(partial.glob("*/LIDAR_TOP/*.bin"))) > 2, 60)
        workers = children(process.pid)
        assert len(workers) >= 2
        process.kill()
    wait_for(lambda: not any(map(runs, workers)), 2)
    assert list(partial.glob("*/LIDAR_TOP/*.bin"))
    simulate(tmp_path / "root", num_scenes=1, num_samples_per_scene=1, num_workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert len(list(tmp_path.glob("root/*/LIDAR_TOP/*.bin"))) == 11


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    simulate(tmp_path / "root", num_scenes=1, num_samples_per_scene=1, num_workers=1)
    (tmp_path / ".other.partial").mkdir()
    (tmp_path / ".other.partial" / LOCK_FILE).write_text("process 1 on a host")
    with pytest.raises(UserError, match=r"other\.partial' may be left of one that was killed"):
        simulate(tmp_path / "other", num_scenes=1, num_samples_per_scene=1, num_workers=1)


PLACES: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda partial, own: partial.symlink_to(own),
    "a link to nothing": lambda partial, own: partial.symlink_to(own / "nothing"),
    "a file": lambda partial, own: partial.write_text("of the user"),
    "a folder of the user": lambda partial, own: shutil.copytree(own, partial),
    "a folder with a lock of another kind": lambda partial, own: (
        shutil.copytree(own, partial),
        (partial / LOCK_FILE).write_text(""),
    ),
    "a folder with a lock that is a link": lambda partial, own: (
        shutil.copytree(own, partial),
        (own.parent / "lock").write_text("process 1 on a host"),
        (partial / LOCK_FILE).symlink_to(own.parent / "lock"),
    ),
}


@pytest.mark.parametrize("way", PLACES)
def test_what_is_no_simulations_stays(tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "letter").write_text("of the user")
    PLACES[way](tmp_path / ".root.partial", own)
    before = [(path, path.is_symlink() or path.is_dir() or path.read_bytes()) for path in tmp_path.rglob("*")]
    said = fails(["simulate", "--output", str(tmp_path / "root"), "--num_scenes", "1"], capsys)
    assert ".root.partial', which is there and " in said
    after = [(path, path.is_symlink() or path.is_dir() or path.read_bytes()) for path in tmp_path.rglob("*")]
    assert after == before


def test_a_folder_of_another_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".root.partial").mkdir()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    said = fails(["simulate", "--output", str(tmp_path / "root"), "--num_scenes", "1"], capsys)
    assert "belongs to another user" in said


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", '{"a": 1, "a": 2}'])
def test_a_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "simulation.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="manifest"):
        simulate(tmp_path, num_scenes=1)


def test_what_lies_at_the_output_is_kept(mini_root: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"output .* exists and is not the data set asked for"):
        simulate(tmp_path, num_scenes=1)
    with pytest.raises(UserError, match="exists and is not the data set asked for"):
        simulate(mini_root, num_scenes=3, num_val_scenes=1, num_samples_per_scene=3, seed=6)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_whole_root_is_not_made_again(mini_root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in mini_root.rglob("*")}
    simulate(mini_root, num_scenes=3, num_val_scenes=1, num_samples_per_scene=3, seed=5)
    assert before == {path: path.stat().st_mtime_ns for path in mini_root.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_scenes": 0}, "num_scenes is 0"),
        ({"num_scenes": 3, "num_val_scenes": 4}, "num_val_scenes is 4"),
        ({"num_samples_per_scene": 0}, "num_samples_per_scene is 0"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"num_scenes": 9, "num_val_scenes": 0, "version": "v1.0-mini"}, "9 training scenes .* at most 8"),
        ({"num_scenes": 851}, "701 training scenes .* at most 700"),
        ({"version": "v1.0-test"}, "version is v1.0-test; accepted: v1.0-mini, v1.0-trainval"),
    ],
)
def test_numbers_out_of_range_are_the_users_mistake(
    tmp_path: Path, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        simulate(tmp_path / "root", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("num_scenes", "version", "num_val"),
    [(1, "v1.0-mini", 0), (10, "v1.0-mini", 2), (20, "v1.0-trainval", 4), (850, "v1.0-trainval", 150)],
)
def test_a_sensible_share_of_the_scenes_is_for_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_scenes: int, version: str, num_val: int
) -> None:
    import importlib

    from nuscenes.utils import splits

    asked: dict[str, object] = {}
    module = importlib.import_module("cpq_train.simulator.simulate")
    monkeypatch.setattr(module, "_write", lambda root, manifest, num_workers: asked.update(manifest))
    simulate(tmp_path / "root", num_scenes=num_scenes)
    assert asked["version"] == version
    names = asked["scenes"]
    assert isinstance(names, list)
    assert len(set(names)) == num_scenes
    assert len(set(names) & set(splits.mini_val if version == "v1.0-mini" else splits.val)) == num_val
