"""What `verify` finds: layers against the integer reference, and networks against stand-ins for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cpq_train.models import HeadOutput, NetworkConfig
from cpq_train.models.decode import Detections, PostProcessing, decode
from cpq_train.quantization.verification.end_to_end import Flips
from cpq_train.quantization.verification.layers import LayerReport

OUTPUT_TOLERANCE = 1e-3
"""Of head outputs made from equal codes where a kernel sums fp32 numbers."""


@dataclass
class EndToEnd:
    """A network against what stands in its place, over all samples.

    Args:
        stand_in: What that is, for sentences.
        flips: Of codes and head outputs.
        num_detections: Boxes that the network found.
        num_other_detections: Boxes that differ between the two.
        is_exact: Whether boxes have to be equal. A few codes beside a tie change hundreds of boxes in a last
            digit, so they say nothing of an engine that rounds such codes its own way; its layers are judged
            one by one.
    """

    stand_in: str
    flips: Flips = field(default_factory=Flips)
    num_detections: int = 0
    num_other_detections: int = 0
    is_exact: bool = True

    def count_detections(
        self,
        ours: Sequence[HeadOutput],
        theirs: Sequence[HeadOutput],
        config: NetworkConfig,
        post: PostProcessing,
    ) -> None:
        """Take in the outputs of both for one sample."""
        mine, other = (decode(heads, config, post)[0] for heads in (ours, theirs))
        self.num_detections += len(mine.scores)
        self.num_other_detections += num_different(mine, other)

    def failures(self, max_flipped_share: float) -> list[str]:
        """What is above its bound, a line each."""
        flips, against = self.flips, f"against {self.stand_in}"
        checks = {
            f"a share of {flips.flipped_share:.2g} of the codes flipped {against}; "
            f"max_flipped_share is {max_flipped_share:g}": flips.flipped_share > max_flipped_share,
            f"{flips.num_further} codes are more than one step apart {against}": flips.num_further > 0,
            f"{self.num_other_detections} detections differ {against}": (
                self.is_exact and self.num_other_detections > 0
            ),
            f"head outputs on the network's codes differ by up to {flips.largest_difference:g} {against}": (
                not self.is_exact and flips.largest_difference > OUTPUT_TOLERANCE
            ),
        }
        return [text for text, failed in checks.items() if failed]

    def sentence(self) -> str:
        """What was found."""
        flips = self.flips
        how = "end to end" if self.is_exact else "layer by layer (codes, outputs) and end to end (detections)"
        return (
            f"{how} against {self.stand_in}: of {flips.num_codes:,} codes {flips.num_flipped:,} differ "
            f"by one step and {flips.num_further:,} by more; of {flips.num_outputs:,} head outputs "
            f"{flips.mismatched_outputs:,} differ, by up to {flips.largest_difference:g}; of "
            f"{self.num_detections:,} detections {self.num_other_detections:,} differ"
        )

    def document(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "end_to_end": asdict(self.flips),
            "num_detections": self.num_detections,
            "num_other_detections": self.num_other_detections,
        }


@dataclass
class Findings:
    """All that was compared.

    Args:
        layers: Name -> report.
        reference: The network against itself with the integer reference in place of its layers.
        engine: The network against the engine of a deployment file, where there is one.
        other_numbers: What that file says that the network does not.
    """

    layers: dict[str, LayerReport] = field(default_factory=dict)
    reference: EndToEnd = field(default_factory=lambda: EndToEnd("the integer reference"))
    engine: EndToEnd | None = None
    other_numbers: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Layers and the network against the reference, as plain values."""
        return {"layers": [asdict(report) for report in self.layers.values()], **self.reference.document()}

    def failures(self, max_flipped_share: float) -> list[str]:
        """What is above its bound, a line each."""
        wrong = [r.name for r in self.layers.values() if r.num_mismatched]
        unseen = [r.name for r in self.layers.values() if r.not_covered and r.arithmetic == "integer"]
        numbers = "; ".join(self.other_numbers)
        checks = {
            f"{len(wrong)} layers differ from the integer reference: {', '.join(wrong)}": bool(wrong),
            f"{len(unseen)} integer layers were not compared: {', '.join(unseen)}": bool(unseen),
            f"the engine's file holds other numbers: {numbers}": bool(numbers),
        }
        of_engine = [] if self.engine is None else self.engine.failures(max_flipped_share)
        found = [text for text, failed in checks.items() if failed]
        return [*found, *self.reference.failures(max_flipped_share), *of_engine]


def num_different(a: Detections, b: Detections) -> int:
    """Rows of the longer list that differ in box, score or label, or have no counterpart."""
    rows_a, rows_b = (torch.cat([d.boxes, d.scores[:, None], d.labels[:, None]], 1) for d in (a, b))
    num_common = min(len(rows_a), len(rows_b))
    num_unequal = int((rows_a[:num_common] != rows_b[:num_common]).any(1).sum())
    return num_unequal + max(len(rows_a), len(rows_b)) - num_common
