"""Networks of others: prepared, calibrated, trained, saved, loaded in a fresh process, proved in integers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn

import cpq_train as cpq

SCHEME = cpq.Scheme.from_dict({"name": "int8", "defaults": {"input": {"method": "mse"}}})


def _float_network(name: str) -> nn.Module:
    """One that was trained for a while, as far as BatchNorm can tell."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]()
    generator = torch.Generator().manual_seed(1)
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.uniform_(-0.3, 0.3, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    return network


def _arguments(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def _trained(name: str, network: nn.Module, num_steps: int = 3) -> nn.Module:
    _, batch_of, loss_of = NETWORKS[name]
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    network.train()
    for step in range(num_steps):
        out = network(*_arguments(batch_of(step)))
        loss_of(out, torch.arange(len(out)) % out.shape[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


@torch.no_grad()
def _output(network: nn.Module, batch: Any) -> Tensor:
    return network(*_arguments(batch))


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_whole_road(name: str, fold: bool, tmp_path: Path) -> None:
    new, batch_of, _ = NETWORKS[name]
    network = _float_network(name)
    expected = _output(network.eval(), batch_of(0))
    cpq.prepare(network, SCHEME, batch_of(0), fold=fold)
    assert cpq.coverage(network).left_in_float == {}
    cpq.calibrate(network, [batch_of(seed) for seed in range(3)])
    found = _output(network.eval(), batch_of(0))
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()

    cpq.save(network, tmp_path / "ptq.ckpt")
    _trained(name, network)
    trained = _output(network, batch_of(7))
    assert not torch.equal(trained, _output(cpq.load(tmp_path / "ptq.ckpt", new()).eval(), batch_of(7)))
    if not fold:
        cpq.save(network, tmp_path / "kept.ckpt")
        assert torch.equal(_output(cpq.load(tmp_path / "kept.ckpt", new()).eval(), batch_of(7)), trained)
        cpq.fold(network)
        folded = _output(network, batch_of(7))
        assert (folded - trained).norm() < 0.05 * trained.norm()
        trained = folded
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())

    reports = cpq.verify(network, batch_of(8))
    assert len(reports) == sum(total for _, total in cpq.coverage(network).counts.values())
    assert all(report.num_sums and not report.not_covered for report in reports)
    assert sum(report.num_mismatched for report in reports) == 0

    cpq.save(network, tmp_path / "qat.ckpt")
    arms = {f: torch.load(tmp_path / f"{f}.ckpt")["quantization"]["arm"] for f in ("ptq", "qat")}
    assert arms == {"ptq": "ptq", "qat": "qat"}
    assert torch.equal(_in_a_fresh_process(name, tmp_path), trained)


FRESH = """
import sys, torch, cpq_train
from networks import NETWORKS
name, folder = sys.argv[1:]
new, batch_of, _ = NETWORKS[name]
network = cpq_train.load(f"{folder}/qat.ckpt", new()).eval()
batch = batch_of(7)
with torch.no_grad():
    torch.save(network(*batch) if isinstance(batch, tuple) else network(batch), f"{folder}/output.pt")
"""


def _in_a_fresh_process(name: str, folder: Path) -> Tensor:
    here = str(Path(__file__).parent)
    program = f"import sys; sys.path.insert(0, {here!r})\n{FRESH}"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, name, str(folder)], check=True, timeout=120
    )
    return torch.load(folder / "output.pt")
