"""What of spconv is made when it is imported."""

import subprocess
import sys

import pytest
import spconv.core
import torch

from cpq_train.sparse.importing import importing_spconv

FIT_HELP = """
import contextlib, sys
from cpq_train.verbs.cli import main
with contextlib.suppress(SystemExit):
    main(["fit", "--help"])
import spconv.algo, spconv.core
print(len(spconv.algo.CONV.all_desps), len(spconv.algo.GEMM.static_key_to_desps), file=sys.stderr)
print(len(spconv.core.ALL_IMPGEMM_PARAMS) > 0, len(spconv.core.ALL_NATIVE_PARAMS) > 0, file=sys.stderr)
print(sorted({"wandb", "onnx", "onnxruntime", "nuscenes"} & sys.modules.keys()), file=sys.stderr)

import torch
from cpq_train.sparse import SparseConvTensor, SubMConv3d
cells = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 2]], dtype=torch.int32)
x = SparseConvTensor(torch.ones(2, 4), cells, [4, 4, 4], 1)
SubMConv3d(4, 4, 3, padding=1, indice_key="a")(x).features.sum().backward()
"""


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="of a machine without a GPU")
def test_no_tables_without_a_gpu() -> None:
    """Nor what a fit needs later; and sparse convolutions run."""
    program = [sys.executable, "-W", "ignore", "-c", FIT_HELP]
    done = subprocess.run(program, capture_output=True, text=True)
    of_triton = ("nanobind", " - ", "See https://nanobind")  # if it is installed, PyTorch imports it
    said = [line for line in done.stderr.splitlines() if not line.startswith(of_triton)]
    assert said == ["0 0", "True True", "[]"]
    assert done.returncode == 0


def _sizes() -> tuple[int, int]:
    return len(spconv.core.ALL_NATIVE_PARAMS), len(spconv.core.ALL_IMPGEMM_PARAMS)


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_tables_are_empty_only_while_importing(num_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    whole = _sizes()
    assert min(whole) > 0
    with importing_spconv():
        assert _sizes() == (whole if num_gpus else (0, 0))
    assert _sizes() == whole


def test_a_process_that_counts_gpus_can_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.is_available` would initialise CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("CUDA is initialised"))
    with importing_spconv():
        pass
