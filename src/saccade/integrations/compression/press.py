"""kvpress' interface, both ways: a press as a policy here, and a policy as a press there.

A press is an object with `compress(module, hidden_states, keys, values, attentions, kwargs)`, which is called once
after a layer has read the prompt, and gives back fewer keys and values; and with `compression_ratio`, the share
that goes. Read from kvpress 0.5.5, whose presses are more than that: some begin with `post_init_from_model(model)`,
some work by hooks of their own, and some only hide keys from kvpress' own attention; the last two are refused.

Shape letters: B batch, H query heads, K key heads, N tokens of the prompt, M those that stay, D head dim,
E width of values, C channels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saccade.compress.policies import Entering, Held, Policy
from saccade.ops import masks, score_mods
from saccade.ops.attend import attend
from saccade.ops.ragged import received_weights

__all__ = ["PolicyPress", "Press", "PressPolicy", "as_press"]


class Press(Protocol):
    """What kvpress' presses are, as far as they are used here."""

    compression_ratio: float

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class PressPolicy(Policy):
    """A press: after the prompt its keys and values are stored, and what is decoded is added to them, as kvpress does.

    `attentions` is None: no weights are kept. Positions of what stays are not known. A press knows no padding.

    Attributes:
        sinks, recent: of no effect.
        press: the press, whose `compression_ratio` is the budget.
        rotary: the module of the model that makes rotary positions, which some presses look for in the layer.

    Raises:
        ValueError: if there is none, or it does not work by `compress` alone.
    """

    press: Press | None = None
    rotary: nn.Module | None = field(default=None, repr=False, compare=False)

    budget_is = "refused"
    needs_hidden = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.press is None:
            raise ValueError("a policy of a press needs one: press=")
        base = getattr(sys.modules.get("kvpress"), "BasePress", None)
        if base is not None and isinstance(self.press, base):
            for name in ("forward_hook", "__call__"):
                if getattr(type(self.press), name) is not getattr(base, name):
                    raise ValueError(f"{type(self.press).__name__} works by a {name} of its own, not by compress alone")

    def prepared(self, model: nn.Module, rotary: nn.Module | None) -> PressPolicy:
        """This for a model, which the press is told, as kvpress does.

        Args:
            model: the whole of it.
            rotary: see above.
        """
        tell = getattr(self.press, "post_init_from_model", None)
        if tell is not None:
            tell(model)
        return replace(self, rotary=rotary)

    def score(self, held: Held) -> Tensor:
        return held.position_BKM

    def shorten(self, new: Entering) -> tuple[Tensor, Tensor]:
        if bool((new.position_BN < 0).any()):
            raise ValueError(f"{type(self.press).__name__} takes no padding: run prompts of one length, or one by one")
        assert self.press is not None and new.hidden_BNC is not None
        module, given = new.call["module"], {name: value for name, value in new.call.items() if name != "module"}
        with _rotary(module, self.rotary):
            kept = self.press.compress(module, new.hidden_BNC, new.k_BKND, new.v_BKNE, None, given)
        if getattr(module, "masked_key_indices", None) is not None:
            module.masked_key_indices = None  # type: ignore[assignment]
            raise ValueError(f"{type(self.press).__name__} drops no keys, it hides them from kvpress' own attention")
        return kept


@contextmanager
def _rotary(module: Any, rotary: nn.Module | None) -> Iterator[None]:
    """The layer with `rotary_emb`, where kvpress' presses look for it; afterwards as before."""
    lent = rotary is not None and not hasattr(module, "rotary_emb")
    if lent:
        module.rotary_emb = rotary
    try:
        yield
    finally:
        if lent:
            del module.rotary_emb


