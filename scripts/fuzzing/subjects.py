"""Which files are damaged how, who reads them, and what of a result must then stay as it was."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fuzzing.mutations import ARRAYS, BYTES, CHECKPOINT, CSV, DOCUMENT, IRREGULAR, YAML, Mutation, missing
from fuzzing.planted import PLANTED
from fuzzing.workspace import BASE, FLOAT, OVERLAY, QAT, SENSITIVITY, TINY, qat_run

Result = Callable[[Path, str], Any]
"""What a reader found, from its folder and its output; equal results are the same result."""


class Reader(NamedTuple):
    """A command that reads a file.

    Attributes:
        arguments: Its words, from inside a workspace.
        result: What it found.
    """

    arguments: list[str]
    result: Result


class Subject(NamedTuple):
    """Files of one kind.

    Attributes:
        files: Patterns below a workspace.
        readers: Who reads them.
        mutations: What is done to one, by name.
        has_own_tables: Whether the tables of the data set are among them.
        absent: Patterns of files that the reader should not find.
    """

    files: tuple[str, ...]
    readers: tuple[Reader, ...]
    mutations: Mapping[str, Mutation]
    has_own_tables: bool = False
    absent: tuple[str, ...] = ()


def _weights(file: str) -> Result:
    """Every bit of the tensors of a checkpoint."""

    def result(folder: Path, said: str) -> str:
        state = torch.load(folder / file, weights_only=True)["state_dict"]
        digest = hashlib.sha256()
        for name, tensor in sorted(state.items()):
            digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    return result


def _foreign_weights(folder: Path, said: str) -> str:
    state = torch.load(folder / "other.pth", weights_only=True)["model_state"]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in state.values())).hexdigest()


def _scores(run: str) -> Result:
    """The figures of a scored run, and its boxes."""

    def result(folder: Path, said: str) -> Any:
        document = json.loads((folder / run / "metrics.json").read_text())
        boxes = json.loads((folder / run / "results_nusc.json").read_text())["results"]
        return [document[key] for key in ("metrics", "per_class", "per_range", "confidence")], boxes

    return result


def _detections(folder: Path, said: str) -> Any:
    return json.loads((folder / "out/results_nusc.json").read_text())["results"]


def _numbers(value: Any) -> list[Any]:
    """The numbers of a document, in their order; texts may be what a stranger likes."""
    if isinstance(value, Mapping):
        return [number for one in value.values() for number in _numbers(one)]
    if isinstance(value, list):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, int | float) else []


def _comparison(folder: Path, said: str) -> Any:
    return _numbers(json.loads((folder / "comparison/report.json").read_text()))


def _verified(folder: Path, said: str) -> Any:
    return _numbers(json.loads((folder / "verified.json").read_text()))


def _described(folder: Path, said: str) -> list[str]:
    """Numbers of a description, but for the hash of the file."""
    lines = [line for line in said.splitlines() if "sha256" not in line]
    return [line for line in lines if re.search(r"bit|epoch|numbers|arm", line)]


def _gaps(folder: Path, said: str) -> Any:
    """What a fit logged of its differences to the baselines."""
    with (folder / "out/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [[value for name, value in row.items() if "_minus_" in name] for row in rows]


def _measured(folder: Path, said: str) -> Any:
    return _numbers(json.loads((folder / "sensitivity/sensitivity.json").read_text()))


def _nothing(folder: Path, said: str) -> None:
    """A reader whose files are compared by itself."""


NETWORK = ["-c", str(BASE), *TINY]
TUNED = ["-c", str(BASE), "-c", str(OVERLAY), *TINY, "--model.scheme", "scheme.yaml"]
OUT = ["--trainer.default_root_dir", "out"]


def _validated(*options: str) -> Reader:
    return Reader(["validate", *NETWORK, *OUT, *options], _scores("out"))


DESCRIBE = {name: Reader(["describe", name], _described) for name in (FLOAT, QAT)}
VERIFY = Reader(["verify", QAT, "--root", "data", "--output", "verified.json"], _verified)
EXPORT = Reader(["export", QAT, "--output", "out/other.onnx"], _nothing)
CALIBRATE = Reader(
    ["calibrate", *TUNED, *OUT, "--model.weights", FLOAT, "--output", "out/ptq.ckpt"],
    _weights("out/ptq.ckpt"),
)
TO_OPENPCDET = Reader(
    ["convert", "--input", FLOAT, "--target", "openpcdet", "--output", "other.pth"], _foreign_weights
)
COMPARE = Reader(
    ["compare", "float", "ptq", "qat", "--latency", "qat/latency.json", "--output", "comparison"], _comparison
)
TUNE = Reader(["fit", *TUNED, *OUT, "--model.weights", "ptq/ptq.ckpt"], _gaps)
MEASURE = Reader(["sensitivity", *TUNED, *OUT, *SENSITIVITY], _measured)
RESUME = Reader(
    ["fit", *TUNED, "--model.weights", "ptq/ptq.ckpt", *qat_run(), "--ckpt_path", "last"],
    _weights("qat/checkpoints/last.ckpt"),
)
SCORE = Reader(["score", "float/results_nusc.json", "--data.root", "data", "--output", "out"], _nothing)
FIT = Reader(["fit", *NETWORK, *OUT], _weights("out/checkpoints/last.ckpt"))
TABLES = _validated("--model.weights", FLOAT)


PREDICT = Reader(["predict", *NETWORK, *OUT, "--model.weights", FLOAT, "--clouds", "clouds/0.bin"], _nothing)


def _from_foreign(file: str) -> Reader:
    arguments = [
        "convert",
        "--input",
        file,
        "--source",
        "openpcdet",
        "--config",
        str(BASE),
        "--output",
        "o.ckpt",
    ]
    return Reader(arguments, _weights("o.ckpt"))


def _cache_files(name: str) -> tuple[str, ...]:
    return tuple(f"data/.cpq_train/v1.0-trainval/{name}/{file}" for file in ("*.npy", "contents.json"))


IRREGULAR_IF_THERE = {name: one for name, one in IRREGULAR.items() if one is not missing}
"""For files that a run folder may do without."""

SUBJECTS: Mapping[str, Subject] = {
    "float checkpoint": Subject(
        (FLOAT,),
        (DESCRIBE[FLOAT], CALIBRATE, TO_OPENPCDET, _validated("--model.weights", FLOAT)),
        {**BYTES, **CHECKPOINT, **IRREGULAR},
    ),
    "quantized checkpoint": Subject(
        (QAT,),
        (DESCRIBE[QAT], VERIFY, EXPORT, _validated("--ckpt_path", QAT)),
        {**BYTES, **CHECKPOINT, **IRREGULAR},
    ),
    "resume point": Subject(
        ("qat/checkpoints/resume.ckpt",), (RESUME,), {**BYTES, **CHECKPOINT, **IRREGULAR}
    ),
    "foreign checkpoint": Subject(
        ("foreign-archive.pth",),
        (_from_foreign("foreign-archive.pth"),),
        {**BYTES, **CHECKPOINT, **IRREGULAR},
    ),
    "scheme": Subject(("scheme.yaml",), (CALIBRATE,), {**YAML, **IRREGULAR}),
    "configuration": Subject(
        ("float/config.yaml",),
        (Reader(["validate", "-c", "float/config.yaml", *OUT, "--model.weights", FLOAT], _scores("out")),),
        {**YAML, **IRREGULAR},
    ),
    "table": Subject(("data/v1.0-trainval/*.json",), (TABLES,), {**DOCUMENT, **IRREGULAR}, True),
    "index": Subject(
        _cache_files("[0-9a-f]*"),
        (_validated("--model.weights", FLOAT),),
        {**BYTES, **IRREGULAR, **PLANTED},
    ),
    "GT database": Subject(_cache_files("gt-*"), (FIT,), {**BYTES, **IRREGULAR, **PLANTED}),
    "metrics": Subject(("*/metrics.json",), (COMPARE,), {**BYTES, **DOCUMENT, **IRREGULAR}),
    "matches": Subject(("*/matches.npz",), (COMPARE,), {**BYTES, **ARRAYS, **IRREGULAR_IF_THERE}),
    # Its numbers may be any, and no checksum tells: what they become is not compared.
    "submission": Subject(("float/results_nusc.json",), (SCORE,), {**BYTES, **DOCUMENT, **IRREGULAR}),
    "picture's sample": Subject(("*/bev_sample.npz",), (COMPARE,), {**BYTES, **ARRAYS, **IRREGULAR_IF_THERE}),
    "table of a run": Subject(
        (
            "qat/metrics.csv",
            "qat/amax_drift.csv",
            "*/throughput.csv",
            "*/layer_latency.csv",
            "*/layer_memory.csv",
        ),
        (COMPARE,),
        {**CSV, **IRREGULAR_IF_THERE},
    ),
    "latency": Subject(("qat/latency.json",), (COMPARE,), {**BYTES, **DOCUMENT, **IRREGULAR}),
    "baseline": Subject(("baselines/*.json",), (TUNE,), {**BYTES, **DOCUMENT, **IRREGULAR}),
    "measurements": Subject(("sensitivity/measurements.jsonl",), (MEASURE,), {**BYTES, **IRREGULAR}),
    "engine": Subject(
        ("engine/qat.onnx",), (_validated("--model.engine_file", "engine/qat.onnx"),), {**BYTES, **IRREGULAR}
    ),
    "sidecar": Subject(
        ("engine/qat.json",),
        (_validated("--model.engine_file", "engine/qat.onnx"),),
        {**BYTES, **DOCUMENT, **IRREGULAR},
    ),
    "cloud": Subject(
        ("clouds/*.bin",),
        (
            Reader(
                ["predict", *NETWORK, *OUT, "--model.weights", FLOAT, "--clouds", "clouds/0.bin"], _nothing
            ),
        ),
        IRREGULAR,
    ),
}
