"""The verbs: fit, validate and calibrate through LightningCLI, the others without importing Lightning."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from cpq_train.errors import UserError

LIGHTNING_VERBS = ("fit", "validate", "calibrate")
DESCRIPTION = "Quantization-aware fine-tuning of CenterPoint-Voxel."


def main(args: list[str] | None = None) -> None:
    """Run a verb; a user's mistake ends with its message and exit code 2.

    Args:
        args: Command-line arguments; None takes those of the process.
    """
    args = sys.argv[1:] if args is None else args
    try:
        _dispatch(args)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {error}", style="red", markup=False, highlight=False
        )
        sys.exit(2)


def _dispatch(args: list[str]) -> None:
    plain = _plain_verbs()
    verb = args[0] if args else "--help"
    if verb in plain:
        from jsonargparse import auto_cli

        auto_cli(plain[verb](), args=args[1:], as_positional=verb == "compare", prog=f"cpq_train {verb}")
    elif verb in LIGHTNING_VERBS:
        from cpq_train.lightning_cli import run

        run(args)
    elif verb in ("-h", "--help"):
        print(_usage(plain))
    else:
        raise UserError(f"unknown verb {verb!r}; accepted: {', '.join([*LIGHTNING_VERBS, *plain])}")


def _plain_verbs() -> dict[str, Callable[[], Callable[..., Any]]]:
    return {"simulate": _simulate, "compare": _compare, "describe": _describe}


def _simulate() -> Callable[..., Any]:
    from cpq_train.data.simulator import simulate

    return simulate


def _compare() -> Callable[..., Any]:
    from cpq_train.evaluation.compare import compare

    return compare


def _describe() -> Callable[..., Any]:
    from cpq_train.describe import describe

    return describe


def _usage(plain: dict[str, Any]) -> str:
    verbs = "\n".join(f"  {verb}" for verb in (*LIGHTNING_VERBS, *plain))
    head = f"{DESCRIPTION}\n\nusage: python -m cpq_train VERB [options]\n\nverbs:\n{verbs}"
    return f"{head}\n\npython -m cpq_train VERB --help lists the options of a verb."
