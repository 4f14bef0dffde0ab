"""The verbs: those that run a network go through LightningCLI, the others start without torch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args, get_origin, get_type_hints

from cpq_train.common.collection import importing_for_good
from cpq_train.common.console import plain_messages, print_plain
from cpq_train.common.errors import CheckFailed, ForeignCheckpointError, OptionError, UserError
from cpq_train.common.signals import Stopped, exit_code, raising_signals
from cpq_train.resilience.lost_processes import naming_lost_processes
from cpq_train.verbs.mistakes import naming_mistakes

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Verb(NamedTuple):
    """A function behind a verb, imported only when the verb is called.

    Its module imports neither torch nor what brings it: options are read and checked first, and then the
    function imports what does the work.

    Attributes:
        module: Where it is.
        function: Its name; its signature and docstring make the options.
        positional: The parameter given without its name, if there is one.
    """

    module: str
    function: str
    positional: str | None = None


LIGHTNING_VERBS = ("fit", "validate", "test", "predict", "calibrate", "sensitivity", "profile")
PLAIN_VERBS: Final = {
    "simulate": Verb("cpq_train.simulator", "simulate"),
    "build-gt-database": Verb("cpq_train.data.gt_database", "build_gt_database"),
    "score": Verb("cpq_train.verbs.score", "score", "submission"),
    "compare": Verb("cpq_train.report.compare", "compare", "run_dirs"),
    "describe": Verb("cpq_train.verbs.describe", "describe", "checkpoint"),
    "verify": Verb("cpq_train.verbs.verify", "verify", "checkpoint"),
    "export": Verb("cpq_train.verbs.export", "export", "checkpoint"),
    "convert": Verb("cpq_train.verbs.convert", "convert"),
}
DESCRIPTION = "Quantization-aware fine-tuning of CenterPoint-Voxel."


def main(args: list[str] | None = None) -> None:
    """Run a verb; a user's mistake ends with its message and exit code 2, a signal with what is saved.

    A check that failed ends with exit code 1.

    Args:
        args: Command-line arguments; None takes those of the process.
    """
    args = sys.argv[1:] if args is None else args
    try:
        with naming_mistakes(), naming_lost_processes():
            _dispatch(args)
    except Stopped as stop:
        sys.exit(exit_code(stop))
    except CheckFailed as failed:
        print_plain(str(failed), style="red", stderr=True)
        sys.exit(1)
    except UserError as error:
        print_plain(f"error: {_said(error)}", style="red", stderr=True)
        if isinstance(error, OptionError):
            print_plain(f"python -m cpq_train {args[0]} --help lists the options", stderr=True)
        sys.exit(2)


def _said(error: UserError) -> str:
    """Its message; of a file that is not ours also what it is, and how to convert it."""
    if not isinstance(error, ForeignCheckpointError):
        return str(error)
    from cpq_train.interop.recognition import conversion_advice

    return f"{error}; {conversion_advice(error.path)}"


def _dispatch(args: list[str]) -> None:
    verb, *rest = args or ["--help"]
    if verb in PLAIN_VERBS:
        _run_plain(verb, rest)
    elif verb in LIGHTNING_VERBS:
        with importing_for_good():
            import cpq_train.sparse  # noqa: F401 - first, see `cpq_train.sparse.importing`
            from cpq_train.verbs.lightning_cli import run

        with plain_messages():
            run(args)
    elif verb in ("-h", "--help"):
        print(_usage())
    else:
        raise UserError(f"unknown verb {verb!r}; accepted: {', '.join([*LIGHTNING_VERBS, *PLAIN_VERBS])}")


def _run_plain(name: str, args: list[str]) -> None:
    verb = PLAIN_VERBS[name]
    function = getattr(import_module(verb.module), verb.function)
    parser = _parser(f"cpq_train {name}", function, verb.positional)
    given = parser.instantiate_classes(parser.parse_args(args))  # a dataclass of its options
    arguments = {parameter: given[parameter] for parameter in inspect.signature(function).parameters}
    with raising_signals(), plain_messages():
        function(**arguments)


def _parser(prog: str, function: Callable[..., Any], positional: str | None) -> ArgumentParser:
    """Options from a signature and a docstring; a YAML file may hold them, unless `config` is one of them."""
    from docstring_parser import parse
    from jsonargparse import ActionYesNo

    from cpq_train.verbs.parsing import VerbParser

    doc, types = parse(inspect.getdoc(function) or ""), get_type_hints(function)
    texts = {parameter.arg_name: parameter.description for parameter in doc.params}
    parser = VerbParser(prog=prog, description=doc.short_description)
    for name, parameter in inspect.signature(function).parameters.items():
        # By itself jsonargparse would take a list in brackets only.
        item = _item_type(types[name])
        how: dict[str, Any] = {"type": types[name]} if item is None else {"type": item, "nargs": "+"}
        if item is not None and name != positional:
            how["action"] = "extend"  # given twice, the first would be lost
        if types[name] is bool:
            how = {"action": ActionYesNo, "nargs": "?"}  # the name alone, or with true or false
        if parameter.default is not inspect.Parameter.empty:
            how["default"] = parameter.default
        elif name != positional:
            how["required"] = True
        parser.add_argument(name if name == positional else f"--{name}", help=texts[name], **how)
    if "config" not in types:
        parser.add_argument("--config", action="config", help="YAML file with these options")
    return parser


def _item_type(hint: Any) -> Any:
    """What a list holds that a parameter takes; None where it takes none."""
    lists = [part for part in (hint, *get_args(hint)) if get_origin(part) is list]
    return get_args(lists[0])[0] if lists else None


def _usage() -> str:
    verbs = "\n".join(f"  {verb}" for verb in (*LIGHTNING_VERBS, *PLAIN_VERBS))
    head = f"{DESCRIPTION}\n\nusage: python -m cpq_train VERB [options]\n\nverbs:\n{verbs}"
    return f"{head}\n\npython -m cpq_train VERB --help lists the options of a verb."
