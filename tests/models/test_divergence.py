"""The distance of head outputs against their definitions."""

import pytest
import torch
from torch import Tensor

from cpq_train.models.divergence import output_distance

CODE_WEIGHTS = (1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
CHANNELS = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2, "hm": 2}


def _heads(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, c, 4, 3, generator=generator) for name, c in CHANNELS.items()}


def test_equal_outputs_have_no_distance() -> None:
    heads = _heads(0)
    distance = output_distance([([heads], [heads])], CODE_WEIGHTS)
    assert (distance.heatmap, distance.boxes) == (0.0, 0.0)
    assert distance.sqnr_db == pytest.approx(138.5, abs=0.1)  # 2^-23 of the amplitude


def test_definitions() -> None:
    reference, output = _heads(0), _heads(1)
    p, q = (h["hm"].double().sigmoid() for h in (reference, output))
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    distance = output_distance([([reference], [output])], CODE_WEIGHTS)
    assert distance.heatmap == pytest.approx(float((p * kl).sum() / p.sum()), rel=1e-12)
    code = [torch.cat([h[n] for n in CHANNELS if n != "hm"], 1).double() for h in (reference, output)]
    square = ((code[0] - code[1]) ** 2 * torch.tensor(CODE_WEIGHTS)[:, None, None]).sum(1) / 2
    weight = p.amax(1)
    assert distance.boxes == pytest.approx(float((weight * square).sum() / weight.sum()), rel=1e-6)


def test_ten_times_the_noise_is_20_db() -> None:
    reference, noise = _heads(0), _heads(1)
    small, large = ({n: t.double() + f * noise[n] for n, t in reference.items()} for f in (0.01, 0.1))
    sqnr = [output_distance([([reference], [h])], CODE_WEIGHTS).sqnr_db for h in (small, large)]
    assert sqnr[0] - sqnr[1] == pytest.approx(20, abs=1e-6)


def test_logits_far_out_stay_finite() -> None:
    reference, output = _heads(0), _heads(0)
    reference["hm"][0, 0, 0, 0], output["hm"][0, 0, 0, 0] = 200.0, -200.0
    distance = output_distance([([reference], [output])], CODE_WEIGHTS)
    p = reference["hm"].double().sigmoid()
    assert distance.heatmap == pytest.approx(200 / float(p.sum()), rel=1e-9)
