"""The paper's claim as an experiment."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.multi_token.layer import MultiTokenAttention
from saccade.attention.multi_token.operator import LETTERS, WIDTH, find_block
from saccade.catalogue import Claim, ClaimResult
from saccade.layers.qkv_attention import QKVAttention
from saccade.layers.softmax_attention import SoftmaxAttention

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def _claim(lab: Lab) -> ClaimResult:
    """Finding the block that holds both letters of a question: one weight per token pair, or convolved weights."""

    def model(mixer: type[QKVAttention], **options: Any) -> nn.Module:
        return lab.sequence_model(lambda _: mixer(64, 2, True, **options), vocab=LETTERS + 2, dim=64, layers=2)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0])[:, -WIDTH:].flatten(0, 1), batch[1][:, -WIDTH:].flatten())

    tokens, labels = find_block(lab.size(2048, 2), lab.held_out())

    def measure(trial: Trial) -> dict[str, float]:
        """Held-out questions whose block is not given without a mistake; letters before the asked one are known."""
        right = trial.model(tokens)[:, -WIDTH:].argmax(-1) == labels[:, -WIDTH:]
        return {"error": 1.0 - right.all(-1).float().mean().item()}

    forms = {
        "multi_token": partial(model, MultiTokenAttention, kernel_size=(2, 5), kernel_size_after=(2, 5)),
        "softmax": partial(model, SoftmaxAttention),
    }
    measured = lab.forms(forms, partial(find_block, lab.size(32, 2)), measure, 1000, loss=loss, lr=5e-3).means()
    return ClaimResult(measured, holds=measured["multi_token_error"] < 0.5 * measured["softmax_error"])


CLAIM = Claim(
    paper="a weight that depends on several queries and keys finds the block with all letters of a question: error "
    "0.1 % against 51.6 % for softmax attention (blocks of 5, questions of 2); better perplexity with 0.001 % more "
    "parameters",
    expected="two layers, six blocks of three letters, questions of two: after the same few steps less than half "
    "of the error of softmax attention",
    run=_claim,
)
