"""What quantizers remember while their network computes: it lives within one forward pass, or one block.

A range that is known need not be worked out for every layer that shares it, and a tensor that several layers
read need not be rounded for each. But nothing remembered may outlive a write to a weight or a range, and not
every write can be seen (`.data.copy_`, a kernel of one's own). So it is dropped behind each forward pass of
the network; inside `frozen`, where nothing may be written, ranges are kept from pass to pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from cpq_train.common.errors import UserError

Use: TypeAlias = tuple[nn.Module, int]


class _Watched(NamedTuple):
    """A tensor that must not be written to: where it belongs, and how often it had been written to."""

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor
    version: int

    @property
    def is_written(self) -> bool:
        is_other = getattr(self.module, self.attribute) is not self.tensor
        return is_other or version_of(self.tensor) != self.version


class _Made(NamedTuple):
    """What was made of a tensor: in which state of it, and for how many readers that have yet to come."""

    tensor: Tensor
    state: tuple[int, ...]
    result: Any
    num_readers: int


class Memo:
    """Quantizer -> what was made of the tensor that it met last, until its last reader has it."""

    def __init__(self) -> None:
        self._made: dict[nn.Module, _Made] = {}

    def __len__(self) -> int:
        return len(self._made)

    def clear(self) -> None:
        """Forget everything."""
        self._made.clear()

    def once(
        self,
        quantizer: nn.Module,
        tensor: Tensor,
        make: Callable[[], Any],
        num_readers: int,
        modes: tuple[bool, ...] = (),
    ) -> Any:
        """What `make` makes of a tensor, made once as long as the tensor and the modes are what they were.

        Args:
            quantizer: Who reads it.
            tensor: What it reads.
            make: Called if nothing that was made fits.
            num_readers: How often the quantizer is expected to read one tensor.
            modes: What the result depends on beside the tensor.
        """
        state = (version_of(tensor), *modes)
        made = self._made.pop(quantizer, None)
        if made is None or made.tensor is not tensor or made.state != state:
            del made  # before the next is made: a map is large
            made = _Made(tensor, state, make(), num_readers)
        if made.num_readers > 1:
            self._made[quantizer] = made._replace(num_readers=made.num_readers - 1)
        return made.result

    def put(
        self, quantizer: nn.Module, tensor: Tensor, result: Any, num_readers: int, modes: tuple[bool, ...]
    ) -> None:
        """Have what was made of a tensor at hand before its first reader asks for it."""
        self._made[quantizer] = _Made(tensor, (version_of(tensor), *modes), result, num_readers)


class Scope:
    """What the quantizers of one network remember; nothing while it is closed.

    Attributes:
        ranges: Quantizer -> its static range.
        weights: Layer -> what its weight was rounded to, together with those of all others.
        codes: Codes of tensors with several readers.
        collected: Which of these tensors a calibrator took in.
        reader_of: Module, and which use of it in a pass -> the quantizer that read what it made; outlives a
            pass.
        members: Static quantizers and quantized layers of the network; None until they are looked for.
        worked_out: All static ranges, as they are in this pass.
        range_table: Works out all ranges; None until it is made, as the next.
        weight_table: Rounds all weights.
        kept: What was made of weights that do not change, and for which state; only while it is frozen.
        is_in_forward: Whether a forward pass is under way; tensors are remembered only then.
        is_frozen: Whether ranges outlive a forward pass.
    """

    def __init__(self) -> None:
        self.ranges: dict[nn.Module, Any] = {}
        self.weights: dict[Any, Any] = {}
        self.codes = Memo()
        self.collected = Memo()
        self.reader_of: dict[Use, Any] = {}
        self.members: Any = None
        self.worked_out: Any = None
        self.range_table: Any = None
        self.weight_table: Any = None
        self._num_uses: Counter[nn.Module] = Counter()
        self._makers = WeakIdKeyDictionary()
        self.kept: dict[Any, tuple[Any, Any]] = {}
        self.is_frozen = False
        self.is_in_forward = False
        self._watched: list[_Watched] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a network remembers nothing."""
        return Scope, ()

    @property
    def is_open(self) -> bool:
        """Whether ranges are remembered."""
        return self.is_in_forward or self.is_frozen

    def next_use(self, module: nn.Module) -> Use:
        """A use of a module, in the order of this pass."""
        self._num_uses[module] += 1
        return module, self._num_uses[module]

    def note_maker(self, tensor: Tensor, use: Use) -> None:
        """Remember until the end of the pass which use of a module made a tensor."""
        self._makers[tensor] = use

    def note_reader(self, tensor: Tensor, quantizer: nn.Module) -> None:
        """Remember who reads what a module made that said so."""
        use: Use | None = self._makers.get(tensor)
        if use is not None:
            self.reader_of[use] = quantizer

    def keep(self, key: Any, make: Callable[[], Any], state: Any = None) -> Any:
        """What `make` makes; made once as long as the network is frozen and a state is what it was."""
        if not self.is_frozen:
            return make()
        if key not in self.kept or self.kept[key][0] != state:
            # As ranges are: what is made in inference mode could not be saved for a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self.kept[key] = state, make()
        return self.kept[key][1]

    def begin_forward(self) -> None:
        """Open it for a forward pass.

        Raises:
            UserError: See `check_unwritten`.
        """
        self.check_unwritten()
        self._num_uses.clear()
        self.is_in_forward = True

    def check_unwritten(self) -> None:
        """Look at the tensors that must not be written to.

        Raises:
            UserError: It is frozen, and one of them was.
        """
        if written := [w.name for w in self._watched if w.is_written]:
            raise UserError(
                f"{len(written)} tensors were written to while their network is frozen, the first of them "
                f"{written[0]}; accepted: inside frozen(network) neither weights nor ranges change"
            )

    def end_forward(self) -> None:
        """Close it, and drop what does not outlive the pass."""
        self.is_in_forward = False
        self._makers.clear()
        self.codes.clear()
        self.collected.clear()
        if not self.is_frozen:
            self._forget()

    def _forget(self) -> None:
        self.ranges.clear()
        self.weights.clear()
        self.worked_out = None

    def range_of(self, quantizer: nn.Module) -> Any:
        """What was worked out of a quantizer's range at the start of the pass, if it was."""
        return None if self.worked_out is None else self.worked_out.range_of(quantizer)

    def freeze(self, tensors: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Keep ranges from pass to pass until `thaw`.

        Args:
            tensors: Name -> module and attribute of what must not be written to meanwhile.
        """
        found = ((name, *place, getattr(*place)) for name, place in tensors.items())
        self._watched = [
            _Watched(name, module, attribute, tensor, version_of(tensor))
            for name, module, attribute, tensor in found
            if tensor is not None
        ]
        self.is_frozen = True

    def thaw(self) -> None:
        """Drop what was kept."""
        self.is_frozen, self._watched = False, []
        self._forget()
        self.kept.clear()


@contextmanager
def frozen_scope(scope: Scope, tensors: Mapping[str, tuple[nn.Module, str]]) -> Iterator[None]:
    """See `Scope.freeze`; a block inside another adds nothing.

    Raises:
        UserError: A tensor was written to, see `Scope.check_unwritten`.
    """
    if scope.is_frozen:
        yield
        return
    scope.freeze(tensors)
    try:
        yield
        scope.check_unwritten()  # for what ran since without a forward pass that would have said so
    finally:
        scope.thaw()


def modes_of(tensor: Tensor) -> tuple[bool, ...]:
    """What codes of a tensor depend on beside its numbers: whether they have a gradient."""
    return tensor.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as torch counts; always 0 for one of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def is_gradient_watched(tensor: Tensor) -> bool:
    """Whether somebody sees the gradient of a tensor, or changes it: then all readers have to contribute."""
    return tensor.retains_grad or bool(tensor._backward_hooks)


def are_saved_tensors_hooked() -> bool:
    """Whether hooks take what is saved for a backward pass, as those of a checkpoint do."""
    try:
        with disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:  # there are some; torch has no other way to ask that all its releases know
        return True
