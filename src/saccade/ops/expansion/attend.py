"""Attention with a kernel's features as it is called, at once or in segments; and the slow reference.

    o_i = sum_{j<=i} kappa(q_i, k_j) v_j,     kappa(q, k) = a(q) . b(k)

Shape letters: B batch, H heads, K key heads, N queries, M keys, D channels, E value width, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.expansion.kernels import Expansion
from saccade.ops.expansion.operator import cut_tokens
from saccade.ops.export import exporting
from saccade.ops.grad import needs_grad
from saccade.ops.memory import large_empty
from saccade.ops.sharding import in_force, in_parts


@in_parts
def expanded_attend(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHME: Tensor,
    expansion: Expansion,
    *,
    causal: bool = True,
    state: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """o_i = sum_j kappa(q_i, k_j) v_j over j <= i, or over all j; see the top of this file.

    Args:
        q_BHND, k_BHMD, v_BHME: queries, keys and values, as many heads each; N = M where causal.
        expansion: `Polynomial` or `Outer`.
        causal: over j <= i; else over all j.
        state: S of earlier tokens (B, H, F, E), causal only.
        return_state: also return it after the last token.
        chunk_size: tokens of a chunk; the result does not depend on it. None: 128.

    Returns:
        out (B, H, N, E) in float32 (float64 for float64 inputs), a sum that is still to be normalised; or (out, state).

    Raises:
        ValueError: if the shapes do not fit together, or a state is used where not causal.
    """
    (B, H, N, D), (M, E) = q_BHND.shape, v_BHME.shape[2:]
    if k_BHMD.shape != (B, H, M, D) or v_BHME.shape[:2] != (B, H):
        got = ", ".join(str(tuple(x.shape)) for x in (q_BHND, k_BHMD, v_BHME))
        raise ValueError(f"query, key and value must be (B, H, N, D), (B, H, M, D) and (B, H, M, E), got {got}")
    if causal and N != M:
        raise ValueError(f"causal linear attention needs as many keys as queries, got {N} and {M}")
    if not causal and (state is not None or return_state):
        raise ValueError("a state needs causal=True")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    F = expansion.width(D)
    wide = working_dtype(q_BHND.dtype)
    if state is None:
        past = q_BHND.new_zeros(B * H, F if causal else 0, E, dtype=wide)
    elif state.shape != (B, H, F, E):
        raise ValueError(f"state must be (B, H, F, E) = {(B, H, F, E)}, got {tuple(state.shape)}")
    else:
        past = state.to(wide).flatten(0, 1)
    inputs = (*(x.flatten(0, 1) for x in (q_BHND, k_BHMD, v_BHME)), past)
    keep = needs_grad(*inputs)
    chunk_size = chunk_size or 128
    settings = expansion.code, causal, chunk_size, state is None, return_state
    if exporting() and state is None and not return_state:
        q_BHND, k_BHMD, v_BHME = (x.to(wide) for x in (q_BHND, k_BHMD, v_BHME))
        return expanded_attend_reference(q_BHND, k_BHMD, v_BHME, expansion, causal=causal)
    out, after, _ = torch.ops.saccade.expanded(*inputs, *settings, keep)
    out = out.unflatten(0, (B, H))
    return (out, after.unflatten(0, (B, H))) if return_state else out


def in_segments(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    mask_BN: Tensor | None,
    state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """A causal attend(q, k, v, mask, state, return_state) -> (out, state), a few thousand tokens at a time.

    For inference: what is computed around the sums (norms, projections on random directions, columns of ones) would
    else be fresh memory in proportion to the length, which costs more than its arithmetic.

    Args:
        attend: called with tensors of a segment, by position.
        q_BHND, k_BKND, v_BKNE: of all tokens.
        mask_BN: True = real token, or None.
        state: before the first token, or None.
        return_state: whether the state after the last token is wanted.
    """
    (B, H, N, D), E = q_BHND.shape, v_BKNE.shape[3]
    size = max(512, _SEGMENT_ELEMENTS // max(1, B * H * D))
    if (
        size >= N
        or in_force() is not None
        or needs_grad(q_BHND, k_BKND, v_BKNE, state)
        or torch.compiler.is_compiling()
    ):
        return attend(q_BHND, k_BKND, v_BKNE, mask_BN, state, return_state)
    out = large_empty((B, H, N, E), q_BHND.dtype, q_BHND.device)
    for at in cut_tokens(N, size):
        mask = None if mask_BN is None else mask_BN[:, at]
        parts = (x[:, :, at] for x in (q_BHND, k_BKND, v_BKNE))
        out[:, :, at], state = attend(*parts, mask, state, return_state or at.stop < N)
    return out, state


#: elements of the queries of a segment
_SEGMENT_ELEMENTS = 1 << 19


def expanded_attend_reference(
    q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, expansion: Expansion, *, causal: bool = True
) -> Tensor:
    """`expanded_attend` from the N x M matrix of scores. The oracle of the tests.

    Args:
        q_BHND, k_BHMD, v_BHME, expansion, causal: as in `expanded_attend`.
    """
    scores = expansion.scores(q_BHND, k_BHMD)
    return (scores.tril() if causal else scores) @ v_BHME
