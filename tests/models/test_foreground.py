"""Errors of head outputs that count where there are objects."""

import torch
from torch import Tensor

from cpq_train.models.center_head import BOX_BRANCHES
from cpq_train.models.foreground import foreground_error, foreground_weight


def _heads(probability: dict[tuple[int, int, int], float]) -> list[dict[str, Tensor]]:
    """One head of two classes on a 3 x 3 map; (class, row, column) -> probability, elsewhere 0.01."""
    heat = torch.full((1, 2, 3, 3), 0.01)
    for (channel, row, column), value in probability.items():
        heat[0, channel, row, column] = value
    boxes = {name: torch.zeros(1, size, 3, 3) for name, size in BOX_BRANCHES.items()}
    return [{**boxes, "hm": torch.logit(heat)}]


def test_weight_is_the_best_probability_above_the_threshold() -> None:
    (weight,) = foreground_weight(_heads({(0, 1, 1): 0.8, (1, 1, 1): 0.5, (1, 0, 2): 0.05}))
    expected = torch.zeros(1, 1, 3, 3)
    expected[0, 0, 1, 1] = 0.8
    torch.testing.assert_close(weight, expected)


def test_error_by_hand() -> None:
    wanted = _heads({(0, 1, 1): 0.8, (1, 2, 2): 0.2})
    judged = _heads({(0, 1, 1): 0.6, (1, 2, 2): 0.2, (0, 0, 0): 0.01})
    judged[0]["dim"][0, :, 2, 2] = 1.0  # three of ten numbers of the code
    judged[0]["dim"][0, :, 0, 0] = 100.0  # no object there
    expected = (0.8 * 0.2 + 0.2 * 3 / 10) / (0.8 + 0.2)
    torch.testing.assert_close(foreground_error(wanted, judged), torch.tensor(expected))


def test_equal_outputs_and_empty_maps_have_no_error() -> None:
    heads = _heads({(0, 1, 1): 0.8})
    assert foreground_error(heads, heads) == 0
    assert foreground_error(_heads({}), heads) == 0


def test_gradient_reaches_the_judged_network() -> None:
    wanted, judged = _heads({(0, 1, 1): 0.8}), _heads({(0, 1, 1): 0.5})
    judged[0]["hm"].requires_grad_()
    foreground_error(wanted, judged).backward()
    assert judged[0]["hm"].grad[0, 0, 1, 1] < 0
