"""A fit of two ranks on a GPU's path, of which one computes a loss that is no number; a program."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from cpq_train.common.kernels import as_on_gpu
from tests.tiny_fit import Fit, run

BROKEN_STEP = 2


class Break(Callback):
    """Breaks a step of rank 1; keeps the weights from before each step of every rank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        torch.save(dict(module.named_parameters()), self._folder / f"{trainer.global_rank}_{index}.pt")
        if (trainer.global_rank, index) == (1, BROKEN_STEP):
            layer = module.network.get_submodule("backbone_2d.deblocks.0.0")  # type: ignore[union-attr]
            layer.register_forward_hook(lambda module, inputs, output: output * torch.nan)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with as_on_gpu():
        run(Fit("two", num_ranks=2, num_steps=5), Path(sys.argv[1]), Break(Path(sys.argv[1])))
