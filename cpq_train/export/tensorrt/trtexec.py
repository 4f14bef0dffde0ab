"""The command that builds an engine of a TensorRT file.

Its flags are those of trtexec 10.0 to 10.16 (NVIDIA/TensorRT, samples/common/sampleOptions.cpp at each tag).
11.0 takes the same line: types are always strong there, and --stronglyTyped does nothing.
"""

from __future__ import annotations

import shlex
from pathlib import Path


def trtexec_line(file: Path) -> str:
    """What to type where TensorRT is; the engine lies beside the file.

    Ends are float32, row by row, which is the default of --inputIOFormats and --outputIOFormats. fp16
    there is no way to an fp16 map: with strong types 10.15 and 10.16 end the build unless the file has that
    type (samples/common/sampleEngines.cpp), releases before them overwrite the type of the input and leave
    the nodes behind it as they are, and 11.0 knows layouts only.

    Args:
        file: Of `model_of`.
    """
    return shlex.join(
        [
            "trtexec",
            f"--onnx={file}",
            f"--saveEngine={file.with_suffix('.engine')}",
            "--stronglyTyped",  # types as in the file; --int8 and --fp16 have no place beside it
            "--noTF32",  # else fp32 layers round their factors to 10 bits (NvInfer.h, BuilderFlag::kTF32)
        ]
    )
