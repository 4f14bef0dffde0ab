"""`latency.json`: what one pass of several networks takes, measured in turn; the file that `compare` reads.

Imports no torch, as `compare` does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from cpq_train.common.arm_names import Row
from cpq_train.common.documents import read_json, sealed, unsealed
from cpq_train.common.files import write_whole
from cpq_train.common.schema import CountAboveZero, accepts, check_document, keys, list_of

SCHEMA = 1
LATENCY_FILE = "latency.json"

FLOAT_IN_PYTORCH = "PyTorch, float"
FAKE_IN_PYTORCH = "PyTorch, fake quantization"
"""What a quantized network is while it is trained: `runs_as` of its row."""

_LONGEST_MS = 1e9
_Time = Annotated[float, Field(strict=True, gt=0, le=_LONGEST_MS), accepts("a finite number above 0")]
_ROW = keys(
    {
        **dict.fromkeys(("name", "file", "sha256", "runs_as"), str),
        "arm": Row,
        **dict.fromkeys(("ms", "min_ms", "max_ms"), _Time),
        "cpu_ms": Annotated[
            float, Field(strict=True, ge=0, le=_LONGEST_MS), accepts("a finite number from 0 on")
        ],
        "summary": dict[str, Any],
    }
)
_KIND = TypeAdapter(
    keys(
        {
            **dict.fromkeys(("input", "device", "torch"), str),
            **dict.fromkeys(("num_points", "num_voxels", "num_threads", "num_passes"), CountAboveZero),
            "rows": list_of(_ROW),
        }
    )
)


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
    check_document(document, SCHEMA, _KIND, str(path))
    write_whole(path, json.dumps(sealed(document), indent=2, allow_nan=False) + "\n")


def read_latency(path: Path) -> dict[str, Any]:
    """Read and check the file.

    Raises:
        UserError: It is absent, damaged, no JSON, or not as the schema has it.
    """
    document = read_json(path, "latency file")
    check_document(document, SCHEMA, _KIND, str(path))
    return unsealed(document, f"latency file {str(path)!r}")
