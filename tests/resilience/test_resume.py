"""A run that dies in any step ends, once resumed, with the bits of one that never did."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest_failure import Killed, Options, assert_equal, weights

from cpq_train.verbs.cli import main

POLICIES = {
    "moving": (
        *("--model.ranges.amax", "moving", "--model.ranges.every_num_steps", "2"),
        *("--trainer.val_check_interval", "2"),
    ),
    "moving_accumulated": ("--model.ranges.amax", "moving", "--trainer.accumulate_grad_batches", "2"),
    "learned_with_workers": ("--model.ranges.amax", "learned", "--data.num_workers", "2"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_death(
    policy: str, fit_options: Options, kill_in_step: Callable[[int], None], tmp_path: Path
) -> None:
    more = POLICIES[policy]
    main(fit_options(tmp_path / "whole", *more))
    killed = fit_options(tmp_path / "killed", *more)
    for step in (3, 4):
        kill_in_step(step)
        with pytest.raises(Killed):
            main(killed)
    main(killed)
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
