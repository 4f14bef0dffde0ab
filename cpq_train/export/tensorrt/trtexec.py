"""The command that builds an engine of a TensorRT file.

Its flags are those of trtexec 10.0 to 10.16 (NVIDIA/TensorRT, samples/common/sampleOptions.cpp at each tag).
11.0 takes the same line: types are always strong there, and --stronglyTyped does nothing.
"""

from __future__ import annotations

import shlex
from pathlib import Path


def trtexec_line(file: Path) -> str:
    """What to type where TensorRT is; the engine lies beside the file.

    Ends are float32, row by row, which is the default of --inputIOFormats and --outputIOFormats. Saying fp16
    there ends the build: with strong types it has to be the type in the file (10.15,
    samples/common/sampleEngines.cpp), and 11.0 has no types in these flags.

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
