"""All parts of the check in the order in which they run, and the bounds of their figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from results import Cell, Row
from steps import FLOAT_BF16, LEARNED, QAT

from gpu_checking import costs, counts, graph, numbers, runs
from gpu_checking.guard import Part

_TESTS = (
    "The tests that are marked `cuda` (`pytest -m cuda`): kernels, codes, targets, decoding and NMS on "
    "the GPU against the CPU."
)
_QUICKSTART = (
    "`python -m cpq_train verify --device cuda` of the quickstart checkpoint, calibrated on the GPU: "
    "codes and sums of every integer layer on the GPU against NumPy's whole numbers, then the network "
    "end to end. None may differ."
)
_FULL = "The same of the network at 0.1 m: drawn weights, ranges from a made-up sample of ten sweeps."
_CODES = (
    "The same network and sample on the CPU and on the GPU: codes that each layer reads, matched by "
    "voxel. Between them are one float layer and float scales, whose last bits may turn a code beside a "
    "tie: at the most 1e-4 of them, by one step. Layers without a difference are in the first row "
    "alone."
)
_STEPS = (
    "Forward and backward of the network at 0.1 m with fixed gradients at its outputs, by CUDA events; "
    "arms take turns, a ratio is taken within a round; median, smallest and largest. `QAT bf16`: float "
    "layers in bf16, gradients of quantized layers too. `pytorch-quantization`: its layers, around "
    "spconv as NVIDIA's CenterPoint has them."
)
_MEMORY = (
    "Of the same steps, above what was allocated before: the peak, and what the forward pass keeps for "
    "backward."
)
_COUNTS = (
    "The third step of a fit of the quickstart network, from its batch on the device to the optimizer's "
    "step: operators that PyTorch dispatches (a kernel of this project's own is one; spconv's are "
    "none), and places where the host waits for the device, as `torch.cuda.set_sync_debug_mode` tells "
    "them. Rulebooks return their sizes to the host and count apart; waits inside spconv's own library "
    "are not told."
)
_DECODING = "The same of decoding and NMS of a batch at 0.1 m, from raw outputs to boxes, and its time."
_GRAPH = (
    "Forward and backward of BEV backbone and head of the QAT network, captured as one CUDA graph and "
    "replayed on another map: outputs and gradients have to equal eager's."
)
_FIT = (
    "`fit` of the quickstart network (QAT) on simulated samples with two loading workers, by the "
    "command line: steps per second and the share of the time that waits for data, over its second "
    "half."
)
_PROFILE = "`profile` of the checkpoint of that fit: an evaluation pass with one sample, and a training step."
_RANKS = (
    "`calibrate` and `validate` of the quickstart network on one GPU and on all of the machine: whole "
    "commands, their start included."
)
PARTS = (
    Part("cuda_tests", "CUDA tests", _TESTS, numbers.cuda_tests),
    Part("verify_quickstart", "verify, quickstart", _QUICKSTART, numbers.verify_quickstart),
    Part("verify_full", "verify, full size", _FULL, numbers.verify_full),
    Part("codes", "Codes of CPU and GPU", _CODES, numbers.codes_of_both),
    Part("steps", "Steps", _STEPS, costs.time_steps),
    Part("memory", "Memory", _MEMORY, costs.weigh_steps),
    Part("counts", "Operators and waits of a step", _COUNTS, counts.count_steps),
    Part("decoding", "Decoding and NMS", _DECODING, counts.count_decoding),
    Part("fit", "A short fit", _FIT, runs.short_fit),
    Part("profile", "Its profile", _PROFILE, runs.profile_of_fit),
    Part("ranks", "Several GPUs", _RANKS, runs.several_ranks),
    # Last of what runs in this process: a capture that fails leaves a device that may refuse further work.
    Part("graph", "CUDA graph", _GRAPH, graph.capture_dense),
)


@dataclass(frozen=True)
class Bound:
    """What a figure may be at the most.

    Attributes:
        title: What it is.
        part: Whose rows have it.
        limit: The largest value accepted.
        figure: The value, of rows of the part; the worst where there are several.
    """

    title: str
    part: str
    limit: float
    figure: Callable[[Sequence[Row]], float]


def _worst(column: str, *arms: str) -> Callable[[Sequence[Row]], float]:
    """Of a column, over the rows of some arms; no arm means all rows."""

    def worst(rows: Sequence[Row]) -> float:
        return max(_number(row[column]) for row in rows if not arms or row["arm"] in arms)

    return worst


def _number(cell: Cell) -> float:
    value = cell["median"] if isinstance(cell, dict) else cell
    assert isinstance(value, int | float)
    return value


BOUNDS = (
    Bound("QAT step / float bf16 step", "steps", 1.2, _worst(f"/ {FLOAT_BF16}", QAT)),
    Bound("operators of a QAT step / float step", "counts", 1.3, _worst("/ float", QAT)),
    Bound("the same with learned ranges", "counts", 1.5, _worst("/ float", LEARNED)),
    Bound("waits of a training step, rulebooks aside", "counts", 1, _worst("waits")),
    Bound("waits of decoding and NMS of a batch", "decoding", 3, _worst("waits")),
)
