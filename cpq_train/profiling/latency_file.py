"""`latency.json`: what one pass of several networks takes, measured in turn; the file that `compare` reads.

Imports no torch, as `compare` does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpq_train.common.arm_names import ROWS
from cpq_train.common.errors import UserError
from cpq_train.common.files import write_whole
from cpq_train.common.schema import MAPPING, NUMBER, TEXT, Check, check_document

SCHEMA = 1
LATENCY_FILE = "latency.json"

FLOAT_IN_PYTORCH = "PyTorch, float"
FAKE_IN_PYTORCH = "PyTorch, fake quantization"
"""What a quantized network is while it is trained: `runs_as` of its row."""

_COUNT: Check = (lambda value: isinstance(value, int) and value > 0, "a count above 0")

_KEYS: dict[str, Any] = {
    "input": TEXT,
    "num_points": _COUNT,
    "num_voxels": _COUNT,
    "device": TEXT,
    "num_threads": _COUNT,
    "torch": TEXT,
    "num_passes": _COUNT,
    "rows": [
        {
            "name": TEXT,
            "arm": (lambda value: value in ROWS, ", ".join(ROWS)),
            "file": TEXT,
            "sha256": TEXT,
            "runs_as": TEXT,
            **dict.fromkeys(("ms", "min_ms", "max_ms", "cpu_ms"), NUMBER),
            "summary": MAPPING,
        }
    ],
}


def engine_label(name: str, version: str) -> str:
    """`runs_as` of an engine, such as "engine, onnxruntime 1.32.0"."""
    return f"engine, {name} {version}"


def write_latency(path: Path, document: dict[str, Any]) -> None:
    """Check and write the file; it appears only when it is whole.

    Args:
        path: The file; its folder exists.
        document: Its contents, without the schema.

    Raises:
        UserError: They are not as the schema has it.
    """
    document = {"schema": SCHEMA, **document}
    check_document(document, SCHEMA, _KEYS, str(path))
    write_whole(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_latency(path: Path) -> dict[str, Any]:
    """Read and check the file.

    Raises:
        UserError: It is absent, no JSON, or not as the schema has it.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable {LATENCY_FILE} ({error})") from error
    check_document(document, SCHEMA, _KEYS, str(path))
    return dict(document)
