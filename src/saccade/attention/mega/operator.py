"""Mega's attention as a function: softmax, Laplace or squared ReLU of biased scores, in chunks or whole.

Shape letters: B batch, N queries, M keys, H heads, Z key width of a head, E width of values.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.ops.attend import attend
from saccade.ops.normalizers import Normalizer, State
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.rope import rotate
from saccade.ops.sharding import places, whole

Attention = Literal["softmax", "laplace", "relu2"]


_MU, _SIGMA = math.sqrt(0.5), math.sqrt(0.25 / math.pi)


def laplace(s: Tensor) -> Tensor:
    """(1 + erf((s - mu) / (sigma sqrt 2))) / 2: near relu(s)^2 in value and slope at mu, and bounded."""
    return 0.5 * (1.0 + torch.erf((s - _MU) / (_SIGMA * math.sqrt(2.0))))


class _Elementwise(Normalizer):
    """Weights that depend on their own score alone, not divided by their sum."""

    none_is_all = True

    def function(self, scores: Tensor) -> Tensor:
        raise NotImplementedError

    def slope(self, scores: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, scores: Tensor, allowed: Any, state: State) -> tuple[Tensor, State, None]:
        weights = self.function(scores)
        return weights if allowed is None else weights.masked_fill(~allowed, 0.0), state, None

    def weights(self, scores: Tensor, allowed: Any, final: State) -> Tensor:
        return self.update(scores, allowed, final)[0]

    def grad(self, scores: Tensor, weights: Tensor, grad_weights: Tensor, delta: Tensor, final: State) -> Tensor:
        return self.slope(scores) * grad_weights


class Laplace(_Elementwise):
    """`laplace` of each score."""

    def function(self, scores: Tensor) -> Tensor:
        return laplace(scores)

    def slope(self, scores: Tensor) -> Tensor:
        return torch.exp((scores - _MU).square() / (-2.0 * _SIGMA**2)) / (_SIGMA * math.sqrt(2.0 * math.pi))


class SquaredRelu(_Elementwise):
    """relu(s)^2 of each score."""

    def function(self, scores: Tensor) -> Tensor:
        return scores.relu().square()

    def slope(self, scores: Tensor) -> Tensor:
        return 2.0 * scores.relu()


NORMALIZERS: dict[str, Any] = {"softmax": "softmax", "laplace": Laplace(), "relu2": SquaredRelu()}


class SimpleBias(nn.Module):
    """B_ij = b[M - 1 + j - i], one learned number per distance below M."""

    def __init__(self, max_positions: int) -> None:
        super().__init__()
        self.max_positions = max_positions
        self.weight = nn.Parameter(0.02 * torch.randn(2 * max_positions - 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # a checkpoint knows its own reach: a chunked layer may have been trained with that of max_positions
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.ndim == 1 and given.numel() % 2 and given.shape != self.weight.shape:
            self.max_positions = (given.numel() + 1) // 2
            self.weight = nn.Parameter(torch.empty_like(self.weight[:1]).expand(given.numel()).clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)


class RotaryBias(nn.Module):
    """B_ij = rot(alpha, i) . rot(beta, j), which depends on i - j."""

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(0.02 * torch.randn(1, key_dim))
        self.beta = nn.Parameter(0.02 * torch.randn(1, key_dim))


def mega_attend(
    q_BHNZ: Tensor,
    k_BHMZ: Tensor,
    v_BHME: Tensor,
    *,
    attention: Attention = "softmax",
    bias: SimpleBias | RotaryBias | None = None,
    mask: GivenMask = None,
    causal: bool = False,
    offset: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """A V with the paper's attention functions and relative biases; query 0 stands at key `offset`.

    Args:
        q_BHNZ, k_BHMZ, v_BHME: queries and keys not scaled yet, values.
        attention: "softmax", "laplace" or "relu2".
        bias: B; None for none.
        mask: bool (B, M), True = real token, or 4 axes, or a mask object (softmax), on top of causality.
        causal: no query sees a later key.
        offset: the key at which query 0 stands.
        dropout: of the weights.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: if shapes do not fit, the attention is unknown, positions exceed the simple bias, or a mask's keys
            cannot be counted.
    """
    if attention not in NORMALIZERS:
        raise ValueError(f"attention must be one of {', '.join(NORMALIZERS)}, got {attention!r}")
    N, M, Z = whole(q_BHNZ.shape[2]), whole(k_BHMZ.shape[2]), q_BHNZ.shape[3]
    pattern = Pattern.of(mask, q_BHNZ.shape[0], N, M, heads=q_BHNZ.shape[1], causal=causal, offset=offset)
    if attention == "softmax":
        q_BHNZ = q_BHNZ * Z**-0.5
    else:
        q_BHNZ = q_BHNZ / _keys_seen(pattern, q_BHNZ, M).to(q_BHNZ.dtype)
    score_mod = None
    if isinstance(bias, RotaryBias):
        q_BHNZ = _with_channels(q_BHNZ, bias.alpha, offset)
        k_BHMZ = _with_channels(k_BHMZ, bias.beta, 0)
    elif bias is not None:
        first, limit = bias.max_positions - 1 - offset, bias.max_positions
        if max(offset + N, M) > limit:
            raise ValueError(f"the simple bias reaches {limit} positions, got {max(offset + N, M)}")
        b = bias.weight

        def score_mod(s: Tensor, _b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + b[first + j - i]

    normalize = NORMALIZERS[attention]
    return attend(
        q_BHNZ, k_BHMZ, v_BHME, mask=pattern.mask, score_mod=score_mod, normalize=normalize, scale=1.0, dropout=dropout
    )


def _with_channels(x_BHNZ: Tensor, vector_1Z: Tensor, start: int) -> Tensor:
    """x with the rotated vector as further channels: their product is the rotary bias, added to the scores."""
    B, H, N, _ = x_BHNZ.shape
    positions_N = places(N, x_BHNZ.device) + start
    rotated_HNZ = rotate(vector_1Z.view(H, 1, -1).expand(H, N, -1), positions_N)
    return torch.cat([x_BHNZ, rotated_HNZ.to(x_BHNZ.dtype).expand(B, -1, -1, -1)], -1)


def _keys_seen(pattern: Pattern, q_BHNZ: Tensor, M: int) -> Tensor:
    """n of each query, at least 1; broadcasts to (B, H, N, 1)."""
    place_N = places(q_BHNZ.shape[2], q_BHNZ.device)
    if pattern.mask is not None and {*pattern.says} - {"causal", "padding"}:
        seen_BHN = pattern.mask.keys_seen(whole(len(place_N)), M, q_BHNZ.device)
        return seen_BHN[..., place_N].clamp(min=1)[..., None]
    last_N = (pattern.offset + place_N).clamp(max=M - 1)
    if pattern.valid_BM is None:
        count = last_N + 1 if pattern.causal else torch.full_like(last_N, M)
        return count.clamp(min=1)[:, None]
    running_BM = pattern.valid_BM.cumsum(1)
    count_BN = running_BM[:, last_N] if pattern.causal else running_BM[:, -1:].expand(-1, len(last_N))
    return count_BN.clamp(min=1)[:, None, :, None]


def position_bias(position: str | None, reach: int, key_dim: int, num_heads: int) -> SimpleBias | RotaryBias | None:
    """The bias of a name: "simple" for positions below `reach`, "rotary", or None. ValueError for another."""
    if position not in ("rotary", "simple", None):
        raise ValueError(f"position must be 'rotary', 'simple' or None, got {position!r}")
    if position is None:
        return None
    if position == "simple":
        if reach < 1:
            raise ValueError(f"max_positions must be at least 1, got {reach}")
        return SimpleBias(reach)
    if key_dim % (2 * num_heads):
        raise ValueError(f"the rotary position needs an even key_dim per head, got {key_dim} for {num_heads} heads")
    return RotaryBias(key_dim)
