"""Token-sparse work: gather chosen tokens, work on them, add the results back in place.

Every head (expert, window, ...) has its own choice, so choices are (head, batch, slot) and results of several heads
for one token add up. All choices of a call have one number of slots; unused ones are marked by `kept`.

Shape letters: B batch, N tokens, C channels, E heads, S slots of a choice, F channels of a result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def choose(scores_EBN: Tensor, count: int, kept_B: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The `count` highest-scored tokens of each head and row, best first.

    Args:
        kept_B: how many of them count, row by row; all where None.

    Returns:
        positions (E, B, S), and which slots count, (B, S) or None.
    """
    position_EBS = scores_EBN.topk(count, -1).indices
    if kept_B is None:
        return position_EBS, None
    return position_EBS, torch.arange(count, device=kept_B.device) < kept_B[:, None]


def in_order(position_EBS: Tensor, kept_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Slots put in the order of their positions, unused ones at the end, so that `causal()` is their causal mask.

    Returns:
        positions (E, B, S), and the slot from which each came, (E, B, S).
    """
    key_EBS = position_EBS
    if kept_BS is not None:
        key_EBS = torch.where(kept_BS, position_EBS, torch.iinfo(torch.long).max)
    order_EBS = key_EBS.argsort(-1)
    return position_EBS.gather(-1, order_EBS), order_EBS


def gather(x_BNC: Tensor, position_EBS: Tensor) -> Tensor:
    """The tokens at the chosen positions, (E, B, S, C)."""
    B, N, _ = x_BNC.shape
    return F.embedding(_flat(position_EBS, B, N), x_BNC.flatten(0, 1))


def scatter_add(y_EBSF: Tensor, position_EBS: Tensor, length: int) -> Tensor:
    """The sum over heads of results put back at their positions, (B, length, F); zero where none was put."""
    B = y_EBSF.shape[1]
    out = y_EBSF.new_zeros(B * length, y_EBSF.shape[-1])
    out = out.index_add(0, _flat(position_EBS, B, length).flatten(), y_EBSF.flatten(0, 2))
    return out.unflatten(0, (B, length))


def _flat(position_EBS: Tensor, B: int, N: int) -> Tensor:
    return position_EBS + N * torch.arange(B, device=position_EBS.device)[:, None]
