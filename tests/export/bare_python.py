"""A Python that finds its standard library, numpy, onnxruntime and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import cpq_train.export

RUNTIME = Path(cpq_train.export.__file__).parent / "deployed_detector.py"
"""The file that a user copies."""
_PACKAGES = ("numpy", "onnxruntime")


class BarePython:
    """Runs the copied runtime in a folder of its own.

    Args:
        folder: an empty folder; the packages are linked and the runtime is copied into it.

    Attributes:
        runtime: the copy.
    """

    def __init__(self, folder: Path) -> None:
        packages = folder / "packages"
        packages.mkdir()
        for name in _PACKAGES:
            spec = find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            home = Path(spec.origin).parent
            libraries = home.with_name(f"{name}.libs")  # shared libraries that a wheel brings
            for path in (home, *([libraries] if libraries.is_dir() else [])):
                (packages / path.name).symlink_to(path)
        self.runtime = folder / RUNTIME.name
        shutil.copy(RUNTIME, self.runtime)
        self._folder = folder
        self._environment = {
            "PATH": os.defpath,
            "PYTHONPATH": str(packages),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def __call__(self, arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        """Runs `python -S` with these arguments; the exit code is not checked."""
        command = [sys.executable, "-S", *map(str, arguments)]
        return subprocess.run(
            command, cwd=self._folder, env=self._environment, capture_output=True, text=True, timeout=300
        )

    def detect(self, arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        """Runs the copied runtime's command line on one thread."""
        return self([self.runtime, *arguments, "--num_threads", "1"])
