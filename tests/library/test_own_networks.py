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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_whole_road(name: str, fold: bool, tmp_path: Path, folder: Path) -> None:
    """Its end, a checkpoint and what its network puts out, is left in `folder`."""
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

    file = folder / f"{name}-{fold}.ckpt"
    cpq.save(network, file)
    arms = [torch.load(path)["quantization"]["arm"] for path in (tmp_path / "ptq.ckpt", file)]
    assert arms == ["ptq", "qat"]
    torch.save(trained, file.with_suffix(".expected"))


FRESH = """
from pathlib import Path
import sys, torch, cpq_train
from networks import NETWORKS
for file in Path(sys.argv[1]).glob("*.ckpt"):
    new, batch_of, _ = NETWORKS[file.name.split("-")[0]]
    network, batch = cpq_train.load(file, new()).eval(), batch_of(7)
    with torch.no_grad():
        output = network(*batch) if isinstance(batch, tuple) else network(batch)
    torch.save(output, file.with_suffix(".output"))
"""


def test_a_fresh_process_has_the_same_bits(folder: Path) -> None:
    """Behind the roads, which fill the folder."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{FRESH}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(folder)], check=True, timeout=120)
    files = sorted(folder.glob("*.ckpt"))
    assert len(files) == 2 * len(NETWORKS)
    for file in files:
        outputs = [torch.load(file.with_suffix(suffix)) for suffix in (".expected", ".output")]
        assert torch.equal(*outputs), file.name
