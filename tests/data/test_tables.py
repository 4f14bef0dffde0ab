import json
from pathlib import Path

import pytest

from cpq_train.common.errors import UserError
from cpq_train.data import tables
from cpq_train.data.tables import TableReader

RECORDS = [
    {
        "token": f"t{i}",
        "text": 'brackets ]}, {"quotes\\" and ümlauts ' + "€" * (i % 7),
        "list": [[1.5, -2], []],
        "next": "",
    }
    for i in range(40)
]


def read(folder: Path, text: str) -> list[tables.Record]:
    (folder / "scene.json").write_text(text, encoding="utf-8")
    return list(TableReader(folder, lambda _: None).records("scene"))


@pytest.mark.parametrize("chunk_bytes", [300, 301, 302, 1 << 20])
@pytest.mark.parametrize("indent", [None, 0, 4])
def test_records_equal_json_wherever_the_pieces_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, indent: int | None
) -> None:
    monkeypatch.setattr(tables, "_CHUNK_BYTES", chunk_bytes)
    text = json.dumps(RECORDS, indent=indent, ensure_ascii=False)
    assert read(tmp_path, text) == RECORDS


def test_empty_table(tmp_path: Path) -> None:
    assert read(tmp_path, " [\n]\n") == []


@pytest.mark.parametrize(
    "text", ["", "{}", "[{]", '[{"token": "a"}', '[{"token": "a"}, 3]', '[{"tok', "[nonsense]"]
)
def test_damaged_table_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"scene\.json is damaged: expected a JSON list of records"):
        read(tmp_path, text)


def test_damage_is_found_without_reading_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_CHUNK_BYTES", 400)
    seen: list[int] = []
    text = json.dumps(RECORDS)
    (tmp_path / "scene.json").write_text(text.replace('{"token": "t2"', '{"token"; "t2"'))
    with pytest.raises(UserError, match="damaged"):
        list(TableReader(tmp_path, seen.append).records("scene"))
    assert sum(seen) < len(text) / 2
