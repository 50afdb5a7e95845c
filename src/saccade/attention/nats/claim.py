"""The paper's claim at laptop size: recall among distractors, with the cache that roles leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.attention.nats.layer import NAtS
from saccade.attention.nats.operator import live_share
from saccade.catalogue import Claim, ClaimResult
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.pattern import Pattern

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


class _Window(QKVAttention):
    """Sliding window: what the same number of keys would be without roles."""

    left = 0

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return attend(q_BHND, k_BKMD, v_BKME, mask=masks.window(self.left))


def _claim(lab: Lab) -> ClaimResult:
    """Recall among distractors: what the cache holds at the end, and the accuracy, against dense and a window."""
    settings: dict[str, Any] = {"length": 128, "power": 1.0, "layers": 1, "steps": 400, "lr": 5e-3}

    def mixer(penalty: float) -> Any:
        return lambda dim: NAtS(dim, 4, window=4, chunk_size=1, penalty=penalty, rope=False)

    def dense(dim: int) -> nn.Module:
        layer = _Window(dim, 4, True, rope=False)
        layer.left = 2**20
        return layer

    measured = {}
    _, _, measured["dense_recall_accuracy"] = lab.recall(dense, description="dense", **settings)
    model, _, measured["nats_recall_accuracy"] = lab.recall(mixer(5e-6), description="NAtS", **settings)
    layer = next(m for m in model.modules() if isinstance(m, NAtS))
    length = lab.size(128, 48)
    shares: list[float] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shares.append(float(live_share(layer.roles(inputs[0]), length, window=4).mean()))

    hook = layer.register_forward_pre_hook(record)
    with torch.no_grad():
        model(lab.data.recall(lab.size(64, 2), length, 8, power=1.0, generator=lab.generator())[0])
    hook.remove()
    measured["nats_live_kv_share"] = shares[0]

    def window(dim: int) -> nn.Module:
        layer = _Window(dim, 4, True, rope=False)
        layer.left = max(0, round(shares[0] * length) - 1)
        return layer

    _, _, measured["window_of_that_size_recall_accuracy"] = lab.recall(window, description="window", **settings)
    gap = measured["dense_recall_accuracy"] - measured["nats_recall_accuracy"]
    ahead = measured["nats_recall_accuracy"] - measured["window_of_that_size_recall_accuracy"]
    return ClaimResult(measured, holds=gap < 0.05 and shares[0] < 0.6 and ahead > 0.3)


CLAIM = Claim(
    paper="large KV reduction with maintained perplexity (from scratch, PG-19) and needle scores (abstract)",
    expected="on recall of length 128 among distractors, NAtS keeps less than 60 % of the tokens within 5 points "
    "of dense attention's accuracy, 30 points above a window of as many keys as it keeps",
    run=_claim,
)
