"""Tables of strangers: what is wrong with one is said in a line that names table, record and field."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from cpq_train.common.errors import UserError
from cpq_train.data.index import open_index
from cpq_train.data.sweeps import CloudError, read_cloud

Records = list[dict[str, Any]]


def is_lidar(record: dict[str, Any]) -> bool:
    return record.get("fileformat", "pcd") == "pcd" and record.get("is_key_frame", True)


def table(root: Path, name: str) -> Path:
    return root / "v1.0-mini" / f"{name}.json"


def read(root: Path, name: str) -> Records:
    records: Records = json.loads(table(root, name).read_text())
    return records


def refused(root: Path) -> str:
    with pytest.raises(UserError) as error:
        open_index(root, "v1.0-mini")
    assert not list(root.glob(".cpq_train/v1.0-mini/*"))
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


MISSING = object()
NUMBERS = "3 numbers (m)"
QUATERNION = "a unit quaternion: 4 numbers w, x, y, z"
MICROSECONDS = "a whole number of microseconds"
TOKEN = "a token: 1 to 128 printable characters"
VALUES = [
    ("sample_annotation", "size", [float("nan"), 1.0, 1.0], NUMBERS),
    ("sample_annotation", "size", [1.0, -1.0, 1.0], NUMBERS),
    ("sample_annotation", "size", [1.0, 0.0, 1.0], NUMBERS),
    ("sample_annotation", "size", [1.0, 1.0, 1.0, 1.0], NUMBERS),
    ("sample_annotation", "size", [1.0, 1.0], NUMBERS),
    ("sample_annotation", "size", [1.0, 1.0, 1e300], NUMBERS),
    ("sample_annotation", "size", "123", NUMBERS),
    ("sample_annotation", "size", {"1": 1, "2": 1, "3": 1}, NUMBERS),
    ("sample_annotation", "size", MISSING, NUMBERS),
    ("sample_annotation", "translation", [float("nan"), 1.0, 1.0], NUMBERS),
    ("sample_annotation", "translation", [None, 1.0, 1.0], NUMBERS),
    ("sample_annotation", "translation", None, NUMBERS),
    ("sample_annotation", "translation", [1.0, float("inf"), 1.0], NUMBERS),
    ("sample_annotation", "translation", [1.0, True, 1.0], NUMBERS),
    ("sample_annotation", "translation", ["1.0", 1.0, 1.0], NUMBERS),
    ("sample_annotation", "translation", [1e308, 1.0, 1.0], NUMBERS),
    ("sample_annotation", "translation", [10**400, 1.0, 1.0], NUMBERS),
    ("sample_annotation", "rotation", [1.0, 1.0, 0.0, 0.0], QUATERNION),
    ("sample_annotation", "rotation", [0.0, 0.0, 0.0, 0.0], QUATERNION),
    ("sample_annotation", "rotation", [1.0, 0.0, 0.0], QUATERNION),
    ("sample_annotation", "num_lidar_pts", -1, "a count"),
    ("sample_annotation", "num_lidar_pts", 1.5, "a count"),
    ("sample_annotation", "num_lidar_pts", True, "a count"),
    ("sample_annotation", "num_lidar_pts", "5", "a count"),
    ("sample_annotation", "num_lidar_pts", 2**31, "a count"),
    ("sample_annotation", "num_radar_pts", 2**70, "a count"),
    ("sample_annotation", "num_radar_pts", MISSING, "a count"),
    ("sample_annotation", "attribute_tokens", "token", "a list of tokens"),
    ("sample_annotation", "attribute_tokens", [3], "a list of tokens"),
    ("sample_annotation", "prev", None, "a token, or an empty text"),
    ("sample_annotation", "token", "", TOKEN),
    ("sample_annotation", "token", 3, TOKEN),
    ("sample_annotation", "token", MISSING, TOKEN),
    ("sample_annotation", "token", "a" * 129, TOKEN),
    ("sample_annotation", "token", "nul\0", TOKEN),
    ("sample_annotation", "token", "\ud800", TOKEN),
    ("sample_annotation", "instance_token", [], TOKEN),
    ("sample_data", "timestamp", 1.5, MICROSECONDS),
    ("sample_data", "timestamp", -1, MICROSECONDS),
    ("sample_data", "timestamp", 2**63, MICROSECONDS),
    ("sample_data", "timestamp", "1", MICROSECONDS),
    ("sample_data", "is_key_frame", 1, "true, false"),
    ("sample_data", "is_key_frame", "false", "true, false"),
    ("sample_data", "calibrated_sensor_token", MISSING, TOKEN),
    ("sample_data", "calibrated_sensor_token", [], TOKEN),
    ("sample_data", "filename", "/etc/passwd", "a path inside the data root"),
    ("sample_data", "filename", "../../x", "a path inside the data root"),
    ("sample_data", "filename", "samples/../../x", "a path inside the data root"),
    ("sample_data", "filename", "", "a path inside the data root"),
    ("sample_data", "filename", "a" * 513, "a path inside the data root"),
    ("sample_data", "filename", "a\0b", "a path inside the data root"),
    ("sample_data", "filename", 3, "a path inside the data root"),
    ("sample", "timestamp", 1.5, MICROSECONDS),
    ("sample", "timestamp", True, MICROSECONDS),
    ("sample", "timestamp", MISSING, MICROSECONDS),
    ("sample", "token", "nul\0", TOKEN),
    ("scene", "name", 3, "a name"),
    ("scene", "name", "a\nb", "a name"),
    ("ego_pose", "translation", [None, 1.0, 1.0], NUMBERS),
    ("ego_pose", "rotation", [2.0, 0.0, 0.0, 0.0], QUATERNION),
    ("ego_pose", "token", [], TOKEN),
    ("calibrated_sensor", "rotation", [float("nan"), 0.0, 0.0, 0.0], QUATERNION),
    ("calibrated_sensor", "translation", MISSING, NUMBERS),
    ("sensor", "channel", None, "a name"),
    ("category", "name", 3, "a name"),
    ("attribute", "name", None, "a name"),
    ("instance", "category_token", None, TOKEN),
]


@pytest.mark.parametrize(("name", "field", "value", "accepted"), VALUES)
def test_a_value_is_named(root: Path, name: str, field: str, value: object, accepted: str) -> None:
    records = read(root, name)
    row, record = next((row, r) for row, r in enumerate(records) if is_lidar(r))
    before = record.pop(field)
    if value is not MISSING:
        record[field] = value
    table(root, name).write_text(json.dumps(records))
    message = refused(root)
    known = before if field == "token" else record["token"]
    assert f"table {name}, record " in message
    assert repr(known) in message or f"record {row + 1}" in message or field == "token"
    assert f" {field} is " in message or f" has no {field!r}" in message
    assert f"accepted: {accepted}" in message


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" * 400, "true"])
def test_no_number_is_none(root: Path, literal: str) -> None:
    path = table(root, "sample_annotation")
    path.write_text(re.sub(r'("size": \[)[^,\]]+', rf"\g<1>{literal}", path.read_text(), count=1))
    assert "size is [" in refused(root)


@pytest.mark.parametrize("name", ["category", "attribute", "sensor", "calibrated_sensor", "scene", "sample",
                                  "sample_data", "ego_pose", "instance", "sample_annotation"])  # fmt: skip
def test_a_token_that_occurs_twice(root: Path, name: str) -> None:
    records = read(root, name)
    copy = next(r for r in records if is_lidar(r))
    table(root, name).write_text(json.dumps([*records, copy]))
    assert refused(root) == f"table {name}: token {copy['token']!r} occurs twice; accepted: every token once"


def test_every_annotation_twice(root: Path) -> None:
    records = read(root, "sample_annotation")
    copies = [{**r, "token": f"copy-{r['token']}", "prev": "", "next": ""} for r in records]
    table(root, "sample_annotation").write_text(json.dumps(records + copies))
    assert "object of one sample" in refused(root)


def test_scenes_of_one_name(root: Path) -> None:
    records = read(root, "scene")
    records[1]["name"] = records[0]["name"]
    table(root, "scene").write_text(json.dumps(records))
    name = records[0]["name"]
    assert refused(root) == f"table scene: name {name!r} occurs twice; accepted: every name once"


def test_two_key_frames_of_a_sample(root: Path) -> None:
    records = read(root, "sample_data")
    copy = next(r for r in records if is_lidar(r))
    table(root, "sample_data").write_text(json.dumps([*records, {**copy, "token": "copy", "prev": ""}]))
    assert "sample_token of a LIDAR_TOP key frame" in refused(root)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_sweeps_in_a_circle(root: Path, length: int) -> None:
    records = read(root, "sample_data")
    following = {r["prev"]: r for r in records if r["prev"]}
    last = next(r for r in records if r["fileformat"] == "pcd" and not r["prev"])
    first = last
    for _ in range(length - 1):
        first = following[first["token"]]
    last["prev"] = first["token"]
    table(root, "sample_data").write_text(json.dumps(records))
    message = refused(root)
    assert "table sample_data, record " in message
    assert "prev leads in a circle" in message


@pytest.mark.parametrize("field", ["prev", "next"])
@pytest.mark.parametrize("to", ["itself", "another object", "nothing", "the other way"])
def test_neighbours_of_an_annotation(root: Path, field: str, to: str) -> None:
    records = read(root, "sample_annotation")
    one = next(r for r in records if r["prev"] and r["next"])
    other = next(r for r in records if r["instance_token"] != one["instance_token"])
    back = {"prev": one["next"], "next": one["prev"]}[field]
    one[field] = {"itself": one["token"], "nothing": "lost", "the other way": back}.get(to, other["token"])
    table(root, "sample_annotation").write_text(json.dumps(records))
    message = refused(root)
    assert f"table sample_annotation, record {one['token']!r}: {field} is no " in message


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("calibrated_sensor", "sensor_token"),
        ("instance", "category_token"),
        ("sample", "scene_token"),
        ("sample_data", "calibrated_sensor_token"),
        ("sample_data", "ego_pose_token"),
        ("sample_data", "prev"),
        ("sample_data", "sample_token"),
        ("sample_annotation", "attribute_tokens"),
        ("sample_annotation", "instance_token"),
        ("sample_annotation", "sample_token"),
    ],
)
def test_a_token_of_nothing(root: Path, name: str, field: str) -> None:
    records = read(root, name)
    record = next(r for r in records if is_lidar(r))
    record[field] = ["lost"] if field == "attribute_tokens" else "lost"
    table(root, name).write_text(json.dumps(records))
    where = f"table {name}, record {record['token']!r}: {field} is 'lost'; accepted: the token of a record of"
    assert where in refused(root)


@pytest.mark.parametrize("name", ["category", "sensor", "calibrated_sensor", "scene", "sample", "sample_data",
                                  "ego_pose", "instance"])  # fmt: skip
def test_a_table_without_records(root: Path, name: str) -> None:
    table(root, name).write_text("[]")
    assert "accepted: " in refused(root) or "has no LIDAR_TOP key frame" in refused(root)


NESTED = "[" * 100_000
TEXTS = [
    (b"{}", "at its start"),
    (b"null", "at its start"),
    (b"", "at its start"),
    (b"[null]", "where a record should be"),
    (b"[[]]", "where a record should be"),
    (b'[{"token": ' + NESTED.encode(), "nested too deep"),
    (b'[{"token": "\xff\xfe"}]', "can't decode byte"),
    ('[{"token": "a"}]'.encode("utf-16"), "can't decode byte"),
    (b"\xef\xbb\xbf[]", "at its start"),
    (b'[{"token": "a", "token": "b", "name": "c"}]', "'token' occurs twice"),
    (b'[{"token": "a", "name": "c"}] [', "behind the list"),
    (b'[{"token": "a", "name": "c"}] \x00', "behind the list"),
    (b'[{"token": "a", "name": ' + b"1" * 5000 + b"}]", "digits"),
]


@pytest.mark.parametrize(("text", "found"), TEXTS)
def test_no_table(root: Path, text: bytes, found: str) -> None:
    table(root, "category").write_bytes(text)
    message = refused(root)
    assert "category.json is damaged: expected a JSON list of records" in message
    assert found in message


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('"size":', '"size": [1, 1, 1], "size":', "'size' occurs twice"),
        ("}]", "}] [", "behind the list"),
        ("}]", "}]\0", "behind the list"),
        ("}]", "}", "unfinished record"),
        ('"size": [', '"size": ' + NESTED, "nested too deep"),
    ],
)
def test_damage_within_a_table(root: Path, old: str, new: str, found: str) -> None:
    path = table(root, "sample_annotation")
    path.write_text(path.read_text().replace(old, new, 1))
    message = refused(root)
    assert "sample_annotation.json is damaged: expected a JSON list of records" in message
    assert found in message


def test_colons_in_texts_are_no_keys(root: Path) -> None:
    expected = open_index(root, "v1.0-mini").annotation_translations.tolist()
    records = read(root, "sample_annotation")
    records[0]["note"] = 'it says "token": "x" and a:b'
    table(root, "sample_annotation").write_text(json.dumps(records))
    assert open_index(root, "v1.0-mini").annotation_translations.tolist() == expected


def test_a_cloud_is_a_regular_file(tmp_path: Path) -> None:
    fifo, device, folder, loop = (tmp_path / name for name in ("fifo", "device", "folder", "loop"))
    os.mkfifo(fifo)
    device.symlink_to("/dev/zero")
    folder.mkdir()
    loop.symlink_to(loop)
    for path in (fifo, device, folder, loop, tmp_path / "absent"):
        with pytest.raises(CloudError, match=re.escape(str(path))):
            read_cloud(path)


@pytest.mark.parametrize("target", ["fifo", "/dev/zero", "loop"])
def test_a_table_is_a_regular_file(root: Path, target: str) -> None:
    path = table(root, "scene")
    path.unlink()
    if target == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path if target == "loop" else target)
    assert "scene.json is missing" in refused(root)


def test_a_table_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "scene.json":
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    assert "scene.json is not readable: Input/output error" in refused(root)
