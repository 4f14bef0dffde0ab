"""What training cost by layer: what the report makes of a run's files, and of damaged ones."""

from pathlib import Path

import pytest
from scored_runs import write_arm

from cpq_train.common.errors import UserError
from cpq_train.report.compare import compare
from cpq_train.report.training_costs import describe_training_cost, training_cost_tables

LATENCY = "step,stage,layer,kind,ms\n"
MEMORY = "step,stage,layer,kind,parameter_bytes,buffer_bytes,saved_bytes,output_bytes,peak_bytes\n"
THROUGHPUT = "step,samples_per_s,data_wait_share\n"
MIB = 2**20


def _write(folder: Path, num_layers: int = 1) -> None:
    layers = [f"layers.{number}" for number in range(num_layers)]
    latency = [
        f"{step},{stage},{layer},Conv2d,{ms + number}"
        for step, stage, ms in (
            (10, "train", 40),
            (20, "train", 50),
            (30, "train", 90),
            (31, "validation", 7),
        )
        for number, layer in enumerate(layers)
    ]
    latency += ["10,train,step,step,900", "31,validation,step,step,300", "0,validate,step,step,310"]
    memory = [f"11,train,{layer},Conv2d,0,0,{3 * MIB},{MIB},{MIB}" for layer in layers]
    memory += [f"11,train,step,step,0,0,{3 * MIB},{MIB},{5 * MIB}"]
    (folder / "layer_latency.csv").write_text(LATENCY + "\n".join(latency) + "\n")
    (folder / "layer_memory.csv").write_text(MEMORY + "\n".join(memory) + "\n")
    (folder / "throughput.csv").write_text(f"{THROUGHPUT}99,3.0,0.1\n199,5.0,0.3\n299,4.0,0.1\n")


def test_medians_over_measured_steps(tmp_path: Path) -> None:
    _write(tmp_path)
    layer = {"train_ms": 50, "validation_ms": 7, "train_bytes": 4 * MIB, "validation_bytes": None}
    whole = {"train_ms": 900, "validation_ms": 305, "train_bytes": 5 * MIB, "validation_bytes": None}
    assert describe_training_cost(tmp_path) == {
        "step": {"layer": "step", "kind": "step", **whole},
        "layers": [{"layer": "layers.0", "kind": "Conv2d", **layer}],
        "throughput": {"samples_per_s": 4, "data_wait_share": 0.1},
    }


def test_the_slowest_and_the_largest_are_listed(tmp_path: Path) -> None:
    """Also one that is slow, or large, in validation alone."""
    _write(tmp_path, num_layers=20)
    with (tmp_path / "layer_latency.csv").open("a") as file:
        file.write("31,validation,NMS,NMS,1000\n")
    with (tmp_path / "layer_memory.csv").open("a") as file:
        file.write(f"31,validation,layers.7,Conv2d,0,0,0,0,{9 * MIB}\n")
    cost = describe_training_cost(tmp_path)
    assert cost is not None
    names = [layer["layer"] for layer in cost["layers"]]
    assert names[:5] == ["NMS", "layers.19", "layers.18", "layers.17", "layers.16"]
    assert "layers.7" in names
    assert len(names) <= 10


def test_a_run_without_the_files_has_no_rows(tmp_path: Path) -> None:
    assert describe_training_cost(tmp_path) is None
    (tmp_path / "throughput.csv").write_text(f"{THROUGHPUT}99,3.0,0.1\n")
    report = {
        "runs": [
            {"title": "qat", "training_cost": describe_training_cost(tmp_path)},
            {"title": "deployed", "training_cost": None},
        ]
    }
    whole, layers = training_cost_tables(report)
    assert whole.rows == [["qat", "3.00", "10.0%", "n/a", "n/a", "n/a", "n/a"]]
    assert layers.rows == []


def test_the_report_has_a_section_of_it(tmp_path: Path) -> None:
    for arm in ("float", "ptq"):
        write_arm(tmp_path / arm, arm, 0.3)
    _write(tmp_path / "float")
    compare([tmp_path / "float", tmp_path / "ptq"], tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    _, section = text.split("## What training cost by layer")
    assert "Times of different runs can be compared only where the same machine" in section
    assert "| float | 4.00 | 10.0% | 900.0 | 305.0 | 5.0 | n/a |" in section
    assert "| `layers.0` | Conv2d | 50.0 | 7.0 | 4.0 | n/a |" in section
    assert "ptq: slowest" not in section
    page = (tmp_path / "report/report.html").read_text()
    assert "<h2>What training cost by layer</h2>" in page
    assert "<code>layers.0</code>" in page


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("layer_latency.csv", b"step,stage,layer,ms\n", r"columns \['kind'\] are missing; accepted: stage"),
        ("layer_latency.csv", f"{LATENCY}1,train,a,b,slow\n".encode(), "line 2 is not readable"),
        ("layer_latency.csv", f"{LATENCY}1,train,a\n".encode(), "line 2 is not readable"),
        ("layer_latency.csv", f"{LATENCY}1,test,a,b,1\n".encode(), "stage is 'test'; accepted: train, "),
        ("layer_memory.csv", f"{MEMORY}1,train,a,b,0,0,many,0,0\n".encode(), "line 2 is not readable"),
        ("throughput.csv", THROUGHPUT.encode() + b"1,\xff\xfe,0\n", "not readable as text"),
        ("throughput.csv", b"", "columns .* are missing"),
    ],
)
def test_a_damaged_file_is_one_line(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}: .*{message}"):
        describe_training_cost(tmp_path)
