"""Two ranks train as one: the same losses, weights, ranges and samples."""

from typing import Any

import pytest
import torch
from tiny_fit import Fit, run_in_a_process

CLIPPED = {"gradient_clip_val": 10.0}
FITS = [
    Fit("two", num_ranks=2, batch_size=2, trainer=CLIPPED),
    Fit("apart", num_ranks=2, batch_size=2, num_steps=8, trainer=CLIPPED, sums_over_ranks=False),
    Fit("two_taught", num_ranks=2, batch_size=2, num_steps=8, distill=True),
    Fit("two_trained_bn", num_ranks=2, batch_size=2, num_steps=2, arm="float"),
    Fit("two_learned", num_ranks=2, batch_size=2, num_steps=4, ranges={"amax": "learned"}),
    # Behind the forked ones: a process that ran a backward pass cannot be forked.
    Fit("one", trainer=CLIPPED),
    Fit("one_taught", num_steps=8, distill=True),
]


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What every rank of every fit recorded."""
    return run_in_a_process(FITS, tmp_path_factory.mktemp("fits"))


def _curve(of_rank: dict[str, Any], name: str = "train/loss") -> torch.Tensor:
    return torch.tensor([logged[name] for logged in of_rank["logged"]])


@pytest.mark.parametrize("name", ["", "_taught"])
def test_loss_curves_agree(fits: dict[str, list[dict[str, Any]]], name: str) -> None:
    """All parts of the loss, as either rank logs them, are those of one rank with the whole batch."""
    (one,) = fits[f"one{name}"]
    assert len(one["logged"]) == (8 if name else 50)
    for two in fits[f"two{name}"]:
        for part in one["logged"][0]:
            if part != "train/grad_norm":
                torch.testing.assert_close(_curve(two, part), _curve(one, part), rtol=0, atol=1e-4)
        norms = [_curve(fit, "train/grad_norm")[:4] for fit in (two, one)]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)  # gradients are summed in another order


@pytest.mark.parametrize("name", ["", "_taught"])
def test_final_weights_agree(fits: dict[str, list[dict[str, Any]]], name: str) -> None:
    (one,), (first, second) = fits[f"one{name}"], fits[f"two{name}"]
    for key, value in one["state"].items():
        assert torch.equal(first["state"][key], second["state"][key])
        torch.testing.assert_close(first["state"][key], value, rtol=0, atol=3e-5)


def test_without_the_sum_over_ranks_they_would_not(fits: dict[str, list[dict[str, Any]]]) -> None:
    (one,), apart = fits["one"], fits["apart"]
    mean = torch.stack([_curve(of_rank) for of_rank in apart]).mean(0)
    assert (mean - _curve(one)[:8]).abs().max() > 1
    norms = [_curve(fit, "train/grad_norm")[0] for fit in (one, apart[0])]
    assert abs(norms[0] / norms[1] - 1) > 0.05  # 1e-5 with the sum


def test_ranks_share_out_the_samples(fits: dict[str, list[dict[str, Any]]]) -> None:
    """A step's samples over both ranks are those of one rank, and no rank sees another's."""
    (one,), two = fits["one"], fits["two"]
    for whole, *parts in zip(one["batches"], *(of_rank["batches"] for of_rank in two), strict=True):
        assert sorted(whole) == sorted(parts[0] + parts[1])
        assert len(set(whole)) == 4


def test_ddp_leaves_the_ranges_alone(fits: dict[str, list[dict[str, Any]]]) -> None:
    for of_rank in fits["two"]:
        assert of_rank["sends_buffers"] is False
        assert of_rank["versions"][0] == of_rank["versions"][-1]
    for of_rank in fits["two_trained_bn"]:
        assert of_rank["sends_buffers"] is True


def test_every_range_is_learned(fits: dict[str, list[dict[str, Any]]]) -> None:
    """DDP waits for every parameter: a range without a gradient would have ended the fit."""
    start, end = fits["two"][0]["state"], fits["two_learned"][0]["state"]
    ranges = [name for name in start if name.endswith("quantizer._amax")]
    moved = [name for name in ranges if (end[name] / start[name] - 1).abs().max() > 1e-4]
    assert len(moved) > 0.5 * len(ranges)  # the gradients of an untrained network vanish towards its input
