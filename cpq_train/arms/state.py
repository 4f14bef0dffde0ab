"""The tensors of a checkpoint against the network that is about to load them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cpq_train.common.checkpoint import is_alike
from cpq_train.common.errors import UserError, shown
from cpq_train.models.config import NetworkConfig, as_tuples
from cpq_train.quantization.health import refuse
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.ranges.calibration import AMAX, problems_of_state

NUM_SHOWN = 2


def check_state(
    network: nn.Module, state: Mapping[str, Tensor], path: str | Path, what: str = "model.network"
) -> None:
    """Compare tensors with those of the network, by name and shape, and look at every value.

    Args:
        network: In the structure of the checkpoint.
        state: The checkpoint's tensors by the network's names.
        path: For messages.
        what: What the network is called in messages.

    Raises:
        UserError: They differ, and how many are of another kind, missing, unexpected or of another shape;
            ranges are missing or unfit, with a table of them; or see `check_numbers`.
    """
    where = f"checkpoint {str(path)!r}"
    _check_kinds(network.state_dict(), state, where)
    problems = problems_of_state(network, state)
    unfit = {problem.quantizer + AMAX for problem in problems}
    state = {name: tensor for name, tensor in state.items() if name not in unfit}
    own = {name: tensor for name, tensor in network.state_dict().items() if name not in unfit}
    if found := differences(own, state, "of another shape", _shape):
        raise UserError(f"{where} is of another architecture than {what}: {found}")
    refuse(problems, f"{where}: ")
    check_numbers(network, state, where)


def check_numbers(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Look at what training changes of a network; other buffers, such as masks, may hold any number.

    Args:
        network: Whose tensors they are.
        state: The tensors by the network's names.
        where: What the sentence starts with.

    Raises:
        UserError: A parameter, a range or a statistic of a normalisation is NaN or infinite.
    """
    names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    for module_name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, _NormBase | Quantizer):
            names |= {f"{module_name}.{buffer}" for buffer in module._buffers}
    check_finite({name: tensor for name, tensor in state.items() if name in names}, where)


def check_groups(config: NetworkConfig, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Compare the classes that a checkpoint says its heads are of with those of the network.

    Args:
        config: Of the network.
        checkpoint: Its content; files of earlier releases may not say them.
        path: For messages.

    Raises:
        UserError: They are others, or in another order: their tensors may have the same shapes.
    """
    said = checkpoint.get("hyper_parameters")
    network = said.get("network") if isinstance(said, Mapping) else None
    groups = network.get("class_groups") if isinstance(network, Mapping) else None
    if groups is not None and as_tuples(groups) != config.class_groups:
        raise UserError(
            f"checkpoint {str(path)!r} was made for class_groups {shown(groups)}; model.network.class_groups "
            f"is {shown(config.class_groups)}: accepted: the same, in their order"
        )


def check_part(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path) -> None:
    """Compare the tensors of a part of a float network, see `check_state`.

    Args:
        own: Those of the network.
        state: Those of the checkpoint.
        path: For messages.

    Raises:
        UserError: They differ, or hold NaN or infinite numbers.
    """
    where = f"checkpoint {str(path)!r}"
    _check_kinds(own, state, where)
    if found := differences(own, state, "of another shape", _shape):
        raise UserError(f"{where} differs from model.network in model.weights_parts: {found}")
    check_finite(state, where)


def _check_kinds(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    kinds = [
        f"{name} {state[name].dtype} instead of {own[name].dtype}"
        for name in sorted(set(own) & set(state))
        if not is_alike(state[name].dtype, own[name].dtype)
    ]
    if kinds:
        raise UserError(f"{where}: {len(kinds)} tensors hold other numbers ({_some(kinds)})")


def check_finite(state: Mapping[str, Any], where: str) -> None:
    """Look for numbers that no training leaves behind and no engine can run.

    Args:
        state: Name -> tensor; other values are passed over.
        where: What the sentence starts with.

    Raises:
        UserError: A tensor holds NaN or infinite numbers; names the first ones.
    """
    if unfit := not_finite(state):
        raise UserError(f"{where}: {len(unfit)} tensors hold NaN or infinite numbers: {_some(unfit)}")


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that hold NaN or infinite numbers, each with how many of how many."""
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    counts = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    return [f"{name} ({count} of {tensors[name].numel()})" for name, count in counts.items() if count]


def differences(
    own: Mapping[str, Any], said: Mapping[str, Any], what: str, seen: Callable[[Any], Any]
) -> str:
    """What tells a checkpoint and a network apart; empty where nothing does.

    Args:
        own: Name -> what the network has.
        said: Name -> what the checkpoint has.
        what: What those are called that have a name in common and differ.
        seen: What is compared of them.
    """
    pairs = {name: (seen(said[name]), seen(own[name])) for name in sorted(own.keys() & said.keys())}
    parts = {
        "missing": sorted(own.keys() - said.keys()),
        "unexpected": sorted(said.keys() - own.keys()),
        what: [
            f"{name} {theirs} instead of {mine}" for name, (theirs, mine) in pairs.items() if theirs != mine
        ],
    }
    return "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in parts.items() if names)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NUM_SHOWN]) + (", ..." if len(names) > NUM_SHOWN else "")
