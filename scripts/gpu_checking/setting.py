"""What all parts of the check share: the device, the time left, data, a checkpoint and networks."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path

import torch
from lidar_like import MAX_NUM_VOXELS, synthetic_batch
from steps import CONFIGS, Workload, config_of

from cpq_train.common.kernels import HAS_BF16
from cpq_train.data.dataset import Batch
from cpq_train.models import NetworkConfig

ROOT = Path(__file__).resolve().parents[2]
FLOAT_CHECKPOINT = ROOT / "checkpoints" / "quickstart_float.ckpt"

SMALL_NETWORK = NetworkConfig(
    voxel_size=(0.8, 0.8, 0.32),
    backbone_3d_channels=(8, 8, 8, 8),
    backbone_3d_num_blocks=(1, 1, 1, 1),
    backbone_3d_out_channels=8,
    backbone_2d_num_layers=(1, 1),
    backbone_2d_channels=(8, 8),
    upsample_channels=(8, 8),
    head_channels=8,
)
"""In the place of the full one where the device is the CPU."""

LONGEST_PROCESS_S = 150.0
"""One that hangs leaves the others time."""

_QUICKSTART = ("-c", CONFIGS / "quickstart_float.yaml", "-c", CONFIGS / "quickstart_qat.yaml")
_COARSE = ("--model.network.voxel_size", "[0.64, 0.64, 0.32]", "--data.num_sweeps", "1")
"""Of the quickstart network where the device is the CPU."""


class Setting:
    """A run of the check.

    Args:
        device: cpu, where everything is small, or cuda.
        folder: For data, checkpoints and runs; an empty one.
        budget_s: Seconds from now on after which no part begins.

    Attributes:
        is_small: Whether it is there to see that the check runs, not to measure.
        num_rounds: Of what is timed.
        batch_sizes: Of the full network.
    """

    def __init__(self, device: str, folder: Path, budget_s: float) -> None:
        self.device, self.folder = device, folder
        self.is_small = device == "cpu"
        self.num_rounds = 1 if self.is_small else 12
        self.batch_sizes = (2,) if self.is_small else (1, 4)
        self._end_s = time.monotonic() + budget_s

    def seconds_left(self) -> float:
        """Until the budget is spent."""
        return self._end_s - time.monotonic()

    @property
    def has_bf16(self) -> bool:
        """Whether the device multiplies numbers in bf16."""
        return self.device == "cuda" or HAS_BF16

    @cached_property
    def config(self) -> NetworkConfig:
        """Sizes of the full network."""
        return SMALL_NETWORK if self.is_small else config_of("full")[0]

    @cached_property
    def work(self) -> Workload:
        """The full network in every arm, with drawn weights, on one sample."""
        torch.manual_seed(0)
        return Workload.of(self.config, self._batch(1), self.device).with_learned_ranges()

    def work_on(self, batch_size: int) -> Workload:
        """The same networks on that many samples."""
        return self.work if batch_size == 1 else self.work.on(self._batch(batch_size))

    def _batch(self, batch_size: int) -> Batch:
        num_sweeps, most = (1, 600) if self.is_small else (config_of("full")[1], MAX_NUM_VOXELS)
        return synthetic_batch(self.config, num_sweeps, batch_size, most)

    @cached_property
    def data(self) -> Path:
        """A simulated data set."""
        root = self.folder / "data"
        scenes, val_scenes, samples = (4, 1, 2) if self.is_small else (8, 2, 4)
        sizes = ("--num_scenes", scenes, "--num_val_scenes", val_scenes, "--num_samples_per_scene", samples)
        workers = ("--num_workers", 1) if self.is_small else ()
        self.verb("simulate", "--output", root, "--version", "v1.0-trainval", *sizes, "--seed", 1, *workers)
        return root

    @cached_property
    def ptq(self) -> Path:
        """The quickstart's float checkpoint, calibrated on the device."""
        output = self.folder / "ptq.ckpt"
        self.verb("calibrate", *self.quickstart(FLOAT_CHECKPOINT), "--output", output)
        return output

    def quickstart(self, weights: Path, num_devices: int = 1) -> list[object]:
        """Options of a verb that runs the quickstart network on the simulated data."""
        accelerator = "cpu" if self.is_small else "gpu"
        return [
            *_QUICKSTART,
            *(_COARSE if self.is_small else ()),
            *("--data.root", self.data, "--model.weights", weights, "--data.num_calibration_samples", 4),
            *("--trainer.accelerator", accelerator, "--trainer.devices", num_devices),
            *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        ]

    def verb(self, *arguments: object) -> float:
        """Run `python -m cpq_train` in a process of its own.

        Returns:
            Seconds that it took, its start included.

        Raises:
            RuntimeError: It ended with another code than 0; has the end of what it said.
        """
        return self.process("cpq_train", *arguments)

    def process(self, module: str, *arguments: object) -> float:
        """Run a module in a process of its own; see `verb`."""
        given = [str(argument) for argument in arguments]
        start_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", module, *given],
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=max(min(self.seconds_left(), LONGEST_PROCESS_S), 1.0),
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{module} {given[0]} ended with code {done.returncode}: {_why(done)}")
        return time.perf_counter() - start_s

    def without_paths(self, text: str) -> str:
        """A text without the names of this machine's folders, which a record should not have."""
        for folder in (self.folder, ROOT, Path(sys.prefix), Path.home()):
            text = text.replace(f"{folder}/", "")
        return text


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """What a process said from its last error on, or else at its end."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    errors = [number for number, line in enumerate(lines) if "error" in line.lower()]
    return "\n".join(lines[errors[-1] if errors else -5 :])[:400]
