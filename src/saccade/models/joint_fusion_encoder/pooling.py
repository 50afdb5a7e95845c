"""From the states of a sequence to one vector, wherever its padding lies.

Shape letters: B batch, L tokens, D their width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def last_state(states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """The state (B, D) of the last real token; zeros where there is none.

    Args:
        states_BLD: of all tokens.
        mask_BL: not 0 = real token; padding may lie on the left or on the right.

    Raises:
        ValueError: if the mask is not of the states' shape.

    >>> last_state(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    real_BL = _real(states_BLD, mask_BL)
    place_BL = torch.arange(real_BL.shape[1], device=real_BL.device) * real_BL
    last_B = place_BL.argmax(1)
    return states_BLD[torch.arange(len(last_B), device=last_B.device), last_B] * real_BL.any(1, keepdim=True)


def mean_state(states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean (B, D) of the states of real tokens; zeros where there is none.

    Args:
        states_BLD, mask_BL: as of `last_state`, and with its errors.
    """
    real_BL1 = _real(states_BLD, mask_BL)[..., None]
    return torch.where(real_BL1, states_BLD, 0).sum(1) / real_BL1.sum(1).clamp(min=1)


POOLINGS = {"last": last_state, "mean": mean_state}


def packed(x_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The same tokens with all real ones first, in their order, and their mask.

    Args:
        x_BLD: tokens.
        mask_BL: bool, True = real.
    """
    order_BL = (~mask_BL).to(torch.int8).argsort(dim=1, stable=True)
    return x_BLD.gather(1, order_BL[..., None].expand_as(x_BLD)), mask_BL.gather(1, order_BL)


def _real(states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    if states_BLD.ndim != 3 or mask_BL.shape != states_BLD.shape[:2]:
        raise ValueError(
            f"states must be (batch, tokens, width) and the mask of its first two, got {tuple(states_BLD.shape)} and "
            f"{tuple(mask_BL.shape)}"
        )
    return mask_BL != 0
