"""Thresholds per head, found on samples within an error.

Shape letters: H query heads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.attention.spargeattn.operator import spargeattn_attend
from saccade.attention.spargeattn.prediction import sparge_sparsity
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.folder import write_text


@dataclass(frozen=True)
class SpargeThresholds:
    """Calibrated thresholds of one layer, one of each per query head.

    Attributes:
        similarity, cdf, pv: theta, tau, lambda; a head with theta = tau = 1 is dense.
        sparsity: mean share of blocks left out on the calibration inputs.
    """

    similarity: tuple[float, ...]
    cdf: tuple[float, ...]
    pv: tuple[float, ...]
    sparsity: tuple[float, ...]

    def options(self, *, stage_2: bool = True) -> dict[str, Any]:
        """Keyword arguments for `spargeattn_attend`, with the sink that the authors add after tuning."""
        options: dict[str, Any] = {
            "similarity_threshold": self.similarity,
            "cdf_threshold": self.cdf,
            "attention_sink": True,
        }
        return options | ({"pv_threshold": self.pv} if stage_2 else {})

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: str | Path) -> SpargeThresholds:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            found = {name: tuple(map(float, row)) for name, row in json.loads(Path(path).read_text("utf-8")).items()}
            thresholds = cls(**found)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} holds no SpargeAttn thresholds: {error}") from error
        if len({len(row) for row in found.values()}) != 1:
            raise ValueError(f"{path} holds thresholds for different numbers of heads")
        return thresholds


@torch.no_grad()
def calibrate_spargeattn(
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    causal: bool = False,
    l1: float = 0.07,
    pv_l1: float = 0.08,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    smooth_k: bool = True,
) -> SpargeThresholds:
    """Thresholds per head that keep the relative L1 error, sum |sparse - dense| / sum |dense|, below a budget.

    On each input, theta rises from -1 in steps of 1/16 for as long as the sparsity is at least 0.1; for each, the
    smallest tau with an error below `l1` is found by bisection (to 1e-3). For the theta of greatest sparsity, so is
    the smallest lambda with an error below `pv_l1` (from 20, to 0.1). The inputs' results are grouped by theta in
    cells of 2/16; the cell of greatest summed sparsity gives the maxima of its thetas, taus and lambdas. Heads with a
    mean sparsity of at most 0.1 become dense.

    Args:
        inputs: (q, k, v) of the same layer on different data; the paper takes five.
        causal, block_q, block_k, scale, smooth_k: `spargeattn_attend`'s, as the layer will be called.
        l1, pv_l1: the budgets of stage 1 and of both stages, pv_l1 > l1.

    Raises:
        ValueError: if there are no inputs or the budgets do not rise.
    """
    if not inputs:
        raise ValueError("there must be at least one input to calibrate on, got none")
    if not 0 < l1 < pv_l1:
        raise ValueError(f"the budgets must be 0 < l1 < pv_l1, got {l1} and {pv_l1}")
    heads = inputs[0][0].shape[1]
    fixed: dict[str, Any] = {"causal": causal, "block_q": block_q, "block_k": block_k, "scale": scale}
    fixed["smooth_k"] = smooth_k
    found = torch.stack([_calibrate_one(q, k, v, fixed, l1, pv_l1) for q, k, v in inputs])  # inputs, heads, 4

    theta, sparsity = found[..., 0], found[..., 3]
    cell = ((theta + 1) * 8).floor().long()
    summed = torch.zeros(heads, 17).scatter_add_(1, cell.T, sparsity.T)
    inside = cell == summed.argmax(1)
    best = found[..., :3].masked_fill(~inside[..., None], float("-inf")).amax(0)
    mean = sparsity.mean(0)
    best[mean <= 0.1, :2] = 1.0
    rows = [tuple(row) for row in best.T.tolist()]
    return SpargeThresholds(rows[0], rows[1], rows[2], tuple(mean.tolist()))


def _calibrate_one(q: Tensor, k: Tensor, v: Tensor, fixed: dict[str, Any], l1: float, pv_l1: float) -> Tensor:
    """theta, tau, lambda and sparsity of each head on one input, (H, 4)."""
    heads = q.shape[1]
    mask = masks.causal() if fixed["causal"] else None
    dense = attend(q, k, v, mask=mask, scale=fixed["scale"]).double()
    size = dense.abs().sum((0, 2, 3))

    def run(theta: Tensor, tau: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        out, keep = spargeattn_attend(
            q, k, v, similarity_threshold=theta, cdf_threshold=tau, return_map=True, **fixed, **more
        )
        sparsity = sparge_sparsity(keep, causal=fixed["causal"], block_q=fixed["block_q"], block_k=fixed["block_k"])
        return ((out.double() - dense).abs().sum((0, 2, 3)) / size).cpu(), sparsity.mean(0).cpu()

    best = torch.tensor([1.0, 1.0, 50.0, 0.0]).repeat(heads, 1)
    rising = torch.ones(heads, dtype=torch.bool)
    for step in range(32):
        theta = torch.full((heads,), -1 + step / 16)
        tau = _bisect(lambda t, theta=theta: run(theta, t)[0] < l1, heads, 1.0, 0.1, 1e-3)
        _, sparsity = run(theta, tau)
        better = rising & (sparsity > best[:, 3])
        row = torch.stack([theta, tau, torch.full_like(tau, 50.0), sparsity], 1)
        best = torch.where(better[:, None], row, best)
        rising &= sparsity >= 0.1
        if not rising.any():
            break
    theta, tau = best[:, 0], best[:, 1]
    best[:, 2] = _bisect(lambda t: run(theta, tau, pv_threshold=t)[0] < pv_l1, heads, 50.0, 20.0, 0.1)
    return best


def _bisect(good: Any, heads: int, high: float, start: float, resolution: float) -> Tensor:
    """The smallest value per head, between 0 and `high`, that is good; `high` where none below it is."""
    low_H, high_H, value_H = torch.zeros(heads), torch.full((heads,), high), torch.full((heads,), start)
    while (high_H - low_H).max() > resolution:
        fine = good(value_H)
        high_H, low_H = torch.where(fine, value_H, high_H), torch.where(fine, low_H, value_H)
        value_H = (low_H + high_H) / 2
    return high_H
