"""What a file is that another project may have written, and the command that converts it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import get_args

from cpq_train.common.errors import UserError
from cpq_train.interop.conventions import Source, sources_of
from cpq_train.interop.foreign_file import read_foreign, stated_mmdet3d_version
from cpq_train.interop.weight_sets import weight_sets

SOURCES: tuple[str, ...] = get_args(Source)


def conversion_advice(path: Path) -> str:
    """What a file is as far as its names tell, and how to convert it; nothing in it is run."""
    try:
        content = read_foreign(path)
    except UserError:
        return (
            "save its state_dict() alone where its classes are at home, and take that file "
            f"(convert reads those of {', '.join(SOURCES)})"
        )
    try:
        sets = weight_sets(content, path)
    except UserError:
        return "nor has it weights where `convert` looks for those of " + ", ".join(SOURCES)
    names = sets[0].state
    sources = sorted(sources_of(names))
    if len(sources) != 1:
        seen = " and ".join(sources) or f"none that `convert` knows, which are {', '.join(SOURCES)}"
        return f"its tensors ({next(iter(names))}, ...) have the names of {seen}"
    notes = []
    options = ["--source", sources[0]]
    if sources[0] == "mmdet3d":
        version = stated_mmdet3d_version(content)
        options += ["--mmdet3d_version", str(1 if version is None else version)]
        notes += ["0 where mmdetection3d 0.x trained it"] if version is None else []
    if sets[0].name is not None:
        options += ["--weights", sets[0].name]
        notes += ["it holds raw and ema weights"]
    said = f" ({'; '.join(notes)})" if notes else ""
    return f"its names are those of {sources[0]}; convert it first: {_command(path, options)}{said}"


def _command(path: Path, options: list[str]) -> str:
    output = path.with_suffix(".ckpt")
    output = output if output != path else path.with_name(f"{path.stem}-converted.ckpt")
    return shlex.join(
        ["python", "-m", "cpq_train", "convert", *options, "--input", str(path), "--output", str(output)]
    )
