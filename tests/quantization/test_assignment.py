"""Bits within a budget: the exact optimum, checked against every combination."""

from itertools import product
from math import fsum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpq_train.common.errors import UserError
from cpq_train.quantization.bits.assignment import Choice, assign, total

# From losses that hardly matter to ones that decide everything; costs from nothing to a whole level.
LOSSES = st.one_of(st.just(0.0), st.floats(1e-7, 10.0))
COSTS = st.one_of(st.integers(0, 40).map(float), st.floats(1e-6, 1e3))
OPTIONS = st.dictionaries(
    st.sampled_from(["float", "W8", "W4", "W2"]), st.builds(Choice, LOSSES, COSTS), min_size=1
)
PROBLEMS = st.dictionaries(st.text("abc", min_size=1, max_size=3), OPTIONS, min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(PROBLEMS, st.floats(0, 1))
def test_equals_brute_force(choices: dict[str, dict[str, Choice]], generosity: float) -> None:
    bounds = [
        [extreme(c.cost for c in options.values()) for options in choices.values()] for extreme in (min, max)
    ]
    least, most = map(fsum, bounds)
    budget = least + generosity * (most - least)
    combinations = (dict(zip(choices, names, strict=True)) for names in product(*choices.values()))
    affordable = [t for t in (total(choices, c) for c in combinations) if t.cost <= budget]
    found = total(choices, assign(choices, budget, "MiB"))
    assert found.cost <= budget
    assert found.loss == pytest.approx(min(t.loss for t in affordable), rel=1e-9, abs=1e-11)


def test_infeasible_budget_names_the_smallest() -> None:
    choices = {u: {"W8": Choice(0.1, 2.0), "W4": Choice(0.5, 1.0)} for u in ("a", "b")}
    assert assign(choices, 2.0, "MiB") == {"a": "W4", "b": "W4"}
    with pytest.raises(UserError, match=r"budget 1\.9 MiB cannot be met; the smallest possible is 2 MiB"):
        assign(choices, 1.9, "MiB")


def test_a_budget_far_below_a_cost() -> None:
    choices = {"a": {"float": Choice(0.0, 1.0), "W8": Choice(0.5, 0.0)}}
    assert assign(choices, 3e-231, "MiB") == {"a": "W8"}
