"""Which option each unit gets, so that the summed loss is least within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from math import fsum
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_matrix

from cpq_train.common.errors import UserError

_SCALE = 1e6
"""What the largest loss and the budget become, so that the solver's absolute tolerances (1e-6) are relative
ones of 1e-12."""


class Choice(NamedTuple):
    """What an option means for one unit: the loss it adds, and what it costs of the budget."""

    loss: float
    cost: float


Choices = Mapping[str, Mapping[str, Choice]]
"""Unit -> option -> what it means."""


def assign(choices: Choices, budget: float, unit_of_cost: str) -> dict[str, str]:
    """Choose one option for every unit: the multiple-choice knapsack problem, solved exactly.

    Args:
        choices: What can be chosen. Losses are finite, not negative, and taken to add up, as divergences
            of small and independent errors do.
        budget: What the chosen options may cost together.
        unit_of_cost: Of the budget, for the message.

    Returns:
        Unit -> option.

    Raises:
        UserError: Even the cheapest options cost more than the budget.
    """
    check_feasible(choices, budget, unit_of_cost)
    bound = budget
    while total(choices, assignment := _solve(choices, bound)).cost > budget:
        bound -= 1e-9 * budget  # the solver's rounding let it exceed the budget
    return assignment


def check_feasible(choices: Choices, budget: float, unit_of_cost: str) -> None:
    """Compare the budget with the cheapest options; losses do not matter.

    Raises:
        UserError: They cost more.
    """
    smallest = fsum(min(choice.cost for choice in options.values()) for options in choices.values())
    if smallest > budget:
        raise UserError(
            f"budget {budget:g} {unit_of_cost} cannot be met; the smallest possible is "
            f"{smallest:.6g} {unit_of_cost}"
        )


def total(choices: Choices, assignment: Mapping[str, str]) -> Choice:
    """Summed loss and cost of an assignment."""
    chosen = [choices[unit][option] for unit, option in assignment.items()]
    return Choice(fsum(c.loss for c in chosen), fsum(c.cost for c in chosen))


def _solve(choices: Choices, bound: float) -> dict[str, str]:
    flat = list(chain.from_iterable(options.values() for options in choices.values()))
    losses, costs = np.array(flat, float).T
    one_each = block_diag([np.ones((1, len(options))) for options in choices.values()])
    # What costs more than the budget is out at twice it too; the solver takes huge numbers for infinite.
    in_budget = csr_matrix(np.minimum(costs / bound, 2.0) * _SCALE if bound else costs)
    result = milp(
        losses * (_SCALE / (losses.max() or 1.0)),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(in_budget, -np.inf, _SCALE if bound else 0.0),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, result.message
    picks = iter(result.x)
    return {unit: max(options, key=lambda _: next(picks)) for unit, options in choices.items()}
