"""The paper's claim at laptop size: recall at equal bytes of state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.explain.efficient_attention_survey.layer import RecurrentAttention
from saccade.ops import masks
from saccade.ops.attend import attend

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


class _Window(nn.Module):
    """Softmax attention over the last `keys` keys: the fixed sparse class of the same memory as a state."""

    def __init__(self, dim: int, num_heads: int, keys: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.keys = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), num_heads, keys

    def forward(self, x_BNC: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x_BNC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v, mask=masks.window(self.keys - 1)).transpose(1, 2).flatten(2))


def _claim(lab: Lab) -> ClaimResult:
    """Associative recall at equal bytes of state: dense, then the delta rule, then decay, then a window."""
    from saccade.layers.softmax_attention import SoftmaxAttention

    measured: dict[str, float] = {}
    rows: dict[str, Callable[[int], nn.Module]] = {
        "dense": lambda dim: SoftmaxAttention(dim, 4, causal=True, rope=False),
        "delta": lambda dim: RecurrentAttention(dim, 4, update="delta", chunk_size=32),
        "kernel": lambda dim: RecurrentAttention(dim, 4, update="kernel"),
        "decay": lambda dim: RecurrentAttention(dim, 4, update="decay"),
        # a state of 16 x 16 a head holds as many numbers as keys and values of 8 tokens
        "window": lambda dim: _Window(dim, 4, 8),
    }
    for name, mixer in rows.items():
        _, _, measured[f"{name}_recall_accuracy"] = lab.recall(
            mixer, length=128, pairs=16, power=1.0, layers=1, steps=300, lr=5e-3, description=name
        )
    best = measured["dense_recall_accuracy"]
    order = [measured[f"{name}_recall_accuracy"] for name in ("delta", "decay", "window")]
    return ClaimResult(
        measured,
        holds=best >= order[0] - 0.01 and order[0] > order[1] > order[2],
        note="one learning rate for all; with two layers at 2e-3 nothing but dense had learned it after 300 steps",
    )


CLAIM = Claim(
    paper="linear models lag on recall, bounded by their state: dense >= delta > decay > window at equal bytes",
    expected="the same order on recall of 16 pairs anywhere in 128 tokens, with one layer",
    run=_claim,
)
