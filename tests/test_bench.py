"""Results of the bench scripts, and the page that is made of them."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cpq_train.common.errors import UserError

BENCH = Path(__file__).parents[1] / "scripts/bench"


def _script(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(BENCH))


def _table(*rows: dict[str, Any]) -> dict[str, Any]:
    context = {"machine": "A CPU", "instruction_sets": ["AVX2"], "threads": 1, "versions": {"torch": "2.13"}}
    return {"context": {**context, "rounds": 3}, "rows": list(rows)}


def test_the_page_has_the_results() -> None:
    page, results = _script("page"), _script("results").read_all()
    text = page.PAGE.read_text()
    assert len(re.findall(r"<!-- table: \w+ -->", text)) == text.count("<!-- end -->") > 0
    assert page.filled(text, results) == text, "run scripts/bench/page.py"


def test_tables_take_the_place_of_those_between_the_marks() -> None:
    spread = {"median": 0.847, "min": 0.8, "max": 1200.0}
    first = _table({"part": "whole", "ms": 4150.0, "ratio": spread, "voxels": 60000, "bound": None})
    results = {"a": {"step": first, "other": _table({"x": 1})}, "b": {"step": _table({"y": 2.5})}}
    text = "Before.\n<!-- table: step -->\nold\n<!-- end -->\nBehind.\n"
    filled = _script("page").filled(text, results)
    caption = "A CPU (AVX2), threads 1; rounds 3; torch 2.13.\n"
    assert filled == (
        "Before.\n<!-- table: step -->\n"
        "\n| part | ms | ratio | voxels | bound |\n| --- | --: | --: | --: | --: |\n"
        f"| whole | 4,150 | **0.85** (0.80 to 1,200) | 60,000 |  |\n\n{caption}\n"
        f"\n| y |\n| --: |\n| 2.50 |\n\n{caption}\n"
        "<!-- end -->\nBehind.\n"
    )
    assert _script("page").filled(filled, results) == filled
    with pytest.raises(UserError, match="table 'step' is in no file of results; accepted: other"):
        _script("page").filled(text, {"a": {"other": _table({"x": 1})}})


def test_a_table_without_rows_is_its_caption() -> None:
    found = _script("results").markdown(_table())
    assert found.split() == ["A", "CPU", "(AVX2),", "threads", "1;", "rounds", "3;", "torch", "2.13."]


def test_a_table_takes_its_own_place_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = _script("results")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(results, "machine_name", lambda device: "Some CPU @ 2.4GHz")
    for table, number in (("step", 1), ("other", 2), ("step", 3)):
        results.write_rows(table, [{"x": number}], rounds=5)
    found = json.loads((tmp_path / "results/some-cpu-2-4ghz.json").read_text())
    assert {table: found[table]["rows"] for table in found} == {"step": [{"x": 3}], "other": [{"x": 2}]}
    assert found["step"]["context"]["rounds"] == 5
    assert {"machine", "instruction_sets", "threads", "versions"} <= found["step"]["context"].keys()


def test_ratios_are_taken_within_a_round_and_held_against_their_bounds() -> None:
    script = _script("qat_overhead")
    times = {"float": [10.0, 20.0, 40.0], "QAT": [6.0, 15.0, 20.0], "float, same kernels": [5.0, 15.0, 25.0]}
    rows = script.bounds_met({("quickstart", "whole"): {**times, "pytorch-quantization": [9.0, 9.0, 9.0]}})
    found = {row["ratio"]: (row["reached"], row["bound"], row["holds"]) for row in rows}
    assert found == {
        "QAT / float": ({"median": 0.6, "min": 0.5, "max": 0.75}, 0.6, "yes"),
        "QAT / float, same kernels": ({"median": 1.0, "min": 0.8, "max": 1.2}, 0.85, "no"),
        "QAT / pytorch-quantization": ({"median": 1.667, "min": 0.6667, "max": 2.222}, 1.0, "no"),
    }


def test_a_step_gives_a_gpu_few_operators_and_nothing_to_wait_for() -> None:
    steps, lidar = _script("steps"), _script("lidar_like")
    config, _ = steps.config_of("quickstart")
    batch = lidar.new_batch(config, 1, 1, None, "")
    first = {name: batch[name][:2000].contiguous() for name in ("voxel_features", "voxel_coords")}
    rows = _script("operators").rows_of(steps.Workload.of(config, {**batch, **first}, "cpu"))
    ratio = {row["arm"]: row["ratio"] for row in rows}
    assert ratio["QAT"] <= 1.3
    assert ratio["QAT, learned ranges"] <= 1.5
    assert ratio["QAT bf16"] <= 1.3
    assert [row["waits of a step"] for row in rows] == [0] * len(rows)
