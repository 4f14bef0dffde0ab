"""The network of `schema_2/own.ckpt`, which the library wrote; run as a program it writes it again."""

from __future__ import annotations

from pathlib import Path

import spconv.pytorch as spconv
import torch
from spconv.core import ConvAlgo
from torch import Tensor, nn

import cpq_train as cpq

FOLDER = Path(__file__).parent / "schema_2"


class OwnNetwork(nn.Module):
    """Sparse layers with an inverse, a dense part with all that its wiring can say of it."""

    def __init__(self) -> None:
        super().__init__()
        native = {"algo": ConvAlgo.Native, "bias": False}
        self.fine = spconv.SubMConv3d(4, 8, 3, indice_key="fine", **native)
        self.fine_norm = nn.BatchNorm1d(8)
        self.down = spconv.SparseConv3d(8, 8, 3, 2, 1, indice_key="down", **native)
        self.up = spconv.SparseInverseConv3d(8, 8, 3, indice_key="down", **native)
        self.norm_first = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.reused = nn.Conv2d(8, 8, 1)
        self.add = cpq.ResidualAdd()
        self.unused = nn.Conv1d(3, 3, 3)
        self.scale = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, features: Tensor, coords: Tensor) -> Tensor:
        """(V, 4), (V, 4) on a grid of 8 x 8 x 8 -> (1, 3)."""
        x = self.fine(spconv.SparseConvTensor(features, coords, [8, 8, 8], 1))
        x = self.up(self.down(x.replace_feature(torch.relu(self.fine_norm(x.features)))))
        image = self.norm_first(x.dense().amax(2))
        branch = self.norm(self.grouped(image))
        image = self.reused(self.reused(self.add(branch, image)))
        return self.head(self.scale(image.mean((2, 3))))


def voxels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    cells = torch.unique(torch.randint(0, 8, (60, 3), generator=generator), dim=0)
    coords = torch.cat([torch.zeros(len(cells), 1), cells], 1).int()
    return torch.randn(len(coords), 4, generator=generator), coords


def main() -> None:
    torch.manual_seed(0)
    network = OwnNetwork()
    scheme = cpq.Scheme.from_dict(
        {"name": "w4a8", "on_reuse": "one_range", "defaults": {"weight": {"bits": 4}}}
    )
    cpq.prepare(network, scheme, voxels(), fold=False)
    cpq.calibrate(network, [voxels()])
    cpq.save(network, FOLDER / "own.ckpt")
    with torch.no_grad():
        torch.save(network.eval()(*voxels()), FOLDER / "own_output.pt")


if __name__ == "__main__":
    main()
