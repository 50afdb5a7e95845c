"""NAtS' roles as a policy: tokens stay for ever, until the next such token, or for a window (`saccade.attention.nats`).

    r_j = argmax of W_r x_j per key head:  Global, Local or Sliding                     the first token is Global
    last query that sees j:  none is last;  e_j, the first Global from j on;  j + W

The roles are learned, and a pretrained model has none: W_r must be given, one a layer. Nothing here makes them up.

Shape letters: B batch, K key heads, N tokens that come, M tokens held, C channels, D head dim, F numbers of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.attention.nats import GLOBAL, LOCAL, SLIDING
from saccade.compress.policies.policy import Entering, Held, Policy
from saccade.ops.masks import FOREVER

__all__ = ["Roles"]

_NEVER = float("inf")


@dataclass(frozen=True)
class Roles(Policy):
    """Lifetimes by NAtS' trained roles, of single tokens (its chunks of 1, as in adapting a language model).

    Attributes:
        sinks, recent: where there is a budget too, as for other policies; what lives longest goes last.
        router: the trained projections of the roles by layer of the model, `NAtS.role_proj` each: (B, N, C) ->
            (B, N, 3 K).
        window: W, following queries that see a Sliding token.

    Raises:
        ValueError: if there is no router, or the window is below 0.
    """

    sinks: int = 0
    recent: float = 0.0
    router: Sequence[nn.Module] | None = None
    window: int = 256

    budget_is = "optional"
    #: the last query, and whether the token is a Local that no Global has ended
    numbers = 2
    needs_hidden = True
    is_mortal = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router is None:
            raise ValueError(
                "NAtS learns its roles, and a pretrained model has none: give router=, the trained projections"
            )
        if self.window < 0:
            raise ValueError(f"window must be at least 0, got {self.window}")

    def enter(self, new: Entering, held: Held | None) -> Tensor:
        role_BKN = self._roles(new)
        position_B1N = new.position_BN[:, None].float()
        global_BKN = (role_BKN == GLOBAL).masked_fill(position_B1N < 0, False)
        next_BKN = torch.where(global_BKN, position_B1N, _NEVER).flip(-1).cummin(-1).values.flip(-1)
        last_BKN = torch.where(role_BKN == LOCAL, next_BKN, position_B1N + self.window)
        last_BKN = last_BKN.masked_fill(global_BKN, _NEVER)
        if held is not None:
            last_BKM, waits_BKM = held.numbers_BKMF.unbind(-1)
            ended_BKM = (waits_BKM > 0) & next_BKN[..., :1].isfinite()
            last_BKM.copy_(torch.where(ended_BKM, next_BKN[..., :1], last_BKM))
            waits_BKM.masked_fill_(ended_BKM, 0.0)
        waits_BKN = (role_BKN == LOCAL) & last_BKN.isinf()
        return torch.stack([last_BKN, waits_BKN.float()], -1)

    def _roles(self, new: Entering) -> Tensor:
        K, router = new.k_BKND.shape[1], self.router
        assert router is not None
        if new.hidden_BNC is None:
            raise ValueError("NAtS reads its roles off what the layer reads: give hidden_BNC")
        if new.layer >= len(router):
            raise ValueError(f"router has the projections of {len(router)} layers, none for layer {new.layer}")
        logits = router[new.layer](new.hidden_BNC)
        if logits.shape[-1] != 3 * K:
            raise ValueError(f"the router of layer {new.layer} must give 3 x {K} logits, got {logits.shape[-1]}")
        role_BKN = logits.unflatten(-1, (K, 3)).argmax(-1).transpose(1, 2)
        role_BKN = role_BKN.masked_fill(new.position_BN[:, None] == 0, GLOBAL)
        return role_BKN.masked_fill(new.position_BN[:, None] < 0, SLIDING)

    def last_query(self, held: Held) -> Tensor:
        return held.numbers_BKMF[..., 0].clamp(max=FOREVER).long()

    def score(self, held: Held) -> Tensor:
        return self.last_query(held)
