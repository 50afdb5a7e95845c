"""What linear attention takes: features, a state, decays in one form; what does not fit is refused here.

Shape letters: B batch, H heads, N tokens, D feature width, E value width (one wider inside where normalised: a column
of ones carries the denominator).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.heads import refuse_strangers

FeatureMap = Callable[[Tensor], Tensor]


def elu_plus_one(x: Tensor) -> Tensor:
    """phi(t) = elu(t) + 1, positive (Katharopoulos et al., arXiv 2006.16236).

    Args:
        x: any tensor.
    """
    return F.elu(x) + 1


class LinearState(NamedTuple):
    """What normalised linear attention keeps of the past: kv (B, H, D, E) = sum k^T v, and z (B, H, D) = sum k.

    Attributes:
        kv: sum k^T v, (B, H, D, E), decayed where there is a decay.
        z: sum k, (B, H, D), likewise.
    """

    kv: Tensor
    z: Tensor


def retention_decay(num_heads: int) -> Tensor:
    """RetNet's decays (H,): 1 - 2^-5, 1 - 2^-6, ...

    Args:
        num_heads: H.

    >>> retention_decay(2).tolist()
    [0.96875, 0.984375]
    """
    return 1 - torch.exp2(-5.0 - torch.arange(num_heads))


# The front door


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool, decay: float | Tensor | None, chunk_size: int | None) -> None:
    refuse_strangers(q, k, v)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"key and value must agree in batch, heads and tokens, got {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"query and key must agree in batch and head_dim, got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the key heads must divide the query heads ({q.shape[1]}), got {k.shape[1]}")
    if causal and k.shape[2] != q.shape[2]:
        raise ValueError(f"causal linear attention needs as many keys as queries, got {q.shape[2]} and {k.shape[2]}")
    if not causal and decay is not None:
        raise ValueError("decay needs causal=True: without an order of tokens nothing decays")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def apply_features(feature_map: FeatureMap, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    mapped = feature_map(q), feature_map(k)
    for given, features in zip((q, k), mapped, strict=True):
        if features.shape[:-1] != given.shape[:-1]:
            raise ValueError(
                f"feature_map must keep all axes but the last, got {tuple(features.shape)} from {tuple(given.shape)}"
            )
    return mapped


def enter_state(
    state: Tensor | LinearState | None, shape: tuple[int, int, int, int], normalize: bool, q: Tensor
) -> Tensor:
    """(B, H, D, E) in the accumulator's dtype; where normalised z stands in one more column."""
    dtype = working_dtype(q.dtype)
    if state is None:
        return q.new_zeros(*shape[:3], shape[3] + normalize, dtype=dtype)
    if normalize != isinstance(state, LinearState):
        wanted = "a LinearState(kv, z) where normalised" if normalize else "a tensor (B, H, D, E) where not normalised"
        raise ValueError(f"state must be {wanted}, got {type(state).__name__}")
    kv = state.kv if isinstance(state, LinearState) else state
    if kv.shape != shape or (isinstance(state, LinearState) and state.z.shape != shape[:3]):
        raise ValueError(f"state must be (B, H, D, E) = {tuple(shape)}, got {tuple(kv.shape)}")
    kv = kv.to(dtype)
    return torch.cat([kv, state.z.to(dtype)[..., None]], -1) if isinstance(state, LinearState) else kv


def leave_state(state: Tensor, normalize: bool) -> Tensor | LinearState:
    return LinearState(state[..., :-1], state[..., -1]) if normalize else state


def as_factors(decay: float | Tensor | None, shape: tuple[int, int, int, int], q: Tensor) -> Tensor | None:
    """Decay as (1, H, 1, 1), (1, H, 1, D), (B, H, N, 1) or (B, H, N, D).

    In the accumulator's dtype, but a factor per head in double: rounding is raised to the power of the length.
    """
    B, H, N, D = shape
    dtype = working_dtype(q.dtype)
    if decay is None:
        return None
    if not isinstance(decay, Tensor):
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        return torch.full((1, H, 1, 1), float(decay), dtype=torch.float64, device=q.device)
    if not decay.is_floating_point():
        raise ValueError(f"decay must be floating point, got {decay.dtype}")
    if decay.device != q.device:
        raise ValueError(f"decay is on {decay.device}, but query is on {q.device}")
    allowed: dict[int, tuple[int, ...]] = {0: (), 1: (H,), 2: (H, D), 3: (B, H, N), 4: (B, H, N, D)}
    full = allowed.get(decay.ndim)
    if full is None or any(
        got not in ((1, want) if decay.ndim > 2 else (want,)) for got, want in zip(decay.shape, full, strict=True)
    ):
        raise ValueError(
            f"decay must be a number, (H,) = {(H,)}, (H, D) = {(H, D)}, (B, H, N) = {(B, H, N)} or (B, H, N, D), "
            f"got shape {tuple(decay.shape)}"
        )
    decay = decay.to(torch.float64 if decay.ndim < 2 else dtype)
    if decay.ndim == 0:
        return decay.expand(1, H, 1, 1)
    if decay.ndim < 3:
        return decay.view(1, H, 1, -1)
    return (decay[..., None] if decay.ndim == 3 else decay).expand(B, H, N, -1)
