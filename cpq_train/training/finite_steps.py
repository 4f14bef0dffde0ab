"""Sees to it that no weight takes in a loss or a gradient that is not finite.

On the CPU the host looks, and the run ends there. On a GPU it would have to wait for that in every step; so
there the device leaves the update out by itself, and the host, which reads a step late, ends the run then and
names the step that it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from cpq_train.common.errors import UserError
from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.common.late import Array, Mailbox

Explain = Callable[[Mapping[str, Tensor]], UserError]


class FiniteSteps:
    """What a run knows of its losses and gradients."""

    def __init__(self) -> None:
        self._mailbox = Mailbox()

    def check(self) -> None:
        """Look at the steps whose results are still on their way.

        Raises:
            UserError: A loss or a gradient of one of them was not finite.
        """
        self._mailbox.receive()

    def see_loss(self, losses: Mapping[str, Tensor], explain: Explain, is_late: bool) -> Tensor:
        """The loss to go on with.

        Args:
            losses: `loss` and its parts.
            explain: What to say if `loss` is not finite.
            is_late: Whether the device leaves out the update, and the host looks a step late.

        Raises:
            UserError: It is not finite, or something of a step before was not.
        """
        loss = losses["loss"]
        if not is_late:
            if not torch.isfinite(loss):
                raise explain(losses)
            return loss
        self.check()  # of the step before: the device has this one's forward pass to go on with
        is_finite = loss.detach().isfinite()
        kept = {name: value.detach() for name, value in losses.items()}

        def take(is_finite: Array) -> None:
            if not is_finite:
                raise explain(kept)

        self._mailbox.send(is_finite, take)
        # So that no gradient of this step is a number, on any rank.
        return loss * torch.where(is_finite, 1.0, torch.nan)

    def see_gradients(self, module: nn.Module, optimizer: Optimizer, where: str, is_late: bool) -> Tensor:
        """Euclidean norm of all gradients together, a scalar.

        Args:
            module: Whose parameters have them; those without one are left out.
            optimizer: Whose next update is left out if the norm is not finite; has to be fused for that.
            where: Step and rank.
            is_late: See `see_loss`.

        Raises:
            UserError: It is not finite; names the first parameters whose gradients are not.
        """
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        names = list(gradients)
        norm: Tensor
        if not is_late:
            norm = get_total_norm(gradients.values())
            if not norm.isfinite():
                unfit = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
                raise _unfit_gradients(unfit, names, float(norm), where)
            return norm
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))
        norm = torch.linalg.vector_norm(norms)
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]

        def take(norms: Array) -> None:
            *of_each, of_all = norms
            if not np.isfinite(of_all):
                unfit = [name for name, found in zip(names, of_each, strict=True) if not np.isfinite(found)]
                raise _unfit_gradients(unfit, names, float(of_all), where)

        self._mailbox.send(torch.cat([norms, norm[None]]), take)
        return norm


def _unfit_gradients(unfit: Sequence[str], names: Sequence[str], norm: float, where: str) -> UserError:
    first = ", ".join(unfit[:3]) or "none alone, only their norm"
    return UserError(
        f"the gradient norm is {norm} at {where}, and the weights were left as they are: {len(unfit)} of "
        f"{len(names)} parameters have NaN or infinite gradients, first {first}"
    )


def prepare_to_skip(optimizer: Optimizer, device: torch.device) -> None:
    """Let AdamW be one kernel on a GPU, which also leaves an update out where it is told to on the device.

    What a checkpoint from another device says of it is put right.
    """
    is_fused = not are_numbers_at_hand(device)
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = (True, False) if is_fused else (None, None)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].to(device if is_fused else "cpu")
