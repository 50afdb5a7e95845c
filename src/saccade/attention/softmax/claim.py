"""The paper's claim at laptop size: recall at any distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saccade.catalogue import Claim, ClaimResult
from saccade.layers.softmax_attention import SoftmaxAttention

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def _claim(lab: Lab) -> ClaimResult:
    """Every position reaches every other in one step: associative recall at a distance is learned to near 1."""
    _, _, accuracy = lab.recall(lambda dim: SoftmaxAttention(dim, 4, causal=True))
    return ClaimResult({"recall_accuracy": accuracy}, holds=accuracy > 0.9)


CLAIM = Claim(
    paper="attention connects all positions with a constant number of sequential operations",
    expected="a two-layer causal model recalls key-value pairs at any distance (accuracy > 0.9)",
    run=_claim,
)