@dataclass
class PolicyPress:
    """A policy as a press, for whatever knows that interface; `as_press` makes one that kvpress itself takes.

    Attributes:
        policy: one that scores tokens.
        compression_ratio: share of the prompt's tokens that goes.

    Raises:
        ValueError: if the ratio is out of its range, or the policy does not choose by score.
    """

    policy: Policy
    compression_ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.compression_ratio < 1:
            raise ValueError(f"compression_ratio must be at least 0 and below 1, got {self.compression_ratio}")
        if self.policy.is_mortal or self.policy.budget_is != "needed":
            raise ValueError(f"{type(self.policy).__name__} does not choose tokens by score: it is no press")

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """(B, K, N): the tokens of highest score stay.

        Args:
            module: the attention layer, with `q_proj` where the policy must know weights that are not given.
            hidden_states: what it reads, (B, N, C).
            keys, values: (B, K, N, D).
            attentions: its weights (B, H, N, N), or None.
            kwargs: what it was called with.
        """
        B, K, N, _ = keys.shape
        position_BN = torch.arange(N, device=keys.device).expand(B, -1)
        new = Entering(getattr(module, "layer_idx", 0), position_BN, keys, values, hidden_states, kwargs)
        numbers = self.policy.enter(new, None)
        if numbers is None:
            numbers = keys.new_zeros(B, K, N, 0, dtype=torch.float32)
        elif self.policy.accumulates:
            numbers[..., 0] += self._received(module, hidden_states, keys, attentions, kwargs)
        position_BKN = position_BN[:, None].expand(-1, K, -1)
        seen_B = torch.full((B,), N, device=keys.device)
        held = Held(position_BKN, numbers, seen_B, torch.ones_like(position_BKN, dtype=torch.bool))
        return self.policy.priority(held, torch.full_like(seen_B, self._kept(N)))

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that stay, in their order.

        Args:
            module, hidden_states, keys, values, attentions, kwargs: as in `score`.
        """
        kept = self._kept(keys.shape[2])
        if kept == keys.shape[2]:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        index_BKM1 = scores.topk(kept, -1).indices.sort(-1).values[..., None]
        found = (x.gather(2, index_BKM1.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
        return next(found), next(found)

    def _kept(self, tokens: int) -> int:
        return max(1, int(tokens * (1 - self.compression_ratio)))

    def _received(
        self, module: nn.Module, hidden_BNC: Tensor, k_BKND: Tensor, attentions: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        N = k_BKND.shape[2]
        start = N - self.policy.watched(N)
        if attentions is not None:
            return attentions[:, :, start:].float().sum(2).unflatten(1, (k_BKND.shape[1], -1)).sum(2)
        q_BHND = _queries(module, hidden_BNC, k_BKND.shape[3], kwargs)
        scores: dict[str, Any] = {"scale": getattr(module, "scaling", k_BKND.shape[3] ** -0.5)}
        cap = getattr(module, "attn_logit_softcapping", None)
        mod = None if cap is None else score_mods.soft_cap(cap)
        lse = attend(q_BHND, k_BKND, k_BKND[..., :0], mask=masks.causal(), score_mod=mod, return_lse=True, **scores)[1]
        last = torch.full((1, 1, N), N, device=k_BKND.device)
        return received_weights(q_BHND, k_BKND, lse, last, start=start, soft_cap=cap, **scores)


def _queries(module: Any, hidden_BNC: Tensor, width: int, kwargs: dict[str, Any]) -> Tensor:
    """The queries of a layer of transformers, with their positions rotated in."""
    rotary = kwargs.get("position_embeddings")
    if not hasattr(module, "q_proj") or rotary is None:
        raise ValueError(
            f"{type(module).__name__} has no q_proj, or was called without position_embeddings: give attentions"
        )
    q_BHND = module.q_proj(hidden_BNC).unflatten(-1, (-1, width)).transpose(1, 2)
    if getattr(module, "q_norm", None) is not None:
        q_BHND = module.q_norm(q_BHND)
    cos, sin = (x[:, None] for x in rotary)
    turned, rest = q_BHND.split([cos.shape[-1], width - cos.shape[-1]], -1)
    left, right = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-right, left], -1) * sin, rest], -1)


def as_press(policy: Policy, compression_ratio: float = 0.5) -> PolicyPress:
    """A policy as an object with kvpress' interface.

    Where kvpress was imported before, it is a `ScorerPress` of it too: `with as_press(policy)(model):` and kvpress'
    pipeline and wrappers take it.

    Args:
        policy: one that scores tokens.
        compression_ratio: share of the prompt's tokens that goes.

    Raises:
        ValueError: if the ratio is out of its range, or the policy does not choose by score.

    >>> from saccade.compress.policies import KeyNorm
    >>> press = as_press(KeyNorm(sinks=0, recent=0.0), 0.5)
    >>> keys = torch.tensor([3.0, 1.0, 4.0, 2.0]).view(1, 1, 4, 1)
    >>> press.compress(torch.nn.Module(), torch.zeros(1, 4, 1), keys, keys, None, {})[0].flatten().tolist()
    [1.0, 2.0]
    """
    kvpress = sys.modules.get("kvpress")
    kind = PolicyPress if kvpress is None else _scorer(kvpress.ScorerPress)
    return kind(policy, compression_ratio)


@cache
def _scorer(base: type) -> type[PolicyPress]:
    """`PolicyPress` with what kvpress' scorers inherit: the context manager and its hooks."""
    return type("PolicyPress", (PolicyPress, base), {})
