"""The paper's claim at laptop size: time and memory of variants that no hand-written kernel covers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from saccade.attention.attention_engine.operator import mamba2_attend
from saccade.catalogue import Claim, ClaimResult
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.normalizers import Retention

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def _claim(lab: Lab) -> ClaimResult:
    """Variants that no fused kernel covers against the same with the matrix of scores: time and memory."""
    from saccade.ops.measure import peak_bytes

    n = lab.size(4096, 64)
    q, k = (torch.randn(1, 4, n, 128, generator=lab.generator()) for _ in range(2))
    v = torch.randn(1, 4, n, 64, generator=lab.generator())
    decay = 1 - torch.exp2(-5.0 - torch.arange(4))
    variants: dict[str, dict[str, Any]] = {
        "sigmoid": {"normalize": "sigmoid"},
        "relu": {"normalize": "relu"},
        "retention": {
            "normalize": Retention(),
            "score_mod": lambda s, b, h, i, j: s * decay[h] ** (i - j).abs(),
        },
    }
    measured: dict[str, float] = {}
    for name, options in variants.items():
        eager = partial(attend, q, k, v, mask=masks.causal(), backend="reference", **options)
        tiled = partial(attend, q, k, v, mask=masks.causal(), **options)
        measured[f"{name}_speedup_over_eager"] = lab.seconds(eager, 2) / lab.seconds(tiled, 3)
        measured[f"{name}_memory_over_eager"] = peak_bytes(tiled) / max(1, peak_bytes(eager))
    b = torch.randn(1, 1, n, 64, generator=lab.generator())
    step = torch.rand(1, 4, n, generator=lab.generator())
    scan = lab.seconds(lambda: mamba2_attend(v, step, -torch.rand(4), b, b), repeats=3)
    dense = lab.seconds(lambda: attend(q, k, v, mask=masks.causal()), repeats=3)
    measured["mamba2_speedup_over_softmax"] = dense / scan
    faster = all(value > 1 for name, value in measured.items() if "speedup" in name)
    return ClaimResult(measured, holds=faster and all(v < 0.5 for name, v in measured.items() if "memory" in name))


CLAIM = Claim(
    paper="up to 10.4 x the best existing implementation for variants that hand-written libraries do not cover",
    expected="each variant is faster than written out with its scores, in less than half the memory",
    run=_claim,
)
