"""Linear attention as it is called: of all tokens, of one more, of all pairs, and the slow reference.

    o_i = sum_{j<=i} (prod_{t=j+1..i} decay_t) (q_i . k_j) v_j                       causal
    o_i = sum_j (q_i . k_j) v_j                                                      not causal
    normalised: o_i divided by the same sum with v_j = 1

Shape letters: B batch, H query heads, K key heads (K divides H), N queries, M keys, D feature width, E value width (one
wider inside where normalised: a column of ones carries the denominator).
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import one_type, working_dtype
from saccade.ops.export import exporting
from saccade.ops.grad import needs_grad
from saccade.ops.heads import repeat_heads
from saccade.ops.linear.backends import BACKENDS, choose, make_plan
from saccade.ops.linear.inputs import (
    FeatureMap,
    LinearState,
    apply_features,
    as_factors,
    check,
    enter_state,
    leave_state,
)
from saccade.ops.linear.pieces import divide
from saccade.ops.linear.planning import LinearPlan, LinearProblem, form_of, linear_parts
from saccade.ops.memory import HUGE_FROM, large_empty
from saccade.ops.sharding import dealing, in_parts


@in_parts
def linear_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    feature_map: FeatureMap | None = None,
    decay: float | Tensor | None = None,
    causal: bool = True,
    normalize: bool = False,
    scale: float | None = None,
    state: Tensor | LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    eps: float = 0.0,
    backend: str | None = None,
) -> Any:
    """Linear attention, see the equations at the top of this file, by the path that `linear_plan` names.

    Args:
        q_BHND, k_BKMD, v_BKME: queries, keys, values; K divides H; N = M where causal.
        feature_map: applied to queries and keys, D -> any width; None leaves them as they are.
        decay: factors in (0, 1]: None, a float, (H,), (H, D); or per token (B, H, N), (B, H, N, D), where an axis may
            be 1. D is the width after the feature map. A 0 forgets all that came before (and gets no gradient).
        causal: token i sees tokens j <= i; otherwise all see all, and there is no decay.
        normalize: divide by the sum of the weights; a row whose sum is 0 gives zeros.
        scale: factor of q . k; None is 1 (it matters only where not normalised).
        state: what came before these tokens, as returned by an earlier call: a tensor (B, H, D, E), or a `LinearState`
            where normalised. It decays with the tokens like all that came before.
        return_state: also return the state after the last token: float32 (float64 for float64 inputs), of the same
            type as `state`.
        chunk_size: tokens of a chunk in the causal form (a power of two where decay is per channel); the result does
            not depend on it. None: 128, or 64 where decays vary. Kernels have their own.
        eps: added to the sum of the weights where normalised and not causal, as some papers do.
        backend: "torch", "triton" (kernels for CUDA and HIP devices) or "fla" (flash-linear-attention's, where it is
            installed); None lets the planner choose, which on the CPU is "torch".

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes, dtypes or decay do not fit, a decay is given where not causal, or `eps` where causal or
            not normalised, or the backend asked for cannot do this.

    >>> import torch
    >>> q, k, v = torch.ones(1, 1, 4, 1), torch.ones(1, 1, 4, 1), torch.ones(1, 1, 4, 1)
    >>> linear_attend(q, k, v, decay=0.5).flatten().tolist()
    [1.0, 1.5, 1.75, 1.875]
    """
    if eps and (causal or not normalize):
        raise ValueError(f"eps needs normalize=True and causal=False, got eps={eps}")
    problem, factors, q_BHND, k_BKMD, v_BKME = _asked(
        q_BHND, k_BKMD, v_BKME, feature_map, decay, causal, normalize, scale, chunk_size
    )
    B, H, D, E = problem.B, problem.H, problem.D, problem.E
    name = choose(problem, backend)
    if not causal:
        sums = None if state is None else enter_state(state, (B, H, D, E), normalize, q_BHND)
        out, after = _all_to_all(q_BHND, k_BKMD, v_BKME, sums, problem.scale, normalize, eps)
    else:
        if exporting() and state is None and not return_state:
            return _all_pairs(q_BHND, k_BKMD, v_BKME, factors, problem.scale, normalize)
        past = enter_state(state, (B, H, D, E), normalize, q_BHND)
        out, after = BACKENDS[name].run(problem, q_BHND, k_BKMD, v_BKME, past, factors)
    return (out, leave_state(after, normalize)) if return_state else out


def linear_plan(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    feature_map: FeatureMap | None = None,
    decay: float | Tensor | None = None,
    causal: bool = True,
    normalize: bool = False,
    scale: float | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
    mesh: Any = None,
    balance: str = "contiguous",
    unit: int = 1,
) -> LinearPlan:
    """What `linear_attend` would do with the same arguments: path, reason, FLOPs, bytes, and why not the others.

    Only the feature map is computed, and the tensors may lie on the "meta" device.

    Args:
        q_BHND, k_BKMD, v_BKME, feature_map, decay, causal, normalize, scale: as in `linear_attend`.
        chunk_size, backend: as in `linear_attend`.
        mesh, balance, unit: ranks that share the sequence, as in `saccade.plan`.

    Raises:
        ValueError: where `linear_attend` would, or if there is no rank.

    >>> import torch
    >>> x = torch.ones(1, 1, 4, 1)
    >>> linear_plan(x, x, x, decay=0.5).backend
    'torch'
    """
    problem, factors, _, k, v = _asked(q_BHND, k_BKMD, v_BKME, feature_map, decay, causal, normalize, scale, chunk_size)
    made = make_plan(problem, backend)
    if mesh is None:
        return made
    return replace(made, parts=linear_parts(problem, factors, dealing(mesh, balance, unit), needs_grad(k, v, factors)))


def _asked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap | None,
    decay: float | Tensor | None,
    causal: bool,
    normalize: bool,
    scale: float | None,
    chunk_size: int | None,
) -> tuple[LinearProblem, Tensor | None, Tensor, Tensor, Tensor]:
    """What `linear_attend` was asked, checked: the problem, the decays as factors, and the features and values."""
    q, k, v = one_type(q, k, v)
    check(q, k, v, causal, decay, chunk_size)
    if feature_map is not None:
        q, k = apply_features(feature_map, q, k)
    (B, H, N, D), (K, M), E = q.shape, k.shape[1:3], v.shape[3]
    factors = as_factors(decay, (B, H, N, D), q)
    form = form_of(factors)
    problem = LinearProblem(
        B=B,
        H=H,
        K=K,
        N=N,
        M=M,
        D=D,
        E=E,
        dtype=q.dtype,
        device=q.device,
        causal=causal,
        normalize=normalize,
        form=form,
        scale=1.0 if scale is None else float(scale),
        chunk_size=chunk_size or (64 if form in ("token", "channel") else 128),
    )
    return problem, factors, q, k, v


def linear_step(
    q_BH1D: Tensor,
    k_BK1D: Tensor,
    v_BK1E: Tensor,
    state: Tensor | LinearState | None = None,
    *,
    feature_map: FeatureMap | None = None,
    decay: float | Tensor | None = None,
    normalize: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Any]:
    """One token: S <- decay S + k^T v, o = q S.

    Args:
        q_BH1D, k_BK1D, v_BK1E: query, key and value of the token; K divides H.
        state, feature_map, decay, normalize, scale: as in `linear_attend`; nothing came before where `state` is None.

    Returns:
        out (B, H, 1, E) and the new state; cost and memory do not depend on how many tokens came before.

    Raises:
        ValueError: as `linear_attend`, or if there is not exactly one token.
    """
    check(q_BH1D, k_BK1D, v_BK1E, True, decay, None)
    if q_BH1D.shape[2] != 1:
        raise ValueError(f"linear_step takes one token, got {q_BH1D.shape[2]}")
    if feature_map is not None:
        q_BH1D, k_BK1D = apply_features(feature_map, q_BH1D, k_BK1D)
    (B, H, _, D), E = q_BH1D.shape, v_BK1E.shape[3]
    state = enter_state(state, (B, H, D, E), normalize, q_BH1D)
    factors = as_factors(decay, (B, H, 1, D), q_BH1D)
    q, k, v = (x.to(state.dtype) for x in (q_BH1D, k_BK1D, v_BK1E))
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    new = repeat_heads(k.transpose(2, 3) * v, H)
    state = new + (state if factors is None else factors.transpose(2, 3).to(state.dtype) * state)
    out = (q * (1.0 if scale is None else scale)) @ state
    if normalize:
        out = divide(out)[0]
    return out.to(q_BH1D.dtype), leave_state(state, normalize)


def linear_attend_reference(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    feature_map: FeatureMap | None = None,
    decay: float | Tensor | None = None,
    causal: bool = True,
    normalize: bool = False,
    scale: float | None = None,
    state: Tensor | LinearState | None = None,
    return_state: bool = False,
) -> Any:
    """`linear_attend`, slow and obvious: token after token. The oracle of the tests.

    Args:
        q_BHND, k_BKMD, v_BKME, feature_map, decay, causal, normalize, scale: as in `linear_attend`.
        state, return_state: as in `linear_attend`.

    Raises:
        ValueError: as `linear_attend`.
    """
    check(q_BHND, k_BKMD, v_BKME, causal, decay, None)
    if feature_map is not None:
        q_BHND, k_BKMD = apply_features(feature_map, q_BHND, k_BKMD)
    B, H, N, D = q_BHND.shape
    E = v_BKME.shape[3]
    S = enter_state(state, (B, H, D, E), normalize, q_BHND)
    factors = as_factors(decay, (B, H, N, D), q_BHND)
    q = q_BHND.to(S.dtype) * (1.0 if scale is None else scale)
    k, v = repeat_heads(k_BKMD.to(S.dtype), H), repeat_heads(v_BKME.to(S.dtype), H)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    rows = []
    if not causal:
        S = S + k.transpose(2, 3) @ v
        rows = [q[:, :, i] for i in range(N)]
        rows = [torch.einsum("bhd,bhde->bhe", row, S) for row in rows]
    else:
        for i in range(N):
            if factors is not None:
                S = S * factors[:, :, min(i, factors.shape[2] - 1), :, None].to(S.dtype)
            S = S + k[:, :, i, :, None] * v[:, :, i, None, :]
            rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, i], S))
    out = torch.stack(rows, 2) if rows else q.new_zeros(B, H, 0, S.shape[3])
    if normalize:
        out = divide(out)[0]
    out = out.to(q_BHND.dtype)
    return (out, leave_state(S, normalize)) if return_state else out


def _all_to_all(
    q: Tensor, k: Tensor, v: Tensor, past: Tensor | None, scale: float, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    given, dtype = q.dtype, working_dtype(q.dtype)
    if given != dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = k.mT @ v
    if k.shape[1] != q.shape[1]:
        state = repeat_heads(state, q.shape[1])
    if past is not None:
        state = past + state
    out = _product(q, state if scale == 1.0 else scale * state)
    if eps:
        out = out[..., :-1] / (out[..., -1:] + eps)
    elif normalize:
        out = divide(out)[0]
    return (out if given == dtype else out.to(given)), state


def _all_pairs(q: Tensor, k: Tensor, v: Tensor, factors: Tensor | None, scale: float, normalize: bool) -> Tensor:
    """The causal form for exporters: each pair's product of factors is a difference of sums of logs."""
    given, (H, N), wide = q.dtype, q.shape[1:3], working_dtype(q.dtype)
    q, k, v = q.to(wide), repeat_heads(k.to(wide), H), repeat_heads(v.to(wide), H)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if factors is not None:
        logs = factors.log().expand(-1, -1, N, -1).cumsum(2)
        fading = (logs[:, :, :, None] - logs[:, :, None]).clamp(max=0.0).exp().to(wide)  # (B, H, N, N, 1 or D)
    if factors is None or factors.shape[-1] == 1:
        scores = q @ k.mT * (1.0 if factors is None else fading[..., 0])
    else:
        scores = (q[:, :, :, None] * k[:, :, None] * fading).sum(-1)
    out = scale * scores.tril() @ v
    return (divide(out)[0] if normalize else out).to(given)


def _product(q: Tensor, state: Tensor) -> Tensor:
    """q S; a large one for inference alone is written to huge pages."""
    shape = (*q.shape[:3], state.shape[3])
    if torch.compiler.is_compiling() or prod(shape) * q.itemsize < HUGE_FROM or q.device.type != "cpu":
        return q @ state
    if torch._C._functorch.maybe_current_level() is not None or needs_grad(q, state):
        return q @ state
    return torch.matmul(q, state, out=large_empty(shape, q.dtype, q.device))
