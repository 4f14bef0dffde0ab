"""The verbs: those that run a network go through LightningCLI, the others start without Lightning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from cpq_train.common.errors import UserError

LIGHTNING_VERBS = ("fit", "validate", "test", "predict", "calibrate", "sensitivity", "profile")
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
    verb, *rest = args or ["--help"]
    if verb in PLAIN_VERBS:
        PLAIN_VERBS[verb](rest)
    elif verb in LIGHTNING_VERBS:
        from cpq_train.verbs.lightning_cli import run

        run(args)
    elif verb in ("-h", "--help"):
        print(_usage())
    else:
        raise UserError(f"unknown verb {verb!r}; accepted: {', '.join([*LIGHTNING_VERBS, *PLAIN_VERBS])}")


def _simulate(args: list[str]) -> None:
    from jsonargparse import auto_cli

    from cpq_train.simulator import simulate

    auto_cli(simulate, args=args, as_positional=False, prog="cpq_train simulate")


def _build_gt_database(args: list[str]) -> None:
    from jsonargparse import auto_cli

    from cpq_train.data.gt_database import build_gt_database

    auto_cli(build_gt_database, args=args, as_positional=False, prog="cpq_train build-gt-database")


def _describe(args: list[str]) -> None:
    from jsonargparse import auto_cli

    from cpq_train.verbs.describe import describe

    auto_cli(describe, args=args, prog="cpq_train describe")


def _verify(args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from cpq_train.verbs.verify import verify

    parser = ArgumentParser(
        prog="cpq_train verify", description="The integer reference against the training forward."
    )
    parser.add_function_arguments(verify, as_positional=True, skip={"cloud"})
    # By itself jsonargparse would take a list in brackets only.
    parser.add_argument("--cloud", nargs="+", type=Path, help="float32 files as nuScenes has them")
    verify(**parser.parse_args(args).as_dict())


def _convert(args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from cpq_train.verbs.convert import convert

    # Not auto_cli, which has a --config of its own.
    parser = ArgumentParser(prog="cpq_train convert", description="Checkpoints of other projects.")
    parser.add_function_arguments(convert)
    convert(**parser.parse_args(args).as_dict())


def _compare(args: list[str]) -> None:
    from cpq_train.report.compare import compare

    # jsonargparse takes a list only behind an option, and folders read best without one.
    parser = argparse.ArgumentParser("cpq_train compare", description="One table and one report over arms.")
    parser.add_argument("run_dirs", nargs="+", type=Path, help="run directories with a metrics.json")
    parser.add_argument("--output", required=True, type=Path, help="folder of the report")
    parser.add_argument("--wandb", metavar="PROJECT", help="log the report to this W&B project too")
    compare(**vars(parser.parse_args(args)))


PLAIN_VERBS: dict[str, Callable[[list[str]], None]] = {
    "simulate": _simulate,
    "build-gt-database": _build_gt_database,
    "compare": _compare,
    "describe": _describe,
    "verify": _verify,
    "convert": _convert,
}


def _usage() -> str:
    verbs = "\n".join(f"  {verb}" for verb in (*LIGHTNING_VERBS, *PLAIN_VERBS))
    head = f"{DESCRIPTION}\n\nusage: python -m cpq_train VERB [options]\n\nverbs:\n{verbs}"
    return f"{head}\n\npython -m cpq_train VERB --help lists the options of a verb."
