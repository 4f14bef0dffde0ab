"""Batch statistics over all ranks: what `trainer.sync_batchnorm` makes of our modules."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from tiny_fit import NETWORK, DrawnData, Fit, float_checkpoint, run_in_a_process
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.data.dataset import collate
from cpq_train.quantization.batchnorm import (
    fold_batchnorm,
    joins_batches_of_ranks,
    trains_on_parts_of_a_batch,
)
from cpq_train.training.detector import CenterPointDetector

NewDetector = Callable[[str], CenterPointDetector]


@pytest.fixture
def new_detector(tmp_path: Path) -> NewDetector:
    """The detector of a policy of BatchNorm: `float`, or the qat arm with it `trained` or `frozen`."""

    def new(policy: str) -> CenterPointDetector:
        kept: dict[str, Any] = {"arm": "float"}
        if policy != "float":
            kept = {"arm": "qat", "scheme": "configs/schemes/int8.yaml", "batchnorm": policy}
        detector = CenterPointDetector(NETWORK, weights=str(float_checkpoint(tmp_path)), **kept)
        detector.configure_model()
        if policy != "float":
            detector.trainer = SimpleNamespace(is_global_zero=False, world_size=1)
            detector.calibrate(DrawnData(2, 4))
        return detector.train()

    return new


@torch.no_grad()
def _norms(network: nn.Module) -> list[str]:
    return [n for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _outputs(detector: CenterPointDetector) -> list[Tensor]:
    batch = collate([DrawnData(2, 8)[i] for i in range(3)])
    return [value for head in detector(batch) for value in head.values()]


def _converted(detector: CenterPointDetector) -> CenterPointDetector:
    """As Lightning's strategy does it when a fit starts."""
    synced = TorchSyncBatchNorm().apply(detector)
    assert isinstance(synced, CenterPointDetector)
    return synced


@pytest.mark.parametrize("policy", ["float", "trained", "frozen"])
def test_every_batchnorm_is_converted_in_its_place(policy: str, new_detector: NewDetector) -> None:
    detector = new_detector(policy)
    names = _norms(detector.network)
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    expected = _outputs(detector)
    detector.load_state_dict(state)  # trained statistics have moved
    synced = _converted(detector)
    norms = [m for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == len(names) > 20
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert _norms(synced.network) == names
    assert list(synced.state_dict()) == list(state)
    assert not trains_on_parts_of_a_batch(synced.network)
    assert joins_batches_of_ranks(synced.network) == (policy != "frozen")
    assert all(m.training == (policy != "frozen") for m in norms)
    for one, other in zip(_outputs(synced), expected, strict=True):  # without ranks it is plain BatchNorm
        assert torch.equal(one, other)


def test_a_synced_batchnorm_folds(new_detector: NewDetector) -> None:
    synced = _converted(new_detector("trained")).eval()
    expected = _outputs(synced)
    fold_batchnorm(synced.network, synced.subject.wiring.folds)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in synced.modules())
    for one, other in zip(_outputs(synced), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


def test_refused_on_a_cpu_before_it_trains(new_detector: NewDetector) -> None:
    synced = _converted(new_detector("float"))
    synced.trainer = SimpleNamespace(is_global_zero=False, world_size=2)
    with pytest.raises(UserError, match=r"sync_batchnorm is true on cpu; accepted: false, or CUDA"):
        synced.on_fit_start()


@pytest.mark.cuda(num_devices=2)
@pytest.mark.parametrize("arm", ["float", "qat"])
def test_two_devices_train_as_one(arm: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "arm": arm,
        "num_steps": 10,
        "accelerator": "gpu",
        "batchnorm": None if arm == "float" else "trained",
        "trainer": {"sync_batchnorm": True},
    }
    fits = [Fit("two", num_ranks=2, batch_size=2, **settings), Fit("one", **settings)]
    recorded = run_in_a_process(fits, tmp_path)
    curves = [
        torch.tensor([logged["train/loss"] for logged in of_ranks[0]["logged"]])
        for of_ranks in (recorded["two"], recorded["one"])
    ]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=0)
