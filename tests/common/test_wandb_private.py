"""The installed W&B still has the private member that we use."""

import inspect
from unittest.mock import create_autospec

import wandb

from cpq_train.common.wandb_private import use_offline


def test_log_artifact() -> None:
    method = getattr(wandb.Run, "_log_artifact", None)
    assert method is not None, "W&B's Run has no _log_artifact any more"
    used = {"aliases", "is_user_created", "use_after_commit"}
    assert used <= inspect.signature(method).parameters.keys(), "Run._log_artifact has other parameters"


def test_an_offline_run_uses_an_artifact() -> None:
    run, artifact = create_autospec(wandb.Run), wandb.Artifact("a", type="model")
    use_offline(run, artifact)
    run._log_artifact.assert_called_once_with(
        artifact, aliases=[], is_user_created=True, use_after_commit=True
    )
