"""The paper's claim at laptop size: the time of a window and of a soft cap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from saccade.catalogue import Claim, ClaimResult
from saccade.ops import masks, score_mods
from saccade.ops.attend import attend

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def _claim(lab: Lab) -> ClaimResult:
    """A window at length against dense SDPA, and score modifications against plain causal attention by the engine."""
    n = lab.size(16384, 256)
    reach = lab.size(1023, 31)
    q, k, v = (torch.randn(1, 4, n, 64, generator=lab.generator()) for _ in range(3))
    dense = lab.seconds(lambda: attend(q, k, v, mask=masks.causal()), repeats=2)
    window = lab.seconds(lambda: attend(q, k, v, mask=masks.window(reach)), repeats=3)
    pairs = n * (reach + 1) - reach * (reach + 1) / 2
    ideal = (n * (n + 1) / 2) / pairs
    few = lab.size(4096, 64)
    short = [x[:, :, :few] for x in (q, k, v)]
    plain = lab.seconds(lambda: attend(*short, mask=masks.causal()), repeats=3)
    cap = score_mods.soft_cap(30.0)
    eager = lab.seconds(lambda: attend(*short, mask=masks.causal(), score_mod=cap, backend="reference"), 2)
    capped = lab.seconds(lambda: attend(*short, mask=masks.causal(), score_mod=cap), repeats=3)
    measured = {
        "window_1024_at_16k_speedup": dense / window,
        "window_speedup_share_of_ideal": dense / window / ideal,
        "soft_cap_speedup_over_eager": eager / capped,
        "soft_cap_time_over_plain_causal": capped / plain,
    }
    return ClaimResult(measured, holds=dense / window > 0.7 * ideal and capped < eager)


CLAIM = Claim(
    paper="variants of two functions run at 0.68 to 1.43 times FlashAttention's speed; masks skip empty blocks",
    expected="a window of 1024 at 16k reaches 70 % of its ideal speed-up; a soft cap is faster than the eager form",
    run=_claim,
)
